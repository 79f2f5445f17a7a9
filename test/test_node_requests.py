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

"""Requests by topic: ~/prompt and ~/request are inputs, ~/accepted and ~/result outputs."""

import json

from node_rig import new_rig
from physai_decode.request import parse
from physai_decode.request import Request
from physai_decode.ros.topics import stream_qos
from physai_decode.worker import Cancelled
import pytest
from rclpy.action.server import RCLError
from std_msgs.msg import String


@pytest.fixture(scope='module')
def rig():
    """Return the rig of a node."""
    with new_rig(**{'queue.max_request_bytes': 5000}) as rig:
        rig.request = rig.probe.create_publisher(String, '/decode/request', stream_qos())
        rig.wait(rig.request.get_subscription_count)
        yield rig


@pytest.fixture
def active(rig):
    """Activate the node, and clear all received messages."""
    assert rig.change('configure', 'activate')
    rig.settle()
    for messages in rig.received.values():
        messages.clear()
    yield rig
    assert rig.change('deactivate', 'cleanup')


def send(rig, value):
    """Publish a value on ~/request; returns the next result."""
    count = len(rig.received['result'])
    rig.request.publish(String(data=value if type(value) is str else json.dumps(value)))
    rig.wait(lambda: len(rig.received['result']) > count)
    return json.loads(rig.received['result'][count].data)


def test_result_is_a_chat_completion(active):
    result = send(active, {'id': 'mine', 'prompt': 'hello', 'seed': 7})
    assert (result['id'], result['object']) == ('mine', 'chat.completion')
    assert result['model'] == 'builtin:tiny_planner'
    assert result['created'] > 1.7e9
    (choice,) = result['choices']
    assert choice == {'index': 0, 'finish_reason': 'stop', 'message': {
        'role': 'assistant', 'content': 'HELLO', 'reasoning_content': None, 'tool_calls': []}}
    assert result['usage'] == {
        'prompt_tokens': 5, 'completion_tokens': 5, 'total_tokens': 10,
        'prompt_tokens_details': {'cached_tokens': 0},
        'completion_tokens_details': {'reasoning_tokens': 0}}
    figures = result['physai']
    assert (figures['finish_reason'], figures['seed'], figures['request_id']) == ('stop', 7, 1)
    assert figures['total_ms'] >= figures['ttft_ms'] > 0
    assert figures['cancel_ms'] is None


def test_token_and_request_stats_have_the_client_id(active):
    send(active, {'id': 'mine', 'prompt': 'ab'})
    active.ask('cd')
    active.wait(lambda: len(active.received['token_stats']) == 4)
    assert [active.values(array.status[0])['client_id']
            for array in active.received['token_stats']] == ['mine', 'mine', 'n/a', 'n/a']
    assert [each['client_id'] for each in active.requests()] == ['mine', 'n/a']


def test_prompt_has_a_result_without_an_id(active):
    active.ask('hello')
    active.wait(lambda: active.received['result'])
    result = json.loads(active.received['result'][0].data)
    assert (result['id'], result['choices'][0]['message']['content']) == (None, 'HELLO')


def test_warns_of_a_json_request_on_the_wrong_topic(active, capfd):
    """It is plain text there, so the model reads the braces."""
    active.ask('{"prompt": "a"}')
    active.wait(lambda: active.received['result'])
    result = json.loads(active.received['result'][0].data)
    assert result['choices'][0]['message']['content'] == '{"PROMPT": "A"}'
    active.wait(lambda: 'send requests to ~/request' in capfd.readouterr().err)


@pytest.mark.parametrize(('value', 'id_', 'message'), [
    ('hello', None, 'the request is not valid JSON'), ('hello', None, '; plain text goes to ~/p'),
    ({'id': 'x', 'prompt': 'a', 'temperature': 'hot'}, 'x', 'temperature is "hot"'),
    ({'id': 'x', 'prompt': 'a', 'top': 1}, 'x', '"top" is not a field of a request'),
    ({'id': 'x', 'prompt': 'a', 'temperature': 10**400}, 'x', 'temperature is 1000'),
    ({'id': 'x', 'prompt': 'a', 'deadline': {'\ud800': 1}}, 'x', r'"deadline.\ud800" is no'),
    ('{"seed": ' + '9' * 4500 + '}', None, 'is too large for a number'),
    ({'id': 'x'}, 'x', 'none was given'),
    ({'prompt': 'a' * 6000}, None, 'the request has more than 5000 bytes'),
    ({'id': 'x', 'prompt': ''}, 'x', 'the prompt is empty'),
    ({'id': 'x', 'prompt': 'a' * 300}, 'x', '300 tokens long'),
    ({'id': 'x', 'prompt': 'a!'}, 'x', 'the engine broke')])
