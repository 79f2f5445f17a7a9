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
A transformer, from token ids to logits: prefill for a prompt, a decode step for a token.

The step uses tensors at fixed addresses, and reads the token and its position on the device. So
the same function runs on a CPU, and on a GPU inside a captured graph. It can run several rows at
once, a token and a draft: the logits of each row are bit for bit those of a separate step.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from importlib import import_module
from typing import Any
from typing import NamedTuple

from physai_decode.engines import device as devices
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.architecture import Rotary
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.ops import Attention
from physai_decode.engines.native.ops import growth_factors
from physai_decode.engines.native.ops import rms_norm
from physai_decode.engines.native.ops import rotate
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.weights import Layer
from physai_decode.engines.native.weights import Weights
import torch
from torch import Tensor
import torch.nn.functional as F

# The start of the kernel's name for each weight format; unknown for products of PyTorch.
_KERNELS = {Dense: '_dense', Int4: '_int4', Fp4: '_fp4', Scaled: '_multiply'}


class Product(NamedTuple):
    """A matrix-vector product of a step, as far as its kernel depends on it."""

    weight: Linear | Stack
    gain: Tensor | None
    gated: bool = False


class Buffers(NamedTuple):
    """The activations of a pass: [rows, size], or [size] for a pass of one row."""

    x: Tensor                   # the residual stream
    branch: Tensor              # the output of a layer's half, normed before it is added to x
    qkv: Tensor
    attended: Tensor
    scratch: dict[type, Any]    # by the type of MLP
    logits: Tensor


