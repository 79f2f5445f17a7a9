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
What an engine is: one model on one device, which feeds prompts, takes steps and chooses tokens.

An engine knows nothing of text, queues, deadlines, prefix reuse or ROS. ``DecodeLoop`` drives it,
the same for every engine, so that engines can be compared token for token. A constructed engine
is loaded, warmed up and captured: there is no half-loaded engine.
"""

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
    """An engine can't be had or can't go on; the message says why and what to do."""


@dataclass(frozen=True)
class Footprint:
    """
    What an engine is and what one of its decode steps reads.

    ``read_weight_bytes`` are the weights that one step really reads (packed weights, scales and
    zeros where quantised; one row of an input embedding that is not also the head);
    ``checkpoint_weight_bytes`` all weights of the checkpoint at their stored size.
    """

    engine: str                     # native, transformers, exllamav2, openai
    model_type: str                 # as the checkpoint's config.json says: qwen2, llama, ...
    dtype: str                      # bfloat16, float16, float32
    quantization: str               # none, gptq-int4-g128, ...
    device: str                     # cpu, cuda:0
    device_name: str                # NVIDIA H200, the CPU's model name
    device_uuid: str                # empty where there is none
    cuda_graph: str                 # captured, off, unavailable
    max_context: int                # tokens of prompt and answer together
    vocab_size: int
    eos_token_ids: tuple[int, ...]  # ids that end an answer
    read_weight_bytes: int
    checkpoint_weight_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    kv_element_bytes: int
    sliding_window: int = 0         # tokens of context that a windowed layer reads; 0: all
    windowed_layers: int | None = None  # layers that have the window; None: all
    layer_parameters: int = 0       # weights that the layers multiply a token by; 0: unknown
    details: Mapping[str, str] = field(default_factory=dict)  # shown in ~/model_info as they are

    @property
    def is_remote(self) -> bool:
        """Whether the model is on a server: of its shapes, those that are 0 are not known."""
        return not self.layers


class Choice(NamedTuple):
    """
    One token that an engine chose.

    ``token_id`` is `NO_TOKEN` where the logits are not numbers. ``device_s`` is the time on the
    device in seconds (on a CPU the host's own), None where it is not known.
    """

    token_id: int
    device_s: float | None


NO_TOKEN = -1                       # a choice from logits that hold NaN or are infinite


def not_numbers(dtype: str) -> EngineError:
    """Give the error for logits that hold NaN or are infinite; ``dtype`` as in `Footprint`."""
    return EngineError(
        f"the model's logits are not numbers (NaN or infinite) in {dtype}: its weights are "
        'damaged, or too large for this number format; copy or download the model again, or set '
        'engine.dtype to float32 or bfloat16')


class Constraint(Protocol):
    """What one answer has to look like; see ``physai_decode.constraint.Constraint``."""

    mask_s: float
    """What the last ``mask``, or all masks of the last ``walk``, took on the host, in seconds."""

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing can follow but an end token."""
        ...

    def mask(self) -> bytearray:
        """Tell which tokens may come next: bit ``id % 8`` of byte ``id // 8``."""
        ...

    def forced(self) -> list[int]:
        """Tell which tokens have to come next, as far as nothing else may; they may be none."""
        ...

    def fits(self, token_ids: Sequence[int]) -> int:
        """Tell how many of these, the first ones, may come next."""
        ...

    def walk(self, draft: Sequence[int]) -> Iterator[bytearray]:
        """
        Give the mask before each token of a draft, and the one after it.

        They end early where the draft leaves the constraint, or nothing can follow.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Take the token that was chosen."""
        ...

    def rollback(self, count: int) -> None:
        """Take the last ``count`` tokens back."""
        ...

    def reset(self) -> bool:
        """Take all tokens back; False where it can be used no more."""
        ...


class Engine(Protocol):
    """
    One language model on one device, for one request at a time, driven from one thread.

    Its cache holds the keys and values of the tokens that it was fed and of those that a step
    has read. Where a method raises, the cache is in doubt until ``rewind(0)``.
    """

    footprint: Footprint
    chunk_tokens: tuple[int, int]
    """The fewest and the most prompt tokens of one ``feed``; a last chunk may be shorter."""

    def rewind(self, length: int) -> int:
        """
        Keep at most the first ``length`` tokens of the cache, and drop steps in flight.

        :param length: 0 to the number of tokens in the cache.
        :returns: how many are kept; 0 where the state can't be cut back.
        """
        ...

    def feed(self, token_ids: Sequence[int]) -> float | None:
        """
        Run a chunk of a prompt after what the cache holds.

        :param token_ids: ids of the vocabulary, for which the context has room.
        :returns: the time on the device in seconds, None where it is not known.
        """
        ...

    def first(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constraint: Constraint | None = None) -> Choice:
        """
        Choose the token after the last one fed.

        :param sampling: for this choice and all steps until the next ``rewind``.
        :param prompt_ids: the whole prompt, for what depends on the tokens so far.
        :param constraint: is asked for its mask before this choice and that of each step, when
            the caller has told it the token before; then no step may be in flight between two.
        """
        ...

    def step(self, remaining: int) -> Choice:
        """
        Run the token that was chosen last, and choose the one after it.

        :param remaining: further steps that will be asked for if nobody cancels; an engine may
            have that many in flight already.
        """
        ...

    def close(self) -> None:
        """Free everything on the device; the engine can't be used after that."""
        ...


@runtime_checkable
class Verifier(Engine, Protocol):
    """An engine that can check guesses at the next tokens: several rows in one pass."""

    pass_costs: Mapping[int, float]
    """What a pass costs by its rows, as parts of a step; by 1 alone: no draft is taken."""

    @property
    def settled(self) -> bool:
        """Whether no step is in flight, as after enough calls of ``step(0)``."""
        ...

    def verify(self, draft: Sequence[int]) -> 'Choices':
        """
        Run the token that was chosen last and guesses at those after it, in one pass.

        The choices are those that as many steps would have made, down to the last bit of their
        logits; the cache holds what these steps would have left. Asked for where `settled`. A
        constraint is asked for its masks along the draft.

        :param draft: ids of the vocabulary, fewer than the most rows of ``pass_costs``, for which
            the context has room.
        """
        ...


class Choices(NamedTuple):
    """
    The tokens that one pass brought: guesses that came true, and the one after them.

    ``device_s`` is the pass's time on the device, as in `Choice`. The last one may be `NO_TOKEN`.
    """

    token_ids: tuple[int, ...]
    device_s: float | None


@runtime_checkable
class Comparable(Engine, Protocol):
    """An engine whose arithmetic can be compared with another's, place by place."""

    def prefill_logits(self, prompt_ids: Sequence[int]) -> Any:
        """Give logits for each place of a prompt, a float32 tensor [tokens, vocab]; rewinds."""
        ...


def checked_prompt(prompt_ids: Sequence[int], footprint: Footprint) -> list[int]:
    """
    Give a prompt's ids where an engine can decode after them.

    :raises ValueError: an empty or too long prompt, or an id outside the vocabulary.
    """
    prompt, limit, size = list(prompt_ids), footprint.max_context, footprint.vocab_size
    if not prompt:
        raise ValueError('the prompt has no tokens')
    if len(prompt) >= limit:
        raise ValueError(
            f'the prompt has {len(prompt)} tokens: at most {limit - 1} leave room for an '
            'answer; shorten it, or raise engine.max_context where the model allows more')
    wrong = next((token for token in prompt if not 0 <= token < size), None)
    if wrong is not None:
        raise ValueError(f'token id {wrong} is outside the vocabulary of {size}')
    return prompt


def shared_prefix(old: Sequence[int], new: Sequence[int]) -> int:
    """Count the ids that two sequences have in common at their beginning."""
    return next((place for place, pair in enumerate(zip(old, new)) if pair[0] != pair[1]),
                min(len(old), len(new)))


def first_line(error: BaseException) -> str:
    """Give what an exception says, of a long message the first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def described(error: BaseException) -> str:
    """Give an exception in words: its type, and its message where it has one."""
    return f'{type(error).__name__}: {error}' if str(error) else type(error).__name__
