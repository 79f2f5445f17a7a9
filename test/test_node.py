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

"""The node over ROS: lifecycle, topics, services, diagnostics, bad input, engines that fail."""

from contextlib import contextmanager
from dataclasses import replace
import gc
import json
import threading
import time

from diagnostic_msgs.msg import DiagnosticArray
from node_rig import CONTEXT
from node_rig import EchoEngine
from node_rig import Letters
from node_rig import PATIENCE_S
from node_rig import Rig
from node_rig import rigs
from node_rig import ros  # noqa: F401
from physai_decode.config import ConfigError
from physai_decode.config import shown
from physai_decode.decode_loop import Step
from physai_decode.gap import TOKENS
from physai_decode.host import Host
from physai_decode.host import Loaded
from physai_decode.roofline import Peak
from physai_decode.ros import messages
from physai_decode.ros.topics import latched_qos
from physai_decode.ros.topics import stream_qos
from physai_decode.worker import Worker
import pytest
from rosgraph_msgs.msg import Clock
from std_srvs.srv import Trigger

LONG = 10**6                    # tokens


@pytest.fixture
def make():
    """Return a factory of rigs, which are closed after the test."""
    with rigs(Rig) as make:
        yield make


@pytest.fixture
def rig(make):
    """Return the rig of an active node."""
    rig = make()
    assert rig.change('configure', 'activate')
    return rig


def test_one_request_on_every_topic(rig):
    """The messages agree with each other and have all keys."""
    stats = rig.ask('hello')
    rig.wait(lambda: len(rig.received['token_stats']) == 5 and rig.received['response'])
    rig.wait(lambda: len(rig.received['tokens']) == 5 and len(rig.received['itl_ms']) == 4
             and len(rig.received['r_floor']) == 4)
    assert [message.data for message in rig.received['tokens']] == list('HELLO')
    assert [message.data for message in rig.received['response']] == ['HELLO']
    tokens = [array.status[0] for array in rig.received['token_stats']]
    assert [status.message for status in tokens] == list('HELLO')
    for index, status in enumerate(tokens):
        assert status.name == 'decode: token'
        assert tuple(pair.key for pair in status.values) == messages.TOKEN_KEYS
        values = rig.values(status)
        assert values['index'] == str(index)
        assert values['token_id'] == str(ord('HELLO'[index]))
        assert values['context_tokens'] == str(5 + index)
    first, second = rig.values(tokens[0]), rig.values(tokens[1])
    assert first['itl_ms'] == first['r_floor'] == first['publish_ms'] == 'n/a'
    # One megabyte and six tokens of keys and values at 1 GB/s.
    assert float(second['floor_ms']) == pytest.approx((1e6 + 6 * 2 * 64 * 4) / 1e9 * 1e3, rel=1e-4)
    assert float(second['itl_ms']) == pytest.approx(rig.received['itl_ms'][0].data, rel=1e-4)
    assert float(second['r_floor']) == pytest.approx(rig.received['r_floor'][0].data, rel=1e-4)
    assert float(second['publish_ms']) > 0
    assert stats['finish_reason'] == stats['message'] == 'stop'
    assert (stats['prompt_tokens'], stats['output_tokens']) == ('5', '5')
    status = rig.received['request_stats'][0].status[0]
    assert status.name == 'decode: request'
    assert tuple(pair.key for pair in status.values) == messages.REQUEST_KEYS


def test_model_info_reaches_late_subscribers(rig):
    """A subscriber that starts later receives it once."""
    rig.wait(lambda: rig.received['model_info'])
    info = rig.values(rig.received['model_info'][0].status[0])
    assert info['engine'] == 'echo'
    assert info['peak_bandwidth_gb_s'] == '1'
    assert info['device_uuid'] == 'n/a'


def test_repeated_lifecycle_rounds(rig):
    """Each round closes its engine, and request ids continue to increase."""
    assert rig.ask('a')['request_id'] == '1'
    assert rig.change('deactivate', 'activate')
    assert rig.ask('b')['request_id'] == '2'
    assert rig.change('deactivate', 'cleanup')
    assert rig.loader.engines[0].closed
    assert rig.change('configure', 'activate')
    assert rig.ask('c')['request_id'] == '3'
    assert rig.change('shutdown')
    assert rig.loader.engines[1].closed
    assert rig.state() == 'finalized'
    assert rig.diagnostics('decode: engine')['requests'] == '3'
    assert 'restart its process' in rig.ask('d')['message']


