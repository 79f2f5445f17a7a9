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
Ask a running node: send a request, print the answer as it comes, then its figures.

The request has an id of its own, and only what bears that id is shown. The exit code is 0 for a
complete answer, also one that calls tools, 3 for one that was cut off at a length limit, else 1.
"""

import argparse
from collections.abc import Callable
import json
import os
import signal
import sys
import time
from typing import Any
import uuid

from diagnostic_msgs.msg import DiagnosticArray
from physai_decode.ros.messages import NOT_KNOWN
from physai_decode.ros.messages import status_name
from physai_decode.ros.topics import stream_qos
import rclpy
from rclpy.exceptions import NameValidationException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args
from std_msgs.msg import String

EXIT_CODES = {'stop': 0, 'tool_calls': 0, 'length': 3}      # by finish reason; 1 for any other
UNHEARD = (': wait longer (--timeout), or where the node has that topic remapped, remap it here '
           'too (--ros-args -r /diagnostics:=...)')


class AskError(Exception):
    """No answer; the message says why."""


class Asker(Node):
    """Sends one request and collects what belongs to it."""

    def __init__(self, target: str) -> None:
        """
        Subscribe to all that a node tells of its requests.

        :param target: the node's name, absolute or relative to the own namespace.
        """
        super().__init__(f'decode_ask_{os.getpid()}')
        self.id = str(uuid.uuid4())
        self.request = self.create_publisher(String, f'{target}/request', QoSProfile(depth=10))
        self.target = self.request.topic_name.removesuffix('/request')
        self.token_stats = self.create_subscription(
            DiagnosticArray, f'{target}/token_stats', self._on_token, stream_qos())
        self.create_subscription(
            DiagnosticArray, f'{target}/request_stats', self._on_request, stream_qos())
        # Last, because discovery tells the node of these in their order: once its diagnostics
        # come, it knows the others too.
        self.diagnostics = self.create_subscription(
            DiagnosticArray, '/diagnostics', self._on_diagnostics, QoSProfile(depth=100))
        self.show: Callable[[str], None] = lambda piece: None   # of the answer
        self.state = ''                     # the node's, once its diagnostics came
        self.pieces: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[dict[str, Any]] = []       # of tools
        self.stats: dict[str, str] = {}     # the request's figures, once it has ended
        self.reason = ''

    def send(self, text: str, options: dict[str, Any]) -> None:
        """Send a prompt, and further fields of the request."""
        self.request.publish(String(data=json.dumps(
            {**options, 'id': self.id, 'prompt': text})))

    def _on_diagnostics(self, message):
        if message.header.frame_id == self.target:
            for status in message.status:
                if status.name == status_name(self.target, 'engine'):
                    self.state = _values(status)['state']

    def _on_token(self, message):
        status = message.status[0]
        values = _values(status)
        if values['client_id'] == self.id:
            if int(values['index']) != len(self.pieces):
                raise AskError(f'token {len(self.pieces)} of the answer was lost')
            self.pieces.append(status.message)
            if values['reasoning'] != NOT_KNOWN:
                self.thoughts.append(values['reasoning'])
            if values['tool_calls'] != NOT_KNOWN:
                self.calls += json.loads(values['tool_calls'])
            self.show(status.message)

    def _on_request(self, message):
        status = message.status[0]
        values = _values(status)
        if values['client_id'] == self.id:
            self.stats, self.reason = values, status.message


def ask(asker: Asker, text: str, timeout_s: float, show: Callable[[str], None],
        options: dict[str, Any] | None = None) -> None:
    """
    Send a prompt and wait for the end of its answer.

    :param options: further fields of the request, such as ``{'temperature': 0.7}``.
    :param show: called with each piece of the answer.
    :raises AskError: the node is not there, or does not answer in time.
    """
    executor = SingleThreadedExecutor()
    executor.add_node(asker)
    end_s = time.monotonic() + timeout_s

    def wait_until(done, problem, advice=''):
        while not done():
            if time.monotonic() > end_s:
                raise AskError(f'{problem} within {timeout_s:g} s{advice}')
            executor.spin_once(timeout_sec=0.1)

    try:
        wait_until(lambda: asker.count_publishers(asker.token_stats.topic_name)
                   and asker.request.get_subscription_count(),
                   f'no node {asker.target} was seen on the topics')
        wait_until(lambda: asker.state, f'{asker.target} is there, but was not heard on '
                   f'{asker.diagnostics.topic_name}', UNHEARD)
        wait_until(lambda: asker.state != 'loading', f'{asker.target} was not ready')
        asker.show = show
        asker.send(text, options or {})
        wait_until(lambda: asker.stats
                   and len(asker.pieces) >= _number(asker.stats['output_tokens']),
                   f'no end of the answer came from {asker.target}')
    finally:
        executor.shutdown()


def main(args: list[str] | None = None) -> int:
    """Run the command; gives its exit code, see above."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = begin(_parser(), args)

    def show(piece):
        if not arguments.json:
            print(piece, end='', flush=True)

    code = 1
    try:
        asker = Asker(arguments.node)
    except NameValidationException:
        print(f'decode_ask: no node can be called {arguments.node!r}', file=sys.stderr)
        rclpy.shutdown()
        return 1
    try:
        ask(asker, arguments.text, arguments.timeout, show, arguments.options)
        code = EXIT_CODES.get(asker.stats['finish_reason'], 1)
        failure = asker.reason if code else ''
    except AskError as error:
        failure = str(error)
    except KeyboardInterrupt:
        failure = 'interrupted'
    except BrokenPipeError:
        failure = discard_output()
    finally:
        asker.destroy_node()
        rclpy.shutdown()
    try:
        if arguments.json:
            print(json.dumps({
                'text': ''.join(asker.pieces), 'reasoning': ''.join(asker.thoughts),
                'tool_calls': asker.calls, 'error': failure,
                **{key: _number(value) for key, value in asker.stats.items()}},
                ensure_ascii=False))
        elif asker.stats:
            print('\n' if asker.pieces else '', end='\n')
            for call in asker.calls:
                print(f'{call["function"]["name"]} {call["function"]["arguments"]}')
            for key, value in asker.stats.items():
                print(f'{key:24}{value}')
        sys.stdout.flush()
    except BrokenPipeError:
        code, failure = 1, discard_output()
    if failure:
        print(f'decode_ask: {failure}', file=sys.stderr)
    return code


