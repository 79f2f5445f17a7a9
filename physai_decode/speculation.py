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
Drafts for speculative decoding, which one pass of the engine verifies.

The draft tokens are those that a constraint forces, come from prompt lookup, or are the greedy
tokens of a smaller model (Leviathan et al., arXiv 2211.17192). Prompt lookup predicts the tokens
that followed the last few tokens at their previous occurrence in the prompt or the answer (Saxena
2023; Fu et al., arXiv 2402.02057, compare such drafts). A draft never changes the answer, only the
number of passes. This module knows token ids, but neither devices nor text.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import takewhile

from physai_decode.config import SamplingConfig
from physai_decode.engine import Constraint
from physai_decode.engine import described
from physai_decode.engine import Engine
from physai_decode.engine import NO_TOKEN
from physai_decode.engine import not_numbers
from physai_decode.engine import shared_prefix

NGRAM_SIZES = (3, 2)        # tokens of a match, the longest first
MAX_OVERHEAD = 0.02         # fraction of all steps that rejected drafts may cost
INITIAL_BALANCE = 0.3       # steps that drafts may cost before any token is accepted
MAX_BALANCE = 4.0           # steps that accepted tokens can save up for later drafts
VERIFY_OVERHEAD = 0.03      # steps, beside the pass: no step can run ahead of the host
MIN_GAIN = 1.2              # least expected tokens per step of cost
INITIAL_RATE = 0.5          # acceptance rate of draft tokens before any is known
INITIAL_FORCED_RATE = 0.9   # of forced ones: a model may split the same text differently
INITIAL_MODEL_RATE = 0.8    # of those of a draft model
RECOVERY = 1 / 64           # of that rate towards its initial value, per token without a draft;
                            # of the score of a token, each time a constraint is not asked
COST_RECOVERY = 1 / 8192    # of costs towards their initial values, per step of one row
SMOOTHING = 1 / 8           # weight of the newest value in acceptance rates and costs
MISSES = 4                  # times that a constraint may force nothing after a token


class Lookup:
    """Prompt lookup: the tokens after the previous occurrence of the last few tokens."""

    def __init__(self, ids: Sequence[int], ends: Collection[int] = ()) -> None:
        """
        Index a prompt.

        :param ids: at least one.
        :param ends: ids that no draft contains.
        """
        self._ids = list(ids)
        self._ends = frozenset(ends)
        count = len(self._ids)
        # For each n-gram, the index after its last occurrence.
        self._places = {
            size: dict(zip(zip(*(self._ids[at:count - 1] for at in range(size))),
                           range(size, count)))
            for size in NGRAM_SIZES}
        self._match: int | None = None      # index of the first draft token
        self._find()

    @property
    def ids(self) -> Sequence[int]:
        """The prompt and the answer so far."""
        return self._ids

    def add(self, token_id: int) -> bool | None:
        """Append a token; return whether the draft had predicted it, None without a draft."""
        ids, at = self._ids, self._match
        count = len(ids)
        for size, places in self._places.items():
            if size <= count:
                places[tuple(ids[-size:])] = count
        ids.append(token_id)
        if at is not None and ids[at] == token_id:
            self._match = at + 1
            return True
        self._find()
        return None if at is None else False

    def draft(self, most: int) -> list[int]:
        """Return at most ``most`` draft tokens, stopping before an id that ends an answer."""
        draft: list[int] = []
        if self._match is None:
            return draft
        known = len(self._ids)
        for at in range(self._match, self._match + most):
            # The repeated text may be shorter than the draft, which then continues with itself.
            token_id = self._ids[at] if at < known else draft[at - known]
            if token_id in self._ends:
                break
            draft.append(token_id)
        return draft

    def _find(self) -> None:
        for size, places in self._places.items():
            self._match = places.get(tuple(self._ids[-size:]))
            if self._match is not None:
                return


