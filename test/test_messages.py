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

"""Reports to messages: keys, numbers, levels."""

from dataclasses import replace
import json

from diagnostic_msgs.msg import DiagnosticArray
from physai_decode.config import DeadlineConfig
from physai_decode.config import DiagnosticsConfig
from physai_decode.engine import Footprint
from physai_decode.request import Call
from physai_decode.roofline import Peak
from physai_decode.roofline import Roofline
from physai_decode.ros import cdr
from physai_decode.ros import messages
from physai_decode.timing import Recorder
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
import pytest
from rclpy.serialization import deserialize_message
from rclpy.serialization import serialize_message
from std_msgs.msg import Float64
from std_msgs.msg import String

FOOTPRINT = Footprint(
    engine='native', model_type='qwen2', dtype='bfloat16', quantization='none', device='cuda:0',
    device_name='NVIDIA L4', device_uuid='GPU-1', cuda_graph='captured', max_context=4096,
    vocab_size=1000, eos_token_ids=(2,), read_weight_bytes=3 * 10**9,
    checkpoint_weight_bytes=4 * 10**9, layers=2, kv_heads=4, head_dim=64, kv_element_bytes=2,
    details={'kernels': 'triton', 'engine': 'other'})
CALLS = (Call('call_1', 'go', {'a': 'ä"'}),)
PEAK = Peak(300e9, 'datasheet')
TOKEN = TokenReport(
    request_id=3, index=1, token_id=17, text='a', context_tokens=40, itl_ms=12.3456789,
    device_ms=None, host_gap_ms=-0.25, publish_ms=0.0000123, floor_ms=10.0, r_floor=0.81,
    bandwidth_gb_s=243.0, deadline_missed=True)


@pytest.mark.parametrize(('value', 'text'), [
    (None, 'n/a'), ('', 'n/a'), ('word', 'word'), (0, '0'), (7, '7'), (10**12, '1000000000000'),
    (True, '1'), (False, '0'), (0.0, '0'), (1.0, '1'), (12.3456789, '12.3457'), (-0.25, '-0.25'),
    (0.0000123, '0.0000123'), (1e-12, '0'), (123456789.5, '123456789.5'),
    (999999.4, '999999'), (999999.5, '999999.5'), (999999.99, '999999.99'), (1e6, '1000000'),
    (0.00009999999, '0.0001'), (-1234567.5, '-1234567.5'),
    (float('nan'), 'n/a'), (float('inf'), 'n/a'), (-float('inf'), 'n/a'), ('a\0b', 'a\ufffdb'),
    ((), 'n/a'), (CALLS, json.dumps([CALLS[0].to_json()]))])
def test_values_are_plain_decimal_numbers(value, text):
    """They have no exponent and no unit; infinity is n/a."""
    assert messages.text_of(value) == text


def test_keys_keep_their_order():
    """Each is a field of a report. Append new ones, because clients rely on the order."""
    assert messages.TOKEN_KEYS == (
        'request_id', 'index', 'token_id', 'context_tokens', 'itl_ms', 'device_ms', 'host_gap_ms',
        'publish_ms', 'floor_ms', 'r_floor', 'bandwidth_gb_s', 'deadline_missed', 'client_id',
        'mask_ms', 'wait_ms', 'reasoning', 'tool_calls', 'pass_tokens')
    assert messages.REQUEST_KEYS == (
        'request_id', 'finish_reason', 'prompt_tokens', 'cached_tokens', 'output_tokens',
        'queue_ms', 'prefill_ms', 'ttft_ms', 'total_ms', 'itl_p50_ms', 'itl_p95_ms', 'itl_p99_ms',
        'itl_max_ms', 'jitter_ms', 'tokens_per_s', 'r_floor_p50', 'deadline_misses',
        'max_consecutive_misses', 'worst_overrun_ms', 'cancel_ms', 'client_id', 'seed', 'items',
        'first_item_ms', 'paced', 'energy_j', 'j_per_token', 'power_w', 'reasoning_tokens',
        'refusal', 'engine', 'fallback', 'server_tokens', 'encode_ms', 'sample_ms',
        'ttft_floor_ms', 'r_ttft', 'pass_tokens')
    assert messages.LATENCY_KEYS == (
        'window_s', 'count', 'itl_p50_ms', 'itl_p95_ms', 'itl_p99_ms', 'itl_max_ms', 'jitter_ms',
        'ttft_last_ms', 'ttft_deadline_ms', 'token_deadline_ms', 'request_deadline_ms',
        'deadline_misses', 'consecutive_misses', 'worst_overrun_ms', 'itl_max_activation_ms',
        'wait_ms', 'paced')


