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
Report results as tables in a terminal, Markdown, JSON and one HTML page.

There are two floors: *read* counts the bytes that a step reads; *checkpoint* counts all weights at
their stored size, as arXiv 2605.30571 does.
"""

import base64
from collections.abc import Iterable
from collections.abc import Sequence
from html import escape
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from physai_decode.benchmark.compare import compare
from physai_decode.benchmark.compare import Comparison
from physai_decode.benchmark.runner import Result
from physai_decode.benchmark.table import Table
from physai_decode.histogram import percentile
from physai_decode.pace import Pace
from physai_decode.verdict import Figures
from physai_decode.verdict import judge

FLOORS = ('The floor is the time to read the bytes of one step at the peak bandwidth: '
          '"read" counts the bytes that the step reads, "ckpt" all weights of the checkpoint '
          'at their stored size. 1 is the limit.')
RANDOM = 'The weights are random: times are those of the shape, the text has no meaning.'
UNSTEADY, SHRUNK = 1.5, 0.95    # p95 / p50 and growth of steps that something else disturbed
WAITED = 0.2        # of the time, that threads waited for a core which something else used
MOST_NAMED = 6


def label(result: Result) -> str:
    """Return the label of the case."""
    return str(result['case']['label'])


def cells(results: Sequence[Result]) -> list[tuple[Result, dict[str, Any]]]:
    """Return all measured cells with their results."""
    return [(result, cell) for result in results for cell in result['contexts']
            if 'error' not in cell]


def find(results: Sequence[Result], name: str, context: int) -> dict[str, Any] | None:
    """Return the first measured cell of a label at a context."""
    return next((cell for result, cell in cells(results)
                 if label(result) == name and cell['context'] == context), None)


def grouped(results: Sequence[Result]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Group the measured cells by label and context, across sessions."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result, cell in cells(results):
        found.setdefault((label(result), cell['context']), []).append(cell)
    return found


def full_label(result: Result) -> str:
    """Return the session, if there are several, and the label of a case."""
    return f'{result["case"]["session"]} {label(result)}'.strip()


def first_cells(results: Sequence[Result]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the first measured cell of each label and session."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for result, cell in cells(results):
        first.setdefault((label(result), result['case']['session']), cell)
    return first


def growth(result: Result, cell: dict[str, Any],
           first: dict[tuple[str, str], dict[str, Any]]) -> float:
    """Return the step relative to the first one of its label and session."""
    return float(cell['itl_p50_s'] / first[label(result), result['case']['session']]['itl_p50_s'])


def unsteady(results: Sequence[Result]) -> list[str]:
    """Return a warning if steps vary, get shorter in a longer context, or wait for a core."""
    first, found = first_cells(results), []
    for result, cell in cells(results):
        spread, grown = cell['itl_p95_s'] / cell['itl_p50_s'], growth(result, cell, first)
        signs = [f'p95 is {spread:.1f} times p50'] * (spread > UNSTEADY)
        signs += [f'growth is {grown:.2f}'] * (grown < SHRUNK)
        waited = cell.get('waited') or 0.0          # absent in results of older versions
        signs += [f'waited for a core {100 * waited:.0f} % of the time'] * (waited > WAITED)
        if signs:
            found.append(f'{full_label(result)} at {cell["context"]} ({", ".join(signs)})')
    if len(found) > MOST_NAMED:
        found[MOST_NAMED:] = [f'{len(found) - MOST_NAMED} more']
    return [f'Unsteady: {", ".join(found)}. The machine was busy or changed its clocks: stop '
            'other programs, and measure again with --again.'] * bool(found)


def reused(results: Sequence[Result]) -> list[str]:
    """Return a note if some results are those of an earlier run."""
    dates = [result['date'] for result in results if result.get('kept')]
    return [f'{len(dates)} of {len(results)} results are reused from an earlier run, of '
            f'{" to ".join(dict.fromkeys((min(dates), max(dates))))}; --again measures them '
            'again.'] if dates else []


def on_cpu(results: Sequence[Result]) -> bool:
    """Whether all measured steps ran on a CPU."""
    return not any(result['footprint']['device'].startswith('cuda')
                   for result, _ in cells(results))


def no_floor(results: Sequence[Result]) -> list[str]:
    """Return notes that say why there is no floor."""
    peaks = [result['peak'] for result in results if 'peak' in result]
    reasons = dict.fromkeys(
        peak.get('no_floor') or 'the peak bandwidth is unknown; set --peak-gb-s' for peak in peaks
        if peak.get('no_floor') or not peak['bytes_per_s'])
    return [f'No floor: {reason}.' for reason in reasons]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values, or None."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def same_peak(results: Sequence[Result]) -> None:
    """
    Use the highest measured peak for all sessions.

    A measurement never exceeds the bandwidth of the bus, and varies between sessions.
    """
    found = [r['peak']['bytes_per_s'] for r in results
             if r['status'] == 'done' and r['peak']['source'] == 'measured']
    for result in results:
        if result['status'] != 'done' or result['peak']['source'] != 'measured':
            continue
        part = result['peak']['bytes_per_s'] / max(found)
        result['peak']['bytes_per_s'] = max(found)
        for _, cell in cells([result]):
            for key in ('floor_read_s', 'floor_checkpoint_s', 'r_read', 'r_checkpoint'):
                if cell[key] is not None:           # None if a CPU cache holds the weights
                    cell[key] *= part
        for prompt in result.get('prompts', ()):
            if prompt['floor_bytes_s'] is not None:
                prompt['floor_bytes_s'] *= part


def same_operations(results: Sequence[Result]) -> None:
    """Copy the floor by operations, a property of the model, to engines that lack it."""
    prompts = [((result['case']['source']['path'], result['case']['source']['synthetic'],
                 prompt['tokens']), prompt)
               for result in results for prompt in result.get('prompts', ())]
    known = {key: prompt['floor_operations_s'] for key, prompt in prompts
             if prompt['floor_operations_s'] is not None}
    for key, prompt in prompts:
        prompt['floor_operations_s'] = known.get(key)


def steps(results: Sequence[Result], reference: str = '') -> Table:
    """Create the main table; speeds are relative to the label ``reference``."""
    sessions = any(result['case']['session'] for result in results)
    columns = ['engine', 'graph', 'context', 'p50 ms', 'p95', 'p99', 'p99/p50', 'device',
               'step - device', 'tokens/s', 'of floor (read)', 'of floor (ckpt)', 'growth',
               'prefill ms']
    table = Table('Step time', ['session', *columns] if sessions else columns,
                  notes=[FLOORS, *no_floor(results)])
    if reference:
        table.columns = [*table.columns, f'speed / {reference}']
    first = first_cells(results)
    for result in results:
        graph = result['footprint']['cuda_graph'] if result['status'] == 'done' else ''
        lead = [*([result['case']['session']] if sessions else []), label(result), graph]
        for cell in result['contexts']:
            if 'error' in cell:
                rest = [''] * (len(table.columns) - len(lead) - 2)
                table.rows.append([*lead, str(cell['context']), 'n/a', *rest])
                table.notes.append(f'{label(result)} at {cell["context"]}: {cell["error"]}')
                continue
            p50 = cell['itl_p50_s']
            row = [*lead, str(cell['context']), ms(p50), ms(cell['itl_p95_s']),
                   ms(cell['itl_p99_s']), number(cell['itl_p99_s'] / p50),
                   ms(cell['device_p50_s']), ms(cell['host_gap_p50_s']), number(1 / p50, 1),
                   number(cell['r_read'], 3), number(cell['r_checkpoint'], 3),
                   number(growth(result, cell, first)), ms(cell['prefill_s'], 1)]
            if reference:
                base = find(results, reference, cell['context'])
                row.append(number(base['itl_p50_s'] / p50) if base else 'n/a')
            table.rows.append(row)
            if 'kernels_error' in cell:
                table.notes.append(f'{label(result)}: no kernel table: {cell["kernels_error"]}')
        if result['status'] != 'done':
            rest = [''] * (len(table.columns) - len(lead) - 2)
            shown = {cell['context'] for cell in result['contexts']}
            table.rows += [[*lead, str(context), result['status'], *rest]
                           for context in result['case']['contexts'] if context not in shown]
            note = f'{" ".join(filter(None, lead))}: {result["error"]}'
            table.notes += [note] * (note not in table.notes)
    device = ('the computation of the step' if on_cpu(results) else
              'between two events around the step; if the host launches each kernel, this '
              'includes its work and the pauses')
    table.notes.append('Times are inter-token latencies of a reader of the stream, after warm-up. '
                       f'device: {device}. growth: the step relative to that of the same engine '
                       'at its first context. prefill: on the host, from a random prompt to its '
                       'first token, once, after another prompt of the same length. The prompt is '
                       'the context without the steps, and none of it is cached.')
    return table


def floors(results: Sequence[Result]) -> Table:
    """Show what a step of each engine reads, and its floors."""
    table = Table('What a step reads', [
        'engine', 'weights', 'context', 'read GB', 'ckpt GB', 'KV GB', 'floor (read) ms',
        'floor (ckpt) ms', 'peak GB/s', 'peak from'], notes=[FLOORS, *no_floor(results)])
    seen = set()
    for result, cell in cells(results):
        key = (label(result), cell['context'])
        if key in seen:
            continue
        seen.add(key)
        foot, peak = result['footprint'], result['peak']
        table.rows.append([
            label(result), weights(foot), str(cell['context']),
            number(foot['read_weight_bytes'] / 1e9, 3),
            number(foot['checkpoint_weight_bytes'] / 1e9, 3), number(cell['kv_bytes'] / 1e9, 4),
            ms(cell['floor_read_s']), ms(cell['floor_checkpoint_s']),
            number(peak['bytes_per_s'] and peak['bytes_per_s'] / 1e9, 1), peak['source']])
    footprints = [result['footprint'] for result, _ in cells(results)]
    if any(foot['read_weight_bytes'] > foot['checkpoint_weight_bytes'] for foot in footprints):
        table.notes.append('read GB exceeds ckpt GB where the engine converts the stored weights '
                           'to a wider number format.')
    return table


def parts(results: Sequence[Result]) -> Table:
    """Split the step time into floor, kernel time beyond it, and host gap."""
    table = Table("Where a step's time goes", [
        'engine', 'context', 'step ms', 'floor (read)', '%', 'kernels - floor', '%',
        'host gap', '%'], notes=no_floor(results))
    cpu = on_cpu(results)
    if cpu:
        table.notes.append('kernels - floor: the computation beyond the floor. host gap: the rest '
                           'of the step.')
    else:
        table.columns = [*table.columns, 'kernels timed']
        table.notes.append(
            'kernels - floor: kernel time beyond the floor. host gap: the time without a running '
            'kernel, such as launches, host work and waits, and in a captured step the pauses '
            'between kernels. one by one: timed by the profiler (--kernels) over 20 steps. as a '
            'whole: timed from the first kernel of a step to the end of the last. Pauses then '
            'count as kernels; if the host launches each kernel, they can be most of the time.')
    table.notes.append('All values are medians, so the sum can differ slightly from the step.')
    for (name, context), found in grouped(results).items():
        step = fmean(cell['itl_p50_s'] for cell in found)
        row = [name, str(context), ms(step)]
        for value in split(found):
            row += [ms(value), number(value and 100 * value / step, 1)]
        if not cpu:
            row.append('one by one' if profiled(found) else 'as a whole')
        table.rows.append(row)
    return table


def verdicts(results: Sequence[Result]) -> Table:
    """Name the main limit of each step."""
    table = Table('What holds the step back', ['engine', 'context', 'verdict'])
    footprints = {label(result): result['footprint'] for result, _ in cells(results)}
    for (name, context), found in grouped(results).items():
        times = [mean(cell[key] for cell in found) for key in (
            'itl_p50_s', 'device_p50_s', 'floor_read_s', 'itl_p99_s')]
        itl_ms, device_ms, floor_ms, p99_ms = (each and 1e3 * each for each in times)
        foot = footprints[name]
        verdict = judge(Figures(
            itl_ms, device_ms, floor_ms, p99_ms, sum(len(cell['itl_s']) for cell in found),
            cuda_graph=foot['cuda_graph'], engine=foot['engine'],
            kernels=foot['details'].get('kernels', ''), slow_format=foot['slow_format']))
        if verdict is not None:
            table.rows.append([name, str(context), str(verdict)])
    return table


def beside(results: Sequence[Result]) -> Table:
    """Compare the step and its neighbour, each alone and both together."""
    table = Table('Beside a neighbour', [
        'engine', 'context', 'neighbour', '', 'p50 ms', 'p99', 'p99.9', 'worst', 'tokens/s',
        'neighbour p50 ms', 'neighbour p99'], notes=[
            'In turn, in one process, after the same prompt. cpu: a busy loop on each core; gpu: '
            'a convolutional network like ResNet-50, alone and beside the steps. With --pace, '
            'step times exclude the wait for the next step.'])
    for (name, context), found in grouped(results).items():
        runs = [cell['beside'] for cell in found if cell.get('beside')]
        for same in zip(*runs):
            pace = same[0]['pace']
            for how in ('alone', 'beside', *(['paced'] if pace else [])):
                times = [itl_s for each in same for itl_s in each[how]]
                took_s = _paced_s(times, pace) if how == 'paced' else sum(times)
                times.sort()
                neighbour_s = sorted(s for each in same for s in each[f'neighbour_{how}'])
                table.rows.append([
                    name, str(context), same[0]['neighbour'],
                    f'beside, {pace:g} tokens/s' if how == 'paced' else how,
                    *(ms(percentile(times, q)) for q in (50, 99, 99.9)), ms(times[-1]),
                    number(len(times) / took_s, 1),
                    *(ms(percentile(neighbour_s, q)) for q in (50, 99))])
    return table


def _paced_s(times: Sequence[float], tokens_per_s: float) -> float:
    """Return how long steps take at a pace, with the waits that their times exclude."""
    pace, now_s = Pace(tokens_per_s, 0.0), 0.0
    for step_s in times:
        now_s = max(now_s, pace.due_s(now_s)) + step_s
    return now_s


def profiled(found: Sequence[dict[str, Any]]) -> bool:
    """Whether all cells have times of single kernels."""
    return all(cell.get('kernels') for cell in found)


def split(found: Sequence[dict[str, Any]]) -> list[float | None]:
    """
    Return the means of floor, kernel time beyond the floor, and host gap, in seconds.

    If the host launches each kernel, the device waits between kernels. Device events count this
    wait as device time; only the times of single kernels show it.
    """
    rows = []
    for cell in found:
        floor, busy, gap = cell['floor_read_s'], cell['device_p50_s'], cell['host_gap_p50_s']
        if profiled(found):
            busy = sum(row['step_s'] for row in cell['kernels'])
            gap = cell['itl_p50_s'] - busy
        rows.append((floor, None if None in (floor, busy) else busy - floor, gap))
    return [mean(values) for values in zip(*rows, strict=True)]


def energy(results: Sequence[Result]) -> Table:
    """Show the energy per token, if the device reports it."""
    table = Table('Energy', ['engine', 'context', 'J a token', 'tokens / J', 'W'], notes=[
        'Energy of the whole device during decode steps; on a Jetson, of the whole board.'])
    for (name, context), found in grouped(results).items():
        taken = mean(cell.get('j_per_token') for cell in found)
        if taken:
            table.rows.append([name, str(context), number(taken, 3), number(1 / taken, 2),
                               number(mean(cell.get('power_w') for cell in found), 1)])
    return table


def samplings(results: Sequence[Result]) -> Table:
    """Compare the step with each sampling to the greedy step."""
    table = Table('Sampling', ['engine', 'context', 'sampling', 'p50 ms', '- greedy µs',
                               '/ greedy'], notes=[
        'Medians of steps in one process, with the samplings in turn, after the same prompt.'])
    for (name, context), found in grouped(results).items():
        timed = [cell['samplings'] for cell in found if cell.get('samplings')]
        # All sessions have the same samplings, greedy first.
        for same in zip(*timed):
            step = fmean(each['itl_p50_s'] for each in same)
            greedy = fmean(each[0]['itl_p50_s'] for each in timed)
            table.rows.append([
                name, str(context), same[0]['sampling'], ms(step),
                number(1e6 * (step - greedy), 1), number(step / greedy, 3)])
    return table


def masked(results: Sequence[Result]) -> Table:
    """Compare the constrained step to the free one."""
    table = Table('Constraint', [
        'engine', 'context', 'free p50 ms', 'p99', 'masked p50 ms', 'p99', '/ free', 'mask p50 ms',
        'p99', 'compile ms', 'vocabulary ms'], notes=[
            'Answers in one process, constrained and free in turn and equally long, after the '
            'same prompt, at temperature 1. mask: on the host; a GPU computes meanwhile. '
            'compile: once per schema. vocabulary: to read it, once per model.'])
    for (name, context), found in grouped(results).items():
        timed = [cell['masked'] for cell in found if cell.get('masked')]
        if timed:
            known = {key: fmean(each[key] for each in timed) for key in (
                'free_p50_s', 'free_p99_s', 'masked_p50_s', 'masked_p99_s', 'mask_p50_s',
                'mask_p99_s', 'compile_s', 'vocabulary_s')}
            shown = [ms(value) for value in known.values()]
            ratio = number(known['masked_p50_s'] / known['free_p50_s'], 3)
            table.rows.append([name, str(context), *shown[:4], ratio, *shown[4:]])
    return table


def prompts(results: Sequence[Result]) -> Table:
    """Show the time to the first token by the length of the prompt, with its two floors."""
    table = Table('Time to first token', [
        'engine', 'prompt', 'p50 ms', 'bytes ms', 'operations ms', '/ larger floor'], notes=[
            'Prompts of random tokens, none of them in the cache; medians. bytes: to read the '
            'weights once at the peak bandwidth. operations: to multiply by them at the rate of '
            'a large matrix product on this machine.', *no_floor(results)])
    for result in results:
        for each in result.get('prompts', ()):
            floors = [each['floor_bytes_s'], each['floor_operations_s']]
            floor = max((value for value in floors if value is not None), default=None)
            table.rows.append([
                label(result), str(each['tokens']), ms(each['ttft_p50_s']), *map(ms, floors),
                number(None if floor is None else each['ttft_p50_s'] / floor, 2)])
    return table


def sessions(results: Sequence[Result]) -> Table:
    """List the lost sessions and their repetitions, and the sessions of earlier runs."""
    table = Table('Sessions lost and reused', ['session', 'what happened', 'then'])
    for result in results:
        name = full_label(result)
        again = f'run again {result.get("date", "")}: {result["status"]}'
        table.rows += [[name, how, again] for how in result.get('lost', [])]
        if result['status'] == 'died':
            table.rows.append([name, result['error'], 'missing; the same command runs it again'])
        if result.get('kept'):
            table.rows.append([name, f'measured by an earlier run, {result["date"]}', 'reused'])
    return table


def startup(results: Sequence[Result]) -> Table:
    """Show the start-up time of each process in parts, and its memory."""
    done = [result for result in results if result['status'] == 'done']
    names = list(dict.fromkeys(name for r in done for name in r['startup']['parts']))
    table = Table('Start-up and memory', [
        'engine', 'modules s', 'build s', *(f'{name[:-2]} s' for name in names),
        'to first tokens s', 'torch peak GB', 'device GB', 'resident GB'], notes=[
            'modules: from the start of the process until the module of the engine is imported. '
            'build: until the engine is loaded, warmed up and captured, with the parts that the '
            'engine reports. In the order of the runs: later runs of an engine find its kernels '
            'cached.'])
    for result in done:
        times, memory = result['startup'], result['memory']
        table.rows.append([
            result['case']['session'] or label(result), number(times['import_s'], 1),
            number(times['build_s'], 1), *(number(times['parts'].get(n), 1) for n in names),
            number(times['first_tokens_s'], 1),
            *(number(memory.get(name))
              for name in ('torch_peak_gb', 'device_used_gb', 'resident_peak_gb'))])
    return table


def kernels(result: Result, cell: dict[str, Any], most: int = 25) -> Table:
    """Show the kernels of a cell, longest first; the shortest ones are summed up."""
    seen = cell['kernels']
    table = Table(f'Kernels of {label(result)} at context {cell["context"]}', [
        'operation', 'kernel', 'grid', 'calls', 'MB a call', 'µs a call', 'µs a step', '%',
        'GB/s', 'of peak'])
    peak = result['peak']['bytes_per_s']
    for row in seen[:most]:
        rate = row['bytes'] / row['call_s'] if row['bytes'] and row['call_s'] else None
        table.rows.append([
            row['operation'], row['name'][:60], row['grid'], f'{row["calls"]:g}',
            number(row['bytes'] and row['bytes'] / 1e6), number(row['call_s'] * 1e6, 1),
            number(row['step_s'] * 1e6, 1), number(row['share'] and 100 * row['share'], 1),
            number(rate and rate / 1e9, 0), number(rate and peak and rate / peak, 3)])
    rest = seen[most:]
    if rest:
        table.rows.append(['', f'{len(rest)} more', '', '', '', '',
                           number(sum(row['step_s'] for row in rest) * 1e6, 1),
                           number(100 * sum(row['share'] for row in rest), 1), '', ''])
    busy = sum(row['step_s'] for row in seen)
    table.notes.append(f'All kernels of a step: {busy * 1e3:.3f} ms; the step on the device '
                       f'takes {ms(cell["device_p50_s"])} ms without the profiler. If kernels '
                       'overlap, each counts from the end of the previous one.')
    return table


def comparisons(results: Sequence[Result], a: str, b: str) -> Table:
    """Compare two labels at every context, over their sessions."""
    table = Table(f'A/B: {a} against {b}', [
        'context', 'A ms', 'B ms', 'A / B', '95 % low', '95 % high', 'CV A %', 'CV B %',
        'sessions'], notes=[
            f'A is {a}, B is {b}; A / B above 1: B is faster. Each session is a fresh process '
            'and yields one median; the interval is a bootstrap over sessions.'])
    for context in sorted({n for result in results for n in result['case']['contexts']}):
        sides = medians(results, a, context), medians(results, b, context)
        if not all(sides):
            table.notes.append(f'{context}: nothing to compare, a side has no session')
            continue
        found: Comparison = compare(*sides)
        table.rows.append([
            str(context), ms(found.a_s), ms(found.b_s), number(found.ratio, 3),
            number(found.low, 3), number(found.high, 3),
            number(found.a_cv and 100 * found.a_cv), number(found.b_cv and 100 * found.b_cv),
            f'{found.a_sessions} + {found.b_sessions}'])
        table.notes.append(f'{context}: {found.verdict(a, b)}')
    lost = [result for result in results if result['status'] != 'done']
    for result in lost:
        table.notes.append(f'lost: {result["case"]["session"]}: {result["error"]}')
    return table


def medians(results: Sequence[Result], name: str, context: int) -> list[float]:
    """Return the median step of each session of a label at a context, in seconds."""
    return [cell['itl_p50_s'] for result, cell in cells(results)
            if label(result) == name and cell['context'] == context]


def machine(results: Sequence[Result]) -> Table:
    """Describe the machine, from the first completed session."""
    table = Table('Machine', ['what', 'value'])
    facts: dict[str, Any] = next(
        (result['machine'] for result in results if result['status'] == 'done'), {})
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ', '.join(f'{name} {what}' for name, what in value.items())
        table.rows.append([key, str(value)])
    return table


def write(out: Path, head: dict[str, str], tables: Sequence[Table], results: Sequence[Result],
          plots: Sequence[Path]) -> None:
    """
    Write ``results.json``, ``report.md`` and ``report.html`` into a folder.

    :param head: command, model and date.
    :param plots: PNG files in the same folder.
    """
    (out / 'results.json').write_text(json.dumps(
        {**head, 'tables': [vars(table) for table in tables], 'results': list(results)},
        indent=1) + '\n')
    lines = ['# decode_bench', '', *(f'- {key}: `{value}`' for key, value in head.items()), '']
    lines += [table.markdown() for table in tables]
    lines += [f'![{plot.stem}]({plot.name})\n' for plot in plots]
    (out / 'report.md').write_text('\n'.join(lines))
    images = ''.join(
        f'<img alt="{plot.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(plot.read_bytes()).decode()}">\n' for plot in plots)
    entries = ''.join(f'<li>{escape(key)}: <code>{escape(value)}</code></li>\n'
                      for key, value in head.items())
    (out / 'report.html').write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width"><title>decode_bench</title>\n'
        f'<style>{_STYLE}</style></head>\n<body><h1>decode_bench</h1>\n<ul>{entries}</ul>\n'
        f'{tables[0].html() if tables else ""}{images}'
        f'{"".join(table.html() for table in tables[1:])}</body></html>\n')


def ms(seconds: float | None, digits: int = 3) -> str:
    """Format seconds as milliseconds, or n/a."""
    return number(None if seconds is None else seconds * 1e3, digits)


def number(value: float | None, digits: int = 2) -> str:
    """Format a number, or n/a."""
    return 'n/a' if value is None else f'{value:.{digits}f}'


def weights(footprint: dict[str, Any]) -> str:
    """Return a short name for the format of the weights."""
    quantization = footprint['quantization']
    return str(footprint['dtype'] if quantization == 'none' else quantization)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.2rem; font-size: 1.15rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left;
  white-space: nowrap }
.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; margin: 1rem 0 } code { font-size: 13px } p { color: #555; margin: .3rem 0 }
"""
