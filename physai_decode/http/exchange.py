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
One request between the decode thread and the event loop, which never wait for each other.

The decode thread leaves pieces in a bounded deque and wakes the loop; the loop sends all that is
there, at most once in a period unless a piece completes an element or a call of a tool. A client
that does not take its pieces loses its request.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from physai_decode.host import Host
from physai_decode.request import Call
from physai_decode.request import Request
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport

PERIOD_S = 0.02         # a piece costs as much to send as some tokens, so they are sent together
MOST_PIECES = 4096      # that may wait for the client


class Piece(NamedTuple):
    """What some tokens completed."""

    content: str
    reasoning: str
    calls: tuple[tuple[int, Call], ...]     # of tools, each with its place among the answer's


class Exchange:
    """The listener of one request; made and used in the event loop."""

    def __init__(self, host: Host, stream: bool, most_pieces: int = MOST_PIECES) -> None:
        """
        Hear nothing yet.

        :param stream: the pieces are wanted, not the end alone.
        """
        self._host, self._stream, self._most = host, stream, most_pieces
        self._loop = asyncio.get_running_loop()
        self._number: int | None = None
        self._pieces: deque[TokenReport] = deque()
        self._calls = 0                         # of tools, given so far
        self._full = False
        self._woken = False                     # the loop is about to look
        self._news, self._hurry = asyncio.Event(), asyncio.Event()     # the second: at once
        self._ended = asyncio.Event()
        self._end: tuple[RequestReport, str] | None = None

    def submit(self, request: Request, received_s: float) -> None:
        """Hand the request in."""
        self._number = self._host.submit(request, received_s, self)

    def cancel(self, message: str) -> None:
        """End the request, if it has not ended."""
        if self._end is None and self._number is not None:
            self._host.cancel(self._number, message=message)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Give the pieces of the answer as they come, some together, until it has ended."""
        while True:
            await self._news.wait()
            self._news.clear()
            self._hurry.clear()
            self._woken = False
            ended = self._end is not None       # before the pieces: all of them are there, then
            reports = [self._pieces.popleft() for _ in range(len(self._pieces))]
            if any(each.text or each.reasoning or each.tool_calls for each in reports):
                yield self._piece(reports)
            if ended:
                return
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), PERIOD_S)

    async def end(self) -> tuple[RequestReport, str]:
        """Wait for the end of the request; give its report and all its text."""
        await self._ended.wait()
        assert self._end is not None
        return self._end

    # In the decode thread, the last one also in others.

    def token(self, report: TokenReport) -> None:
        """Keep a piece for the client."""
        if not self._stream or self._full:
            return
        if len(self._pieces) >= self._most:
            self._full = True
            self._call(self.cancel, f'its HTTP client did not take {self._most} tokens')
            return
        self._pieces.append(report)
        if not self._woken:
            self._woken = True
            self._call(self._news.set)
        if report.tool_calls:
            self._call(self._hurry.set)

    def item(self, report: ItemReport) -> None:
        """Send the pieces at once: the API has no name for an element, but clients look for it."""
        if self._stream:
            self._call(self._hurry.set)

    def finished(self, report: RequestReport, text: str) -> None:
        """Take the end."""
        self._end = report, text
        self._call(self._wake_all)

    def _piece(self, reports: Sequence[TokenReport]) -> Piece:
        """Put what tokens completed together."""
        calls = tuple(enumerate(
            (call for each in reports for call in each.tool_calls), self._calls))
        self._calls += len(calls)
        return Piece(''.join(each.text for each in reports),
                     ''.join(each.reasoning for each in reports), calls)

    def _wake_all(self) -> None:
        self._ended.set()
        self._hurry.set()
        self._news.set()

    def _call(self, function, *arguments) -> None:
        with suppress(RuntimeError):            # the loop is closed: nobody waits for it
            self._loop.call_soon_threadsafe(function, *arguments)