class DraftModel:
    """
    The greedy tokens of a smaller model, whose KV cache follows the answers of another one.

    It reads a prompt when its first draft is requested, so after the first token of the answer.
    After an error, it makes no more drafts; after an id that it lacks, none for the same answer.
    """

    def __init__(self, engine: Engine, vocab_size: int, ends: Collection[int],
                 warn: Callable[[str], object]) -> None:
        """
        Wrap an engine whose cache is empty.

        :param vocab_size: of the model that verifies the drafts.
        :param ends: ids that no draft contains.
        :param warn: receives why answers continue without drafts, once for each reason.
        """
        self._engine, self._warn = engine, warn
        self._vocab_size, self._ends = vocab_size, frozenset(ends)
        self._cached: list[int] = []
        self._broken = self._lacks = False      # whether an error, or an unknown id, was told
        self.begin()

    def begin(self) -> None:
        """Begin an answer, which reuses the prefix that is in the cache."""
        self._same = 0              # cached ids that are known to be those of the answer
        self._has_prompt = False
        self.failed = self._broken  # whether there are no more drafts for this answer
        self.device_s = 0.0         # time on the device for this answer

    def room(self, length: int) -> int:
        """Return how many tokens it can draft after this many ids; 0 or less if none."""
        return 0 if self.failed else self._engine.footprint.max_context - length

    def prefill(self, ids: Sequence[int], most: int) -> bool:
        """
        Prefill a chunk of the ids before the last, unless `draft` can read what is missing.

        :param ids: the prompt and the answer so far.
        :param most: size of a chunk.
        :returns: whether it did, so that there may be more chunks.
        """
        if self.failed:
            return False
        with self._enduring():
            missing = ids[self._rewind(ids, len(ids)):-1]
            if missing and (len(missing) > most or not self._has_prompt):
                self._feed(missing, most)
                return True
        self._has_prompt = True
        return False

    def draft(self, ids: Sequence[int], count: int, forced: Sequence[int] = ()) -> list[int]:
        """
        Return at most ``count`` greedy tokens, stopping before an id that ends an answer.

        :param ids: the prompt and the answer so far.
        :param count: at least 1; at most `room` after ``ids`` and ``forced``.
        :param forced: the draft tokens before these.
        """
        draft: list[int] = []
        if self.failed:
            return draft
        engine, known = self._engine, [*ids, *forced]
        with self._enduring():
            self._feed(known[self._rewind(known, len(ids)):])
            # A greedy choice without a repetition penalty does not depend on the other ids.
            token_id, device_s = engine.first(SamplingConfig(), known[-1:])
            for remaining in reversed(range(count)):
                self.device_s += device_s or 0.0
                if token_id == NO_TOKEN:
                    raise not_numbers(engine.footprint.dtype)
                if token_id in self._ends or token_id >= self._vocab_size:
                    break
                draft.append(token_id)
                if remaining:
                    self._cached.append(token_id)
                    token_id, device_s = engine.step(remaining - 1)
        return draft

    def _rewind(self, ids: Sequence[int], sure: int) -> int:
        """
        Truncate the cache to a prefix of ``ids`` without the last; return its length.

        :param sure: the number of leading ids that belong to the answer, whatever follows.
        """
        same = self._same
        same += shared_prefix(self._cached[same:], ids[same:-1])
        del self._cached[self._engine.rewind(same):]
        self._same = min(len(self._cached), sure)
        return len(self._cached)

    def _feed(self, ids: Sequence[int], most: int | None = None) -> None:
        if max(ids) >= self._engine.footprint.vocab_size:
            raise _UnknownId(max(ids))
        self.device_s += self._engine.feed(ids[:most])() or 0.0
        self._cached += ids[:most]

    @contextmanager
    def _enduring(self) -> Iterator[None]:
        """End the drafts if the draft model fails, or those of this answer at an unknown id."""
        try:
            yield
        except _UnknownId as error:
            self.failed = True
            if not self._lacks:
                self._lacks = True
                self._warn('the draft model makes no drafts for an answer whose token ids, such '
                           f'as {error}, are outside its vocabulary')
        except Exception as error:      # of any kind: the answer does not depend on it
            self.failed = self._broken = True
            self._warn('the draft model is off until the node is activated again: '
                       f'{described(error)}')


class _UnknownId(Exception):
    """A draft model lacks the id."""


