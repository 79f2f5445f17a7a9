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

"""
`make demo`: start the node, send a prompt, show the stream and figures, and a /diagnostics line.

The exit code is 0 only if the answer was complete and the node ended cleanly. The demo stays on
this machine: other hosts do not see its topics, and it uses its own ROS domain unless
ROS_DOMAIN_ID is set.
"""

import os
from pathlib import Path
import shlex
import signal
import subprocess
import sys
import time

from diagnostic_msgs.msg import DiagnosticArray
from prompt import PROMPT
import rclpy
from rclpy.signals import SignalHandlerOptions

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_S = 180.0     # a first start compiles Python and reads torch from a cold disk
LISTEN_S = 3        # for a node that already runs; it is heard once a second
ASK_S = 60.0
END_S = 10.0
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
came = []           # signals


class Diagnostics:
    """The latest message of /decode on /diagnostics."""

    def __init__(self) -> None:
        self._node = rclpy.create_node('decode_demo')
        self._node.create_subscription(DiagnosticArray, '/diagnostics', self._store, 10)
        self._statuses = {}

    def next(self) -> dict[str, dict[str, str]] | None:
        """Wait up to 1 s for a message; return its statuses with their values, or None."""
        self._statuses = None
        until_s = time.monotonic() + 1.0
        while self._statuses is None and time.monotonic() < until_s:
            rclpy.spin_once(self._node, timeout_sec=0.1)
            raise_on_signal()
        return self._statuses

    def close(self) -> None:
        self._node.destroy_node()

    def _store(self, array):
        if array.header.frame_id == '/decode':
            self._statuses = {
                status.name: {pair.key: pair.value for pair in status.values}
                for status in array.status}


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    """Print a command and start it in a new session, with its log in a file."""
    print(f'$ {shown(arguments)}    # its log: {log.relative_to(ROOT)}', flush=True)
    log.parent.mkdir(exist_ok=True)
    with log.open('w') as file:
        return subprocess.Popen(
            arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def shown(arguments: list[str]) -> str:
    """Format a command as typed in the root of the repository."""
    return shlex.join(arguments).replace(f'{ROOT}/', '')


def wait_until_active(process: subprocess.Popen, diagnostics: Diagnostics) -> None:
    """
    Wait until the engine of the node is idle.

    :raises RuntimeError: the node ended or failed, or START_S passed.
    """
    start_s = time.monotonic()
    while time.monotonic() < start_s + START_S:
        statuses = diagnostics.next()
        if process.poll() is not None:
            raise RuntimeError(f'the node ended with code {process.returncode}')
        state = statuses and statuses['decode: engine']['state']
        if state == 'idle':
            print(f'  active after {time.monotonic() - start_s:.1f} s\n', flush=True)
            return
        if state == 'failed':
            raise RuntimeError('the node could not load its model')
    raise RuntimeError(f'the node was not active after {START_S:.0f} s')


def ask() -> None:
    """Send the prompt with decode_ask, which prints the answer."""
    command = [str(BIN / 'decode_ask'), PROMPT]
    print(f'$ {shown(command)}', flush=True)
    process = subprocess.Popen(command, cwd=ROOT)
    until_s = time.monotonic() + ASK_S
    try:
        while process.poll() is None and time.monotonic() < until_s:
            time.sleep(0.05)
            raise_on_signal()
    finally:
        process.kill()
    if process.wait():
        raise RuntimeError('there was no complete answer')


def show_diagnostics(diagnostics: Diagnostics) -> None:
    """Print the bandwidth from the next message on /diagnostics that includes the answer."""
    for _ in range(10):
        statuses = diagnostics.next()
        if statuses and statuses['decode: engine']['tokens'] != '0':
            values = statuses['decode: bandwidth']
            figures = '  '.join(f'{key}={value}' for key, value in values.items())
            print(f'\n/diagnostics, decode: bandwidth\n  {figures}', flush=True)
            return
    raise RuntimeError('nothing came on /diagnostics')


def end(process: subprocess.Popen) -> None:
    """
    Send SIGINT to the node and wait for its end.

    :raises RuntimeError: the node did not end, or its exit code is not 0.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f'the node did not end within {END_S:.0f} s of SIGINT') from None
    if process.returncode:
        raise RuntimeError(f'the node ended with code {process.returncode}')


def raise_on_signal() -> None:
    """
    Raise KeyboardInterrupt after a signal.

    The handler itself does not raise: during the start of a child, that would lose the child.
    """
    if came:
        raise KeyboardInterrupt


def main() -> int:
    """Run the demo; return the exit code."""
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    log = ROOT / 'log' / 'demo_node.log'
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        diagnostics = Diagnostics()
        if any(diagnostics.next() for _ in range(LISTEN_S)):
            print(f'demo: a node /decode already runs in domain {os.environ["ROS_DOMAIN_ID"]}: '
                  'end it, or set another ROS_DOMAIN_ID', file=sys.stderr)
            return 1
        process = start(
            [str(BIN / 'decode_node'), '--ros-args', '--params-file',
             str(ROOT / 'config' / 'decode.yaml'),
             '-p', f'constraint.schema_file:={ROOT / "config" / "plan.schema.json"}'], log)
        try:
            wait_until_active(process, diagnostics)
            ask()
            show_diagnostics(diagnostics)
        finally:
            diagnostics.close()
            rclpy.try_shutdown()
            end(process)
    except RuntimeError as error:
        print(f'demo: {error}; the end of {log.relative_to(ROOT)}:', file=sys.stderr)
        print(''.join(log.read_text().splitlines(keepends=True)[-20:]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print('\nThe node ended with code 0.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
