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
A model on a server that speaks OpenAI's API: messages go out, pieces of text come back.

A thread for each exchange does all that may wait for the network, and leaves what came in a
bounded queue, so that who reads it can give up at any time. It knows neither requests nor ROS.
"""

from collections.abc import Iterator
from collections.abc import Mapping
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
from physai_decode.config import shown
from physai_decode.engine import first_line
from physai_decode.engine import Footprint

KEY_VARIABLE = 'PHYSAI_DECODE_REMOTE_API_KEY'
NAME = 'openai'                 # of engine.name
LOOK_S = 3.0                    # that a look at the server takes at most
MOST_WAITING = 1024             # events that nobody has read yet; then the server has to wait
MOST_BYTES = 1 << 22            # of an event, or of an answer that is no stream
POLL_S = 0.05                   # how often a thread that can't go on looks whether it is to end
UNKNOWN = 'n/a'
_NUMBERS = 2**53                # counts are below


class ServerError(Exception):
    """The server did not do what it was asked for; the message says what it did instead."""

    def __init__(self, message: str, status: int = 0) -> None:
        """Keep the HTTP status too, 0 where it is not what went wrong."""
        super().__init__(message)
        self.status = status


class Usage(NamedTuple):
    """Counts of tokens, as far as the server tells them."""

    prompt: int | None = None
    cached: int | None = None       # of the prompt
    output: int | None = None


class Fragment(NamedTuple):
    """A part of a call of a tool."""

    place: int                      # of the call in the answer
    id: str
    name: str
    arguments: str                  # JSON, or a piece of it


class Delta(NamedTuple):
    """What one event brought."""

    content: str = ''
    reasoning: str = ''
    calls: tuple[Fragment, ...] = ()
    finish_reason: str = ''
    usage: Usage | None = None
    over: bool = False              # no event follows

    @property
    def is_piece(self) -> bool:
        """Whether it says something."""
        return bool(self.content or self.reasoning or self.calls)


class Server:
    """One model on one server."""

    def __init__(self, config: RemoteConfig, key: str = '') -> None:
        """
        Check the settings; nothing is asked of the server.

        :param key: what it wants to be sent; empty: nothing.
        :raises ConfigError: a setting, or the key, can't be used.
        """
        self._url = _checked(config.base_url)
        if not config.model:
            raise ConfigError('remote.model names no model: set it to the name that the model has '
                              'on the server')
        if not key.isascii() or not key.isprintable():
            raise ConfigError(f'{KEY_VARIABLE} in the environment holds a character that no key '
                              'has, such as a line break: set it again')
        self.model, self.address = config.model, config.base_url
        # Its own waits are no shorter than those of who reads.
        self._timeout_s = 1.0 + 1e-3 * max(config.first_token_timeout_ms, config.token_timeout_ms)
        self._headers = {'Content-Type': 'application/json', 'User-Agent': 'physai_decode',
                         'Connection': 'close'}
        if key:
            self._headers['Authorization'] = f'Bearer {key}'
        self._tls = ssl.create_default_context() if self._url.scheme == 'https' else None
        self.footprint = Footprint(
            engine=NAME, model_type=UNKNOWN, dtype=UNKNOWN, quantization=UNKNOWN, device=UNKNOWN,
            device_name=self._url.netloc, device_uuid='', cuda_graph='unavailable', max_context=0,
            vocab_size=0, eos_token_ids=(), read_weight_bytes=0, checkpoint_weight_bytes=0,
            layers=0, kv_heads=0, head_dim=0, kv_element_bytes=0,
            details={'base_url': config.base_url})

    def look(self) -> str:
        """
        Ask which models the server has, and take what it tells of this one.

        :returns: what is wrong with it, empty where nothing is.
        """
        exchange = Exchange(self, 'models', None)
        try:
            told = exchange.get(LOOK_S)
            if told is None:
                return f'{self.address} does not answer within {LOOK_S:g} s'
            assert isinstance(told, dict)
            models = {str(each['id']): each for each in told['data']}
            if self.model not in models:
                return (f'{self.address} has no model {shown(self.model)}: it has '
                        f'{", ".join(models)[:200] or "none"}')
            context = models[self.model].get('max_model_len')
            if type(context) is int and 0 < context < _NUMBERS:
                self.footprint = replace(self.footprint, max_context=context)
            return ''
        except ServerError as error:
            return str(error)
        except (LookupError, TypeError, AttributeError):
            return f'{self.address}/models is no list of models: check remote.base_url'
        finally:
            exchange.close()

    def ask(self, what: str, body: Mapping[str, Any]) -> 'Exchange':
        """
        Have the server answer.

        :param what: ``chat/completions`` or ``completions``.
        :param body: without the model's name, and without what makes it a stream.
        """
        return Exchange(self, what, json.dumps({
            'model': self.model, **body, 'stream': True,
            'stream_options': {'include_usage': True}}).encode())

    def connect(self) -> client.HTTPConnection:
        """Give a connection that is not open yet."""
        host, port = self._url.hostname or '', self._url.port
        if self._tls is None:
            return client.HTTPConnection(host, port, timeout=self._timeout_s)
        return client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._tls)

    def send(self, connection: client.HTTPConnection, what: str, body: bytes | None) -> None:
        """Send a request on an open connection: a POST where it has a body."""
        connection.request('GET' if body is None else 'POST',
                           f'{self._url.path.rstrip("/")}/{what}', body, self._headers)


class Exchange:
    """One request to a server, and what comes back."""

    def __init__(self, server: Server, what: str, body: bytes | None) -> None:
        """Send it, from a thread of its own; without a body an object is asked for, no stream."""
        self._server, self._what, self._body = server, what, body
        self._queue: queue.Queue[Any] = queue.Queue(MOST_WAITING)
        self._closed = threading.Event()
        self._socket: socket.socket | None = None
        threading.Thread(target=self._run, name='remote', daemon=True).start()

    def get(self, timeout_s: float) -> Any:
        """
        Give what came: a `Delta` for each event of a stream, or the object.

        :returns: None where nothing came in time.
        :raises ServerError: the server failed; what came before was given.
        """
        try:
            found = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(found, ServerError):
            raise found
        return found

    def close(self) -> None:
        """Break the connection off; the server then ends the answer, as most do."""
        self._closed.set()
        connected = self._socket
        if connected is not None:
            try:
                connected.shutdown(socket.SHUT_RDWR)
            except OSError:             # it is closed already
                pass

    # What follows runs in the exchange's own thread.

    def _run(self) -> None:
        connection = self._server.connect()
        try:
            for each in self._answer(connection):
                self._put(each)
        except ServerError as error:
            self._put(error)
        except Exception as error:      # the system's, TLS's and HTTP's alike
            self._put(ServerError(_told(self._server.address, error)))
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
        if self._closed.is_set():       # before its socket was known
            return
        self._server.send(connection, self._what, self._body)
        response = connection.getresponse()
        if response.status != 200:
            raise _refusal(address, response)
        if self._body is None:
            yield _object(address, response.read(MOST_BYTES))
            return
        kind = response.headers.get_content_type()
        if kind != 'text/event-stream':
            raise ServerError(
                f"{address} does not speak OpenAI's API: it answers with {kind}, not a stream "
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
            raise ServerError(f'{address} broke the answer off')
        yield Delta(over=True)


def read(address: str, data: bytes) -> Delta:
    """
    Read one event of a stream.

    :param address: of the server, for messages.
    :raises ServerError: it is an error, or nonsense.
    """
    value = _object(address, data)
    if value.get('error'):
        raise ServerError(f'{address} failed: {_message(value)}')
    choices: Any = value.get('choices')
    usage = _usage(value.get('usage'))
    if choices == []:
        return Delta(usage=usage)
    try:
        choice = choices[0]
        delta = choice.get('delta') or {}
        content = delta.get('content') or choice.get('text') or ''
        reasoning = delta.get('reasoning_content') or delta.get('reasoning') or ''
        return Delta(_text(content), _text(reasoning),
                     tuple(map(_fragment, delta.get('tool_calls') or ())),
                     _text(choice.get('finish_reason') or ''), usage)
    except (AttributeError, LookupError, TypeError):
        raise ServerError(f"{address} does not speak OpenAI's API: {_shown(data)} is no event of "
                          'a stream; check remote.base_url') from None


def _checked(base_url: str) -> SplitResult:
    """
    Give the parts of an address.

    :raises ConfigError: it is none that can be asked.
    """
    def wrong(why: str) -> ConfigError:
        return ConfigError(f'remote.base_url is {shown(base_url)}: {why}, such as '
                           'http://10.0.0.2:8000/v1')

    if not base_url.isascii() or not base_url.isprintable() or ' ' in base_url:
        raise wrong('expected an address of printable ASCII characters')
    try:
        url = urlsplit(base_url)
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise wrong(f'expected an address ({error})') from None
    if url.scheme not in ('http', 'https') or not host:
        raise wrong('expected an address that begins with http:// or https:// and names a host')
    if url.username is not None or url.password is not None:
        raise ConfigError('remote.base_url holds a name or a password, which anybody can read '
                          f'there: put the key into {KEY_VARIABLE} in the environment')
    if url.query or url.fragment:
        raise wrong('expected an address without ? and #')
    return url


def _events(address: str, response: client.HTTPResponse) -> Iterator[bytes]:
    """Give the data of each server-sent event."""
    parts: list[bytes] = []
    while line := response.readline(MOST_BYTES):
        if not line.endswith(b'\n'):
            break                       # it is cut off, or endless
        line = line.rstrip(b'\r\n')
        if line.startswith(b'data:'):
            parts.append(line[5:].removeprefix(b' '))
        elif not line and parts:
            yield b'\n'.join(parts)
            parts = []
        if sum(map(len, parts)) > MOST_BYTES:
            raise ServerError(f'{address} sends an event of more than {MOST_BYTES} bytes')


def _object(address: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ServerError(f"{address} does not speak OpenAI's API: {_shown(data)} is no JSON "
                          'object; check remote.base_url')
    return value


def _fragment(value: Mapping[str, Any]) -> Fragment:
    function = value.get('function') or {}
    index = value.get('index', 0)
    if type(index) is not int:
        raise TypeError
    return Fragment(index, _text(value.get('id') or ''), _text(function.get('name') or ''),
                    _text(function.get('arguments') or ''))


def _text(value: Any) -> str:
    """Give a text with U+FFFD in place of half a surrogate pair, which nothing can encode."""
    if type(value) is not str:
        raise TypeError
    return value if value.isascii() else \
        value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None

    def count(inner: Any, name: str) -> int | None:
        found = inner.get(name) if isinstance(inner, dict) else None
        return found if type(found) is int and 0 <= found < _NUMBERS else None

    return Usage(count(value, 'prompt_tokens'),
                 count(value.get('prompt_tokens_details'), 'cached_tokens'),
                 count(value, 'completion_tokens'))


def _refusal(address: str, response: client.HTTPResponse) -> ServerError:
    """Give the error for an answer with another status than 200."""
    status, data = response.status, response.read(MOST_BYTES)
    if 300 <= status < 400:
        place = shown(response.headers.get('Location', ''))
        return ServerError(f'{address} answers {status} and points to {place}: set '
                           'remote.base_url to where the API is', status)
    try:
        told = _message(json.loads(data))
    except (ValueError, RecursionError):
        told = _shown(data[:200])
    advice = {401: f'set {KEY_VARIABLE} in the environment to its key',
              403: f'set {KEY_VARIABLE} in the environment to its key',
              404: 'check remote.base_url, which ends in /v1 for most servers, and remote.model'
              }.get(status, '')
    return ServerError('; '.join(filter(None, (f'{address} answers {status}: {told}', advice))),
                       status)


def _message(value: Any) -> str:
    """Give what an error of OpenAI's API, or of FastAPI, says."""
    found = value
    for name in ('error', 'message', 'detail'):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found.strip()[:500] if isinstance(found, str) else shown(found)


def _shown(data: bytes) -> str:
    return shown(data.decode(errors='replace').strip())


def _told(address: str, error: Exception) -> str:
    """Say what went wrong on the way to the server."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (f'{address} has no certificate that is trusted ({error.verify_message}): name the '
                "file of its authority's certificate in SSL_CERT_FILE in the environment")
    if isinstance(error, client.IncompleteRead):
        return f'{address} broke the answer off'
    if isinstance(error, client.HTTPException) and not isinstance(error, OSError):
        return f'{address} does not speak HTTP ({type(error).__name__}): check remote.base_url'
    return f'{address} can not be asked ({first_line(error)})'
