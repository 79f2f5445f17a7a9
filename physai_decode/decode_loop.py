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
The decode loop of all engines: from a prompt's ids to one token after the other.

It reuses the prefix that the cache still holds, feeds the rest in chunks that take about the same
time each, so that a cancel is heard between two of them, and ends where the context is full. It
knows neither text nor deadlines: whoever iterates stops it. With an engine that can check guesses
at the next tokens it may try some, and get several tokens from one pass.
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
from physai_decode.speculation import Experience
from physai_decode.speculation import Speculation

FIRST_CHUNK_TOKENS = {'cpu': 32, 'cuda': 512}       # until the time of a chunk is known
# A chunk reads all weights once, however short it is: fewer tokens would hardly be fed sooner.
LEAST_CHUNK_TOKENS = 32
CHUNK_MS = 100.0
OFF = SpeculationConfig('off')
LARGEST_CHANGE = 4          # from one chunk to the next: one that was late by chance is no rule


@dataclass(frozen=True)
class Step:
    """
    What one turn of the loop brought.

    ``token_ids`` is empty between two chunks of a prompt: nothing is known yet, but the caller
    can close the iterator there; they are several if guesses came true. ``device_s`` is the time
    of the pass on the device in seconds (on a CPU the host's own), None where it is not known; for
    the first token it is the prefill's. ``cached_tokens`` is how many of the prompt's tokens were
    still in the cache. ``mask_s`` is what the constraint's masks took on the host, None where
    there is no constraint. ``sample_s`` is the part of ``device_s`` for the choice of the first
    token.
    """

    token_ids: tuple[int, ...]
    device_s: float | None = None
    cached_tokens: int = 0
    mask_s: float | None = None
    sample_s: float | None = None


