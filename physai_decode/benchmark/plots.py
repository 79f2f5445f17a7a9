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
Plots of the report: step time over context, fraction of the floor, latencies, parts of a step.

They need matplotlib. Without it, the report has no plots and says so.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from statistics import median
from typing import Any

from physai_decode.benchmark import report
from physai_decode.benchmark.runner import Result

LEAST_P99 = 200                 # tokens; of fewer, the 99th percentile is about the maximum
# The palette of Okabe and Ito, safe for most kinds of colour blindness.
_COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9', '#7F7F7F', '#8B4513')
Colours = dict[str, str]            # by label
_PARTS = (('floor', '#009E73'), ('kernels beyond the floor', '#E69F00'), ('host gap', '#D55E00'))


def draw(results: Sequence[Result], out: Path) -> list[Path]:
    """
    Draw the results and write PNG files.

    :return: the paths of the files; empty if the results have no measured cell.
    :raises ImportError: matplotlib is not installed.
    """
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    if not report.cells(results):
        return []
    pyplot.rcParams.update({'font.size': 10, 'axes.grid': True, 'grid.alpha': 0.3,
                            'axes.spines.top': False, 'axes.spines.right': False})
    names = list(dict.fromkeys(report.label(result) for result, _ in report.cells(results)))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    paths = []
    for name, make in (('step_time', _step_time), ('floor_fraction', _floor_fraction),
                       ('latencies', _latencies), ('where_time_goes', _where),
                       ('beside', _beside), ('time_to_first_token', _prompts)):
        figure = make(pyplot, results, colours)
        if figure is not None:
            paths.append(out / f'{name}.png')
            figure.savefig(paths[-1], dpi=130, bbox_inches='tight')
            pyplot.close(figure)
    return paths


def _beside(pyplot: Any, results: Sequence[Result], _colours: Colours) -> Any:
    """Draw the distribution of step times, alone and beside each neighbour."""
    rows = [(f'{name}, {context:,}', run)
            for (name, context), found in report.grouped(results).items()
            for cell in found for run in cell.get('beside', ())]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for index, (name, run) in enumerate(rows):
        for how, style, label in (('alone', ':', 'alone'),
                                  ('beside', '-', f'beside {run["neighbour"]}')):
            times = sorted((1e3 * itl_s for itl_s in run[how]), reverse=True)
            parts = [(1 + place) / len(times) for place in range(len(times))]
            axes.step(times, parts, style, color=f'C{index}',
                      label=f'{name}, {label}')
    axes.set_yscale('log')
    _log_scale(axes, axes.xaxis)
    # After a late step, the steps behind it arrive at once; hide these short times.
    axes.set_xlim(left=500 * min(median(run['alone']) for _, run in rows))
    axes.set_xlabel('step time [ms]')
    axes.set_ylabel('fraction of steps that take at least this long')
    axes.set_title('Step time beside a neighbour')
    axes.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _prompts(pyplot: Any, results: Sequence[Result], colours: Colours) -> Any:
    """Draw the time to the first token over the length of the prompt, and its floors."""
    timed = [result for result in results if result.get('prompts')]
    if not timed:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5))
    drawn = set[str]()
    for result in timed:
        found, name = result['prompts'], report.label(result)
        lengths = [each['tokens'] for each in found]
        axes.plot(lengths, [1e3 * each['ttft_p50_s'] for each in found], 'o-',
                  color=colours[name], label=name)
        weights = report.weights(result['footprint'])
        for key, style, colour, floor in (
                ('floor_bytes_s', '--', colours[name], f'bytes, {weights}'),
                ('floor_operations_s', ':', 'black', 'operations')):
            if found[0][key] is not None and floor not in drawn:
                drawn.add(floor)
                axes.plot(lengths, [1e3 * each[key] for each in found], style, color=colour,
                          label=f'floor ({floor})')
    axes.set_xscale('log', base=2)
    axes.set_xticks(lengths, [f'{length:,}' for length in lengths])
    axes.minorticks_off()
    _log_scale(axes, axes.yaxis)
    axes.set_xlabel('prompt [tokens]')
    axes.set_ylabel('time to first token, median [ms]')
    axes.set_title(f'Time to first token, batch 1, {_device(results)}')
    axes.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _by_context(results: Sequence[Result], name: str) -> dict[int, list[dict[str, Any]]]:
    """Return the cells of one label by context, in order of context."""
    return {context: found for (label, context), found in sorted(report.grouped(results).items())
            if label == name}