def test_model_info_after_cleanup(rig):
    """A later subscriber receives a message that nothing is loaded."""
    assert rig.change('deactivate', 'cleanup')
    rig.wait(lambda: len(rig.received['model_info']) == 2)
    late = []
    subscription = rig.probe.create_subscription(
        DiagnosticArray, '/decode/model_info', late.append, latched_qos())
    rig.wait(lambda: late)
    rig.probe.destroy_subscription(subscription)
    info = rig.values(late[0].status[0])
    assert info['message'] == 'nothing is loaded'
    assert info.pop('generate_action') == messages.GENERATE_ACTION  # depends on the machine
    assert {info[key] for key in messages.MODEL_KEYS if key != 'generate_action'} == {'n/a'}


@pytest.mark.parametrize('name', ['cancel', 'reset', 'measure_gap'])
def test_answers_every_call_of_a_burst(rig, name):
    """The client sends all calls without waiting for a response."""
    client = rig.probe.create_client(Trigger, f'/decode/{name}', qos_profile=stream_qos())
    assert client.wait_for_service(PATIENCE_S)
    answers = [client.call_async(Trigger.Request()) for _ in range(200)]
    rig.wait(lambda: all(answer.done() for answer in answers))
    assert rig.ask('hi')['finish_reason'] == 'stop'


def test_answers_every_prompt_of_a_burst(make):
    """A cancel ends all queued prompts."""
    rig = make(**{'queue.size': 1000})
    assert rig.change('configure', 'activate')
    for _ in range(300):
        rig.ask_later('?')
    rig.wait(lambda: rig.diagnostics('decode: engine')['requests'] == '300')
    rig.trigger('cancel')
    rig.loader.engines[0].answer.set()
    rig.wait(lambda: len(rig.received['request_stats']) == len(rig.received['response']) == 300)
    assert {request['finish_reason'] for request in rig.requests()} == {'cancelled'}


def test_rejects_prompts_unless_active(make):
    """It rejects them before activation and after deactivation."""
    rig = make()
    assert 'unconfigured: configure and activate' in rig.ask('a')['message']
    assert rig.change('configure', 'activate')
    assert rig.ask('b')['finish_reason'] == 'stop'
    assert rig.change('deactivate')
    rejected = rig.ask('c')
    assert rejected['finish_reason'] == 'rejected'
    assert 'inactive: activate' in rejected['message']
    assert [request['request_id'] for request in rig.requests()] == ['1', '2', '3']
    rig.wait(lambda: rig.received['response'])
    assert len(rig.received['response']) == 1
    status = rig.diagnostics('decode: engine')
    assert (status['requests'], status['refusals']) == ('3', '2')


@pytest.mark.parametrize(('text', 'words'), [
    ('', 'empty'), ('x' * CONTEXT, f'{CONTEXT} tokens')])
def test_rejects_a_prompt_that_it_cannot_answer(rig, text, words):
    """~/request_stats has the reason, and the next prompt is answered."""
    rejected = rig.ask(text)
    assert rejected['finish_reason'] == 'rejected'
    assert words in rejected['message']
    assert rejected['level'] == messages.WARN
    assert rig.ask('on')['finish_reason'] == 'stop'


@pytest.mark.parametrize('text', ['ж中🙂é', 'a\nb\tc"', '<|im_end|>', 'مرحبا'])
def test_publishes_text_of_any_script(rig, text):
    """The published text is the text of the engine."""
    rig.ask(text)
    rig.wait(lambda: rig.received['response'] and len(rig.received['tokens']) == len(text))
    assert rig.received['response'][0].data == ''.join(letter.upper() for letter in text)


def test_a_nul_from_the_engine_does_not_cut_the_text(rig):
    """A ROS string cannot contain NUL, so U+FFFD replaces it."""
    rig.ask('a\x01b')
    rig.wait(lambda: rig.received['response'] and len(rig.received['tokens']) == 3)
    assert rig.received['response'][0].data == 'A\ufffdB'
    assert [message.data for message in rig.received['tokens']] == ['A', '\ufffd', 'B']
    assert rig.values(rig.received['token_stats'][1].status[0])['message'] == '\ufffd'


