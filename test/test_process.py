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

"""The node's process from outside: its exit code, its launcher, its params files, Ctrl-C."""

import os
import select
import signal
import subprocess
import sys
import time

from diagnostic_msgs.msg import DiagnosticArray
from diagnostic_msgs.msg import DiagnosticStatus
from lifecycle_msgs.srv import ChangeState
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
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.create_timer(0.01, self.fail)

    def fail(self):
        raise ZeroDivisionError('a slip in a callback')

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
if sys.argv[1] == 'told':
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
action = ActionClient(node, Generate, '/besieged/generate', goal_service_qos_profile=stream_qos(),
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


class Ears:
    """What the node of a name says on /diagnostics."""

    def __init__(self, name: str) -> None:
        self.node = rclpy.create_node('ears')
        self.name, self.heard = f'/{name}', []
        self.node.create_subscription(DiagnosticArray, '/diagnostics', self._on, 10)

    def _on(self, message):
        if message.header.frame_id == self.name:
            self.heard.append(message.status[-1])

    def next(self) -> DiagnosticStatus:
        """Wait for the next engine status."""
        self.heard.clear()
        end_s = time.monotonic() + PATIENCE_S
        while not self.heard:
            assert time.monotonic() < end_s, f'{self.name} was not heard'
            rclpy.spin_once(self.node, timeout_sec=0.1)
        return self.heard[-1]

    def value(self, key) -> str:
        """Give a value of the next engine status."""
        return {pair.key: pair.value for pair in self.next().values}[key]


    def until(self, done) -> None:
        """Wait until something is so."""
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < end_s, 'waited too long'
            rclpy.spin_once(self.node, timeout_sec=0.1)


@pytest.fixture
def ears():
    """Give ears for a node's name."""
    rclpy.init()
    made = []

    def make(name):
        made.append(Ears(name))
        return made[-1]

    yield make
    for each in made:
        each.node.destroy_node()
    rclpy.shutdown()


@pytest.fixture
def start():
    """Start processes that end with the test."""
    processes = []

    def begin(command, **options):
        processes.append(subprocess.Popen(command, text=True, **options))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def named(name, *arguments):
    """Give the command that starts the node under a name, to load nothing."""
    return [*NODE, '-r', f'__node:={name}', '-p', 'autostart:=false', *arguments]


def slow(request, name, step_s, *arguments):
    """Give the command that starts an active node of so many seconds a token."""
    script = SLOW.format(folder=str(request.path.parent), step_s=step_s)
    return [sys.executable, '-c', script, '--ros-args', '-r', f'__node:={name}', '-p',
            'diagnostics.period_s:=0.05', *arguments]


def talk(node, name):
    """Give the figures of tokens and requests as they will come, and a publisher of prompts."""
    lists = []
    for topic in ('token_stats', 'request_stats'):
        lists.append([])
        node.create_subscription(
            DiagnosticArray, f'/{name}/{topic}', lambda message, heard=lists[-1]: heard.append(
                {pair.key: pair.value for pair in message.status[0].values}), stream_qos())
    return *lists, node.create_publisher(String, f'/{name}/prompt', stream_qos())


def test_an_error_in_a_callback_is_no_end(ears, start):
    """It is logged and counted, and the other callbacks are served."""
    heard = ears('slipping')
    process = start([sys.executable, '-c', FAILING, *named('slipping')[3:]],
                    stderr=subprocess.PIPE)
    while int(heard.value('callback_errors')) < 3:
        pass
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert 'a slip in a callback' in stderr


def test_a_broken_executor_is_no_clean_end():
    """By its exit code systemd knows to start the node again."""
    done = subprocess.run(
        [sys.executable, '-c', BROKEN, '--ros-args', '-p', 'autostart:=false'],
        capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert 'no wait set' in done.stderr


def test_stopping_and_continuing_does_not_end_it(ears, start):
    """SIGSTOP and SIGCONT, as a debugger's or a job control's, longer apart than any poll."""
    heard = ears('stopped')
    process = start(named('stopped'))
    heard.next()
    for _ in range(3):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    assert process.poll() is None
    heard.next()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


def test_a_stop_amid_an_answer_is_told_as_it_was(ears, start, request):
    """The token that spans it shows its time, and the node that stood still is well after it."""
    heard = ears('paused')
    tokens, ends, prompt = talk(heard.node, 'paused')
    process = start(slow(request, 'paused', 0.05, '-p', 'deadline.token_ms:=1900.0', '-p',
                         'diagnostics.stall_timeout_s:=1.0'))
    heard.until(lambda: prompt.get_subscription_count() and heard.value('state') == 'idle')
    prompt.publish(String(data=40 * 'a'))
    heard.until(lambda: len(tokens) > 5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    heard.until(lambda: ends and len(tokens) == 40)
    assert ends[0]['finish_reason'] == 'stop'
    assert [token['index'] for token in tokens] == [str(index) for index in range(40)]
    longest = max(tokens[1:], key=lambda token: float(token['itl_ms']))
    assert float(longest['itl_ms']) > 1990
    assert longest['deadline_missed'] == '1'
    assert ends[0]['itl_max_ms'] == longest['itl_ms']
    assert float(ends[0]['total_ms']) > 1990 and int(ends[0]['deadline_misses']) >= 1
    heard.until(lambda: heard.value('state') == 'idle')
    prompt.publish(String(data='b'))
    heard.until(lambda: len(ends) == 2)
    assert ends[1]['finish_reason'] == 'stop'


def test_a_stop_while_it_deactivates_is_no_hung_engine(ears, start, request):
    """Though it is longer than an engine may take to come back."""
    heard = ears('parked')
    tokens, ends, prompt = talk(heard.node, 'parked')
    process = start(slow(request, 'parked', 1.0))
    change = heard.node.create_client(ChangeState, '/parked/change_state')
    heard.until(lambda: prompt.get_subscription_count() and change.service_is_ready()
                and heard.value('state') == 'idle')
    prompt.publish(String(data=100 * 'a'))
    heard.until(lambda: tokens)
    asked = ChangeState.Request()
    asked.transition.label = 'deactivate'
    done = change.call_async(asked)
    rclpy.spin_once(heard.node, timeout_sec=0.2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(STOP_TIMEOUT_S + 1.0)
    process.send_signal(signal.SIGCONT)
    heard.until(lambda: done.done() and ends)
    assert done.result().success
    assert ends[0]['finish_reason'] == 'cancelled'
    heard.until(lambda: heard.value('state') == 'inactive')


@pytest.mark.skipif(bool(unavailable), reason=unavailable)
def test_many_goals_at_once_do_not_end_it(ears, start):
    """Their statuses come faster than they are sent, for `decode_node` sends in another thread."""
    heard = ears('besieged')
    process = start(named('besieged', '--log-level', 'fatal'))
    heard.next()
    clients = [start([sys.executable, '-c', CLIENT]) for _ in range(4)]
    assert [client.wait(PATIENCE_S) for client in clients] == 4 * [0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.skipif(not hasattr(os, 'pidfd_open'), reason='the platform has no pidfd')
@pytest.mark.parametrize('told', ['told', 'by hand'])
def test_an_orphan_of_a_launch_ends(ears, start, told):
    """One that was started by hand goes on when its shell is gone."""
    name = f'orphan_{told.replace(" ", "_")}'
    heard = ears(name)
    launcher = start([sys.executable, '-c', LAUNCHER, told, *named(name)],
                     stdout=subprocess.PIPE)
    node, ended = int(launcher.stdout.readline()), []
    try:
        heard.next()
        launcher.kill()
        launcher.wait()
        if told == 'told':
            ended, _, _ = select.select([launcher.stdout], [], [], PATIENCE_S)
            assert ended and launcher.stdout.read() == ''       # nobody holds it open
        else:
            time.sleep(1.0)
            heard.next()
            os.kill(node, 0)
    finally:
        if told != 'told' or not ended:
            os.kill(node, signal.SIGTERM)
        launcher.stdout.read()


def test_a_launcher_that_is_gone_at_the_start(start):
    """The node ends at once, not never."""
    gone = start([sys.executable, '-c', 'pass'])
    gone.wait()
    process = start(named('late'), env={**os.environ, 'PHYSAI_DECODE_LAUNCHER': str(gone.pid)},
                    stderr=subprocess.PIPE)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert 'the process that launched this node has ended' in stderr


def test_a_params_file_for_another_node_is_told(ears, start, tmp_path):
    """In the log and on /diagnostics; and the node does not take the toy model instead."""
    file = tmp_path / 'params.yaml'
    file.write_text('/robot/decode: {ros__parameters: {model: {path: /models/a}}}')
    heard = ears('other')
    process = start([*NODE, '-r', '__node:=other', '--params-file', str(file), '-p',
                     'diagnostics.period_s:=0.05'], stderr=subprocess.PIPE)
    message = f'the params file {file} has no section for /other'
    status = heard.next()
    while 'failed' not in {pair.value for pair in status.values}:
        assert status.level == DiagnosticStatus.WARN
        assert status.message == message
        status = heard.next()
    assert 'model.path is empty' in status.message
    assert status.level == DiagnosticStatus.ERROR
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert [line for line in stderr.splitlines() if message in line and '[ERROR]' in line]
    assert 'configure failed: model.path is empty' in stderr


@pytest.mark.parametrize(('content', 'path'), [
    ('/**: {ros__parameters: {sampling.top_k: 3}}', ''),
    ('plain: {ros__parameters: {model.path: /models/a}}', '/models/a'), (None, 'builtin:')])
def test_the_default_model_is_for_a_start_without_a_file(ears, start, tmp_path, content, path):
    """A file that names no model leaves the parameter empty; it can be set, then configured."""
    file = tmp_path / 'params.yaml'
    file.write_text(content or '')
    heard = ears('plain')
    start(named('plain', *(['--params-file', str(file)] if content else [])))
    status = heard.next()
    told = {pair.key: pair.value for pair in status.values}['model']
    assert told.startswith(path) if path else told in ('', 'n/a')
    assert status.level == DiagnosticStatus.OK


@pytest.mark.parametrize(('module', 'library'), [
    ('ros.process', 'rclpy'), ('ros.ask', 'rclpy'), ('ros.watch', 'rclpy'),
    ('bench', 'physai_decode.benchmark')])
def test_ctrl_c_during_imports_is_one_line(tmp_path, module, library):
    """However early it comes, after Python's own start; the exit status says SIGINT."""
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