def _device(results: Sequence[Result]) -> str:
    return str(report.cells(results)[0][0]['footprint']['device_name'])


def _context_axis(axes: Any, contexts: Sequence[int]) -> None:
    axes.set_xscale('log', base=2)
    axes.set_xticks(contexts, [f'{context:,}' for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel('context [tokens]')
    if len(contexts) == 1:
        axes.set_xlim(contexts[0] / 1.5, contexts[0] * 1.5)


def _log_scale(axes: Any, axis: Any) -> None:
    """Make an axis logarithmic, with tick labels in plain numbers that do not overlap."""
    from matplotlib.ticker import LogLocator
    from matplotlib.ticker import NullFormatter
    from matplotlib.ticker import StrMethodFormatter
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)('log')
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 50 * low else (1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axis.set_minor_formatter(NullFormatter())


def _step_time(pyplot: Any, results: Sequence[Result], colours: Colours) -> Any:
    """Draw step time over context, and the floor of each weight format."""
    figure, axes = pyplot.subplots(figsize=(8, 5))
    contexts, shown = set[int](), list[float]()
    drawn: dict[str, dict[int, float]] = {}
    for name, colour in colours.items():
        by_context = _by_context(results, name)
        contexts |= set(by_context)
        times = [1e3 * fmean(c['itl_p50_s'] for c in found) for found in by_context.values()]
        axes.plot(list(by_context), times, 'o-', color=colour, label=name)
        shown += times
    for result, cell in report.cells(results):
        if cell['floor_read_s'] is not None:
            key = report.weights(result['footprint'])
            drawn.setdefault(key, {})[cell['context']] = 1e3 * cell['floor_read_s']
    for (key, points), style in zip(drawn.items(), ('_--', 'x:', '+-.', '1--'), strict=False):
        points = dict(sorted(points.items()))
        axes.plot(list(points), list(points.values()), style, color='black', markersize=10,
                  label=f'floor (read), {key}')
        shown += points.values()
    _context_axis(axes, sorted(contexts))
    if max(shown) > 8 * min(shown):
        _log_scale(axes, axes.yaxis)
    else:
        axes.set_ylim(0, max(shown) * 1.08)
    if report.unsteady(results):
        axes.annotate('The steps were unsteady: see the warning in the report', (0.5, -0.17),
                      xycoords='axes fraction', ha='center', color='#D55E00')
    axes.set_ylabel('step time, median [ms]')
    axes.set_title(f'Step time over context, batch 1, {_device(results)}')
    axes.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _floor_fraction(pyplot: Any, results: Sequence[Result], colours: Colours) -> Any:
    """Draw the fraction of the floor that each engine reaches, in both conventions."""
    rows: list[tuple[str, str, float, float]] = []
    for name, colour in colours.items():
        for context, found in _by_context(results, name).items():
            read, checkpoint = (report.mean(c[key] for c in found)
                                for key in ('r_read', 'r_checkpoint'))
            if read is not None and checkpoint is not None:
                rows.append((f'{name}, {context:,}', colour, read, checkpoint))
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.42 * len(rows)))
    for place, (_, colour, read, checkpoint) in enumerate(reversed(rows)):
        axes.barh(place, read, height=0.62, color=colour)
        axes.plot([checkpoint], [place], 'D', color='black', markersize=5)
        axes.annotate(f'{read:.3f}, {checkpoint:.3f}', (1, place), fontsize=9, va='center',
                      xycoords=('axes fraction', 'data'), xytext=(6, 0),
                      textcoords='offset points')
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axes.axvline(1, color='black', linewidth=1)
    axes.annotate('limit', (1, 1), xycoords=('data', 'axes fraction'), xytext=(0, 3),
                  textcoords='offset points', ha='center', fontsize=9)
    axes.set_xlim(0, 1.04 * max(1, *(max(row[2:]) for row in rows)))
    axes.set_xlabel('floor / step time [1]: bar and first figure = bytes read,\n'
                    'diamond and second figure = checkpoint')
    axes.set_title(f'Fraction of the floor by engine and context, {_device(results)}', pad=18)
    axes.grid(axis='y', visible=False)
    return figure


