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
Checks a loaded engine against a float32 reference.

The engine prefills a prompt and decodes two tokens (with experts, as many as the prompt has) as
for any request, with the kernels that were tuned and captured. Then a float32 reference with the
same weights computes the keys and values of these tokens in the first two layers, and up to the
first layer of each kind of rotary embedding: a layer's keys and values depend on all that the
layers before it compute. Last, it computes the logits from the engine's last hidden state. Further
layers run the same code. How weights were loaded is not checked.

A longer prompt can dequantise weights by other kernels than this one. Each of them is compared for
a few rows of every layout and shape of weights that it dequantises.
"""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
import math
from typing import Any

from physai_decode.config import SamplingConfig
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.engines.native.experts import Experts
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.mlp import Mlp
from physai_decode.engines.native.transformer import Transformer
import torch
from torch import Tensor
import torch.nn.functional as F

LAYERS = 2
PIECE = 4096                    # rows of a weight that are in float32 at once
LEAST = 1e-3                    # relative error allowed in float32
ROUNDINGS = 16                  # and in other dtypes, in units of their epsilon
NEAR = 0.25                     # and in a router's logits, as a fraction of that
ROWS = 80                       # compared if dequantised: more than one program of a kernel has

Dequantiser = Callable[[Any], Callable[..., Tensor] | None]


def check(engine: Engine, transformer: Transformer, dequantiser: Dequantiser,
          prompt: Sequence[int]) -> None:
    """
    Compare the engine's state after a prompt and some steps with the float32 reference.

    :param dequantiser: of the engine's prefill; see `TorchOps.dequantiser`.
    :raises EngineError: they differ by more than rounding.
    """
    t, greedy = transformer, SamplingConfig()
    engine.rewind(0)
    engine.feed(prompt)
    has_experts = any(isinstance(layer.mlp, Experts) for layer in t.weights.layers)
    tokens = max(2, len(prompt)) if has_experts else 2      # not all may be comparable
    ids = [*prompt, engine.first(greedy, prompt).token_id]
    ids += [engine.step(remaining).token_id for remaining in range(tokens - 1, 0, -1)]
    engine.step(0)                  # computes the keys and values of the last token
    limit = max(LEAST, ROUNDINGS * torch.finfo(t.keys.dtype).eps)
    for index, (expected, sure) in enumerate(_keys_and_values(t, ids, limit)):
        got = torch.cat((t.keys[index, :, :len(ids)], t.values[index, :, :len(ids)])).float()
        for what, positions in (('a prompt', slice(len(prompt))),
                                ('a decode step', slice(len(prompt), None))):
            compared = sure[positions]
            _compare(what, f'keys and values in layer {index + 1}', got[:, positions][:, compared],
                     expected[:, positions][:, compared], limit)
    normed = _normed(t.x.unsqueeze(0), t.weights.norm, t.architecture.norm_eps)
    logits = _product(normed, t.weights.head)[0]
    known = logits.isfinite()       # NaN in a row of the head fails a request, not the load
    _compare('a decode step', 'logits', t.logits[known], logits[known], limit)
    engine.rewind(0)
    _check_dequantisers(t, dequantiser, limit)


def _check_dequantisers(t: Transformer, dequantiser: Dequantiser, limit: float) -> None:
    """Compare the last rows of a weight of each layout, dequantised as for a long prompt."""
    checked = set()
    for number, layer in enumerate(t.weights.layers, 1):
        products: list[tuple[Any, ...]] = [
            ('qkv', layer.qkv), ('out', layer.out), *layer.mlp.products()]
        for name, weight, *_ in products:
            is_stack = isinstance(weight, Stack)
            one = weight[weight.count - 1] if is_stack else weight
            dequantise = dequantiser(one)
            layout = is_stack, one.kind, one.shape, getattr(one, 'zeros', None) is None
            if dequantise is None or layout in checked:
                continue
            checked.add(layout)
            end = -(-one.shape[0] // one.part_rows)
            part = slice(max(0, end - ROWS // one.part_rows), end)
            got, expected = (found.float() for found in (
                dequantise(one, part, t.keys.dtype), one.dequantise(part, t.keys.dtype)))
            known = expected.isfinite()     # NaN fails a request, not the load
            what = f'experts ({name}, {one.kind})' if is_stack else f'{name} ({one.kind})'
            _compare('a long prompt', f'{what} in layer {number}', got[known], expected[known],
                     limit)


def _compare(what: str, quantity: str, got: Tensor, expected: Tensor, limit: float) -> None:
    """Raise EngineError if the relative error exceeds ``limit``, or is NaN."""
    difference, size = float((got - expected).norm()), float(expected.norm())
    if not difference <= limit * size:
        error = difference / size if size else math.inf
        raise EngineError(
            f'the native engine computes {what} wrongly on {got.device}: the relative error of '
            f'its {quantity} is {error:.2g}, and rounding explains only {limit:.2g}; '
            'set engine.name to transformers, and report it with the versions of torch and triton')


def _keys_and_values(t: Transformer, ids: Sequence[int],
                     limit: float) -> list[tuple[Tensor, Tensor]]:
    """
    Compute the keys and values of the first layers, each float32 [2 * kv_heads, tokens, head_dim].

    With each comes bool [tokens]: whether rounding can't change the experts selected so far.
    """
    a, tokens = t.architecture, len(ids)
    # Two, and one of each kind of rotary embedding.
    layers = max(min(LAYERS, a.layers), *(1 + a.rotaries.index(each) for each in a.rotaries))
    x = t.weights.embedding[torch.tensor(ids, device=t.keys.device)].float() * t.embedding_scale
    found = []
    sure = torch.ones(tokens, dtype=torch.bool, device=t.keys.device)
    for layer, window, angles in zip(t.weights.layers[:layers], a.windows, t.angles):
        rotations = torch.complex(*(each[:tokens] for each in angles))
        heads = _product(_normed(x, layer.input_norm, a.norm_eps), layer.qkv).view(
            tokens, -1, a.head_dim).transpose(0, 1)
        q, k, v = heads.split((a.heads, a.kv_heads, a.kv_heads))
        if layer.q_norm is not None and layer.k_norm is not None:
            q = _normed(q, layer.q_norm, a.norm_eps)
            k = _normed(k, layer.k_norm, a.norm_eps)
        q, k = _rotated(q, rotations), _rotated(k, rotations)
        lengths = torch.arange(tokens, device=q.device).div(a.growth.context).floor()
        q = q * (1 + a.growth.beta * (1 + lengths).log()).unsqueeze(1)
        found.append((torch.cat((k, v)), sure))
        if len(found) < layers:
            attended = _product(_attended(q, k, v, window, a.attention_scale), layer.out)
            x = x + _normed(attended, layer.out_norm, a.norm_eps)
            mlp, clear = _mlp(_normed(x, layer.mlp_norm, a.norm_eps), layer.mlp, limit)
            sure = sure & clear
            x = x + _normed(mlp, layer.down_norm, a.norm_eps)
    return found


def _normed(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if gain is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain.float()


def _rotated(heads: Tensor, rotations: Tensor) -> Tensor:
    """Rotate [heads, tokens, dim], whose halves are real and imaginary parts."""
    rotated = torch.complex(*heads.contiguous().chunk(2, -1)) * rotations
    return torch.cat((rotated.real, rotated.imag), -1)


def _attended(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Attend over all of [heads, tokens, dim]; returns [tokens, heads * dim]."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    positions = torch.arange(q.shape[1], device=q.device)
    distance = positions.unsqueeze(1) - positions
    masked = (distance < 0) | (distance >= window) if window else distance < 0
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(masked, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def _mlp(x: Tensor, mlp: Mlp | Experts, limit: float) -> tuple[Tensor, Tensor]:
    """Return the output, and for each token whether its selection of experts is unambiguous."""
    if isinstance(mlp, Mlp):
        return (_gated(x, mlp.gate_up, mlp.down, mlp.activation),
                torch.ones(len(x), dtype=torch.bool, device=x.device))
    logits, top_k = _product(x, mlp.router), mlp.down.top_k
    ordered = F.pad(logits.sort(-1, descending=True).values, (0, 1), value=-math.inf)
    least, next_best = ordered[:, top_k - 1:top_k], ordered[:, top_k:top_k + 1]
    weights = logits.softmax(-1).where(logits >= least, 0.0)
    if mlp.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in weights.any(0).nonzero().flatten().tolist():
        out += weights[:, expert:expert + 1] * _gated(
            x, mlp.gate_up[expert], mlp.down[expert], mlp.activation)
    size = logits.square().mean(-1).sqrt()
    return out, (least - next_best)[:, 0] >= NEAR * limit * size


def _gated(x: Tensor, gate_up: Linear, down: Linear, activation: str) -> Tensor:
    gate, up = gate_up.halves(_product(x, gate_up))
    gate = F.silu(gate) if activation == 'silu' else F.gelu(gate, approximate='tanh')
    return _product((gate * up).flatten(1), down)


def _product(x: Tensor, weight: Linear) -> Tensor:
    """Multiply float32 [tokens, K] by a weight in float32; returns [tokens, N]."""
    if isinstance(weight, Dense):
        product = torch.cat([x @ rows.float().t() for rows in weight.weight.split(PIECE)], -1)
    else:
        product = replace(weight, bias=None).apply(x)
    return product if weight.bias is None else product + weight.bias.float()
