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
Check the native engine on a CUDA device against transformers in float32.

The models are small and random: one per family, and two layers of Qwen-2.5-7B's width. Quantised
weights are compared with PyTorch's products of the dequantised weights. For each model, the output
has the relative error of the logits in prefill and in a decode step; the largest distance of a
chosen token below the best one of the reference (0: the same tokens); whether captured and
uncaptured steps give the same tokens; and whether a seed repeats. The kernels run untuned, which
affects only their speed.

Set PHYSAI_DECODE_CAPABILITY=8.7 to check the code path of a Jetson Orin.
"""

import contextlib
import io
from pathlib import Path
import sys
import tempfile

from physai_decode import checkpoint
from physai_decode.benchmark import synthetic
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engines.native import kernels
from physai_decode.engines.native import NativeEngine
from physai_decode.engines.native.ops import TorchOps
import torch
from transformers import AutoConfig
from transformers import AutoModelForCausalLM
from transformers.utils import logging

LIMIT = 2e-2
# With experts: if two are almost equally likely, bfloat16 can route to the other. transformers in
# bfloat16 then differs from its float32 by up to 0.4, at 1 to 10 % of the positions.
EXPERTS_LIMIT = 0.5
TOKENS = 64
SMALL = {'hidden_size': 256, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'head_dim': 64, 'intermediate_size': 512, 'vocab_size': 1024,
         'max_position_embeddings': 512}
WIDE = {'hidden_size': 3584, 'num_hidden_layers': 2, 'num_attention_heads': 28,
        'num_key_value_heads': 4, 'intermediate_size': 18944, 'vocab_size': 152064,
        'max_position_embeddings': 512}
MODELS = {
    'llama': ('llama', {**SMALL, 'attention_bias': True, 'mlp_bias': True}),
    'mistral, window': ('mistral', {**SMALL, 'sliding_window': 50}),
    'qwen2, tied': ('qwen2', {**SMALL, 'tie_word_embeddings': True}),
    'qwen3': ('qwen3', SMALL),
    'qwen3, experts': ('qwen3_moe', {
        **SMALL, 'num_experts': 16, 'num_experts_per_tok': 4, 'moe_intermediate_size': 192,
        'norm_topk_prob': True}),
    'gemma3': ('gemma3_text', {
        **SMALL, 'head_dim': 256, 'num_key_value_heads': 1, 'sliding_window': 50,
        'layer_types': ['sliding_attention', 'full_attention'], 'tie_word_embeddings': True}),
    'phi4-mini': ('phi3', {
        **SMALL, 'original_max_position_embeddings': 512, 'pad_token_id': None,
        'rope_parameters': {'rope_type': 'longrope', 'rope_theta': 1e4,
                            'partial_rotary_factor': 0.75, 'attention_factor': 1.19,
                            'short_factor': [1.5] * 24, 'long_factor': [3.0] * 24}}),
    'smollm3': ('smollm3', {**SMALL, 'no_rope_layers': [1, 0], 'pad_token_id': None}),
    'granite': ('granite', {
        **SMALL, 'embedding_multiplier': 12.0, 'residual_multiplier': 0.22,
        'logits_scaling': 8.0, 'attention_multiplier': 0.1}),
    'ministral3': ('ministral3', {**SMALL, 'rope_parameters': {
        'rope_type': 'yarn', 'rope_theta': 1e6, 'factor': 4.0, 'mscale': 1.0,
        'mscale_all_dim': 1.0, 'original_max_position_embeddings': 64,
        'llama_4_scaling_beta': 0.1}, 'pad_token_id': None}),
    'qwen2.5-7b, 2 layers': ('qwen2', WIDE)}


def answers(loop, prompt):
    """Return the greedy answer, the logits of the last step, and two answers of one seed."""
    def ids(**sampling):
        return [i for step in loop.stream(prompt, SamplingConfig(
            max_new_tokens=TOKENS, **sampling)) for i in step.token_ids]

    greedy = ids()
    logits = loop.engine.transformer.logits.float().clone()
    sampled = {'temperature': 0.8, 'top_k': 50, 'top_p': 0.9, 'seed': 7}
    return greedy, logits, ids(**sampled), ids(**sampled)


class Even:
    """A constraint that allows even ids in ascending order."""

    mask_s, ended = 0.0, False

    def __init__(self, size):
        """Set the vocabulary size."""
        self._size, self._least = size, 0

    def mask(self):
        """See `physai_decode.engine.Constraint.mask`."""
        bits = bytearray(-(-self._size // 8))
        for id_ in range(self._least, self._size, 2):
            bits[id_ // 8] |= 1 << id_ % 8
        return bits

    def accept(self, token_id):
        """See `physai_decode.engine.Constraint.accept`."""
        assert token_id % 2 == 0 and token_id >= self._least, f'{token_id} is not allowed'
        self._least = min(token_id, self._size - 2)


def constrained(loop, prompt):
    """Return a greedy and a sampled answer of even ids."""
    size = loop.engine.footprint.vocab_size
    return [[i for step in loop.stream(prompt, SamplingConfig(
        max_new_tokens=TOKENS, temperature=temperature, top_p=0.9, seed=7), Even(size))
        for i in step.token_ids] for temperature in (0.0, 0.8)]


def error(got, expected):
    """Return the relative error of a tensor."""
    return ((got - expected).norm() / expected.norm()).item()


def compare(name, folder, reference, dtype='auto'):
    """Check one folder; ``reference`` returns float32 logits [tokens, vocab] of ids."""
    prompt = torch.randint(0, 1000, (100,)).tolist()
    engine = NativeEngine(checkpoint.inspect(Path(folder)), EngineConfig(
        device='cuda', dtype=dtype, max_context=256))
    prefill = engine.prefill_logits(prompt)
    loop = DecodeLoop(engine)
    greedy, logits, first, second = captured = answers(loop, prompt)
    loop.forget()                       # so that the chunk is fed again
    kept = constrained(loop, prompt)
    loop.forget()
    with engine.trial(captured=False):
        uncaptured = answers(loop, prompt)
        loop.forget()                   # a prompt in the cache ends in other rounding
        masked = constrained(loop, prompt) == kept
    expected = reference(engine, prompt + greedy[:-1])
    kind = engine.footprint.dtype
    engine.close()
    errors = error(prefill, expected[:100]), error(logits, expected[-1])
    picked = expected[99:]
    below = max((row.max() - row[i]).item() / row.abs().max().item()
                for row, i in zip(picked, greedy))
    same, repeats = captured[0] == uncaptured[0], first == second
    limit = EXPERTS_LIMIT if 'experts' in name else LIMIT
    good = max(errors) < limit and below < limit and same and repeats and masked
    print(f'{name:24} {kind:9} prompt {errors[0]:.1e}  step {errors[1]:.1e}  below the best '
          f'{below:.1e}  captured = uncaptured {same}  seed repeats {repeats}  '
          f'masked alike {masked}  '
          f'{"ok" if good else "WRONG"}', flush=True)
    return good


def dense(name, folder):
    """Check a random model of one family against transformers."""
    family, settings = MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
        elif settings is not WIDE:
            parameter.data *= 3
    model.to(torch.bfloat16).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    return compare(name, folder, lambda engine, ids: model(
        torch.tensor([ids], device='cuda')).logits[0])


def packed(folder, quantization, dtype, name='qwen2.5-7b', **settings):
    """Check random quantised weights against PyTorch's products of the dequantised ones."""
    def reference(engine, ids):
        transformer = engine.transformer
        own, transformer.ops = transformer.ops, TorchOps(on_host=False)
        logits = engine.prefill_logits(ids)
        transformer.ops = own
        return logits

    shape = {**synthetic.SHAPES[name], 'num_hidden_layers': 2, **settings}
    synthetic.SHAPES['check'] = shape
    make = synthetic.describe if quantization in synthetic.DESCRIBED else synthetic.write
    make(folder, 'check', quantization)
    experts = ' with experts' * ('num_experts' in shape)
    return compare(f'{quantization}, 2 layers{experts}', folder, reference, dtype)


def main() -> int:
    """Run all checks; return 1 if one fails."""
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    kernels.TritonOps.tune = lambda self, transformer, progress: None
    good = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder, \
                contextlib.redirect_stderr(io.StringIO()):
            good.append(dense(name, Path(folder)))
    for quantization in synthetic.QUANTIZATIONS[1:]:
        for dtype in ('float16', 'bfloat16'):
            with tempfile.TemporaryDirectory() as folder:
                good.append(packed(Path(folder) / 'model', quantization, dtype))
    for quantization in ('gptq', 'w8a16', 'fp8', 'nvfp4'):
        with tempfile.TemporaryDirectory() as folder:
            good.append(packed(Path(folder) / 'model', quantization, 'bfloat16', 'qwen3-30b-a3b',
                               num_experts=16))
    return not all(good)


if __name__ == '__main__':
    sys.exit(main())
