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
Token ids to text, one by one: characters whole, and stop texts found.

It works on a tokenizer that is passed in and knows nothing of engines.
"""

from collections.abc import Sequence
from typing import Any

_UNKNOWN = '\ufffd'     # what a decoder gives for bytes that are no character, or not yet
_WINDOW_TOKENS = 16     # a character, or what a tokenizer makes of bytes that are none, is shorter


class Detokenizer:
    """
    One answer's ids to pieces of text, never splitting a character.

    The pieces joined are what the tokenizer makes of all ids at once without special tokens, up to
    the first stop text. (Of bytes that are no UTF-8 at all, a tokenizer that falls back to bytes
    makes unknown characters by the run; there the number of these can differ.) The work for a
    token does not grow with the answer.
    """

    def __init__(self, backend: Any, special_ids: frozenset[int], stop: Sequence[str]) -> None:
        """
        Begin an answer.

        :param backend: what decodes, a ``tokenizers.Tokenizer``.
        :param special_ids: ids that are no text.
        :param stop: texts that end the answer and are not part of it; empty ones do nothing.
        """
        self.stopped = False            # a stop text was met; the pieces so far are the answer
        self._backend = backend
        self._special_ids = special_ids
        self._stop = tuple(text for text in stop if text)
        self._window: list[int] = []    # the last complete group of ids, then the open one
        self._open = 0                  # where in the window the open group begins
        self._done = ''                 # the part of the window's text that has been given out
        self._held = ''                 # text that may be the beginning of a stop text

    @property
    def held(self) -> bool:
        """Tell whether there is text that ``push`` or ``flush`` has yet to give."""
        return bool(self._held) or len(self._window) > self._open

    def push(self, token_id: int) -> str:
        """Take one token id and give the text that it completed, perhaps none."""
        if self.stopped or token_id in self._special_ids:
            return ''
        if self._backend.id_to_token(token_id) is None:     # a model can have more ids than texts
            return ''
        self._window.append(token_id)
        text = self._decode(self._window)
        complete = not text.endswith(_UNKNOWN)
        if complete or len(self._window) > _WINDOW_TOKENS:
            ready = text if complete else text[:-1]
        else:
            ready = text.rstrip(_UNKNOWN)
        # A tokenizer that falls back to bytes makes a whole run of them unknown while its last
        # character is not complete; what was given out is then longer than what is ready.
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
        """Give what is still held back, at the end of the answer."""
        if self.stopped:
            return ''
        piece = self._until_stop(self._decode(self._window)[len(self._done):])
        piece += '' if self.stopped else self._held
        self._window, self._open, self._done, self._held = [], 0, '', ''
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _until_stop(self, piece: str) -> str:
        """Give the text up to a stop text, but for an end that may be the beginning of one."""
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
    """Give the length of the longest end of text that is a beginning of stop, but not all."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
