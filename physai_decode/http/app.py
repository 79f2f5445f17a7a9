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

"""What is answered at which address: an application for any server that speaks ASGI."""

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
from physai_decode.http.openai import Asked
from physai_decode.request import parse_value
from physai_decode.request import RequestError

BODY_S = 10.0                   # for a whole body to come
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
        Take whose API it is.

        :param key: what clients have to send; empty: nothing.
        :param note: see `physai_decode.http.start_server`, as for ``errors``.
        """
        self._host, self._key, self._note = host, key.encode(), note
        self._metrics = Metrics(host, errors)
        self._created = int(time.time())

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        replied = False

        async def reply(message: dict[str, Any]) -> None:
            nonlocal replied
            replied = True
            await send(message)

        try:
            try:
                await self._route(scope, receive, reply)
            except ApiError:
                raise
            except Exception as error:
                self._note(f'{scope["method"]} {scope["path"]}', error)
                raise ApiError(500, 'error', f'{type(error).__name__}: the log of the node says '
                               'more', headers={'x-should-retry': 'false'}) from error
        except ApiError as error:
            if replied:                         # in mid-stream
                await send(_body(openai.event(error.body)))
            else:
                await _send_json(send, error.status, error.body, error.headers)

    async def _route(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        path, headers = scope['path'], dict(scope['headers'])
        if b'origin' in headers:
            raise ApiError(403, 'origin_not_allowed', 'the request is from a page in a browser, '
                           'and those are not served: send it from a program')
        known = MODELS if path.startswith(f'{MODELS}/') else path
        if path.startswith('/v1/'):
            self._check_key(headers.get(b'authorization', b''))
        if known not in METHODS:
            raise ApiError(404, 'not_found', f'there is no {path!r:.100}: there are '
                           f'{", ".join(METHODS)}')
        if scope['method'] != METHODS[known]:
            raise ApiError(405, 'method_not_allowed', f'{known} takes {METHODS[known]} alone',
                           headers={'allow': METHODS[known]})
        if METHODS[known] == 'POST':
            await self._complete(known == CHAT, headers, receive, send)
        elif known == MODELS:
            await self._list(path[len(MODELS) + 1:], send)
        elif known == '/health':
            await self._tell_health(send)
        else:
            await _send(send, 200, CONTENT_TYPE, self._metrics.text())

    def _check_key(self, given: bytes) -> None:
        kind, _, key = given.partition(b' ')
        if self._key and not (kind.lower() == b'bearer' and compare_digest(key, self._key)):
            raise ApiError(401, 'invalid_api_key', 'the API key is missing or wrong: send '
                           '"Authorization: Bearer KEY" with the key of the node')

    async def _tell_health(self, send: Send) -> None:
        """Say 200 where the model takes requests, else 503."""
        host = self._host
        state, message = host.state, '' if host.worker is not None else host.why_not()
        healthy = host.worker is not None and state != 'stalled'
        await _send_json(send, 200 if healthy else 503, {'status': state, 'message': message})

    async def _list(self, name: str, send: Send) -> None:
        """Give the list of models, or the one that is named."""
        host = self._host
        loaded, model = host.loaded, host.config.model_name
        found: list[dict[str, Any]] = [] if loaded is None else [openai.model(
            model, self._created, loaded.footprint.max_context)]
        if name and (loaded is None or name != model):
            raise ApiError(404, 'model_not_found', f'the model {name!r:.100} is not loaded',
                           'model')
        await _send_json(send, 200, found[0] if name else {
            'object': 'list', 'data': found})

    async def _complete(self, chat: bool, headers: Mapping[bytes, bytes], receive: Receive,
                        send: Send) -> None:
        """Have the model answer. The request ends where its client goes."""
        received_s = time.monotonic()
        asked = self._read(await self._body(headers, receive), chat)
        exchange = Exchange(self._host, asked.stream)
        exchange.submit(asked.request, received_s)
        gone = asyncio.ensure_future(_disconnected(receive))
        reply = asyncio.ensure_future(_reply(asked, exchange, send))
        try:
            await asyncio.wait({gone, reply}, return_when=asyncio.FIRST_COMPLETED)
            if reply.done():
                await reply                     # raises what it raised
        finally:
            exchange.cancel('its HTTP client has gone')
            gone.cancel()
            reply.cancel()

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """
        Read the body of a POST; none that is too long.

        :raises ApiError: it is too long, or does not come.
        """
        limit = self._host.config.queue.max_request_bytes
        parts: list[bytes] = []
        size, more = 0, True

        async def read() -> None:
            nonlocal size, more
            while more and size <= 2 * limit:   # what is sent on is not read to its end
                message = await receive()
                if message['type'] == 'http.disconnect':
                    raise ApiError(400, 'disconnected', 'the client has gone')
                part = message.get('body', b'')
                size, more = size + len(part), message.get('more_body', False)
                if size <= limit:
                    parts.append(part)

        try:
            await asyncio.wait_for(read(), BODY_S)
        except asyncio.TimeoutError:
            raise ApiError(408, 'timeout', f'the body did not come within {BODY_S:g} s',
                           headers={'connection': 'close'}) from None
        if size > limit:
            message = (f'the body has more than {limit} bytes: shorten it, or raise '
                       'queue.max_request_bytes')
            self._host.refuse(message, kind='too_large')
            raise ApiError(413, 'request_too_large', message,
                           headers={'connection': 'close'} if more else {})
        return b''.join(parts)

    def _read(self, data: bytes, chat: bool) -> Asked:
        """
        Read what a client asks for.

        :raises ApiError: what is wrong with it; the host counts it as a refused request.
        """
        body = None
        try:
            try:
                body = parse_value(data.decode(), 'the body')
            except UnicodeDecodeError as error:
                raise RequestError(f'the body is no UTF-8: {error}') from None
            return openai.read(body, self._host.config.model_name, chat)
        except RequestError as error:
            self._host.refuse(str(error), error.client_id or openai.client_id(body))
            raise openai.wrong(error, body) from None
        except ApiError as error:
            self._host.refuse(str(error), openai.client_id(body))
            raise


async def too_many(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
    """Answer where there are too many connections."""
    error = ApiError(503, 'too_many_connections', 'the node has http.max_connections open: send '
                     'it again later, or close some')
    await _send_json(send, error.status, error.body, {'connection': 'close'})


async def _disconnected(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())['type'] != 'http.disconnect':
        pass


async def _reply(asked: Asked, exchange: Exchange, send: Send) -> None:
    """
    Send an answer.

    Nothing is sent before the first piece, or the end: a refusal still has its status then.

    :raises ApiError: there is none, or it broke off.
    """
    shape = asked.shape
    if asked.stream:
        pieces = exchange.pieces()
        first = await anext(pieces, None)
    report, text = (None, '') if asked.stream and first else await exchange.end()
    if report is not None and (error := openai.failure(report, text)):
        raise error
    if not asked.stream:
        assert report is not None
        await _send_json(send, 200, shape.whole(report, text))
        return
    await send(_start(200, 'text/event-stream; charset=utf-8', {'cache-control': 'no-cache'}))
    begin = [*shape.begin(), *([shape.piece(first)] if first else [])]
    await send(_body(b''.join(map(openai.event, begin)), more=True))
    async for piece in pieces:
        await send(_body(openai.event(shape.piece(piece)), more=True))
    report, text = await exchange.end()
    if error := openai.failure(report, text):
        raise error
    await send(_body(b''.join(map(openai.event, shape.end(report, text))) + openai.DONE))


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
