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
From results to what is read: tables in a terminal, Markdown, JSON and one HTML page.

Two floors are named everywhere: *read*, the bytes a step really reads, and *checkpoint*, all
weights at their stored size, as arXiv 2605.30571 counts them.
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
from physai_decode.verdict import Figures
from physai_decode.verdict import judge

FLOORS = ('The floor is the time that the bytes of one step need at the peak bandwidth: '
          '"read" counts the bytes the step really reads, "ckpt" all weights of the checkpoint '
          'at their stored size. 1 is the limit.')
RANDOM = 'The weights are random: the times are those of the shape, the text is noise.'


def label(result: Result) -> str:
    """Give the case's label."""
    return str(result['case']['label'])


def cells(results: Sequence[Result]) -> list[tuple[Result, dict[str, Any]]]:
    """Give every measured (result, context cell)."""
    return [(result, cell) for result in results for cell in result['contexts']
            if 'error' not in cell]


def find(results: Sequence[Result], name: str, context: int) -> dict[str, Any] | None:
    """Give the first measured cell of a label at a context."""
    return next((cell for result, cell in cells(results)
                 if label(result) == name and cell['context'] == context), None)


def grouped(results: Sequence[Result]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Give the measured cells of each (label, context), those of repeated sessions together."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result, cell in cells(results):
        found.setdefault((label(result), cell['context']), []).append(cell)
    return found


def mean(values: Iterable[float | None]) -> float | None:
    """Give the mean of those that are known, None where none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def same_peak(results: Sequence[Result]) -> None:
    """
    Use one peak where it was measured: the best that any session read, as it bounds all of them.

    A measurement only ever falls short of the bus, and differs from session to session.
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
                if cell[key] is not None:           # weights in a cache have no floor by the bus
                    cell[key] *= part
        for prompt in result.get('prompts', ()):
            if prompt['floor_bytes_s'] is not None:
                prompt['floor_bytes_s'] *= part


def same_operations(results: Sequence[Result]) -> None:
    """Give the floor by operations, which is the model's, to engines that do not know it."""
    prompts = [((result['case']['source']['path'], result['case']['source']['synthetic'],
                 prompt['tokens']), prompt)
               for result in results for prompt in result.get('prompts', ())]
    known = {key: prompt['floor_operations_s'] for key, prompt in prompts
             if prompt['floor_operations_s'] is not None}
    for key, prompt in prompts:
        prompt['floor_operations_s'] = known.get(key)


def steps(results: Sequence[Result], reference: str = '') -> Table:
    """Make the main table; ``reference`` is the label that the others are compared with."""
    sessions = any(result['case']['session'] for result in results)
    columns = ['engine', 'graph', 'context', 'p50 ms', 'p95', 'p99', 'p99/p50', 'device',
               'host gap', 'tokens/s', 'of floor (read)', 'of floor (ckpt)', 'growth',
               'prefill ms']
    table = Table('Step time', ['session', *columns] if sessions else columns, notes=[FLOORS])
    if reference:
        table.columns = [*table.columns, f'speed / {reference}']
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for result, cell in cells(results):
        first.setdefault((label(result), result['case']['session']), cell)
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
                   number(p50 / first[label(result), result['case']['session']]['itl_p50_s']),
                   ms(cell['prefill_s'], 1)]
            if reference:
                base = find(results, reference, cell['context'])
                row.append(number(base['itl_p50_s'] / p50) if base else 'n/a')
            table.rows.append(row)
            if 'kernels_error' in cell:
                table.notes.append(f'{label(result)}: no kernel table: {cell["kernels_error"]}')
        if result['status'] != 'done':
            rest = [''] * (len(table.columns) - len(lead) - 2)
            told = {cell['context'] for cell in result['contexts']}
            table.rows += [[*lead, str(context), result['status'], *rest]
                           for context in result['case']['contexts'] if context not in told]
            note = f'{" ".join(filter(None, lead))}: {result["error"]}'
            table.notes += [note] * (note not in table.notes)
    table.notes.append('device: between two events, around the step; where the host launches each '
                       'kernel its work is in it. '
                       "growth: the step against the same engine's at its first context. Times "
                       'are of one token to the next as a reader of the stream sees them, after '
                       'warm-up.')
    return table


