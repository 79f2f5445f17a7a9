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
Watch a running node in the terminal: its state, its stream, its latency and its bandwidth.

The command only subscribes, to `/diagnostics`, `~/token_stats` and `~/request_stats`. It calls no
service and computes no figures. It keeps only the newest tokens.
"""

import argparse
from collections import deque
from collections.abc import Iterable
from collections.abc import Iterator
import os
import sys
import threading
import time

from diagnostic_msgs.msg import DiagnosticArray
from diagnostic_msgs.msg import DiagnosticStatus
from physai_decode.ros.ask import DIAGNOSTICS_HINT
from physai_decode.ros.ask import discard_output
from physai_decode.ros.ask import start
from physai_decode.ros.ask import stop_on_signal
from physai_decode.ros.messages import NOT_KNOWN
from physai_decode.ros.messages import status_name
from physai_decode.ros.messages import values_of
from physai_decode.ros.topics import decode_nodes
from physai_decode.ros.topics import start_advice
from physai_decode.ros.topics import stream_qos
import rclpy
from rclpy.exceptions import NameValidationException
from rclpy.executors import SingleThreadedExecutor
from rclpy.expand_topic_name import expand_topic_name
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rich.console import Console
from rich.console import ConsoleOptions
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

REFRESH_S = 0.2
SILENT_S = 3.0              # without a message, after which a node counts as gone
KEPT_TOKENS = 500
KEPT_CHARACTERS = 10000
BARS = '▁▂▃▄▅▆▇█'
LEVELS = {DiagnosticStatus.OK: 'OK', DiagnosticStatus.WARN: 'WARN',
          DiagnosticStatus.ERROR: 'ERROR', DiagnosticStatus.STALE: 'STALE'}
STYLES = {DiagnosticStatus.OK: '', DiagnosticStatus.WARN: 'yellow'}
STATE_STYLES = {'generating': 'green', 'idle': 'green', 'loading': 'yellow', 'inactive': 'yellow',
                'unconfigured': 'yellow'}


class WatchError(Exception):
    """There is nothing to watch; the message says why."""


class Watcher(Node):
    """Subscribes to one node: the named one, or else the first whose diagnostics arrive."""

    def __init__(self, name: str = '') -> None:
        """
        Subscribe to `/diagnostics`, and to the topics of the node if it is named.

        :param name: the node's name, absolute or relative to the namespace of this one; empty for
            any node.
        :raises NameValidationException: the name is not valid.
        """
        super().__init__(f'decode_watch_{os.getpid()}')
        self.target = ''
        self.received_s: float | None = None    # when the last message arrived
        self.period_s = 0.0                     # between the last two messages on /diagnostics
        self.levels: dict[str, bytes] = {}      # by task: latency, bandwidth, engine
        self.notes: dict[str, str] = {}         # the messages of the statuses, by task
        self.values: dict[str, str] = {}        # of all statuses, whose keys are disjoint
        self.hardware_id = NOT_KNOWN
        self.last_request = ''                  # a summary of the last finished request
        self._diagnosed_s: float | None = None
        self._reset()
        self.diagnostics = self.create_subscription(
            DiagnosticArray, '/diagnostics', self._on_diagnostics, QoSProfile(depth=100))
        if name:
            self._follow(name)

    def silent_s(self, now_s: float) -> float:
        """Return the seconds since the last message, or 0 if that is a normal interval."""
        if self.received_s is None or now_s - self.received_s < max(SILENT_S, 3 * self.period_s):
            return 0.0
        return now_s - self.received_s

    def _follow(self, name: str) -> None:
        self.create_subscription(
            DiagnosticArray, f'{name}/token_stats', self._on_token, stream_qos())
        # Not from the topic's name, which may be remapped.
        self.target = expand_topic_name(name, self.get_name(), self.get_namespace())
        self.create_subscription(
            DiagnosticArray, f'{name}/request_stats', self._on_request, QoSProfile(depth=100))

    def _reset(self) -> None:
        self.request_id = ''
        self.text = ''                          # of the newest request
        self.itl_ms: deque[tuple[float, bool]] = deque(maxlen=KEPT_TOKENS)  # and whether late

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        statuses = {status.name: status for status in message.status}
        if status_name(message.header.frame_id, 'engine') not in statuses:
            return                              # not from a decode node
        if not self.target:
            self._follow(message.header.frame_id)
        if message.header.frame_id != self.target:
            return
        now_s, before = time.monotonic(), self.values.get('requests', '0')
        if self._diagnosed_s is not None:
            self.period_s = now_s - self._diagnosed_s
        self.received_s = self._diagnosed_s = now_s
        for name, status in statuses.items():
            task = name.rpartition(' ')[2]
            self.levels[task] = status.level
            self.notes[task] = printable(status.message)
            self.values.update({pair.key: printable(pair.value) for pair in status.values})
            self.hardware_id = printable(status.hardware_id)
        if int(self.values['requests']) < int(before):
            self._reset()                       # the node was restarted

    def _on_token(self, message: DiagnosticArray) -> None:
        self.received_s = time.monotonic()
        status = message.status[0]
        values = values_of(status)
        if values['request_id'] != self.request_id:
            self.request_id, self.text = values['request_id'], ''
        self.text = (self.text + printable(status.message))[-KEPT_CHARACTERS:]
        if values['itl_ms'] != NOT_KNOWN:
            self.itl_ms.append((float(values['itl_ms']), values['deadline_missed'] == '1'))

    def _on_request(self, message: DiagnosticArray) -> None:
        status = message.status[0]
        values = values_of(status)
        items = '' if values.get('first_item_ms', NOT_KNOWN) == NOT_KNOWN else (
            f'; {values["items"]} items, first after {number(values["first_item_ms"])} ms')
        self.last_request = printable(
            f'{values["request_id"]}, {status.message}: {values["output_tokens"]} tokens, first '
            f'after {number(values["ttft_ms"])} ms, then {number(values["tokens_per_s"])} per s'
            f'{items}')


def printable(text: str) -> str:
    """Replace each character that would control the terminal with U+FFFD."""
    return ''.join(
        char if char == '\n' or ' ' <= char < '\x7f' or char >= '\xa0' else '\ufffd'
        for char in text)


def number(value: str) -> str:
    """Shorten a number to four digits; return other words unchanged."""
    try:
        return f'{float(value):.4g}' if abs(float(value)) < 9999.5 else f'{float(value):.0f}'
    except ValueError:
        return value


def snapshot(watcher: Watcher) -> str:
    """Format the node's last message on /diagnostics, one line per key."""
    worst = max(watcher.levels.values())
    note = '; '.join(watcher.notes[name] for name, level in watcher.levels.items()
                     if level != DiagnosticStatus.OK)
    lines = {'node': watcher.target, 'hardware_id': watcher.hardware_id,
             'level': LEVELS[worst], 'message': note or NOT_KNOWN, **watcher.values}
    return '\n'.join(f'{key:24}{value}'.replace('\n', ' ') for key, value in lines.items())


