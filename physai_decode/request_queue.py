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
The queue of accepted requests, and the listeners that receive their reports.

Nothing here locks. The worker holds its lock while it uses a queue or changes a ticket.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import field
import json
import math
import threading
from typing import Protocol

from physai_decode.config import QueueConfig
from physai_decode.conversation import Turn
from physai_decode.request import Refusal
from physai_decode.request import Request
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport

LATE_IN_QUEUE = 'deadline.request_ms passed while the request waited'


class Listener(Protocol):
    """
    Receives the reports of one request, or of all.

    Only the decode thread calls ``token`` and ``item``. ``finished`` is called exactly once per
    request. For a request that ends before the decode thread takes it (refused, or cancelled,
    stopped, preempted or late while it waits), the thread that ended it calls ``finished``, before
    its own call returns; otherwise the decode thread does. ``finished`` must therefore be
    thread-safe.
    An exception from one of these methods ends the request that it was called for.
    """

    def token(self, report: TokenReport) -> None:
        """
        Receive a new token.

        A token with an incomplete character, or with text that may begin a stop string, is delayed
        until the next token or the end of the answer decides its text.
        """
        ...

    def item(self, report: ItemReport) -> None:
        """
        Receive one element of an answer constrained to JSON, after the token that completed it.

        An element is final, even if the answer is cut off later.
        """
        ...

    def finished(self, report: RequestReport, text: str) -> None:
        """Receive the end of a request; ``text`` is the whole answer."""
        ...


def notify_end(listeners: Iterable[Listener | None], report: RequestReport, text: str) -> None:
    """Report the end of a request to all listeners, even if one raises; then raise its error."""
    with ExitStack() as calls:
        for listener in reversed([*listeners]):     # the stack calls the last one first
            if listener is not None:
                calls.callback(listener.finished, report, text)


@dataclass(eq=False)
class Ticket:
    """An accepted request, from the queue to its end."""

    number: int                     # the request_id
    request: Request
    received_s: float
    listener: Listener | None = None
    turn: Turn | None = None        # in the node's conversation; None for messages
    late_s: float = math.inf        # when its deadline ends it, even while it waits
    end_reason: str = ''            # cancelled, preempted or (in the queue) deadline, if requested
    end_message: str = ''
    end_requested_s: float | None = None
    ending: threading.Event = field(default_factory=threading.Event)    # set with end_reason
    finished: bool = False          # the end is reported, or about to be

    def request_end(self, reason: str, message: str, now_s: float) -> None:
        """Request the end; only the first call has an effect."""
        if not self.end_reason:
            self.end_reason, self.end_message, self.end_requested_s = reason, message, now_s
            self.ending.set()


class RequestQueue:
    """Tickets in order of arrival."""

    def __init__(self, config: QueueConfig) -> None:
        self._config = config
        self._tickets: deque[Ticket] = deque()
        self._next_late_s = math.inf    # no waiting ticket is late until then
        self.running: Ticket | None = None          # taken but not finished

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def preempts(self) -> bool:
        """Whether a new request ends all others."""
        return self._config.policy == 'preempt'

    def refusal(self, request: Request) -> Refusal | None:
        """Return why a request cannot be queued, or None if it can."""
        if not request.text:
            return Refusal('invalid', 'the prompt is empty: send some text')
        if any(each.request.client_id == request.client_id != '' for each in self.unfinished()):
            return Refusal('duplicate', f'id {json.dumps(request.client_id, ensure_ascii=False)} '
                           'belongs to a request that is still running or waiting: give each '
                           'request its own id')
        if self.preempts or not self:
            return None
        if len(self) >= self._config.size:
            return Refusal('full', f'the queue is full with {len(self)} waiting requests: send '
                           'it again later, or raise queue.size')
        size = sum(ticket.request.size for ticket in self._tickets)
        if size + request.size > self._config.max_waiting_bytes:
            return Refusal('full', f'the queue is full with {size} bytes, and the request adds '
                           f'{request.size}: send it again later, or raise '
                           'queue.max_waiting_bytes')
        return None

    def add(self, ticket: Ticket) -> None:
        """Append a ticket."""
        self._tickets.append(ticket)
        self._next_late_s = min(self._next_late_s, ticket.late_s)

    def set_late_s(self, late_s: Callable[[Ticket], float]) -> None:
        """Compute again when each waiting ticket is late."""
        for ticket in self._tickets:
            ticket.late_s = late_s(ticket)
        self._next_late_s = min((each.late_s for each in self._tickets), default=math.inf)

    def late(self, now_s: float) -> list[Ticket]:
        """Return the waiting tickets whose deadline has passed."""
        if now_s <= self._next_late_s:
            return []
        self._next_late_s = min(
            (each.late_s for each in self._tickets if each.late_s >= now_s), default=math.inf)
        return [each for each in self._tickets if each.late_s < now_s]

    def take(self) -> Ticket:
        """Remove the oldest ticket and mark it as running."""
        self.running = self._tickets.popleft()
        return self.running

    def unfinished(self) -> list[Ticket]:
        """Return the running ticket and the waiting ones."""
        running = self.running
        return [*([] if running is None or running.finished else [running]), *self._tickets]

    def end(self, tickets: list[Ticket], reason: str, message: str, now_s: float) -> list[Ticket]:
        """Request the end of tickets; remove and return those that wait."""
        for ticket in tickets:
            ticket.request_end(reason, message, now_s)
        ended = set(tickets)
        removed = [each for each in self._tickets if each in ended]
        self._tickets = deque(each for each in self._tickets if each not in ended)
        return removed