def test_rejects_prompts_if_the_queue_is_full(make):
    """One runs, one waits, the third is rejected."""
    rig = make(**{'queue.size': 1})
    assert rig.change('configure', 'activate')
    rig.ask_later('?')
    rig.wait(lambda: rig.diagnostics('decode: engine')['state'] == 'generating')
    rig.ask_later('b')
    rig.wait(lambda: rig.diagnostics('decode: engine')['queue_depth'] == '1')
    assert 'queue is full' in rig.ask('c')['message']
    rig.loader.engines[0].answer.set()
    rig.wait(lambda: len(rig.requests()) == 3)


def test_preempts_the_running_request(make):
    """A new prompt ends the running one."""
    rig = make(**{'queue.policy': 'preempt'})
    rig.ask('too early')
    assert rig.change('configure', 'activate')
    rig.ask_later('x?x')
    rig.wait(lambda: rig.received['tokens'])
    rig.ask_later('b')
    rig.wait(lambda: rig.node._host.counts['requests'] == 3)
    rig.loader.engines[0].answer.set()
    rig.wait(lambda: len(rig.requests()) == 3)
    assert [request['finish_reason'] for request in rig.requests()] == [
        'rejected', 'preempted', 'stop']
    assert rig.requests()[1]['message'] == 'preempted: request 3 arrived'


def test_cancels_and_resets(rig):
    """A cancel ends running and queued requests; without any, its message says so."""
    assert rig.trigger('cancel').message == 'nothing running'
    for text in ('x?x', 'b'):
        rig.ask_later(text)
    rig.wait(lambda: rig.received['tokens'])
    rig.wait(lambda: rig.diagnostics('decode: engine')['queue_depth'] == '1')
    assert rig.trigger('cancel').success
    rig.loader.engines[0].answer.set()
    rig.wait(lambda: len(rig.requests()) == 2)
    assert {request['finish_reason'] for request in rig.requests()} == {'cancelled'}
    rig.wait(lambda: len(rig.received['response']) == 2)
    assert 'forgot 0 turns' in rig.trigger('reset').message
    assert rig.change('deactivate')
    assert rig.trigger('cancel').message == 'nothing running'


class GraphEngine(EchoEngine):
    """Pretends to use a CUDA graph; a trial without it waits until the test sets `go`."""

    fails = False

    def __init__(self):
        super().__init__()
        self.footprint = replace(self.footprint, cuda_graph='captured')
        self.begun = threading.Event()
        self.go = threading.Event()

    @contextmanager
    def trial(self, captured):
        """Wait for `go` if the steps are not to be captured."""
        if not captured:
            self.begun.set()
            assert self.go.wait(PATIENCE_S)
        if self.fails:
            raise MemoryError('the device is full\nsee there')
        yield

    def _echo_upper(self, prompt_ids):
        """Answer a measurement with `TOKENS` letters, and a prompt as `EchoEngine` does."""
        if self.samplings[-1].max_new_tokens == TOKENS:
            prompt_ids = TOKENS * [ord('x')]
        return super()._echo_upper(prompt_ids)


@pytest.fixture
def measured(make):
    """Return the rig of an active node whose step can be measured, and its engine."""
    engine = GraphEngine()
    rig = make(load=lambda config, progress: Loaded(engine, Letters(), Peak(1e9, 'parameter')))
    assert rig.change('configure', 'activate')
    yield rig, engine
    engine.go.set()


