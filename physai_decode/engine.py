"""
What the node asks of an engine: token ids in, steps out.

An engine knows nothing of text, queues, deadlines or ROS, so that engines can be compared token
for token. A constructed engine is loaded, warmed up and captured: there is no half engine.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Protocol

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

    engine: str                     # native, transformers, exllamav2
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
    details: Mapping[str, str] = field(default_factory=dict)  # shown in ~/model_info as they are


@dataclass(frozen=True)
class Step:
    """
    What one turn of an engine brought.

    ``token_ids`` is empty between two pieces of a long prompt: nothing is known yet, but the
    caller can close the generator there. ``device_s`` is the step's time on the device in seconds
    (on a CPU the step's own time), or None where it is not known; for the first token it is the
    prefill's. ``cached_tokens`` is how many of the prompt's tokens were still in the cache.
    """

    token_ids: tuple[int, ...]
    device_s: float | None = None
    cached_tokens: int = 0


class Engine(Protocol):
    """
    One language model on one device, for one request at a time, driven from one thread.

    ``stream`` yields at most ``sampling.max_new_tokens`` tokens and ends by itself only there or
    where the context is full; ids in ``footprint.eos_token_ids`` are yielded like any other and it
    is the caller who stops. Closing the generator cancels within one step and leaves the engine
    ready for the next request.
    """

    footprint: Footprint

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Iterator[Step]:
        """
        Decode after ``prompt_ids``.

        :param prompt_ids: token ids, 1 to ``footprint.max_context - 1`` of them.
        :raises ValueError: an empty or too long prompt, or an id outside the vocabulary.
        """
        ...

    def close(self) -> None:
        """Free everything on the device; the engine can't be used after that."""
        ...


def checked_prompt(prompt_ids: Sequence[int], footprint: Footprint) -> list[int]:
    """
    Give a prompt's ids where an engine can decode after them.

    :raises ValueError: as ``Engine.stream`` does.
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