class Experience:
    """
    The measured costs of passes, and the tokens after which constraints force others.

    It is shared by the answers of one engine. The costs are in decode steps, by the rows of a
    pass: those given at first, then those measured. A device that becomes slow while no steps of
    one row are measured makes them too high, so they recover with each such step. Forced tokens
    take time to compute, so a constraint is rarely asked after tokens where it has mostly forced
    none.
    """

    def __init__(self, costs: Mapping[int, float], draft_cost: float = 0.0,
                 step_s: float = 0.0) -> None:
        """
        Start with the given costs.

        :param costs: the cost of a pass by its rows; 1 for one row.
        :param draft_cost: of one token of a draft model.
        :param step_s: time of a decode step on the host in seconds; 0 if unknown.
        """
        self.draft_cost = draft_cost
        self._costs = {rows: cost + VERIFY_OVERHEAD
                       for rows, cost in sorted(costs.items()) if rows > 1}
        self._initial = draft_cost, dict(self._costs)
        self._step_s = step_s
        self._scores: dict[int, float] = {}     # by the token before
        self.most_rows = max(self._costs)

    def items(self) -> Iterable[tuple[int, float]]:
        """Return (rows, cost) for each size of a pass, the smallest first."""
        return self._costs.items()

    def of(self, rows: int) -> float:
        """Return the cost of a pass, which runs as the next larger size; 1 for one row."""
        return self._costs[self._size(rows)] if rows > 1 else 1.0

    def learn(self, rows: int, took_s: float) -> None:
        """Update from the time of a pass; one that was delayed counts at most double."""
        if rows == 1:
            known_s = self._step_s or took_s
            self._step_s = known_s + SMOOTHING * (min(took_s, 2 * known_s) - known_s)
            draft_cost, costs = self._initial
            self.draft_cost += COST_RECOVERY * (draft_cost - self.draft_cost)
            for size, cost in costs.items():
                self._costs[size] += COST_RECOVERY * (cost - self._costs[size])
        elif self._step_s:
            size = self._size(rows)
            self._costs[size] = self._learned(self._costs[size], took_s)

    def learn_draft(self, tokens: int, took_s: float) -> None:
        """Update from the time of a draft model, like `learn`."""
        if self._step_s:
            self.draft_cost = self._learned(self.draft_cost, took_s / tokens)

    def asks(self, token_id: int) -> bool:
        """Return whether to ask a constraint what it forces after a token."""
        score = self._scores.get(token_id, 0)
        if score <= -MISSES:                    # another constraint may force something
            self._scores[token_id] = score + RECOVERY
        return score > -MISSES

    def asked(self, token_id: int, found: bool) -> None:
        """Update from whether a constraint forced anything after a token."""
        score = self._scores.get(token_id, 0)
        self._scores[token_id] = min(score + MISSES, MISSES) if found else score - 1

    def _learned(self, known: float, took_s: float) -> float:
        return known + SMOOTHING * (min(took_s / self._step_s, 2 * known) - known)

    def _size(self, rows: int) -> int:
        return next(size for size in self._costs if size >= rows)


class Policy:
    """
    Chooses the rows of the next pass, and bounds the cost of rejected drafts.

    Two figures decide: the acceptance rate of draft tokens, verified or not, and a balance of
    steps. The balance grows by `MAX_OVERHEAD` per token and by the steps that passes save, and
    pays for passes that save none. The tokens of a draft model have their own rate and cost; the
    rate recovers while there are none, so that they are tried again.
    """

    def __init__(self, experience: Experience, balance: float = INITIAL_BALANCE) -> None:
        """Start with the initial rates; use the experience as it changes."""
        self._experience = experience
        self._rate = INITIAL_RATE
        self._forced_rate = INITIAL_FORCED_RATE
        self._model_rate = INITIAL_MODEL_RATE
        self._balance = balance

    def learn(self, accepted: bool | None, forced: bool | None = None,
              drafted: bool | None = None) -> None:
        """Update from a token: whether lookup, constraint and model predicted it, or None."""
        self._balance = min(MAX_BALANCE, self._balance + MAX_OVERHEAD)
        if accepted is not None:
            self._rate += SMOOTHING * (accepted - self._rate)
        if forced is not None:
            self._forced_rate += SMOOTHING * (forced - self._forced_rate)
        if drafted is not None:
            self._model_rate += SMOOTHING * (drafted - self._model_rate)
        else:
            self._model_rate += RECOVERY * (INITIAL_MODEL_RATE - self._model_rate)

    def spend(self, rows: int, tokens: int, drafted: int = 0) -> None:
        """
        Update the balance from a pass and the tokens that it yielded.

        :param drafted: tokens that a draft model computed for it.
        """
        cost = drafted * self._experience.draft_cost + self._experience.of(rows)
        self._balance = min(MAX_BALANCE, self._balance + tokens - cost)

    def best(self, most: int, forced: int = 0, by_model: bool = False) -> tuple[float, int]:
        """
        Return the expected tokens per step of cost, and the rows, of the best next pass.

        :param most: maximum rows; 1 means no draft.
        :param forced: number of leading draft tokens that a constraint forces.
        :param by_model: whether a draft model computes the others.
        """
        best = MIN_GAIN, 1
        rate = self._model_rate if by_model else self._rate
        for rows, cost in self._experience.items():
            count = min(rows, most)
            if by_model:
                cost += max(0, count - 1 - forced) * self._experience.draft_cost
            if cost - 1 > self._balance:
                continue
            tokens = sum(self._forced_rate**min(place, forced) * rate**max(0, place - forced)
                         for place in range(count))
            if tokens / cost > best[0]:
                best = tokens / cost, count
        return best


