"""
The node's own conversation: turns of a prompt and its answer, in the order they were asked.

Every prompt opens a turn when it is accepted, so that one that is corrected before its answer was
complete still stands before its correction. It knows nothing of tokens or engines.
"""

from dataclasses import dataclass
import threading

from physai_decode.request import Message


@dataclass(eq=False)
class Turn:
    """One prompt, and its answer once that has ended."""

    prompt: str
    answer: str | None = None


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

    def open(self, prompt: str) -> Turn:
        """Add a turn that has no answer yet."""
        turn = Turn(prompt)
        if self._keep:
            with self._lock:
                self._turns.append(turn)
        return turn

    def close(self, turn: Turn, answer: str | None) -> None:
        """End a turn with its answer; None takes it out of the conversation."""
        turn.answer = answer
        if answer is None:
            with self._lock:
                self._turns = [each for each in self._turns if each is not turn]

    def before(self, turn: Turn) -> list[Turn]:
        """Give the ended turns that stand before a turn; none if that was forgotten."""
        with self._lock:
            if turn not in self._turns:
                return []
            place = self._turns.index(turn)
            return [each for each in self._turns[:place] if each.answer is not None]

    def messages(self, turns: list[Turn], prompt: str) -> list[Message]:
        """Give what the model is to read for a prompt after these turns."""
        said = list(self._system)
        for turn in turns:
            said += [Message('user', turn.prompt), Message('assistant', turn.answer or '')]
        return [*said, Message('user', prompt)]

    def drop(self, turns: list[Turn]) -> None:
        """Take turns out."""
        with self._lock:
            self._turns = [each for each in self._turns if each not in turns]

    def forget(self) -> int:
        """Take all turns out, also open ones; give how many had ended."""
        with self._lock:
            turns, self._turns = self._turns, []
        return sum(turn.answer is not None for turn in turns)
