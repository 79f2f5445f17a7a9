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

"""Signals end the process in every state; wrong arguments end it with a message."""

from itertools import cycle
import os
import re
import select
import signal
import subprocess
import sys

from diagnostic_msgs.msg import DiagnosticArray
from node_rig import spin
from physai_decode.ros import SIGNALS
from physai_decode.ros import watchdog
from physai_decode.ros.topics import stream_qos
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
from physai_decode.ros import SIGNALS
from physai_decode.ros.process import main

class Slow(Loader):
    def __call__(self, config, progress):
        for number in SIGNALS:          # ignores them, as a GPU driver did
            ctypes.CDLL(None).signal(number, ctypes.c_void_p(1))
        progress('reading')         # last, because ignoring a signal discards a pending one
        if config.model.path == 'slow':
            time.sleep(60)              # like a library call that does not return
        self.step_s = 0.05
        return super().__call__(config, progress)

sys.exit(main(load=Slow()))
"""
HANGING = """
import ctypes
import sys
from physai_decode.ros.process import main

def load(config, progress):
    print('hanging', flush=True)
    {hang}

sys.exit(main(load=load))
"""
NUMPY_THREADS = {**os.environ, 'OMP_NUM_THREADS': '2'}      # which could receive the signals
LOG_LINE = re.compile(r'\[(INFO|WARN|ERROR)\] \[[\d.]+\] \[[\w.]+\]: ')
PARAMETERS = {
    'unconfigured': ['-p', 'autostart:=false'], 'loading': ['-p', 'model.path:=slow'],
    'failed': ['-p', 'model.path:=bad'], 'idle': [],
    'generating': ['-p', 'diagnostics.stall_timeout_s:=60.0'],
    'stalled': ['-p', 'diagnostics.stall_timeout_s:=0.1']}


@pytest.fixture(scope='module')
def probe():
    """Create a node that subscribes to the other process's topics."""
    rclpy.init()
    node = rclpy.create_node('probe')
    yield node
    node.destroy_node()
    rclpy.shutdown()


@pytest.mark.parametrize(('state', 'signum'), [*zip(PARAMETERS, cycle(SIGNALS))])
def test_a_signal_ends_the_node_in_each_state(probe, request, state, signum):
    """The exit code is 0, the node leaves the ROS graph, and stderr has only log lines."""
    for name in (f'decode_{state}', f'decode_{state}_again'):
        end_node(probe, request, state, signum, name)
        # There, a thread still hangs.
        left = state in ('loading', 'generating', 'stalled') or leaves(probe, name)
        if left:
            break       # on a busy machine, the message can be lost, but not twice
    assert left


def start_node(request, name, *arguments, **options):
    """Start a node in a process, with ROS arguments."""
    return subprocess.Popen(
        [sys.executable, '-c', SCRIPT.format(folder=str(request.path.parent)), '--ros-args',
         '-r', f'__node:={name}', *arguments], text=True, env=NUMPY_THREADS, **options)


