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
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import takewhile

from physai_decode.engine import Constraint

GRAMS = (3, 2)              # so many tokens have to have stood there before, the longest first
SHARE = 0.02                # of all steps' time, which drafts that fail may cost
START = 0.3                 # steps that drafts may cost before any came true
MOST = 1.0                  # steps that what came true may pay for later
TRY = 0.03                  # steps that a try costs beside its pass: none runs ahead of the host
WORTH = 1.1                 # tokens for each step that a try costs, from which on it is made
LIKELY = 0.5                # how often a guess is right, until it is known,
FORCED = 0.9                # and one that a constraint forces: a model may cut the text elsewhere
MEMORY = 1 / 8              # the weight of the newest guess in that


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


class Policy:
    """
    How many rows the next pass is to have, so that drafts that fail cost next to nothing.

    Two figures decide, and no clock: how often guesses came true, tried or not, and a balance of
    steps. The balance grows by `SHARE` a token and by what passes saved, and pays for those that
    saved nothing. Costs are in steps, those of a pass of one row.
    """

    def __init__(self, costs: Mapping[int, float]) -> None:
        """
        Begin.

        :param costs: what a pass costs by its rows, 1 row being 1.
        """
        self._costs = {rows: cost + TRY for rows, cost in sorted(costs.items()) if rows > 1}
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
        self._balance = min(MOST, self._balance + tokens - self._cost(rows))

    def rows(self, most: int, forced: int = 0) -> int:
        """
        Give the rows of the next pass, 1 for no draft, and at most ``most``.

        :param forced: how many of the guesses, the first ones, a constraint forces.
        """
        best, gain = 1, WORTH
        for rows, cost in self._costs.items():
            if most < 2 or cost - 1 > self._balance:
                continue
            count = min(rows, most)
            tokens = sum(self._forced**min(place, forced) * self._likely**max(0, place - forced)
                         for place in range(count))
            if tokens / cost > gain:
                best, gain = count, tokens / cost
        return best

    def _cost(self, rows: int) -> float:
        return next(cost for size, cost in self._costs.items() if size >= rows)


class Speculation:
    """The drafts of one answer: what is guessed, and whether to try it."""

    def __init__(self, prompt_ids: Sequence[int], costs: Mapping[int, float],
                 ends: Collection[int] = ()) -> None:
        """
        Begin with a prompt; see `Lookup` and `Policy`.

        :param costs: what the engine's passes cost by their rows.
        :param ends: ids that end an answer.
        """
        self._source = Lookup(prompt_ids, ends)
        self._policy = Policy(costs)
        self._most = max(costs)
        self._ends = frozenset(ends)
        self._forced: list[int] = []        # after the tokens so far

    def take(self, token_ids: Sequence[int], rows: int = 1) -> None:
        """
        Take what a pass brought.

        :param rows: the pass's rows, 1 where nothing was drafted.
        """
        forced, self._forced = self._forced, []
        for place, token_id in enumerate(token_ids):
            self._policy.learn(self._source.add(token_id),
                               forced[place] == token_id if place < len(forced) else None)
        if rows > 1:
            self._policy.spend(rows, len(token_ids))

    def draft(self, left: int, constraint: Constraint | None = None) -> list[int]:
        """
        Give the guesses to try next; empty where there are none, or they are not worth a try.

        :param left: tokens that the answer may still have.
        :param constraint: which all guesses keep; it has taken the tokens so far.
        """
        most = min(self._most, left) - 1
        guesses = self._source.draft(most)
        if constraint is not None and most:
            self._forced = list(takewhile(
                lambda token_id: token_id not in self._ends, constraint.forced()))[:most]
            if guesses[:len(self._forced)] != self._forced:
                guesses = self._forced
            guesses = guesses[:constraint.fits(guesses)]
        rows = self._policy.rows(len(guesses) + 1, len(self._forced))
        return guesses[:rows - 1]
