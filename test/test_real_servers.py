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

"""Answers of real servers (this node's HTTP server, transformers serve) equal the local ones."""

import http.client
from importlib.util import find_spec
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from fake_server import free_port
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


def start(config) -> tuple[Host, Sink]:
    """Start a host, and return it with the sink of its reports."""
    sink = Sink()
    host = Host(sink)
    host.load(config, lambda text: None)
    host.start(config)
    return host, sink


def stop(host: Host) -> None:
    """Stop a host and unload its engine."""
    assert host.stop(TIMEOUT_S)
    host.unload()


def remote_config(port: int, model: str) -> DecodeConfig:
    """Return the settings for a server on this machine."""
    return DecodeConfig(engine=EngineConfig(name='openai'), remote=RemoteConfig(
        f'http://127.0.0.1:{port}/v1', model, 1e3 * PATIENCE_S, 1e3 * PATIENCE_S))


@pytest.fixture(scope='module')
def local():
    """Start a host with the embedded model and an HTTP server; return host, sink and port."""
    pytest.importorskip('uvicorn')
    pytest.importorskip('prometheus_client')
    port = free_port()
    host, sink = start(DecodeConfig(model=ModelConfig(path=BUILTIN)))
    server = start_server(host, HttpConfig(port=port), lambda *error: None, lambda: 0)
    yield host, sink, port
    server.close()
    stop(host)


@pytest.mark.parametrize('fields', [
    {}, {'response_format': {'type': 'json_object'}}, {'sampling': {'max_new_tokens': 5}},
    {'sampling': {'stop': ('kitchen',)}},
    {'sampling': {'temperature': 1.5, 'top_k': 8, 'seed': 3}},
    {'structured_outputs': {'choice': ['yes', 'no']}}], ids=str)
def test_node_as_server_gives_the_same_answer_as_the_host(local, fields):
    """Text, finish reason and counts are the same as on the node itself."""
    host, sink, port = local
    request = Request(PROMPT, **fields)
    expected, answer = sink.end(host.submit(request))
    remote, reports = start(remote_config(port, BUILTIN))
    try:
        assert remote.loaded.footprint.max_context == host.loaded.footprint.max_context
        report, text = reports.end(remote.submit(request))
    finally:
        stop(remote)
    assert (text, report.finish_reason) == (answer, expected.finish_reason)
    assert (report.prompt_tokens, report.server_tokens) == (
        expected.prompt_tokens, expected.output_tokens)
    assert 0 < report.output_tokens <= expected.output_tokens
    assert report.engine == 'openai' and expected.engine == 'native'
    assert report.items == expected.items


def test_node_as_server_rejects_a_prompt_that_is_too_long(local):
    remote, reports = start(remote_config(local[2], BUILTIN))
    try:
        report, _ = reports.end(remote.submit(Request(1000 * PROMPT)))
        assert report.finish_reason == 'error' and 'context' in report.message
        report, text = reports.end(remote.submit(Request(PROMPT)))
        assert report.finish_reason == 'stop' and text.startswith('[')
    finally:
        stop(remote)


def test_transformers_serve_gives_the_local_answer(local):
    """Both decode greedily from the same weights."""
    missing = [name for name in ('fastapi', 'uvicorn', 'openai', 'accelerate')
               if find_spec(name) is None]
    if missing:
        pytest.skip(f'transformers serve needs {", ".join(missing)}')
    host, sink, _ = local
    _, answer = sink.end(host.submit(Request(PROMPT)))
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
        remote, reports = start(remote_config(port, str(FOLDER)))
        try:
            report, text = reports.end(remote.submit(Request(PROMPT)))
        finally:
            stop(remote)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (report.finish_reason, text) == ('stop', answer)
    assert report.engine == 'openai' and report.output_tokens > 10


def is_up(port: int) -> bool:
    """Return whether a server responds."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=PATIENCE_S)
    try:
        connection.request('GET', '/health')
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
