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
Finds the elements of an answer's outermost arrays as soon as each is complete.

An outermost array is the answer itself, or a property of the answer if that is an object. The
parser works on the pieces of a stream, with constant effort per character.
"""

import json
import re
from typing import NamedTuple

BLANKS = ' \t\n\r'
_OUTSIDE = re.compile(r'["\[\]{},]')    # the significant characters outside a string
_INSIDE = re.compile(r'["\\]')          # and inside a string


class Item(NamedTuple):
    """One complete element."""

    path: str       # JSON Pointer of the array, such as '/plan'; empty for the answer itself
    index: int      # type: ignore[assignment]  # 0 is the first element; hides a tuple's method
    text: str       # JSON, as the model wrote it


class Items:
    """
    The parser of one answer.

    A string, an object or an array is complete at its last character. A number or a literal is
    complete at the character that follows it. A truncated element is never returned.
    """

    def __init__(self, hidden: re.Pattern[str] | None = None) -> None:
        """
        Start before the first character of the answer.

        :param hidden: leave out an element if this matches in its text or the name of its array.
        """
        self._hidden = hidden
        self._quoted = False            # inside a string
        self._escaped = False           # after a backslash
        self._depth = 0                 # number of open arrays and objects
        self._array: int | None = None  # the depth inside the open outermost array
        self._path, self._index = '', 0
        self._name = '""'               # the last string directly in the outermost object
        self._open: list[str] | None = None     # text of the open element or name

    def feed(self, piece: str) -> list[Item]:
        """
        Parse the next piece of the answer, and return the elements that it completed.

        :param piece: of a JSON text; for any other text, the elements are meaningless.
        """
        items: list[Item] = []
        at, begin = int(self._escaped and bool(piece)), 0
        self._escaped = self._escaped and not piece

        def end(to: int) -> str:
            """Close the open text and return it, up to a position in this piece."""
            open_, self._open = self._open, None
            return '' if open_ is None else ''.join([*open_, piece[begin:to]]).strip(BLANKS)

        def complete(to: int) -> None:
            if text := end(to):
                if self._hidden is None or not self._hidden.search(self._name + text):
                    items.append(Item(self._path, self._index, text))
                self._index += 1

        while match := (_INSIDE if self._quoted else _OUTSIDE).search(piece, at):
            at, sign = match.end(), match[0]
            if sign == '\\':
                self._escaped = at == len(piece)
                at += 1
            elif sign == '"':
                self._quoted = not self._quoted
                if self._depth == self._array:
                    if not self._quoted:
                        complete(at)
                elif self._depth == 1 and self._array is None:
                    if self._quoted:
                        self._open, begin = [], at - 1
                    else:
                        self._name = end(at)
            elif sign in '[{':
                self._depth += 1
                if sign == '[' and self._array is None and self._depth <= 2:
                    self._array, self._index = self._depth, 0
                    self._path = '' if self._depth == 1 else _pointer(self._name)
                    self._open, begin = [], at
            elif sign == ',':
                if self._depth == self._array:
                    complete(at - 1)
                    self._open, begin = [], at
            else:
                self._depth -= 1
                if self._depth == self._array:
                    complete(at)
                elif self._array is not None and self._depth < self._array:
                    complete(at - 1)
                    self._array = None
        if self._open is not None:
            self._open.append(piece[begin:])
        return items


def _pointer(name: str) -> str:
    """Return the JSON Pointer (RFC 6901) of a property from its name as JSON."""
    return '/' + str(json.loads(name)).replace('~', '~0').replace('/', '~1')
