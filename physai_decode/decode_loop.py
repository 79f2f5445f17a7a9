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
The decode loop of all engines, from the ids of a prompt to the tokens of the answer.

It reuses the prefix that is still in the KV cache and prefills the rest in chunks of about equal
time; a cancel takes effect between two chunks. It ends when the context is full. It knows neither
text nor deadlines: the caller stops it. With a `Verifier` it can speculate, and get several tokens
from one pass.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace
import time

from physai_decode.config import SamplingConfig
from physai_decode.config import SpeculationConfig
from physai_decode.engine import checked_prompt
from physai_decode.engine import Constraint
from physai_decode.engine import Engine
from physai_decode.engine import NO_TOKEN
from physai_decode.engine import not_numbers
from physai_decode.engine import shared_prefix
from physai_decode.engine import Verifier
from physai_decode.speculation import DraftModel
from physai_decode.speculation import Experience
from physai_decode.speculation import Speculation

FIRST_CHUNK_TOKENS = {'cpu': 32, 'cuda': 512}       # until a chunk has been timed
# Each chunk reads all weights once, so a shorter one would take hardly less time.
LEAST_CHUNK_TOKENS = 32
CHUNK_MS = 100.0
OFF = SpeculationConfig('off')
LARGEST_CHANGE = 4          # factor between successive chunks; one slow chunk may be an outlier


@dataclass(frozen=True)
class Step:
    """
    The tokens and times of one iteration.

    ``token_ids`` is empty between two chunks of a prompt, where the caller can close the iterator;
    it has several ids if draft tokens were accepted. ``device_s`` is the time of the pass on the
    device in seconds (on a CPU, the time on the host), including the draft model, None if
    unknown; for the first token it is the time of the prefill. ``draft_s`` is the part of it in
    which the draft model ran, None if the pass had no draft. ``cached_tokens`` counts the tokens
    of the prompt that were in the cache. ``mask_s`` is the time of the constraint's masks on the
    host, None without a constraint. ``sample_s`` is the part of ``device_s`` that sampled the
    first token.
    """

    token_ids: tuple[int, ...]
    device_s: float | None = None
    cached_tokens: int = 0
    mask_s: float | None = None
    sample_s: float | None = None
    draft_s: float | None = None


