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
The protocol of an engine: one model on one device that prefills, decodes and samples.

An engine knows nothing of text, queues, deadlines, prefix reuse or ROS. The same ``DecodeLoop``
drives every engine, so that engines can be compared token for token. The constructor loads, warms
up and captures: there is no half-loaded engine.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import NamedTuple
from typing import Protocol
from typing import runtime_checkable

from physai_decode.config import SamplingConfig


class EngineError(RuntimeError):
    """An engine cannot start or continue; the message says why and what to do."""


@dataclass(frozen=True)
class Footprint:
    """
    The properties of an engine, and what one of its decode steps reads.

    ``read_weight_bytes`` is the size of the weights that one step actually reads: packed weights,
    scales and zeros if quantised, and one row of an input embedding that is not tied to the head.
    ``checkpoint_weight_bytes`` is the size of all weights in the checkpoint.
    """

    engine: str                     # native, transformers, exllamav2, openai
    model_type: str                 # of the checkpoint's config.json: qwen2, llama, ...
    dtype: str                      # bfloat16, float16, float32
    quantization: str               # none, gptq-int4-g128, ...
    device: str                     # cpu, cuda:0
    device_name: str                # NVIDIA H200, the CPU's model name
    device_uuid: str                # empty if there is none
    cuda_graph: str                 # captured, off, unavailable
    max_context: int                # tokens of prompt plus answer
    vocab_size: int
    eos_token_ids: tuple[int, ...]  # ids that end an answer
    read_weight_bytes: int
    checkpoint_weight_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    kv_element_bytes: int
    sliding_window: int = 0         # tokens that a layer with a window attends to; 0: all
    windowed_layers: int | None = None  # layers with the window; None: all
    layer_parameters: int = 0       # weights that each token is multiplied by; 0: unknown
    slow_format: bool = False       # the weights are in a format without native's fastest kernels
    sleeps: bool = False            # whether the host sleeps until a token of a GPU is ready
    details: Mapping[str, str] = field(default_factory=dict)  # shown in ~/model_info

    @property
    def is_remote(self) -> bool:
        """Whether the model is on a server; shapes that are 0 are then unknown."""
        return not self.layers


class Choice(NamedTuple):
    """
    One sampled token.

    ``token_id`` is `NO_TOKEN` if the logits are not finite. ``device_s`` is the time on the device
    in seconds (on a CPU, the time on the host), None if unknown.
    """

    token_id: int
    device_s: float | None


# Waits for work, and returns its time on the device in seconds, None if unknown.
Elapsed = Callable[[], float | None]
NO_TOKEN = -1                       # sampled from logits with NaN or infinity


def not_numbers(dtype: str) -> EngineError:
    """Return the error for logits with NaN or infinity; ``dtype`` as in `Footprint`."""
    reason, more = 'damaged', ''
    if dtype != 'float32':
        wider = 'float32' if dtype == 'bfloat16' else 'float32 or bfloat16'
        reason += ', or too large for this number format'
        more = f', or set engine.dtype to {wider}'
    return EngineError(
        f"the model's logits are not numbers (NaN or infinite) in {dtype}: its weights are "
        f'{reason}; copy or download the model again{more}')


class Constraint(Protocol):
    """The constraint of one answer; see ``physai_decode.constraint.Constraint``."""

    mask_s: float
    """The time on the host, in seconds, of the last ``mask`` or of all masks of ``walk``."""

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and only an end token can follow."""
        ...

    def mask(self) -> bytearray:
        """Return the mask of allowed tokens: bit ``id % 8`` of byte ``id // 8``."""
        ...

    def forced(self) -> list[int]:
        """Return the tokens that the constraint forces next, which may be none."""
        ...

    def fits(self, token_ids: Sequence[int]) -> int:
        """Return the length of the longest prefix of ``token_ids`` that is allowed next."""
        ...

    def walk(self, draft: Sequence[int]) -> Iterator[bytearray]:
        """
        Yield the mask before each draft token, and the one after the last.

        Stop early if the constraint rejects a draft token, or if nothing can follow.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Advance by the sampled token."""
        ...

    def rollback(self, count: int) -> None:
        """Undo the last ``count`` tokens."""
        ...

    def reset(self) -> bool:
        """Return to the initial state; False if that is impossible."""
        ...


