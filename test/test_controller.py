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

"""The example controller: it acts on each action of a plan, and holds where no more will come."""

import importlib
import json
from pathlib import Path
import subprocess
import sys
import threading

from node_rig import EchoEngine
from node_rig import PATIENCE_S
from node_rig import Rig
from physai_decode.result import chat_completion
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
import pytest
import rclpy
from std_msgs.msg import String

EXAMPLE = Path(__file__).resolve().parent.parent / 'examples' / 'controller.py'
ACTIONS = ['{"action": "go", "to": "kitchen"}', '{"action": "pick", "object": "cup"}']
PLAN = f'[{", ".join(ACTIONS)}]'
FAULTY = f'[{", ".join(ACTIONS)}, {{"action": "say", "text": "?!'


class Planner(EchoEngine):
    """Says the prompt again, as far as the form of an answer lets it."""

    def __init__(self, step_s: float = 0.0) -> None:
        super().__init__(step_s, end=127)

    @staticmethod
    def said(letter):
        """Give the letter."""
        return letter


@pytest.fixture(scope='module')
def rig():
    """Give a node that says each prompt again."""
    rclpy.init()
    rig = Rig()
    rig.loader.kind = Planner
    assert rig.change('configure', 'activate')
    yield rig
    rig.close()
    rclpy.shutdown()


@pytest.fixture
def actions(rig):
    """Give what comes on the controller's topic."""
    actions = []
    heard = rig.probe.create_subscription(
        String, '/controller/action', lambda message: actions.append(message.data), 100)
    yield actions
    rig.probe.destroy_subscription(heard)


