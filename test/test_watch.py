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

"""`decode_watch`: its display in a terminal, its snapshot for scripts, and its exit codes."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

from diagnostic_msgs.msg import DiagnosticArray
from node_rig import active_rig
from node_rig import PATIENCE_S
from physai_decode.ros import messages
from physai_decode.ros.watch import number
from physai_decode.ros.watch import printable
from physai_decode.ros.watch import Watcher
from physai_decode.timing import RequestReport
import pytest
import rclpy

COMMAND = [sys.executable, '-m', 'physai_decode.ros.watch']


@pytest.fixture(scope='module')
def rig():
    """Start an active node with a token deadline that slow tokens miss."""
    with active_rig(**{
            'deadline.token_ms': 5.0, 'deadline.max_consecutive_misses': 1000}) as rig:
        yield rig


class Screen:
    """Runs `decode_watch` in a pseudo-terminal."""

    def __init__(self, *arguments) -> None:
        self.text = ''
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 120, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=slave, stdout=slave, stderr=subprocess.PIPE, text=True,
            env={**os.environ, 'TERM': 'xterm-256color'})
        os.close(slave)

    def wait(self, pattern) -> str:
        """Read until the pattern matches; return and drop the text up to its end."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            if found := re.search(pattern, self.text, re.DOTALL):
                read, self.text = self.text[:found.end()], self.text[found.end():]
                return read
            assert time.monotonic() < end_s, f'no {pattern} in {self.text[-4000:]}'
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += os.read(self.master, 65536).decode(errors='replace')

    def end(self, signum) -> tuple[int, str]:
        """Send a signal; return the exit code and the text on stderr."""
        os.kill(self.process.pid, signum)
        try:
            while True:
                self.text += os.read(self.master, 65536).decode(errors='replace')
        except OSError:             # the process has closed its terminal
            os.close(self.master)
        self.process.wait(PATIENCE_S)
        return self.process.returncode, self.process.stderr.read()


@pytest.fixture
def screen():
    """Return a function that starts a screen, whose process is killed after the test."""
    screens = []

    def start(*arguments):
        screens.append(Screen(*arguments))
        return screens[-1]

    yield start
    for each in screens:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
        each.process.stderr.close()


def once(*arguments, timeout_s=PATIENCE_S):
    """Run `decode_watch --once`."""
    return subprocess.run(
        [*COMMAND, '--once', '--timeout', str(timeout_s), *arguments], capture_output=True,
        text=True, timeout=2 * PATIENCE_S)


def once_until(words, *arguments):
    """Repeat `once` with longer timeouts until stderr has the words; also return the timeout."""
    for timeout_s in (3, 10, 60):
        done = once(*arguments, timeout_s=timeout_s)
        if words in done.stderr:
            break
    return done, timeout_s


def token_subscribers(rig) -> int:
    """Count the subscribers of ~/token_stats: the probe and each `decode_watch`."""
    return rig.probe.count_subscribers('/decode/token_stats')


def test_shows_the_stream_and_the_figures(rig, screen):
    """It shows text, latency, late tokens, floor and the last request; SIGINT ends it with 0."""
    terminal = screen()
    terminal.wait('/decode.*idle.*Echo 1')
    rig.wait(lambda: token_subscribers(rig) == 2)
    rig.loader.engines[0].step_s = 0.01     # misses the deadline of 5 ms
    try:
        rig.ask('hello world')
    finally:
        rig.loader.engines[0].step_s = 0.0
    shown = terminal.wait('stop: 11 tokens')
    assert 'HELLO WORLD' in shown
    shown = terminal.wait('11 tokens, 0 refused')
    assert re.search(r'p50 \d', shown)
    assert '5 ms a token: 10 missed, 10 in a row' in shown
    assert re.search(r'[█░]\S* 0\.\d+ of the limit: the floor is 1\.0', shown)
    assert re.search(f'[{"▁▂▃▄▅▆▇█"}]', shown)
    code, stderr = terminal.end(signal.SIGINT)
    assert (code, stderr) == (0, '')
    assert '\x1b[?1049l' in terminal.text           # the terminal is restored


def test_text_of_the_model_can_not_control_the_terminal(rig, screen):
    """Control characters of escape sequences are shown as U+FFFD."""
    terminal = screen('--node', 'decode')
    terminal.wait('idle')
    rig.wait(lambda: token_subscribers(rig) == 2)
    rig.ask('a\x1b[2Jb\x07\x9bc')
    assert 'A\ufffd[2JB\ufffd\ufffdC' in terminal.wait(r'A[^\n]*C')
    assert terminal.end(signal.SIGTERM) == (0, '')


@pytest.mark.slow
@pytest.mark.usefixtures('rig')      # it initialises rclpy
@pytest.mark.parametrize('name', ['/restarted', '/arm/decode'])
def test_keeps_running_when_the_node_restarts(screen, name):
    """A node starts, ends and starts again under the same name."""
    terminal = screen('--node', name)
    terminal.wait(f'waiting for {name}')
    for round_ in range(2):
        node = rclpy.create_node('restarted')
        publisher = node.create_publisher(DiagnosticArray, '/diagnostics', 10)
        array = DiagnosticArray(status=[
            messages.status(f'{name[1:]}: latency', messages.LATENCY_KEYS, {}),
            messages.status(f'{name[1:]}: bandwidth', messages.BANDWIDTH_KEYS, {}),
            messages.status(f'{name[1:]}: engine', messages.ENGINE_KEYS, {
                'state': f'idle{round_}', 'requests': 5 - round_})])
        array.header.frame_id = name
        end_s = time.monotonic() + PATIENCE_S
        while f'idle{round_}' not in terminal.text:
            assert time.monotonic() < end_s
            publisher.publish(array)
            if select.select([terminal.master], [], [], 0.1)[0]:
                terminal.text += os.read(terminal.master, 65536).decode(errors='replace')
        node.destroy_node()
        terminal.wait('gone: no message for [0-9]+ s')
    assert terminal.end(signal.SIGINT) == (0, '')


