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

"""A node whose model runs on a server: topics, local fallback, settings and shutdown."""

import json
import os
import signal
import subprocess
import sys

from fake_server import MODEL
from fake_server import PATIENCE_S
from fake_server import serving
from fake_server import well
from node_rig import Rig
from physai_decode.engines.openai import KEY_VARIABLE
from physai_decode.host import load
from physai_decode.ros.messages import ERROR
from physai_decode.ros.messages import OK
from physai_decode.ros.messages import WARN
import pytest
import rclpy
from std_msgs.msg import String
from test_exit import LOG_LINE

BUILTIN = 'builtin:tiny_planner'
SHAPE = ('vocab_size', 'layers', 'kv_heads', 'head_dim', 'sliding_window', 'read_weight_gb',
         'checkpoint_weight_gb', 'kv_bytes_per_token', 'peak_bandwidth_gb_s', 'dtype', 'device')
NO_FIGURES = ('token_id', 'context_tokens', 'device_ms', 'host_gap_ms', 'floor_ms', 'r_floor',
              'bandwidth_gb_s')


@pytest.fixture
def fake():
    """Return a server that answers each request."""
    with serving() as fake:
        yield fake


@pytest.fixture
def make(fake):
    """Return a factory of nodes that use the server."""
    rigs = []
    rclpy.init()

    def make(**settings):
        rigs.append(Rig(load=load, **{
            'engine.name': 'openai', 'remote.base_url': fake.url, 'remote.model': MODEL,
            'remote.first_token_timeout_ms': 1e3 * PATIENCE_S,
            'remote.token_timeout_ms': 1e3 * PATIENCE_S,
            **{name.replace('__', '.'): value for name, value in settings.items()}}))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
    rclpy.shutdown()


def fail(call, body):
    """Answer with status 500."""
    call.whole(500, {'error': {'message': 'out of memory'}})


@pytest.mark.parametrize(('fallback', 'until'), [
    ('', 'requests end with an error'), (BUILTIN, f'{BUILTIN} answers')])
def test_log_tells_a_server_without_the_model(fake, make, capfd, fallback, until):
    """The node configures nevertheless, because the server may load it later."""
    known, fake.models = fake.models, [{'id': 'a/model'}, {'id': 'b'}]
    rig = make(remote__fallback=fallback)
    assert rig.change('configure')
    logged = capfd.readouterr().err
    assert (f"the server is not ready: {fake.url} has no model '{MODEL}': it has 'a/model', 'b': "
            'set remote.model to one of them, or load it there; until it is, ' + until) in logged
    assert f'is not ready to run {MODEL}' in logged and f'loaded {MODEL}' not in logged
    assert rig.change('cleanup')
    fake.models = known
    assert rig.change('configure', 'activate')
    logged = capfd.readouterr().err
    assert f'loaded {MODEL}' in logged and 'not ready' not in logged
    assert rig.ask('where?')['finish_reason'] == 'stop'


def test_publishes_the_same_topics(fake, make, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, 'secret')
    rig = make(model__path='')
    assert rig.change('configure', 'activate')
    end = rig.ask('where?')
    assert fake.asked[0][1]['Authorization'] == 'Bearer secret'
    assert (end['finish_reason'], end['engine'], end['fallback']) == ('stop', 'openai', 'n/a')
    assert [end[key] for key in ('prompt_tokens', 'output_tokens', 'server_tokens',
                                 'r_floor_p50')] == ['7', '3', '5', 'n/a']
    rig.wait(lambda: len(rig.received['token_stats']) == 3 and rig.received['result']
             and len(rig.received['itl_ms']) == 2)
    assert [each.data for each in rig.received['tokens']] == ['far', ' away', '.']
    assert [each.data for each in rig.received['response']] == ['far away.']
    assert not rig.received['r_floor']
    for array in rig.received['token_stats']:
        values = rig.values(array.status[0])
        assert {values[key] for key in NO_FIGURES} == {'n/a'}
    result = json.loads(rig.received['result'][0].data)
    assert result['model'] == MODEL and result['usage']['completion_tokens'] == 5
    assert result['physai']['engine'] == 'openai' and result['physai']['fallback'] == ''
    model = rig.values(rig.received['model_info'][-1].status[0])
    assert (model['model'], model['engine'], model['max_context']) == (MODEL, 'openai', '8192')
    assert model['base_url'] == fake.url and model['fallback'] == 'n/a'
    assert {model[key] for key in SHAPE} == {'n/a'}
    engine = rig.diagnostics('decode: engine')
    assert (engine['level'], engine['model'], engine['fallbacks']) == (OK, MODEL, '0')
    bandwidth = rig.diagnostics('decode: bandwidth')
    assert {bandwidth[key] for key in ('weight_gb', 'kv_gb', 'floor_ms', 'verdict')} == {'n/a'}
    assert not rig.trigger('measure_gap').success
    assert 'itl_ms' in rig.trigger('measure_gap').message


