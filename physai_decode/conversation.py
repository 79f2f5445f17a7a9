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
The node's own conversation: turns of a prompt and its answer, in the order they were asked.

Every prompt opens a turn when it is accepted, so that one that is corrected before its answer was
complete still stands before its correction. It knows nothing of tokens or engines.
"""

from dataclasses import dataclass
import threading

from physai_decode.request import Message

MAX_CHARACTERS = 16_000_000     # of the ended turns; no context holds as many
TURN_CHARACTERS = 1000          # that a turn counts for beside its texts


@dataclass(eq=False)
class Turn:
    """One prompt, and its answer once that has ended."""

    prompt: str
    answer: str | None = None
    tokens: int | None = None       # of both, about, once somebody has counted them

    @property
    def characters(self) -> int:
        """What it counts for in the conversation's bound."""
        return TURN_CHARACTERS + len(self.prompt) + len(self.answer or '')


class Conversation:
    """Keeps the turns, where it is asked to; may be used from any thread."""

    def __init__(self, system_prompt: str = '', keep: bool = True) -> None:
        """
        Begin with no turns.

        :param system_prompt: the first message; empty for none.
        :param keep: False: every prompt stands alone.
        """
        self._system = [Message('system', system_prompt)] if system_prompt else []
        self._keep = keep
        self._lock = threading.Lock()
        self._turns: list[Turn] = []
        self._lost = 0                  # turns that are gone and nobody was told of

    def open(self, prompt: str) -> Turn:
        """Add a turn that has no answer yet."""
        turn = Turn(prompt)
        if self._keep:
            with self._lock:
                self._turns.append(turn)
        return turn

    def close(self, turn: Turn, answer: str | None) -> None:
        """
        End a turn with its answer; None takes it out of the conversation.

        Turns that were preempted while they waited were never measured by the model. So that they
        can't fill the memory, the oldest ended turns go beyond `MAX_CHARACTERS`.
        """
        turn.answer = answer
        with self._lock:
            if answer is None:
                self._turns = [each for each in self._turns if each is not turn]
                return
            ended = [each for each in self._turns if each.answer is not None]
            surplus = sum(each.characters for each in ended) - MAX_CHARACTERS
            gone: set[Turn] = set()
            while surplus > 0:
                oldest = ended[len(gone)]
                surplus -= oldest.characters
                gone.add(oldest)
            if gone:
                self._turns = [each for each in self._turns if each not in gone]
                self._lost += len(gone)

    def before(self, turn: Turn) -> tuple[list[Turn], int]:
        """
        Give the ended turns that stand before a turn; none if that was forgotten.

        :returns: also how many have gone since the last call, as `close` says.
        """
        with self._lock:
            lost, self._lost = self._lost, 0
            if turn not in self._turns:
                return [], lost
            place = self._turns.index(turn)
            return [each for each in self._turns[:place] if each.answer is not None], lost

    def messages(self, turns: list[Turn], prompt: str) -> list[Message]:
        """Give what the model is to read for a prompt after these turns."""
        said = list(self._system)
        for turn in turns:
            said += [Message('user', turn.prompt), Message('assistant', turn.answer or '')]
        return [*said, Message('user', prompt)]

    def drop(self, turns: list[Turn]) -> None:
        """Take turns out."""
        gone = set(turns)
        with self._lock:
            self._turns = [each for each in self._turns if each not in gone]

    def forget(self) -> int:
        """Take all turns out, also open ones; give how many had ended."""
        with self._lock:
            turns, self._turns, self._lost = self._turns, [], 0
        return sum(turn.answer is not None for turn in turns)
