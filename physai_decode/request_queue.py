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
The requests that wait for the engine, and each accepted request's way to its end.

It holds no lock: the worker's is held wherever a queue, or what changes of a ticket, is used.
"""

from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import field
import threading
from typing import Protocol

from physai_decode.config import QueueConfig
from physai_decode.conversation import Turn
from physai_decode.request import Refusal
from physai_decode.request import Request
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport


class Listener(Protocol):
    """
    Where the reports of one request, or of all, go.

    ``token`` and ``item`` are called from the decode thread only. ``finished`` is called exactly
    once for each request: from the decode thread, or, for a request that leaves without its turn
    (refused, cancelled, stopped or preempted while it waits), from the thread that made that call,
    before the call returns. So ``finished`` must be callable from several threads at once. An
    exception from any of them ends the request that it was called for.
    """

    def token(self, report: TokenReport) -> None:
        """
        Take one token, just known.

        A token whose text is not complete, or may be the beginning of a stop text, comes together
        with the next one or with the end of the answer: the text may belong to it after all.
        """
        ...

    def item(self, report: ItemReport) -> None:
        """
        Take one element of an answer that is JSON by its form, after the token that completed it.

        Nothing is taken back, also where the answer is then cut off.
        """
        ...

    def finished(self, report: RequestReport, text: str) -> None:
        """Take the end of one request; text is all its tokens' pieces joined."""
        ...


def tell_end(listeners: Iterable[Listener | None], report: RequestReport, text: str) -> None:
    """Report the end of one request to all of these, also where one raises; then raise that."""
    with ExitStack() as rest:
        for listener in reversed([*listeners]):     # the last one in is the first one called
            if listener is not None:
                rest.callback(listener.finished, report, text)


@dataclass(eq=False)
class Ticket:
    """One accepted request, from the queue to its end."""

    number: int                     # the request_id
    request: Request
    received_s: float
    listener: Listener | None = None
    turn: Turn | None = None        # of the node's own conversation; None for messages
    end_reason: str = ''            # cancelled or preempted, once that was asked for
    end_message: str = ''
    end_asked_s: float | None = None
    ending: threading.Event = field(default_factory=threading.Event)    # its end was asked for
    finished: bool = False          # its end was reported, or is about to be

    def ask_end(self, reason: str, message: str, now_s: float) -> None:
        """Ask for its end; the first to ask says why."""
        if not self.end_reason:
            self.end_reason, self.end_message, self.end_asked_s = reason, message, now_s
            self.ending.set()


class RequestQueue:
    """Tickets in the order they came."""

    def __init__(self, config: QueueConfig) -> None:
        """Begin empty."""
        self._config = config
        self._tickets: deque[Ticket] = deque()
        self.running: Ticket | None = None          # taken, and not yet ended

    def __len__(self) -> int:
        """Count the tickets that wait."""
        return len(self._tickets)

    @property
    def preempts(self) -> bool:
        """Whether a new request ends all others."""
        return self._config.policy == 'preempt'

    def refusal(self, request: Request) -> Refusal | None:
        """Say why a request can't be queued; None where it can."""
        if not request.text:
            return Refusal('invalid', 'the prompt is empty: send some text')
        if any(each.request.client_id == request.client_id != '' for each in self.unfinished()):
            return Refusal('invalid', f'id {request.client_id!r} is taken by a request that has '
                           'not ended: give each request an id of its own')
        if self.preempts or not self:
            return None
        if len(self) >= self._config.size:
            return Refusal('full', f'the queue is full with {len(self)} waiting requests: send '
                           'it again later, or raise queue.size')
        size = sum(ticket.request.size for ticket in self._tickets)
        if size + request.size > self._config.max_waiting_bytes:
            return Refusal('full', f'the queue is full with {size} bytes, and the request has '
                           f'{request.size}: send it again later, or raise '
                           'queue.max_waiting_bytes')
        return None

    def add(self, ticket: Ticket) -> None:
        """Let a ticket wait."""
        self._tickets.append(ticket)

    def take(self) -> Ticket:
        """Give the oldest ticket, which is running then."""
        self.running = self._tickets.popleft()
        return self.running

    def unfinished(self) -> list[Ticket]:
        """Give the running ticket and all that wait."""
        running = self.running
        return [*([] if running is None or running.finished else [running]), *self._tickets]

    def end(self, tickets: list[Ticket], reason: str, message: str, now_s: float) -> list[Ticket]:
        """Ask for the end of these; give those that waited, which wait no more."""
        for ticket in tickets:
            ticket.ask_end(reason, message, now_s)
        ended = set(tickets)
        removed = [each for each in self._tickets if each in ended]
        self._tickets = deque(each for each in self._tickets if each not in ended)
        return removed
