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

"""examples/controller.py: it sends each action of a plan once, and holds if the plan fails."""

import importlib
import json
from pathlib import Path
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

from node_rig import active_rig
from node_rig import EchoEngine
from node_rig import PATIENCE_S
from node_rig import spin
from physai_decode.result import chat_completion
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
import pytest
from std_msgs.msg import String

EXAMPLE = Path(__file__).resolve().parent.parent / 'examples' / 'controller.py'
ACTIONS = ['{"action": "go", "to": "kitchen"}', '{"action": "pick", "object": "cup"}']
PLAN = f'[{", ".join(ACTIONS)}]'
FAULTY = f'[{", ".join(ACTIONS)}, {{"action": "say", "text": "?!'


class Planner(EchoEngine):
    """Echoes the prompt, as far as the constraint of the answer allows."""

    def __init__(self, step_s: float = 0.0) -> None:
        super().__init__(step_s, end=127)

    @staticmethod
    def answer_to(letter):
        """Return the letter unchanged."""
        return letter


@pytest.fixture(scope='module')
def rig():
    """Start an active node that echoes each prompt."""
    with active_rig(engine=Planner) as rig:
        yield rig


@pytest.fixture
def actions(rig):
    """Return the list of actions that the controller has published."""
    actions = []
    subscription = rig.probe.create_subscription(
        String, '/controller/action', lambda message: actions.append(message.data), 100)
    yield actions
    rig.probe.destroy_subscription(subscription)


@pytest.fixture
def control(rig, actions):
    """Return a function that runs the controller, and returns its exit code, log and actions."""
    def run(command, count=1, meanwhile=lambda actions: None, **parameters):
        parameters = {'token_ms': 1e5, 'plan_s': PATIENCE_S, 'item_s': PATIENCE_S, **parameters}
        arguments = [part for name, value in parameters.items()
                     for part in ('-p', f'{name}:={value}')]
        with subprocess.Popen(
                [sys.executable, str(EXAMPLE), command, '--ros-args', *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                meanwhile(actions)
                log, _ = process.communicate(timeout=2 * PATIENCE_S)
            finally:
                process.kill()
        rig.wait(lambda: len(actions) >= count)
        return process.returncode, log, actions

    return run


def test_sends_the_actions_of_a_plan_in_order(rig, control):
    code, log, actions = control(PLAN, count=2)
    assert actions == ACTIONS
    assert code == 0, log
    for number, action in enumerate(ACTIONS, 1):
        assert f'action {number}: {action}' in log
    assert 'done; sent 2 actions to /controller/action' in log


@pytest.mark.parametrize(('fault', 'words'), [
    ('error', 'error: RuntimeError: the engine broke'), ('cancelled', 'cancelled: '),
    ('length', 'length: '), ('deadline', 'deadline: ')])
def test_holds_after_the_complete_actions_of_a_truncated_plan(rig, control, fault, words):
    """The plan ends after two complete actions; each is sent once, then the robot holds."""
    engine = rig.loader.engines[0]

    def meanwhile(actions):
        rig.wait(lambda: actions == ACTIONS)        # while the plan is not complete
        if fault == 'cancelled':
            rig.trigger('cancel')
        if fault == 'deadline':
            assert rig.set(deadline__request_ms=0.001, deadline__action='truncate') == (True, '')
        engine.answer.set()

    length = FAULTY.index('!') if fault == 'length' else 256
    assert rig.set(sampling__max_new_tokens=length) == (True, '')
    try:
        code, log, actions = control(FAULTY, count=3, meanwhile=meanwhile)
    finally:
        engine.answer.clear()
        assert rig.set(deadline__request_ms=0.0, sampling__max_new_tokens=256) == (True, '')
    assert (code, actions) == (1, [*ACTIONS, 'hold'])
    assert f'hold: {words}' in log


def test_three_late_tokens_hold_and_cancel_the_request(rig, control):
    """The robot holds before the answer is complete."""
    engine, count = rig.loader.engines[0], len(rig.requests())
    rig.cancels.clear()
    engine.step_s = 0.02
    try:
        code, log, actions = control('[' + ' ' * 20 + '?]', token_ms=1.0)
        rig.wait(lambda: rig.cancels)
    finally:
        engine.step_s = 0.0
        engine.answer.set()
    assert (code, actions) == (1, ['hold'])
    assert 'hold: 3 tokens in a row were late' in log
    rig.wait(lambda: len(rig.requests()) > count)
    assert rig.requests()[-1]['finish_reason'] == 'cancelled'
    engine.answer.clear()


def test_accepts_integers_for_its_limits(rig, control):
    code, log, actions = control(PLAN, count=2, token_ms=100000, plan_s=100)
    assert (code, len(actions)) == (0, 2), log


@pytest.fixture
def controller(rig, actions, monkeypatch):
    """Create a controller in this process; its plan timer does not run."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    controller = importlib.import_module('controller').Controller(None)
    plan_timer(controller).cancel()
    rig.wait(controller.action.get_subscription_count)
    yield controller
    controller.destroy_node()


def plan_timer(controller):
    """Return the timer of `plan_s`, the first that the controller creates."""
    return next(controller.timers)


def expire(controller, timer):
    """Let a timer fire soon, and spin until the controller ends the plan."""
    timer.timer_period_ns = 10**8
    timer.reset()
    spin(controller, lambda: controller.outcome)


def item(controller, index):
    """Return the message on `~/item` with one action."""
    return String(data=ItemReport(1, controller.id, index, '', 1.0, ACTIONS[index]).to_json())


def end(controller, **figures):
    """Return the message on `~/result`."""
    report = RequestReport(1, client_id=controller.id, **figures)
    return String(data=json.dumps(chat_completion(report, PLAN, 'echo')))


def test_is_done_after_stop_with_a_message(controller):
    """The message that explains a finish reason does not change it."""
    controller.on_item(item(controller, 0))
    controller.on_result(end(controller, finish_reason='stop', message='a note', items=1))
    assert controller.outcome == 'done'


def test_waits_for_actions_that_arrive_after_the_result(controller):
    """ROS keeps no order between topics."""
    controller.on_item(item(controller, 0))
    controller.on_result(end(controller, finish_reason='stop', message='', items=2))
    assert not controller.outcome
    controller.on_item(item(controller, 1))
    assert controller.outcome == 'done'


def test_holds_if_the_next_action_is_late(rig, controller, actions):
    """It ignores what arrives after that."""
    controller.on_item(item(controller, 0))
    expire(controller, controller.item_timer)
    controller.on_item(item(controller, 1))
    controller.on_result(end(controller, finish_reason='stop', message='', items=2))
    assert controller.outcome == 'hold: no next action in time'
    rig.wait(lambda: actions == [ACTIONS[0], 'hold'])


def test_holds_if_an_action_was_lost(rig, controller, actions):
    """A gap in `index` shows the loss."""
    controller.on_item(item(controller, 1))
    assert controller.outcome == 'hold: action 0 was lost'
    rig.wait(lambda: actions == ['hold'])


def test_holds_if_the_engine_hangs(rig, controller, actions):
    engine = rig.loader.engines[0]
    count = len(engine.prompts)
    controller.command = '[?'
    try:
        spin(controller, lambda: len(engine.prompts) > count)
        expire(controller, plan_timer(controller))
    finally:
        engine.answer.set()
        rig.wait(lambda: rig.diagnostics('decode: engine')['state'] == 'idle')
        engine.answer.clear()
    assert controller.outcome == 'hold: no plan in time'
    rig.wait(lambda: actions == ['hold'])


def test_ignores_the_plans_of_other_clients(rig, control):
    """Another client sends requests all the time; a full queue may reject the controller's."""
    stop, prompts, before = threading.Event(), [], rig.node._host.counts['requests']

    def send_prompts():
        while not stop.wait(0.02):
            prompts.append(rig.ask_later('[{"open": "door"}]'))

    other = threading.Thread(target=send_prompts)
    other.start()
    rig.loader.engines[0].step_s = 0.0005
    try:
        code, log, actions = control(PLAN)
    finally:
        stop.set()
        other.join()
        rig.wait(lambda: rig.node._host.counts['requests'] > before + len(prompts))
        rig.loader.engines[0].step_s = 0.0
    expected = ACTIONS if code == 0 else ['hold']
    rig.wait(lambda: len(actions) >= len(expected))
    assert actions == expected
    assert code == 0 or 'rejected: the queue is full' in log


def test_sends_no_request_to_a_node_without_a_model(rig, controller, actions):
    """It holds when the time for the plan is over."""
    spin(controller, lambda: controller.has_model)
    count = rig.diagnostics('decode: engine')['requests']
    assert rig.change('deactivate', 'cleanup')
    try:
        spin(controller, lambda: not controller.has_model)
        controller.command, polls = PLAN, controller.polls
        spin(controller, lambda: controller.polls > polls)
        expire(controller, plan_timer(controller))
        assert controller.outcome == 'hold: /decode has no model: configure and activate it'
        assert controller.command == PLAN               # not sent
        rig.wait(lambda: actions == ['hold'])
        assert rig.diagnostics('decode: engine')['requests'] == count
    finally:
        assert rig.change('configure', 'activate')


def test_holds_without_the_named_node(rig):
    """The log names the decode nodes that the controller found instead."""
    for plan_s in (3, 10, 60):          # until discovery is complete in time
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), PLAN, '--node', 'nobody', '--ros-args',
             '-p', f'plan_s:={plan_s}'], capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 1
        if 'found /decode' in done.stderr:
            break
    assert (f'hold: no node /nobody was found within {plan_s} s; found /decode: choose one with '
            '--node; sent 0 actions') in done.stdout + done.stderr


