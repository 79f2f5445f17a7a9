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

"""The node's typed interfaces: ~/generate and ~/stamped_tokens."""

import json
import math

from node_rig import active_rig
from node_rig import Letters
from node_rig import Loader
from node_rig import PATIENCE_S
from physai_decode.ros import cdr
from physai_decode.ros import messages
from physai_decode.ros.interfaces import Generate
from physai_decode.ros.interfaces import Token
from physai_decode.ros.interfaces import unavailable
from physai_decode.ros.node import DecodeNode
from physai_decode.ros.topics import stream_qos
from physai_decode.speech import Manner
from physai_decode.timing import TokenReport
import pytest
from rclpy.action import ActionClient
from rclpy.parameter import Parameter
from rclpy.serialization import deserialize_message

pytestmark = pytest.mark.skipif(bool(unavailable), reason=unavailable)
SUCCEEDED, CANCELED, ABORTED = 4, 5, 6      # of action_msgs/GoalStatus


@pytest.fixture(scope='module')
def rig():
    """Return the rig of an active node, with an action client and ~/stamped_tokens."""
    with active_rig() as rig:
        rig.stamped, rig.feedback = [], []
        rig.probe.create_subscription(
            Token, '/decode/stamped_tokens', rig.stamped.append, stream_qos())
        rig.probe.create_subscription(
            Generate.Impl.FeedbackMessage, '/decode/generate/_action/feedback',
            rig.feedback.append, stream_qos())
        rig.action = ActionClient(rig.probe, Generate, '/decode/generate')
        assert rig.action.wait_for_server(PATIENCE_S)
        yield rig
        rig.action.destroy()


def begin(rig, **fields):
    """Send a goal; returns its handle once it is accepted."""
    return rig.result(rig.action.send_goal_async(Generate.Goal(**fields)))


def feedback(rig, handle):
    """Return the tokens and tool calls in the feedback of a goal so far."""
    # From the topic: rclpy's client drops pending feedback when the result arrives.
    found = [each.feedback for each in rig.feedback
             if bytes(each.goal_id.uuid) == bytes(handle.goal_id.uuid)]
    return ([token for each in found for token in each.tokens],
            [call for each in found for call in each.tool_calls_json])


def stamped(rig):
    """Return the tokens of the request `mine` on ~/stamped_tokens."""
    return [token for token in rig.stamped if token.client_id == 'mine']


def test_serves_a_goal_as_a_request(rig):
    before = len(rig.received['result'])
    handle = begin(rig, id='mine', prompt='hello')
    assert handle.accepted
    answer = rig.result(handle.get_result_async())
    assert (answer.status, answer.result.text, answer.result.finish_reason) == (
        SUCCEEDED, 'HELLO', 'stop')
    rig.wait(lambda: len(feedback(rig, handle)[0]) == 5)
    tokens, _ = feedback(rig, handle)
    assert ''.join(token.text for token in tokens) == 'HELLO'
    assert [token.index for token in tokens] == list(range(5))
    rig.wait(lambda: len(rig.received['result']) > before)
    assert rig.requests()[-1]['client_id'] == 'mine'


def test_cancels_a_goal_within_a_step(rig):
    rig.settle()
    engine, before = rig.loader.engines[0], len(rig.received['tokens'])
    rig.cancels.clear()
    handle = begin(rig, prompt='xx?x')
    rig.wait(lambda: len(rig.received['tokens']) == before + 2)
    rig.result(handle.cancel_goal_async())
    rig.wait(lambda: rig.cancels)           # while the engine is in a step
    engine.answer.set()
    answer = rig.result(handle.get_result_async())
    engine.answer.clear()
    assert (answer.status, answer.result.finish_reason) == (CANCELED, 'cancelled')
    assert answer.result.text in ('XX', 'XX?')


@pytest.mark.parametrize(('fields', 'message'), [
    ({'prompt': ''}, 'the goal has no prompt'), ({'prompt': 'a' * 300}, '300 tokens long'),
    ({'prompt': 'a', 'options_json': '{"top": 1}'}, '"top" is not a field'),
    ({'prompt': 'a', 'messages_json': '[]'}, 'prompt and messages were given')])
def test_rejects_goals_that_it_cannot_serve(rig, fields, message):
    answer = rig.result(begin(rig, **fields).get_result_async())
    assert (answer.status, answer.result.finish_reason) == (ABORTED, 'rejected')
    assert message in answer.result.message