def begin(parser: argparse.ArgumentParser, args: list[str] | None) -> argparse.Namespace:
    """
    Read a command's arguments and start rclpy, which leaves signals alone.

    :raises SystemExit: what is wrong with them has been said.
    """
    # Bytes that are no UTF-8 would stop rclpy.
    args = [each.encode(errors='surrogateescape').decode(errors='replace')
            for each in args or sys.argv]
    try:
        arguments = parser.parse_args(remove_ros_args(args)[1:])
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:       # a slip in the ROS arguments
        print(f'{parser.prog}: {type(error).__name__}: {error}', file=sys.stderr)
        raise SystemExit(1) from None
    return arguments


def discard_output() -> str:
    """Send what is left of the output nowhere, as Python tries again at its end; gives why."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 'nobody reads the output'


def _parser():
    parser = argparse.ArgumentParser(prog='decode_ask', description=__doc__.split('\n\n')[0])
    parser.add_argument('text', help='the prompt')
    parser.add_argument('--options', type=_object, default={}, metavar='JSON',
                        help='further fields of the request, such as \'{"temperature": 0.7}\'')
    parser.add_argument('--json', action='store_true', help='print one JSON object at the end')
    parser.add_argument('--node', default='decode', help="the node's name (%(default)s)")
    parser.add_argument('--timeout', type=float, default=60.0, metavar='S',
                        help='seconds to wait for the node and its whole answer (%(default)s)')
    return parser


def _object(text):
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON: {error}') from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object')
    return value


def _values(status):
    return {pair.key: pair.value for pair in status.values}


def _number(value):
    """Turn a value of a message into a number or None where it is one."""
    if value == NOT_KNOWN:
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


if __name__ == '__main__':
    sys.exit(main())
