"""The example controller: it acts on a whole plan, and holds in every other case."""

import importlib
import json
from pathlib import Path
import subprocess
import sys
import threading

from node_rig import PATIENCE_S
from node_rig import Rig
from physai_decode.result import chat_completion
from physai_decode.timing import RequestReport
import pytest
import rclpy
from std_msgs.msg import String

EXAMPLE = Path(__file__).resolve().parent.parent / 'examples' / 'controller.py'
PLAN = '[{"go": "kitchen"}, {"pick": "cup"}]'


@pytest.fixture(scope='module')
def rig():
    """Give a node that says each prompt again in upper case."""
    rclpy.init()
    rig = Rig()
    assert rig.change('configure', 'activate')
    yield rig
    rig.close()
    rclpy.shutdown()


@pytest.fixture
def control(rig):
    """Run the controller; gives its exit code, its log and its actions."""
    actions = []
    heard = rig.probe.create_subscription(
        String, '/controller/action', lambda message: actions.append(message.data), 100)

    def run(command, count=1, **parameters):
        parameters = {'token_ms': 1e5, 'plan_s': PATIENCE_S, **parameters}
        arguments = [part for name, value in parameters.items()
                     for part in ('-p', f'{name}:={value}')]
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), command, '--ros-args', *arguments],
            capture_output=True, text=True, timeout=2 * PATIENCE_S)
        rig.wait(lambda: len(actions) >= count)
        return done.returncode, done.stdout + done.stderr, actions

    yield run
    rig.probe.destroy_subscription(heard)


def test_a_plan_in_time(rig, control):
    """Each action goes out, in the plan's order."""
    code, log, actions = control(PLAN, count=2)
    assert actions == ['{"GO": "KITCHEN"}', '{"PICK": "CUP"}']
    assert code == 0, log


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


def test_no_plan_in_time(rig, control):
    """An engine that hangs does not hang the robot."""
    code, log, actions = control('[?', plan_s=3.0)
    rig.loader.engines[0].answer.set()
    assert (code, actions) == (1, ['hold'])
    assert 'hold: no plan in time' in log


def test_a_limit_without_a_fraction(rig, control):
    """A whole number will do."""
    code, log, actions = control(PLAN, count=2, token_ms=100000, plan_s=100)
    assert (code, len(actions)) == (0, 2), log


def test_a_plan_with_a_note(rig, monkeypatch):
    """A finish reason that the node explains is the same reason."""
    monkeypatch.setattr(sys, 'path', [str(EXAMPLE.parent), *sys.path])
    controller = importlib.import_module('controller').Controller('')
    report = RequestReport(1, 'stop', 'a text of sampling.stop was met', client_id=controller.id)
    try:
        controller.on_result(String(data=json.dumps(chat_completion(report, PLAN, 'echo'))))
        assert controller.outcome == 'done'
    finally:
        controller.destroy_node()


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
    expected = ['{"GO": "KITCHEN"}', '{"PICK": "CUP"}'] if code == 0 else ['hold']
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
    ('', 'rejected: the prompt is empty'), ('[!', 'error: '), ('hello', 'no plan: HELLO'),
    ('7', 'no plan: 7')])
def test_no_plan_at_all(rig, control, command, reason):
    """A refusal, an error, and an answer that is no list."""
    code, log, actions = control(command)
    assert (code, actions) == (1, ['hold'])
    assert f'hold: {reason}' in log
