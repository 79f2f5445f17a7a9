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
Passes the answer of one request from the decode thread to the event loop; neither blocks.

The decode thread appends pieces to a bounded deque and wakes the event loop. The loop sends what
has accumulated once per period, or at once if a piece completes an element or a tool call. If the
client does not read its pieces, its request is cancelled.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from typing import NamedTuple

from physai_decode.host import Host
from physai_decode.request import Call
from physai_decode.request import Request
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport

PERIOD_S = 0.02         # a piece costs as much as several tokens, so tokens are sent in batches
MAX_PIECES = 4096       # that the client has not read yet


class Piece(NamedTuple):
    """What a batch of tokens completed."""

    content: str
    reasoning: str
    tool_calls: tuple[tuple[int, Call], ...]    # each with its index in the answer


class Exchange:
    """The listener of one request; created and used in the event loop."""

    def __init__(self, host: Host, stream: bool, max_pieces: int = MAX_PIECES) -> None:
        """
        Create a listener; `submit` starts the request.

        :param stream: whether the client wants pieces, or only the end.
        """
        self._host, self._stream, self._max_pieces = host, stream, max_pieces
        self._loop = asyncio.get_running_loop()
        self._number: int | None = None
        self._pieces: deque[TokenReport] = deque()
        self._tool_calls = 0                    # yielded so far
        self._full = False
        self._woken = False                     # the loop has yet to react to _news
        self._news = asyncio.Event()            # set if there is something to send
        self._urgent = asyncio.Event()          # set if it can't wait for the next period
        self._ended = asyncio.Event()
        self._end: tuple[RequestReport, str] | None = None

    def submit(self, request: Request, received_s: float) -> None:
        """Submit the request to the host."""
        self._number = self._host.submit(request, received_s, self)

    def cancel(self, message: str) -> None:
        """Cancel the request, unless it has ended."""
        if self._end is None and self._number is not None:
            self._host.cancel(self._number, message=message)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces of the answer in batches, until the request ends."""
        while True:
            await self._news.wait()
            self._news.clear()
            self._urgent.clear()
            self._woken = False
            ended = self._end is not None       # read first: all pieces arrive before it
            reports = [self._pieces.popleft() for _ in range(len(self._pieces))]
            if any(each.text or each.reasoning or each.tool_calls for each in reports):
                yield self._piece(reports)
            if ended:
                return
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), PERIOD_S)

    async def end(self) -> tuple[RequestReport, str]:
        """Wait for the end of the request; return its report and its text."""
        await self._ended.wait()
        assert self._end is not None
        return self._end

    # Called in the decode thread; `finished` in any thread.

    def token(self, report: TokenReport) -> None:
        """Queue a token for the client."""
        if not self._stream or self._full:
            return
        if len(self._pieces) >= self._max_pieces:
            self._full = True
            self._call(self.cancel, f'its HTTP client has not read {self._max_pieces} tokens')
            return
        self._pieces.append(report)
        if not self._woken:
            self._woken = True
            self._call(self._news.set)
        if report.tool_calls:
            self._call(self._urgent.set)

    def item(self, report: ItemReport) -> None:
        """Send the pieces at once; the API has no elements, but clients parse them from text."""
        if self._stream:
            self._call(self._urgent.set)

    def finished(self, report: RequestReport, text: str) -> None:
        """Record the end."""
        self._end = report, text
        self._call(self._wake_all)

    def _piece(self, reports: Sequence[TokenReport]) -> Piece:
        """Join a batch of tokens."""
        tool_calls = tuple(enumerate(
            (call for each in reports for call in each.tool_calls), self._tool_calls))
        self._tool_calls += len(tool_calls)
        return Piece(''.join(each.text for each in reports),
                     ''.join(each.reasoning for each in reports), tool_calls)

    def _wake_all(self) -> None:
        self._ended.set()
        self._urgent.set()
        self._news.set()

    def _call(self, function: Callable[..., object], *arguments: Any) -> None:
        with suppress(RuntimeError):            # the loop is closed, so nobody is waiting
            self._loop.call_soon_threadsafe(function, *arguments)
