# Copyright 2026 physai_decode developers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
The node's settings: frozen dataclasses, one per group, with their defaults and checks.

Each default is defined only here. A field's metadata holds what a ROS parameter descriptor needs:
a description, a range or choices, and whether the field may change while the node runs. This
module imports neither ROS nor torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import Field
from dataclasses import field
from dataclasses import fields
import json
import re
import reprlib
from typing import Any

MAX_ITEMS = 64                  # of a list
SERVER = 'openai'               # value of engine.name for a model on a server


class ConfigError(ValueError):
    """A setting is invalid; the message has its name, its value and what is allowed."""


def _option(default: Any, description: str, *, low: float | None = None,
            high: float | None = None, unless_0: float = 0, choices: tuple[str, ...] = (),
            others: str = '', dynamic: bool = False, characters: int = 4096,
            items: type = str) -> Any:
    """
    Declare one field.

    :param low: minimum, inclusive and in the unit of the field's name; ``high`` is the maximum.
    :param unless_0: minimum of a value other than 0.
    :param others: description of further values that are allowed besides ``choices``.
    :param dynamic: whether the value may change while the node runs.
    :param characters: limit on the length of a string.
    :param items: type of the items of a list, str or int.
    """
    return field(default=default, metadata={
        'description': description, 'low': low, 'high': high, 'unless_0': unless_0,
        'choices': choices, 'others': others, 'dynamic': dynamic,
        'characters': characters, 'items': items})


@dataclass(frozen=True)
class ModelConfig:
    """The model to load."""

    path: str = _option(
        'builtin:tiny_planner', 'a model of the package (builtin:NAME), a folder in Hugging Face '
        'layout, or a hub id. The default applies only without a params file; a node with a '
        'params file that names no model does not configure')
    revision: str = _option(
        '', 'branch, tag or commit of a hub id; empty selects its default branch')
    locked: bool = _option(
        False, 'true locks model, engine, remote, speculation and chat to their values at start, '
        'including this parameter; to change them, edit the params file and restart the node')


@dataclass(frozen=True)
class EngineConfig:
    """The engine that runs the model, and its device."""

    name: str = _option(
        'auto', 'engine that runs the model; auto picks native if it can run the model. openai '
        'forwards requests to a server, see remote and offboard.md',
        choices=('auto', 'native', 'transformers', 'exllamav2', SERVER))
    device: str = _option(
        'auto', 'auto, cpu, cuda or cuda:N; auto uses CUDA if there is a CUDA GPU')
    dtype: str = _option(
        'auto', 'number format of activations and unquantised weights. auto selects bfloat16 on '
        'a GPU that supports it, float16 on an older GPU, and float32 on a CPU; for 4-bit '
        'weights native may select float16 with its own kernels, else bfloat16',
        choices=('auto', 'bfloat16', 'float16', 'float32'))
    cuda_graph: bool = _option(True, 'capture the decode step in a CUDA graph and replay it')
    max_context: int = _option(
        4096, "size of the KV cache in tokens, prompt and answer together; the model's own limit "
        'applies if it is smaller', low=16, high=1048576)
    cpu_threads: int = _option(
        0, 'threads that torch uses on a CPU; 0 leaves the choice to torch', low=0, high=1024)
    steps_ahead: int = _option(
        0, 'decode steps that native keeps in flight on a GPU; a cancel waits for them. 0 keeps '
        '2, and up to 8 while the host falls behind', low=0, high=8)
    blocking_wait: bool = _option(
        False, 'true lets the decode thread of native sleep until a token of a GPU is ready; '
        'false polls for it, which keeps a core busy during answers. A thread that sleeps gets a '
        'time slice of 0.5 ms, with which it runs sooner if all cores are busy (Linux 6.12)')
    stream_priority: int = _option(
        0, "priority of native's kernels over other streams of the node's process on a GPU; 0 is "
        'the lowest, negative values run first', low=-5, high=0)
    gpu_share_percent: int = _option(
        0, "limit on the share of the GPU's multiprocessors that the process uses, in percent; "
        'takes effect only with the MPS daemon. 0 sets no limit', low=0, high=100)
    prefill_chunk_ms: float = _option(
        100.0, 'prefill runs in chunks of about this duration, of at least 32 tokens each; a '
        'cancel, a preemption or a deadline takes effect after a chunk. 0 uses the largest '
        'chunks that the engine supports', low=0.0, high=1e6)