def test_measure_gap_blocks_only_prompts(measured):
    """Services and diagnostics still work; the measurement does not count as a request."""
    rig, engine = measured
    rig.ask('hello')
    answer = rig.clients['measure_gap'].call_async(Trigger.Request())
    assert engine.begun.wait(PATIENCE_S)
    assert rig.diagnostics('decode: engine')['state'] == 'generating'
    assert rig.trigger('cancel').message == 'nothing running'
    assert rig.set(sampling__top_k=5) == (True, '')
    rig.ask_later('on')
    rig.wait(lambda: rig.diagnostics('decode: engine')['queue_depth'] == '1')
    assert not answer.done()
    engine.go.set()
    answer = rig.result(answer)
    assert answer.success, answer.message
    assert 'captured is ' in answer.message and 'floor 1.0' in answer.message
    rig.wait(lambda: len(rig.requests()) == 2)
    assert rig.requests()[1]['finish_reason'] == 'stop'
    rig.wait(lambda: rig.diagnostics('decode: latency')['count'] == '5')     # 4 and 1
    status = rig.diagnostics('decode: engine')
    assert (status['state'], status['requests'], status['tokens']) == ('idle', '2', '7')
    rig.wait(lambda: len(rig.received['tokens']) == 7)


def test_rejects_measure_gap_while_generating(measured):
    """The response has the reason, and the request continues."""
    rig, engine = measured
    rig.ask_later('a?b')
    rig.wait(lambda: rig.received['tokens'])
    answer = rig.trigger('measure_gap')
    assert not answer.success
    assert 'request 1 is generating' in answer.message
    engine.answer.set()
    rig.wait(lambda: rig.requests())
    assert rig.requests()[0]['finish_reason'] == 'stop'


def test_deactivation_ends_a_measurement(measured):
    """The response has the reason, and the node can be activated again."""
    rig, engine = measured
    answer = rig.clients['measure_gap'].call_async(Trigger.Request())
    assert engine.begun.wait(PATIENCE_S)
    deactivated = rig.begin('deactivate')
    rig.wait(lambda: rig.state() == 'deactivating')
    engine.go.set()
    answer = rig.result(answer)
    assert not answer.success
    assert 'stops answering' in answer.message
    assert rig.result(deactivated).success
    assert 'inactive: activate it' in rig.trigger('measure_gap').message
    assert rig.change('activate')
    assert rig.trigger('measure_gap').success


def test_reports_a_failed_measurement(measured):
    """The response has the reason in one line, and the node stays active."""
    rig, engine = measured
    engine.fails = True
    answer = rig.trigger('measure_gap')
    assert not answer.success
    assert answer.message == 'not measured: MemoryError: the device is full'
    assert rig.diagnostics('decode: engine')['state'] == 'idle'
    assert rig.ask('on')['finish_reason'] == 'stop'


def test_measure_gap_without_a_graph_or_a_model(rig):
    """The response names decode_bench; without a model, it says to configure the node first."""
    answer = rig.trigger('measure_gap')
    assert not answer.success
    assert 'decode_bench --model builtin:tiny_planner --engines echo' in answer.message
    assert rig.change('deactivate', 'cleanup')
    assert 'configure and activate it first' in rig.trigger('measure_gap').message


def test_stamps_use_the_clock_of_the_node(make):
    """With use_sim_time, a stamp is the time on /clock."""
    rig = make(use_sim_time=True)
    publisher = rig.probe.create_publisher(Clock, '/clock', 10)
    tick = Clock()
    tick.clock.sec = 1000
    rig.wait(lambda: publisher.publish(tick) or rig.node.get_clock().now().nanoseconds)
    assert rig.change('configure', 'activate')
    rig.ask('a')
    rig.wait(lambda: rig.received['token_stats'])
    assert rig.received['token_stats'][0].header.stamp.sec == 1000
    assert rig.received['request_stats'][0].header.stamp.sec == 1000
    rig.wait(lambda: rig.received['accepted'])
    assert json.loads(rig.received['accepted'][0].data)['stamp'] == 1000


def test_clock_messages_do_not_wake_the_executor(make):
    """The node reads the newest message of /clock when it needs a stamp."""
    rig = make(use_sim_time=True)
    publisher = rig.probe.create_publisher(Clock, '/clock', 10)
    rig.wait(publisher.get_subscription_count)
    read, tick = [], Clock()
    subscription, = (each for each in rig.node.subscriptions if each.topic_name == '/clock')
    callback = subscription.callback
    subscription.callback = lambda message: read.append(message) or callback(message)
    before = len(rig.received['diagnostics'])
    for sec in range(1, 1000):
        tick.clock.sec = sec
        publisher.publish(tick)
    rig.wait(lambda: publisher.publish(tick)        # best effort: one can be lost
             or rig.received['diagnostics'][-1].header.stamp.sec == 999)
    # One for each message on /diagnostics, the last of which may not have arrived yet.
    assert 1 <= len(read) <= len(rig.received['diagnostics']) - before + 1
    assert rig.set(use_sim_time=False) == (True, '')
    rig.wait(lambda: rig.received['diagnostics'][-1].header.stamp.sec > 10**9)
    rig.wait(lambda: not publisher.get_subscription_count())


