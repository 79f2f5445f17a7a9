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
The operations of a decode step in torch: for a CPU, and as the reference of each kernel.

All process one token, read their inputs from tensors at fixed addresses and write their results in
place, so that the step can be captured. ``x`` is the residual stream, float32 [hidden].

With a leading dimension, they process the rows of a pass: tokens at successive positions. The
result of each row is bit for bit that of the row alone: sums run row by row, and only elementwise
operations run on all rows at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
import math
from typing import Any

from physai_decode.engines.native.architecture import Growth
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.sampling import HostSampler
from physai_decode.engines.sampling import Sampler
import torch
from torch import Tensor
import torch.nn.functional as F

# From this many elements on, PyTorch splits an operation between threads, possibly inside a row.
# Elements at a split are computed one by one, with functions that differ in the last bit.
PARALLEL_SIZE = 32768


@dataclass(frozen=True)
class Attention:
    """The parameters of attention in a layer."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int              # tokens attended to; 0: all
    scale: float             # multiplies the products of queries and keys
    norm_eps: float
    q_norm: Tensor | None    # [head_dim]
    k_norm: Tensor | None    # [head_dim]
    growth: Growth = Growth()


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate='tanh')


@dataclass(frozen=True)
class Routed:
    """The experts of a `Stack` that are selected for a token."""

    ids: Tensor              # int64
    weights: Tensor          # float32, the routing weights


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {'silu': F.silu, 'gelu_tanh': gelu_tanh}


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """
    Apply RMS norm over the last dimension, in float32.

    :returns: the shape of ``x``, in ``dtype``, by default that of ``gain``.
    """
    wide = x.float()
    squares = (wide * wide).sum(-1, keepdim=True)
    scale = squares.mul_(1 / wide.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(gain).to(dtype or gain.dtype)


def growth_factors(growth: Growth, places: Tensor) -> Tensor:
    """Return the float32 factors of queries at positions ``places``, int64; see `Growth`."""
    return (places // growth.context).float().log1p_().mul_(growth.beta).add_(1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [..., head_dim] by angles [..., head_dim / 2]; the two halves form the pairs."""
    low, high = heads.float().chunk(2, -1)
    return torch.cat(((low * cos).addcmul_(high, sin, value=-1),
                      (high * cos).addcmul_(low, sin)), -1)


