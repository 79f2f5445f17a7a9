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
Two fixed sets of cases with their own tables: the protocol of a paper, and the targets.

The paper, arXiv 2605.30571, measures batch-1 decoding on an H100 and an L4.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from physai_decode.benchmark import report
from physai_decode.benchmark.case import Case
from physai_decode.benchmark.case import ModelSource
from physai_decode.benchmark.runner import Result
from physai_decode.benchmark.table import Table
from physai_decode.config import EngineConfig

PAPER = 'arXiv 2605.30571'
SHAPE = 'qwen2.5-7b'                # the model of the paper
EAGER = 'transformers eager'
CAPTURED = 'transformers captured'
NATIVE = 'native'
UNCAPTURED = 'native uncaptured'
GPTQ = 'GPTQ native'
GPTQ_UNCAPTURED = 'GPTQ native uncaptured'
LONG = 'native, long run'
GPTQ_LONG = 'GPTQ native, long run'

# label, engine, quantisation of the random weights, required modules
_QUANTIZED = (
    ('nf4 (bitsandbytes)', 'transformers', 'nf4', ('bitsandbytes', 'accelerate')),
    (GPTQ, 'native', 'gptq', ()),
    ('GPTQ (ExLlamaV2)', 'exllamav2', 'gptq', ('exllamav2',)),
    ('GPTQ (GPTQModel)', 'transformers', 'gptq', ('gptqmodel', 'optimum', 'accelerate')),
    ('AWQ (GPTQModel)', 'transformers', 'awq', ('gptqmodel', 'accelerate')),
)

# Step times in the paper for Qwen-2.5-7B at context 2048 on an L4, in milliseconds.
_PAPER_L4_MS = {EAGER: 62.32, 'nf4 (bitsandbytes)': 59.36, 'AWQ (GPTQModel)': 45.24,
                'GPTQ (ExLlamaV2)': 17.36}


def split_static(case: Case) -> list[Case]:
    """
    Split a case with a static cache into one case per context.

    The captured step of transformers reads the whole cache at any context. An engine per context
    makes the cache as long as the context, so that the comparison excludes padding.
    """
    if case.engine.name == 'transformers' and case.engine.cuda_graph:
        return [replace(case, contexts=(context,)) for context in case.contexts]
    return [case]


def paper(shape: str, contexts: Sequence[int], base: EngineConfig, seed: int = 0,
          **common: Any) -> list[Case]:
    """
    Return the protocol of the paper: half precision at all contexts, four bits at the first one.

    Each kernel is timed, which separates the host's part of an eager step.

    :param seed: of the random weights.
    """
    half = ModelSource(synthetic=shape, seed=seed)
    cases = []
    for label, name, graph in ((EAGER, 'transformers', False), (CAPTURED, 'transformers', True),
                               (NATIVE, 'native', True)):
        engine = replace(base, name=name, cuda_graph=graph)
        cases += split_static(Case(label, engine, half, tuple(contexts),
                                   captured=label == CAPTURED, **common))
    for label, name, quantization, requires in _QUANTIZED:
        engine = replace(base, name=name, cuda_graph=name != 'transformers')
        source = replace(half, quantization=quantization, written=True)
        cases.append(Case(label, engine, source, (contexts[0],), requires=requires, **common))
    return [replace(case, kernels=contexts[0] in case.contexts) for case in cases]