@pytest.mark.parametrize('node', ['decode', 'planner', 'arm/decode'])
def test_name_of_a_status_begins_with_the_node(node, window):
    """As with diagnostic_updater, this distinguishes the statuses of two nodes on one topic."""
    array = deserialize_message(
        cdr.TokenStats(f'/{node}').write(TOKEN, '', 0), DiagnosticArray)
    settings = DiagnosticsConfig()
    statuses = [
        *array.status, messages.request_status(f'/{node}', RequestReport(7, 'stop', '')),
        messages.model_status(f'/{node}', 'x', FOOTPRINT, PEAK, ''),
        messages.latency_status(f'/{node}', window, settings, False, ''),
        messages.latency_status(f'/{node}', None, settings, False, ''),
        messages.bandwidth_status(f'/{node}', window, FOOTPRINT, PEAK, settings, '')]
    assert array.header.frame_id == f'/{node}'
    assert [status.name for status in statuses] == [
        f'{node}: {task}' for task in ('token', 'request', 'model', 'latency', 'latency',
                                       'bandwidth')]


def values(status):
    """Return a status's values by key."""
    return {pair.key: pair.value for pair in status.values}


def test_token_status_has_all_keys_and_values():
    write = cdr.TokenStats('/decode').write
    array = deserialize_message(write(TOKEN, 'a', 5 * 10**9 + 7), DiagnosticArray)
    assert (array.header.stamp.sec, array.header.stamp.nanosec) == (5, 7)
    assert array.header.frame_id == '/decode'
    status, = array.status
    assert (status.name, status.hardware_id) == ('decode: token', '')
    assert (status.level, status.message) == (messages.WARN, 'a')
    assert tuple(pair.key for pair in status.values) == messages.TOKEN_KEYS
    assert values(status) == {
        'request_id': '3', 'index': '1', 'token_id': '17', 'context_tokens': '40',
        'itl_ms': '12.3457', 'device_ms': 'n/a', 'host_gap_ms': '-0.25',
        'publish_ms': '0.0000123', 'floor_ms': '10', 'r_floor': '0.81', 'bandwidth_gb_s': '243',
        'deadline_missed': '1', 'client_id': 'n/a', 'mask_ms': 'n/a', 'wait_ms': 'n/a',
        'reasoning': 'n/a', 'tool_calls': 'n/a', 'pass_tokens': '1'}
    report = replace(TOKEN, index=0, itl_ms=None, deadline_missed=False, client_id='arm 7')
    status, = deserialize_message(write(report, '', 0), DiagnosticArray).status
    assert values(status)['client_id'] == 'arm 7'
    assert (status.level, status.message) == (messages.OK, '')
    assert (values(status)['itl_ms'], values(status)['request_id']) == ('n/a', '3')


@pytest.mark.parametrize('text', ['', 'a', 'ab', 'abc', 'abcd', 'é', '🙂 ж中', 'x' * 70000])
def test_cdr_equals_that_of_rclpy(text):
    """The text has every length modulo the padding; padding bytes may differ."""
    assert deserialize_message(cdr.string(text), String) == String(data=text)
    report = replace(TOKEN, token_id=len(text), reasoning=text,
                     tool_calls=CALLS if len(text) > 2 else ())
    written = cdr.TokenStats(text).write(report, text, 10**18 + 1)
    expected = DiagnosticArray(status=[messages.status(
        f'{text}: token', messages.TOKEN_KEYS, report, message=text, level=messages.WARN)])
    expected.header.frame_id = text
    expected.header.stamp.sec, expected.header.stamp.nanosec = 10**9, 1
    assert deserialize_message(written, DiagnosticArray) == expected
    assert len(written) - len(serialize_message(expected)) in range(4)