def test_separates_thoughts_and_tool_calls(rig, monkeypatch):
    """They are separate in the feedback, on the topics and in the result."""
    monkeypatch.setattr(Letters, 'manner', Manner('[THINK]', '[/THINK]', (), 'mistral_args'))
    rig.wait(lambda: rig.node.count_subscribers('/decode/stamped_tokens') == 1)
    rig.ask('x' * 20)
    rig.settle()
    before = {name: len(rig.received[name]) for name in ('result', 'response', 'token_stats')}
    rig.stamped.clear()
    tools = [{'type': 'function', 'function': {'name': 'GO'}}]
    prompt = '[think]w\1[/think] ok. [tool_calls]go[args]{"a": 1}'
    handle = begin(rig, id='mine', prompt=prompt, options_json=json.dumps({'tools': tools}))
    answer = rig.result(handle.get_result_async())
    assert (answer.status, answer.result.finish_reason) == (SUCCEEDED, 'tool_calls')
    assert answer.result.text == 'OK.'
    assert answer.result.reasoning_tokens == len('[think]w.[/think]')
    message = json.loads(answer.result.result_json)['choices'][0]['message']
    assert (message['content'], message['reasoning_content']) == ('OK.', 'W\0')
    call, = message['tool_calls']
    assert call['function'] == {'name': 'GO', 'arguments': '{"A": 1}'}
    rig.wait(lambda: len(stamped(rig)) == len(prompt) == len(feedback(rig, handle)[0]))
    for tokens in (stamped(rig), feedback(rig, handle)[0]):
        assert ''.join(token.text for token in tokens) == 'OK.'
        assert ''.join(token.reasoning for token in tokens) == 'W\ufffd'
    rig.wait(lambda: all(len(rig.received[name]) > count for name, count in before.items()))
    assert [json.loads(each) for each in feedback(rig, handle)[1]] == [call]
    assert rig.received['response'][-1].data == 'OK.'
    rig.wait(lambda: len(rig.received['token_stats']) == before['token_stats'] + len(prompt))
    figures = [rig.values(each.status[0])
               for each in rig.received['token_stats'][before['token_stats']:]]
    assert [json.loads(each['tool_calls']) for each in figures
            if each['tool_calls'] != 'n/a'] == [[call]]
    assert rig.values(rig.received['request_stats'][-1].status[0])['finish_reason'] == 'tool_calls'


def test_names_the_action_as_it_is_remapped(rig):
    """The log shows this name. Up to Jazzy, ROS 2 can't remap an action by its name."""
    node = DecodeNode(
        Loader(), name='other', cli_args=['--ros-args', '-r', '~/generate:=/plan/generate'],
        parameter_overrides=[Parameter('autostart', value=False)])
    try:
        name = node._generate.name
        assert name in ('/plan/generate', '/other/generate')
        assert f'{name}/_action/send_goal' in dict(
            node.get_service_names_and_types_by_node('other', '/'))
    finally:
        assert node.close(PATIENCE_S)
        node.destroy_node()


def test_publishes_stamped_tokens(rig):
    rig.wait(lambda: rig.node.count_subscribers('/decode/stamped_tokens') == 1)
    rig.ask('x' * 20)               # meanwhile the node finds the subscriber
    rig.stamped.clear()
    begin(rig, id='mine', prompt='abc')
    rig.wait(lambda: len(stamped(rig)) == 3)
    tokens = stamped(rig)
    assert ''.join(token.text for token in tokens) == 'ABC'
    assert [token.index for token in tokens] == [0, 1, 2]
    assert math.isnan(tokens[0].itl_ms) and tokens[1].itl_ms > 0
    assert tokens[0].header.frame_id == '/decode'
    assert tokens[0].header.stamp.sec > 1.7e9


@pytest.mark.parametrize('node', ['/d', '/decode', '/robot/decode_7'])
@pytest.mark.parametrize('client_id', ['', 'a', 'ab', 'abc', 'abcd', 'abcdefgh'])
@pytest.mark.parametrize('text', ['', 'x', 'äöü', '🙂 '])
def test_rclpy_reads_the_serialised_token(node, client_id, text):
    report = TokenReport(7, 3, 12, text, 40, 2.5, None, None, None, 1.0, 0.4, 3.0, True,
                         client_id=client_id, reasoning=text[::-1])
    data = cdr.StampedToken(node).write(report, text, 1_700_000_000_123_456_789)
    token = deserialize_message(data, Token)
    assert (token.header.stamp.sec, token.header.stamp.nanosec) == (1_700_000_000, 123_456_789)
    assert (token.header.frame_id, token.request_id, token.client_id) == (node, 7, client_id)
    assert (token.index, token.token_id, token.text) == (3, 12, text)
    assert token.reasoning == text[::-1]
    assert (token.itl_ms, token.r_floor, token.deadline_missed) == (2.5, 0.4, True)
    assert math.isnan(token.device_ms)


def test_model_info_names_the_action(rig):
    info = rig.values(rig.received['model_info'][-1].status[0])
    assert info['generate_action'] == messages.GENERATE_ACTION == 'available'
