"""SIGINT and SIGTERM in each state: exit code 0, and nothing on stderr but log lines."""

import re
import signal
import subprocess
import sys

from diagnostic_msgs.msg import DiagnosticArray
import pytest
import rclpy
from std_msgs.msg import String

SCRIPT = """
import ctypes
import signal
import sys
import time
sys.path.insert(0, {folder!r})
from node_rig import Loader
from physai_decode.node import main

class Slow(Loader):
    def __call__(self, config, progress):
        progress('reading')
        for number in (signal.SIGINT, signal.SIGTERM):      # as a GPU's driver was seen to do
            ctypes.CDLL(None).signal(number, ctypes.c_void_p(1))
        if config.model.path == 'slow':
            time.sleep(60)              # as a library that does not come back would
        return super().__call__(config, progress)

sys.exit(main(load=Slow()))
"""
LOG_LINE = re.compile(r'\[(INFO|WARN|ERROR)\] \[[\d.]+\] \[[\w.]+\]: ')
PARAMETERS = {
    'inactive': ['-p', 'autostart:=false'], 'loading': ['-p', 'model.path:=slow'],
    'failed': ['-p', 'model.path:=bad'], 'idle': [],
    'generating': ['-p', 'diagnostics.stall_timeout_s:=60.0'],
    'stalled': ['-p', 'diagnostics.stall_timeout_s:=0.1']}


@pytest.fixture(scope='module')
def probe():
    """Hear the node's diagnostics."""
    rclpy.init()
    node = rclpy.create_node('probe')
    yield node
    node.destroy_node()
    rclpy.shutdown()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['SIGINT', 'SIGTERM'])
@pytest.mark.parametrize('state', PARAMETERS)
def test_a_signal_ends_the_node(probe, request, state, number):
    """A generation is cancelled, a load or a hung engine left behind."""
    states = []
    heard = probe.create_subscription(
        DiagnosticArray, '/diagnostics',
        lambda message: states.append(message.status[2].values[0].value), 10)
    name = f'decode_{state}_{number.name}'
    prompt = probe.create_publisher(String, f'/{name}/prompt', 10)
    process = subprocess.Popen(
        [sys.executable, '-c', SCRIPT.format(folder=str(request.path.parent)), '--ros-args',
         '-r', f'__node:={name}', '-p', 'diagnostics.period_s:=0.05', *PARAMETERS[state]],
        stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            rclpy.spin_once(probe, timeout_sec=0.1)
            if states and states[-1] == 'idle' != state and prompt.get_subscription_count():
                prompt.publish(String(data='ab?'))
            if states and states[-1] == state:
                break
        assert states[-1] == state
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        probe.destroy_subscription(heard)
        probe.destroy_publisher(prompt)
    assert process.returncode == 0
    if state not in ('loading', 'generating', 'stalled'):       # else a thread hangs in its step
        for _ in range(100):
            if name not in probe.get_node_names():
                break
            rclpy.spin_once(probe, timeout_sec=0.1)
        assert name not in probe.get_node_names()
    assert [line for line in stderr.splitlines() if not LOG_LINE.match(line)] == []


@pytest.mark.parametrize(('arguments', 'message'), [
    (['-p', 'sampling.top_p:=7.0'], 'sampling.top_p is 7.0: allowed are 0.0 to 1.0'),
    (['--params-file', '/nowhere.yaml'], '/nowhere.yaml')])
def test_a_bad_start_says_why(arguments, message):
    """Exit code 1 and a message, no traceback."""
    done = subprocess.run(
        [sys.executable, '-m', 'physai_decode.node', '--ros-args', *arguments],
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert message in done.stderr
    assert 'Traceback' not in done.stderr