def floors(results: Sequence[Result]) -> Table:
    """Say what each engine's step must read, and over which peak."""
    table = Table('What a step reads', [
        'engine', 'weights', 'context', 'read GB', 'ckpt GB', 'KV GB', 'floor (read) ms',
        'floor (ckpt) ms', 'peak GB/s', 'peak from'], notes=[FLOORS])
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
    return table


def parts(results: Sequence[Result]) -> Table:
    """Show where a step's time goes: the floor, the rest of the kernels' time, the host gap."""
    table = Table("Where a step's time goes", [
        'engine', 'context', 'step ms', 'floor (read)', '%', 'kernels - floor', '%',
        'host gap', '%', 'kernels timed'], notes=[
            'kernels - floor: what the kernels take beyond the floor; host gap: the rest of the '
            'step, in which no kernel runs: launching, host work and waiting, and in a captured '
            'step the pauses between kernels. One by one: by the profiler (--kernels), over 20 '
            'steps. As a whole: from the first kernel of a step to the end of the last, so that '
            'the pauses count as kernels, most of which can be the host at work where it '
            'launches each of them. Medians of each, so the sum may differ from the step by a '
            'little.'])
    for (name, context), found in grouped(results).items():
        step = fmean(cell['itl_p50_s'] for cell in found)
        told = [name, str(context), ms(step)]
        for value in split(found):
            told += [ms(value), number(value and 100 * value / step, 1)]
        table.rows.append([*told, 'one by one' if profiled(found) else 'as a whole'])
    return table


def verdicts(results: Sequence[Result]) -> Table:
    """Say what holds each step back most."""
    table = Table('What holds the step back', ['engine', 'context', 'verdict'])
    graphs = {label(result): result['footprint']['cuda_graph'] for result, _ in cells(results)}
    for (name, context), found in grouped(results).items():
        times = [mean(cell[key] for cell in found) for key in (
            'itl_p50_s', 'device_p50_s', 'floor_read_s', 'itl_p99_s')]
        itl_ms, device_ms, floor_ms, p99_ms = (each and 1e3 * each for each in times)
        verdict = judge(Figures(itl_ms, device_ms, floor_ms, p99_ms,
                                sum(len(cell['itl_s']) for cell in found),
                                cuda_graph=graphs[name]))
        if verdict is not None:
            table.rows.append([name, str(context), str(verdict)])
    return table


def beside(results: Sequence[Result]) -> Table:
    """Set the step and its neighbour, each alone, beside both together."""
    table = Table('Beside a neighbour', [
        'engine', 'context', 'neighbour', '', 'p50 ms', 'p99', 'p99.9', 'worst', 'tokens/s',
        'neighbour p50 ms', 'neighbour p99'], notes=[
            'In turn, in one process, behind the same prompt. cpu: a busy loop on each core; gpu: '
            'a network of convolutions like ResNet-50, by itself and beside the steps.'])
    for (name, context), found in grouped(results).items():
        told = [cell['beside'] for cell in found if cell.get('beside')]
        for same in zip(*told):
            for how in ('alone', 'beside'):
                times = sorted(itl_s for each in same for itl_s in each[how])
                other = sorted(s for each in same for s in each[f'neighbour_{how}'])
                table.rows.append([
                    name, str(context), same[0]['neighbour'], how,
                    *(ms(percentile(times, q)) for q in (50, 99, 99.9)), ms(times[-1]),
                    number(len(times) / sum(times), 1),
                    *(ms(percentile(other, q)) for q in (50, 99))])
    return table


def profiled(found: Sequence[dict[str, Any]]) -> bool:
    """Tell whether all of these cells have their kernels' own times."""
    return all(cell.get('kernels') for cell in found)


