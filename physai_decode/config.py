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

Each default is written here and nowhere else. A field's metadata holds what a ROS parameter
descriptor needs: a description, a range or choices, and whether it may change while the node runs.
Nothing here knows ROS or torch.
"""

from dataclasses import dataclass
from dataclasses import Field
from dataclasses import field
from dataclasses import fields
import reprlib
from typing import Any


class ConfigError(ValueError):
    """A setting is wrong; the message gives its name, its value and what is allowed."""


def _option(default, description, *, low=None, high=None, unless_0=0, choices=(), others='',
            dynamic=False, characters=4096, texts=64, items=str):
    """
    Declare one field.

    `low` and `high` are inclusive and in the unit of the field's name; what is not 0 is at least
    `unless_0`. A text may have so many `characters`, and a list so many `texts`, or numbers where
    `items` says int. `others` says what else is allowed than `choices`.
    """
    return field(default=default, metadata={
        'description': description, 'low': low, 'high': high, 'unless_0': unless_0,
        'choices': tuple(choices), 'others': others, 'dynamic': dynamic,
        'characters': characters, 'texts': texts, 'items': items})


@dataclass(frozen=True)
class ModelConfig:
    """Which model to load."""

    path: str = _option(
        'builtin:tiny_planner',
        'builtin:NAME for a model in the package, a folder in Hugging Face layout, or a hub id')
    revision: str = _option('', 'branch, tag or commit of a hub id; empty for its default branch')
    locked: bool = _option(
        False, 'true keeps model, engine, remote and chat as they were at start, itself too: '
        'only a params file and a restart change them')


@dataclass(frozen=True)
class EngineConfig:
    """What runs the model, and where."""

    name: str = _option(
        'auto', 'what runs the model; auto takes native where it can run the model. openai: a '
        'server in the network does, see remote and offboard.md',
        choices=('auto', 'native', 'transformers', 'exllamav2', 'openai'))
    device: str = _option('auto', 'auto, cpu, cuda or cuda:N; auto takes CUDA where there is one')
    dtype: str = _option(
        'auto', 'number format of activations and unquantised weights; auto takes bfloat16 on a '
        'GPU that has it, float16 on an older GPU, float32 on a CPU; native may take another for '
        '4-bit weights: float16 with its own kernels, else bfloat16',
        choices=('auto', 'bfloat16', 'float16', 'float32'))
    cuda_graph: bool = _option(True, 'capture the decode step in a CUDA graph and replay it')
    max_context: int = _option(
        4096, 'tokens of prompt and answer that the cache holds; a smaller one of the model wins',
        low=16, high=1048576)
    cpu_threads: int = _option(
        0, 'threads that torch uses on a CPU; 0 leaves its own choice', low=0, high=1024)
    steps_ahead: int = _option(
        0, 'steps that native keeps in flight on a GPU; a cancel waits for them. 0 takes 2, and '
        'more, up to 8, while the host comes too late for those', low=0, high=8)
    stream_priority: int = _option(
        0, "priority of native's kernels over those of other streams of the node's process on a "
        'GPU: 0 is the lowest, -1 and below go first', low=-5, high=0)
    gpu_share_percent: int = _option(
        0, "most of the GPU's multiprocessors that the process takes, in percent; in force only "
        'where the daemon of MPS runs. 0 sets no limit', low=0, high=100)
    prefill_chunk_ms: float = _option(
        100.0, 'a prompt is read in chunks of about this time, but of no fewer than 32 tokens; a '
        'cancel, a preemption or a deadline is heard after each. 0 reads the largest chunks that '
        'the engine takes',
        low=0.0, high=1e6)


@dataclass(frozen=True)
class RemoteConfig:
    """The server that runs the model where `engine.name` is openai."""

    base_url: str = _option(
        '', "address of a server's OpenAI API, such as http://10.0.0.2:8000/v1; its key is in the "
        'environment, PHYSAI_DECODE_REMOTE_API_KEY')
    model: str = _option('', 'name of the model on the server')
    first_token_timeout_ms: float = _option(
        5000.0, 'the server has failed where it brings no token for this long after it was asked',
        low=1.0, high=1e9)
    token_timeout_ms: float = _option(
        5000.0, 'likewise, after a token', low=1.0, high=1e9)
    fallback: str = _option(
        '', 'a local model, named as in model.path, that is kept loaded and answers where the '
        'server fails before it said anything; empty for none')


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and when an answer ends."""

    temperature: float = _option(
        0.0, 'divides the logits; 0 always takes the likeliest token', low=0.0, high=10.0,
        dynamic=True)
    top_k: int = _option(
        0, 'keep this many of the likeliest tokens; 0 keeps all', low=0, high=1000000,
        dynamic=True)
    top_p: float = _option(
        1.0, 'keep the likeliest tokens whose probabilities reach this sum; 1 keeps all',
        low=0.0, high=1.0, dynamic=True)
    min_p: float = _option(
        0.0, 'drop tokens less likely than this fraction of the likeliest; 0 keeps all',
        low=0.0, high=1.0, dynamic=True)
    repetition_penalty: float = _option(
        1.0, 'makes tokens that were seen less likely; 1 leaves them alone', low=0.1, high=10.0,
        dynamic=True)
    seed: int = _option(
        0, "the same seed, prompt and settings give the same text, where the prompt's keys and "
        'values were computed in the same way: in other chunks, or by decode steps as an earlier '
        'answer, they differ in the last bits, and near-ties may fall otherwise (exllamav2: '
        'always). -1 takes a fresh seed for each request', low=-1, high=2**31 - 1, dynamic=True)
    max_new_tokens: int = _option(
        256, 'an answer ends after this many tokens', low=1, high=1048576, dynamic=True)
    stop: tuple[str, ...] = _option(
        (), 'texts that end an answer; they are not part of it', dynamic=True, characters=256)
    from_checkpoint: bool = _option(
        False, "true takes temperature, top_k, top_p, min_p and repetition_penalty from the "
        "model's generation_config.json, as far as it has them; a request's own still win",
        dynamic=True)