def view(watcher: Watcher, width: int, now_s: float) -> Layout | Text:
    """
    Render the whole screen.

    :param width: of the screen, in characters.
    :param now_s: the time of the monotonic clock.
    """
    if not watcher.values:
        other_nodes = _other_nodes(watcher)
        return Text(f'waiting for {watcher.target or "a node"} on '
                    f'{watcher.diagnostics.topic_name}; Ctrl-C ends'
                    + (f'; found {" ".join(other_nodes)}' if other_nodes else ''))
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style='bold', no_wrap=True, min_width=9)
    figures.add_column(no_wrap=True, overflow='ellipsis')
    rows = _rows(watcher, max(width - 12, 10))
    for title, content in rows:
        figures.add_row(title, Text(content) if isinstance(content, str) else content)
    head = _head(watcher, now_s)
    layout = Layout()
    layout.split_column(
        Layout(head, size=2),
        Layout(Panel(_Tail(watcher.text), title=f'request {watcher.request_id or NOT_KNOWN}',
                     title_align='left', border_style='dim'), minimum_size=3),
        Layout(figures, size=len(rows)))
    return layout


class _Tail:
    """The last lines of a text, as many as fit."""

    def __init__(self, text: str) -> None:
        self._text = Text(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        lines = self._text.wrap(console, options.max_width)
        yield from lines[-(options.height or len(lines)):]


def _other_nodes(watcher: Watcher) -> list[str]:
    return [name for name in decode_nodes(watcher) if name != watcher.target]


def _head(watcher: Watcher, now_s: float) -> Text:
    values = watcher.values
    state, style = values['state'], STATE_STYLES.get(values['state'], 'bold red')
    note = watcher.notes['engine']
    if note and note != state:
        state = f'{state}: {note}'
    if silent_s := watcher.silent_s(now_s):
        state, style = f'gone: no message for {silent_s:.0f} s', 'bold red'
    head = Text(f'{watcher.target}  ', style='bold', no_wrap=True, overflow='ellipsis')
    head.append(state, style=style)
    if other_nodes := _other_nodes(watcher):
        head.append(f'   (also {" ".join(other_nodes)}: --node)', style='dim')
    head.append(
        f'\n{values["model"]}, {values["engine"]}, {values["dtype"]}, quantization '
        f'{values["quantization"]}, {values["device"]}: {watcher.hardware_id}, CUDA graph '
        f'{values["cuda_graph"]}', style='not bold')
    return head


def _rows(watcher: Watcher, width: int) -> tuple[tuple[str, str | Text], ...]:
    """Return the titles and contents of the rows, `width` characters wide."""
    v = {key: number(value) for key, value in watcher.values.items()}
    late = STYLES.get(watcher.levels['latency'], 'bold red')
    slow = STYLES.get(watcher.levels['bandwidth'], 'bold red')

    def known(**units: str) -> str:
        return ', '.join(f'{v[key]} {unit}' for key, unit in units.items()
                         if v[key] != NOT_KNOWN) or NOT_KNOWN

    return (
        ('latency', f'p50 {v["itl_p50_ms"]}  p95 {v["itl_p95_ms"]}  p99 {v["itl_p99_ms"]}  '
                    f'max {v["itl_max_ms"]}  jitter {v["jitter_ms"]} ms   {v["count"]} '
                    f'tokens in {v["window_s"]} s'),
        ('', _sparkline(watcher.itl_ms, width)),
        ('deadline', Text(
            known(token_deadline_ms='ms a token', ttft_deadline_ms='ms to the first',
                  request_deadline_ms='ms a request').replace(NOT_KNOWN, 'none')
            + f': {v["deadline_misses"]} missed, {v["consecutive_misses"]} in a row, worst '
            f'{v["worst_overrun_ms"]} ms over', style=late)),
        ('floor', _bar(v['r_floor'], width // 3).append(
            f' {v["r_floor"]} of the limit: the floor is {v["floor_ms"]} ms', style=slow)),
        ('bandwidth', f'{v["bandwidth_gb_s"]} of {v["peak_bandwidth_gb_s"]} GB/s '
                      f'({v["peak_source"]})   weights {v["weight_gb"]} GB, keys and values '
                      f'{v["kv_gb"]} GB'),
        ('host gap', f'{v["host_gap_ms"]} ms'),
        ('verdict', watcher.values.get('verdict', NOT_KNOWN)),
        ('memory', known(memory_used_gb='GB used', memory_free_gb='GB free')),
        ('device', known(temperature_c='°C', power_w='W', sm_clock_mhz='MHz',
                         memory_clock_mhz='MHz of the memory',
                         throttle_reasons='throttle reasons')),
        ('queue', f'{v["queue_depth"]} of {v["queue_capacity"]}   {v["requests"]} requests, '
                  f'{v["tokens"]} tokens, {v["refusals"]} refused'),
        ('last', watcher.last_request or NOT_KNOWN))


def _sparkline(samples: Iterable[tuple[float, bool]], width: int) -> Text:
    """Draw the latencies of the newest tokens as bars from 0 to the largest; late ones in red."""
    newest = list(samples)[-width:]
    largest = max((itl_ms for itl_ms, _ in newest), default=0.0) or 1.0
    line = Text()
    for itl_ms, late in newest:
        height = round(itl_ms / largest * (len(BARS) - 1))
        line.append(BARS[height], 'bold red' if late else 'cyan')
    return line


def _bar(ratio: str, width: int) -> Text:
    """Draw a ratio from 0 to 1; a larger one fills the bar, an unknown one leaves it empty."""
    full = 0 if ratio == NOT_KNOWN else round(min(float(ratio), 1.0) * width)
    return Text('█' * full, style='green').append('░' * (width - full), style='dim')


def _spin(executor: SingleThreadedExecutor, stop: threading.Event, duration_s: float) -> None:
    end_s = time.monotonic() + duration_s
    while not stop.is_set() and (left_s := end_s - time.monotonic()) > 0:
        executor.spin_once(timeout_sec=left_s)


def _once(watcher: Watcher, executor: SingleThreadedExecutor, stop: threading.Event,
          timeout_s: float) -> None:
    """
    Wait for the diagnostics of the node and print them.

    :raises WatchError: no message arrived in time, or there are several nodes and none was named.
    """
    named = bool(watcher.target)
    end_s = time.monotonic() + timeout_s
    while not watcher.values:
        left_s = end_s - time.monotonic()
        if stop.is_set():
            raise WatchError('interrupted')
        if left_s <= 0:
            names = decode_nodes(watcher)
            hint = DIAGNOSTICS_HINT if not named or watcher.target in names else ''
            raise WatchError(
                f'{watcher.target or "no node"} published {"nothing " if named else ""}on '
                f'{watcher.diagnostics.topic_name} within {timeout_s:g} s'
                + (f'; found {" ".join(names)}{hint}' if names else start_advice(watcher)))
        _spin(executor, stop, min(0.05, left_s))
    names = decode_nodes(watcher)
    if not named and len(names) > 1:
        raise WatchError(f'there are several nodes: {" ".join(names)}; name one with --node')
    print(snapshot(watcher), flush=True)


def _watch(watcher: Watcher, executor: SingleThreadedExecutor, stop: threading.Event,
           console: Console) -> None:
    """
    Refresh the screen until `stop` is set.

    :raises WatchError: the output is not a terminal.
    """
    if not console.is_terminal:
        raise WatchError('the output is not a terminal; --once prints one snapshot')
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not stop.is_set():
            live.update(view(watcher, console.width, time.monotonic()), refresh=True)
            _spin(executor, stop, REFRESH_S)


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    stop = stop_on_signal()
    arguments = start(_parser(), args)
    executor, watcher = SingleThreadedExecutor(), None
    try:
        watcher = Watcher(arguments.node)
        executor.add_node(watcher)
        if arguments.once:
            _once(watcher, executor, stop, arguments.timeout)
        else:
            _watch(watcher, executor, stop, Console())
    except NameValidationException:
        print(f'decode_watch: {arguments.node!r} is not a valid node name', file=sys.stderr)
        return 1
    except WatchError as error:
        print(f'decode_watch: {error}', file=sys.stderr)
        return 1
    except OSError as error:
        print(f'decode_watch: {discard_output(error)}', file=sys.stderr)
        return 1
    finally:
        executor.shutdown()
        if watcher is not None:
            watcher.destroy_node()
        rclpy.shutdown()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='decode_watch', description=__doc__.split('\n\n')[0])
    parser.add_argument('--node', default='', metavar='NAME',
                        help='the node to watch; by default the first whose diagnostics arrive')
    parser.add_argument('--once', action='store_true',
                        help='print one snapshot, one line per key, and exit')
    parser.add_argument('--timeout', type=float, default=10.0, metavar='S',
                        help='seconds that --once waits for the node (%(default)s)')
    return parser


if __name__ == '__main__':
    sys.exit(main())