def test_result_of_a_wrong_request_has_the_reason(active, value, id_, message):
    result = send(active, value)
    assert result['id'] == id_
    assert result['choices'][0]['finish_reason'] is None
    assert message in result['physai']['message']
    assert send(active, {'id': 'x', 'prompt': 'ok'})['choices'][0]['message']['content'] == 'OK'
    assert len(active.received['result']) == 2


def test_the_log_has_the_id_of_a_refused_request(rig, capfd):
    """It has at most one line a second."""
    rig.wait(lambda: send(rig, {'id': 'x', 'prompt': 'a'}) and (
        "a request 'x' is refused: the node is unconfigured" in capfd.readouterr().err))


def test_the_log_has_the_id_of_a_failed_request(active, capfd):
    send(active, {'id': 'x', 'prompt': 'a!'})
    active.wait(lambda: "a request 'x' failed: " in capfd.readouterr().err)


def test_rejection_by_an_inactive_node_has_the_id(rig):
    result = send(rig, {'id': 'x', 'prompt': 'a'})
    assert (result['id'], result['physai']['finish_reason']) == ('x', 'rejected')
    assert result['usage'] == {
        'prompt_tokens': None, 'completion_tokens': 0, 'total_tokens': None,
        'prompt_tokens_details': {'cached_tokens': None},
        'completion_tokens_details': {'reasoning_tokens': 0}}
    assert 'the node is unconfigured' in result['physai']['message']


def test_request_ids_increase_over_rejections_and_activations(active):
    before = send(active, {'prompt': 'a'})['physai']['request_id']
    assert send(active, 'nonsense')['physai']['request_id'] == before + 1
    assert send(active, {'prompt': 'a'})['physai']['request_id'] == before + 2
    assert active.change('deactivate')
    assert send(active, {'prompt': 'a'})['physai']['request_id'] == before + 3
    assert active.change('activate')
    assert send(active, {'prompt': 'a'})['physai']['request_id'] == before + 4


def test_logs_a_cancel_of_an_unknown_id(active, capfd):
    """It has no result."""
    active.cancels.clear()
    active.request.publish(String(data=json.dumps({'id': 'nobody', 'cancel': True})))
    assert send(active, {'id': 'next', 'prompt': 'a'})['id'] == 'next'
    assert active.cancels == [Cancelled()]
    assert "nothing to cancel: no request 'nobody' is running" in capfd.readouterr().err


def test_cancels_by_id(active):
    for name in ('running', 'waiting'):
        active.request.publish(String(data=json.dumps({'id': name, 'prompt': 'xx?x'})))
    active.wait(lambda: len(active.received['tokens']) == 2)
    ended = send(active, {'id': 'waiting', 'cancel': True})
    assert (ended['id'], ended['physai']['finish_reason']) == ('waiting', 'cancelled')
    active.cancels.clear()
    active.request.publish(String(data=json.dumps({'id': 'running', 'cancel': True})))
    active.wait(lambda: active.cancels)     # while the engine is in a step
    active.loader.engines[-1].answer.set()
    active.wait(lambda: len(active.received['result']) == 2)
    ended = json.loads(active.received['result'][1].data)
    assert (ended['id'], ended['physai']['finish_reason']) == ('running', 'cancelled')
    assert ended['physai']['cancel_ms'] >= 0
    assert len(active.received['result']) == 2


def test_accepted_repeats_the_request(active):
    asked = {'id': 'mine', 'messages': [{'role': 'user', 'content': 'a\0b'}], 'temperature': 0.5}
    send(active, asked)
    active.ask('plain')
    send(active, {'prompt': ''})
    active.wait(lambda: len(active.received['accepted']) == 2)
    first, second = (json.loads(message.data) for message in active.received['accepted'])
    assert (first['id'], first['request']) == ('mine', asked)
    assert second['id'] is None
    assert parse(json.dumps(second['request'])) == Request('plain')
    assert second['request_id'] == first['request_id'] + 1
    assert second['stamp'] >= first['stamp'] > 1.7e9


def test_result_with_nul_and_lone_surrogates(active):
    assert send(active, {'prompt': 'a\x01'})['choices'][0]['message']['content'] == 'A\0'


def test_a_message_that_can_not_be_sent_does_not_end_the_request(active, monkeypatch):
    """As on a busy machine, if a parameter sets the depth of a topic to 1."""
    def fail(message):
        raise RCLError('cannot publish data')

    for publisher in active.node.publishers:
        if publisher.topic_name in ('/decode/tokens', '/decode/accepted', '/decode/response'):
            monkeypatch.setattr(publisher, 'publish', fail)
    before = active.node.faults.count
    figures = send(active, {'prompt': 'abc'})['physai']
    assert (figures['finish_reason'], figures['output_tokens']) == ('stop', 3)
    assert active.node.faults.count == before + 5       # accepted, 3 tokens and response
