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
Client of a server with OpenAI's API: it sends messages and receives pieces of text.

Each request has a thread that does everything that may wait for the network. It puts events into
a bounded queue, so that the reader can stop waiting at any time.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from http import client
import json
import queue
import socket
import ssl
import threading
from typing import Any
from typing import NamedTuple
from urllib.parse import SplitResult
from urllib.parse import urlsplit

from physai_decode.config import ConfigError
from physai_decode.config import RemoteConfig
from physai_decode.config import SERVER
from physai_decode.config import shown
from physai_decode.engine import first_line
from physai_decode.engine import Footprint

KEY_VARIABLE = 'PHYSAI_DECODE_REMOTE_API_KEY'
PROBE_S = 3.0                   # limit on the time of a probe
QUEUE_EVENTS = 1024             # unread events; if the queue is full, the thread stops reading
MAX_BYTES = 1 << 22             # limit on an event, and on a response that is not a stream
POLL_S = 0.05                   # how often a thread with a full queue checks for `close`
UNKNOWN = 'n/a'
NAMED = 8                       # limit on the models of a server that a message names
_COUNT_LIMIT = 2**53            # larger counts are ignored


class ServerError(Exception):
    """The server failed or refused a request; the message says how."""

    def __init__(self, message: str, status: int = 0) -> None:
        """
        Create an error.

        :param status: HTTP status; 0 if the error has none.
        """
        super().__init__(message)
        self.status = status


class Usage(NamedTuple):
    """Token counts; None where the server does not report one."""

    prompt: int | None = None
    cached: int | None = None       # of the prompt
    output: int | None = None


class Fragment(NamedTuple):
    """A part of a tool call."""

    place: int                      # index of the call in the answer
    id: str
    name: str
    arguments: str                  # JSON, or a piece of it


class Delta(NamedTuple):
    """The content of one event."""

    content: str = ''
    reasoning: str = ''
    calls: tuple[Fragment, ...] = ()
    finish_reason: str = ''
    usage: Usage | None = None
    over: bool = False              # no event follows

    @property
    def is_piece(self) -> bool:
        """Whether the event has text or a tool call."""
        return bool(self.content or self.reasoning or self.calls)


class Server:
    """A model on a server."""

    def __init__(self, config: RemoteConfig, key: str = '') -> None:
        """
        Check the settings, without contacting the server.

        :param key: API key; empty for none.
        :raises ConfigError: a setting or the key is invalid.
        """
        self._url = _checked(config.base_url)
        if not config.model:
            raise ConfigError('remote.model is empty: set it to the name of the model on the '
                              'server')
        if not key.isascii() or not key.isprintable():
            raise ConfigError(f'{KEY_VARIABLE} in the environment holds a character that is not '
                              'allowed in a key, such as a line break: set it again')
        self.model, self.address = config.model, config.base_url
        # Longer than the timeouts of the reader, which come first.
        self._timeout_s = 1.0 + 1e-3 * max(config.first_token_timeout_ms, config.token_timeout_ms)
        self._headers = {'Content-Type': 'application/json', 'User-Agent': 'physai_decode',
                         'Connection': 'close'}
        if key:
            self._headers['Authorization'] = f'Bearer {key}'
        self._tls = ssl.create_default_context() if self._url.scheme == 'https' else None
        self.footprint = Footprint(
            engine=SERVER, model_type=UNKNOWN, dtype=UNKNOWN, quantization=UNKNOWN, device=UNKNOWN,
            device_name=self._url.netloc, device_uuid='', cuda_graph='unavailable', max_context=0,
            vocab_size=0, eos_token_ids=(), read_weight_bytes=0, checkpoint_weight_bytes=0,
            layers=0, kv_heads=0, head_dim=0, kv_element_bytes=0,
            details={'base_url': config.base_url})

    def probe(self) -> str:
        """
        Check that the server has the model, and store its context limit.

        :returns: the problem; empty if there is none.
        """
        request = ServerRequest(self, 'models', None)
        try:
            listing = request.get(PROBE_S)
            if listing is None:
                return f'{self.address} does not answer within {PROBE_S:g} s'
            assert isinstance(listing, dict)
            models = {str(each['id']): each for each in listing['data']}
            if self.model not in models:
                return f'{self.address} has no model {shown(self.model)}: {_choice([*models])}'
            context = models[self.model].get('max_model_len')
            if type(context) is int and 0 < context < _COUNT_LIMIT:
                self.footprint = replace(self.footprint, max_context=context)
            return ''
        except ServerError as error:
            return str(error)
        except (LookupError, TypeError, AttributeError):
            return f'{self.address}/models is not a list of models: check remote.base_url'
        finally:
            request.close()

    def ask(self, endpoint: str, body: Mapping[str, Any]) -> 'ServerRequest':
        """
        Request an answer as a stream.

        :param endpoint: ``chat/completions`` or ``completions``.
        :param body: the JSON body, without the name of the model and the options of the stream.
        """
        return ServerRequest(self, endpoint, json.dumps({
            'model': self.model, **body, 'stream': True,
            'stream_options': {'include_usage': True}}).encode())

    def connect(self) -> client.HTTPConnection:
        """Return a connection that is not open yet."""
        host, port = self._url.hostname or '', self._url.port
        if self._tls is None:
            return client.HTTPConnection(host, port, timeout=self._timeout_s)
        return client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._tls)

    def send(self, connection: client.HTTPConnection, endpoint: str, body: bytes | None) -> None:
        """Send a POST request, or a GET request if ``body`` is None."""
        connection.request('GET' if body is None else 'POST',
                           f'{self._url.path.rstrip("/")}/{endpoint}', body, self._headers)


