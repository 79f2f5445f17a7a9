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

"""`decode_ask`: what it prints, its exit codes, and its error messages."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

from diagnostic_msgs.msg import DiagnosticArray
from node_rig import active_rig
from node_rig import PATIENCE_S
from physai_decode.ros import ask as module
import pytest
from std_msgs.msg import String

COMMAND = [sys.executable, '-m', 'physai_decode.ros.ask', '--timeout', str(PATIENCE_S)]


@pytest.fixture(scope='module')
def rig():
    """Start an active node."""
    with active_rig() as rig:
        yield rig


def ask(*arguments):
    """Run `decode_ask` to its end; keep its notices out of stderr."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=2 * PATIENCE_S)
    done.notices, done.stderr = split(done.stderr)
    return done


def split(stderr):
    """Return the notices that the command waits, as on a busy machine, and the rest."""
    lines = stderr.splitlines(keepends=True)
    notices = [line for line in lines if line.startswith('decode_ask: waiting up to ')]
    return notices, ''.join(line for line in lines if line not in notices)


def test_prints_the_answer_and_then_its_figures(rig):
    done = ask('hello 🙂')
    assert (done.returncode, done.stderr) == (0, '')
    lines = done.stdout.splitlines()
    assert lines[0] == 'HELLO 🙂'
    figures = dict(line.split(maxsplit=1) for line in lines[2:])
    assert figures['finish_reason'] == 'stop'
    assert figures['output_tokens'] == '7'


def test_json_output_is_one_object(rig):
    """Numbers are JSON numbers, and unknown figures are null."""
    done = ask('hi', '--json')
    output = json.loads(done.stdout)
    assert (done.returncode, output['text'], output['error']) == (0, 'HI', '')
    assert output['output_tokens'] == 2
    assert output['cancel_ms'] is None
    assert output['total_ms'] > 0


def test_shows_only_its_own_answer(rig):
    """Two requests of another client are ahead of it: one runs and one waits."""
    engine, count = rig.loader.engines[0], rig.node._host.counts['requests']
    for text in ('x?', 'y' * 50):
        rig.ask_later(text)
    rig.wait(lambda: rig.diagnostics('decode: engine')['queue_depth'] == '1')
    process = subprocess.Popen([*COMMAND, 'mine', '--json'], stdout=subprocess.PIPE, text=True)
    rig.wait(lambda: rig.node._host.counts['requests'] == count + 3)
    engine.answer.set()
    assert json.loads(process.communicate(timeout=PATIENCE_S)[0])['text'] == 'MINE'
    engine.answer.clear()


def test_concurrent_commands_show_their_own_answers(rig):
    texts = ['first', 'second', 'same', 'same']
    processes = [subprocess.Popen([*COMMAND, text, '--json'], stdout=subprocess.PIPE, text=True)
                 for text in texts]
    outputs = [json.loads(process.communicate(timeout=PATIENCE_S)[0]) for process in processes]
    assert [output['text'] for output in outputs] == [text.upper() for text in texts]
    assert len({output['client_id'] for output in outputs}) == 4


def test_sends_the_options_with_the_request(rig):
    """The exit code is 3 for a truncated answer, 1 for a rejected option and 2 for bad JSON."""
    done = ask('hello', '--options', '{"max_tokens": 2}')
    assert done.returncode == 3
    assert done.stdout.startswith('HE\n')
    assert 'length: max_tokens is 2' in done.stderr
    done = ask('hello', '--options', '{"max_token": 2}')
    assert (done.returncode, done.stdout) == (1, '')
    assert '"max_token" is not a field of a request' in done.stderr
    for options, problem in (
            ('{', 'is not '), ('[1]', 'is not '), ('[' * 50_000, 'is not '),
            ('{"prompt": "", "cancel": true}', 'has cancel and prompt, which the command sets')):
        done = ask('hello', '--options', options)
        assert (done.returncode, done.stdout) == (2, '')
        assert problem in done.stderr


def test_reports_a_rejected_request(rig):
    """The reason is on stderr, and the exit code is 1."""
    done = ask('')
    assert (done.returncode, done.stdout) == (1, '')
    assert 'the prompt is empty' in done.stderr


def test_reports_an_error_of_the_engine(rig):
    """The output has the text that was generated before the error."""
    done = ask('ab!c')
    assert done.returncode == 1
    assert done.stdout.startswith('AB\n')
    assert 'the engine broke' in done.stderr


def test_replaces_bytes_that_are_not_utf_8(rig):
    """The prompt has U+FFFD in their place."""
    done = ask(b'a\xffb')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('A\ufffdB\n')


def test_rejects_an_invalid_node_name():
    """ROS 2 allows no blanks in the name of a node."""
    done = ask('hello', '--node', 'a b')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == "decode_ask: 'a b' is not a valid node name\n"


def test_times_out_without_a_node(rig):
    """The message names the node that it waits for, at first and at the end, and those found."""
    for timeout_s in (4, 10, 60):       # until discovery is complete in time
        done = ask('hello', '--node', 'nobody', '--timeout', str(timeout_s))
        if 'found /decode' in done.stderr:
            break
    assert done.returncode == 1
    assert done.stderr == (
        f'decode_ask: no node /nobody was found within {timeout_s} s; found /decode\n')
    notice, = done.notices
    assert notice.startswith(
        f'decode_ask: waiting up to {timeout_s} s: no node /nobody was found')


@pytest.mark.parametrize(('command', 'problem'), [
    (['ask', 'hello'], 'no node /decode was found'),
    (['watch', '--once'], 'no node published on /diagnostics')])