class Transformer:
    """Weights, cache and the state of one conversation on one device."""

    def __init__(self, architecture: Architecture, weights: Weights, max_context: int,
                 dtype: torch.dtype, device: torch.device, ops: TorchOps, rows: int = 1):
        """
        Allocate the cache and the buffers of passes.

        :param rows: the largest number of rows of a pass; more than 1 requires that each MLP is an
            `Mlp`.
        """
        a = self.architecture = architecture
        self.weights = weights
        self.max_context = max_context
        self.ops = ops
        # The host writes these before a request; the step reads and advances them.
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)   # -1: padding
        self.token = self.tokens[:1]
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

        shape = (a.layers, a.kv_heads, max_context, a.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        tables = {rotary: _angles(rotary, max_context, a.head_dim, device)
                  for rotary in set(a.rotaries)}
        self.angles = [tables[rotary] for rotary in a.rotaries]     # of each layer
        self.attention = [
            Attention(a.heads, a.kv_heads, a.head_dim, window, a.attention_scale, a.norm_eps,
                      layer.q_norm, layer.k_norm, a.growth)
            for window, layer in zip(a.windows, weights.layers)]

        self.embedding_scale = torch.tensor(
            a.embedding_scale, dtype=dtype if a.rounded_scale else torch.float32).item()
        buffers = [torch.zeros(rows, width, dtype=kind, device=device) for width, kind in (
            (a.hidden_size, torch.float32), (a.hidden_size, torch.float32),
            (a.q_size + 2 * a.kv_size, torch.float32), (a.q_size, dtype),
            (a.vocab_size, torch.float32))]
        scratch = {type(layer.mlp): layer.mlp.scratch(dtype, device, rows)
                   for layer in weights.layers}

        def of(count: int) -> Buffers:
            x, branch, qkv, attended, logits = (
                each[0] if count == 1 else each[:count] for each in buffers)
            return Buffers(x, branch, qkv, attended,
                           {kind: each[count - 1] for kind, each in scratch.items()}, logits)

        self._buffers = [of(count) for count in range(1, rows + 1)]
        self.x, _, self.qkv, self.attended, self.scratch, self.logits = self._buffers[0]
        self.row_logits = buffers[-1].unbind()

    def step(self, rows: int = 1) -> None:
        """
        Read ``token`` at ``position``; write the logits of the next token to ``logits``.

        :param rows: number of ``tokens`` to read, at this and the following positions; the logits
            of each row go to ``row_logits``.
        """
        ops, eps, w = self.ops, self.architecture.norm_eps, self.weights
        b = self._buffers[rows - 1]
        ops.embed(w.embedding, self.tokens[:rows], b.x, self.embedding_scale)
        for index, layer in enumerate(w.layers):
            ops.linear(b.x, layer.qkv, b.qkv, gain=layer.input_norm, eps=eps)
            ops.attend(b.qkv, self.keys[index], self.values[index], self.position,
                       *self.angles[index], self.attention[index], b.attended)
            self.after_attention(layer, rows)
        ops.linear(b.x, w.head, b.logits, gain=w.norm, eps=eps)

    def after_attention(self, layer: Layer, rows: int = 1) -> None:
        """Run the rest of a layer: add the output of attention, and that of the MLP, to x."""
        ops, eps, b = self.ops, self.architecture.norm_eps, self._buffers[rows - 1]
        x = b.x
        out = x if layer.out_norm is None else b.branch
        ops.linear(b.attended, layer.out, out, add=out is x)
        if layer.out_norm is not None:
            ops.add_normed(out, layer.out_norm, eps, x)
        out = x if layer.down_norm is None else b.branch
        layer.mlp.step(ops, x, layer.mlp_norm, eps, b.scratch[type(layer.mlp)], out,
                       add=out is x)
        if layer.down_norm is not None:
            ops.add_normed(out, layer.down_norm, eps, x)

    def products(self) -> Iterator[tuple[str, Product]]:
        """Yield the name and the `Product` of each matrix-vector product of the step."""
        for layer in self.weights.layers:
            yield 'qkv', Product(layer.qkv, layer.input_norm)
            yield 'out', Product(layer.out, None)
            for name, weight, normed, gated in layer.mlp.products():
                yield name, Product(weight, layer.mlp_norm if normed else None, gated)
        yield 'head', Product(self.weights.head, self.weights.norm)

    def reads(self, context: int) -> list[tuple[str, str, int]]:
        """
        Return what one step reads, in the order of its kernels.

        :param context: tokens that the step attends to.
        :returns: (start of the kernel's name, operation, bytes) for each kernel that reads weights
            or the cache.
        """
        w = self.weights

        def product(operation, weight):
            form = type(weight.stacked if isinstance(weight, Stack) else weight)
            return _KERNELS.get(form, form.__name__), operation, weight.read_bytes

        found = []
        for layer, attention in zip(w.layers, self.attention, strict=True):
            tokens = min(context, attention.window or context)
            cache = 2 * self.architecture.kv_size * tokens * self.keys.element_size()
            found += [product('qkv', layer.qkv), ('_attend', 'attention', cache),
                      product('out', layer.out),
                      *(product(name, weight) for name, weight, *_ in layer.mlp.products())]
        return [*found, product('head', w.head)]

    def prefill(self, ids: Tensor, start: int, every: bool = False) -> Tensor:
        """
        Prefill a chunk of a prompt.

        :param ids: int64 [tokens], at positions from ``start`` on.
        :param every: return the logits of all positions, not only of the last.
        :returns: float32 [vocab], or [tokens, vocab].
        """
        a, w, ops = self.architecture, self.weights, self.ops
        stop = start + ids.shape[0]
        dtype, eps = self.keys.dtype, a.norm_eps
        x = F.embedding(ids, w.embedding).float() * self.embedding_scale
        for index, layer in enumerate(w.layers):
            qkv = ops.apply(rms_norm(x, layer.input_norm, eps, dtype), layer.qkv)
            q, k, v = qkv.view(-1, a.heads + 2 * a.kv_heads, a.head_dim).split(
                (a.heads, a.kv_heads, a.kv_heads), 1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q = rms_norm(q, layer.q_norm, eps)
                k = rms_norm(k, layer.k_norm, eps)
            keys, values = self.keys[index], self.values[index]
            cos, sin = (each[start:stop].unsqueeze(1) for each in self.angles[index])
            keys[:, start:stop] = rotate(k, cos, sin).to(keys.dtype).transpose(0, 1)
            values[:, start:stop] = v.transpose(0, 1)
            q = rotate(q, cos, sin)
            if a.growth.beta:
                positions = torch.arange(start, stop, device=x.device)
                q *= growth_factors(a.growth, positions).view(-1, 1, 1)
            q = q.to(keys.dtype).transpose(0, 1)
            attended = _attend(q, keys[:, :stop], values[:, :stop], self.attention[index])
            branch = ops.apply(attended.transpose(0, 1).reshape(-1, a.q_size), layer.out)
            x += branch if layer.out_norm is None else rms_norm(
                branch, layer.out_norm, eps, torch.float32)
            branch = layer.mlp.apply(ops, rms_norm(x, layer.mlp_norm, eps, dtype),
                                     self.scratch[type(layer.mlp)])
            x += branch if layer.down_norm is None else rms_norm(
                branch, layer.down_norm, eps, torch.float32)
        last = x if every else x[-1]
        return ops.apply(rms_norm(last, w.norm, eps, dtype), w.head).float()


class EagerPrefill:
    """Prefills with `Transformer.prefill`: on a CPU, and if `Prefill` is not supported."""

    def __init__(self, transformer: Transformer):
        """Wrap a transformer."""
        if transformer.token.device.type != 'cpu':
            import_module('torch.nn.attention.bias')    # takes seconds; `_attend` needs it later
        self._transformer = transformer
        self._logits = transformer.logits

    @property
    def details(self) -> dict[str, str]:
        """Entries for the details of the `Footprint`."""
        return {'prefill': 'torch'}

    def feed(self, ids: Sequence[int], start: int) -> None:
        """Prefill ids at positions from ``start`` on."""
        self._logits = self._transformer.prefill(
            torch.tensor(ids, device=self._transformer.token.device), start)

    def logits(self) -> Tensor:
        """Return the logits after the last token, float32 [vocab]."""
        return self._logits

    def dequantiser(self, weight: Linear) -> Callable[..., Tensor] | None:
        """See `TorchOps.dequantiser`."""
        return self._transformer.ops.dequantiser(weight)


def _angles(rotary: Rotary, places: int, dim: int,
            device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of each position, float32 [places, dim / 2] each."""
    angles = torch.outer(torch.arange(places, dtype=torch.float32),
                         torch.tensor(rotary.inverse_frequencies, dtype=torch.float32))
    still = (0, dim // 2 - angles.shape[1])     # columns to add, for pairs that are not rotated
    return (F.pad(angles.cos() * rotary.scale, still, value=1.0).to(device),
            F.pad(angles.sin() * rotary.scale, still).to(device))


def _attend(q: Tensor, keys: Tensor, values: Tensor, layer: Attention) -> Tensor:
    """Attend from the last positions, [heads, tokens, dim], to [kv_heads, stop, dim]."""
    tokens, stop = q.shape[1], keys.shape[1]
    window = layer.window
    mask: Tensor | None = None
    causal = tokens == stop and not window
    if window or (not causal and q.device.type == 'cpu'):
        # SDPA needs a mask for a window and, on a CPU, for an offset.
        places = torch.arange(stop, device=q.device)
        own = places[stop - tokens:].unsqueeze(1)
        mask = places <= own
        if window:
            mask &= places > own - window
    elif not causal:
        mask = import_module('torch.nn.attention.bias').causal_lower_right(tokens, stop)
    with devices.attention_backends(q.device):
        return F.scaled_dot_product_attention(
            q.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask,
            is_causal=causal, scale=layer.scale, enable_gqa=q.shape[0] != keys.shape[0])[0]
