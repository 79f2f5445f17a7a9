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

"""A table, formatted as aligned text, Markdown or HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from html import escape
from textwrap import fill

_MISSING = ('n/a', 'unavailable', 'died', 'not measured')


@dataclass
class Table:
    """A title, columns, rows of texts, and notes below."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Format as plain text, with columns of numbers aligned to the right."""
        widths = [max(map(len, column)) for column in zip(
            self.columns, *self.rows, strict=True)]
        right = self._right()
        lines = [self.title, '']
        for row in (self.columns, ['-' * width for width in widths], *self.rows):
            lines.append('  '.join(
                value.rjust(width) if to_right else value.ljust(width)
                for value, width, to_right in zip(
                    row, widths, right, strict=True)).rstrip())
        return '\n'.join([*lines, *(fill(note, 99) for note in self.notes), ''])

    def markdown(self) -> str:
        """Format as GitHub's Markdown."""
        rule = ['---:' if to_right else '---' for to_right in self._right()]
        lines = [f'## {self.title}', '']
        for row in (self.columns, rule, *self.rows):
            lines.append('| ' + ' | '.join(value.replace('|', r'\|') for value in row) + ' |')
        return '\n'.join([*lines, '', *(f'{note}\n' for note in self.notes)])

    def html(self) -> str:
        """Format as HTML."""
        kinds = [' class="n"' if to_right else '' for to_right in self._right()]

        def row(values: Sequence[str], tag: str) -> str:
            cells = (f'<{tag}{kind}>{escape(value)}</{tag}>' for value, kind in zip(
                values, kinds, strict=True))
            return f'<tr>{"".join(cells)}</tr>'
        body = '\n'.join(row(values, 'td') for values in self.rows)
        notes = ''.join(f'<p>{escape(note)}</p>' for note in self.notes)
        return (f'<h2>{escape(self.title)}</h2>\n<div class="scroll"><table>\n'
                f'{row(self.columns, "th")}\n{body}\n</table></div>\n{notes}\n')

    def _right(self) -> list[bool]:
        """Return which columns contain only numbers and words for missing numbers."""
        return [all(cell in _MISSING or not any(map(str.isalpha, cell)) for cell in column)
                for column in zip(*self.rows, strict=True)] or [False] * len(self.columns)
