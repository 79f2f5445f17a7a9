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

"""The process of the node: exit codes, SIGSTOP, launcher, params files, and early Ctrl-C."""

import os
import select
import signal
import subprocess
import sys
import time

from diagnostic_msgs.msg import DiagnosticArray
from diagnostic_msgs.msg import DiagnosticStatus
from lifecycle_msgs.srv import ChangeState
from node_rig import spin
from physai_decode.ros.interfaces import unavailable
from physai_decode.ros.node import STOP_TIMEOUT_S
from physai_decode.ros.topics import stream_qos
import pytest
import rclpy
from std_msgs.msg import String

PATIENCE_S = 60.0               # against hangs only
NODE = [sys.executable, '-m', 'physai_decode.ros.process', '--ros-args', '-p',
        'diagnostics.period_s:=0.05']
FAILING = """
from physai_decode.ros import process

class Failing(process.DecodeNode):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.create_timer(0.01, self.fail)

    def fail(self):
        raise ZeroDivisionError('error in a callback')

process.DecodeNode = Failing
process.main()
"""
BROKEN = """
from physai_decode.ros import process

class Broken(process.Executor):
    def wait_for_ready_callbacks(self, **options):
        raise RuntimeError('no wait set')

process.Executor = Broken
process.main()
"""
SLOW = """
import sys
sys.path.insert(0, {folder!r})
from node_rig import Loader
from physai_decode.ros.process import main
loader = Loader()
loader.step_s = {step_s}
sys.exit(main(load=loader))
"""
LAUNCHER = """
import os, subprocess, sys, time
if sys.argv[1] == 'launched':
    os.environ['PHYSAI_DECODE_LAUNCHER'] = str(os.getpid())
print(subprocess.Popen(sys.argv[2:]).pid, flush=True)
time.sleep(60)
"""
CLIENT = """
from physai_decode.ros.topics import stream_qos
from physai_decode.ros.interfaces import Generate
import rclpy
from rclpy.action import ActionClient

def wait(future):
    rclpy.spin_until_future_complete(node, future)
    return future.result()

rclpy.init()
node = rclpy.create_node('client')
action = ActionClient(
    node, Generate, '/many_goals/generate', goal_service_qos_profile=stream_qos(),
    result_service_qos_profile=stream_qos())
action.wait_for_server()
goals = [action.send_goal_async(Generate.Goal(prompt='x')) for _ in range(50)]
results = [wait(wait(goal).get_result_async()).result for goal in goals]
assert {result.finish_reason for result in results} == {'rejected'}
"""
COMMAND = """
import sys
from physai_decode.{module} import main
sys.exit(main())
"""
INTERRUPTING = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


class StatusProbe:
    """Subscribes to the engine status of one node on /diagnostics."""

    def __init__(self, name: str) -> None:
        self.node = rclpy.create_node('status_probe')
        self.name, self.statuses = f'/{name}', []
        self.node.create_subscription(DiagnosticArray, '/diagnostics', self._on, 10)

    def _on(self, message):
        if message.header.frame_id == self.name:
            self.statuses.append(message.status[-1])

    def next(self) -> DiagnosticStatus:
        """Wait for the next engine status, and return it."""
        self.statuses.clear()
        self.until(lambda: self.statuses)
        return self.statuses[-1]

    def value(self, key) -> str:
        """Return a value of the next engine status."""
        return {pair.key: pair.value for pair in self.next().values}[key]

    def until(self, done) -> None:
        """Spin until `done` returns true."""
        spin(self.node, done)


@pytest.fixture
def probe():
    """Return a function that makes a `StatusProbe`."""
    rclpy.init()
    made = []

    def make(name):
        made.append(StatusProbe(name))
        return made[-1]

    yield make
    for each in made:
        each.node.destroy_node()
    rclpy.shutdown()


@pytest.fixture
def start():
    """Return a function that starts a process, which is killed after the test."""
    processes = []

    def begin(command, **options):
        processes.append(subprocess.Popen(command, text=True, **options))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def node_command(name, *arguments):
    """Return the command of a node with this name, which loads no model."""
    return [*NODE, '-r', f'__node:={name}', '-p', 'autostart:=false', *arguments]


def slow_node_command(request, name, step_s, *arguments):
    """Return the command of an active node whose tokens take `step_s` seconds each."""
    script = SLOW.format(folder=str(request.path.parent), step_s=step_s)
    return [sys.executable, '-c', script, '--ros-args', '-r', f'__node:={name}', '-p',
            'diagnostics.period_s:=0.05', *arguments]


