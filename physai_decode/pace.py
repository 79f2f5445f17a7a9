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

"""When the steps of an answer are to start, where they are not to come as fast as they can."""


class Pace:
    """
    Steps on an absolute schedule: what one of them is late is not added to the next.

    A step that takes longer than its turn has the next one start at once. What it is late by more
    than one turn is given up, so that no burst of steps follows a long one.
    """

    def __init__(self, tokens_per_s: float, start_s: float) -> None:
        """
        Begin with the first token.

        :param tokens_per_s: above 0.
        :param start_s: when the first token came, by a monotonic clock.
        """
        self._turn_s = 1.0 / tokens_per_s
        self._due_s = start_s

    def due_s(self, now_s: float, tokens: int = 1) -> float:
        """
        Give when the next step is to start; in the past where that is over.

        :param tokens: that the last step brought.
        """
        turn_s = tokens * self._turn_s
        self._due_s = max(self._due_s + turn_s, now_s - turn_s)
        return self._due_s
