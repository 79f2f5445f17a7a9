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
The conversation of the node: turns of prompts and answers, in order of acceptance.

A prompt opens a turn when it is accepted. If a second prompt preempts the first, the first still
precedes it in the conversation.
"""

from dataclasses import dataclass
import threading

from physai_decode.request import Message

MAX_CHARACTERS = 16_000_000     # limit on ended turns, beyond any context
TURN_CHARACTERS = 1000          # overhead of a turn, in characters


@dataclass(eq=False)
class Turn:
    """A prompt and, once complete, its answer."""

    prompt: str
    answer: str | None = None
    tokens: int | None = None       # estimate for both texts, once counted

    @property
    def characters(self) -> int:
        """The size of the turn, for the limit of the conversation."""
        return TURN_CHARACTERS + len(self.prompt) + len(self.answer or '')


class Conversation:
    """Keeps turns; thread-safe."""

    def __init__(self, system_prompt: str = '', keep: bool = True) -> None:
        """
        Begin with no turns.

        :param system_prompt: first message; empty for none.
        :param keep: whether to keep turns; if False, every prompt stands alone.
        """
        self._system = [Message('system', system_prompt)] if system_prompt else []
        self._keep = keep
        self._lock = threading.Lock()
        self._turns: list[Turn] = []
        self._unreported = 0            # turns that were dropped since the last `before`

    def open(self, prompt: str) -> Turn:
        """Add a turn without an answer."""
        turn = Turn(prompt)
        if self._keep:
            with self._lock:
                self._turns.append(turn)
        return turn

    def close(self, turn: Turn, answer: str | None) -> None:
        """
        End a turn with its answer; None removes the turn.

        Beyond `MAX_CHARACTERS`, the oldest ended turns are dropped. Turns that were preempted
        while they waited never reach the limit of the context, and could otherwise fill the
        memory.
        """
        turn.answer = answer
        with self._lock:
            if answer is None:
                self._turns = [each for each in self._turns if each is not turn]
                return
            ended = [each for each in self._turns if each.answer is not None]
            surplus = sum(each.characters for each in ended) - MAX_CHARACTERS
            dropped: set[Turn] = set()
            while surplus > 0:
                oldest = ended[len(dropped)]
                surplus -= oldest.characters
                dropped.add(oldest)
            if dropped:
                self._turns = [each for each in self._turns if each not in dropped]
                self._unreported += len(dropped)

    def before(self, turn: Turn) -> tuple[list[Turn], int]:
        """
        Return the ended turns before a turn; none if the turn was forgotten.

        :returns: the turns, and the number of turns that `close` dropped since the last call.
        """
        with self._lock:
            dropped, self._unreported = self._unreported, 0
            if turn not in self._turns:
                return [], dropped
            index = self._turns.index(turn)
            return [each for each in self._turns[:index] if each.answer is not None], dropped

    def messages(self, turns: list[Turn], prompt: str) -> list[Message]:
        """Return the messages for a prompt that follows these turns."""
        messages = list(self._system)
        for turn in turns:
            messages += [Message('user', turn.prompt), Message('assistant', turn.answer or '')]
        return [*messages, Message('user', prompt)]

    def drop(self, turns: list[Turn]) -> None:
        """Remove turns."""
        dropped = set(turns)
        with self._lock:
            self._turns = [each for each in self._turns if each not in dropped]

    def forget(self) -> int:
        """Remove all turns, including open ones; return how many had ended."""
        with self._lock:
            turns, self._turns, self._unreported = self._turns, [], 0
        return sum(turn.answer is not None for turn in turns)
