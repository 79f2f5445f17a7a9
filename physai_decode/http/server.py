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
The HTTP server's socket, its thread, and the limits of its connections.

uvicorn implements HTTP. This module adds what uvicorn lacks: a limit of connections that answers
further ones, and timeouts for clients that send no request or do not read the response.
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
from physai_decode.http.app import refuse_connection
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

IDLE_TIMEOUT_S = 10.0           # for a connection that sends no request
WRITE_TIMEOUT_S = 10.0          # for a client that does not read the response
SPARE = 32                      # connections beyond the limit that get an error response
GRACE_S = 0.2                   # for streams to end when the server closes
_SILENT = logging.Logger('http', logging.CRITICAL + 1)      # `App` reports errors itself


class HttpServer:
    """The HTTP server of one host, which runs until `close`."""

    def __init__(self, host: Host, config: HttpConfig, key: str,
                 note: Callable[[str, BaseException], None], errors: Callable[[], int]) -> None:
        """
        Open the port and serve it in a thread.

        :param key: the API key that clients have to send; empty for none.
        :param note: see `physai_decode.http.start_server`.
        :param errors: see `physai_decode.http.start_server`.
        :raises HttpError: the port can't be opened.
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
        """Close all connections and the port, within 3 * `GRACE_S`."""
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
                        access_log=False, proxy_headers=False,
                        timeout_keep_alive=int(IDLE_TIMEOUT_S))
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
        await asyncio.sleep(0)                  # the loop closes them in its next iteration


class _Connection(H11Protocol):
    """One connection, with timeouts for an inactive client."""

    def __init__(self, limit: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._limit = limit
        self._idle_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self.logger, self.access_log = _SILENT, False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)       # pause as soon as anything is unsent
        if len(self.connections) > self._limit + SPARE:
            transport.abort()
        elif len(self.connections) > self._limit:
            self.app = refuse_connection
        self._update_idle_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)
        self._stop_timers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_idle_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_idle_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _update_idle_timer(self) -> None:
        """Run the timer while there is no complete request to answer."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._idle_timer is None and not self.transport.is_closing():
            self._idle_timer = self.loop.call_later(IDLE_TIMEOUT_S, self.transport.close)
        elif not idle and self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _stop_timers(self) -> None:
        for timer in (self._idle_timer, self._write_timer):
            if timer is not None:
                timer.cancel()


def _listen(config: HttpConfig) -> socket.socket:
    """
    Open the port.

    :raises HttpError: it can't be opened.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.create_server(address[:2], family=family, backlog=config.max_connections)
        # Connections inherit this option. Without it, a piece waits until the client acknowledges
        # the previous one, which clients delay by 40 ms.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened
    except (OSError, UnicodeError) as error:
        raise HttpError(
            f'port {config.port} of {config.host!r} cannot be opened: {error}; set http.port and '
            'http.host to a free address of this machine') from error


def _is_loopback(listening: socket.socket) -> bool:
    name = str(listening.getsockname()[0])
    return name.startswith('127.') or name == '::1'


def _in_url(host: str) -> str:
    return f'[{host}]' if ':' in host else host