def end_node(probe, request, state, signum, name):
    """Bring a node into a state, send a signal, and check how it ends."""
    states = []
    subscription = probe.create_subscription(
        DiagnosticArray, '/diagnostics',
        lambda message: states.append(message.status[2].values[0].value), 10)
    prompt = probe.create_publisher(String, f'/{name}/prompt', 10)
    process = start_node(request, name, '-p', 'diagnostics.period_s:=0.05', *PARAMETERS[state],
                         stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            rclpy.spin_once(probe, timeout_sec=0.1)
            if states and states[-1] == 'idle' != state and prompt.get_subscription_count():
                prompt.publish(String(data='ab?'))
            if states and states[-1] == state:
                break
        assert states[-1] == state
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        probe.destroy_subscription(subscription)
        probe.destroy_publisher(prompt)
    assert process.returncode == 0
    assert [line for line in stderr.splitlines() if not LOG_LINE.match(line)] == []


def leaves(probe, name):
    """Whether a node leaves the ROS graph before its lease ends, which takes 20 s."""
    for _ in range(100):
        if name not in probe.get_node_names():
            return True
        rclpy.spin_once(probe, timeout_sec=0.1)
    return False


@pytest.mark.parametrize('signum', SIGNALS, ids=lambda each: each.name)
def test_requests_get_their_results_after_a_signal(probe, request, signum):
    """One request runs and two wait; the node publishes the end of each before it exits."""
    ends, pieces = [], []
    name = f'decode_live_{signum.name}'
    subscriptions = [
        probe.create_subscription(
            DiagnosticArray, f'/{name}/request_stats',
            lambda message: ends.append(message.status[0].message), stream_qos()),
        probe.create_subscription(String, f'/{name}/tokens', pieces.append, stream_qos())]
    prompt = probe.create_publisher(String, f'/{name}/prompt', 10)
    process = start_node(request, name, '--log-level', 'error')
    try:
        spin(probe, lambda: prompt.get_subscription_count()
             and all(probe.count_publishers(each.topic_name) for each in subscriptions))
        while len(pieces) < 4:      # the node rejects prompts until it is active
            ends.clear()
            pieces.clear()
            for text in (60 * 'a', 'b', 'c'):
                prompt.publish(String(data=text))
            spin(probe, lambda: len(pieces) == 4 or len(ends) == 3)
        process.send_signal(signum)
        assert process.wait(30) == 0
        spin(probe, lambda: len(ends) == 3)
        assert ends == 3 * ['cancelled: the node stops answering']
    finally:
        process.kill()
        process.wait()
        for each in subscriptions:
            probe.destroy_subscription(each)
        probe.destroy_publisher(prompt)


@pytest.mark.parametrize(('hang', 'signum'), [
    ('9 ** 9 ** 9', signal.SIGINT), ('ctypes.PyDLL(None).pause()', signal.SIGTERM)])
def test_a_signal_kills_a_process_whose_interpreter_is_locked(hang, signum):
    """Native code holds the interpreter's lock and never returns."""
    process = subprocess.Popen(
        [sys.executable, '-c', HANGING.format(hang=hang), '--ros-args'],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=NUMPY_THREADS)
    try:
        assert process.stdout.readline() == 'hanging\n'
        process.send_signal(signum)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize('name', ['SigPnd', 'ShdPnd'])
def test_the_watchdog_knows_the_signals_that_end_the_node(name):
    for number in signal.valid_signals():
        status = f'Name:\tx\nSigPnd:\t{0:016x}\nShdPnd:\t{0:016x}\n'.replace(
            f'{name}:\t{0:016x}', f'{name}:\t{1 << number - 1:016x}')
        assert watchdog.pending(status.encode()) == (number in {*SIGNALS, signal.SIGHUP})


def test_the_watchdog_ends_if_its_process_is_killed():
    """SIGKILL leaves the process no time to stop it."""
    script = ('from physai_decode.ros import watchdog\n'
              'print(watchdog.start().pid, flush=True)\nimport time; time.sleep(60)')
    process = subprocess.Popen(
        [sys.executable, '-c', script], stdout=subprocess.PIPE, text=True)
    pidfd = os.pidfd_open(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    ended, _, _ = select.select([pidfd], [], [], 60)
    os.close(pidfd)
    assert ended


@pytest.mark.slow
def test_no_result_is_lost_at_exit(request):
    """tools/ends.py counts the lost results of requests and goals on busy cores."""
    tool = request.path.parent.parent / 'tools' / 'ends.py'
    done = subprocess.run(
        [sys.executable, str(tool), '--runs', '4', '--busy', '2', '--limit', '60'],
        capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(('arguments', 'message'), [
    (['-p', 'sampling.top_p:=7.0'], 'sampling.top_p is 7.0: expected 0.0 to 1.0'),
    (['--params-file', '/logging/none.yaml'],
     'decode_node: there is no params file /logging/none.yaml: correct the path'),
    (['-p', 'use_sim_time:=7'], 'use_sim_time'),
    (['-p', 'qos_overrides./decode/tokens.publisher.reliability:=foo'],
     "qos_overrides./decode/tokens.publisher.reliability is 'foo': expected one of system_"),
    (['-p', 'qos_overrides./decode/prompt.subscription.history:=7'], 'history is 7: expected one'),
    (['-p', 'qos_overrides./decode/tokens.publisher.depth:=-1'], 'depth is -1: expected 0 to 2'),
    (['-p', 'model.path:='], ": expected -p NAME:=VALUE, with '' as an empty text\n"),
    (['-r', '__ns:=arm'], ': expected -r OLD:=NEW; a namespace begins with /, and names'),
    (['-r', '__node:=\udcff'], 'decode_node: ')])
def test_rejects_wrong_ros_arguments(arguments, message):
    """The exit code is 1, and stderr has the reason without a traceback."""
    done = subprocess.run(
        [sys.executable, '-m', 'physai_decode.ros.process', '--ros-args', *arguments],
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert message in done.stderr
    assert 'Traceback' not in done.stderr and 'ROS_LOG_DIR' not in done.stderr


FORM = ('a params file begins with `/**:` and `ros__parameters:`, as in config/decode.yaml; '
        'between { and }, put quotes around a value with a colon')


@pytest.mark.parametrize(('content', 'advice'), [
    ('/**: {ros__parameters: {realtime: {cpu_affinity: [0, 1.5]}}}',
     'give all values of the list one type, such as [0.0, 1.5]'),
    ('model.path: a', FORM), ('a: {ros__parameters: 7}', FORM),
    ('/**:\n  ros__parameters:\n    model: {path: builtin:tiny_planner}', FORM),
    ('/**:\n  ros__parameters:\n    autostart: true\n\tchat: off',
     "FILE, line 4: found character '\\t' that cannot start any token")])
def test_says_what_is_wrong_in_a_params_file(tmp_path, content, advice):
    """The parser of ROS 2 refuses these with a line of its own."""
    file = tmp_path / 'params.yaml'
    file.write_text(content)
    done = subprocess.run(
        [sys.executable, '-m', 'physai_decode.ros.process', '--ros-args', '--params-file',
         str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith(f': {advice.replace("FILE", str(file))}\n')


def test_names_the_variable_if_the_log_folder_can_not_be_created():
    """As with a home folder that is read-only."""
    done = subprocess.run(
        [sys.executable, '-m', 'physai_decode.ros.process'], capture_output=True, text=True,
        timeout=60, env={**os.environ, 'ROS_LOG_DIR': '/proc/none'})
    assert done.returncode == 1
    assert done.stderr.endswith('set ROS_LOG_DIR to a folder that can be written\n')


@pytest.mark.parametrize('argument', ['--nope', '--params-file', 'decode.yaml'])
def test_rejects_arguments_without_ros_args(argument):
    """Ignoring them would leave all settings at their defaults without a word."""
    done = subprocess.run(
        [sys.executable, '-m', 'physai_decode.ros.process', argument, 'more'],
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f'unexpected argument {argument}; usage: decode_node [--ros-args' in done.stderr


@pytest.mark.parametrize('argument', ['--help', '-h'])
def test_help_says_how_to_set_parameters(argument):
    done = subprocess.run(
        [sys.executable, '-m', 'physai_decode.ros.process', argument],
        capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('usage: decode_node [--ros-args')
    for words in ('--params-file FILE', '-p NAME:=VALUE', 'docs/interface.md'):
        assert words in done.stdout
