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

"""decode_ask: prints the answer and its figures, and says by its exit code how it went."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

from diagnostic_msgs.msg import DiagnosticArray
from node_rig import PATIENCE_S
from node_rig import Rig
from physai_decode.ros import ask as module
import pytest
import rclpy

COMMAND = [sys.executable, '-m', 'physai_decode.ros.ask', '--timeout', str(PATIENCE_S)]


@pytest.fixture(scope='module')
def rig():
    """Give a node that takes prompts."""
    rclpy.init()
    rig = Rig()
    assert rig.change('configure', 'activate')
    yield rig
    rig.close()
    rclpy.shutdown()


def ask(*arguments):
    """Run the command."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=2 * PATIENCE_S)


def test_it_prints_the_answer_and_its_figures(rig):
    """Text first, then one line for each figure."""
    done = ask('hello 🙂')
    assert (done.returncode, done.stderr) == (0, '')
    lines = done.stdout.splitlines()
    assert lines[0] == 'HELLO 🙂'
    figures = dict(line.split(maxsplit=1) for line in lines[2:])
    assert figures['finish_reason'] == 'stop'
    assert figures['output_tokens'] == '7'


def test_json_is_one_object(rig):
    """With numbers as numbers and what is not known as null."""
    done = ask('hi', '--json')
    told = json.loads(done.stdout)
    assert (done.returncode, told['text'], told['error']) == (0, 'HI', '')
    assert told['output_tokens'] == 2
    assert told['cancel_ms'] is None
    assert told['total_ms'] > 0


def test_it_takes_its_own_answer_among_others(rig):
    """While another request runs and one waits, it shows the third."""
    engine, count = rig.loader.engines[0], rig.node._host.counts['requests']
    for text in ('x?', 'y' * 50):
        rig.ask_later(text)
    rig.wait(lambda: rig.diagnostics('decode: engine')['queue_depth'] == '1')
    process = subprocess.Popen([*COMMAND, 'mine', '--json'], stdout=subprocess.PIPE, text=True)
    rig.wait(lambda: rig.node._host.counts['requests'] == count + 3)
    engine.answer.set()
    assert json.loads(process.communicate(timeout=PATIENCE_S)[0])['text'] == 'MINE'
    engine.answer.clear()


def test_many_at_once(rig):
    """Each shows its own answer."""
    texts = ['first', 'second', 'same', 'same']
    asked = [subprocess.Popen([*COMMAND, text, '--json'], stdout=subprocess.PIPE, text=True)
             for text in texts]
    told = [json.loads(each.communicate(timeout=PATIENCE_S)[0]) for each in asked]
    assert [each['text'] for each in told] == [text.upper() for text in texts]
    assert len({each['client_id'] for each in told}) == 4


def test_options_go_with_the_request(rig):
    """One that is cut off has an exit code of its own."""
    done = ask('hello', '--options', '{"max_tokens": 2}')
    assert done.returncode == 3
    assert done.stdout.startswith('HE\n')
    assert 'length: max_tokens is 2' in done.stderr
    done = ask('hello', '--options', '{"max_token": 2}')
    assert (done.returncode, done.stdout.splitlines()[0]) == (1, '')
    assert "'max_token' is not a field of a request" in done.stderr
    for wrong in ('{', '[1]'):
        done = ask('hello', '--options', wrong)
        assert (done.returncode, done.stdout) == (2, '')
        assert 'is not ' in done.stderr


def test_a_refusal_is_an_error(rig):
    """The reason is on stderr."""
    done = ask('')
    assert done.returncode == 1
    assert 'the prompt is empty' in done.stderr


def test_an_engine_s_error_is_an_error(rig):
    """With the text so far."""
    done = ask('ab!c')
    assert done.returncode == 1
    assert done.stdout.startswith('AB\n')
    assert 'the engine broke' in done.stderr


def test_bytes_that_are_no_text(rig):
    """They are sent as U+FFFD."""
    done = ask(b'a\xffb')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('A\ufffdB\n')


def test_no_node_has_such_a_name():
    """It says so."""
    done = ask('hello', '--node', 'a b')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == "decode_ask: 'a b' is not a valid node name\n"


def test_no_node_in_time(rig):
    """It says which node it waited for."""
    done = ask('hello', '--node', 'nobody', '--timeout', '1')
    assert done.returncode == 1
    assert done.stderr == 'decode_ask: no node /nobody was found within 1 s\n'


def test_a_node_with_diagnostics_elsewhere(rig):
    """Its topics are there, its diagnostics elsewhere: it says so, and how to listen there."""
    elsewhere = ('--ros-args', '-r', '/diagnostics:=/arm/diagnostics')
    for timeout_s in (3, 10, 60):       # until it has seen the topics in time
        done = ask('hello', '--timeout', str(timeout_s), *elsewhere)
        if 'no node /decode was found' not in done.stderr:
            break
    assert done.returncode == 1
    assert done.stderr == (
        'decode_ask: /decode exists, but published nothing on /arm/diagnostics within '
        f'{timeout_s} s: wait longer (--timeout), or, if the node remaps that topic, remap it '
        'here too (--ros-args -r /diagnostics:=...)\n')
    arm = rig.probe.create_publisher(DiagnosticArray, '/arm/diagnostics', 100)
    relay = rig.probe.create_subscription(DiagnosticArray, '/diagnostics', arm.publish, 100)
    try:
        done = ask('hello', *elsewhere)
    finally:
        rig.probe.destroy_subscription(relay)
        rig.probe.destroy_publisher(arm)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('HELLO\n')


def test_no_answer_in_time(rig, monkeypatch):
    """An engine that hangs does not hang the command."""
    asker, engine = module.Asker('decode'), rig.loader.engines[0]
    monkeypatch.setattr(module, 'time', SimpleNamespace(
        monotonic=lambda: 6.0 if asker.pieces else 0.0))        # the time is up after a token
    try:
        with pytest.raises(module.AskError, match='/decode did not finish its answer within 5 s'):
            module.ask(asker, 'a?', 5.0, lambda piece: None)
    finally:
        asker.destroy_node()
        engine.answer.set()
    assert asker.pieces == ['A']
    rig.wait(lambda: rig.diagnostics('decode: engine')['state'] == 'idle')
    engine.answer.clear()


@pytest.mark.parametrize('slip', [('-p', 'x:=['), ('-r', 'a'), ('--nope',)])
def test_a_slip_in_the_ros_arguments(slip):
    """A line that shows it, no traceback."""
    done = ask('hello', '--ros-args', *slip)
    assert done.returncode == 1
    assert done.stderr.startswith('decode_ask: ')
    assert slip[-1] in done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('arguments', [['hello'], [''], ['hello', '--json']])
def test_nobody_reads_the_output(rig, arguments):
    """A line says so, be it of the answer, of the figures alone, or of the object."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True,
        timeout=2 * PATIENCE_S)
    os.close(writer)
    assert (done.returncode, done.stderr) == (
        1, 'decode_ask: the reader of the output has closed it\n')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_interrupted(rig, number):
    """Without a traceback."""
    engine = rig.loader.engines[0]
    process = subprocess.Popen(
        [*COMMAND, 'a?'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.read(1) == 'A'
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        engine.answer.set()
        rig.wait(lambda: rig.diagnostics('decode: engine')['state'] == 'idle')
        engine.answer.clear()
    assert (process.returncode, errors) == (1, 'decode_ask: interrupted\n')
