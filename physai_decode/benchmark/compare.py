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
Compare two settings over alternating sessions, with a confidence interval of the ratio.

A session is a fresh process and yields one median. Sessions differ more than the steps within one
(clocks, memory layout, neighbours), so the bootstrap resamples sessions, not steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import random
import statistics

MIN_SESSIONS = 3                    # fewer give no estimate of the variation
RESAMPLES = 10000


@dataclass(frozen=True)
class Comparison:
    """The speed-up of B over A, from the medians of their sessions in seconds."""

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
        """Name the faster side, or say why there is none."""
        if self.low is None or self.high is None:
            return (f'no winner called: {self.a_sessions} and {self.b_sessions} sessions, '
                    f'at least {MIN_SESSIONS} of each are needed')
        if self.low <= 1 <= self.high:
            return (f'no winner called: the interval {self.low:.3f} to {self.high:.3f} contains 1')
        if self.ratio > 1:
            return f'{b} is {self.ratio:.3f} times as fast as {a}'
        return f'{a} is {1 / self.ratio:.3f} times as fast as {b}'


def compare(a_s: Sequence[float], b_s: Sequence[float], seed: int = 0) -> Comparison:
    """
    Compare the medians of A's sessions with those of B's, in seconds.

    :raises ValueError: one side has no session.
    """
    if not a_s or not b_s:
        raise ValueError('nothing to compare: one side has no completed session')
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
    """Return the order of ``sessions`` sessions per side: A B, B A, A B, ..."""
    return [side for pair in range(sessions) for side in ('AB' if pair % 2 == 0 else 'BA')]


def _resampled_mean(values: Sequence[float], draw: random.Random) -> float:
    return statistics.fmean(draw.choices(values, k=len(values)))


def _variation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else None