def test_once_prints_a_line_for_each_key_of_diagnostics(rig):
    rig.ask('hello')
    done = once('--node', 'decode')
    assert (done.returncode, done.stderr) == (0, '')
    values = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    for keys in (messages.LATENCY_KEYS, messages.BANDWIDTH_KEYS, messages.ENGINE_KEYS):
        assert set(keys) <= set(values)
    assert values['node'] == '/decode'
    assert values['hardware_id'] == 'Echo 1'
    assert values['state'] == 'idle'
    assert values['level'] in ('OK', 'WARN')
    assert int(values['tokens']) >= 5


def test_shows_the_items_of_an_answer(rig):
    """It shows their number and the time of the first one, or nothing if there are none."""
    watcher = Watcher('/arm/decode')
    try:
        for items, first_ms, text in ((5, 20.5, '; 5 items, first after 20.5 ms'), (0, None, '')):
            report = RequestReport(7, 'stop', '', items=items, first_item_ms=first_ms)
            watcher._on_request(DiagnosticArray(
                status=[messages.request_status('/arm/decode', report)]))
            assert watcher.last_request == (
                f'7, stop: 0 tokens, first after n/a ms, then n/a per s{text}')
    finally:
        watcher.destroy_node()


def test_times_out_without_the_named_node(rig):
    """The message names the node that it waited for, and the nodes that it found."""
    done, timeout_s = once_until('found /decode', '--node', 'nobody')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == (
        f'decode_watch: /nobody published nothing on /diagnostics within {timeout_s} s; '
        'found /decode\n')


def test_finds_a_node_that_remaps_a_topic(rig):
    """The name of the node does not depend on that of the topic."""
    done = once('--node', '/decode', '--ros-args', '-r', '/decode/token_stats:=/arm/figures')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines()[0].split() == ['node', '/decode']


@pytest.mark.parametrize('node', [[], ['--node', '/decode']])
def test_reports_a_node_without_diagnostics_on_the_topic(rig, node):
    """The message says how to remap the topic."""
    done, timeout_s = once_until('found /decode', *node, '--ros-args', '-r',
                                 '/diagnostics:=/arm/diagnostics')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == (
        f'decode_watch: {"/decode published nothing" if node else "no node published"} on '
        f'/arm/diagnostics within {timeout_s} s; found /decode: wait longer (--timeout), or, if '
        'the node remaps that topic, remap it here too (--ros-args -r /diagnostics:=...)\n')


def test_asks_for_a_name_if_there_are_several_nodes(rig):
    other = rclpy.create_node('other')
    other.create_publisher(DiagnosticArray, '/other/token_stats', 10)
    try:
        rig.wait(lambda: rig.probe.count_publishers('/other/token_stats'))
        assert once('--node', '/decode').returncode == 0
        done = once()
        while not done.returncode:          # it had not discovered the other node yet
            done = once()
        assert done.stderr == ('decode_watch: there are several nodes: /decode /other; name one '
                               'with --node\n')
    finally:
        other.destroy_node()


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--node', 'a b'], "'a b' is not a valid node name"),
    (['--node', b'\xff'], "'\ufffd' is not a valid node name"),
    ([], 'the output is not a terminal; --once prints one snapshot')])
def test_rejects_invalid_names_and_an_output_that_is_not_a_terminal(rig, arguments, message):
    """The exit code is 1, and stderr has a message without a traceback."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert message in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('wrong', [('-p', 'x:=['), ('-r', 'a'), ('--nope',)])
def test_rejects_wrong_ros_arguments(wrong):
    """One line on stderr names the argument, without a traceback."""
    done = once('--ros-args', *wrong)
    assert done.returncode == 1
    assert done.stderr.startswith('decode_watch: ')
    assert wrong[-1] in done.stderr
    assert done.stderr.count('\n') == 1


def test_reports_a_closed_output_pipe(rig):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, '--once', '--timeout', str(PATIENCE_S)], stdout=writer,
        stderr=subprocess.PIPE, text=True, timeout=2 * PATIENCE_S)
    os.close(writer)
    assert (done.returncode, done.stderr) == (
        1, 'decode_watch: the reader of the output has closed it\n')


def test_reports_a_full_disk(rig):
    with open('/dev/full', 'w') as full:
        done = subprocess.run([*COMMAND, '--once', '--timeout', str(PATIENCE_S)], stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=2 * PATIENCE_S)
    assert (done.returncode, done.stderr) == (
        1, 'decode_watch: the output cannot be written: [Errno 28] No space left on device\n')


def test_number_rounds_to_four_digits():
    """It returns words unchanged."""
    assert number('9999.7') == '10000'
    assert [number(value) for value in ('3.14159265', '123456.7', '0.000012', 'n/a', 'none')] == [
        '3.142', '123457', '1.2e-05', 'n/a', 'none']


def test_printable_replaces_control_characters():
    """It keeps line breaks and letters of any script."""
    assert printable('a\n🙂\xe9\t\r\x1b\x7f\x80') == 'a\n🙂\xe9\ufffd\ufffd\ufffd\ufffd\ufffd'
