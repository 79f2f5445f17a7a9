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

"""The HTTP server of the node: lifecycle, messages on topics, and shutdown by a signal."""

import http.client
import json
import signal
import socket
import subprocess

from fake_server import free_port
from node_rig import active_rig
from node_rig import new_rig
from node_rig import PATIENCE_S
from physai_decode.ros.interfaces import unavailable
import pytest
from test_exit import LOG_LINE
from test_exit import start_node

openai = pytest.importorskip('openai')
pytest.importorskip('uvicorn')
pytest.importorskip('prometheus_client')

MODEL = 'builtin:tiny_planner'
HELLO = [{'role': 'user', 'content': 'hello'}]


def client(port):
    """Return a client of OpenAI's package."""
    return openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none', max_retries=0,
                         timeout=PATIENCE_S)


def health(port):
    """Return the status of /health, 0 if the port is closed."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=PATIENCE_S)
    try:
        connection.request('GET', '/health')
        return connection.getresponse().status
    except ConnectionRefusedError:
        return 0
    finally:
        connection.close()


@pytest.fixture
def rig():
    """Return the rig of an unconfigured node, and its HTTP port."""
    port = free_port()
    with new_rig(**{'http.port': port}) as rig:
        rig.port = port
        yield rig


def test_listens_while_the_node_is_configured(rig):
    assert health(rig.port) == 0
    rig.loader.go.clear()
    configuring = rig.begin('configure')
    rig.wait(lambda: health(rig.port) == 503)       # while the model loads
    rig.loader.go.set()
    assert rig.result(configuring).success
    assert health(rig.port) == 503
    assert rig.change('activate')
    assert health(rig.port) == 200
    assert rig.change('deactivate')
    assert health(rig.port) == 503
    assert rig.change('activate', 'deactivate', 'cleanup')
    assert health(rig.port) == 0
    assert rig.set(model__path='bad')[0]
    assert not rig.change('configure')
    assert health(rig.port) == 0
    assert rig.set(model__path=MODEL)[0] and rig.change('configure', 'shutdown')
    assert health(rig.port) == 0


def test_the_log_lists_the_open_doors(rig, capfd):
    assert rig.change('configure', 'activate')
    action = '' if unavailable else ', /decode/generate'
    assert (f'active: accepts requests on /decode/prompt, /decode/request{action}, '
            f'http://127.0.0.1:{rig.port}/v1\n') in capfd.readouterr().err


def test_configure_fails_if_the_port_is_in_use(rig):
    with socket.create_server(('127.0.0.1', rig.port)):
        assert not rig.change('configure')
        assert rig.state() == 'unconfigured'
        engine = rig.diagnostics('decode: engine')
        assert engine['state'] == 'failed' and f'port {rig.port} of' in engine['message']
        assert not rig.loader.engines               # before anything is loaded
    assert rig.change('configure', 'activate')
    assert rig.diagnostics('decode: engine')['state'] == 'idle'


def test_topics_have_the_requests_of_http_clients(rig):
    assert rig.change('configure', 'activate')
    api = client(rig.port)
    assert [model.id for model in api.models.list().data] == [MODEL]
    answer = api.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == 'HELLO'
    chunks = api.chat.completions.create(model=MODEL, messages=HELLO, stream=True,
                                         extra_body={'id': 'mine'})
    assert ''.join(chunk.choices[0].delta.content or '' for chunk in chunks) == 'HELLO'
    with pytest.raises(openai.BadRequestError):
        api.chat.completions.create(model=MODEL, messages=HELLO, n=2)
    rig.wait(lambda: len(rig.requests()) == 3)  # or `ask` returns the figures of the rejection
    assert rig.ask('by topic')['finish_reason'] == 'stop'
    figures = {each['client_id']: each for each in rig.requests()}
    assert figures[answer.id]['finish_reason'] == figures['mine']['finish_reason'] == 'stop'
    (rejected,) = (each for each in rig.requests() if each['finish_reason'] == 'rejected')
    assert rejected['refusal'] == 'invalid' and 'n is 2' in rejected['message']
    rig.wait(lambda: len(rig.received['accepted']) == 3)
    ids = [json.loads(each.data)['id'] for each in rig.received['accepted']]
    assert ids == [answer.id, 'mine', None]
    texts = [each.data for each in rig.received['response']]
    assert texts == ['HELLO', 'HELLO', 'BY TOPIC']


def test_cancel_by_topic_ends_a_stream(rig):
    assert rig.change('configure', 'activate')
    chunks = client(rig.port).chat.completions.create(
        model=MODEL, messages=[{'role': 'user', 'content': 'ab?'}], stream=True)
    assert next(chunks).choices[0].delta.content == ''
    assert rig.trigger('cancel').message == 'cancelled request 1'
    rig.loader.engines[0].answer.set()
    with pytest.raises(openai.APIError) as raised:
        list(chunks)
    assert raised.value.code == 'cancelled'


def test_does_not_listen_by_default():
    with active_rig() as rig:
        assert rig.node._http is None


def test_signal_ends_a_node_with_open_connections(request):
    """Each stream ends with an error, and idle connections do not delay the exit."""
    port = free_port()
    process = start_node(
        request, 'decode_http', '-p', f'http.port:={port}', stderr=subprocess.PIPE)
    connections = []
    try:
        while health(port) != 200:
            assert process.poll() is None
        connections = [socket.create_connection(('127.0.0.1', port)) for _ in range(3)]
        connections[0].sendall(b'POST /v1/chat/completions HTTP/1.1\r\n')
        chunks = client(port).chat.completions.create(
            model=MODEL, messages=[{'role': 'user', 'content': 200 * 'a'}], stream=True)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match='the node stops answering'):
            list(chunks)
        _, stderr = process.communicate(timeout=60)
    finally:
        for each in connections:
            each.close()
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert [line for line in stderr.splitlines() if not LOG_LINE.match(line)] == []
