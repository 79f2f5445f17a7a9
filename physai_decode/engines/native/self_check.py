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
Whether the loaded engine computes what its weights say, held against plain arithmetic.

A prompt is fed and two tokens are stepped as for any request, by the kernels that were tuned and
captured. Then float32 products of the same weights compute the keys and values of the same tokens
in the first two layers, and on to the first of each that turns heads in another way: all that a
layer does goes into those of the next. Last, the logits of what the last layer left to the head.
Further layers run the same code; how weights were read is not looked at.
"""

from collections.abc import Sequence
from dataclasses import replace
import math

from physai_decode.config import SamplingConfig
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.engines.native.experts import Experts
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.mlp import Mlp
from physai_decode.engines.native.transformer import Transformer
import torch
from torch import Tensor
import torch.nn.functional as F

LAYERS = 2
PIECE = 4096                    # rows of a weight that are float32 at a time
LEAST = 1e-3                    # relative difference that float32 may have
ROUNDINGS = 16                  # and other formats, in units of their own precision
NEAR = 0.25                     # of that, by which a router's products may be wrong


def check(engine: Engine, transformer: Transformer, prompt: Sequence[int]) -> None:
    """
    Hold what the engine has after a prompt and two steps against plain arithmetic.

    :raises EngineError: they differ by more than rounding does.
    """
    t, greedy = transformer, SamplingConfig()
    engine.rewind(0)
    engine.feed(prompt)
    ids = [*prompt, engine.first(greedy, prompt).token_id, engine.step(1).token_id]
    engine.step(0)                  # runs the second
    limit = max(LEAST, ROUNDINGS * torch.finfo(t.keys.dtype).eps)
    for index, (expected, sure) in enumerate(_keys_and_values(t, ids, limit)):
        got = torch.cat((t.keys[index, :, :len(ids)], t.values[index, :, :len(ids)])).float()
        for what, places in (('a prompt', slice(len(prompt))),
                             ('a decode step', slice(len(prompt), None))):
            held = sure[places]
            _hold(what, f'keys and values in layer {index + 1}', got[:, places][:, held],
                  expected[:, places][:, held], limit)
    normed = _normed(t.x.unsqueeze(0), t.weights.norm, t.architecture.norm_eps)
    logits = _product(normed, t.weights.head)[0]
    known = logits.isfinite()       # a row that holds no numbers ends its request, not the load
    _hold('a decode step', 'logits', t.logits[known], logits[known], limit)
    engine.rewind(0)


def _hold(what: str, of_what: str, got: Tensor, wanted: Tensor, limit: float) -> None:
    """Refuse a difference beyond ``limit``, relative to what is wanted."""
    difference, size = float((got - wanted).norm()), float(wanted.norm())
    if not difference <= limit * size:          # NaN neither
        share = difference / size if size else math.inf
        raise EngineError(
            f'the native engine computes {what} wrongly on {got.device}: its {of_what} differ by '
            f'{share:.2g} of their size from those in float32, and {limit:.2g} is rounding; '
            'set engine.name to transformers, and report it with the versions of torch and triton')


def _keys_and_values(t: Transformer, ids: Sequence[int],
                     limit: float) -> list[tuple[Tensor, Tensor]]:
    """
    Return for each of the first layers float32 [2 * kv_heads, tokens, head_dim].

    And bool [tokens], whether rounding of ``limit`` can not change what experts a token takes.
    """
    a, tokens = t.architecture, len(ids)
    # Two, and one of each way to turn heads.
    layers = max(min(LAYERS, a.layers), *(1 + a.rotaries.index(each) for each in a.rotaries))
    x = t.weights.embedding[torch.tensor(ids, device=t.keys.device)].float() * t.embedding_scale
    found = []
    sure = torch.ones(tokens, dtype=torch.bool, device=t.keys.device)
    for layer, window, angles in zip(t.weights.layers[:layers], a.windows, t.angles):
        turns = torch.complex(*(each[:tokens] for each in angles))
        heads = _product(_normed(x, layer.input_norm, a.norm_eps), layer.qkv).view(
            tokens, -1, a.head_dim).transpose(0, 1)
        q, k, v = heads.split((a.heads, a.kv_heads, a.kv_heads))
        if layer.q_norm is not None and layer.k_norm is not None:
            q = _normed(q, layer.q_norm, a.norm_eps)
            k = _normed(k, layer.k_norm, a.norm_eps)
        q, k = _turned(q, turns), _turned(k, turns)
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


def _normed(x, gain, eps):
    if gain is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain.float()


def _turned(heads: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs of [heads, tokens, dim], which are the halves, as complex numbers."""
    turned = torch.complex(*heads.contiguous().chunk(2, -1)) * turns
    return torch.cat((turned.real, turned.imag), -1)


def _attended(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Attend over whole [heads, tokens, dim]; returns [tokens, heads * dim]."""
    shared = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    back = torch.arange(q.shape[1], device=q.device)
    back = back.unsqueeze(1) - back
    hidden = (back < 0) | (back >= window) if window else back < 0
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def _mlp(x: Tensor, mlp: Mlp | Experts, limit: float) -> tuple[Tensor, Tensor]:
    """Return also for each token whether it is clear which experts it takes."""
    if isinstance(mlp, Mlp):
        return (_gated(x, mlp.gate_up, mlp.down, mlp.activation),
                torch.ones(len(x), dtype=torch.bool, device=x.device))
    logits, taken = _product(x, mlp.router), mlp.down.taken
    ordered = F.pad(logits.sort(-1, descending=True).values, (0, 1), value=-math.inf)
    least, next_best = ordered[:, taken - 1:taken], ordered[:, taken:taken + 1]
    shares = logits.softmax(-1).where(logits >= least, 0.0)
    if mlp.normalised:
        shares = shares / shares.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for number in shares.any(0).nonzero().flatten().tolist():
        out += shares[:, number:number + 1] * _gated(
            x, mlp.gate_up[number], mlp.down[number], mlp.activation)
    spread = logits.square().mean(-1).sqrt()
    return out, (least - next_best)[:, 0] >= NEAR * limit * spread


def _gated(x: Tensor, gate_up: Linear, down: Linear, activation: str) -> Tensor:
    gate, up = gate_up.halves(_product(x, gate_up))
    gate = F.silu(gate) if activation == 'silu' else F.gelu(gate, approximate='tanh')
    return _product((gate * up).flatten(1), down)


def _product(x: Tensor, weight: Linear) -> Tensor:
    """Multiply float32 [tokens, K] by a weight in float32, in pieces; returns [tokens, N]."""
    if isinstance(weight, Dense):
        product = torch.cat([x @ rows.float().t() for rows in weight.weight.split(PIECE)], -1)
    else:
        product = replace(weight, bias=None).apply(x)
    return product if weight.bias is None else product + weight.bias.float()
