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

"""The action ~/generate on a scripted host: goals, feedback, cancel, and every kind of end."""

from collections import deque
from itertools import count
import json
import math
import subprocess
import sys
import threading
import time

from action_msgs.msg import GoalStatus
from node_rig import rigs
from node_rig import ros  # noqa: F401
from physai_decode.config import DecodeConfig
from physai_decode.request import RequestError
from physai_decode.ros import generate
from physai_decode.ros.topics import stream_qos
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
import pytest
from rclpy.action import ActionClient
from rclpy.executors import MultiThreadedExecutor
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger
from worker_rig import wait_for

PATIENCE_S = 120.0              # against hangs only
STEP_S = 0.002
GOALS = 100
needs_msgs = pytest.mark.skipif(bool(generate.unavailable), reason=generate.unavailable)
if not generate.unavailable:
    from physai_decode_msgs.action import Generate
    from physai_decode_msgs.msg import Deadline
    from physai_decode_msgs.msg import Pace
    from physai_decode_msgs.msg import Sampling


class ScriptedHost:
    """
    Repeats each prompt, one token per character, in its own thread.

    A prompt such as ``deadline: abc`` ends with that finish reason, ``rejected: abc`` before
    ``submit`` returns. A ``*`` is also an element, after which it waits for `go`.
    """

    def __init__(self, step_s: float) -> None:
        self.config = DecodeConfig()
        self.step_s = step_s
        self.go = threading.Event()             # a step waits for it
        self.go.set()
        self.submitted: list = []               # requests
        self.refused: list[tuple[str, str]] = []
        self.cancelled: list[int] = []
        self._numbers = count(1)
        self._queue: deque = deque()
        self._thread = threading.Thread(target=self._decode, daemon=True)
        self._closed = False
        self._thread.start()

    def submit(self, request, received_s=None, listener=None) -> int:
        """Queue a request."""
        assert abs(time.monotonic() - received_s) < PATIENCE_S
        number = next(self._numbers)
        self.submitted.append(request)
        if request.text.startswith('rejected'):
            listener.finished(RequestReport(number, 'rejected', 'the queue is full'), '')
        else:
            self._queue.append((number, request, listener))
        return number

    def refuse(self, message, client_id='', listener=None) -> int:
        """Reject a wrong request."""
        number = next(self._numbers)
        self.refused.append((message, client_id))
        listener.finished(RequestReport(number, 'rejected', message), '')
        return number

    def cancel(self, number=None) -> str:
        """Record which request to end."""
        self.cancelled.append(number)
        for waiting in [each for each in self._queue if each[0] == number]:
            self._queue.remove(waiting)
            waiting[2].finished(RequestReport(number, 'cancelled', ''), '')
        return ''

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self.go.set()
        self._thread.join()

    def _decode(self) -> None:
        while not self._closed:
            if not self._queue:
                time.sleep(1e-4)
                continue
            number, request, listener = self._queue.popleft()
            text = request.text
            reason, said = (text.partition(':')[0] if ':' in text else 'stop'), ''
            for index, letter in enumerate(text):
                time.sleep(self.step_s)
                assert self.go.wait(PATIENCE_S)
                if number in self.cancelled:
                    reason = 'cancelled'
                    break
                said += letter
                listener.token(TokenReport(
                    number, index, ord(letter), letter, index, None if index == 0 else 2.5, 1.5,
                    None, None, None, None if index == 0 else 0.5, None, index == 3,
                    request.client_id))
                if letter == '*':
                    self.go.clear()
                    listener.item(ItemReport(number, request.client_id, index, '', 1.5, '"ü"'))
            listener.finished(RequestReport(
                number, reason, '', prompt_tokens=len(text), cached_tokens=0,
                output_tokens=len(said), ttft_ms=4.5), said)


