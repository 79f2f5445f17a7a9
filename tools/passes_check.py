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
Check passes of several rows on a CUDA device, and time them.

For a 7B shape in bf16, GPTQ int4 and NVFP4, check whether the logits, keys and values of each row
equal those of a step bit for bit, and whether answers, greedy and sampled, are the same with and
without drafts. Print the tokens per pass, the time of a step without speculation, and the times of
passes of 1, 2, 4 and 8 rows behind a few contexts. Then check small random models of several
families, untuned. The part ``layouts`` compares rows with steps for each layout of each kernel.
"""

import argparse
import contextlib
from dataclasses import dataclass
import io
from itertools import chain
from pathlib import Path
from random import Random
import sys
import tempfile
import time

from physai_decode import checkpoint
from physai_decode.benchmark import synthetic
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import SpeculationConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engines.native import kernels
from physai_decode.engines.native import NativeEngine
from physai_decode.engines.native.start import PASS_ROWS
from physai_decode.engines.native.tuning import timed
from physai_decode.engines.sampling import ROWS
from physai_decode.speculation import Policy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'test'))

SAMPLINGS = (
    {}, {'temperature': 0.7}, {'temperature': 1.0, 'top_k': 20, 'top_p': 0.9},
    {'repetition_penalty': 1.2}, {'temperature': 0.9, 'min_p': 0.05, 'repetition_penalty': 1.1})


@dataclass(frozen=True)
class Small:
    """A small random model."""

    family: str
    dtype: str
    quantized: bool = False
    act_order: bool = False


SMALL = (
    Small('llama_biases', 'bfloat16'), Small('mistral_window', 'bfloat16'),
    Small('gemma3_text', 'bfloat16'),
    Small('qwen2_window', 'float16'), Small('qwen3', 'bfloat16'), Small('qwen2', 'float32'),
    Small('qwen2', 'float16', True), Small('llama', 'bfloat16', True),
    Small('qwen3', 'float16', True, True))


@torch.inference_mode()
def rows_differ(transformer, places, sizes=PASS_ROWS[1:]):
    """Return the differences between passes and steps: (rows, position, row or cache)."""
    t, wrong = transformer, []
    for cache in (t.keys, t.values):
        cache.normal_()
    for rows in sizes:
        ids = torch.randint(0, t.architecture.vocab_size, (rows,), device=t.token.device)
        for place in places:
            t.position.fill_(place)
            t.tokens[:rows] = ids
            t.step(rows)
            got = torch.stack([each.clone() for each in t.row_logits[:rows]])
            caches = [cache[:, :, place:place + rows].clone() for cache in (t.keys, t.values)]
            for row in range(rows):
                t.position.fill_(place + row)
                t.token.copy_(ids[row:row + 1])
                t.step()
                if not torch.equal(got[row], t.logits) or not got[row].isfinite().all():
                    worst = (got[row] - t.logits).abs().max().item()
                    wrong.append((rows, place, f'row {row}: {worst:.1e}'))
            for before, cache in zip(caches, (t.keys, t.values)):
                if not torch.equal(before, cache[:, :, place:place + rows]):
                    wrong.append((rows, place, 'cache'))
    t.position.zero_()
    return wrong


def answers(loop, prompts, tokens):
    """Return all answers, the number of passes, and their time in seconds without prefill."""
    found, passes, spent_s = [], 0, 0.0
    for number, prompt in enumerate(prompts):
        sampling = SamplingConfig(
            max_new_tokens=tokens, seed=number, **SAMPLINGS[number % len(SAMPLINGS)])
        begin_s, steps = None, []
        for step in loop.stream(prompt, sampling):
            if step.token_ids:
                begin_s = begin_s or time.perf_counter()
                steps.append(step.token_ids)
        spent_s += time.perf_counter() - begin_s
        found.append(list(chain.from_iterable(steps)))
        passes += len(steps) - 1
    return found, passes, spent_s


def texts(engine, count, tokens, every):
    """
    Compare answers with and without drafts; time the second run, which captures nothing.

    :param every: verify every draft, with random lengths, instead of following the policy.
    :returns: whether the answers are the same, and a line of text.
    """
    draw = Random(count)
    prompts = [[draw.randrange(3, 3 + draw.choice((2, 9, 500)))
                for _ in range(draw.randint(2, 70))] for _ in range(count)]
    plain, drafting = (DecodeLoop(engine, 0.0, speculation=SpeculationConfig(name))
                       for name in ('off', 'lookup'))
    own = Policy.best
    if every:
        Policy.best = lambda self, most, forced=0: (1.0, draw.randint(1, most))
    try:
        results = []
        for loop in (plain, drafting, plain, drafting):
            engine.rewind(0)
            loop.forget()
            results.append(answers(loop, prompts, tokens))
    finally:
        Policy.best = own
    found = [result[0] for result in results]
    total = sum(len(each) - 1 for each in found[0])
    (_, _, without_s), (_, passes, with_s) = results[2:]
    same = all(each == found[0] for each in found)
    return same, (
        f'{count} answers {"with every draft verified" if every else "with the policy"}: same '
        f'{same}, {total / passes:.2f} tokens a pass, {1e3 * without_s / total:.3f} ms a token '
        f'without, {1e3 * with_s / total:.3f} with')


def small(model):
    """Check one small model; return whether it is correct."""
    import random_gptq
    import random_model
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        path = Path(folder) / 'model'
        if model.quantized:
            random_gptq.save(path, model.family, 0, 32, model.act_order)
        else:
            random_model.save(path, model.family, 0)
        tune, kernels.TritonOps.tune = kernels.TritonOps.tune, lambda *arguments: None
        try:
            engine = NativeEngine(checkpoint.inspect(path), EngineConfig(
                device='cuda', dtype=model.dtype, max_context=250), passes=True)
        finally:
            kernels.TritonOps.tune = tune
        wrong = rows_differ(engine.transformer, (0, 1, 45, 100, 200))
        same, line = texts(engine, 20, 40, every=True)
        engine.close()
    print(f'{model}: {"rows are bit for bit steps" if not wrong else f"DIFFER {wrong[:6]}"}; '
          f'{line}', flush=True)
    return same and not wrong


def built(shape, quantization, max_context, tuned, dtype='auto', passes=True):
    """Build an engine of a shape with random weights."""
    own = kernels.TritonOps.tune
    if not tuned:
        kernels.TritonOps.tune = lambda *arguments: None
    try:
        with tempfile.TemporaryDirectory() as folder:
            synthetic.describe(Path(folder) / 'model', shape, quantization)
            return NativeEngine(checkpoint.inspect(Path(folder) / 'model'), EngineConfig(
                device='cuda', dtype=dtype, max_context=max_context), passes=passes)
    finally:
        kernels.TritonOps.tune = own


@torch.inference_mode()
def times_s(transformer, context, sizes):
    """Return the times of passes of each size behind a context, in seconds."""
    transformer.position.fill_(context)
    each_s = [timed(lambda rows=rows: transformer.step(rows)) for rows in sizes]
    transformer.position.zero_()
    return each_s


def large(shape, quantization, contexts, tuned):
    """Check and time a large shape with random weights; return whether it is correct."""
    begin_s = time.perf_counter()
    plain = built(shape, quantization, max(contexts) + 64, tuned, passes=False)
    steps_s = [times_s(plain.transformer, context, (1,))[0] for context in contexts]
    plain.close()
    engine = built(shape, quantization, max(contexts) + 64, tuned)
    t = engine.transformer
    print(f'{shape}, {quantization}, {engine.footprint.dtype}, ready after '
          f'{time.perf_counter() - begin_s:.0f} s: {t.ops._layouts} '
          f'{t.ops._attention_layouts}', flush=True)
    wrong = rows_differ(t, (0, 100, *contexts))
    print('  rows are bit for bit steps' if not wrong else f'  DIFFER {wrong[:12]}', flush=True)
    for context, step_s in zip(contexts, steps_s):
        report = ', '.join(f'{rows} rows {1e3 * spent_s:.3f} ms ({spent_s / step_s:.3f})'
                           for rows, spent_s in zip(PASS_ROWS, times_s(t, context, PASS_ROWS)))
        print(f'  behind {context} tokens: a step without {1e3 * step_s:.3f} ms, {report}',
              flush=True)
    same = True
    for count, tokens, every in ((5, 40, True), (10, 100, False)):
        right, line = texts(engine, count, tokens, every)
        same &= right
        print(f'  {line}', flush=True)
    print(f'  costs {dict(engine.pass_costs)}; all after {time.perf_counter() - begin_s:.0f} s',
          flush=True)
    engine.close()
    return same and not wrong


def layouts(shape, quantization, dtype):
    """Compare rows with steps in each layout of a kernel; return whether all are equal."""
    synthetic.SHAPES['one layer'] = {
        **synthetic.SHAPES[shape], 'num_hidden_layers': 1, 'vocab_size': 1024}
    engine = built('one layer', quantization, 300, False, dtype)
    ops, good = engine.transformer.ops, True
    shapes = [kernels._shape(*product) for _, product in engine.transformer.products()]
    heads, = {kernels._heads(layer) for layer in engine.transformer.attention}
    tried = [({each: layout for each in shapes if layout in ops._candidates(each)}, attention)
             for layout, attention in (
                 *((layout, kernels.ATTENTION_LAYOUTS[0])
                   for layout in dict.fromkeys(chain.from_iterable(
                       map(ops._candidates, shapes)))),
                 *((None, attention) for attention in kernels.ATTENTION_LAYOUTS[1:]))]
    for products, attention in tried:
        ops._layouts, ops._attention_layouts = products, {heads: attention}
        wrong = rows_differ(engine.transformer, (0, 200), (ROWS,))
        good &= not wrong
        print(f'{quantization}, {dtype}, {set(products.values()) or attention}: '
              f'{f"DIFFER {wrong[:6]}" if wrong else "rows are bit for bit steps"}', flush=True)
    engine.close()
    return good


def main() -> int:
    """Run all checks; return 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--shape', default='qwen2.5-7b', choices=synthetic.SHAPES)
    parser.add_argument('--contexts', type=int, nargs='+', default=[2048, 8192])
    parser.add_argument('--untuned', action='store_true', help='the large shape too')
    parser.add_argument('--parts', nargs='+', default=['bf16', 'int4', 'fp4', 'small'],
                        choices=('bf16', 'int4', 'fp4', 'small', 'layouts'))
    options = parser.parse_args()
    torch.manual_seed(0)
    good = []
    for part, quantization in (('bf16', 'none'), ('int4', 'gptq'), ('fp4', 'nvfp4')):
        if part in options.parts:
            good.append(large(options.shape, quantization, options.contexts, not options.untuned))
    if 'small' in options.parts:
        with torch.no_grad():
            good += [small(model) for model in SMALL]
    if 'layouts' in options.parts:
        good += [layouts(options.shape, *kind) for kind in (
            ('none', 'bfloat16'), ('gptq', 'float16'), ('gptq', 'bfloat16'),
            ('nvfp4', 'float16'), ('nvfp4', 'bfloat16'))]
    print('all right' if all(good) else 'WRONG')
    return not all(good)


if __name__ == '__main__':
    sys.exit(main())
