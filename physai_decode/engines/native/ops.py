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
The operations of a decode step in torch: what runs on a CPU, and the twin of each kernel.

All work on one token, read their inputs from tensors at fixed addresses and write their result in
place, so that the same step can be captured. ``x`` is the residual stream, float32 [hidden].

With a leading dimension they work on the rows of a pass, tokens at places one after the other.
Each row's result is then bit for bit that of the row alone: sums are made row by row, and only
what is done element by element is done for all rows at once.
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

# Elements from which on PyTorch shares an operation out to threads, by a rule that may cut a row
# in two; at a cut it computes single elements, whose functions differ in the last bit.
SHARED_OUT = 32768


@dataclass(frozen=True)
class Attention:
    """What attention needs to know of a layer beside its cache."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int              # tokens seen back; 0: all
    scale: float             # multiplies the products of queries and keys
    norm_eps: float
    q_norm: Tensor | None    # [head_dim]
    k_norm: Tensor | None    # [head_dim]
    growth: Growth = Growth()


def gelu_tanh(x: Tensor) -> Tensor:
    """Give GELU by its approximation with tanh (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate='tanh')


@dataclass(frozen=True)
class Routed:
    """The weights of a `Stack` that a token takes."""

    ids: Tensor              # int64
    weights: Tensor          # float32, what each one's product counts


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {'silu': F.silu, 'gelu_tanh': gelu_tanh}


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """
    Normalise over the last dimension, in float32.

    :returns: ``x``'s shape in ``dtype``; by default that of ``gain``.
    """
    wide = x.float()
    squares = (wide * wide).sum(-1, keepdim=True)
    scale = squares.mul_(1 / wide.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(gain).to(dtype or gain.dtype)


def grown(growth: Growth, places: Tensor) -> Tensor:
    """Give what queries at ``places`` int64 are multiplied by, float32; see `Growth`."""
    return (places // growth.context).float().log1p_().mul_(growth.beta).add_(1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [..., head_dim] by angles [..., head_dim / 2]; the halves are the pairs."""
    low, high = heads.float().chunk(2, -1)
    return torch.cat(((low * cos).addcmul_(high, sin, value=-1),
                      (high * cos).addcmul_(low, sin)), -1)


def top_k(logits: Tensor, count: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """
    Give the numbers of those that a router takes, and their shares, both [..., count].

    :param logits: float32 [..., experts].
    :param normalised: scale the shares to add up to 1.
    """
    shares, ids = logits.softmax(-1).topk(count)
    return ids, shares / shares.sum(-1, keepdim=True) if normalised else shares


class TorchOps:
    """The step's operations in torch."""

    name = 'torch'

    def __init__(self, on_host: bool, dtype: torch.dtype | None = None):
        """
        Take what a step works with.

        :param on_host: whether the host may read tensors, as on a CPU; in a captured step it
            can't.
        :param dtype: what products take; by default the dtype of the norm's gains before them.
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
        """Write (or add) the product of ``x`` [K], normed if there is a gain, to ``out`` [N]."""
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
            if not self._on_host or out.numel() >= SHARED_OUT:
                for each, result in zip(product, out):
                    _activate(each, weight, result, activation)
                return
        else:
            product = weight.apply(self._input(x, gain, eps))
        _activate(product, weight, out, activation)

    def select(self, logits: Tensor, into: Routed, normalised: bool) -> None:
        """Choose among experts by ``logits`` float32 [experts]; see `top_k`."""
        ids, shares = top_k(logits, into.ids.shape[0], normalised)
        into.ids.copy_(ids)
        into.weights.copy_(shares)

    def gated_experts(self, x: Tensor, stack: Stack, those: Routed, out: Tensor,
                      gain: Tensor | None, eps: float, activation: str = 'silu') -> None:
        """
        Write share * activation(gate) * up of each weight taken to a row of ``out``.

        :param stack: of weights [2 N, K] with the rows of gate and up.
        :param out: [weights, N or more].
        """
        x = self._input(x, gain, eps)
        for row, share, weight in zip(out, those.weights, self._of(stack, those)):
            gate, up = weight.halves(weight.apply(x))
            product = ACTIVATIONS[activation](gate).mul_(up).flatten()
            torch.mul(product, share, out=row[:product.shape[0]])

    def summed_experts(self, x: Tensor, stack: Stack, those: Routed, out: Tensor, *,
                       add: bool = False) -> None:
        """
        Write (or add) the sum of the products of each row of ``x`` with a weight [N, K].

        :param x: [weights, K or more].
        """
        if not add:
            out.zero_()
        for row, weight in zip(x, self._of(stack, those)):
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

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, cos: Tensor,
               sin: Tensor, layer: Attention, out: Tensor) -> None:
        """
        Attend from one token, after writing its key and value to the cache.

        :param qkv: float32 [(heads + 2 * kv_heads) * head_dim].
        :param keys: and ``values``, the layer's cache [kv_heads, max_context, head_dim].
        :param position: int64 [1], the token's place, and the number of those before it.
        :param cos: and ``sin``, float32 [max_context, head_dim / 2].
        :param out: [heads * head_dim].
        """
        if qkv.dim() > 1 and (not self._on_host or qkv.numel() >= SHARED_OUT):
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
            qk[:, :heads] *= grown(layer.growth, places).view(-1, 1, 1)
        qk = qk.to(keys.dtype)
        keys[:, place] = qk[:, heads:].transpose(0, 1)
        values[:, place] = v.to(values.dtype).transpose(0, 1)
        # Grouped: the queries of one key-value head are the rows of one product.
        queries, scale = qk[:, :heads].view(rows, kv_heads, -1, dim), layer.scale
        if start is None:
            # A captured step has one length for ever, and masks. PyTorch's fused attention would
            # leave each key-value head to one multiprocessor.
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
        """Give what chooses the next token from the step's logits."""
        return (HostSampler if self._on_host else Sampler)(vocab_size, device)

    def tune(self, transformer: Any, progress: Callable[[str], None]) -> None:
        """Choose nothing: torch has its own heuristics."""

    def _of(self, stack, those):
        """Give the weights taken; in a captured step copies of them."""
        if self._on_host:
            return (stack[number] for number in those.ids.tolist())
        return (stack.copied(number) for number in those.ids.split(1))

    def _inputs(self, x, gain, eps):
        """Do as `_input` for each row."""
        if gain is None or not self._on_host or x.numel() >= SHARED_OUT:
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