def connect(node, name):
    """Return lists that receive the figures of tokens and requests, and a prompt publisher."""
    lists = []
    for topic in ('token_stats', 'request_stats'):
        lists.append([])
        node.create_subscription(
            DiagnosticArray, f'/{name}/{topic}', lambda message, values=lists[-1]: values.append(
                {pair.key: pair.value for pair in message.status[0].values}), stream_qos())
    return *lists, node.create_publisher(String, f'/{name}/prompt', stream_qos())


def test_an_exception_in_a_callback_does_not_end_the_node(probe, start):
    """It is logged and counted, and other callbacks still run."""
    diagnostics = probe('callback_error')
    process = start([sys.executable, '-c', FAILING, *node_command('callback_error')[3:]],
                    stderr=subprocess.PIPE)
    while int(diagnostics.value('callback_errors')) < 3:
        pass
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert 'error in a callback' in stderr


def test_a_broken_executor_ends_the_node_with_code_1():
    """The exit code tells systemd to restart the node."""
    done = subprocess.run(
        [sys.executable, '-c', BROKEN, '--ros-args', '-p', 'autostart:=false'],
        capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert 'no wait set' in done.stderr


def test_sigstop_and_sigcont_do_not_end_the_node(probe, start):
    """Debuggers and job control send them; each pause is longer than any polling period."""
    diagnostics = probe('stopped')
    process = start(node_command('stopped'))
    diagnostics.next()
    for _ in range(3):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    assert process.poll() is None
    diagnostics.next()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_figures_include_a_sigstop_during_an_answer(probe, start, request):
    """The latency of one token includes the pause, and the node continues after it."""
    diagnostics = probe('paused')
    tokens, ends, prompt = connect(diagnostics.node, 'paused')
    process = start(slow_node_command(
        request, 'paused', 0.05, '-p', 'deadline.token_ms:=1900.0', '-p',
        'diagnostics.stall_timeout_s:=1.0'))
    diagnostics.until(lambda: prompt.get_subscription_count()
                      and diagnostics.value('state') == 'idle')
    prompt.publish(String(data=40 * 'a'))
    diagnostics.until(lambda: len(tokens) > 5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    diagnostics.until(lambda: ends and len(tokens) == 40)
    assert ends[0]['finish_reason'] == 'stop'
    assert [token['index'] for token in tokens] == [str(index) for index in range(40)]
    longest = max(tokens[1:], key=lambda token: float(token['itl_ms']))
    assert float(longest['itl_ms']) > 1990
    assert longest['deadline_missed'] == '1'
    assert ends[0]['itl_max_ms'] == longest['itl_ms']
    assert float(ends[0]['total_ms']) > 1990 and int(ends[0]['deadline_misses']) >= 1
    diagnostics.until(lambda: diagnostics.value('state') == 'idle')
    prompt.publish(String(data='b'))
    diagnostics.until(lambda: len(ends) == 2)
    assert ends[1]['finish_reason'] == 'stop'


@pytest.mark.slow
def test_deactivates_after_a_sigstop(probe, start, request):
    """The pause is longer than `STOP_TIMEOUT_S`, but the engine is not reported to hang."""
    diagnostics = probe('parked')
    tokens, ends, prompt = connect(diagnostics.node, 'parked')
    process = start(slow_node_command(request, 'parked', 1.0))
    change = diagnostics.node.create_client(ChangeState, '/parked/change_state')
    diagnostics.until(lambda: prompt.get_subscription_count() and change.service_is_ready()
                      and diagnostics.value('state') == 'idle')
    prompt.publish(String(data=100 * 'a'))
    diagnostics.until(lambda: tokens)
    deactivate = ChangeState.Request()
    deactivate.transition.label = 'deactivate'
    done = change.call_async(deactivate)
    rclpy.spin_once(diagnostics.node, timeout_sec=0.2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(STOP_TIMEOUT_S + 1.0)
    process.send_signal(signal.SIGCONT)
    diagnostics.until(lambda: done.done() and ends)
    assert done.result().success
    assert ends[0]['finish_reason'] == 'cancelled'
    diagnostics.until(lambda: diagnostics.value('state') == 'inactive')


@pytest.mark.skipif(bool(unavailable), reason=unavailable)
def test_many_goals_at_once_do_not_end_the_node(probe, start):
    """The goal statuses change faster than the node publishes them."""
    diagnostics = probe('many_goals')
    process = start(node_command('many_goals', '--log-level', 'fatal'))
    diagnostics.next()
    clients = [start([sys.executable, '-c', CLIENT]) for _ in range(4)]
    assert [client.wait(PATIENCE_S) for client in clients] == 4 * [0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(('redirection', 'target'), [
    ('<&- >&- 2>&-', '/dev/null'), ('>/dev/full 2>/dev/full', '/dev/full')])
def test_ends_normally_without_its_output(probe, start, redirection, target):
    """The output is closed, or its disk is full; no socket takes its place."""
    diagnostics = probe('silent')
    process = start(['sh', '-c', f'exec "$@" {redirection}', 'sh', *node_command('silent')])
    diagnostics.next()
    assert {os.readlink(f'/proc/{process.pid}/fd/{number}') for number in (1, 2)} == {target}
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.skipif(not hasattr(os, 'pidfd_open'), reason='the platform has no pidfd')
@pytest.mark.parametrize('how', ['launched', 'by hand'])
def test_a_launched_node_ends_with_its_launcher(probe, start, how):
    """A node that was started by hand does not end with its shell."""
    name = f'orphan_{how.replace(" ", "_")}'
    diagnostics = probe(name)
    launcher = start([sys.executable, '-c', LAUNCHER, how, *node_command(name)],
                     stdout=subprocess.PIPE)
    node, ended = int(launcher.stdout.readline()), []
    try:
        diagnostics.next()
        launcher.kill()
        launcher.wait()
        if how == 'launched':
            ended, _, _ = select.select([launcher.stdout], [], [], PATIENCE_S)
            assert ended and launcher.stdout.read() == ''   # at the end of file, the node ended
        else:
            time.sleep(1.0)
            diagnostics.next()
            os.kill(node, 0)
    finally:
        if how != 'launched' or not ended:
            os.kill(node, signal.SIGTERM)
        launcher.stdout.read()


def test_node_ends_if_its_launcher_ended_before_the_start(start):
    launcher = start([sys.executable, '-c', 'pass'])
    launcher.wait()
    process = start(node_command('late'), stderr=subprocess.PIPE,
                    env={**os.environ, 'PHYSAI_DECODE_LAUNCHER': str(launcher.pid)})
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert 'the process that launched this node has ended' in stderr


def test_reports_a_params_file_for_another_node(probe, start, tmp_path):
    """The log and /diagnostics name the file; the node does not load the default model."""
    file = tmp_path / 'params.yaml'
    file.write_text('/robot/decode: {ros__parameters: {model: {path: /models/a}}}')
    diagnostics = probe('other')
    process = start([*NODE, '-r', '__node:=other', '--params-file', str(file), '-p',
                     'diagnostics.period_s:=0.05'], stderr=subprocess.PIPE)
    message = (f'the params file {file} has no section for /other: begin one with /other: or '
               '/**:')
    status = diagnostics.next()
    while 'failed' not in {pair.value for pair in status.values}:
        assert status.level == DiagnosticStatus.WARN
        assert status.message == message
        status = diagnostics.next()
    assert status.message.startswith(f'{message}; model.path is empty')
    assert status.level == DiagnosticStatus.ERROR
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert [line for line in stderr.splitlines() if message in line and '[ERROR]' in line]
    assert 'configure failed: model.path is empty' in stderr


@pytest.mark.parametrize(('content', 'path'), [
    ('/**: {ros__parameters: {sampling.top_k: 3}}', ''),
    ('plain: {ros__parameters: {model.path: /models/a}}', '/models/a'), (None, 'builtin:')])
def test_default_model_only_without_a_params_file(probe, start, tmp_path, content, path):
    """A file that names no model leaves `model.path` empty."""
    file = tmp_path / 'params.yaml'
    file.write_text(content or '')
    diagnostics = probe('plain')
    start(node_command('plain', *(['--params-file', str(file)] if content else [])))
    status = diagnostics.next()
    model = {pair.key: pair.value for pair in status.values}['model']
    assert model.startswith(path) if path else model in ('', 'n/a')
    assert status.level == DiagnosticStatus.OK


@pytest.mark.parametrize(('module', 'library'), [
    ('ros.process', 'rclpy'), ('ros.ask', 'rclpy'), ('ros.watch', 'rclpy'),
    ('bench', 'physai_decode.benchmark')])
def test_ctrl_c_during_imports_prints_one_line(tmp_path, module, library):
    """The interrupt comes while the command imports a library; the exit status is SIGINT."""
    command = tmp_path / f'decode_{module.rpartition(".")[2]}'
    command.write_text(COMMAND.format(module=module))
    hook = 'import importlib.abc, sys\nclass Hook(importlib.abc.MetaPathFinder):\n'
    hook += f'    def find_spec(self, name, *_):\n        if name == {library!r}:\n'
    hook += ''.join(f'            {line}\n' for line in INTERRUPTING.strip().splitlines())
    (tmp_path / 'sitecustomize.py').write_text(hook + 'sys.meta_path.insert(0, Hook())\n')
    paths = [str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])]
    done = subprocess.run(
        [sys.executable, str(command)], capture_output=True, text=True, timeout=PATIENCE_S,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)})
    assert done.stderr == f'{command.name}: interrupted\n'
    assert done.returncode == -signal.SIGINT