class Goal:
    """The state of one goal at its client."""

    def __init__(self) -> None:
        self.batches: list[list] = []           # of tokens
        self.items: list[dict] = []
        self.handle = None
        self.result = None
        self.status = GoalStatus.STATUS_UNKNOWN

    @property
    def text(self) -> str:
        """The text of all feedback so far."""
        return ''.join(token.text for batch in self.batches for token in batch)


class Client:
    """A plain action client."""

    def __init__(self, name: str) -> None:
        self.node = Node(name)
        # rclpy's own depth of 10 holds the answers to all clients.
        self.client = ActionClient(
            self.node, Generate, '/decode/generate', goal_service_qos_profile=stream_qos(),
            result_service_qos_profile=stream_qos(), feedback_sub_qos_profile=stream_qos())
        self.sent: dict[bytes, list] = {}       # the tokens of all goals, of all clients
        self.node.create_subscription(
            Generate.Impl.FeedbackMessage, '/decode/generate/_action/feedback', self._hear,
            stream_qos())
        self.trigger = self.node.create_client(Trigger, '/decode/ping')
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self.executor.spin)
        self.thread.start()
        wait_for(self.client.server_is_ready)

    def _hear(self, message):
        self.sent.setdefault(bytes(message.goal_id.uuid), []).extend(message.feedback.tokens)

    def send(self, **fields) -> Goal:
        """Send a goal and request its result."""
        goal = Goal()

        def accepted(future):
            goal.handle = future.result()
            assert goal.handle.accepted
            goal.handle.get_result_async().add_done_callback(ended)

        def ended(future):
            goal.result, goal.status = future.result().result, future.result().status

        def heard(message):
            goal.batches.append(list(message.feedback.tokens))
            goal.items += map(json.loads, message.feedback.items_json)

        def send():
            self.client.send_goal_async(
                Generate.Goal(**fields), heard).add_done_callback(accepted)

        self.executor.create_task(send)
        return goal

    def ask(self, **fields) -> Goal:
        """Send a goal and wait for its end."""
        goal = self.send(**fields)
        wait_for(lambda: goal.result)
        return goal

    def tokens(self, goal: Goal, count: int) -> list:
        """
        Return all tokens of a goal that has ended, as published on the topic.

        rclpy's own client drops the feedback that it has not handled when a result comes.
        """
        key = bytes(goal.handle.goal_id.uuid)
        wait_for(lambda: len(self.sent.get(key, [])) >= count)
        return self.sent.pop(key)

    def cancel(self, goal: Goal) -> None:
        """Cancel a goal that was accepted."""
        wait_for(lambda: goal.handle)
        self.executor.create_task(goal.handle.cancel_goal_async)

    def close(self) -> None:
        """End the thread, then the node."""
        self.executor.shutdown()
        self.thread.join()
        self.client.destroy()
        self.node.destroy_node()


class Rig:
    """A node with the action server, and clients."""

    def __init__(self, step_s: float = STEP_S, threads: int = 3, **arguments) -> None:
        self.host = ScriptedHost(step_s)
        self.node = Node('decode')
        self.server = generate.GenerateServer(self.node, self.host, **arguments)
        self.node.create_service(Trigger, '~/ping', lambda request, response: response)
        self.executor = MultiThreadedExecutor(num_threads=threads) if threads > 1 \
            else SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self.executor.spin)
        self.thread.start()
        self.clients = [Client(f'client_{index}') for index in range(2)]
        self.client = self.clients[0]
        wait_for(lambda: self.node.count_subscribers('/decode/generate/_action/feedback') == 4)

    def close(self) -> None:
        """End all."""
        for client in self.clients:
            client.close()
        self.host.close()
        self.executor.shutdown()
        self.thread.join()
        self.server.close()
        self.node.destroy_node()


@pytest.fixture
def make():
    """Return a factory of rigs, which are closed after the test."""
    with rigs(Rig) as make:
        yield make