@pytest.fixture
def control(rig, actions):
    """Give what runs the controller; that gives its exit code, its log and its actions."""
    def run(command, count=1, meanwhile=lambda actions: None, **parameters):
        parameters = {'token_ms': 1e5, 'plan_s': PATIENCE_S, 'item_s': PATIENCE_S, **parameters}
        arguments = [part for name, value in parameters.items()
                     for part in ('-p', f'{name}:={value}')]
        with subprocess.Popen(
                [sys.executable, str(EXAMPLE), command, '--ros-args', *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                meanwhile(actions)
                told, _ = process.communicate(timeout=2 * PATIENCE_S)
            finally:
                process.kill()
        rig.wait(lambda: len(actions) >= count)
        return process.returncode, told, actions

    return run


def test_a_plan_in_time(rig, control):
    """Each action goes out, in the plan's order."""
    code, log, actions = control(PLAN, count=2)
    assert actions == ACTIONS
    assert code == 0, log


@pytest.mark.parametrize(('fault', 'words'), [
    ('error', 'error: RuntimeError: the engine broke'), ('cancelled', 'cancelled: '),
    ('length', 'length: '), ('deadline', 'deadline: ')])
def test_a_fault_in_the_middle(rig, control, fault, words):
    """What was complete before it was acted on, once each; then the robot holds."""
    engine = rig.loader.engines[0]

    def meanwhile(actions):
        rig.wait(lambda: actions == ACTIONS)        # while the rest of the plan is to come
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


def test_late_tokens(rig, control):
    """Three in a row: it holds before the answer is complete, and the request is cancelled."""
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


@pytest.mark.slow
def test_no_plan_in_time(rig, control):
    """An engine that hangs does not hang the robot."""
    code, log, actions = control('[?', plan_s=10.0)    # a busy machine takes seconds to be heard
    rig.loader.engines[0].answer.set()
    assert (code, actions) == (1, ['hold'])
    assert 'hold: no plan in time' in log


def test_a_limit_without_a_fraction(rig, control):
    """A whole number will do."""
    code, log, actions = control(PLAN, count=2, token_ms=100000, plan_s=100)
    assert (code, len(actions)) == (0, 2), log


@pytest.fixture
def controller(rig, actions, monkeypatch):
    """Give a controller in this process."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    controller = importlib.import_module('controller').Controller(None)
    rig.wait(controller.action.get_subscription_count)
    yield controller
    controller.destroy_node()


def item(controller, index):
    """Give the message of an action."""
    return String(data=ItemReport(1, controller.id, index, '', 1.0, ACTIONS[index]).to_json())


def end(controller, **figures):
    """Give the message of the end."""
    report = RequestReport(1, client_id=controller.id, **figures)
    return String(data=json.dumps(chat_completion(report, PLAN, 'echo')))


def test_a_plan_with_a_note(controller):
    """A finish reason that the node explains is the same reason."""
    controller.on_item(item(controller, 0))
    controller.on_result(end(controller, finish_reason='stop', message='a note', items=1))
    assert controller.outcome == 'done'


def test_an_end_before_the_last_action(controller):
    """The topics come in any order; the plan is out when all of it is."""
    controller.on_item(item(controller, 0))
    controller.on_result(end(controller, finish_reason='stop', message='', items=2))
    assert not controller.outcome
    controller.on_item(item(controller, 1))
    assert controller.outcome == 'done'


def test_no_next_action_in_time(rig, controller, actions):
    """It holds, and what comes later comes too late."""
    controller.on_item(item(controller, 0))
    controller.item_timer.timer_period_ns = 10**8
    controller.item_timer.reset()
    while not controller.outcome:
        rclpy.spin_once(controller, timeout_sec=PATIENCE_S)
    controller.on_item(item(controller, 1))
    controller.on_result(end(controller, finish_reason='stop', message='', items=2))
    assert controller.outcome == 'hold: no next action in time'
    rig.wait(lambda: actions == [ACTIONS[0], 'hold'])


def test_a_lost_action(rig, controller, actions):
    """Without it those that follow make no sense."""
    controller.on_item(item(controller, 1))
    assert controller.outcome == 'hold: action 0 was lost'
    rig.wait(lambda: actions == ['hold'])


def test_nobody_elses_plan(rig, control):
    """While another client keeps asking, the robot acts on its own plan alone."""
    stop, asked, before = threading.Event(), [], rig.node._host.counts['requests']

    def keep_asking():
        while not stop.wait(0.02):
            asked.append(rig.ask_later('[{"open": "door"}]'))

    other = threading.Thread(target=keep_asking)
    other.start()
    rig.loader.engines[0].step_s = 0.0005
    try:
        code, log, actions = control(PLAN)
    finally:
        stop.set()
        other.join()
        rig.wait(lambda: rig.node._host.counts['requests'] > before + len(asked))
        rig.loader.engines[0].step_s = 0.0
    expected = ACTIONS if code == 0 else ['hold']
    rig.wait(lambda: len(actions) >= len(expected))
    assert actions == expected
    assert code == 0 or 'rejected: the queue is full' in log


def test_no_model(rig, control):
    """A node that says that it has none any more is not asked."""
    assert rig.change('deactivate', 'cleanup')
    count = rig.diagnostics('decode: engine')['requests']
    try:
        code, log, actions = control(PLAN, plan_s=5.0)
        assert (code, actions) == (1, ['hold'])
        assert 'hold: no plan in time' in log
        assert rig.diagnostics('decode: engine')['requests'] == count
    finally:
        assert rig.change('configure', 'activate')


def test_no_node():
    """Where nobody answers at all, the robot is told to hold just as soon."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), PLAN, '--ros-args', '-p', 'plan_s:=0.5',
         '-r', '/decode/model_info:=/nobody/model_info'],
        capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert 'hold: no plan in time' in done.stdout + done.stderr


@pytest.mark.parametrize(('command', 'reason'), [
    ('', 'rejected: the prompt is empty'), ('[!', 'error: ')])
def test_no_plan_at_all(rig, control, command, reason):
    """A refusal and an error."""
    code, log, actions = control(command)
    assert (code, actions) == (1, ['hold'])
    assert f'hold: {reason}' in log