def _latencies(pyplot: Any, results: Sequence[Result], colours: Colours) -> Any:
    """Draw the cumulative distribution of token latencies at the smallest context."""
    context = min(cell['context'] for _, cell in report.cells(results))
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    low, high, fewest = float('inf'), 0.0, LEAST_P99
    for name, colour in colours.items():
        found = _by_context(results, name).get(context, [])
        times = sorted(1e3 * time for cell in found for time in cell['itl_s'])
        if not times:
            continue
        shares = [100 * (i + 1) / len(times) for i in range(len(times))]
        axes.step([times[0], *times], [0, *shares], where='post', color=colour,
                  label=f'{name} ({len(times)} tokens)')
        low, high, fewest = min(low, times[0]), max(high, times[-1]), min(fewest, len(times))
    if high > 4 * low:
        _log_scale(axes, axes.xaxis)
    for share, text in ((50, 'p50'), (99, 'p99') if fewest == LEAST_P99 else (100, 'maximum')):
        axes.axhline(share, color='gray', linewidth=0.8, linestyle='--')
        axes.annotate(text, (1, share), xycoords=('axes fraction', 'data'),
                      xytext=(3, 0), textcoords='offset points', va='center', fontsize=9)
    axes.set_ylim(0, 101)
    axes.set_xlabel('inter-token latency [ms]')
    axes.set_ylabel('tokens that took at most this long [%]')
    axes.set_title(f'Token latencies at context {context:,}, {_device(results)}')
    axes.legend(loc='upper left', bbox_to_anchor=(0, -0.14), frameon=False, ncols=2)
    return figure


def _where(pyplot: Any, results: Sequence[Result], colours: Colours) -> Any:
    """Draw each step as floor, kernel time beyond the floor, and host gap."""
    rows, starred = list[tuple[str, list[float]]](), False
    cuda = report.cells(results)[0][0]['footprint']['device'].startswith('cuda')
    for name in colours:
        for context, found in _by_context(results, name).items():
            parts_s = [part_s for part_s in report.split(found) if part_s is not None]
            if len(parts_s) == len(_PARTS):
                star = ' *' if cuda and not report.profiled(found) else ''
                starred = starred or bool(star)
                rows.append((f'{name}, {context:,}{star}',
                             [1e3 * max(0.0, part_s) for part_s in parts_s]))
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 1.6 + 0.42 * len(rows)))
    for place, (_, parts) in enumerate(reversed(rows)):
        left = 0.0
        for part, (_, colour) in zip(parts, _PARTS, strict=True):
            axes.barh(place, part, left=left, height=0.62, color=colour)
            left += part
        terms = ' + '.join(f'{part:.2f}' for part in parts)
        axes.annotate(f'{terms} = {left:.2f}', (left, place), xytext=(5, 0),
                      textcoords='offset points', va='center', fontsize=9)
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axes.set_xlim(0, 1.5 * max(sum(row[1]) for row in rows))
    axes.set_xlabel('step time [ms]' + (
        '\n* kernels timed as a whole, including the pauses between them' if starred else ''))
    axes.set_title(f"Where a step's time goes, by engine and context, {_device(results)}")
    axes.grid(axis='y', visible=False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for _, colour in _PARTS]
    axes.legend(handles, [name for name, _ in _PARTS], loc='upper center', frameon=False,
                bbox_to_anchor=(0.4, -0.6 / (0.32 * len(rows) + 1.2)), ncols=3)
    return figure