@dataclass(frozen=True)
class RemoteConfig:
    """The server that runs the model if `engine.name` is openai."""

    base_url: str = _option(
        '', "URL of a server's OpenAI API, such as http://10.0.0.2:8000/v1; its key is read from "
        'the environment variable PHYSAI_DECODE_REMOTE_API_KEY')
    model: str = _option('', 'name of the model on the server')
    first_token_timeout_ms: float = _option(
        5000.0, 'the server counts as failed if it sends no token for this long after a request',
        low=1.0, high=1e9)
    token_timeout_ms: float = _option(
        5000.0, 'the server counts as failed if it sends no token for this long after a token',
        low=1.0, high=1e9)
    fallback: str = _option(
        '', 'a local model, named as in model.path. It stays loaded, and answers if the server '
        'fails before its first token; empty for none')


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is sampled, and when an answer ends."""

    temperature: float = _option(
        0.0, 'divides the logits; 0 is greedy: it always picks the likeliest token',
        low=0.0, high=10.0, dynamic=True)
    top_k: int = _option(
        0, 'keep this many of the likeliest tokens; 0 keeps all',
        low=0, high=1000000, dynamic=True)
    top_p: float = _option(
        1.0, 'keep the likeliest tokens whose probabilities add up to this; 1 keeps all',
        low=0.0, high=1.0, dynamic=True)
    min_p: float = _option(
        0.0, 'drop tokens less likely than this fraction of the likeliest; 0 keeps all',
        low=0.0, high=1.0, dynamic=True)
    repetition_penalty: float = _option(
        1.0, 'makes tokens that already occurred less likely; 1 has no effect',
        low=0.1, high=10.0, dynamic=True)
    seed: int = _option(
        0, 'the same seed, prompt and settings give the same text if the KV cache of the prompt '
        'was computed in the same way. In other chunks, or by the decode steps of an earlier '
        'answer, the cache differs in the last bits, and near-ties can resolve differently (with '
        'exllamav2: always). -1 draws a fresh seed for each request',
        low=-1, high=2**31 - 1, dynamic=True)
    max_new_tokens: int = _option(
        256, 'maximum number of tokens in an answer', low=1, high=1048576, dynamic=True)
    stop: tuple[str, ...] = _option(
        (), 'strings that end an answer; the answer does not contain them',
        dynamic=True, characters=256)
    from_checkpoint: bool = _option(
        False, 'true takes temperature, top_k, top_p, min_p and repetition_penalty from the '
        "model's generation_config.json, as far as it sets them; the values of a request take "
        'precedence', dynamic=True)


@dataclass(frozen=True)
class SpeculationConfig:
    """Speculative decoding: one pass of the model verifies several draft tokens."""

    name: str = _option(
        'off', 'off: one token per decode step; lookup: one pass verifies several draft tokens, '
        'those that a constraint forces, or those that followed the last few tokens '
        'earlier in the prompt or the answer; model: as lookup, but speculation.draft_model '
        'makes the draft where its tokens are expected to save more time. On a CPU, the text is '
        'the same as without drafts. On a GPU, all steps use other kernels, whose rounding may '
        'change the text. Only the native engine supports drafts, but not for a mixture of '
        'experts, and on a GPU not for weights of 8 bits; `~/model_info` says why they are off',
        choices=('off', 'lookup', 'model'))
    draft_model: str = _option(
        '', 'a smaller model with the same tokenizer, named as in model.path, that makes drafts '
        'if speculation.name is model. It is loaded on the same device')


@dataclass(frozen=True)
class ChatConfig:
    """How a prompt becomes the input of the model."""

    template: str = _option(
        'auto', "auto applies the model's chat template, or the default one of several, if it "
        'has any; off sends the prompt as it is',
        choices=('auto', 'off'), others="the name of one of the model's templates",
        characters=256)
    system_prompt: str = _option(
        '', 'first message of the conversation; empty for none', characters=1_000_000)
    keep_history: bool = _option(
        False, 'keep earlier prompts and answers in the context until ~/reset or deactivate')


@dataclass(frozen=True)
class ConstraintConfig:
    """The constraint on answers whose request sets none; at most one of these is set."""

    schema_file: str = _option(
        '', 'file with a JSON Schema that every answer conforms to, unless its request has its '
        'own response_format or structured_outputs; empty for none. A relative path is '
        "resolved against the node's working directory")
    regex: str = _option(
        '', 'regular expression that the whole answer matches, unless its request has its own '
        'constraint; empty for none')
    choice: tuple[str, ...] = _option(
        (), 'list of strings, one of which is the answer, unless its request has its own '
        'constraint; empty for none')
    grammar_file: str = _option(
        '', 'file with a grammar of the answer, in GBNF or Lark syntax, unless its request has '
        'its own constraint; empty for none. A relative path is resolved against the '
        "node's working directory")


@dataclass(frozen=True)
class ThinkingConfig:
    """How long a reasoning model may think before it answers."""

    max_tokens: int = _option(
        0, 'limit on the tokens of a thought; the node ends a longer one, and the model '
        'continues with its answer. 0 sets no limit', low=0, high=1048576, dynamic=True)


@dataclass(frozen=True)
class QueueConfig:
    """What happens to a request that arrives while another runs."""

    size: int = _option(
        8, 'requests that may wait; the node refuses further ones', low=1, high=10000)
    policy: str = _option(
        'reject', 'reject: a request waits for its turn, and is refused if the queue is full; '
        'preempt: a new request ends the running one and empties the queue',
        choices=('reject', 'preempt'))
    max_request_bytes: int = _option(
        1000000, 'size limit of a prompt or JSON request; the node refuses a larger one without '
        'parsing it', low=1, high=2**30)
    max_waiting_bytes: int = _option(
        16000000, 'limit on the total size of the texts of waiting requests; the node refuses a '
        'request that exceeds it, unless no other waits', low=1, high=2**30)


@dataclass(frozen=True)
class DeadlineConfig:
    """Deadlines in milliseconds; 0 sets none."""

    ttft_ms: float = _option(
        0.0, 'from receiving the prompt to the first token', low=0.0, high=1e9, dynamic=True)
    token_ms: float = _option(0.0, 'from one token to the next', low=0.0, high=1e9, dynamic=True)
    request_ms: float = _option(
        0.0, 'from receiving the prompt to the end of the answer', low=0.0, high=1e9, dynamic=True)
    action: str = _option(
        'report', 'report: a late request continues; truncate: request_ms ends the request and '
        'delivers the answer so far', choices=('report', 'truncate'), dynamic=True)
    max_consecutive_misses: int = _option(
        3, 'this many late tokens in a row set the status to ERROR; tokens without a deadline do '
        'not count', low=1, high=1000000,
        dynamic=True)


@dataclass(frozen=True)
class PaceConfig:
    """The maximum rate of an answer."""

    tokens_per_s: float = _option(
        0.0, 'starts decode steps on a schedule of this many tokens per second and leaves the '
        'device idle in between; 0 decodes at full speed, otherwise at least 0.1',
        low=0.0, high=1e6, unless_0=0.1, dynamic=True)


@dataclass(frozen=True)
class RealtimeConfig:
    """The scheduling of the decode thread relative to the other threads of the machine."""

    priority: int = _option(
        0, 'SCHED_FIFO priority of the decode thread; 0 leaves the thread to the default '
        'scheduler', low=0, high=99)
    cpu_affinity: tuple[int, ...] = _option(
        (), 'cores of the decode thread and its compute threads; all other threads of the node '
        'use the remaining cores. Empty: all threads use all cores', low=0, high=4095, items=int)
    lock_memory: bool = _option(
        False, 'keep the memory of the process from being paged out (mlockall)')


@dataclass(frozen=True)
class RooflineConfig:
    """The limit of the memory bus."""

    peak_bandwidth_gb_s: float = _option(
        0.0, 'peak bandwidth of the device memory in GB/s (1e9 bytes); 0 detects it',
        low=0.0, high=1e6)


@dataclass(frozen=True)
class DiagnosticsConfig:
    """The content and period of `/diagnostics`."""

    period_s: float = _option(1.0, 'period of /diagnostics', low=0.01, high=3600.0)
    window_s: float = _option(
        10.0, 'time span that the latency percentiles cover', low=0.1, high=3600.0)
    stall_timeout_s: float = _option(
        5.0, 'time without a token, while generating, that counts as a stall',
        low=0.05, high=3600.0)
    warn_r_floor: float = _option(
        0.0, 'WARN if the median r_floor of the window is below this; 0 never warns',
        low=0.0, high=1.0)


@dataclass(frozen=True)
class BondConfig:
    """The bond to nav2's lifecycle manager."""

    heartbeat_period_s: float = _option(
        0.25, "period of the heartbeat to nav2's lifecycle manager while the node is active; 0 "
        'sends none. Needs bondpy', low=0.0, high=3600.0)