@needs_msgs
def test_goal_with_feedback_and_result(make):
    """Tokens come as feedback with their figures, and the result has text, figures and JSON."""
    rig = make()
    before_s = time.time()
    goal = rig.client.ask(id='mine', prompt='hello')
    assert goal.status == GoalStatus.STATUS_SUCCEEDED
    tokens = rig.client.tokens(goal, 5)
    assert ''.join(token.text for token in tokens) == 'hello'
    assert [token.index for token in tokens] == [0, 1, 2, 3, 4]
    assert [token.token_id for token in tokens] == [ord(letter) for letter in 'hello']
    assert {token.client_id for token in tokens} == {'mine'}
    assert {token.request_id for token in tokens} == {1}
    assert {token.header.frame_id for token in tokens} == {'/decode'}
    stamps = [token.header.stamp.sec + 1e-9 * token.header.stamp.nanosec for token in tokens]
    assert before_s < stamps[0] < stamps[1] < stamps[-1] < time.time()
    assert math.isnan(tokens[0].itl_ms) and math.isnan(tokens[0].r_floor)
    assert (tokens[1].itl_ms, tokens[1].device_ms, tokens[1].r_floor) == (2.5, 1.5, 0.5)
    assert [token.deadline_missed for token in tokens] == [False, False, False, True, False]

    result = goal.result
    assert (result.text, result.finish_reason, result.message) == ('hello', 'stop', '')
    assert (result.request_id, result.prompt_tokens, result.output_tokens) == (1, 5, 5)
    assert result.ttft_ms == 4.5 and math.isnan(result.total_ms)
    completion = json.loads(result.result_json)
    assert completion['choices'][0]['message']['content'] == 'hello'
    assert completion['physai']['ttft_ms'] == 4.5


@needs_msgs
@pytest.mark.parametrize(('reason', 'status'), [
    ('stop', 'SUCCEEDED'), ('tool_calls', 'SUCCEEDED'), ('length', 'ABORTED'),
    ('deadline', 'ABORTED'),
    ('preempted', 'ABORTED'), ('cancelled', 'ABORTED'), ('error', 'ABORTED'),
    ('rejected', 'ABORTED')])
def test_status_of_each_end(make, reason, status):
    """Only a complete answer succeeds; half a plan, or a cancel by another client, is aborted."""
    goal = make().client.ask(prompt=f'{reason}: x')
    assert goal.result.finish_reason == reason
    assert goal.status == getattr(GoalStatus, f'STATUS_{status}')
    assert goal.result.text == ('' if reason == 'rejected' else f'{reason}: x')
    assert goal.result.message == ('the queue is full' if reason == 'rejected' else '')


@needs_msgs
@pytest.mark.parametrize(('prompt', 'status'), [
    ('abc', GoalStatus.STATUS_SUCCEEDED), ('deadline: a', GoalStatus.STATUS_ABORTED)])
def test_sends_the_result_if_a_status_can_not_be_sent(make, monkeypatch, prompt, status):
    """As on a busy machine: rclpy raises at the acceptance and at each change of the state."""
    def fail(handle):
        raise generate.RCLError('cannot publish data')

    rig = make()
    monkeypatch.setattr(type(rig.server._server._handle), 'publish_status', fail)
    goal = rig.client.ask(prompt=prompt)
    assert (goal.status, goal.result.text) == (status, prompt)


@needs_msgs
def test_a_goal_ends_if_its_client_does_not_receive_the_response(make, monkeypatch):
    """The client ended early; rclpy would keep the goal for ever."""
    def fail(handle, *arguments):
        raise generate.RCLError('client will not receive response')

    rig = make(result_timeout=1)
    monkeypatch.setattr(type(rig.server._server._handle), 'send_goal_response', fail)
    rig.client.send(prompt='abc')
    wait_for(lambda: rig.host.submitted)
    wait_for(lambda: not rig.server._server._goal_handles)


