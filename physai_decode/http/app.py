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

"""The routes of the HTTP API, as an ASGI application."""

import asyncio
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Mapping
from hmac import compare_digest
import json
import time
from typing import Any

from physai_decode.host import Host
from physai_decode.http import openai
from physai_decode.http.exchange import Exchange
from physai_decode.http.metrics import CONTENT_TYPE
from physai_decode.http.metrics import Metrics
from physai_decode.http.openai import ApiError
from physai_decode.http.openai import Completion
from physai_decode.request import parse_value
from physai_decode.request import RequestError

BODY_TIMEOUT_S = 10.0           # to receive a whole body
JSON = 'application/json'
MODELS = '/v1/models'
CHAT = '/v1/chat/completions'
METHODS = {CHAT: 'POST', '/v1/completions': 'POST', MODELS: 'GET', '/health': 'GET',
           '/metrics': 'GET'}

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class App:
    """OpenAI's API of one host."""

    def __init__(self, host: Host, key: str, note: Callable[[str, BaseException], None],
                 errors: Callable[[], int]) -> None:
        """
        Create the application.

        :param key: the API key that clients have to send; empty for none.
        :param note: see `physai_decode.http.start_server`.
        :param errors: see `physai_decode.http.start_server`.
        """
        self._host, self._key, self._note = host, key.encode(), note
        self._metrics = Metrics(host, errors)
        self._created = int(time.time())

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        started = False

        async def start_and_send(message: dict[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            try:
                await self._route(scope, receive, start_and_send)
            except ApiError:
                raise
            except Exception as error:
                self._note(f'{scope["method"]} {scope["path"]}', error)
                raise ApiError(500, 'error', f'{type(error).__name__}: see the log of the node',
                               headers={'x-should-retry': 'false'}) from error
        except ApiError as error:
            if started:                         # in mid-stream
                await send(_body(openai.event(error.body)))
            else:
                await _send_json(send, error.status, error.body, error.headers)

    async def _route(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        path, headers = scope['path'], dict(scope['headers'])
        if b'origin' in headers:
            raise ApiError(403, 'origin_not_allowed', 'a page in a browser sent the request, '
                           'which is not allowed: send it from a program')
        route = MODELS if path.startswith(f'{MODELS}/') else path
        if path.startswith('/v1/'):
            self._check_key(headers.get(b'authorization', b''))
        if route not in METHODS:
            raise ApiError(404, 'not_found', f'there is no {path!r:.100}: use one of '
                           f'{", ".join(METHODS)}')
        if scope['method'] != METHODS[route]:
            raise ApiError(405, 'method_not_allowed', f'{route} accepts only {METHODS[route]}',
                           headers={'allow': METHODS[route]})
        if METHODS[route] == 'POST':
            await self._complete(route == CHAT, headers, receive, send)
        elif route == MODELS:
            await self._list(path[len(MODELS) + 1:], send)
        elif route == '/health':
            await self._send_health(send)
        else:
            await _send(send, 200, CONTENT_TYPE, self._metrics.text())

    def _check_key(self, given: bytes) -> None:
        kind, _, key = given.partition(b' ')
        if self._key and not (kind.lower() == b'bearer' and compare_digest(key, self._key)):
            raise ApiError(401, 'invalid_api_key', 'the API key is missing or wrong: send '
                           '"Authorization: Bearer KEY" with the key of the node')

    async def _send_health(self, send: Send) -> None:
        """Answer 200 if the model accepts requests, otherwise 503."""
        host = self._host
        state, message = host.state, '' if host.worker is not None else host.inactive_reason()
        healthy = host.worker is not None and state != 'stalled'
        await _send_json(send, 200 if healthy else 503, {'status': state, 'message': message})

    async def _list(self, name: str, send: Send) -> None:
        """Send the list of models, or the named one."""
        host = self._host
        loaded, model = host.loaded, host.config.model_name
        models: list[dict[str, Any]] = [] if loaded is None else [openai.model(
            model, self._created, loaded.footprint.max_context)]
        if name and (loaded is None or name != model):
            raise ApiError(404, 'model_not_found', f'the model {name!r:.100} is not loaded',
                           'model')
        await _send_json(send, 200, models[0] if name else {
            'object': 'list', 'data': models})

    async def _complete(self, chat: bool, headers: Mapping[bytes, bytes], receive: Receive,
                        send: Send) -> None:
        """Submit a request and send its answer. The request ends if its client disconnects."""
        received_s = time.monotonic()
        completion = self._read(await self._body(headers, receive), chat)
        exchange = Exchange(self._host, completion.stream)
        exchange.submit(completion.request, received_s)
        disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
        reply = asyncio.ensure_future(_reply(completion, exchange, send))
        try:
            await asyncio.wait({disconnect, reply}, return_when=asyncio.FIRST_COMPLETED)
            if reply.done():
                await reply                     # to raise its exception
        finally:
            exchange.cancel('its HTTP client has disconnected')
            disconnect.cancel()
            reply.cancel()

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """
        Receive the body of a POST.

        :raises ApiError: the body is too long, or incomplete after the timeout.
        """
        limit = self._host.config.queue.max_request_bytes
        parts: list[bytes] = []
        size, more = 0, True

        async def read() -> None:
            nonlocal size, more
            while more and size <= 2 * limit:   # the rest of a longer body is not received
                message = await receive()
                if message['type'] == 'http.disconnect':
                    raise ApiError(400, 'disconnected', 'the client has disconnected')
                part = message.get('body', b'')
                size, more = size + len(part), message.get('more_body', False)
                if size <= limit:
                    parts.append(part)

        try:
            await asyncio.wait_for(read(), BODY_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise ApiError(408, 'timeout', f'the body did not arrive within {BODY_TIMEOUT_S:g} s',
                           headers={'connection': 'close'}) from None
        if size > limit:
            message = (f'the body has more than {limit} bytes: shorten it, or raise '
                       'queue.max_request_bytes')
            self._host.refuse(message, kind='too_large')
            raise ApiError(413, 'request_too_large', message,
                           headers={'connection': 'close'} if more else {})
        return b''.join(parts)

    def _read(self, data: bytes, chat: bool) -> Completion:
        """
        Parse a body.

        :raises ApiError: the body is invalid; the host counts it as a refused request.
        """
        body = None
        try:
            try:
                body = parse_value(data.decode(), 'the body')
            except UnicodeDecodeError as error:
                raise RequestError(f'the body is not UTF-8: {error}') from None
            return openai.read(body, self._host.config.model_name, chat)
        except RequestError as error:
            self._host.refuse(str(error), error.client_id or openai.client_id(body))
            raise openai.invalid(error, body) from None
        except ApiError as error:
            self._host.refuse(str(error), openai.client_id(body))
            raise


async def refuse_connection(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
    """Answer a request on a connection beyond the limit."""
    error = ApiError(503, 'too_many_connections', 'the node has http.max_connections open: try '
                     'again later, or close some')
    await _send_json(send, error.status, error.body, {'connection': 'close'})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())['type'] != 'http.disconnect':
        pass


async def _reply(completion: Completion, exchange: Exchange, send: Send) -> None:
    """
    Send an answer.

    The status is sent with the first piece or the end, so that a refusal gets its own status.

    :raises ApiError: the request was refused, or failed.
    """
    formatter = completion.formatter
    if completion.stream:
        pieces = exchange.pieces()
        first = await anext(pieces, None)
    report, text = (None, '') if completion.stream and first else await exchange.end()
    if report is not None and (error := openai.failure(report, text, completion.names)):
        raise error
    if not completion.stream:
        assert report is not None
        await _send_json(send, 200, formatter.complete(report, text))
        return
    await send(_start(200, 'text/event-stream; charset=utf-8', {'cache-control': 'no-cache'}))
    begin = [*formatter.begin(), *([formatter.piece(first)] if first else [])]
    await send(_body(b''.join(map(openai.event, begin)), more=True))
    async for piece in pieces:
        await send(_body(openai.event(formatter.piece(piece)), more=True))
    report, text = await exchange.end()
    if error := openai.failure(report, text, completion.names):
        raise error
    await send(_body(b''.join(map(openai.event, formatter.end(report, text))) + openai.DONE))


def _start(status: int, kind: str, headers: Mapping[str, str]) -> dict[str, Any]:
    return {'type': 'http.response.start', 'status': status, 'headers': [
        (name.encode(), value.encode())
        for name, value in {'content-type': kind, **headers}.items()]}


def _body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {'type': 'http.response.body', 'body': data, 'more_body': more}


async def _send(send: Send, status: int, kind: str, data: bytes,
                headers: Mapping[str, str] | None = None) -> None:
    await send(_start(status, kind, {'content-length': str(len(data)), **(headers or {})}))
    await send(_body(data))


async def _send_json(send: Send, status: int, value: Mapping[str, Any],
                     headers: Mapping[str, str] | None = None) -> None:
    await _send(send, status, JSON, json.dumps(value).encode(), headers)
