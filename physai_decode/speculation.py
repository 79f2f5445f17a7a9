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

The draft tokens are those that a constraint forces, or come from prompt lookup: the tokens that
followed the last few tokens at their previous occurrence in the prompt or the answer (Saxena 2023;
Fu et al., arXiv 2402.02057, compare such drafts). A draft never changes the answer, only the
number of passes. This module knows token ids, but neither engines nor text.
"""

from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import takewhile

from physai_decode.engine import Constraint

NGRAM_SIZES = (3, 2)        # tokens of a match, the longest first
MAX_OVERHEAD = 0.02         # fraction of all steps that rejected drafts may cost
INITIAL_BALANCE = 0.3       # steps that drafts may cost before any token is accepted
MAX_BALANCE = 4.0           # steps that accepted tokens can save up for later drafts
VERIFY_OVERHEAD = 0.03      # steps, beside the pass: no step can run ahead of the host
MIN_GAIN = 1.2              # least expected tokens per step of cost
INITIAL_RATE = 0.5          # acceptance rate of draft tokens before any is known
INITIAL_FORCED_RATE = 0.9   # of forced ones: a model may split the same text differently
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
    def last_id(self) -> int:
        """The newest id."""
        return self._ids[-1]

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


class Experience:
    """
    The measured costs of passes, and the tokens after which constraints force others.

    It is shared by the answers of one engine. The costs are in decode steps, by the rows of a
    pass: those given at first, then those measured. Forced tokens take time to compute, so a
    constraint is no longer asked after tokens where it has mostly forced none.
    """

    def __init__(self, costs: Mapping[int, float]) -> None:
        """
        Start with the given costs.

        :param costs: the cost of a pass by its rows; 1 for one row.
        """
        self._costs = {rows: cost + VERIFY_OVERHEAD
                       for rows, cost in sorted(costs.items()) if rows > 1}
        self._step_s = 0.0
        self._scores: dict[int, int] = {}       # by the token before
        self.most_rows = max(self._costs)

    def items(self) -> Iterable[tuple[int, float]]:
        """Return (rows, cost) for each size of a pass, the smallest first."""
        return self._costs.items()

    def of(self, rows: int) -> float:
        """Return the cost of a pass, which runs as the next larger size."""
        return self._costs[self._size(rows)]

    def learn(self, rows: int, took_s: float) -> None:
        """Update from the time of a pass; one that was delayed counts at most double."""
        if rows == 1:
            known_s = self._step_s or took_s
            self._step_s = known_s + SMOOTHING * (min(took_s, 2 * known_s) - known_s)
        elif self._step_s:
            size = self._size(rows)
            known = self._costs[size]
            self._costs[size] += SMOOTHING * (min(took_s / self._step_s, 2 * known) - known)

    def asks(self, token_id: int) -> bool:
        """Return whether to ask a constraint what it forces after a token."""
        return self._scores.get(token_id, 0) > -MISSES

    def asked(self, token_id: int, found: bool) -> None:
        """Update from whether a constraint forced anything after a token."""
        score = self._scores.get(token_id, 0)
        self._scores[token_id] = min(score + MISSES, MISSES) if found else score - 1

    def _size(self, rows: int) -> int:
        return next(size for size in self._costs if size >= rows)


class Policy:
    """
    Chooses the rows of the next pass, and bounds the cost of rejected drafts.

    Two figures decide: the acceptance rate of draft tokens, verified or not, and a balance of
    steps. The balance grows by `MAX_OVERHEAD` per token and by the steps that passes save, and
    pays for passes that save none.
    """

    def __init__(self, experience: Experience) -> None:
        """Start with the initial rates and balance; use the experience as it changes."""
        self._experience = experience
        self._rate = INITIAL_RATE
        self._forced_rate = INITIAL_FORCED_RATE
        self._balance = INITIAL_BALANCE

    def learn(self, accepted: bool | None, forced: bool | None = None) -> None:
        """Update from a token: whether the draft and the constraint predicted it, or None."""
        self._balance = min(MAX_BALANCE, self._balance + MAX_OVERHEAD)
        if accepted is not None:
            self._rate += SMOOTHING * (accepted - self._rate)
        if forced is not None:
            self._forced_rate += SMOOTHING * (forced - self._forced_rate)

    def spend(self, rows: int, tokens: int) -> None:
        """Update the balance from a pass with a draft and the tokens that it yielded."""
        self._balance = min(MAX_BALANCE, self._balance + tokens - self._experience.of(rows))

    def rows(self, most: int, forced: int = 0) -> int:
        """
        Return the rows of the next pass, at most ``most``; 1 means no draft.

        :param forced: number of leading draft tokens that a constraint forces.
        """
        best, gain = 1, MIN_GAIN
        for rows, cost in self._experience.items():
            if cost - 1 > self._balance:
                continue
            count = min(rows, most)
            tokens = sum(self._forced_rate**min(place, forced) * self._rate**max(0, place - forced)
                         for place in range(count))
            if tokens / cost > gain:
                best, gain = count, tokens / cost
        return best


class Speculation:
    """The drafts of one answer: which tokens, and whether to verify them."""

    def __init__(self, prompt_ids: Sequence[int], experience: Experience,
                 ends: Collection[int] = ()) -> None:
        """
        Start with a prompt; see `Lookup` and `Policy`.

        :param experience: of the engine; it is updated.
        :param ends: ids that end an answer.
        """
        self._source = Lookup(prompt_ids, ends)
        self._policy = Policy(experience)
        self._experience = experience
        self._ends = frozenset(ends)
        self._forced: list[int] = []        # the forced tokens that come next

    def take(self, token_ids: Sequence[int], rows: int = 1, took_s: float = 0.0) -> None:
        """
        Append the tokens of a pass.

        :param rows: rows of the pass; 1 without a draft.
        :param took_s: time on the host in seconds, including draft and masks; 0 if unknown.
        """
        if took_s:
            self._experience.learn(rows, took_s)
        forced, self._forced = self._forced, []
        for place, token_id in enumerate(token_ids):
            self._policy.learn(self._source.add(token_id),
                               forced[place] == token_id if place < len(forced) else None)
        if rows > 1:
            self._policy.spend(rows, len(token_ids))

    def draft(self, left: int, constraint: Constraint | None = None) -> list[int]:
        """
        Return the draft to verify next; empty if there is none, or none is worth its cost.

        :param left: remaining tokens of the answer.
        :param constraint: allows all draft tokens; it has accepted the tokens so far.
        """
        most = min(self._experience.most_rows, left) - 1
        draft = self._source.draft(most)
        if constraint is not None:
            if most and self._experience.asks(self._source.last_id):
                self._forced = list(takewhile(
                    lambda token_id: token_id not in self._ends, constraint.forced()))[:most]
                self._experience.asked(self._source.last_id, bool(self._forced))
            if draft[:len(self._forced)] != self._forced:
                draft = self._forced
            if draft:
                draft = draft[:constraint.fits(draft)]
        if not draft:
            return draft
        rows = self._policy.rows(len(draft) + 1, len(self._forced))
        return draft[:rows - 1]