class DecodeLoop:
    """Drives one engine, and tracks the ids in its cache."""

    def __init__(self, engine: Engine, chunk_ms: float = CHUNK_MS,
                 clock: Callable[[], float] = time.monotonic,
                 speculation: SpeculationConfig = OFF,
                 warn: Callable[[str], object] = lambda message: None) -> None:
        """
        Wrap an engine whose cache is empty.

        :param chunk_ms: target time of a chunk of a prompt; 0 uses the engine's maximum chunk.
        :param clock: monotonic, in seconds.
        :param speculation: the source of drafts; only a `Verifier` uses it.
        :param warn: called with an error of the draft model; the answer continues without drafts.
        """
        self.engine = engine
        self._verifier: Verifier | None = None
        self._draft_model: DraftModel | None = None
        if speculation.name != 'off' and isinstance(engine, Verifier) \
                and len(engine.pass_costs) > 1:
            self._verifier, costs = engine, list[float]()
            if speculation.name == 'model' and engine.drafter is not None:
                drafter, *costs = engine.drafter
                self._draft_model = DraftModel(drafter, engine.footprint.vocab_size,
                                               engine.footprint.eos_token_ids, warn)
            self._experience = {constrained: Experience(engine.pass_costs, *costs)
                                for constrained in (True, False)}
        self._clock = clock
        self._cached: list[int] = []
        least, most = engine.chunk_tokens
        first = FIRST_CHUNK_TOKENS[engine.footprint.device.partition(':')[0]]
        self._chunk = ChunkSize(least, most, first, chunk_ms)

    @property
    def cached_ids(self) -> list[int]:
        """The ids whose keys and values are in the cache."""
        return list(self._cached)

    def forget(self, length: int = 0) -> None:
        """Truncate the cache to at most ``length`` tokens."""
        with self._changing_cache() as cached:
            del cached[self.engine.rewind(min(length, len(cached))):]

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingConfig,
               constraint: Constraint | None = None, ahead: bool = True,
               drafts: bool = True) -> Iterator[Step]:
        """
        Generate an answer to ``prompt_ids``, on the thread that iterates.

        Yields at most ``sampling.max_new_tokens`` tokens. An id in ``footprint.eos_token_ids`` is
        yielded like any other, and the caller stops. Closing the iterator cancels within one step,
        or one chunk of the prompt.

        :param constraint: a constraint in its initial state, which receives each token; if it
            ends, the iterator does too.
        :param ahead: whether the engine may launch steps ahead.
        :param drafts: whether to speculate, if the engine supports it.
        :raises ValueError: the prompt is empty or too long, or an id is outside the vocabulary.
        :raises EngineError: while iterating: the logits are not finite.
        """
        prompt = checked_prompt(prompt_ids, self.engine.footprint)
        return self._stream(prompt, sampling, constraint, ahead, drafts)

    def _stream(self, prompt: list[int], sampling: SamplingConfig,
                constraint: Constraint | None, ahead: bool, drafts: bool) -> Iterator[Step]:
        self.forget(shared_prefix(self._cached, prompt[:-1]))
        reused = fed = len(self._cached)
        prefill_s: float | None = 0.0
        while fed < len(prompt):
            chunk = prompt[fed:fed + self._chunk.tokens]
            fed += len(chunk)
            last = fed == len(prompt)
            begin_s = self._clock()
            with self._changing_cache() as cached:
                elapsed = self.engine.feed(chunk)
                if last:        # the host prepares the first token while the device computes
                    token_id, device_s = self.engine.first(sampling, prompt, constraint)
                chunk_s = elapsed()
                cached += chunk
            prefill_s = _sum(prefill_s, chunk_s)
            if chunk_s is None and not last:    # the last one includes the first token
                chunk_s = self._clock() - begin_s
            self._chunk.learn(len(chunk), chunk_s or 0.0)
            if not last:
                yield Step((), None, reused)
        first = self._step(token_id, _sum(prefill_s, device_s), reused, constraint)
        yield replace(first, sample_s=device_s)
        room = self.engine.footprint.max_context - len(prompt)
        left = min(sampling.max_new_tokens, room) - 1
        if drafts and self._verifier is not None:
            yield from self._speculate(
                self._verifier, [*prompt, token_id], left, reused, constraint, ahead)
            return
        for remaining in reversed(range(left)):
            if constraint is not None and constraint.ended:
                return
            cached, self._cached = self._cached, []     # as `_changing_cache`, at half the cost
            next_id, device_s = self.engine.step(remaining if ahead else 0)
            cached.append(token_id)
            self._cached, token_id = cached, next_id
            yield self._step(token_id, device_s, reused, constraint)

    def _speculate(self, engine: Verifier, ids: list[int], left: int, reused: int,
                  constraint: Constraint | None, ahead: bool) -> Iterator[Step]:
        """Continue after the first token: verify a draft if there is one, else run a step."""
        last_id = ids[-1]
        speculation = Speculation(ids, self._experience[constraint is not None],
                                  engine.footprint.eos_token_ids, self._draft_model)
        while left and not (constraint is not None and constraint.ended):
            draft, drafted_s, before_s = list[int](), 0.0, speculation.device_s
            begin_s = self._clock()
            rows = speculation.rows(left, constraint)
            if rows > 1 and engine.is_idle:
                chosen_s = self._clock()
                while speculation.prefill(self._chunk.tokens):
                    yield Step((), None, reused)
                prefilled_s = self._clock()
                draft = speculation.draft(constraint)
                drafted_s = self._clock() - prefilled_s
                begin_s += self._clock() - chosen_s
            with self._changing_cache() as cached:
                if draft:
                    token_ids, device_s = engine.verify(draft)
                else:
                    # No step may be in flight during `verify`, so collect those that are.
                    next_id, device_s = engine.step(left - 1 if ahead and rows == 1 else 0)
                    token_ids = (next_id,)
                new_ids = token_ids[:-1] if token_ids[-1] == NO_TOKEN else token_ids
                if constraint is not None:
                    new_ids = _accept(new_ids, constraint)
                cached += last_id, *new_ids[:-1]
            if new_ids:
                last_id = new_ids[-1]
                left -= len(new_ids)
                speculation.take(
                    new_ids, 1 + len(draft), self._clock() - begin_s, drafted_s)
                model_s = speculation.device_s - before_s
                yield Step(new_ids, _sum(device_s, model_s), reused,
                           None if constraint is None else constraint.mask_s,
                           draft_s=model_s if draft or model_s else None)
            if token_ids[-1] == NO_TOKEN and not (constraint is not None and constraint.ended):
                self._cached = []
                raise not_numbers(engine.footprint.dtype)

    @contextmanager
    def _changing_cache(self) -> Iterator[list[int]]:
        """Yield the list of cached ids for changes; if the engine raises, none are cached."""
        cached, self._cached = self._cached, []
        yield cached
        self._cached = cached

    def _step(self, token_id: int, device_s: float | None, reused: int,
              constraint: Constraint | None) -> Step:
        """Return the step of a token, after advancing the constraint."""
        if token_id == NO_TOKEN:
            self._cached = []       # NaN in one position spreads to later ones
            raise not_numbers(self.engine.footprint.dtype)
        if constraint is None:
            return Step((token_id,), device_s, reused)
        constraint.accept(token_id)
        return Step((token_id,), device_s, reused, constraint.mask_s)


class ChunkSize:
    """The number of tokens per chunk of a prompt, adapted to the time that chunks take."""

    def __init__(self, least: int, most: int, first: int, chunk_ms: float) -> None:
        """
        Start with ``first`` tokens.

        :param least: minimum tokens of the engine; ``most`` is its maximum.
        :param first: tokens of the first chunk.
        :param chunk_ms: target time of a chunk; 0 always uses ``most``.
        """
        self._least, self._most = min(max(least, LEAST_CHUNK_TOKENS), most), most
        self._chunk_s = 1e-3 * chunk_ms
        self.tokens = min(max(first, self._least), most) if chunk_ms else most

    def learn(self, tokens: int, took_s: float) -> None:
        """Update from the time of a chunk; one below ``self.tokens`` can only shrink the next."""
        if not self._chunk_s or took_s <= 0:
            return
        if took_s > self._chunk_s or tokens >= self.tokens:
            fitting = int(tokens * self._chunk_s / took_s)
            fitting = max(fitting, self.tokens // LARGEST_CHANGE)
            self.tokens = max(self._least,
                              min(fitting, LARGEST_CHANGE * self.tokens, self._most))


def _accept(token_ids: Sequence[int], constraint: Constraint) -> tuple[int, ...]:
    """Advance a constraint by the tokens of a pass; return those up to its end."""
    for count, token_id in enumerate(token_ids, 1):
        constraint.accept(token_id)
        if constraint.ended:
            return tuple(token_ids[:count])
    return tuple(token_ids)


def _sum(one_s: float | None, other_s: float | None) -> float | None:
    return None if one_s is None or other_s is None else one_s + other_s
