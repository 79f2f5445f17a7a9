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

"""Answers of real servers, the node's own HTTP door and transformers', beside the local ones."""

import http.client
from importlib.util import find_spec
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import physai_decode
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import HttpConfig
from physai_decode.config import ModelConfig
from physai_decode.config import RemoteConfig
from physai_decode.host import Host
from physai_decode.http import start_server
from physai_decode.request import Request
import pytest
from worker_rig import Sink
from worker_rig import TIMEOUT_S

BUILTIN = 'builtin:tiny_planner'
FOLDER = Path(physai_decode.__file__).parent / 'models' / 'tiny_planner'
PROMPT = 'Bring me the red cup from the kitchen table, no, the blue one. Then close the box.'
PATIENCE_S = 180.0              # against hangs only


def free_port() -> int:
    """Give a port that nobody has."""
    with socket.create_server(('127.0.0.1', 0)) as found:
        return found.getsockname()[1]


def started(config) -> tuple[Host, Sink]:
    """Give a host that takes requests, and what it tells."""
    sink = Sink()
    host = Host(sink)
    host.load(config, lambda text: None)
    host.start(config)
    return host, sink


def stop(host: Host) -> None:
    """End a host."""
    assert host.stop(TIMEOUT_S)
    host.unload()


def remote(port: int, model: str) -> DecodeConfig:
    """Give the settings for a server on this machine."""
    return DecodeConfig(engine=EngineConfig(name='openai'), remote=RemoteConfig(
        f'http://127.0.0.1:{port}/v1', model, 1e3 * PATIENCE_S, 1e3 * PATIENCE_S))


@pytest.fixture(scope='module')
def near():
    """Give a host on the embedded model, what it tells, and the port of its door."""
    pytest.importorskip('uvicorn')
    pytest.importorskip('prometheus_client')
    port = free_port()
    host, sink = started(DecodeConfig(model=ModelConfig(path=BUILTIN)))
    door = start_server(host, HttpConfig(port=port), lambda *error: None, lambda: 0)
    yield host, sink, port
    door.close()
    stop(host)


@pytest.mark.parametrize('fields', [
    {}, {'response_format': {'type': 'json_object'}}, {'sampling': {'max_new_tokens': 5}},
    {'sampling': {'stop': ('kitchen',)}},
    {'sampling': {'temperature': 1.5, 'top_k': 8, 'seed': 3}},
    {'structured_outputs': {'choice': ['yes', 'no']}}], ids=str)
def test_a_node_asks_another(near, fields):
    """Its answers are those of the other, and so are the counts."""
    host, sink, port = near
    request = Request(PROMPT, **fields)
    there, said = sink.end(host.submit(request))
    far, told = started(remote(port, BUILTIN))
    try:
        assert far.loaded.footprint.max_context == host.loaded.footprint.max_context
        report, text = told.end(far.submit(request))
    finally:
        stop(far)
    assert (text, report.finish_reason) == (said, there.finish_reason)
    assert (report.prompt_tokens, report.server_tokens) == (
        there.prompt_tokens, there.output_tokens)
    assert 0 < report.output_tokens <= there.output_tokens
    assert report.engine == 'openai' and there.engine == 'native'
    assert report.items == there.items


def test_a_request_that_the_other_node_refuses(near):
    far, told = started(remote(near[2], BUILTIN))
    try:
        report, _ = told.end(far.submit(Request(1000 * PROMPT)))
        assert report.finish_reason == 'error' and 'context' in report.message
        report, text = told.end(far.submit(Request(PROMPT)))
        assert report.finish_reason == 'stop' and text.startswith('[')
    finally:
        stop(far)


def test_transformers_serve(near):
    """The same text as the local engine's, from the same weights."""
    missing = [name for name in ('fastapi', 'uvicorn', 'openai', 'accelerate')
               if find_spec(name) is None]
    if missing:
        pytest.skip(f'transformers serve needs {", ".join(missing)}')
    host, sink, _ = near
    _, said = sink.end(host.submit(Request(PROMPT)))
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, '-m', 'transformers.cli.transformers', 'serve', str(FOLDER), '--device',
         'cpu', '--host', '127.0.0.1', '--port', str(port)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    try:
        end_s = time.monotonic() + PATIENCE_S
        while not is_up(port):
            assert process.poll() is None and time.monotonic() < end_s
            time.sleep(0.1)
        far, told = started(remote(port, str(FOLDER)))
        try:
            report, text = told.end(far.submit(Request(PROMPT)))
        finally:
            stop(far)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (report.finish_reason, text) == ('stop', said)
    assert report.engine == 'openai' and report.output_tokens > 10


def is_up(port: int) -> bool:
    """Tell whether a server answers."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=PATIENCE_S)
    try:
        connection.request('GET', '/health')
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
