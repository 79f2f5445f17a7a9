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
Separates the output of a model into thoughts, tool calls and the text of the answer.

Pieces of text go in, and parts come out as soon as their kind is known. Markers are removed.
"""

from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
import re
import secrets
from typing import NamedTuple

from physai_decode.request import Call
from physai_decode.tool_forms import TOOL_FORMS
from physai_decode.tool_forms import ToolForm
from physai_decode.tool_forms import Unreadable

BLANKS = ' \t\n\r'             # a constraint allows these between a thought and the answer

TAIL = 8                        # tokens at the end of a prompt that may open a thought


@dataclass(frozen=True)
class Manner:
    """How a model marks its thoughts and its tool calls."""

    opens: str = ''                 # begins a thought; empty: the model does not think
    closes: str = ''
    close_ids: tuple[int, ...] = () # tokens that the node feeds to end a thought
    form: str = ''                  # of tool calls, in `TOOL_FORMS`; empty: no support for tools
    reason: str = 'the model has no chat template'      # for this form, or for none

    @property
    def tools_problem(self) -> str:
        """The message that refuses tools if there is no form."""
        return (f'tools cannot be used with this model: {self.reason}; choose a model whose chat '
                'template accepts tools')

    def markers(self, tools: bool) -> tuple[str, ...]:
        """Return the markers to look for; none if all output is the answer."""
        thoughts = (self.opens, self.closes) if self.opens else ()
        return thoughts + (TOOL_FORMS[self.form].markers if tools else ())

    def is_inside(self, tail: str) -> bool | None:
        """
        Return whether a prompt ends inside a thought.

        :param tail: the end of the prompt.
        :returns: False if the prompt has closed the thought, None if the model may begin one.
        """
        last = re.search(rf'({re.escape(self.opens)}|{re.escape(self.closes)})\s*$', tail)
        return None if not self.opens or last is None else last[1] == self.opens


class Thought(NamedTuple):
    """The thought before a constrained answer."""

    opens: str
    closes: str
    inside: bool                    # whether the prompt has opened it


class PartKind(Enum):
    """The kind of a part."""

    CONTENT = 'content'
    REASONING = 'reasoning'
    CALL = 'tool_call'


class Part(NamedTuple):
    """A part of the output; a tool call is always complete."""

    kind: PartKind
    text: str = ''
    call: Call | None = None


class Speech:
    """
    The parser of one answer.

    The result does not depend on how the text was cut into pieces. Blanks around thoughts and tool
    calls are removed, except before an answer that is ``exact``.
    """

    def __init__(self, manner: Manner, tools: Iterable[str] = (), thinking: bool = False,
                 single: bool = False) -> None:
        """
        Start an answer.

        :param tools: names of the offered tools; without any, calls are not parsed.
        :param thinking: whether the prompt has opened a thought.
        :param single: whether the first call ends the answer.
        """
        self.thinking = thinking        # whether the output is inside a thought
        self.ended = False              # whether the answer is over
        self.exact = False              # whether blanks after a thought belong to the answer
        self._single = single
        self.problem = ''               # why something that looks like a call is text
        self._opens, self._closes = manner.opens, manner.closes
        self._names = frozenset(tools)
        self._form: ToolForm | None = TOOL_FORMS[manner.form] if self._names else None
        begins = self._form.begins if self._form is not None else ()
        self._begins = re.compile('|'.join(map(re.escape, begins)) or r'(?!)')
        self._begins_texts: Sequence[str] = begins
        self._text = ''                 # output whose kind is not known yet
        self._blank = True              # only blanks since the beginning, or since the last call
        self._trims = thinking          # whether to remove these blanks
        self._may_think = bool(manner.opens) and not thinking
        self._calling = False           # whether the text begins like a call
        self._before = ''               # the blanks before such a text

    @property
    def held(self) -> bool:
        """Whether there is output whose kind is not known yet."""
        return bool(self._text)

    def push(self, piece: str) -> list[Part]:
        """Add a piece, and return the parts that are known now."""
        self._text += '' if self.ended else piece
        return self._parts(False)

    def flush(self) -> list[Part]:
        """Return the remaining parts at the end of the answer."""
        return self._parts(True)

    def _parts(self, complete: bool) -> list[Part]:
        parts: list[Part] = []
        while self._text and not self.ended and (
                self._thought(parts, complete) if self.thinking
                else self._call(parts, complete) if self._calling
                else self._content(parts, complete)):
            pass
        return parts

    # The following methods append what they parse to ``parts``, and return whether to continue
    # with the rest of the text. ``complete`` is True at the end of the answer.

    def _thought(self, parts: list[Part], complete: bool) -> bool:
        """Parse a thought."""
        text = self._text.lstrip() if self._trims else self._text
        self._trims = self._trims and not text
        at = text.find(self._closes)
        if at < 0:
            cut = len(text) if complete else len(text) - _partial_length(text, (self._closes,))
            end = len(text[:cut].rstrip())
            self._text = '' if complete else text[end:]
            parts += [Part(PartKind.REASONING, text[:end])] if end else []
            return False
        thought = text[:at].rstrip()
        parts += [Part(PartKind.REASONING, thought)] if thought else []
        self._text = text[at + len(self._closes):]
        self.thinking, self._trims, self._blank = False, not self.exact, True
        return True

    def _call(self, parts: list[Part], complete: bool) -> bool:
        """Parse tool calls, or a text that only begins like one."""
        assert self._form is not None
        try:
            parsed = self._form.read(self._text, complete)
            if parsed is None:
                return False
            unknown = [name for name, _ in parsed.calls if name not in self._names]
            if not parsed.calls:
                raise Unreadable('it names no tool')
            if unknown:
                raise Unreadable(f'{unknown[0][:64]} is not one of the tools')
        except Unreadable as error:
            if str(error):
                self.problem = f'a text that looks like a tool call is not one: {error}'
            begin = self._begins.match(self._text)
            length = begin.end() if begin else len(self._form.bare)
            parts.append(Part(PartKind.CONTENT, self._before + self._text[:length]))
            self._text, self._blank = self._text[length:], False
        else:
            parts += [Part(PartKind.CALL, call=Call(f'call_{secrets.token_hex(12)}', *each))
                      for each in parsed.calls[:1 if self._single else None]]
            self.ended = self._single
            self._text = '' if self.ended else self._text[parsed.length:]
            self._trims = self._blank = True
        self._calling = False
        return True

    def _content(self, parts: list[Part], complete: bool) -> bool:
        """Parse the text of the answer, up to the beginning of a thought or a call."""
        text = self._text
        if self._blank:
            rest = text.lstrip(BLANKS)
            if self._trims and self._form is not None and self._form.parts:
                rest = rest.removeprefix(self._form.parts).lstrip(BLANKS)
            if self._trims:
                text = self._text = rest
            if self._may_think and (rest or not complete):
                if rest.startswith(self._opens):
                    self._text = rest[len(self._opens):]
                    self.thinking, self._trims, self._may_think = True, True, False
                    return True
                if not complete and self._opens.startswith(rest):
                    return False                    # also if there are only blanks
            if self._form is not None and self._form.bare:
                if rest.startswith(self._form.bare):
                    self._before = text[:len(text) - len(rest)]
                    self._text, self._calling = rest, True
                    return True
                if not rest and not complete:
                    return False
        at = self._begins.search(text)
        if at is not None:
            content = text[:at.start()].rstrip()
            parts += [Part(PartKind.CONTENT, content)] if content else []
            self._before = text[len(content):at.start()]
            self._text, self._calling = text[at.start():], True
            self._may_think = False
            return True
        end = len(text)
        if not complete and self._form is not None:
            end -= _partial_length(text, self._begins_texts)
            end = len(text[:end].rstrip())          # if a call follows, these blanks are removed
        parts += [Part(PartKind.CONTENT, text[:end])] if end else []
        self._text = text[end:]
        if text[:end].strip():
            self._blank = self._trims = self._may_think = False
        return False


def _partial_length(text: str, markers: Sequence[str]) -> int:
    """Return the length of the longest suffix of a text that is a proper prefix of a marker."""
    longest = max(map(len, markers), default=1)
    return next((length for length in range(min(len(text), longest - 1), 0, -1)
                 if any(marker.startswith(text[-length:]) for marker in markers)), 0)