def test_diagnostics_in_every_state(make):
    """Every state has all keys, and unknown values are n/a instead of 0."""
    rig = make()
    names = {'decode: latency': messages.LATENCY_KEYS,
             'decode: bandwidth': messages.BANDWIDTH_KEYS,
             'decode: engine': messages.ENGINE_KEYS}

    def state():
        array = rig.received['diagnostics'][-1]
        assert [status.name for status in array.status] == list(names)
        for status in array.status:
            assert tuple(pair.key for pair in status.values) == names[status.name]
        return rig.diagnostics('decode: engine')['state']

    assert state() == 'unconfigured'
    assert rig.diagnostics('decode: bandwidth')['weight_gb'] == 'n/a'
    assert rig.diagnostics('decode: latency')['deadline_misses'] == 'n/a'
    rig.loader.go.clear()
    answer = rig.begin('configure')
    rig.wait(lambda: state() == 'loading')
    assert rig.diagnostics('decode: engine')['message'] == 'reading'
    rig.loader.go.set()
    assert rig.result(answer).success
    assert state() == 'inactive'
    assert rig.received['diagnostics'][-1].status[0].hardware_id == 'Echo 1'
    assert rig.diagnostics('decode: bandwidth')['weight_gb'] == '0.001'
    assert rig.change('activate')
    assert state() == 'idle'
    status = rig.diagnostics('decode: latency')
    assert (status['count'], status['itl_p50_ms']) == ('0', 'n/a')
    rig.ask_later('ab?c')
    rig.wait(lambda: state() == 'generating')
    rig.loader.engines[0].answer.set()
    rig.wait(lambda: state() == 'idle')
    assert rig.diagnostics('decode: latency')['count'] == '3'
    assert float(rig.diagnostics('decode: bandwidth')['r_floor']) > 0
    status = rig.diagnostics('decode: engine')
    assert (status['requests'], status['tokens'], status['refusals']) == ('1', '4', '0')
    assert float(status['memory_used_gb']) > 0
    assert status['temperature_c'] == 'n/a'
    for transition, after in (('deactivate', 'inactive'), ('cleanup', 'unconfigured'),
                              ('shutdown', 'finalized')):
        assert rig.change(transition)
        assert state() == after


def test_a_correction_of_the_peak_reaches_every_topic(make):
    rig = make(load=lambda config, progress: Loaded(
        EchoEngine(), Letters(), Peak(1e6, 'parameter')))
    assert rig.change('configure', 'activate')
    assert rig.values(rig.received['model_info'][-1].status[0])['peak_source'] == 'parameter'
    rig.ask(100 * 'a')
    rig.wait(lambda: rig.diagnostics('decode: bandwidth')['peak_source'] == 'observed in steps')
    for transition in ('deactivate', 'activate'):
        assert rig.change(transition)
        bandwidth = rig.diagnostics('decode: bandwidth')
        model = rig.values(rig.received['model_info'][-1].status[0])
        for key in ('peak_source', 'peak_bandwidth_gb_s'):
            assert model[key] == bandwidth[key]
        assert float(model['peak_bandwidth_gb_s']) > 1e-3


def test_services_and_parameters_work_while_a_model_loads(make):
    """Prompts are rejected meanwhile."""
    rig = make()
    rig.loader.go.clear()
    answer = rig.begin('configure')
    rig.wait(lambda: rig.diagnostics('decode: engine')['state'] == 'loading')
    assert not rig.change('configure')
    assert not rig.change('cleanup')
    refused = rig.ask('a')
    assert refused['refusal'] == 'inactive'
    assert 'the node is loading (reading): try again when it is active' in refused['message']
    assert rig.set(sampling__top_k=5) == (True, '')
    successful, reason = rig.set(model__path='other')
    assert not successful
    assert reason.endswith('(now: loading); wait until the load ends, then clean up')
    assert rig.trigger('cancel').message == 'nothing running'
    assert not answer.done()
    rig.loader.go.set()
    assert rig.result(answer).success
    assert rig.change('activate')
    assert rig.ask('a')['finish_reason'] == 'stop'