@needs_msgs
@pytest.mark.skipif(not generate.expires_by_end(), reason='results expire by the time of the node')
def test_results_expire_while_simulated_time_stands_still(make):
    rig = make(result_timeout=1)
    rig.node.set_parameters([Parameter('use_sim_time', value=True)])
    assert rig.client.ask(prompt='abc').result.text == 'abc'
    wait_for(lambda: not rig.server._server._goal_handles)


@needs_msgs
def test_aborts_a_wrong_goal_with_the_reason(make):
    """A rejection of the action has no reason; the host counts the goal as rejected."""
    rig = make()
    goal = rig.client.ask(id='mine', prompt='x', sampling=Sampling(temperature=-0.5))
    assert (goal.status, goal.result.finish_reason) == (GoalStatus.STATUS_ABORTED, 'rejected')
    assert goal.result.message == 'temperature is -0.5: expected 0.0 to 10.0'
    assert goal.result.prompt_tokens == -1
    assert rig.host.refused == [(goal.result.message, 'mine')] and not rig.host.submitted


@needs_msgs
def test_cancels_a_running_goal_within_one_step(make):
    """The status is CANCELED, and the result has the text so far."""
    rig = make(step_s=0.05)
    goal = rig.client.send(prompt='a' * 1000)
    wait_for(lambda: goal.batches)
    rig.host.go.clear()
    rig.client.cancel(goal)
    wait_for(lambda: rig.host.cancelled == [1])     # while the model is in a step
    rig.host.go.set()
    wait_for(lambda: goal.result)
    assert (goal.status, goal.result.finish_reason) == (GoalStatus.STATUS_CANCELED, 'cancelled')
    assert goal.result.text == 'a' * len(goal.result.text) != ''
    assert rig.host.cancelled == [1]


@needs_msgs
def test_cancels_a_queued_goal_alone(make):
    """The goals before and after it are answered."""
    rig = make()
    rig.host.go.clear()
    goals = [rig.client.send(prompt=prompt) for prompt in ('one', 'two', 'three')]
    wait_for(lambda: len(rig.host.submitted) == 3)
    rig.client.cancel(goals[1])
    wait_for(lambda: goals[1].result)
    rig.host.go.set()
    wait_for(lambda: all(goal.result for goal in goals))
    assert [goal.result.text for goal in goals] == ['one', '', 'three']
    assert [goal.status for goal in goals] == [
        GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_CANCELED, GoalStatus.STATUS_SUCCEEDED]


@needs_msgs
def test_cancels_at_any_moment(make):
    """Each goal ends in one of the two possible states."""
    rig = make(step_s=0.0)
    states = set()
    for number in range(50):
        goal = rig.client.send(prompt='x' * (1 + number % 10))
        wait_for(lambda goal=goal: goal.handle)
        time.sleep(number * 1e-4)
        rig.client.cancel(goal)
        wait_for(lambda goal=goal: goal.result)
        states.add((goal.status, goal.result.finish_reason))
    assert states <= {(GoalStatus.STATUS_SUCCEEDED, 'stop'),
                      (GoalStatus.STATUS_CANCELED, 'cancelled')}
    assert not rig.server._goals