def split(found: Sequence[dict[str, Any]]) -> list[float | None]:
    """
    Give [floor, kernels beyond the floor, host gap] of one (label, context), means in seconds.

    A step that the host launches kernel by kernel waits for it between them, and device events
    count that as the device's time: only the kernels' own times show it.
    """
    told = []
    for cell in found:
        floor, busy, gap = cell['floor_read_s'], cell['device_p50_s'], cell['host_gap_p50_s']
        if profiled(found):
            busy = sum(row['step_s'] for row in cell['kernels'])
            gap = cell['itl_p50_s'] - busy
        told.append((floor, None if None in (floor, busy) else busy - floor, gap))
    return [mean(values) for values in zip(*told, strict=True)]


def energy(results: Sequence[Result]) -> Table:
    """Show what a token takes in energy, where the device tells it."""
    table = Table('Energy', ['engine', 'context', 'J a token', 'tokens / J', 'W'], notes=[
        'What the whole device took during decode steps, on a Jetson the whole board.'])
    for (name, context), found in grouped(results).items():
        taken = mean(cell.get('j_per_token') for cell in found)
        if taken:
            table.rows.append([name, str(context), number(taken, 3), number(1 / taken, 2),
                               number(mean(cell.get('power_w') for cell in found), 1)])
    return table


def samplings(results: Sequence[Result]) -> Table:
    """Set the step under each sampling beside the greedy one."""
    table = Table('Sampling', ['engine', 'context', 'sampling', 'p50 ms', '- greedy µs',
                               '/ greedy'], notes=[
        'Steps in one process, the samplings in turn, behind the same prompt; medians.'])
    for (name, context), found in grouped(results).items():
        told = [cell['samplings'] for cell in found if cell.get('samplings')]
        # The same samplings in each session; greedy is the first of them.
        for same in zip(*told):
            step = fmean(each['itl_p50_s'] for each in same)
            greedy = fmean(each[0]['itl_p50_s'] for each in told)
            table.rows.append([
                name, str(context), same[0]['sampling'], ms(step),
                number(1e6 * (step - greedy), 1), number(step / greedy, 3)])
    return table


def masked(results: Sequence[Result]) -> Table:
    """Set the step under a constraint beside the free one."""
    table = Table('Constraint', [
        'engine', 'context', 'free p50 ms', 'p99', 'masked p50 ms', 'p99', '/ free', 'mask p50 ms',
        'p99', 'compile ms', 'vocabulary ms'], notes=[
            'Answers in one process, constrained and free in turn and equally long, behind the '
            'same prompt, drawn at temperature 1. mask: on the host, while the device computes. '
            "compile: the schema, once; vocabulary: to read the model's tokens, once for all."])
    for (name, context), found in grouped(results).items():
        told = [cell['masked'] for cell in found if cell.get('masked')]
        if told:
            known = {key: fmean(each[key] for each in told) for key in (
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
            'a large matrix product on this machine.'])
    for result in results:
        for each in result.get('prompts', ()):
            floors = [each['floor_bytes_s'], each['floor_operations_s']]
            floor = max((value for value in floors if value is not None), default=None)
            table.rows.append([
                label(result), str(each['tokens']), ms(each['ttft_p50_s']), *map(ms, floors),
                number(None if floor is None else each['ttft_p50_s'] / floor, 2)])
    return table


def sessions(results: Sequence[Result]) -> Table:
    """Tell which sessions were lost and what became of them, and which are of an earlier run."""
    table = Table('Sessions lost and resumed', ['session', 'what happened', 'then'])
    for result in results:
        name = f'{result["case"]["session"]} {label(result)}'.strip()
        again = f'run again {result.get("date", "")}: {result["status"]}'
        table.rows += [[name, how, again] for how in result.get('lost', [])]
        if result['status'] == 'died':
            table.rows.append([name, result['error'], 'missing; the same command runs it again'])
    if kept := [result['date'] for result in results if result.get('kept')]:
        table.rows.append([f'{len(kept)} of {len(results)}',
                           f'measured by an earlier run, {min(kept)} to {max(kept)}', 'kept'])
    return table