def test_configures_another_model_after_a_failed_load(make):
    """The node stays unconfigured and has the reason on /diagnostics."""
    rig = make(**{'model.path': 'bad'})
    assert not rig.change('configure')
    assert rig.state() == 'unconfigured'
    status = rig.diagnostics('decode: engine')
    assert status['state'] == 'failed'
    assert status['level'] == messages.ERROR
    assert 'bad is no model' in status['message']
    refused = rig.ask('a')
    assert refused['refusal'] == 'inactive'
    assert refused['message'].endswith(
        'bad is no model; fix this and restart the node (or, for a parameter, set it, then '
        'configure and activate)')
    assert rig.set(model__path='good') == (True, '')
    assert rig.change('configure', 'activate')
    assert rig.diagnostics('decode: engine')['state'] == 'idle'
    assert rig.ask('a')['finish_reason'] == 'stop'


def test_reports_the_exception_of_a_transition(make, monkeypatch, capfd):
    """As without a free thread; the node can be configured again."""
    def fail(config):
        raise RuntimeError("can't start new thread")

    rig = make()
    with monkeypatch.context() as patch:
        patch.setattr(rig.node._host, 'start', fail)
        assert not rig.change('configure', 'activate')
    status = rig.diagnostics('decode: engine')
    assert status['state'] == 'failed' and "can't start new thread" in status['message']
    assert "on_activate failed; the node continues: RuntimeError: can't start new thread" in \
        capfd.readouterr().err
    assert rig.change('configure', 'activate')
    assert rig.ask('x')['finish_reason'] == 'stop'


def test_ends_a_request_if_the_engine_raises(rig):
    """The result has the error and the text so far; the next prompt is answered."""
    failed = rig.ask('ab!c')
    assert failed['finish_reason'] == 'error'
    assert 'the engine broke' in failed['message']
    assert failed['level'] == messages.ERROR
    rig.wait(lambda: rig.received['response'])
    assert rig.received['response'][0].data == 'AB'
    status = rig.diagnostics('decode: engine')
    assert (status['state'], status['level']) == ('failed', messages.ERROR)
    assert 'the engine broke' in status['message']
    assert rig.ask('on')['finish_reason'] == 'stop'
    assert rig.diagnostics('decode: engine')['state'] == 'idle'


def test_reports_an_engine_that_hangs(make, monkeypatch):
    """The state is stalled, the node can be deactivated, and recovers with the engine."""
    monkeypatch.setattr('physai_decode.ros.node.STOP_TIMEOUT_S', 0.2)
    rig = make(**{'diagnostics.stall_timeout_s': 0.1})
    assert rig.change('configure', 'activate')
    rig.ask_later('a?b')
    rig.wait(lambda: rig.diagnostics('decode: engine')['state'] == 'stalled')
    assert rig.diagnostics('decode: engine')['level'] == messages.ERROR
    assert rig.change('deactivate')
    rig.wait(rig.requests)
    assert rig.requests()[0]['finish_reason'] == 'error'
    assert not rig.change('activate')
    assert not rig.change('cleanup')
    assert rig.state() == 'inactive'
    assert rig.ask('b')['finish_reason'] == 'rejected'
    assert not rig.loader.engines[0].closed
    rig.loader.engines[0].answer.set()
    rig.wait(lambda: rig.change('activate'))
    assert rig.ask('c')['finish_reason'] == 'stop'
    assert [request['request_id'] for request in rig.requests()] == ['1', '2', '3']


class Endless(EchoEngine):
    """Emits a letter every 10 ms until the request is cancelled."""

    def __init__(self):
        super().__init__()
        self.footprint = replace(self.footprint, max_context=LONG)

    def _echo_upper(self, prompt_ids):
        while True:
            time.sleep(0.01)
            yield Step((ord('x'),), device_s=1e-6)