class Engine(Protocol):
    """
    One language model on one device, for one request at a time, used by one thread.

    The KV cache has the keys and values of all tokens that were prefilled or read by a step. After
    a method raises, the content of the cache is undefined until ``rewind(0)``.
    """

    footprint: Footprint
    chunk_tokens: tuple[int, int]
    """The minimum and maximum prompt tokens per ``feed``; the last chunk may be shorter."""

    def rewind(self, length: int) -> int:
        """
        Truncate the cache to at most ``length`` tokens, and discard steps in flight.

        :param length: 0 to the number of tokens in the cache.
        :returns: the tokens kept; 0 if the state cannot be truncated.
        """
        ...

    def feed(self, token_ids: Sequence[int]) -> Elapsed:
        """
        Prefill a chunk of a prompt, behind the tokens in the cache.

        An engine on a GPU need not wait for it.

        :param token_ids: ids of the vocabulary that fit into the context.
        :returns: a function that waits for the chunk, to call before the next one; for the last
            chunk, it can be called after ``first``.
        """
        ...

    def first(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constraint: Constraint | None = None) -> Choice:
        """
        Sample the first token of the answer.

        :param sampling: settings for this token and all steps until the next ``rewind``.
        :param prompt_ids: the whole prompt, for settings that depend on earlier tokens.
        :param constraint: supplies the mask for this token and for each step. The caller advances
            it by each token before the next step, so no step may run ahead.
        """
        ...

    def step(self, remaining: int) -> Choice:
        """
        Run one decode step with the last sampled token, and sample the next.

        :param remaining: number of steps that will follow, unless the request is cancelled; the
            engine may launch that many ahead.
        """
        ...

    def close(self) -> None:
        """Free all memory on the device; the engine cannot be used afterwards."""
        ...


class Drafter(NamedTuple):
    """
    A smaller model, whose greedy tokens are drafts.

    ``cost`` is the time of one of its decode steps, in steps of the verifying model. ``step_s`` is
    the time of a step of the verifying model on the host in seconds, 0 if unknown.
    """

    engine: Engine
    cost: float
    step_s: float = 0.0


@runtime_checkable
class Verifier(Engine, Protocol):
    """An engine that can verify draft tokens: several rows in one pass."""

    pass_costs: Mapping[int, float]
    """The cost of a pass in decode steps, by its number of rows; without drafts, only for 1."""
    drafter: Drafter | None
    """The draft model, which this engine closes; None if there is none."""

    @property
    def is_idle(self) -> bool:
        """Whether no step is in flight; true after enough calls of ``step(0)``."""
        ...

    def verify(self, draft: Sequence[int]) -> 'Choices':
        """
        Run the last sampled token and draft tokens behind it in one pass; sample after each.

        The result is that of separate decode steps, bit for bit: the tokens, their logits, and the
        content of the cache. Requires `is_idle`. A constraint supplies a mask for each row.

        :param draft: ids of the vocabulary that fit into the context, fewer than the maximum rows
            in ``pass_costs``.
        """
        ...


class Choices(NamedTuple):
    """
    The tokens of one pass: the accepted draft tokens, and the token sampled after them.

    ``device_s`` is the time of the pass on the device, as in `Choice`. The last token may be
    `NO_TOKEN`.
    """

    token_ids: tuple[int, ...]
    device_s: float | None


@runtime_checkable
class Comparable(Engine, Protocol):
    """An engine whose logits can be compared with another's, position by position."""

    def prefill_logits(self, prompt_ids: Sequence[int]) -> Any:
        """Rewind, and return the logits of all positions of a prompt, float32 [tokens, vocab]."""
        ...


def checked_prompt(prompt_ids: Sequence[int], footprint: Footprint) -> list[int]:
    """
    Return the ids of a prompt, after checking that an engine can run it.

    :raises ValueError: the prompt is empty or too long, or an id is outside the vocabulary.
    """
    prompt, limit, size = list(prompt_ids), footprint.max_context, footprint.vocab_size
    if not prompt:
        raise ValueError('the prompt has no tokens')
    if len(prompt) >= limit:
        raise ValueError(
            f'the prompt has {len(prompt)} tokens: at most {limit - 1} leave room for an '
            'answer; shorten it, or raise engine.max_context if the model allows more')
    wrong = next((token for token in prompt if not 0 <= token < size), None)
    if wrong is not None:
        raise ValueError(f'token id {wrong} is outside the vocabulary of {size}')
    return prompt


def shared_prefix(old: Sequence[int], new: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    return next((place for place, pair in enumerate(zip(old, new)) if pair[0] != pair[1]),
                min(len(old), len(new)))


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def described(error: BaseException) -> str:
    """Return the type of an exception, and its message if it has one."""
    return f'{type(error).__name__}: {error}' if str(error) else type(error).__name__