def test_says_what_to_do_in_a_domain_without_a_node(command, problem):
    """No test runs a node in this domain; see conftest.py."""
    name, *arguments = command
    done = subprocess.run(
        [sys.executable, '-m', f'physai_decode.ros.{name}', *arguments, '--timeout', '1'],
        capture_output=True, text=True, timeout=PATIENCE_S,
        env={**os.environ, 'ROS_DOMAIN_ID': '101'})
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == (
        f'decode_{name}: {problem} within 1 s: start decode_node, or set ROS_DOMAIN_ID (here 101) '
        'as in its terminal\n')


def ask_in_time(remapped, is_complete):
    """Ask until discovery is complete in time; return the process that ended, and its timeout."""
    for timeout_s in (3, 10, 60):
        done = ask('hello', '--timeout', str(timeout_s), *remapped)
        if is_complete(done.stderr):
            break
    return done, timeout_s


def check_relayed(rig, kind, heard, sent, remapped):
    """Check that the command works with its remapping while messages on ``heard`` are sent on."""
    publisher = rig.probe.create_publisher(kind, sent, 100)
    relay = rig.probe.create_subscription(kind, heard, publisher.publish, 100)
    try:
        done = ask('hello', *remapped)
    finally:
        rig.probe.destroy_subscription(relay)
        rig.probe.destroy_publisher(publisher)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('HELLO\n')


def test_node_that_remaps_its_diagnostics(rig):
    """The message says how to remap the topic; with the remapping, the command works."""
    remapped = ('--ros-args', '-r', '/diagnostics:=/arm/diagnostics')
    done, timeout_s = ask_in_time(
        remapped, lambda error: 'no node /decode was found' not in error)
    assert done.returncode == 1
    assert done.stderr == (
        'decode_ask: /decode exists, but published nothing on /arm/diagnostics within '
        f'{timeout_s} s: wait longer (--timeout), or, if the node remaps that topic, remap it '
        'here too (--ros-args -r /diagnostics:=...)\n')
    check_relayed(rig, DiagnosticArray, '/diagnostics', '/arm/diagnostics', remapped)


def test_node_that_remaps_its_requests(rig):
    """The message names the topic; with the remapping, the command works."""
    remapped = ('--ros-args', '-r', '/decode/request:=/llm/request')
    done, timeout_s = ask_in_time(
        remapped, lambda error: 'token_stats' not in error and 'not with' in error)
    assert done.returncode == 1
    assert done.stderr == (
        f'decode_ask: no node /decode was found within {timeout_s} s; a node of this name runs, '
        'but not with /llm/request: if it remaps a topic, remap it here too (--ros-args -r '
        'OLD:=NEW)\n')
    check_relayed(rig, String, '/llm/request', '/decode/request', remapped)


def test_times_out_when_the_engine_hangs(rig, monkeypatch):
    """The clock passes the timeout after the first token."""
    asker, engine = module.Asker('decode'), rig.loader.engines[0]
    monkeypatch.setattr(module, 'time', SimpleNamespace(
        monotonic=lambda: 6.0 if asker.pieces else 0.0))
    try:
        with pytest.raises(module.AskError, match='/decode did not finish its answer within 5 s'):
            module.ask(asker, 'a?', 5.0, lambda piece: None)
    finally:
        asker.destroy_node()
        engine.answer.set()
    assert asker.pieces == ['A']
    rig.wait(lambda: rig.diagnostics('decode: engine')['state'] == 'idle')
    engine.answer.clear()


@pytest.mark.parametrize('wrong', [('-p', 'x:=['), ('-r', 'a'), ('--nope',)])
def test_rejects_wrong_ros_arguments(wrong):
    """One line on stderr names the argument, without a traceback."""
    done = ask('hello', '--ros-args', *wrong)
    assert done.returncode == 1
    assert done.stderr.startswith('decode_ask: ')
    assert wrong[-1] in done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('arguments', [['hello'], ['hello', '--json']])
def test_reports_a_closed_output_pipe(rig, arguments):
    """It closes before the answer or before the JSON."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True,
        timeout=2 * PATIENCE_S)
    os.close(writer)
    assert (done.returncode, split(done.stderr)[1]) == (
        1, 'decode_ask: the reader of the output has closed it\n')


@pytest.mark.parametrize('arguments', [['hello'], ['hello', '--json']])
def test_reports_a_full_disk(rig, arguments):
    with open('/dev/full', 'w') as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE,
                              text=True, timeout=2 * PATIENCE_S)
    assert (done.returncode, split(done.stderr)[1]) == (
        1, 'decode_ask: the output cannot be written: [Errno 28] No space left on device\n')


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_a_traceback(rig, signum):
    """The signal comes in the middle of an answer, which is cancelled; the exit code is 1."""
    engine, count = rig.loader.engines[0], len(rig.cancels)
    process = subprocess.Popen(
        [*COMMAND, 'a?'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.read(1) == 'A'
        os.kill(process.pid, signum)
        _, errors = process.communicate(timeout=PATIENCE_S)
        rig.wait(lambda: len(rig.cancels) > count)
    finally:
        process.kill()
        engine.answer.set()
        rig.wait(lambda: rig.diagnostics('decode: engine')['state'] == 'idle')
        engine.answer.clear()
    assert (process.returncode, split(errors)[1]) == (1, 'decode_ask: interrupted\n')
    rig.settle()
    assert rig.requests()[-1]['finish_reason'] == 'cancelled'