class DecodeLoop:
    """Drives one engine, and knows which ids its cache holds."""

    def __init__(self, engine: Engine, chunk_ms: float = CHUNK_MS,
                 clock: Callable[[], float] = time.monotonic,
                 speculation: SpeculationConfig = OFF) -> None:
        """
        Take an engine with nothing in its cache.

        :param chunk_ms: how long one chunk of a prompt may take, about; 0 feeds the largest
            chunks that the engine takes.
        :param clock: monotonic, in seconds.
        :param speculation: how tokens are guessed ahead, where the engine takes drafts.
        """
        self.engine = engine
        self._verifier: Verifier | None = None
        if speculation.name != 'off' and isinstance(engine, Verifier) \
                and len(engine.pass_costs) > 1:
            self._verifier = engine
            self._experience = {
                constrained: Experience(engine.pass_costs) for constrained in (True, False)}
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
        """Keep at most the first ``length`` tokens of the cache."""
        with self._in_doubt() as cached:
            del cached[self.engine.rewind(min(length, len(cached))):]

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingConfig,
               constraint: Constraint | None = None, ahead: bool = True,
               drafts: bool = True) -> Iterator[Step]:
        """
        Decode after ``prompt_ids``, on the thread that iterates.

        At most ``sampling.max_new_tokens`` tokens come; ids in ``footprint.eos_token_ids`` come
        like any other, and it is the caller who stops. Closing the iterator cancels within one
        step, or one chunk of the prompt.

        :param constraint: a fresh one, which is told each token; where it has ended, so does the
            iterator.
        :param ahead: whether the engine may start steps before they are asked for.
        :param drafts: guess ahead, where the loop was made to.
        :raises ValueError: an empty or too long prompt, or an id outside the vocabulary.
        :raises EngineError: while iterating: the model's logits are not numbers.
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
            begin_s = self._clock()
            with self._in_doubt() as cached:
                device_s = self.engine.feed(chunk)
                cached += chunk
            self._chunk.learn(len(chunk), self._clock() - begin_s)
            prefill_s = _sum(prefill_s, device_s)
            fed += len(chunk)
            if fed < len(prompt):
                yield Step((), None, reused)
        with self._in_doubt():
            token_id, device_s = self.engine.first(sampling, prompt, constraint)
        first = self._told(token_id, _sum(prefill_s, device_s), reused, constraint)
        yield replace(first, sample_s=device_s)
        room = self.engine.footprint.max_context - len(prompt)
        left = min(sampling.max_new_tokens, room) - 1
        if drafts and self._verifier is not None:
            yield from self._drafting(
                self._verifier, [*prompt, token_id], left, reused, constraint, ahead)
            return
        for remaining in reversed(range(left)):
            if constraint is not None and constraint.ended:
                return
            cached, self._cached = self._cached, []     # as `_in_doubt`, at half the cost
            following, device_s = self.engine.step(remaining if ahead else 0)
            cached.append(token_id)
            self._cached, token_id = cached, following
            yield self._told(token_id, device_s, reused, constraint)

    def _drafting(self, engine: Verifier, ids: list[int], left: int, reused: int,
                  constraint: Constraint | None, ahead: bool) -> Iterator[Step]:
        """Go on after the first token: check guesses where there are any, else take a step."""
        newest = ids[-1]
        speculation = Speculation(
            ids, self._experience[constraint is not None], engine.footprint.eos_token_ids)
        while left and not (constraint is not None and constraint.ended):
            begin_s = self._clock()
            draft = speculation.draft(left, constraint)
            with self._in_doubt() as cached:
                if draft and engine.settled:
                    token_ids, device_s = engine.verify(draft)
                else:
                    # Nothing may run ahead of a try; what is in flight still comes.
                    following, device_s = engine.step(left - 1 if ahead and not draft else 0)
                    token_ids, draft = (following,), []
                good = token_ids[:-1] if token_ids[-1] == NO_TOKEN else token_ids
                if constraint is not None:
                    good = _accepted(good, constraint)
                cached += newest, *good[:-1]
            if good:
                newest = good[-1]
                left -= len(good)
                speculation.take(good, 1 + len(draft), self._clock() - begin_s)
                yield Step(good, device_s, reused,
                           None if constraint is None else constraint.mask_s)
            if token_ids[-1] == NO_TOKEN and not (constraint is not None and constraint.ended):
                self._cached = []
                raise not_numbers(engine.footprint.dtype)

    @contextmanager
    def _in_doubt(self) -> Iterator[list[int]]:
        """Give the list of cached ids to change; where the engine raises, nothing is cached."""
        cached, self._cached = self._cached, []
        yield cached
        self._cached = cached

    def _told(self, token_id: int, device_s: float | None, reused: int,
              constraint: Constraint | None) -> Step:
        """Give the step that brought a token, after the constraint was told."""
        if token_id == NO_TOKEN:
            self._cached = []       # of one token, what is no number spreads to others
            raise not_numbers(self.engine.footprint.dtype)
        if constraint is None:
            return Step((token_id,), device_s, reused)
        constraint.accept(token_id)
        return Step((token_id,), device_s, reused, constraint.mask_s)


class ChunkSize:
    """How many tokens of a prompt are fed at once, learned from how long they took."""

    def __init__(self, least: int, most: int, first: int, chunk_ms: float) -> None:
        """
        Begin with a guess.

        :param least: and ``most``: the engine's limits in tokens.
        :param first: tokens of the first chunk.
        :param chunk_ms: how long a chunk may take; 0: as long as it takes.
        """
        self._least, self._most = min(max(least, LEAST_CHUNK_TOKENS), most), most
        self._chunk_s = 1e-3 * chunk_ms
        self.tokens = min(max(first, self._least), most) if chunk_ms else most

    def learn(self, tokens: int, took_s: float) -> None:
        """Take the time of a chunk; one that is shorter than allowed can only shrink the next."""
        if not self._chunk_s or took_s <= 0:
            return
        if took_s > self._chunk_s or tokens >= self.tokens:
            fitting = int(tokens * self._chunk_s / took_s)
            fitting = max(fitting, self.tokens // LARGEST_CHANGE)
            self.tokens = max(self._least,
                              min(fitting, LARGEST_CHANGE * self.tokens, self._most))


def _accepted(token_ids: Sequence[int], constraint: Constraint) -> tuple[int, ...]:
    """Tell a constraint the tokens of a pass; give them as far as it goes."""
    for count, token_id in enumerate(token_ids, 1):
        constraint.accept(token_id)
        if constraint.ended:
            return tuple(token_ids[:count])
    return tuple(token_ids)


def _sum(one_s: float | None, other_s: float | None) -> float | None:
    return None if one_s is None or other_s is None else one_s + other_s
