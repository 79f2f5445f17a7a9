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

"""Convert token ids to text one by one, with complete characters, and find stop strings."""

from collections.abc import Sequence
from typing import Any

_UNKNOWN = '\ufffd'     # a decoder writes this for an invalid or incomplete character
_WINDOW_TOKENS = 16     # more than the tokens of any character


class Detokenizer:
    """
    Converts the ids of one answer to pieces of text and never splits a character.

    The joined pieces equal the text that the tokenizer decodes from all ids at once, without
    special tokens, up to the first stop string. Only for invalid UTF-8 can the number of U+FFFD
    differ. The time per token does not grow with the answer.
    """

    def __init__(self, backend: Any, special_ids: frozenset[int], stop: Sequence[str]) -> None:
        """
        Begin an answer.

        :param backend: a ``tokenizers.Tokenizer``.
        :param special_ids: ids to leave out of the text.
        :param stop: strings that end the answer and do not belong to it; empty ones are ignored.
        """
        self.stopped = False            # a stop string matched; the pieces so far are the answer
        self._backend = backend
        self._special_ids = special_ids
        self._stop = tuple(text for text in stop if text)
        self._window: list[int] = []    # the last complete group of ids, then the open group
        self._open = 0                  # start of the open group in the window
        self._done = ''                 # text of the window that was already returned
        self._held = ''                 # text that may begin a stop string

    @property
    def held(self) -> bool:
        """Whether text is held back."""
        return bool(self._held) or len(self._window) > self._open

    def push(self, token_id: int) -> str:
        """Add a token id and return the text that it completes, which may be empty."""
        if self.stopped or token_id in self._special_ids:
            return ''
        if self._backend.id_to_token(token_id) is None:     # beyond the tokenizer's ids
            return ''
        self._window.append(token_id)
        text = self._decode(self._window)
        complete = not text.endswith(_UNKNOWN)
        if complete or len(self._window) > _WINDOW_TOKENS:
            ready = text if complete else text[:-1]
        else:
            ready = text.rstrip(_UNKNOWN)
        # With byte fallback, a whole run of bytes decodes to U+FFFD until its last character is
        # complete. The returned text is then longer than the ready text.
        piece = ready[len(self._done):]
        if complete and piece:
            self._window, self._open = self._window[self._open:], 0
            self._done = self._decode(self._window)
            self._open = len(self._window)
        elif len(self._window) > _WINDOW_TOKENS:
            rest = len(text) - len(ready)
            self._window, self._open = self._window[-_WINDOW_TOKENS // 2:], 0
            tail = self._decode(self._window)
            self._done = tail[:len(tail) - rest]
        else:
            self._done += piece
        return self._until_stop(piece)

    def flush(self) -> str:
        """Return the text that is still held back, at the end of the answer."""
        if self.stopped:
            return ''
        piece = self._until_stop(self._decode(self._window)[len(self._done):])
        piece += '' if self.stopped else self._held
        self._window, self._open, self._done, self._held = [], 0, '', ''
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _until_stop(self, piece: str) -> str:
        """Return the text up to a stop string, and hold back an end that may begin one."""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ''
            return text[:min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
