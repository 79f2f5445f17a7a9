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
Record `decode_watch` beside a running node, and write docs/watch.svg from it.

The node runs the embedded model at a fixed pace, so that a reader can follow the text. It answers
twice, and the second answer is recorded. Each frame is what `decode_watch` draws at that moment,
unchanged. A reader who prefers reduced motion sees the last frame.
"""

from collections import Counter
import html
import io
import os
import subprocess
import sys
import time

from demo import BIN
from demo import end
from demo import ROOT
from demo import start
from physai_decode.ros.watch import REFRESH_S
from physai_decode.ros.watch import view
from physai_decode.ros.watch import Watcher
from prompt import PROMPT
import rclpy
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME

TARGET = ROOT / 'docs' / 'watch.svg'
COLUMNS, ROWS = 100, 18
TOKENS_PER_S = 15.0
START_S = 180.0                     # for a first start, which compiles Python
TAIL_S = 2.0                        # recorded after the answer's end
WIDTH, HEIGHT, MARGIN = 8.4, 19.0, 12.0         # of a character, of a line, around all, in px

Line = tuple[Segment, ...]


def record(watcher: Watcher) -> list[list[Line]]:
    """
    Ask the node and draw a frame every `REFRESH_S` seconds.

    :raises RuntimeError: the answer was not complete.
    """
    console = Console(
        width=COLUMNS, height=ROWS, force_terminal=True, color_system='truecolor',
        file=io.StringIO())
    frames: list[list[Line]] = []
    until_s = 0.0
    asked = subprocess.Popen([str(BIN / 'decode_ask'), PROMPT], stdout=subprocess.DEVNULL)
    while not until_s or time.monotonic() < until_s:
        next_s = time.monotonic() + REFRESH_S
        while (left_s := next_s - time.monotonic()) > 0:
            rclpy.spin_once(watcher, timeout_sec=left_s)
        lines = console.render_lines(view(watcher, COLUMNS, time.monotonic()))
        frames.append([tuple(Segment.simplify(line)) for line in lines[:ROWS]])
        if not until_s and asked.poll() is not None:
            until_s = time.monotonic() + TAIL_S
    if asked.returncode:
        raise RuntimeError(f'decode_ask ended with code {asked.returncode}')
    return frames


def svg(frames: list[list[Line]]) -> str:
    """Format the recording as an animated SVG; rows that never change occur once."""
    rows = Counter((number, line) for frame in frames for number, line in enumerate(frame))
    steady = {row for row, count in rows.items() if count == len(frames)}
    width, height = COLUMNS * WIDTH + 2 * MARGIN, ROWS * HEIGHT + 2 * MARGIN
    total_s = len(frames) * REFRESH_S
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        'aria-label="decode_watch beside a node that answers">',
        '<style>text { font: 14px "DejaVu Sans Mono", Menlo, Consolas, monospace; '
        'white-space: pre; fill: #c5c8c6 }',
        f'.f {{ visibility: hidden; animation: f {total_s:g}s step-end infinite }}',
        f'@keyframes f {{ 0% {{ visibility: visible }} '
        f'{100 / len(frames):.4f}% {{ visibility: hidden }} }}',
        '@media (prefers-reduced-motion) { .f { animation: none } '
        '.f:last-child { visibility: visible } }</style>',
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#1b1d20"/>',
        *(drawn(number, line) for number, line in sorted(steady, key=lambda row: row[0]))]
    for count, frame in enumerate(frames):
        moving = (drawn(number, line) for number, line in enumerate(frame)
                  if (number, line) not in steady)
        parts.append(f'<g class="f" style="animation-delay: {count * REFRESH_S:g}s">'
                     + ''.join(moving) + '</g>')
    return '\n'.join([*parts, '</svg>']) + '\n'


def drawn(number: int, line: Line) -> str:
    """Format a line of the terminal; each piece begins at its own column."""
    pieces, column = [], 0
    for text, style, _ in line:
        if text.strip():
            pieces.append(f'<tspan x="{MARGIN + column * WIDTH:g}" '
                          f'textLength="{len(text) * WIDTH:g}"'
                          f'{looks(style or Style())}>{html.escape(text)}</tspan>')
        column += len(text)
    return f'<text y="{MARGIN + (number + 0.75) * HEIGHT:g}">{"".join(pieces)}</text>'


def looks(style: Style) -> str:
    """Return the SVG attributes of a style."""
    found = ''
    if style.color is not None and not style.color.is_default:
        red, green, blue = style.color.get_truecolor(SVG_EXPORT_THEME)
        found += f' fill="#{red:02x}{green:02x}{blue:02x}"'
    if style.bold:
        found += ' font-weight="bold"'
    if style.dim:
        found += ' opacity="0.6"'
    return found


def main() -> int:
    """Record and write; return the exit code."""
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    node = start(
        [str(BIN / 'decode_node'), '--ros-args', '--params-file',
         str(ROOT / 'config' / 'decode.yaml'), '-p', f'pace.tokens_per_s:={TOKENS_PER_S}'],
        ROOT / 'log' / 'watch_node.log')
    rclpy.init()
    watcher = Watcher()
    try:
        until_s = time.monotonic() + START_S
        while watcher.values.get('state') != 'idle':
            rclpy.spin_once(watcher, timeout_sec=REFRESH_S)
            if time.monotonic() > until_s or node.poll() is not None:
                raise RuntimeError('the node did not become active; log/watch_node.log says why')
        record(watcher)                 # fills the figures of the window
        TARGET.write_text(svg(record(watcher)))
    finally:
        watcher.destroy_node()
        rclpy.shutdown()
        end(node)
    return 0


if __name__ == '__main__':
    sys.exit(main())
