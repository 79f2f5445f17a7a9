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
Drafts: guesses at the next tokens, free to make, which one pass of the engine checks.

Prompt lookup: what followed the last few tokens where they stood before, in the prompt or in the
answer (Saxena 2023; Fu et al., arXiv 2402.02057, compare such drafts). Where a constraint forces
the next tokens, these are the draft. A draft never changes what is said, only how many passes it
takes. It knows token ids, and neither engines nor text.
"""

from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import takewhile

from physai_decode.engine import Constraint

GRAMS = (3, 2)              # so many tokens have to have stood there before, the longest first
SHARE = 0.02                # of all steps' time, which drafts that fail may cost
START = 0.3                 # steps that drafts may cost before any came true
MOST = 4.0                  # steps that what came true may pay for later
TRY = 0.03                  # steps that a try costs beside its pass: none runs ahead of the host
WORTH = 1.2                 # tokens for each step that a try costs, from which on it is made
LIKELY = 0.5                # how often a guess is right, until it is known,
FORCED = 0.9                # and one that a constraint forces: a model may cut the text elsewhere
MEMORY = 1 / 8              # the weight of the newest guess in that, and of a pass in its cost
MISSES = 4                  # times that a constraint forced nothing, after which it is not asked


class Lookup:
    """What followed the last few tokens, where they stood before."""

    def __init__(self, ids: Sequence[int], ends: Collection[int] = ()) -> None:
        """
        Begin with the ids of a prompt.

        :param ids: at least one.
        :param ends: ids that are never guessed.
        """
        self._ids = list(ids)
        self._ends = frozenset(ends)
        count = len(self._ids)
        # By tokens in a row, the newest place behind them.
        self._places = {
            size: dict(zip(zip(*(self._ids[at:count - 1] for at in range(size))),
                           range(size, count)))
            for size in GRAMS}
        self._at: int | None = None         # the place whose token is the guess
        self._look()

    def add(self, token_id: int) -> bool | None:
        """Take the next token; tells whether it was the guess, None where there was none."""
        ids, at = self._ids, self._at
        count = len(ids)
        for size, places in self._places.items():
            if size <= count:
                places[tuple(ids[-size:])] = count
        ids.append(token_id)
        right = None if at is None else ids[at] == token_id
        if right:
            self._at = at + 1 if at is not None else None
        else:
            self._look()
        return right

    def draft(self, most: int) -> list[int]:
        """Guess at most that many tokens; one that ends an answer is left out, and all after."""
        drafted: list[int] = []
        if self._at is None:
            return drafted
        known = len(self._ids)
        for at in range(self._at, self._at + most):
            # A guess can go on with itself: what is repeated may be shorter than the draft.
            token_id = self._ids[at] if at < known else drafted[at - known]
            if token_id in self._ends:
                break
            drafted.append(token_id)
        return drafted

    def _look(self) -> None:
        for size, places in self._places.items():
            self._at = places.get(tuple(self._ids[-size:]))
            if self._at is not None:
                return


class Experience:
    """
    What earlier passes taught, for all answers of one engine.

    It knows what passes cost by their rows, in decode steps: as given at first, then as they take.
    And it knows after which tokens it pays to ask a constraint for forced ones, which takes time.
    """

    def __init__(self, costs: Mapping[int, float]) -> None:
        """
        Begin.

        :param costs: what a pass costs by its rows, 1 row being 1.
        """
        self._costs = {rows: cost + TRY for rows, cost in sorted(costs.items()) if rows > 1}
        self._step_s = 0.0
        self._scores: dict[int, int] = {}       # of tokens after which a constraint was asked
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
            self._step_s = known_s + MEMORY * (min(took_s, 2 * known_s) - known_s)
        elif self._step_s:
            size = self._size(rows)
            known = self._costs[size]
            self._costs[size] += MEMORY * (min(took_s / self._step_s, 2 * known) - known)

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
    How many rows the next pass has, so that drafts that are not accepted cost next to nothing.

    Two figures decide: how often draft tokens were right, tried or not, and a balance of steps.
    The balance grows by `SHARE` a token and by what passes saved, and pays for those that saved
    nothing.
    """

    def __init__(self, experience: Experience) -> None:
        """Begin; the experience may grow meanwhile."""
        self._experience = experience
        self._likely = LIKELY
        self._forced = FORCED
        self._balance = START

    def learn(self, right: bool | None, forced: bool | None = None) -> None:
        """Take a token, and whether it was the guess, and the forced one; None: there was none."""
        self._balance = min(MOST, self._balance + SHARE)
        if right is not None:
            self._likely += MEMORY * (right - self._likely)
        if forced is not None:
            self._forced += MEMORY * (forced - self._forced)

    def spend(self, rows: int, tokens: int) -> None:
        """Take a pass of so many rows that brought so many tokens."""
        self._balance = min(MOST, self._balance + tokens - self._experience.of(rows))

    def rows(self, most: int, forced: int = 0) -> int:
        """
        Give the rows of the next pass, 1 for no draft, and at most ``most``.

        :param forced: how many of the guesses, the first ones, a constraint forces.
        """
        best, gain = 1, WORTH
        for rows, cost in self._experience.items():
            if most < 2 or cost - 1 > self._balance:
                continue
            count = min(rows, most)
            tokens = sum(self._forced**min(place, forced) * self._likely**max(0, place - forced)
                         for place in range(count))
            if tokens / cost > gain:
                best, gain = count, tokens / cost
        return best


class Speculation:
    """The drafts of one answer: what is guessed, and whether to try it."""

    def __init__(self, prompt_ids: Sequence[int], experience: Experience,
                 ends: Collection[int] = ()) -> None:
        """
        Begin with a prompt; see `Lookup` and `Policy`.

        :param experience: of the engine; updated.
        :param ends: ids that end an answer.
        """
        self._source = Lookup(prompt_ids, ends)
        self._policy = Policy(experience)
        self._experience = experience
        self._ends = frozenset(ends)
        self._newest = prompt_ids[-1]
        self._forced: list[int] = []        # after the tokens so far

    def take(self, token_ids: Sequence[int], rows: int = 1, took_s: float = 0.0) -> None:
        """
        Take what a pass brought.

        :param rows: the pass's rows, 1 where nothing was drafted.
        :param took_s: its time on the host, with draft and masks; 0: unknown.
        """
        if took_s:
            self._experience.learn(rows, took_s)
        forced, self._forced = self._forced, []
        for place, token_id in enumerate(token_ids):
            self._policy.learn(self._source.add(token_id),
                               forced[place] == token_id if place < len(forced) else None)
        self._newest = token_ids[-1]
        if rows > 1:
            self._policy.spend(rows, len(token_ids))

    def draft(self, left: int, constraint: Constraint | None = None) -> list[int]:
        """
        Give the guesses to try next; empty where there are none, or they are not worth a try.

        :param left: tokens that the answer may still have.
        :param constraint: which all guesses keep; it has taken the tokens so far.
        """
        most = min(self._experience.most_rows, left) - 1
        guesses = self._source.draft(most)
        if constraint is not None:
            if most and self._experience.asks(self._newest):
                self._forced = list(takewhile(
                    lambda token_id: token_id not in self._ends, constraint.forced()))[:most]
                self._experience.asked(self._newest, bool(self._forced))
            if guesses[:len(self._forced)] != self._forced:
                guesses = self._forced
            if guesses:
                guesses = guesses[:constraint.fits(guesses)]
        if not guesses:
            return guesses
        rows = self._policy.rows(len(guesses) + 1, len(self._forced))
        return guesses[:rows - 1]