def test_deadlines_reach_diagnostics(make):
    """A late token is a WARN, several in a row an ERROR; the limits are set at run time."""
    engine = Endless()
    rig = make(load=lambda config, progress: Loaded(engine, Letters(), Peak(1e9, 'parameter')),
               **{'sampling.max_new_tokens': LONG})
    assert rig.change('configure', 'activate')
    rig.ask_later('x')
    rig.wait(lambda: rig.received['tokens'])
    assert rig.diagnostics('decode: latency')['level'] == messages.OK
    assert rig.set(deadline__max_consecutive_misses=10**6) == (True, '')
    assert rig.set(deadline__token_ms=0.001) == (True, '')
    rig.wait(lambda: rig.diagnostics('decode: latency')['level'] == messages.WARN)
    assert rig.set(deadline__max_consecutive_misses=1) == (True, '')
    rig.wait(lambda: rig.diagnostics('decode: latency')['level'] == messages.ERROR)
    assert any(array.status[0].level == messages.WARN for array in rig.received['token_stats'])
    assert rig.set(deadline__action='truncate', deadline__request_ms=1.0) == (True, '')
    assert rig.set(deadline__request_ms=1.0) == (True, '')
    rig.wait(lambda: rig.requests())
    assert rig.requests()[0]['finish_reason'] == 'deadline'


def test_refusal_by_rclpy_names_the_parameter(rig, capfd):
    successful, reason = rig.set(use_sim_time='yes')
    assert not successful and reason.startswith('use_sim_time: ')
    rig.wait(lambda: 'parameter refused: use_sim_time: ' in capfd.readouterr().err)


def test_applies_all_parameters_of_a_call_or_none(rig):
    """The message for a wrong one has its name, its value and the allowed values."""
    successful, reason = rig.set('set_parameters_atomically',
                                 sampling__temperature=0.5, sampling__top_p=1.5)
    assert not successful
    assert reason == 'sampling.top_p is 1.5: expected 0.0 to 1.0'
    assert rig.node.get_parameter('sampling.temperature').value == 0.0
    assert 'expected a number' in rig.set(sampling__temperature='warm')[1]
    assert 'expected one of report, truncate' in rig.set(deadline__action='panic')[1]
    assert 'did you mean sampling.temperature?' in rig.set(sampling__temprature=0.5)[1]
    assert '(now: idle); deactivate and clean up first' in rig.set(engine__max_context=64)[1]
    assert rig.set(engine__max_context=4096) == (True, '')       # the current value
    assert rig.set(sampling__temperature=1) == (True, '')        # an integer for a float
    assert rig.node.get_parameter('sampling.temperature').value == 1.0
    assert rig.ask('on')['finish_reason'] == 'stop'
    assert rig.change('deactivate')
    assert '(now: inactive); clean up first' in rig.set(engine__max_context=64)[1]


def test_locked_model_cannot_be_changed(make):
    """Parameters that select the model, and the lock itself, cannot be set in any state."""
    rig = make(**{'model.locked': True, 'model.path': 'mine'})
    locked = {'model.path': 'bad', 'model.revision': 'next', 'model.locked': False,
              'engine.name': 'native', 'engine.max_context': 64, 'chat.system_prompt': 'x',
              'chat.template': 'off', 'speculation.draft_model': 'bad'}
    for transition in ('configure', 'activate', 'deactivate', 'cleanup'):
        for name, value in locked.items():
            before = rig.node.get_parameter(name).value
            for service in ('set_parameters', 'set_parameters_atomically'):
                done, reason = rig.set(service, **{name: value})
                assert not done
                assert reason == (
                    f'{name} cannot be set to {shown(value)} while the node runs: model.locked is '
                    'true; change it in the params file and restart the node')
            assert rig.node.get_parameter(name).value == before
        assert rig.set('set_parameters_atomically', model__locked=False, model__path='bad')[1]
        assert rig.set(model__path='mine', sampling__top_k=3) == (True, '')
        assert rig.change(transition)
    assert rig.set(queue__size=3) == (True, '')         # not a parameter of the model


def test_locks_the_model_while_unconfigured(make):
    """The lock can be set, but not removed."""
    rig = make()
    assert rig.set(model__path='mine') == (True, '')
    assert rig.set(model__locked=True) == (True, '')
    assert 'model.locked is true' in rig.set(model__locked=False)[1]
    assert 'model.locked is true' in rig.set(model__path='bad')[1]


