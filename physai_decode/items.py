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
The elements of an answer's outermost arrays, each as soon as it is complete.

An outermost array is the answer itself, or a property of the object that the answer is. It works
on pieces of text as they come, with a constant effort per character, and knows neither tokens nor
what an element means.
"""

import json
import re
from typing import NamedTuple

BLANKS = ' \t\n\r'
_OUTSIDE = re.compile(r'["\[\]{},]')    # what matters outside a string of JSON
_INSIDE = re.compile(r'["\\]')          # and within one


class Item(NamedTuple):
    """One complete element."""

    path: str       # of its array, as a JSON Pointer: empty for the answer itself, or '/plan'
    index: int      # type: ignore[assignment]  # 0 is the array's first element; hides a method
    text: str       # its JSON, as it was written


class Items:
    """
    One answer's text to its elements.

    A string, an object or an array is complete at its last character, a number and a word at what
    follows. An element that was cut off is never given.
    """

    def __init__(self) -> None:
        """Begin before the answer's first character."""
        self._quoted = False            # within a string
        self._escaped = False           # behind a backslash
        self._depth = 0                 # arrays and objects that are open
        self._array: int | None = None  # the depth within the outermost array that is open
        self._path, self._index = '', 0
        self._name = '""'               # the last string directly in the outermost object
        self._kept: list[str] | None = None     # of the element or name that is open

    def feed(self, piece: str) -> list[Item]:
        """
        Take the next piece of the answer and give the elements that it completed.

        :param piece: of a text that is JSON; of any other text, what is given has no meaning.
        """
        found: list[Item] = []
        at, begin = int(self._escaped and bool(piece)), 0
        self._escaped = self._escaped and not piece

        def end(to: int) -> str:
            """Keep no more, and give what was kept up to there."""
            kept, self._kept = self._kept, None
            return '' if kept is None else ''.join([*kept, piece[begin:to]]).strip(BLANKS)

        def complete(to: int) -> None:
            if text := end(to):
                found.append(Item(self._path, self._index, text))
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
                        self._kept, begin = [], at - 1
                    else:
                        self._name = end(at)
            elif sign in '[{':
                self._depth += 1
                if sign == '[' and self._array is None and self._depth <= 2:
                    self._array, self._index = self._depth, 0
                    self._path = '' if self._depth == 1 else _pointer(self._name)
                    self._kept, begin = [], at
            elif sign == ',':
                if self._depth == self._array:
                    complete(at - 1)
                    self._kept, begin = [], at
            else:
                self._depth -= 1
                if self._depth == self._array:
                    complete(at)
                elif self._array is not None and self._depth < self._array:
                    complete(at - 1)
                    self._array = None
        if self._kept is not None:
            self._kept.append(piece[begin:])
        return found


def _pointer(name: str) -> str:
    """Give the JSON Pointer (RFC 6901) of a property, whose name is given as JSON."""
    return '/' + str(json.loads(name)).replace('~', '~0').replace('/', '~1')
