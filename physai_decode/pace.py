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

"""The schedule of steps for a limited rate of tokens."""


class Pace:
    """
    An absolute schedule of steps: the delay of one step does not postpone the next.

    After a step that takes too long, the next one starts at once. A delay of more than one period
    is dropped, so that no burst of steps follows.
    """

    def __init__(self, tokens_per_s: float, start_s: float) -> None:
        """
        Start with the first token.

        :param tokens_per_s: above 0.
        :param start_s: time of the first token on a monotonic clock.
        """
        self._period_s = 1.0 / tokens_per_s
        self._due_s = start_s

    def due_s(self, now_s: float, tokens: int = 1) -> float:
        """
        Return when the next step is due, which may be in the past.

        :param tokens: number of tokens of the last step.
        """
        period_s = tokens * self._period_s
        self._due_s = max(self._due_s + period_s, now_s - period_s)
        return self._due_s
