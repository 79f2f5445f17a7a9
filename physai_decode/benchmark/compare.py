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
Two settings against each other: sessions in turn, the ratio, and how sure it is.

A session is a fresh process and gives one median. Sessions differ more than the steps inside one
do (clocks, memory layout, neighbours), so the interval is drawn over sessions, not over steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import random
import statistics

MIN_SESSIONS = 3                    # fewer say nothing about how sessions differ
RESAMPLES = 10000


@dataclass(frozen=True)
class Comparison:
    """How many times as fast B is as A, from the medians of their sessions in seconds."""

    a_s: float                      # mean of the sessions' medians
    b_s: float
    a_cv: float | None              # coefficient of variation across sessions
    b_cv: float | None
    a_sessions: int
    b_sessions: int
    ratio: float                    # a_s / b_s: above 1, B is faster
    low: float | None               # bootstrap 95 % interval of the ratio
    high: float | None

    def verdict(self, a: str, b: str) -> str:
        """Name the winner, or say why there is none."""
        if self.low is None or self.high is None:
            return (f'no winner called: {self.a_sessions} and {self.b_sessions} sessions, '
                    f'at least {MIN_SESSIONS} of each are needed')
        if self.low <= 1 <= self.high:
            return (f'no winner called: the interval {self.low:.3f} to {self.high:.3f} holds 1')
        if self.ratio > 1:
            return f'{b} is {self.ratio:.3f} times as fast as {a}'
        return f'{a} is {1 / self.ratio:.3f} times as fast as {b}'


def compare(a_s: Sequence[float], b_s: Sequence[float], seed: int = 0) -> Comparison:
    """
    Compare the medians of A's sessions with those of B's, in seconds.

    :raises ValueError: one of them has no session.
    """
    if not a_s or not b_s:
        raise ValueError('nothing to compare: no session of one side came through')
    low = high = None
    if min(len(a_s), len(b_s)) >= MIN_SESSIONS:
        draw = random.Random(seed)
        ratios = sorted(_resampled_mean(a_s, draw) / _resampled_mean(b_s, draw)
                        for _ in range(RESAMPLES))
        low, high = ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES) - 1]
    a_mean, b_mean = statistics.fmean(a_s), statistics.fmean(b_s)
    return Comparison(a_mean, b_mean, _variation(a_s), _variation(b_s), len(a_s), len(b_s),
                      a_mean / b_mean, low, high)


def order(sessions: int) -> list[str]:
    """Give the order of that many sessions of each: A B, B A, A B, ..."""
    return [side for pair in range(sessions) for side in ('AB' if pair % 2 == 0 else 'BA')]


def _resampled_mean(values, draw):
    return statistics.fmean(draw.choices(values, k=len(values)))


def _variation(values):
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else None