def pays(costs: Mapping[int, float], draft_cost: float) -> bool:
    """
    Return whether a draft model promises enough to be used.

    :param costs: see `Experience`.
    :param draft_cost: of one token.
    """
    policy = Policy(Experience(costs, draft_cost), MAX_BALANCE)
    return policy.best(max(costs), by_model=True)[1] > 1


class Speculation:
    """The drafts of one answer: which tokens, and whether to verify them."""

    def __init__(self, prompt_ids: Sequence[int], experience: Experience,
                 ends: Collection[int] = (), model: DraftModel | None = None) -> None:
        """
        Start with a prompt; see `Lookup` and `Policy`.

        :param experience: of the engine; it is updated.
        :param ends: ids that end an answer.
        :param model: drafts where that promises more than prompt lookup.
        """
        self._lookup = Lookup(prompt_ids, ends)
        self._policy = Policy(experience)
        self._experience = experience
        self._ends = frozenset(ends)
        self._model = model
        if model is not None:
            model.begin()
        self._forced: list[int] = []        # the forced tokens that come next
        self._draft: list[int] = []
        self._asked = 0                     # tokens of the draft that the model has to compute
        self._computed = 0                  # tokens that it did compute

    def take(self, token_ids: Sequence[int], rows: int = 1, took_s: float = 0.0,
             drafted_s: float = 0.0) -> None:
        """
        Append the tokens of a pass.

        :param rows: rows of the pass; 1 without a draft.
        :param took_s: time on the host in seconds, including masks; 0 if unknown.
        :param drafted_s: time of the draft model before it, in seconds; 0 if unknown.
        """
        if took_s:
            self._experience.learn(rows, took_s)
        if drafted_s and self._computed:
            self._experience.learn_draft(self._computed, drafted_s)
        forced, first = self._forced, len(self._forced)
        drafted = self._draft if self._computed else []
        for place, token_id in enumerate(token_ids):
            self._policy.learn(
                self._lookup.add(token_id),
                forced[place] == token_id if place < first else None,
                drafted[place] == token_id if first <= place < len(drafted) else None)
        if rows > 1 or self._computed:
            self._policy.spend(rows, len(token_ids), self._computed)
        self._forced, self._draft, self._computed = [], [], 0

    def rows(self, left: int, constraint: Constraint | None = None) -> int:
        """
        Choose the source of the next draft; return the rows of its pass, 1 for no draft.

        :param left: remaining tokens of the answer.
        :param constraint: it has accepted the tokens so far.
        """
        most, ids = min(self._experience.most_rows, left) - 1, self._lookup.ids
        draft = self._lookup.draft(most)
        if constraint is not None:
            if most and self._experience.asks(ids[-1]):
                self._forced = list(takewhile(
                    lambda token_id: token_id not in self._ends, constraint.forced()))[:most]
                self._experience.asked(ids[-1], bool(self._forced))
            if draft[:len(self._forced)] != self._forced:
                draft = self._forced
            if draft:
                draft = draft[:constraint.fits(draft)]
        forced = len(self._forced)
        gain, rows = self._policy.best(len(draft) + 1, forced) if draft else (MIN_GAIN, 1)
        self._draft, self._asked = draft[:rows - 1], 0
        if self._model is not None:
            most = min(most, self._model.room(len(ids)))
            better, more = self._policy.best(most + 1, forced, by_model=True)
            if more > forced + 1 and better > gain:
                self._draft, self._asked, rows = self._forced, more - 1 - forced, more
        return rows

    def prefill(self, most: int) -> bool:
        """See `DraftModel.prefill`; call it before `draft` until it returns False."""
        return bool(self._asked) and self._model is not None \
            and self._model.prefill(self._lookup.ids, most)

    def draft(self, constraint: Constraint | None = None) -> list[int]:
        """
        Return the draft that `rows` chose, or the part of it that the model could compute.

        :param constraint: allows all draft tokens.
        """
        if self._asked and self._model is not None:
            found = self._model.draft(self._lookup.ids, self._asked, self._forced)
            if not self._model.failed:          # the time of an error is not that of a draft
                # The token that ended a shorter draft was computed, too.
                self._computed = min(self._asked, len(found) + 1)
            draft = self._draft = [*self._forced, *found]
            if draft and constraint is not None:
                return draft[:constraint.fits(draft)]
        return self._draft

    @property
    def device_s(self) -> float:
        """Time of the draft model on the device for this answer, in seconds."""
        return self._model.device_s if self._model is not None else 0.0