def targets(shape: str, contexts: Sequence[int], base: EngineConfig, seed: int = 0,
            steps: int = 30, warmup: int = 5, **common: Any) -> list[Case]:
    """
    Return the cases that check the targets of the native engine, the most important ones first.

    :param seed: of the random weights.
    """
    half = ModelSource(synthetic=shape, seed=seed)
    gptq = replace(half, quantization='gptq')
    first = tuple(contexts[:1])
    native = replace(base, name='native', cuda_graph=True)
    eager = replace(base, name='transformers', cuda_graph=False)
    bare = replace(native, cuda_graph=False)
    long = min(1000, contexts[0] - warmup - 2)          # leaves one token for the prompt
    common['warmup'] = warmup
    return [
        Case(NATIVE, native, half, tuple(contexts), steps=steps, kernels=True, **common),
        Case(EAGER, eager, half, tuple(contexts), steps=steps, **common),
        Case(GPTQ, native, gptq, tuple(contexts), steps=steps, kernels=True, **common),
        Case(LONG, native, half, first, steps=long, **common),
        Case(GPTQ_LONG, native, gptq, first, steps=long, **common),
        Case(UNCAPTURED, bare, half, tuple(contexts), steps=steps, **common),
        Case(GPTQ_UNCAPTURED, bare, gptq, first, steps=steps, **common),
    ]


def target_table(results: Sequence[Result], contexts: Sequence[int]) -> Table:
    """Compare the measurements with the targets."""
    near, far = contexts[0], contexts[-1]

    def of(name: str, context: int, key: str) -> Any:
        cell = report.find(results, name, context)
        return cell and cell[key]

    def ratio(above: str, below: str) -> Any:
        top, bottom = of(above, near, 'itl_p50_s'), of(below, near, 'itl_p50_s')
        return top / bottom if top and bottom else None

    table = Table('Targets', ['what', 'asked', 'measured', 'met'], notes=[report.FLOORS])
    for what, least, value in (
            (f'{NATIVE} at {near}: checkpoint floor / step', 0.70,
             of(NATIVE, near, 'r_checkpoint')),
            (f'{NATIVE} at {far}: checkpoint floor / step', 0.65, of(NATIVE, far, 'r_checkpoint')),
            (f'{NATIVE} at {near}: times as fast as {EAGER}', 3.0, ratio(EAGER, NATIVE)),
            (f'{GPTQ} at {near}: times as fast as {NATIVE}', 2.0, ratio(NATIVE, GPTQ)),
            (f'{GPTQ} at {near}: read floor / step', 0.42, of(GPTQ, near, 'r_read'))):
        table.rows.append([what, f'>= {least}', report.number(value, 3), _met(value, least)])
    for name in (LONG, GPTQ_LONG):
        cell = report.find(results, name, near)
        value = cell['itl_p99_s'] / cell['itl_p50_s'] if cell else None
        count = len(cell['itl_s']) if cell else 0
        table.rows.append([f'{name}: p99 / p50 over {count} tokens', '<= 1.05',
                           report.number(value, 3), _met(value and -value, -1.05)])
    again = next((r['startup'] for r in results
                  if report.label(r) == LONG and r['status'] == 'done'), None)
    if again:
        table.rows.append(['second start: process begun to engine ready, s', '< 30',
                           report.number(again['import_s'] + again['build_s'], 1),
                           _met(-again['import_s'] - again['build_s'], -30)])
    for above, below in ((UNCAPTURED, NATIVE), (EAGER, UNCAPTURED), (GPTQ_UNCAPTURED, GPTQ)):
        table.rows.append([f'{below} at {near}: times as fast as {above}', '',
                           report.number(ratio(above, below), 3), ''])
    return table


def _met(value: float | None, least: float) -> str:
    return 'not measured' if value is None else 'yes' if value >= least else 'no'