@needs_msgs
def test_two_clients_and_many_goals(make):
    """Each client gets its own answers with all feedback in order; no goal stays in memory."""
    rig = make(step_s=0.0003, result_timeout=2)
    for _ in range(GOALS // 20):
        goals = []
        for number in range(10):
            for name, client in enumerate(rig.clients):
                goals.append(client.send(prompt=f'client {name} goal {number} ' + 'x' * 20))
        wait_for(lambda goals=goals: all(goal.result for goal in goals))
        for index, goal in enumerate(goals):
            want = f'client {index % 2} goal {index // 2} ' + 'x' * 20
            assert (goal.result.text, goal.status) == (want, GoalStatus.STATUS_SUCCEEDED)
            sent = rig.clients[index % 2].tokens(goal, len(want))
            assert ''.join(token.text for token in sent) == want
            assert [token.index for token in sent] == list(range(len(want)))
            assert want.startswith(goal.text)
    assert len(rig.host.submitted) == GOALS
    wait_for(lambda: not rig.server._goals)
    wait_for(lambda: not rig.server._server._goal_handles)      # rclpy's own: they have expired


@needs_msgs
def test_feedback_comes_in_batches(make):
    """Tokens of one period come in one message; the end does not wait."""
    rig = make(step_s=0.0, feedback_period_s=PATIENCE_S)
    goal = rig.client.ask(prompt='x' * 1000)
    assert [token.index for token in rig.client.tokens(goal, 1000)] == list(range(1000))
    assert len(goal.batches) <= 3


@needs_msgs
def test_sends_a_complete_element_at_once(make):
    """With the token that completed it at the latest."""
    rig = make(step_s=0.0, feedback_period_s=PATIENCE_S)
    goal = rig.client.send(id='mine', prompt='a*bc*d')
    for number, said in ((1, 'a*'), (2, 'a*bc*')):
        wait_for(lambda number=number: len(goal.items) == number)
        assert goal.text == said
        rig.host.go.set()
    wait_for(lambda: goal.result)
    assert goal.items[1] == {
        'request_id': 1, 'id': 'mine', 'index': 4, 'path': '', 't_ms': 1.5, 'value': 'ü'}
    assert goal.result.text == 'a*bc*d'


@needs_msgs
def test_goals_occupy_no_thread_of_the_executor(make):
    """An executor with one thread serves other calls while goals wait for the model."""
    rig = make(threads=1)
    rig.host.go.clear()
    goals = [rig.client.send(prompt='x') for _ in range(5)]
    wait_for(lambda: len(rig.host.submitted) == 5)
    ping = rig.client.trigger.call_async(Trigger.Request())
    wait_for(ping.done)
    rig.host.go.set()
    wait_for(lambda: all(goal.result for goal in goals))


@needs_msgs
def test_goals_that_end_at_shutdown_get_results(make):
    """Before the action server closes."""
    rig = make()
    rig.host.go.clear()
    goals = [rig.client.send(prompt='x') for _ in range(5)]
    wait_for(lambda: len(rig.host.submitted) == 5)
    rig.host.go.set()
    rig.server.finish(PATIENCE_S)
    rig.server.close()
    assert not rig.server._goals and not rig.server._thread.is_alive()
    assert all(goal.handle for goal in goals)


@needs_msgs
def test_unset_fields_keep_the_parameters():
    """A goal with only a prompt is a request with only a prompt."""
    request = generate.read(Generate.Goal(prompt='x'), 1000)
    assert request.to_json() == {'prompt': 'x'}


@needs_msgs
def test_every_field_reaches_the_request():
    """Typed fields and JSON form one request; zeros are values."""
    sampling = {'temperature': 0.0, 'top_k': 0, 'top_p': 0.5, 'min_p': 0.0,
                'repetition_penalty': 1.5, 'seed': 0, 'max_tokens': 9, 'stop': ['end', 'END']}
    deadline = {'ttft_ms': 0.0, 'token_ms': 20.0, 'request_ms': 3e3, 'action': Deadline.TRUNCATE}
    messages = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u'}]
    options = {'chat_template_kwargs': {'enable_thinking': False}}
    pace = {'tokens_per_s': 0.0}
    assert set(pace) == set(Pace.get_fields_and_field_types())
    assert set(sampling) == set(Sampling.get_fields_and_field_types())
    assert set(deadline) == set(Deadline.get_fields_and_field_types())
    goal = Generate.Goal(
        id='mine', messages_json=json.dumps(messages), options_json=json.dumps(options),
        sampling=Sampling(**sampling), deadline=Deadline(**deadline),
        pace=Pace(**pace))
    wanted = {'id': 'mine', 'messages': messages, **sampling, 'deadline': deadline, 'pace': pace,
              **options}
    assert json.loads(json.dumps(generate.read(goal, 1000).to_json())) == wanted


def sampled(**values):
    """Return a goal with sampling options."""
    return Generate.Goal(prompt='x', sampling=Sampling(**values))


@needs_msgs
@pytest.mark.parametrize(('goal', 'message'), [
    (lambda: Generate.Goal(), 'the goal has no prompt: set prompt, messages_json, or raw_prompt'),
    (lambda: Generate.Goal(options_json='{"top_k": 1}'), 'the goal has no prompt'),
    (lambda: Generate.Goal(prompt='x', messages_json='[]'), 'prompt and messages were given'),
    (lambda: Generate.Goal(messages_json='[}'), 'messages_json is not valid JSON'),
    (lambda: Generate.Goal(messages_json='{}'), 'messages is {}'),
    (lambda: Generate.Goal(prompt='x', options_json='[]'), 'options_json is not a JSON object'),
    (lambda: Generate.Goal(prompt='x', options_json='{"a": 1, "a": 2}'), 'given twice'),
    (lambda: Generate.Goal(prompt='x', options_json='{"prompt": "y"}'),
     'prompt is set in a field of the goal and in options_json'),
    (lambda: Generate.Goal(prompt='x', options_json='{"cancel": true}'), 'is not a field'),
    (lambda: Generate.Goal(prompt='x', id='\n'), 'id is '),
    (lambda: sampled(temperature=math.nan), 'temperature is NaN'),
    (lambda: sampled(max_tokens=0), 'max_tokens is 0'),
    (lambda: Generate.Goal(prompt='x', deadline=Deadline(action='no')), 'deadline.action is'),
    (lambda: Generate.Goal(prompt='x' * 1001), 'more than 1000 bytes'),
    (lambda: Generate.Goal(prompt='x', id='x' * 1001), 'more than 1000 bytes'),
    (lambda: sampled(stop=['x' * 99] * 11), 'more than 1000 bytes')])
def test_rejects_wrong_goals(goal, message):
    """Even if each field is valid by itself."""
    with pytest.raises(RequestError, match=message):
        generate.read(goal(), 1000)


@needs_msgs
@pytest.mark.parametrize('fields', [
    {'prompt': 'x' * 1001}, {'messages_json': '[}'}, {'options_json': '[]'}, {'prompt': ''}])
@pytest.mark.parametrize(('given', 'known'), [('mine', 'mine'), ('a\nb', ''), ('x' * 129, '')])
def test_rejection_has_the_id_of_the_goal(fields, given, known):
    """If the id is valid: it appears unchanged on ~/result and in statuses."""
    with pytest.raises(RequestError) as raised:
        generate.read(Generate.Goal(id=given, **fields), 1000)
    assert raised.value.client_id == known


@needs_msgs
def test_results_have_all_figures_of_a_request():
    """Each figure of a report has a field; None becomes NaN or -1, and NUL does not end a text."""
    report = RequestReport(1, 'rejected', 'a\0b')
    result = generate.result(report, 'c\0d', 'model')
    assert (result.message, result.text) == ('a\ufffdb', 'c\ufffdd')
    for name in RequestReport.__dataclass_fields__:
        if name != 'client_id' and getattr(report, name) is None:
            value = getattr(result, name)
            assert value == -1 or math.isnan(value), name


def test_without_the_package():
    """If it is not built, the module can be imported, and says what to do."""
    command = (
        'import sys\n'
        'sys.modules["physai_decode_msgs"] = None\n'
        'from physai_decode.ros import generate\n'
        'print(not generate.unavailable, generate.unavailable)\n'
        'try:\n'
        '    generate.GenerateServer(None, None)\n'
        'except RuntimeError as error:\n'
        '    print(str(error) == generate.unavailable)')
    result = subprocess.run(
        [sys.executable, '-c', command], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith('False physai_decode_msgs is not built'), result.stderr
    assert 'make msgs' in result.stdout and result.stdout.endswith('True\n')