class ServerRequest:
    """A request to a server, and its response."""

    def __init__(self, server: Server, endpoint: str, body: bytes | None) -> None:
        """
        Send the request in a new thread.

        :param body: of a request for a stream; None requests a JSON object.
        """
        self._server, self._endpoint, self._body = server, endpoint, body
        self._queue: queue.Queue[Any] = queue.Queue(QUEUE_EVENTS)
        self._closed = threading.Event()
        self._socket: socket.socket | None = None
        threading.Thread(target=self._run, name='remote', daemon=True).start()

    def get(self, timeout_s: float) -> Any:
        """
        Return the next event of a stream as a `Delta`, or the JSON object.

        :returns: None if nothing arrived within ``timeout_s`` seconds.
        :raises ServerError: the server failed; raised after all earlier events.
        """
        try:
            found = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(found, ServerError):
            raise found
        return found

    def close(self) -> None:
        """Close the connection; most servers then stop generating."""
        self._closed.set()
        connected = self._socket
        if connected is not None:
            try:
                connected.shutdown(socket.SHUT_RDWR)
            except OSError:             # already closed
                pass

    # The thread of the request runs everything below.

    def _run(self) -> None:
        connection = self._server.connect()
        try:
            for each in self._answer(connection):
                self._put(each)
        except ServerError as error:
            self._put(error)
        except Exception as error:      # of the operating system, TLS or HTTP
            self._put(ServerError(_network_error(self._server.address, error)))
        finally:
            connection.close()

    def _put(self, found: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(found, timeout=POLL_S)
            except queue.Full:
                continue

    def _answer(self, connection: client.HTTPConnection) -> Iterator[Any]:
        address = self._server.address
        connection.connect()
        self._socket = connection.sock
        if self._closed.is_set():       # `close` ran before the socket was known
            return
        self._server.send(connection, self._endpoint, self._body)
        response = connection.getresponse()
        if response.status != 200:
            raise _status_error(address, response)
        if self._body is None:
            yield _object(address, response.read(MAX_BYTES))
            return
        kind = response.headers.get_content_type()
        if kind != 'text/event-stream':
            raise ServerError(
                f"{address} does not implement OpenAI's API: it sent {kind}, not a stream "
                f'({_shown(response.read(200))}); check remote.base_url')
        finished = False
        for data in _events(address, response):
            if data.strip() == b'[DONE]':
                break
            delta = read(address, data)
            finished = finished or bool(delta.finish_reason)
            yield delta
            if self._closed.is_set():
                return
        if not finished:
            raise ServerError(f'{address} ended the stream too early')
        yield Delta(over=True)


def read(address: str, data: bytes) -> Delta:
    """
    Parse one event of a stream.

    :param address: address of the server, for messages.
    :raises ServerError: the event reports an error, or cannot be parsed.
    """
    value = _object(address, data)
    if value.get('error'):
        raise ServerError(f'{address} failed: {_message(value)}')
    choices: Any = value.get('choices')
    usage = _usage(value.get('usage'))
    try:
        # A server that ignores n may send further choices, which are other answers.
        choice = next((each for each in choices if not each.get('index')), None)
        if choice is None:
            return Delta(usage=usage)
        delta = choice.get('delta') or {}
        content = delta.get('content') or choice.get('text') or ''
        reasoning = delta.get('reasoning_content') or delta.get('reasoning') or ''
        return Delta(_text(content), _text(reasoning),
                     tuple(map(_fragment, delta.get('tool_calls') or ())),
                     _text(choice.get('finish_reason') or ''), usage)
    except (AttributeError, LookupError, TypeError):
        raise ServerError(f"{address} does not implement OpenAI's API: {_shown(data)} is not an "
                          'event of a stream; check remote.base_url') from None


def _choice(models: Sequence[str]) -> str:
    """Say which models a server has, and what to do."""
    if not models:
        return 'it has none: load it there'
    named = ', '.join(shown(each) for each in models[:NAMED])
    more = f' and {len(models) - NAMED} more' if len(models) > NAMED else ''
    return f'it has {named}{more}: set remote.model to one of them, or load it there'


def _checked(base_url: str) -> SplitResult:
    """
    Parse remote.base_url.

    :raises ConfigError: it is not a usable URL.
    """
    def invalid(expected: str) -> ConfigError:
        return ConfigError(f'remote.base_url is {shown(base_url)}: {expected}, such as '
                           'http://10.0.0.2:8000/v1')

    if not base_url.isascii() or not base_url.isprintable() or ' ' in base_url:
        raise invalid('expected a URL of printable ASCII characters')
    try:
        url = urlsplit(base_url)
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise invalid(f'expected a URL ({error})') from None
    if url.scheme not in ('http', 'https') or not host:
        raise invalid('expected a URL that begins with http:// or https:// and names a host')
    if url.username is not None or url.password is not None:
        raise ConfigError('remote.base_url holds a user name or a password, but parameters are '
                          f'public: set {KEY_VARIABLE} in the environment instead')
    if url.query or url.fragment:
        raise invalid('expected a URL without ? and #')
    return url


def _events(address: str, response: client.HTTPResponse) -> Iterator[bytes]:
    """Yield the data of each server-sent event."""
    parts: list[bytes] = []
    while line := response.readline(MAX_BYTES):
        if not line.endswith(b'\n'):
            break                       # cut off, or longer than the limit
        line = line.rstrip(b'\r\n')
        if line.startswith(b'data:'):
            parts.append(line[5:].removeprefix(b' '))
        elif not line and parts:
            yield b'\n'.join(parts)
            parts = []
        if sum(map(len, parts)) > MAX_BYTES:
            raise ServerError(f'{address} sent an event of more than {MAX_BYTES} bytes')


def _object(address: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ServerError(f"{address} does not implement OpenAI's API: {_shown(data)} is not a "
                          'JSON object; check remote.base_url')
    return value


def _fragment(value: Mapping[str, Any]) -> Fragment:
    function = value.get('function') or {}
    index = value.get('index', 0)
    if type(index) is not int:
        raise TypeError
    return Fragment(index, _text(value.get('id') or ''), _text(function.get('name') or ''),
                    _text(function.get('arguments') or ''))


def _text(value: Any) -> str:
    """Replace unpaired surrogates, which UTF-8 cannot encode, with U+FFFD."""
    if type(value) is not str:
        raise TypeError
    return value if value.isascii() else \
        value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None

    def count(inner: Any, name: str) -> int | None:
        found = inner.get(name) if isinstance(inner, dict) else None
        return found if type(found) is int and 0 <= found < _COUNT_LIMIT else None

    return Usage(count(value, 'prompt_tokens'),
                 count(value.get('prompt_tokens_details'), 'cached_tokens'),
                 count(value, 'completion_tokens'))


def _status_error(address: str, response: client.HTTPResponse) -> ServerError:
    """Return the error for an HTTP status other than 200."""
    status, data = response.status, response.read(MAX_BYTES)
    if 300 <= status < 400:
        location = shown(response.headers.get('Location', ''))
        return ServerError(f'{address} redirects ({status}) to {location}: set remote.base_url to '
                           'the address of the API', status)
    try:
        reason = _message(json.loads(data))
    except (ValueError, RecursionError):
        reason = _shown(data[:200])
    advice = {401: f'set {KEY_VARIABLE} in the environment to its key',
              403: f'set {KEY_VARIABLE} in the environment to its key',
              404: 'check remote.base_url, which ends in /v1 for most servers, and remote.model'
              }.get(status, '')
    return ServerError('; '.join(filter(None, (f'{address} answers {status}: {reason}', advice))),
                       status)


def _message(value: Any) -> str:
    """Return the message in an error of OpenAI's API or of FastAPI."""
    found = value
    for name in ('error', 'message', 'detail'):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found.strip()[:500] if isinstance(found, str) else shown(found)


def _shown(data: bytes) -> str:
    return shown(data.decode(errors='replace').strip())


def _network_error(address: str, error: Exception) -> str:
    """Describe an error on the way to the server."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (f'{address} has no trusted certificate ({error.verify_message}): set '
                'SSL_CERT_FILE in the environment to the certificate of its authority')
    if isinstance(error, client.IncompleteRead):
        return f'{address} ended the stream too early'
    if isinstance(error, client.HTTPException) and not isinstance(error, OSError):
        return f'{address} does not speak HTTP ({type(error).__name__}): check remote.base_url'
    return f'{address} cannot be reached ({first_line(error)})'