@pytest.mark.parametrize('value', [0.0, -1.5, 1e300, 3.14159])
def test_numbers_in_cdr_equal_those_of_rclpy(value):
    assert cdr.float64(value) == serialize_message(Float64(data=value))


@pytest.mark.parametrize(('reason', 'level'), [
    ('stop', messages.OK), ('length', messages.OK), ('cancelled', messages.OK),
    ('preempted', messages.OK), ('deadline', messages.WARN), ('rejected', messages.WARN),
    ('error', messages.ERROR)])
def test_level_of_a_request_follows_its_finish_reason(reason, level):
    """The message is the finish reason and its explanation."""
    status = messages.request_status('/decode', RequestReport(7, reason, 'so it is'))
    assert status.level == level
    assert status.message == f'{reason}: so it is'
    assert messages.request_status('/decode', RequestReport(7, reason, '')).message == reason
    assert tuple(pair.key for pair in status.values) == messages.REQUEST_KEYS
    assert values(status)['itl_p50_ms'] == 'n/a'
    assert values(status)['output_tokens'] == '0'


def test_model_info_has_the_details_of_the_engine():
    """A detail never replaces a key."""
    status = messages.model_status('/decode', 'builtin:x', FOOTPRINT, PEAK, 'NVIDIA L4 GPU-1')
    assert tuple(pair.key for pair in status.values) == (*messages.MODEL_KEYS, 'kernels')
    found = values(status)
    assert found['engine'] == 'native'
    assert found['kernels'] == 'triton'
    assert found['kv_bytes_per_token'] == str(2 * 2 * 4 * 64 * 2)
    assert (found['read_weight_gb'], found['checkpoint_weight_gb']) == ('3', '4')
    assert (found['peak_bandwidth_gb_s'], found['peak_source']) == ('300', 'datasheet')


def test_model_info_has_all_facts():
    """Also those that are not keys, such as the speculation of a fallback."""
    facts = {'fallback': 'builtin:x: native', 'speculation': 'off: a server', 'kernels': 'other'}
    found = values(messages.model_status('/decode', 'x', FOOTPRINT, PEAK, '', facts))
    assert facts.items() <= found.items()


@pytest.fixture
def window():
    """Return the window of a request with one late token, 20 ms apart at a floor of 10 ms."""
    recorder = Recorder(10.0, DeadlineConfig(token_ms=15.0, max_consecutive_misses=3),
                        Roofline(FOOTPRINT, PEAK))
    request = recorder.request(1, 0.0, 0.0)
    request.prompt_tokens = 5
    for index, now_s in enumerate((1.0, 1.01, 1.03)):
        request.token(now_s, index, 'a')
    return recorder.window(1.03)


def test_level_of_latency_shows_misses(window):
    """A miss since the last message is a WARN; too many in a row are an ERROR."""
    settings = DiagnosticsConfig()

    def level(window, late=False):
        status = messages.latency_status('/decode', window, settings, late, 'x')
        assert tuple(pair.key for pair in status.values) == messages.LATENCY_KEYS
        assert status.hardware_id == 'x'
        return status.level

    told = values(messages.latency_status('/decode', window, settings, True, 'x'))
    assert told['deadline_misses'] == '1'
    assert level(None) == messages.OK
    assert level(replace(window, consecutive_misses=0)) == messages.OK
    assert level(replace(window, consecutive_misses=0), late=True) == messages.WARN
    assert level(window) == messages.WARN
    late = replace(window, consecutive_misses=3, miss_limit_reached=True)
    assert level(late) == messages.ERROR
    assert messages.latency_status('/decode', late, settings, True, 'x').message == (
        '3 tokens in a row were late: itl_p50_ms is 15, deadline.token_ms 15 unless the request '
        'sets its own')
    own = replace(late, token_deadline_ms=None)
    assert messages.latency_status('/decode', own, settings, True, 'x').message == (
        '3 tokens in a row were late, by the deadlines of their requests')
    slow = replace(late, itl_p50_ms=1234.5, token_deadline_ms=1000.0)
    assert 'itl_p50_ms is 1234, deadline.token_ms 1000 unless' in messages.latency_status(
        '/decode', slow, settings, True, 'x').message


