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
What is the same for every answer, wherever it comes from: its pieces, its pace and its end.

It runs on the decode thread. It knows neither engines nor servers, nor who listens.
"""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from physai_decode.config import SamplingConfig
from physai_decode.conversation import Conversation
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

LOOK_UP_S = 0.02        # how often a cancel and a deadline are looked for while nothing comes


class Refused(Exception):
    """The model can't take this prompt; the message says why."""


class End(NamedTuple):
    """Why an answer ended: a finish reason, and words where it does not say it all."""

    reason: str
    message: str


class Ended(Exception):
    """The answer is to end now, and not at its next token."""

    def __init__(self, end: End) -> None:
        """Keep why."""
        super().__init__(*end)
        self.end = end


ASKED = End('cancelled', '')        # the ticket knows better
LATE = End('deadline', 'deadline.request_ms has passed')


class Delivery:
    """One answer, as far as it does not matter who gives it."""

    def __init__(self, ticket: Ticket, conversation: Conversation, sampling: SamplingConfig,
                 times: RequestRecorder, emit: Callable[[TokenReport], None],
                 emit_item: Callable[[ItemReport], None], alive: Callable[[float], None],
                 clock: Callable[[], float], form: Form | None = None,
                 tokens_per_s: float = 0.0) -> None:
        """
        Take what the answer needs.

        :param sampling: of this request.
        :param times: records its tokens.
        :param emit: gets each token's report.
        :param emit_item: gets each element's, of an answer that is JSON.
        :param alive: is called for each sign of life, with the time by which the next one is to
            come at the earliest.
        :param form: what the answer has to look like, None for anything.
        :param tokens_per_s: how fast it comes at most; 0: as fast as it can.
        """
        self._ticket, self._conversation = ticket, conversation
        self._sampling, self.times = sampling, times
        self._emit, self._emit_item = emit, emit_item
        self._alive, self._clock = alive, clock
        self._form = form
        self._items: Items | None = None
        if form is not None and form.kind == 'json_schema':
            self._items, times.items = Items(), 0
        self._tokens_per_s = tokens_per_s
        times.paced = tokens_per_s > 0
        self._pace: Pace | None = None              # from the first step on
        self._waited_s: float | None = None         # before the step that runs
        self._given = 0                             # tokens, also those that wait
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self.calls: list[Call] = []                 # those that were given out
        self._waiting: TokenReport | None = None    # it is not known to the end
        self._publish_s: float | None = None
        self.energy_j: float | None = None          # of the device, when this began
        self.note = ''                              # for the report, beside why it ended

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return ''.join(self._pieces)

    @property
    def reasoning(self) -> str:
        """All thoughts that were given out so far."""
        return ''.join(self._thoughts)

    def give(self) -> End:
        """
        Answer.

        :raises Refused: the request can't be answered as it is.
        """
        raise NotImplementedError

    def _checked_form(self) -> Form | None:
        """Give what the answer has to look like, where nothing stands against it."""
        form = self._form
        if self._ticket.request.offered and form is not None:
            raise Refused(f'{form.name} says what every answer looks like, so that none can call '
                          'a tool: set "response_format" to {"type": "text"} in the request')
        if form is not None:
            self._refuse_stop(form)
        return form

    def _refuse_stop(self, form: Form) -> None:
        if self._sampling.stop:
            raise Refused(f'{self._named("stop")} can not be used with {form.name}, which '
                          'says itself where the answer ends: set "stop" to [] in the request')

    def _remark(self, text: str) -> None:
        """Add a note for the report."""
        self.note = '; '.join(filter(None, (self.note, text)))

    def _named(self, setting: str) -> str:
        """Name a setting where it came from: the request's own field, or the node's parameter."""
        own = setting in self._ticket.request.sampling
        return JSON_NAMES[setting] if own else f'sampling.{setting}'

    def _hold_pace(self, now_s: float, tokens: int) -> None:
        """Wait until the token after these may come, and end where that is due before."""
        if not self.times.paced or not tokens:
            return
        self._pace = self._pace or Pace(self._tokens_per_s, now_s)
        due_s, begin_s = self._pace.due_s(self._clock(), tokens), self._clock()
        self._alive(due_s)
        while (left_s := due_s - self._clock()) > 0:
            self._ticket.ending.wait(min(left_s, LOOK_UP_S))
            self._look_for_end()
        self._waited_s = self._clock() - begin_s

    def _look_for_end(self) -> None:
        """End where that is due."""
        self._check_end()
        if self._is_late():
            raise Ended(LATE)

    def _check_end(self) -> None:
        if self._ticket.end_reason:
            raise Ended(ASKED)

    def _is_late(self) -> bool:
        """Tell whether the request is to end because its time is over."""
        deadline = self.times.deadline
        spent_ms = 1e3 * (self._clock() - self._ticket.received_s)
        return (deadline.action == 'truncate' and deadline.request_ms > 0
                and spent_ms > deadline.request_ms)

    def _release(self, tail: str, others: Sequence[Part] = ()) -> None:
        """Give out the token that waits, with the text that turned out to be its own."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting = replace(waiting, text=waiting.text + tail)
            self._give_out(with_parts(waiting, others) if others else waiting)

    def _give_out(self, report: TokenReport) -> None:
        if self._ticket.finished:                   # the worker has given it up
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
    """Give a token's report with thoughts and calls that it completed."""
    return replace(
        report, reasoning=report.reasoning + ''.join(part.text for part in parts),
        tool_calls=(*report.tool_calls, *(part.call for part in parts if part.call is not None)))
