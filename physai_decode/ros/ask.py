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
Send a prompt to a running node, print the answer as it streams, and then its figures.

The request has a unique id, and the command ignores messages with other ids. The exit code is 0
for a complete answer or tool calls, 3 for an answer that reached a length limit, and 1 otherwise.
"""

import argparse
from collections.abc import Callable
import json
import math
import os
import signal
import sys
import threading
import time
from typing import Any
import uuid

from diagnostic_msgs.msg import DiagnosticArray
from physai_decode.ros import dds
from physai_decode.ros.messages import NOT_KNOWN
from physai_decode.ros.messages import status_name
from physai_decode.ros.messages import values_of
from physai_decode.ros.topics import decode_nodes
from physai_decode.ros.topics import start_advice
from physai_decode.ros.topics import stream_qos
import rclpy
from rclpy.duration import Duration
from rclpy.exceptions import NameValidationException
from rclpy.executors import SingleThreadedExecutor
from rclpy.expand_topic_name import expand_topic_name
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args
from std_msgs.msg import String

OWN = {'cancel', 'id', 'metadata', 'prompt'}    # fields that cannot be an option
EXIT_CODES = {'stop': 0, 'tool_calls': 0, 'length': 3}      # by finish reason; otherwise 1
ACK_S = 0.5                     # limit on the delivery of a cancel
NOTICE_S = 3.0                  # after this time without a node, say what the command waits for
DIAGNOSTICS_HINT = (': wait longer (--timeout), or, if the node remaps that topic, remap it here '
                    'too (--ros-args -r /diagnostics:=...)')


class AskError(Exception):
    """There is no complete answer; the message says why."""


class Asker(Node):
    """Sends one request and collects its answer and its figures."""

    def __init__(self, target: str) -> None:
        """
        Subscribe to the node's topics.

        :param target: the node's name, absolute or relative to the namespace of this one.
        """
        super().__init__(f'decode_ask_{os.getpid()}')
        self.id = str(uuid.uuid4())
        self.request = self.create_publisher(String, f'{target}/request', QoSProfile(depth=10))
        # Not from the topic's name, which may be remapped.
        self.target = expand_topic_name(target, self.get_name(), self.get_namespace())
        self.token_stats = self.create_subscription(
            DiagnosticArray, f'{target}/token_stats', self._on_token, stream_qos())
        self.create_subscription(
            DiagnosticArray, f'{target}/request_stats', self._on_request, stream_qos())
        # Last, because the node discovers subscriptions in the order of their creation: once its
        # diagnostics arrive here, it has discovered the ones above.
        self.diagnostics = self.create_subscription(
            DiagnosticArray, '/diagnostics', self._on_diagnostics, QoSProfile(depth=100))
        self.show: Callable[[str], None] = lambda piece: None   # called with each piece
        self.state = ''                     # of the node; empty until its diagnostics arrive
        self.pieces: list[str] = []
        self.thoughts: list[str] = []
        self.tool_calls: list[dict[str, Any]] = []
        self.stats: dict[str, str] = {}     # the figures of the request; empty until it ends
        self.reason = ''

    def send(self, text: str, options: dict[str, Any]) -> None:
        """Send a prompt with further fields of the request."""
        self.request.publish(String(data=json.dumps(
            {**options, 'id': self.id, 'prompt': text})))

    def cancel(self) -> None:
        """End the request, of which nobody will read the rest."""
        self.request.publish(String(data=json.dumps({'id': self.id, 'cancel': True})))
        self.request.wait_for_all_acked(Duration(seconds=ACK_S))

    def unmatched(self) -> list[str]:
        """List the topics that no node publishes or subscribes to, but a decode node does."""
        return ([] if self.request.get_subscription_count() else [self.request.topic_name]) + (
            [] if self.count_publishers(self.token_stats.topic_name)
            else [self.token_stats.topic_name])

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        if message.header.frame_id == self.target:
            for status in message.status:
                if status.name == status_name(self.target, 'engine'):
                    self.state = values_of(status)['state']

    def _on_token(self, message: DiagnosticArray) -> None:
        status = message.status[0]
        values = values_of(status)
        if values['client_id'] == self.id:
            if int(values['index']) != len(self.pieces):
                raise AskError(f'token {len(self.pieces)} of the answer was lost')
            self.pieces.append(status.message)
            if values['reasoning'] != NOT_KNOWN:
                self.thoughts.append(values['reasoning'])
            if values['tool_calls'] != NOT_KNOWN:
                self.tool_calls += json.loads(values['tool_calls'])
            self.show(status.message)

    def _on_request(self, message: DiagnosticArray) -> None:
        status = message.status[0]
        values = values_of(status)
        if values['client_id'] == self.id:
            self.stats, self.reason = values, status.message


def ask(asker: Asker, text: str, timeout_s: float, show: Callable[[str], None],
        options: dict[str, Any] | None = None, stop: threading.Event | None = None) -> None:
    """
    Send a prompt and wait for the end of the answer.

    :param show: called with each piece of the answer.
    :param options: further fields of the request, such as ``{'temperature': 0.7}``.
    :param stop: ends the wait when it is set.
    :raises AskError: the node does not exist, or does not answer in time, or `stop` was set.
    """
    executor = SingleThreadedExecutor()
    executor.add_node(asker)
    end_s = time.monotonic() + timeout_s
    notice_s = time.monotonic() + NOTICE_S

    def wait_until(done: Callable[[], object], problem: str,
                   advice: Callable[[], str] = lambda: '') -> None:
        nonlocal notice_s
        while not done():
            if stop and stop.is_set():
                raise AskError('interrupted')
            if time.monotonic() > notice_s:
                notice_s = math.inf
                print(f'decode_ask: waiting up to {timeout_s:g} s: {problem}{advice()}',
                      file=sys.stderr)
            if time.monotonic() > end_s:
                raise AskError(f'{problem} within {timeout_s:g} s{advice()}')
            executor.spin_once(timeout_sec=0.1)

    def found() -> str:
        if asker.target in (f'{space.rstrip("/")}/{name}' for name, space
                            in asker.get_node_names_and_namespaces()):
            return (f'; a node of this name runs, but not with {" and ".join(asker.unmatched())}: '
                    'if it remaps a topic, remap it here too (--ros-args -r OLD:=NEW)')
        names = [name for name in decode_nodes(asker) if name != asker.target]
        return f'; found {" ".join(names)}' if names else start_advice(asker)

    try:
        wait_until(lambda: not asker.unmatched(), f'no node {asker.target} was found', found)
        wait_until(lambda: asker.state, f'{asker.target} exists, but published nothing on '
                   f'{asker.diagnostics.topic_name}', lambda: DIAGNOSTICS_HINT)
        wait_until(lambda: asker.state != 'loading', f'{asker.target} was not ready')
        asker.show, notice_s = show, math.inf
        asker.send(text, options or {})
        try:
            wait_until(lambda: asker.stats
                       and len(asker.pieces) >= int(asker.stats['output_tokens']),
                       f'{asker.target} did not finish its answer')
        except (AskError, OSError):
            asker.cancel()
            raise
    finally:
        executor.shutdown()


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    stop = stop_on_signal()
    arguments = start(_parser(), args)

    def show(piece: str) -> None:
        if not arguments.json:
            print(piece, end='', flush=True)

    code = 1
    try:
        asker = Asker(arguments.node)
    except NameValidationException:
        print(f'decode_ask: {arguments.node!r} is not a valid node name', file=sys.stderr)
        rclpy.shutdown()
        return 1
    try:
        ask(asker, arguments.text, arguments.timeout, show, arguments.options, stop)
        code = EXIT_CODES.get(asker.stats['finish_reason'], 1)
        failure = asker.reason if code else ''
    except AskError as error:
        failure = str(error)
    except OSError as error:
        failure = discard_output(error)
    finally:
        asker.destroy_node()
        rclpy.shutdown()
    try:
        if arguments.json:
            print(json.dumps({
                'text': ''.join(asker.pieces), 'reasoning': ''.join(asker.thoughts),
                'tool_calls': asker.tool_calls, 'error': failure,
                **{key: _number(value) for key, value in asker.stats.items()}},
                ensure_ascii=False))
        elif asker.stats and asker.stats['finish_reason'] != 'rejected':
            print('\n' if asker.pieces else '', end='\n')
            for call in asker.tool_calls:
                print(f'{call["function"]["name"]} {call["function"]["arguments"]}')
            for key, value in asker.stats.items():
                print(f'{key:24}{value}')
        sys.stdout.flush()
    except OSError as error:
        code, failure = 1, discard_output(error)
    if failure:
        print(f'decode_ask: {failure}', file=sys.stderr)
    return code


def stop_on_signal() -> threading.Event:
    """
    Return an event that SIGINT or SIGTERM sets.

    A handler that raised KeyboardInterrupt could do so in rclpy's native code, which reports it as
    an error of its own.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def start(parser: argparse.ArgumentParser, args: list[str] | None) -> argparse.Namespace:
    """
    Parse a command's arguments and initialise rclpy without its signal handlers.

    :raises SystemExit: an argument is wrong; the error was printed.
    """
    # rclpy raises for bytes that are not valid UTF-8.
    args = [each.encode(errors='surrogateescape').decode(errors='replace')
            for each in args or sys.argv]
    dds.configure()
    try:
        arguments = parser.parse_args(remove_ros_args(args)[1:])
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:       # a wrong ROS argument
        print(f'{parser.prog}: {type(error).__name__}: {error}', file=sys.stderr)
        raise SystemExit(1) from None
    return arguments


def discard_output(error: OSError) -> str:
    """
    Redirect stdout to /dev/null, because Python flushes it again at exit.

    :returns: the message for an output that failed with this error.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 'the reader of the output has closed it' if isinstance(error, BrokenPipeError) else \
        f'the output cannot be written: {error}'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='decode_ask', description=__doc__.split('\n\n')[0])
    parser.add_argument('text', help='the prompt')
    parser.add_argument('--options', type=_object, default={}, metavar='JSON',
                        help='further fields of the request, such as \'{"temperature": 0.7}\'')
    parser.add_argument('--json', action='store_true', help='print one JSON object at the end')
    parser.add_argument('--node', default='decode', help="the node's name (%(default)s)")
    parser.add_argument('--timeout', type=float, default=60.0, metavar='S',
                        help='seconds to wait for the node and the end of its answer '
                             '(%(default)s)')
    return parser


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f'{text!r:.200} is not JSON: {error}') from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object')
    if own := sorted(value.keys() & OWN):
        raise argparse.ArgumentTypeError(
            f'{text!r:.200} has {" and ".join(own)}, which the command sets or does not support: '
            'leave it out')
    return value


def _number(value: str) -> int | float | str | None:
    """Convert a value of a message to a number or None; return other words unchanged."""
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