@dataclass(frozen=True)
class HttpConfig:
    """The HTTP server: OpenAI's API."""

    port: int = _option(
        0, "TCP port of OpenAI's API, open while the node is configured; 0 disables it. Needs "
        'uvicorn and prometheus_client', low=0, high=65535)
    host: str = _option(
        '127.0.0.1', 'address that the port listens on; 0.0.0.0 and :: accept requests from other '
        'machines, so also set PHYSAI_DECODE_API_KEY', characters=256)
    max_connections: int = _option(
        128, 'limit on simultaneous connections; requests on further ones are refused',
        low=1, high=4096)


@dataclass(frozen=True)
class DecodeConfig:
    """All settings of the node; the name of a group is the prefix of its parameters."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    remote: RemoteConfig = RemoteConfig()
    sampling: SamplingConfig = SamplingConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    chat: ChatConfig = ChatConfig()
    constraint: ConstraintConfig = ConstraintConfig()
    thinking: ThinkingConfig = ThinkingConfig()
    queue: QueueConfig = QueueConfig()
    deadline: DeadlineConfig = DeadlineConfig()
    pace: PaceConfig = PaceConfig()
    realtime: RealtimeConfig = RealtimeConfig()
    roofline: RooflineConfig = RooflineConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    bond: BondConfig = BondConfig()
    http: HttpConfig = HttpConfig()
    autostart: bool = _option(True, 'configure and activate at start')

    @property
    def model_name(self) -> str:
        """The name of the model, on the server or as set in model.path."""
        return self.remote.model if self.engine.name == SERVER else self.model.path


_SURROGATE = re.compile('[\ud800-\udfff]')
_KINDS: dict[type, str] = {
    bool: 'true or false', int: 'an integer', float: 'a number', str: 'a string'}
_LISTS = {str: 'a list of strings', int: 'a list of integers'}
_ITEMS = {str: 'strings', int: 'numbers'}


def check(group: str, instance: Any) -> None:
    """
    Check all fields of a group.

    :param group: name of the group for the message, such as ``sampling``.
    :param instance: an instance of one of the dataclasses above.
    :raises ConfigError: a field is invalid; the message has its name, its value and what is
        allowed.
    """
    for spec in fields(instance):
        check_value(f'{group}.{spec.name}', getattr(instance, spec.name), spec)


def check_value(name: str, value: Any, spec: 'Field[Any]',
                show: Callable[[Any], str] | None = None) -> Any:
    """
    Check the value of a field.

    :param name: name of the field for the message.
    :param spec: the field.
    :param show: formats the value for the message; None: as `shown` does.
    :returns: the value, converted to the type of the field.
    :raises ConfigError: the value is invalid; the message has the name, the value and what is
        allowed.
    """
    show = show or shown
    kind, items = type(spec.default), spec.metadata['items']
    accepted: Any = (int, float) if kind is float else (kind,)
    if type(value) not in accepted or \
            kind is tuple and not all(type(item) is items for item in value):
        raise ConfigError(f'{name} is {show(value)}: expected '
                          f'{_LISTS[items] if kind is tuple else _KINDS[kind]}')
    each = value if kind is tuple else (value,)
    low, high = spec.metadata['low'], spec.metadata['high']
    if low is not None and not all(low <= item <= high for item in each):
        raise ConfigError(f'{name} is {show(value)}: expected {low} to {high}')
    least = spec.metadata['unless_0']
    if least and 0 < value < least:
        raise ConfigError(f'{name} is {show(value)}: expected 0, or {least} to {high}')
    if kind is tuple and len(value) > MAX_ITEMS:
        raise ConfigError(
            f'{name} has {len(value)} {_ITEMS[items]}: at most {MAX_ITEMS} are allowed')
    characters = spec.metadata['characters']
    for text in each:
        if type(text) is str and len(text) > characters:
            raise ConfigError(f'{name} is {show(value)}, a string of {len(text)} characters: '
                              f'at most {characters} are allowed')
        if kind is tuple and type(text) is str and _SURROGATE.search(text):
            raise ConfigError(
                f'{name} is {show(value)}, with an unpaired surrogate: send valid UTF-8')
    choices = spec.metadata['choices']
    if choices and value not in choices and not spec.metadata['others']:
        raise ConfigError(f'{name} is {show(value)}: expected one of {", ".join(choices)}')
    return float(value) if kind is float else value     # now in range: float() cannot overflow


class _Yaml(reprlib.Repr):
    """Formats a value in bounded time, in YAML's spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlong = self.maxother = 80

    def repr_bool(self, value: bool, level: int) -> str:
        return 'true' if value else 'false'

    def repr_NoneType(self, value: None, level: int) -> str:    # noqa: N802
        return 'null'

    def repr_str(self, value: str, level: int) -> str:
        return repr(value[:80])

    def repr_tuple(self, value: tuple[Any, ...], level: int) -> str:
        return self.repr_list(list(value), level)


class _Json(_Yaml):
    """The same in JSON's spelling, with escapes for characters that cannot be printed."""

    def repr_float(self, value: float, level: int) -> str:
        return json.dumps(value)            # NaN, Infinity

    def repr_str(self, value: str, level: int) -> str:
        text = json.dumps(value[:80], ensure_ascii=False)
        return ''.join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def shown(value: Any) -> str:
    """Format a parameter for a message, with at most 80 characters and in bounded time."""
    return _shortened(_YAML.repr(value))


def shown_json(value: Any) -> str:
    """Format a value that came as JSON, as `shown` does."""
    return _shortened(_JSON.repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f'{text[:77]}...'


_YAML, _JSON = _Yaml(), _Json()