def test_uses_the_topics_of_the_named_node(rig, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    controller = importlib.import_module('controller').Controller(PLAN, 'arm/decode')
    try:
        topics = {each.topic_name for each in (*controller.subscriptions, controller.request)}
    finally:
        controller.destroy_node()
    assert topics >= {f'/arm/decode/{name}' for name in (
        'request', 'token_stats', 'item', 'result', 'model_info')}


@pytest.mark.parametrize('reports', [True, False])
def test_waits_briefly_for_subscribers_that_do_not_acknowledge(monkeypatch, reports):
    """The publishers share the limit; some middlewares report no acknowledgements."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    waits_s = []

    def wait(duration):
        if not reports:
            raise RuntimeError('unsupported')
        waits_s.append(duration.nanoseconds / 1e9)
        time.sleep(waits_s[-1])

    publisher = SimpleNamespace(wait_for_all_acked=wait)
    importlib.import_module('controller').flush(publisher, publisher)
    assert len(waits_s) == 2 * reports and sum(waits_s) < 0.5


def test_rejects_an_invalid_node_name():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), PLAN, '--node', 'a b'], capture_output=True, text=True,
        timeout=PATIENCE_S)
    assert done.returncode == 2
    assert "'a b' is not a valid node name" in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(('command', 'reason'), [
    ('', 'rejected: the prompt is empty'), ('[!', 'error: ')])
def test_holds_if_the_request_is_rejected_or_fails(rig, control, command, reason):
    code, log, actions = control(command)
    assert (code, actions) == (1, ['hold'])
    assert f'hold: {reason}' in log