def top_k(logits: Tensor, count: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """
    Return the ids of the selected experts and their routing weights, both [..., count].

    :param logits: float32 [..., experts].
    :param normalised: scale the routing weights to a sum of 1.
    """
    weights, ids = logits.softmax(-1).topk(count)
    return ids, weights / weights.sum(-1, keepdim=True) if normalised else weights


class TorchOps:
    """The operations of a decode step in torch."""

    name = 'torch'

    def __init__(self, on_host: bool, dtype: torch.dtype | None = None):
        """
        Configure the operations.

        :param on_host: whether the host can read tensors, as on a CPU; not in a captured step.
        :param dtype: input dtype of products; by default that of the preceding norm's gain.
        """
        self._on_host = on_host
        self._dtype = dtype

    def embed(self, table: Tensor, token: Tensor, x: Tensor, scale: float = 1.0) -> None:
        """Write row ``token`` int64 [1] of ``table`` [vocab, hidden], scaled, to ``x``."""
        if x.dim() > 1:
            token = token.clamp(min=0)
        x.copy_(table.index_select(0, token).view_as(x))
        if scale != 1.0:
            x.mul_(scale)

    def linear(self, x: Tensor, weight: Linear, out: Tensor, *,
               gain: Tensor | None = None, eps: float = 0.0, add: bool = False) -> None:
        """Write (or add) the product with ``x`` [K], normalised if there is a gain, to ``out``."""
        if x.dim() > 1:
            for each, result in zip(self._inputs(x, gain, eps), out):
                self.linear(each, weight, result, add=add)
            return
        x = self._input(x, gain, eps)
        if isinstance(weight, Dense) and weight.weight.dtype == out.dtype:
            start = out if add else weight.bias
            if start is not None and (not add or weight.bias is None):
                torch.addmv(start, weight.weight, x, out=out)
                return
        product = weight.apply(x)
        if add:
            out.add_(product)
        else:
            out.copy_(product)

    def gated(self, x: Tensor, weight: Linear, out: Tensor, gain: Tensor,
              eps: float, activation: str = 'silu') -> None:
        """
        Write activation(gate) * up to ``out`` [N]; ``weight`` [2 N, K] has the rows of both.

        :param activation: one of `ACTIVATIONS`.
        """
        if x.dim() > 1:
            product = torch.stack([weight.apply(each) for each in self._inputs(x, gain, eps)])
            if not self._on_host or out.numel() >= PARALLEL_SIZE:
                for each, result in zip(product, out):
                    _activate(each, weight, result, activation)
                return
        else:
            product = weight.apply(self._input(x, gain, eps))
        _activate(product, weight, out, activation)

    def select(self, logits: Tensor, into: Routed, normalised: bool) -> None:
        """Select experts by ``logits`` float32 [experts]; see `top_k`."""
        ids, weights = top_k(logits, into.ids.shape[0], normalised)
        into.ids.copy_(ids)
        into.weights.copy_(weights)

    def gated_experts(self, x: Tensor, stack: Stack, routed: Routed, out: Tensor,
                      gain: Tensor | None, eps: float, activation: str = 'silu') -> None:
        """
        Write weight * activation(gate) * up of each selected expert to a row of ``out``.

        :param stack: matrices [2 N, K] with the rows of gate and up.
        :param out: [selected, N or more].
        """
        x = self._input(x, gain, eps)
        for row, routing_weight, weight in zip(out, routed.weights, self._selected(stack, routed)):
            gate, up = weight.halves(weight.apply(x))
            product = ACTIVATIONS[activation](gate).mul_(up).flatten()
            torch.mul(product, routing_weight, out=row[:product.shape[0]])

    def summed_experts(self, x: Tensor, stack: Stack, routed: Routed, out: Tensor, *,
                       add: bool = False) -> None:
        """
        Write (or add) the sum of the products of each row of ``x`` with its expert [N, K].

        :param x: [selected, K or more].
        """
        if not add:
            out.zero_()
        for row, weight in zip(x, self._selected(stack, routed)):
            out.add_(weight.apply(row[:weight.shape[1]]))

    def add_normed(self, branch: Tensor, gain: Tensor, eps: float, x: Tensor) -> None:
        """Add ``branch`` float32 [K], normalised, to ``x``."""
        if x.dim() > 1:
            for each, result in zip(branch, x):
                self.add_normed(each, gain, eps, result)
            return
        x.add_(rms_norm(branch, gain, eps, torch.float32))

    def apply(self, x: Tensor, weight: Linear) -> Tensor:
        """Multiply ``x`` [tokens, K], or [K], by ``weight`` in one large product; [tokens, N]."""
        return weight.apply(x)

    def dequantiser(self, weight: Linear) -> Callable[..., Tensor] | None:
        """Return the function that `apply` dequantises with; None: the method of the weight."""
        return None

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, cos: Tensor,
               sin: Tensor, layer: Attention, out: Tensor) -> None:
        """
        Write the key and value of one token to the cache, and compute its attention.

        :param qkv: float32 [(heads + 2 * kv_heads) * head_dim].
        :param keys: the cache of the layer, [kv_heads, max_context, head_dim], like ``values``.
        :param position: int64 [1], of the token.
        :param cos: float32 [max_context, head_dim / 2], like ``sin``.
        :param out: [heads * head_dim].
        """
        if qkv.dim() > 1 and (not self._on_host or qkv.numel() >= PARALLEL_SIZE):
            for row, (each, result) in enumerate(zip(qkv, out)):
                self.attend(each, keys, values, position + row, cos, sin, layer, result)
            return
        heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.head_dim
        rows = qkv.shape[0] if qkv.dim() > 1 else 1
        qk, v = qkv.view(rows, -1, dim).split((heads + kv_heads, kv_heads), 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = torch.cat((rms_norm(qk[:, :heads], layer.q_norm, layer.norm_eps),
                            rms_norm(qk[:, heads:], layer.k_norm, layer.norm_eps)), 1)
        start = int(position) if self._on_host else None
        place = position if start is None else slice(start, start + rows)
        qk = rotate(qk, cos[place].unsqueeze(1), sin[place].unsqueeze(1))
        if layer.growth.beta:
            places = position if rows == 1 else position + torch.arange(rows)
            qk[:, :heads] *= growth_factors(layer.growth, places).view(-1, 1, 1)
        qk = qk.to(keys.dtype)
        keys[:, place] = qk[:, heads:].transpose(0, 1)
        values[:, place] = v.to(values.dtype).transpose(0, 1)
        # The queries of one key-value head are the rows of one product.
        queries, scale = qk[:, :heads].view(rows, kv_heads, -1, dim), layer.scale
        if start is None:
            # A captured step has a fixed length and needs a mask. PyTorch's fused attention would
            # use one multiprocessor per key-value head.
            places = torch.arange(keys.shape[1], device=keys.device)
            hidden = places > position
            if layer.window:
                hidden |= places <= position - layer.window
            scores = (queries[0] @ keys.transpose(1, 2)).float().mul_(scale)
            weights = scores.masked_fill_(hidden, -math.inf).softmax(-1)
            out.copy_((weights.to(values.dtype) @ values).view(-1))
            return
        for row, result in enumerate(out.view(rows, -1)):
            stop = start + row + 1
            read = slice(max(0, stop - layer.window) if layer.window else 0, stop)
            result.copy_(F.scaled_dot_product_attention(
                queries[row:row + 1], keys[None, :, read], values[None, :, read],
                scale=scale).view(-1))

    def sampler(self, vocab_size: int, device: torch.device) -> Sampler:
        """Return the sampler for the logits of a step."""
        return (HostSampler if self._on_host else Sampler)(vocab_size, device)

    def tune(self, transformer: Any, progress: Callable[[str], None]) -> None:
        """Do nothing: torch has its own heuristics."""

    def _selected(self, stack, routed):
        """Return the selected matrices; in a captured step, copies of them."""
        if self._on_host:
            return (stack[number] for number in routed.ids.tolist())
        return (stack.copied(number) for number in routed.ids.split(1))

    def _inputs(self, x, gain, eps):
        """Return `_input` of each row."""
        if gain is None or not self._on_host or x.numel() >= PARALLEL_SIZE:
            return [self._input(each, gain, eps) for each in x]
        scales = [(float(each.dot(each)) / x.shape[1] + eps) ** -0.5 for each in x]
        return (x * gain).mul_(torch.tensor(scales).unsqueeze(1)).to(self._dtype or gain.dtype)

    def _input(self, x, gain, eps):
        if gain is None:
            return x
        if self._on_host:
            # Half the operations of `rms_norm`.
            scale = (float(x.dot(x)) / x.shape[0] + eps) ** -0.5
            return (x * gain).mul_(scale).to(self._dtype or gain.dtype)
        return rms_norm(x, gain, eps, self._dtype)


def _activate(product, weight, out, activation):
    gate, up = weight.halves(product)
    torch.mul(ACTIVATIONS[activation](gate), up, out=out.view_as(gate))
