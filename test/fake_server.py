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

"""A server of OpenAI's API whose responses the test scripts."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
import json
import socket
import ssl
import threading
from typing import Any

MODEL = 'far/model'
PATIENCE_S = 60.0               # against hangs only


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(('127.0.0.1', 0)) as found:
        return found.getsockname()[1]


class Call(BaseHTTPRequestHandler):
    """One request to the server, with methods for valid and invalid responses."""

    protocol_version = 'HTTP/1.1'
    server: Any

    def do_GET(self) -> None:   # noqa: N802
        """List the models."""
        self.whole(200, {'object': 'list', 'data': self.server.fake.models})

    def do_POST(self) -> None:  # noqa: N802
        """Record the request, and respond as the test scripts."""
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        fake = self.server.fake
        fake.asked.append((self.path, self.headers, body))
        try:
            fake.answer(self, body)
        except OSError:
            fake.client_closed.set()     # the client has closed the connection

    def whole(self, status: int, value: Any, kind: str = 'application/json', **headers) -> None:
        """Send a whole response, not a stream."""
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for name, each in {'Content-Type': kind, 'Content-Length': str(len(data)),
                           **headers}.items():
            self.send_header(name, each)
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        """Begin a stream with an event without text, as most servers do."""
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream; charset=utf-8')
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        self.delta({'role': 'assistant', 'content': ''})

    def raw(self, data: bytes) -> None:
        """Send bytes as a chunk of the stream."""
        self.wfile.write(b'%x\r\n%s\r\n' % (len(data), data))
        self.wfile.flush()

    def event(self, value: Any) -> None:
        """Send one event of the stream."""
        self.raw(b'data: ' + json.dumps(value).encode() + b'\n\n')

    def delta(self, delta: dict[str, Any], reason: str | None = None) -> None:
        """Send an event with a delta of the answer."""
        self.event({'object': 'chat.completion.chunk', 'choices': [
            {'index': 0, 'delta': delta, 'finish_reason': reason}]})

    def say(self, *pieces: str) -> None:
        """Send pieces of text."""
        for piece in pieces:
            self.delta({'content': piece})

    def end(self, reason: str = 'stop', usage: Any = None) -> None:
        """End the stream as OpenAI's API does."""
        self.delta({}, reason)
        if usage is not None:
            self.event({'choices': [], 'usage': usage})
        self.raw(b'data: [DONE]\n\n')
        self.wfile.write(b'0\r\n\r\n')

    def wait_for_client_to_go(self) -> None:
        """Send nothing until the client closes the connection."""
        self.connection.settimeout(PATIENCE_S)
        assert self.connection.recv(1) == b''
        self.server.fake.client_closed.set()

    def log_message(self, *arguments: Any) -> None:
        """Log nothing."""


class FakeServer:
    """The server. ``answer`` handles requests; a test may replace it at any time."""

    def __init__(self, answer: Callable[[Call, dict[str, Any]], None]) -> None:
        self.answer = answer
        self.models: Any = [{'id': MODEL, 'object': 'model', 'max_model_len': 8192}]
        self.asked: list[tuple[str, Any, dict[str, Any]]] = []
        self.client_closed = threading.Event()
        self._http = ThreadingHTTPServer(('127.0.0.1', 0), Call)
        self._http.daemon_threads = True
        self._http.fake = self              # type: ignore[attr-defined]
        self.url = f'http://127.0.0.1:{self._http.server_port}/v1'
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def use_tls(self, context: ssl.SSLContext) -> None:
        """Use TLS from now on."""
        self.url = self.url.replace('http://', 'https://')
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)

    @property
    def body(self) -> dict[str, Any]:
        """The body of the last request."""
        return self.asked[-1][2]

    def close(self) -> None:
        """Stop the server; a response that hangs ends with the process."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def well(call: Call, body: dict[str, Any]) -> None:
    """Send a valid answer, `far away.`, with its usage."""
    call.begin()
    call.say('far', ' away', '.')
    call.end(usage={'prompt_tokens': 7, 'completion_tokens': 5, 'total_tokens': 12,
                    'prompt_tokens_details': {'cached_tokens': 4}})


@contextmanager
def serving() -> Iterator[FakeServer]:
    """Run a server inside ``with``."""
    fake = FakeServer(well)
    try:
        yield fake
    finally:
        fake.close()