def test_local_model_answers_if_the_server_fails(fake, make):
    fake.answer = fail
    rig = make(remote__fallback=BUILTIN)
    assert rig.change('configure', 'activate')
    end = rig.ask('Bring me the red cup.')
    assert (end['finish_reason'], end['engine'], end['level']) == ('stop', 'native', WARN)
    assert '500: out of memory' in end['fallback']
    rig.wait(lambda: rig.received['result'])
    result = json.loads(rig.received['result'][0].data)
    assert result['choices'][0]['message']['content'].startswith('[{"action"')
    assert result['physai']['engine'] == 'native'
    model = rig.values(rig.received['model_info'][-1].status[0])
    assert model['fallback'].startswith(f'{BUILTIN}: native, ')
    engine = rig.diagnostics('decode: engine')
    assert (engine['level'], engine['state'], engine['fallbacks']) == (WARN, 'idle', '1')
    assert 'the local model answers' in engine['message']
    fake.answer = well
    assert rig.ask('where?')['engine'] == 'openai'
    engine = rig.diagnostics('decode: engine')
    assert (engine['level'], engine['fallbacks']) == (OK, '1')
    assert rig.change('deactivate', 'activate', 'deactivate', 'cleanup')


def test_node_stays_up_without_a_local_model(fake, make):
    fake.answer = fail
    rig = make()
    assert rig.change('configure', 'activate')
    end = rig.ask('where?')
    assert (end['finish_reason'], end['level']) == ('error', ERROR)
    engine = rig.diagnostics('decode: engine')
    assert (engine['state'], engine['level']) == ('failed', ERROR)
    assert '500: out of memory' in engine['message']
    fake.answer = well
    assert rig.ask('where?')['finish_reason'] == 'stop'


def test_configure_checks_the_settings(fake, make):
    rig = make(remote__base_url='10.0.0.2:8000/v1')
    assert not rig.change('configure')
    engine = rig.diagnostics('decode: engine')
    assert engine['state'] == 'failed' and 'remote.base_url' in engine['message']
    assert rig.set(remote__base_url=fake.url)[0] and rig.set(remote__fallback='builtin:no')[0]
    assert not rig.change('configure')
    assert "'builtin:no'" in rig.diagnostics('decode: engine')['message']
    assert rig.set(remote__fallback='')[0]
    assert rig.change('configure', 'activate')
    assert rig.ask('where?')['finish_reason'] == 'stop'


def test_locked_model_stays_on_its_server(make):
    rig = make(model__locked=True)
    done, reason = rig.set(remote__base_url='http://other/v1')
    assert not done and 'model.locked' in reason


def test_cancels_and_deactivates_while_the_server_hangs(fake, make):
    fake.answer = lambda call, body: call.wait_for_client_to_go()
    rig = make()
    assert rig.change('configure', 'activate')
    rig.ask_later('where?')
    rig.wait(lambda: len(fake.asked) == 1)
    assert rig.trigger('cancel').message == 'cancelled request 1'
    rig.wait(lambda: len(rig.requests()) == 1)
    rig.ask_later('where?')
    rig.wait(lambda: len(fake.asked) == 2)
    assert rig.change('deactivate')
    rig.wait(lambda: len(rig.requests()) == 2)
    assert [each['finish_reason'] for each in rig.requests()] == 2 * ['cancelled']


def test_signal_ends_a_node_whose_server_hangs(fake):
    fake.answer = lambda call, body: call.wait_for_client_to_go()
    process = subprocess.Popen(
        [sys.executable, '-c', 'import sys; from physai_decode.ros.process import main; '
         'sys.exit(main())', '--ros-args', '-r', '__node:=decode_remote', '-p',
         'engine.name:=openai', '-p', f'remote.base_url:={fake.url}', '-p',
         f'remote.model:={MODEL}'],
        stderr=subprocess.PIPE, text=True, env=os.environ)
    rclpy.init()
    node = rclpy.create_node('client')
    try:
        publisher = node.create_publisher(String, '/decode_remote/prompt', 10)
        while not fake.asked:
            assert process.poll() is None
            publisher.publish(String(data='where?'))
            rclpy.spin_once(node, timeout_sec=0.1)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        node.destroy_node()
        rclpy.shutdown()
    assert process.returncode == 0
    assert [line for line in stderr.splitlines() if not LOG_LINE.match(line)] == []