def paper_table(results: Sequence[Result], context: int) -> Table:
    """Compare the figures at the first context with those of the paper."""
    device = next((r['footprint']['device_name'] for r in results if r['status'] == 'done'),
                  'here')
    table = Table('Beside the paper', ['what', 'paper, H100', 'paper, L4', device], notes=[
        f'Paper: {PAPER}, Qwen-2.5-7B, batch 1, context 2048; its captured and eager steps of '
        "the A/B are 11.776 and 14.828 ms (H100), the ratio's 95 % interval 1.253 to 1.267, "
        f'N = 10. Here: {results[0]["case"]["source"]["synthetic"]} with random weights at '
        f"context {context}, one session each. The floor is the checkpoint's."])
    eager = report.find(results, EAGER, context)
    native = report.find(results, NATIVE, context)
    captured = report.find(results, CAPTURED, context)

    def over(cell: dict[str, Any] | None) -> str:
        return report.number(
            eager['itl_p50_s'] / cell['itl_p50_s'] if eager and cell else None, 3)
    table.rows += [
        [f'{EAGER}: ms', '16.97', '62.32', _of(eager, 'itl_p50_s')],
        [f'{EAGER}: of the floor', '0.27', '0.81', _fraction(eager)],
        [f'{CAPTURED}: ms', '11.776', '', _of(captured, 'itl_p50_s')],
        [f'{CAPTURED}: times as fast as eager', '1.259', '1.028', over(captured)],
        [f'{CAPTURED}: of the floor', '', '', _fraction(captured)],
        [f'{NATIVE}: ms', '', '', _of(native, 'itl_p50_s')],
        [f'{NATIVE}: times as fast as eager', '', '', over(native)],
        [f'{NATIVE}: of the floor', '', '', _fraction(native)]]
    for name, *_ in _QUANTIZED:
        cell, paper_ms = report.find(results, name, context), _PAPER_L4_MS.get(name)
        table.rows.append([f'{name}: ms', '', report.number(paper_ms) if paper_ms else '',
                           _of(cell, 'itl_p50_s')])
        table.rows.append([
            f'{name}: times as fast as {EAGER}', '',
            report.number(_PAPER_L4_MS[EAGER] / paper_ms) if paper_ms else '', over(cell)])
    return table


def quantized_table(results: Sequence[Result], context: int) -> Table:
    """Show how much time each four-bit path saves, relative to its saving in weight traffic."""
    table = Table('Half precision and four bits', [
        'path', 'ms', f'speed / {EAGER}', 'weights read GB', 'compared with', 'traffic saved %',
        'time saved %', 'of the saving realised %'], notes=[
        'Traffic saved: in the weights read per step, relative to the half-precision path in '
        '"compared with". Time saved: relative to its step. Realised: time saved over traffic '
        'saved.'])
    eager = report.find(results, EAGER, context)
    for result in results:
        name = report.label(result)
        if context not in result['case']['contexts']:
            continue
        cell = report.find([result], name, context)
        if cell is None:
            error = result.get('error') or next(
                c['error'] for c in result['contexts'] if c['context'] == context)
            table.rows.append([name, 'n/a', *[''] * 6])
            table.notes.append(f'{name}: {error}')
            continue
        read = result['footprint']['read_weight_bytes']
        row = [name, report.ms(cell['itl_p50_s']),
               report.number(eager['itl_p50_s'] / cell['itl_p50_s'] if eager else None),
               report.number(read / 1e9, 3)]
        if result['case']['source']['quantization'] == 'none':
            table.rows.append([*row, *[''] * 4])
            continue
        base_name = NATIVE if name == GPTQ else EAGER
        base = next(((r, c) for r, c in report.cells(results)
                     if report.label(r) == base_name and c['context'] == context), None)
        if base is None:
            table.rows.append([*row, base_name, 'n/a', 'n/a', 'n/a'])
            continue
        traffic = 1 - read / base[0]['footprint']['read_weight_bytes']
        time = 1 - cell['itl_p50_s'] / base[1]['itl_p50_s']
        realised = 100 * time / traffic if traffic > 0 else None
        table.rows.append([*row, base_name, report.number(100 * traffic, 1),
                           report.number(100 * time, 1), report.number(realised, 1)])
    return table


def _of(cell: dict[str, Any] | None, key: str) -> str:
    return report.ms(cell[key] if cell else None)


def _fraction(cell: dict[str, Any] | None) -> str:
    return report.number(cell['r_checkpoint'] if cell else None, 3)