@dataclass(frozen=True)
class ChatConfig:
    """How a prompt becomes what the model reads."""

    template: str = _option(
        'auto', "auto puts the prompt into the model's chat template where it has one, the "
        'default one of several; off sends it as it is', choices=('auto', 'off'),
        others="the name of one of the model's templates", characters=256)
    system_prompt: str = _option(
        '', "the conversation's first message; empty for none", characters=1_000_000)
    keep_history: bool = _option(
        False, 'keep earlier prompts and answers in the context until ~/reset or deactivate')


@dataclass(frozen=True)
class ConstraintConfig:
    """What an answer has to look like where its request does not say it; at most one is set."""

    schema_file: str = _option(
        '', 'a file with a JSON Schema that every answer fulfils, unless its request has a '
        'response_format or structured_outputs of its own; empty for none')
    regex: str = _option('', 'likewise: a regular expression that the whole answer matches')
    choice: tuple[str, ...] = _option((), 'likewise: the texts of which the answer is one')
    grammar_file: str = _option(
        '', 'likewise: a file with a grammar of the answer, in GBNF or the Lark form')


@dataclass(frozen=True)
class ThinkingConfig:
    """How long a model may think before it answers, where it is one that thinks."""

    max_tokens: int = _option(
        0, 'a thought of more tokens is ended, and the model goes on with its answer; 0 sets no '
        'limit', low=0, high=1048576, dynamic=True)


@dataclass(frozen=True)
class QueueConfig:
    """What happens to a prompt that comes while another is answered."""

    size: int = _option(8, 'requests that may wait; a further one is refused', low=1, high=10000)
    policy: str = _option(
        'reject', 'reject: a request waits for its turn and is refused when the queue is full; '
        'preempt: a new request ends the running one and empties the queue',
        choices=('reject', 'preempt'))
    max_request_bytes: int = _option(
        1000000, 'a longer prompt or JSON request is refused unread', low=1, high=2**30)
    max_waiting_bytes: int = _option(
        16000000, 'bytes that the texts of waiting requests may have in all; a request that goes '
        'beyond is refused, unless none waits', low=1, high=2**30)


@dataclass(frozen=True)
class DeadlineConfig:
    """How late is too late, in milliseconds; 0 sets no deadline."""

    ttft_ms: float = _option(
        0.0, 'from the prompt received to the first token', low=0.0, high=1e9, dynamic=True)
    token_ms: float = _option(
        0.0, 'from one token to the next', low=0.0, high=1e9, dynamic=True)
    request_ms: float = _option(
        0.0, 'from the prompt received to the end of the answer', low=0.0, high=1e9, dynamic=True)
    action: str = _option(
        'report', 'report: a late request goes on; truncate: request_ms ends it and what was '
        'said so far is delivered', choices=('report', 'truncate'), dynamic=True)
    max_consecutive_misses: int = _option(
        3, 'this many late tokens in a row are an ERROR', low=1, high=1000000, dynamic=True)


@dataclass(frozen=True)
class PaceConfig:
    """How fast an answer comes at most."""

    tokens_per_s: float = _option(
        0.0, 'steps start on a schedule of so many tokens per second, and the device rests '
        'between them; at least 0.1, or 0: as fast as they can', low=0.0, high=1e6, unless_0=0.1,
        dynamic=True)


@dataclass(frozen=True)
class RealtimeConfig:
    """How the decode thread stands among the other threads of the machine."""

    priority: int = _option(
        0, 'SCHED_FIFO with this priority for the decode thread; 0 leaves it to the ordinary '
        'scheduler', low=0, high=99)
    cpu_affinity: tuple[int, ...] = _option(
        (), 'cores of the decode thread and of what computes for it; all other threads of the '
        'node take the other cores. Empty: all threads take all', low=0, high=4095, items=int)
    lock_memory: bool = _option(
        False, "keep the process's memory from being paged out (mlockall)")


