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
Check prompts in captured chunks on a CUDA device against `Transformer.prefill` in float32.

The models are small and random: all families, dense and GPTQ, in both half precisions. Chunks are
full and partial, after a cached prefix and across a sliding window. All outputs are poisoned
first. The output has the relative errors of the last logits and of the cache, and those of
`Transformer.prefill` in the same precision for comparison.
"""

from concurrent.futures import ProcessPoolExecutor
import contextlib
import io
import multiprocessing
from pathlib import Path
import sys
import tempfile
import traceback

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'test'))

CONTEXT = 1024
SIZES = (16, 32, 64, 128, 256, 512)
CHUNKS = (100, 7, 16, 200, 1, 64, 300, 33)
LIMIT = 2e-2
MORE = {'hidden_size': 512, 'num_attention_heads': 8, 'num_key_value_heads': 2,
        'intermediate_size': 1024, 'num_hidden_layers': 3, 'vocab_size': 1024,
        'max_position_embeddings': CONTEXT}
MODELS = {
    'llama, biases': ('llama_biases', None, {}, 'bfloat16'),
    'mistral, window': ('mistral_window', None, {}, 'bfloat16'),
    'qwen2, 7 queries a key': (
        'qwen2', None, {'hidden_size': 896, 'num_attention_heads': 7, 'num_key_value_heads': 1,
                        'head_dim': 128}, 'bfloat16'),
    'qwen2, windows': ('qwen2_window', None, {}, 'float16'),
    'qwen3, head of 128': ('qwen3', None, {'head_dim': 128}, 'bfloat16'),
    'qwen3, head of 96': ('qwen3', None, {'head_dim': 96}, 'float16'),
    'GPTQ, groups of 128': ('qwen2', {'group_size': 128}, {}, 'float16'),
    'GPTQ, groups of 128, bf16': ('qwen2', {'group_size': 128}, {}, 'bfloat16'),
    'GPTQ, zeros, 64': ('llama', {'group_size': 64, 'symmetric': False}, {}, 'float16'),
    'GPTQ, act-order, 32': (
        'qwen3', {'group_size': 32, 'act_order': True, 'symmetric': False}, {}, 'float16'),
    'GPTQ, blocks not full': (
        'qwen2', {'group_size': 128}, {'intermediate_size': 1152}, 'float16')}


def check(name: str) -> tuple[bool, str]:
    """Check one model; return whether it passes, and a line of output."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return _check(name)
    except Exception:
        return False, f'{name}: {traceback.format_exc()[-1500:]}'


@torch.inference_mode()
def _check(name):
    from physai_decode.checkpoint import inspect
    from physai_decode.engines.native import families
    from physai_decode.engines.native import source
    from physai_decode.engines.native import weights
    from physai_decode.engines.native.int4_kernels import Int4Ops
    from physai_decode.engines.native.ops import TorchOps
    from physai_decode.engines.native.prefill import Prefill
    from physai_decode.engines.native.transformer import Transformer
    import random_gptq
    import random_model

    family, form, changes, kind = MODELS[name]
    device, dtype = torch.device('cuda'), getattr(torch, kind)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), \
            torch.no_grad():
        path = Path(folder) / 'model'
        settings = {**MORE, **changes}
        if form:
            random_gptq.save(path, family, 0, **form, **settings)
        else:
            random_model.save(path, family, 0, **settings)
        found = inspect(path)
        shape = families.parse(found.config)
        loaded = [weights.load(shape, source.Files(found, device), found.quantized,
                               each, lambda message: None) for each in (dtype, torch.float32)]
    own, half, full = (
        Transformer(shape, loaded[at], CONTEXT, each, device, ops) for at, each, ops in (
            (0, dtype, Int4Ops(device)), (0, dtype, TorchOps(False)),
            (1, torch.float32, TorchOps(False))))
    for each in (own, half, full):
        each.keys.fill_(3.0)
        each.values.fill_(3.0)
    assert Prefill.runs(own)
    prefill = Prefill(own, SIZES)
    own.keys.fill_(3.0)
    own.values.fill_(3.0)
    start, worst, usual, again = 0, 0.0, 0.0, 0.0
    for count in CHUNKS:
        ids = torch.randint(0, 1024, (count,))
        results = []
        for _ in range(2):
            for buffer in (prefill._parts, prefill._hidden, prefill._attended, prefill._normed,
                           prefill._q, prefill._x, prefill._ordered, *prefill._partials,
                           prefill._logits, own.x, own.qkv):
                buffer.fill_(float('nan'))
            results.append(prefill(ids.tolist(), start).clone())
        expected = full.prefill(ids.cuda(), start)
        usual = max(usual, error(half.prefill(ids.cuda(), start), expected))
        worst = max(worst, error(results[0], expected))
        again = max(again, (results[0] - results[1]).abs().max().item())
        start += count
    caches = [error(getattr(own, part), getattr(full, part)) for part in ('keys', 'values')]
    rest = all(bool((getattr(own, part)[:, :, start:] == 3.0).all())
               for part in ('keys', 'values'))
    good = worst < max(LIMIT, 2 * usual) and max(caches) < max(LIMIT, usual) and rest and not again
    return good, (
        f'{name:26} {kind:9} logits {worst:.1e} (uncaptured {usual:.1e})  keys {caches[0]:.1e}  '
        f'values {caches[1]:.1e}  repeats {not again}  nothing else written {rest}  '
        f'{"ok" if good else "WRONG"}')


def error(got, expected):
    """Return the relative error; infinite for NaN."""
    found = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    return found if found == found else float('inf')


def main() -> int:
    """Run all checks; return 1 if one fails."""
    with ProcessPoolExecutor(len(MODELS), multiprocessing.get_context('spawn')) as pool:
        good = []
        for right, line in pool.map(check, MODELS):
            print(line, flush=True)
            good.append(right)
    return not all(good)


if __name__ == '__main__':
    sys.exit(main())
