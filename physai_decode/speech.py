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
What a model says, taken apart: its thoughts, its calls of tools, and the answer itself.

Pieces of text go in, and what they turn out to be comes out as soon as that is decided; markers
themselves are nothing. It knows neither tokens nor requests.
"""

from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
import re
import secrets
from typing import NamedTuple

from physai_decode.request import Call
from physai_decode.tool_forms import FORMS
from physai_decode.tool_forms import ToolForm
from physai_decode.tool_forms import Unreadable

TAIL = 8                        # tokens at the end of a prompt that may open a thought


@dataclass(frozen=True)
class Manner:
    """How a model marks what is no answer, as far as that is known of it."""

    opens: str = ''                 # begins a thought; empty: the model has none
    closes: str = ''
    close_ids: tuple[int, ...] = () # tokens that end a thought from outside
    form: str = ''                  # of calls, one of `FORMS`; empty: no tools can be offered
    reason: str = 'the model has no chat template'      # for the form, or for none

    def markers(self, tools: bool) -> tuple[str, ...]:
        """Give the texts to look for; none where all that the model says is its answer."""
        thoughts = (self.opens, self.closes) if self.opens else ()
        return thoughts + (FORMS[self.form].markers if tools else ())

    def is_inside(self, tail: str) -> bool | None:
        """
        Tell whether a prompt has opened a thought.

        :param tail: the prompt's end.
        :returns: None where the model may begin one, False where the prompt has ended it already.
        """
        last = re.search(rf'({re.escape(self.opens)}|{re.escape(self.closes)})\s*$', tail)
        return None if not self.opens or last is None else last[1] == self.opens


class Thought(NamedTuple):
    """The thought that comes, or may come, before an answer that has to have a form."""

    opens: str
    closes: str
    inside: bool                    # the prompt has opened it


class Kind(Enum):
    """What a part of an answer is."""

    CONTENT = 'content'
    REASONING = 'reasoning'
    CALL = 'tool_call'


class Part(NamedTuple):
    """A part of what was said; of a call the whole."""

    kind: Kind
    text: str = ''
    call: Call | None = None


class Speech:
    """
    One answer, from its pieces to its parts.

    The parts of each kind joined do not depend on where the pieces were cut. Blanks around a
    thought and around calls belong to none.
    """

    def __init__(self, manner: Manner, tools: Iterable[str] = (), thinking: bool = False,
                 single: bool = False) -> None:
        """
        Begin an answer.

        :param tools: names of the tools that can be called; none: no calls are looked for.
        :param thinking: the prompt has opened a thought.
        :param single: the first call ends the answer.
        """
        self.thinking = thinking        # what comes is a thought
        self.ended = False              # nothing that comes is part of the answer
        self._single = single
        self.problem = ''               # why what looks like a call was taken for text
        self._opens, self._closes = manner.opens, manner.closes
        self._names = frozenset(tools)
        self._form: ToolForm | None = FORMS[manner.form] if self._names else None
        begins = self._form.begins if self._form is not None else ()
        self._begins = re.compile('|'.join(map(re.escape, begins)) or r'(?!)')
        self._marks: Sequence[str] = begins
        self._text = ''                 # not decided yet
        self._blank = True              # nothing but blanks since the beginning, or since a call
        self._trims = thinking          # these blanks are nothing
        self._may_think = bool(manner.opens) and not thinking
        self._calling = False           # the text begins like a call
        self._before = ''               # blanks before that

    @property
    def held(self) -> bool:
        """Tell whether there is text that is not decided yet."""
        return bool(self._text)

    def push(self, piece: str) -> list[Part]:
        """Take a piece and give what is decided now."""
        self._text += '' if self.ended else piece
        return self._parts(False)

    def flush(self) -> list[Part]:
        """Give the rest, at the end of the answer."""
        return self._parts(True)

    def _parts(self, over: bool) -> list[Part]:
        parts: list[Part] = []
        while self._text and not self.ended and (
                self._thought(parts, over) if self.thinking
                else self._call(parts, over) if self._calling
                else self._content(parts, over)):
            pass
        return parts

    def _thought(self, parts: list[Part], over: bool) -> bool:
        """Take what is a thought; tell whether there is more to look at."""
        text = self._text.lstrip() if self._trims else self._text
        self._trims = self._trims and not text
        at = text.find(self._closes)
        if at < 0:
            cut = len(text) if over else len(text) - _begun(text, (self._closes,))
            end = len(text[:cut].rstrip())
            self._text = '' if over else text[end:]
            parts += [Part(Kind.REASONING, text[:end])] if end else []
            return False
        said = text[:at].rstrip()
        parts += [Part(Kind.REASONING, said)] if said else []
        self._text = text[at + len(self._closes):]
        self.thinking, self._trims, self._blank = False, True, True
        return True

    def _call(self, parts: list[Part], over: bool) -> bool:
        """Take calls, or find that they are none."""
        assert self._form is not None
        try:
            found = self._form.read(self._text, over)
            if found is None:
                return False
            unknown = [name for name, _ in found.calls if name not in self._names]
            if not found.calls:
                raise Unreadable('it names no tool')
            if unknown:
                raise Unreadable(f'{unknown[0][:64]} is none of the tools')
        except Unreadable as error:
            if str(error):
                self.problem = f'what looks like a call of a tool is text: {error}'
            begin = self._begins.match(self._text)
            length = begin.end() if begin else len(self._form.bare)
            parts.append(Part(Kind.CONTENT, self._before + self._text[:length]))
            self._text, self._blank = self._text[length:], False
        else:
            parts += [Part(Kind.CALL, call=Call(f'call_{secrets.token_hex(12)}', *each))
                      for each in found.calls[:1 if self._single else None]]
            self.ended = self._single
            self._text = '' if self.ended else self._text[found.length:]
            self._trims = self._blank = True
        self._calling = False
        return True

    def _content(self, parts: list[Part], over: bool) -> bool:
        """Take what is the answer's text, up to where a thought or a call begins."""
        text = self._text
        if self._blank:
            rest = text.lstrip()
            if self._trims and self._form is not None and self._form.parts:
                rest = rest.removeprefix(self._form.parts).lstrip()
            if self._trims:
                text = self._text = rest
            if self._may_think and (rest or not over):
                if rest.startswith(self._opens):
                    self._text = rest[len(self._opens):]
                    self.thinking, self._trims, self._may_think = True, True, False
                    return True
                if not over and self._opens.startswith(rest):
                    return False                    # blanks alone too
            if self._form is not None and self._form.bare:
                if rest.startswith(self._form.bare):
                    self._before = text[:len(text) - len(rest)]
                    self._text, self._calling = rest, True
                    return True
                if not rest and not over:
                    return False
        at = self._begins.search(text)
        if at is not None:
            said = text[:at.start()].rstrip()
            parts += [Part(Kind.CONTENT, said)] if said else []
            self._before = text[len(said):at.start()]
            self._text, self._calling = text[at.start():], True
            self._may_think = False
            return True
        end = len(text)
        if not over and self._form is not None:
            end -= _begun(text, self._marks)
            end = len(text[:end].rstrip())          # blanks before a call are nothing
        parts += [Part(Kind.CONTENT, text[:end])] if end else []
        self._text = text[end:]
        if text[:end].strip():
            self._blank = self._trims = self._may_think = False
        return False


def _begun(text: str, marks: Sequence[str]) -> int:
    """Give the length of the longest end of a text that is the beginning of a mark."""
    longest = max(map(len, marks), default=1)
    return next((length for length in range(min(len(text), longest - 1), 0, -1)
                 if any(mark.startswith(text[-length:]) for mark in marks)), 0)