@dataclass(frozen=True)
class RooflineConfig:
    """The memory bus's limit."""

    peak_bandwidth_gb_s: float = _option(
        0.0, 'peak bandwidth of the device memory in GB/s (1e9 bytes); 0 finds it out',
        low=0.0, high=1e6)


@dataclass(frozen=True)
class DiagnosticsConfig:
    """What `/diagnostics` says and how often."""

    period_s: float = _option(
        1.0, 'time between two messages on /diagnostics', low=0.01, high=3600.0)
    window_s: float = _option(
        10.0, 'latency percentiles cover the tokens of this long', low=0.1, high=3600.0)
    stall_timeout_s: float = _option(
        5.0, 'no token for this long while generating is a stall', low=0.05, high=3600.0)
    warn_r_floor: float = _option(
        0.0, 'WARN when the median r_floor of the window is below this; 0 never',
        low=0.0, high=1.0)


@dataclass(frozen=True)
class BondConfig:
    """The bond to nav2's lifecycle manager."""

    heartbeat_period_s: float = _option(
        0.25, 'time between two heartbeats to the lifecycle manager of nav2 while the node is '
        'active; 0 sends none; needs bondpy', low=0.0, high=3600.0)


@dataclass(frozen=True)
class HttpConfig:
    """The HTTP door: OpenAI's API."""

    port: int = _option(
        0, "TCP port of OpenAI's API, open while the node is configured; 0: off; needs "
        'physai_decode[http]', low=0, high=65535)
    host: str = _option(
        '127.0.0.1', 'address that the port is opened on; 0.0.0.0 and :: let other machines in: '
        'set PHYSAI_DECODE_API_KEY then', characters=256)
    max_connections: int = _option(
        128, 'connections at once; requests on a further one are refused', low=1, high=4096)


@dataclass(frozen=True)
class DecodeConfig:
    """All settings of the node; each group is the parameters' prefix."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    remote: RemoteConfig = RemoteConfig()
    sampling: SamplingConfig = SamplingConfig()
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
    autostart: bool = _option(True, 'configure and activate by itself at start')

    @property
    def model_name(self) -> str:
        """The name that the model goes by."""
        return self.remote.model if self.engine.name == 'openai' else self.model.path


_KINDS: dict[type, str] = {
    bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a string'}
_LISTS = {str: 'a list of strings', int: 'a list of whole numbers'}
_ITEMS = {str: 'texts', int: 'numbers'}


def check(group: str, instance: Any) -> None:
    """
    Check every field of one group.

    :param group: the group's name, for the message, such as ``sampling``.
    :param instance: one of the dataclasses above.
    :raises ConfigError: naming the first field that is wrong, its value and what is allowed.
    """
    for spec in fields(instance):
        check_value(f'{group}.{spec.name}', getattr(instance, spec.name), spec)


def check_value(name: str, value: Any, spec: 'Field[Any]') -> Any:
    """
    Check one value.

    :param name: for the message.
    :param spec: the field that it is for.
    :returns: the value in the field's type.
    :raises ConfigError: with the name, the value and what is allowed.
    """
    kind, items = type(spec.default), spec.metadata['items']
    taken: Any = (int, float) if kind is float else (kind,)
    if type(value) not in taken or \
            kind is tuple and not all(type(item) is items for item in value):
        raise ConfigError(f'{name} is {shown(value)}: expected '
                          f'{_LISTS[items] if kind is tuple else _KINDS[kind]}')
    each = value if kind is tuple else (value,)
    low, high = spec.metadata['low'], spec.metadata['high']
    if low is not None and not all(low <= item <= high for item in each):
        raise ConfigError(f'{name} is {shown(value)}: allowed are {low} to {high}')
    least = spec.metadata['unless_0']
    if least and 0 < value < least:
        raise ConfigError(f'{name} is {shown(value)}: allowed are 0 and {least} to {high}')
    characters, most = spec.metadata['characters'], spec.metadata['texts']
    if kind is tuple and len(value) > most:
        raise ConfigError(f'{name} has {len(value)} {_ITEMS[items]}: allowed are {most}')
    for text in each:
        if type(text) is str and len(text) > characters:
            raise ConfigError(f'{name} is {shown(value)}, a text of {len(text)} characters: '
                              f'allowed are {characters}')
    choices = spec.metadata['choices']
    if choices and value not in choices and not spec.metadata['others']:
        raise ConfigError(f'{name} is {shown(value)}: allowed are {", ".join(choices)}')
    return float(value) if kind is float else value     # not before: a whole one may be too large


def shown(value: Any) -> str:
    """Give a value for a message, cut where it is long; in short time, whatever it holds."""
    text = repr(value[:80]) if type(value) is str else _SHORT.repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


_SHORT = reprlib.Repr()
_SHORT.maxlong = _SHORT.maxother = _SHORT.maxstring = 80