def test_sampling_parameters_apply_to_the_next_request(rig):
    """A new max_new_tokens shortens the next answer."""
    assert rig.ask('hello')['output_tokens'] == '5'
    assert rig.set(sampling__max_new_tokens=2) == (True, '')
    stats = rig.ask('hello')
    assert (stats['output_tokens'], stats['finish_reason']) == ('2', 'length')


def test_parameters_set_during_a_transition_apply(make, monkeypatch):
    """They apply even if the worker starts with the old values."""
    rig = make()
    start = Worker.start

    def slow_start(worker):
        assert rig.set(sampling__max_new_tokens=2)[0]
        start(worker)

    monkeypatch.setattr(Worker, 'start', slow_start)
    assert rig.change('configure', 'activate')
    assert rig.ask('abc')['output_tokens'] == '2'


def test_keeps_history_until_reset(make):
    """The next prompt contains the earlier turns."""
    rig = make(**{'chat.keep_history': True})
    assert rig.change('configure', 'activate')
    assert rig.ask('ab')['prompt_tokens'] == '2'
    assert rig.ask('c')['prompt_tokens'] == '5'
    assert rig.trigger('reset').success
    assert rig.ask('c')['prompt_tokens'] == '1'


def test_reports_unknown_parameters(make):
    """/diagnostics names them."""
    rig = make(**{'sampling.temprature': 0.5, 'nonsense': 1})
    status = rig.diagnostics('decode: engine')
    assert status['unknown_parameters'] == 'nonsense sampling.temprature'
    assert status['level'] == messages.WARN


def test_is_loading_until_it_is_active(make, monkeypatch):
    """Else ``decode_ask`` would send its request between the load and the activation."""
    start, states = Host.start, []

    def record(host, *arguments):
        states.append((host.state, host.inactive_reason()))
        start(host, *arguments)

    monkeypatch.setattr(Host, 'start', record)
    rig = make(autostart=True)
    rig.wait(lambda: rig.diagnostics('decode: engine')['state'] == 'idle')
    assert states == [
        ('loading', 'the node is loading (activating): try again when it is active')]


def test_wrong_parameter_at_start_is_an_error():
    with pytest.raises(ConfigError, match='sampling.top_p is 7.0: expected 0.0 to 1.0'):
        Rig(**{'sampling.top_p': 7.0})
    gc.collect()                    # free the incomplete node


def test_qos_of_a_publisher_can_be_overridden(make):
    rig = make(**{'qos_overrides./decode/tokens.publisher.reliability': 'best_effort'})
    infos = rig.probe.get_publishers_info_by_topic('/decode/tokens')
    assert infos[0].qos_profile.reliability.name == 'BEST_EFFORT'
    assert rig.diagnostics('decode: engine')['unknown_parameters'] == 'n/a'


def test_qos_of_a_subscription_can_be_overridden(make):
    """The name of the parameter contains the resolved topic."""
    rig = make(**{'qos_overrides./decode/prompt.subscription.depth': 7,
                  'qos_overrides./decode/request.subscription.reliability': 'best_effort'})
    for topic, reliability in (('prompt', 'RELIABLE'), ('request', 'BEST_EFFORT')):
        infos = rig.probe.get_subscriptions_info_by_topic(f'/decode/{topic}')
        assert infos[0].qos_profile.reliability.name == reliability
    assert [end.qos_profile.depth for end in rig.node.subscriptions
            if end.topic_name == '/decode/prompt'] == [7]
    assert rig.diagnostics('decode: engine')['unknown_parameters'] == 'n/a'


def test_limits_log_lines_about_rejections(make, capfd):
    """~/request_stats has each rejection; the log has one line per second."""
    rig = make()
    for _ in range(300):
        rig.ask_later('a')
    rig.wait(lambda: len(rig.received['request_stats']) == 300)
    assert 1 <= capfd.readouterr().err.count('a request is refused') < 30


def test_autostart_configures_and_activates_the_node(make):
    rig = make(autostart=True)
    rig.wait(lambda: rig.state() == 'active')
    assert rig.ask('a')['finish_reason'] == 'stop'