def startup(results: Sequence[Result]) -> Table:
    """Show how long each process took to be ready, in parts, and what memory it took."""
    done = [result for result in results if result['status'] == 'done']
    names = list(dict.fromkeys(name for r in done for name in r['startup']['parts']))
    table = Table('Start-up and memory', [
        'engine', 'modules s', 'build s', *(f'{name[:-2]} s' for name in names),
        'to first tokens s', 'torch peak GB', 'device GB', 'resident GB'], notes=[
            "modules: from the process's start until the engine's module is imported; "
            'build: from the settings to an engine that is loaded, warmed up and captured; its '
            'parts as the engine gives them. In the order of the runs: an engine that comes '
            'again finds its kernels cached.'])
    for result in done:
        told, memory = result['startup'], result['memory']
        table.rows.append([
            result['case']['session'] or label(result), number(told['import_s'], 1),
            number(told['build_s'], 1), *(number(told['parts'].get(n), 1) for n in names),
            number(told['first_tokens_s'], 1),
            *(number(memory.get(name))
              for name in ('torch_peak_gb', 'device_used_gb', 'resident_peak_gb'))])
    return table


def kernels(result: Result, cell: dict[str, Any], most: int = 25) -> Table:
    """Show a cell's kernels, longest first; a rest is summed up."""
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
                       f'takes {ms(cell["device_p50_s"])} ms without the profiler. Where kernels '
                       'overlap, each is charged with what it adds.')
    return table


def comparisons(results: Sequence[Result], a: str, b: str) -> Table:
    """Compare two labels at every context, over their sessions."""
    table = Table(f'A/B: {a} against {b}', [
        'context', 'A ms', 'B ms', 'A / B', '95 % low', '95 % high', 'CV A %', 'CV B %',
        'sessions'], notes=[
            f'A is {a}, B is {b}; A / B above 1: B is faster. Each session is a fresh process '
            'and gives one median; the interval is a bootstrap over sessions.'])
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
    """Give the median step of every session of a label at a context, in seconds."""
    return [cell['itl_p50_s'] for result, cell in cells(results)
            if label(result) == name and cell['context'] == context]


def machine(results: Sequence[Result]) -> Table:
    """Describe the machine, as the first session that came through saw it."""
    table = Table('Machine', ['what', 'value'])
    told: dict[str, Any] = next(
        (result['machine'] for result in results if result['status'] == 'done'), {})
    for key, value in told.items():
        if isinstance(value, dict):
            value = ', '.join(f'{name} {what}' for name, what in value.items())
        table.rows.append([key, str(value)])
    return table


def write(out: Path, head: dict[str, str], tables: Sequence[Table], results: Sequence[Result],
          plots: Sequence[Path]) -> None:
    """
    Write ``results.json``, ``report.md`` and ``report.html`` into a folder.

    :param head: what was run: command, model, date.
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
    told = ''.join(f'<li>{escape(key)}: <code>{escape(value)}</code></li>\n'
                   for key, value in head.items())
    (out / 'report.html').write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width"><title>decode_bench</title>\n'
        f'<style>{_STYLE}</style></head>\n<body><h1>decode_bench</h1>\n<ul>{told}</ul>\n'
        f'{tables[0].html() if tables else ""}{images}'
        f'{"".join(table.html() for table in tables[1:])}</body></html>\n')


def ms(seconds: float | None, digits: int = 3) -> str:
    """Give seconds as milliseconds, n/a where unknown."""
    return number(None if seconds is None else seconds * 1e3, digits)


def number(value: float | None, digits: int = 2) -> str:
    """Give a number with that many decimals, n/a where unknown."""
    return 'n/a' if value is None else f'{value:.{digits}f}'


def weights(footprint: dict[str, Any]) -> str:
    """Give the format of the weights in a word or two."""
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