def test_bandwidth_warns_below_the_limit(window):
    """Unknown figures are n/a."""
    def status(window, footprint=FOOTPRINT, peak=PEAK, warn=0.0):
        status = messages.bandwidth_status(
            '/decode', window, footprint, peak, DiagnosticsConfig(warn_r_floor=warn), 'x')
        assert tuple(pair.key for pair in status.values) == messages.BANDWIDTH_KEYS
        return status

    found = values(status(window))
    assert (found['weight_gb'], found['peak_bandwidth_gb_s']) == ('3', '300')
    assert float(found['r_floor']) == pytest.approx(0.75, rel=1e-3)
    assert status(window).level == messages.OK
    assert status(window, warn=0.99).level == messages.WARN
    no_floor = replace(PEAK, no_floor='the weights fit the cache')
    assert status(None, peak=no_floor).level == messages.OK
    warned = status(None, peak=no_floor, warn=0.5)
    assert warned.level == messages.WARN
    assert warned.message.endswith('there is no r_floor: the weights fit the cache')
    remote = replace(FOOTPRINT, layers=0)
    assert status(None, remote, warn=0.5).message.endswith('there is no r_floor: a server decodes')
    assert status(window, remote, warn=0.5).level == messages.OK        # of the fallback
    assert status(window, remote, warn=0.99).message == 'r_floor 0.750 is below 0.99'
    nothing = values(status(None, None, Peak(None, 'unknown')))
    assert nothing.pop('peak_source') == 'unknown'
    assert set(nothing.values()) == {'n/a'}


@pytest.mark.parametrize(('changes', 'cause'), [
    ({'wait_ms': 90.0, 'paced': True}, 'pacing'), ({'wait_ms': 90.0, 'paced': False}, 'bytes'),
    ({'itl_p99_ms': 90.0}, 'a neighbour'), ({'itl_p99_ms': 90.0, 'drafted': True}, 'bytes'),
    ({'best_r_floor': 3.0}, 'a neighbour'),
    ({'best_r_floor': 3.0, 'drafted': True}, 'bytes'),
    ({'floor_ms': 1.0, 'draft_ms': 8.0, 'drafted': True}, 'drafts')])
def test_verdict_is_about_the_current_pace_and_about_single_steps(window, changes, cause):
    """The tokens of one pass have a part of its time, and passes take longer than steps."""
    window = replace(window, **{'count': 100, 'floor_ms': 0.6 * window.itl_p50_ms,
                                'host_gap_ms': 0.0, **changes})
    verdict = values(messages.bandwidth_status(
        '/decode', window, FOOTPRINT, PEAK, DiagnosticsConfig(), 'x'))['verdict']
    assert verdict.startswith(f'{cause}: ')


@pytest.mark.parametrize(('footprint', 'advice'), [
    (FOOTPRINT, 'use a smaller model'),
    (replace(FOOTPRINT, slow_format=True), 'such as GPTQ of four bits'),
    (replace(FOOTPRINT, details={'kernels': 'torch'}), 'install a Triton'),
    (replace(FOOTPRINT, engine='transformers', details={}), 'engine.name: native with Triton'),
    (None, 'try engine.name: native')])
def test_advice_of_the_verdict_fits_the_engine(window, footprint, advice):
    slow = replace(window, floor_ms=0.1, best_r_floor=None, host_gap_ms=0.0)
    found = values(messages.bandwidth_status(
        '/decode', slow, footprint, PEAK, DiagnosticsConfig(), 'x'))['verdict']
    assert found.startswith('kernels: ')
    assert advice in found
