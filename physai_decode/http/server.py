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
The socket, the connections with their limits, and the thread that serves them.

uvicorn reads and writes HTTP. What it leaves open is here: how many connections there are, how
long one may send no request, and how long one may take nothing of what is sent to it.
"""

import asyncio
from collections.abc import Callable
import logging
import socket
import threading
from typing import Any

from physai_decode.config import HttpConfig
from physai_decode.host import Host
from physai_decode.http import HttpError
from physai_decode.http.app import App
from physai_decode.http.app import too_many
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

IDLE_S = 10.0                   # a connection may send no request
STUCK_S = 10.0                  # a client may take nothing of what is sent to it
SPARE = 32                      # connections beyond the limit that are still told of it
GRACE_S = 0.2                   # at the end, for the last words of streams
_SILENT = logging.Logger('http', logging.CRITICAL + 1)      # what it has to say, `App` has noted


class Server:
    """The HTTP door of one host, open from the beginning until `close`."""

    def __init__(self, host: Host, config: HttpConfig, key: str,
                 note: Callable[[str, BaseException], None], errors: Callable[[], int]) -> None:
        """
        Open the port and serve it in a thread.

        :param key: what clients have to send; empty: nothing.
        :param note: see `physai_decode.http.start_server`, as for ``errors``.
        :raises HttpError: the port can't be had.
        """
        self._limit, self._note = config.max_connections, note
        self._app = App(host, key, note, errors)
        self._socket = _listen(config)
        self.address = f'http://{_in_url(config.host)}:{config.port}/v1'
        self.is_open_to_all = not (key or _is_loopback(self._socket))
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name='http', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections and free the port; takes no longer than some tenths of a second."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(3 * GRACE_S)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:
            self._note('the HTTP server', error)
        finally:
            self._socket.close()
            self._loop.close()

    async def _serve(self) -> None:
        config = Config(self._app, interface='asgi3', ws='none', lifespan='off', log_config=None,
                        access_log=False, proxy_headers=False, timeout_keep_alive=int(IDLE_S))
        config.load()
        state = ServerState()
        listening = await self._loop.create_server(
            lambda: _Connection(self._limit, config, state, {}), sock=self._socket)
        await self._closing.wait()
        listening.close()
        for connection in list(state.connections):
            connection.shutdown()
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=GRACE_S)
        for task in list(state.tasks):
            task.cancel()
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=GRACE_S)
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)                  # they are lost in the loop's next turn


class _Connection(H11Protocol):
    """One connection; it is closed where its client does nothing for too long."""

    def __init__(self, limit: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._limit = limit
        self._idle: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self.logger, self.access_log = _SILENT, False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)       # all that waits is waited for
        if len(self.connections) > self._limit + SPARE:
            transport.abort()
        elif len(self.connections) > self._limit:
            self.app = too_many
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)
        self._stop_timers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stuck is None:
            self._stuck = self.loop.call_later(STUCK_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _look(self) -> None:
        """Let the time run while no request is answered, also where a part of one has come."""
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._idle is None and not self.transport.is_closing():
            self._idle = self.loop.call_later(IDLE_S, self.transport.close)
        elif not waits and self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _stop_timers(self) -> None:
        for timer in (self._idle, self._stuck):
            if timer is not None:
                timer.cancel()


def _listen(config: HttpConfig) -> socket.socket:
    """
    Open the port.

    :raises HttpError: it can't be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.create_server(address[:2], family=family, backlog=config.max_connections)
        # Its connections have that too. Without it, a piece waits until the one before has been
        # acknowledged, which clients put off by 40 ms.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened
    except (OSError, UnicodeError) as error:
        raise HttpError(
            f'port {config.port} of {config.host!r} can not be opened: {error}; set http.port and '
            'http.host to an address of this machine that is free') from error


def _is_loopback(listening: socket.socket) -> bool:
    name = str(listening.getsockname()[0])
    return name.startswith('127.') or name == '::1'


def _in_url(host: str) -> str:
    return f'[{host}]' if ':' in host else host
