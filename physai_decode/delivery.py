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
The common part of all answers, local or from a server: pieces, pacing, and the end.

It runs in the decode thread.
"""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
import re
from typing import NamedTuple

from physai_decode.config import SamplingConfig
from physai_decode.conversation import Conversation
from physai_decode.conversation import Turn
from physai_decode.items import Items
from physai_decode.pace import Pace
from physai_decode.request import Call
from physai_decode.request import Form
from physai_decode.request import JSON_NAMES
from physai_decode.request_queue import Ticket
from physai_decode.speech import Part
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestRecorder
from physai_decode.timing import TokenReport

POLL_S = 0.02           # period of the checks for a cancel or deadline while nothing arrives


class Refused(Exception):
    """The request can't be answered; the message says why."""


class End(NamedTuple):
    """The end of an answer: its finish reason, and details that may be empty."""

    reason: str
    message: str


class Ended(Exception):
    """The answer ends now, instead of at its next token."""

    def __init__(self, end: End) -> None:
        """Keep the end."""
        super().__init__(*end)
        self.end = end


CANCELLED = End('cancelled', '')    # the ticket has the actual reason
LATE = End('deadline', 'deadline.request_ms has passed')


class Delivery:
    """The base class of an answer."""

    _hidden: re.Pattern[str] | None = None      # see `Items`

    def __init__(self, ticket: Ticket, conversation: Conversation, sampling: SamplingConfig,
                 times: RequestRecorder, emit: Callable[[TokenReport], None],
                 emit_item: Callable[[ItemReport], None], alive: Callable[[float], None],
                 end_late: Callable[[], None], clock: Callable[[], float],
                 form: Form | None = None, tokens_per_s: float = 0.0) -> None:
        """
        Prepare an answer; `give` starts it.

        :param sampling: the sampling settings of the request.
        :param times: records the tokens.
        :param emit: called with the report of each token.
        :param emit_item: called with the report of each element of a JSON answer.
        :param alive: called on progress with the time from which a stall is counted.
        :param end_late: called often; ends the waiting requests whose deadline has passed.
        :param form: the constraint on the answer, None for none.
        :param tokens_per_s: the highest rate of tokens; 0 for no limit.
        """
        self._ticket, self._conversation = ticket, conversation
        self._sampling, self.times = sampling, times
        self._emit, self._emit_item = emit, emit_item
        self._alive, self._end_late, self._clock = alive, end_late, clock
        self._form = form
        self._items: Items | None = None
        if form is not None and form.kind == 'json_schema':
            self._items, times.items = Items(self._hidden), 0
        self._tokens_per_s = tokens_per_s
        times.paced = tokens_per_s > 0
        self._pace: Pace | None = None              # None before the first step
        self._waited_s: float | None = None         # delay of the current step by pacing
        self._given = 0                             # tokens so far, including the waiting one
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self.calls: list[Call] = []                 # the emitted tool calls
        self._waiting: TokenReport | None = None    # a token whose text may still grow
        self._publish_s: float | None = None
        self.energy_j: float | None = None          # the device's counter at the start
        self.note = ''                              # for the report, in addition to the end

    @property
    def text(self) -> str:
        """The text emitted so far."""
        return ''.join(self._pieces)

    @property
    def reasoning(self) -> str:
        """The thoughts emitted so far."""
        return ''.join(self._thoughts)

    def give(self) -> End:
        """
        Produce the answer.

        :raises Refused: the request can't be answered.
        """
        raise NotImplementedError

    def _checked_form(self) -> Form | None:
        """
        Return the constraint on the answer.

        :raises Refused: the constraint conflicts with another option of the request.
        """
        form = self._form
        if self._ticket.request.offered and form is not None:
            raise Refused(f'tools cannot be used, because {form.name} constrains every answer: '
                          'set "response_format" to {"type": "text"} in the request')
        if form is not None:
            self._refuse_stop(form)
        return form

    def _refuse_stop(self, form: Form) -> None:
        if self._sampling.stop:
            name = self._named('stop')
            is_own = name == JSON_NAMES['stop']         # the message begins with a field
            first, other = (name, form.name) if is_own else (form.name, name)
            remedy = '' if is_own else f'clear {name}, or '
            raise Refused(f'{first} cannot be used with {other}, because {form.name} defines '
                          f'where the answer ends: {remedy}set "stop" to [] in the request')

    def _drop(self, turns: list[Turn], lost: int, why: str) -> None:
        """Drop the oldest turns of the conversation, and say so; ``lost`` were dropped before."""
        self._conversation.drop(turns)
        if count := lost + len(turns):
            self._remark(f'{why}: dropped its oldest {count} turn{"" if count == 1 else "s"}')

    def _remark(self, text: str) -> None:
        """Add a note for the report."""
        self.note = '; '.join(filter(None, (self.note, text)))

    def _named(self, setting: str) -> str:
        """Name a setting by its source: the field of the request, or the node's parameter."""
        own = setting in self._ticket.request.sampling
        return JSON_NAMES[setting] if own else f'sampling.{setting}'

    def _hold_pace(self, now_s: float, tokens: int) -> None:
        """
        Wait until pacing permits the next token.

        :param now_s: when the last tokens were known.
        :param tokens: the number of these tokens.
        :raises Ended: a cancel or a deadline came first.
        """
        if not self.times.paced or not tokens:
            return
        self._pace = self._pace or Pace(self._tokens_per_s, now_s)
        due_s, begin_s = self._pace.due_s(self._clock(), tokens), self._clock()
        self._alive(due_s)
        while (left_s := due_s - self._clock()) > 0:
            self._ticket.ending.wait(min(left_s, POLL_S))
            self._look_for_end()
        self._waited_s = self._clock() - begin_s

    def _look_for_end(self) -> None:
        """
        Check for a cancel and for the deadline.

        :raises Ended: one of them ends the answer.
        """
        self._check_end()
        if self._is_late():
            raise Ended(LATE)

    def _check_end(self) -> None:
        self._end_late()
        if self._ticket.end_reason:
            raise Ended(CANCELLED)

    def _is_late(self) -> bool:
        """Return whether the deadline of the request ends the answer."""
        deadline = self.times.deadline
        spent_ms = 1e3 * (self._clock() - self._ticket.received_s)
        return (deadline.action == 'truncate' and deadline.request_ms > 0
                and spent_ms > deadline.request_ms)

    def _release(self, tail: str, parts: Sequence[Part] = ()) -> None:
        """
        Emit the waiting token.

        :param tail: the end of its text.
        :param parts: the thoughts and tool calls that it completed.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting = replace(waiting, text=waiting.text + tail)
            self._give_out(with_parts(waiting, parts) if parts else waiting)

    def _give_out(self, report: TokenReport) -> None:
        """Emit a token, and the elements that it completed."""
        if self._ticket.finished:                   # the worker has abandoned the request
            return
        self._pieces.append(report.text)
        if report.reasoning or report.tool_calls:
            self._thoughts.append(report.reasoning)
            self.calls += report.tool_calls
        begin_s = self._clock()
        self._emit(report)
        if self._items is not None:
            for item in self._items.feed(report.text):
                self._emit_item(self.times.item(self._clock(), *item))
        self._publish_s = self._clock() - begin_s


def with_parts(report: TokenReport, parts: Sequence[Part]) -> TokenReport:
    """Add thoughts and tool calls to the report of the token that completed them."""
    return replace(
        report, reasoning=report.reasoning + ''.join(part.text for part in parts),
        tool_calls=(*report.tool_calls, *(part.call for part in parts if part.call is not None)))
