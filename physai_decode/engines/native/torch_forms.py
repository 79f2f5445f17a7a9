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
The layouts of weights for PyTorch's own kernels: on a CPU, and without Triton.

4-bit integers stay packed if PyTorch has a kernel for them. Other quantised weights are
dequantised once, when they are loaded, as far as memory allows: dequantising them at each step
takes tens of times as long as the product. On a CPU, dense weights get the memory layout that is
read fastest.
"""

from dataclasses import replace

from physai_decode.engines import chip
from physai_decode.engines.native import fusion
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.linear import Stored
from physai_decode.engines.native.linear import TILE_ROWS
from physai_decode.engines.native.mlp import Mlp
from physai_decode.engines.native.torch_linear import Reordered
from physai_decode.engines.native.torch_linear import TorchInt4
from physai_decode.engines.native.weights import Layer
import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128, 256)    # of PyTorch's int4 kernel
CAPABILITY = (8, 0)                 # least compute capability that it runs on
PIECE = 256                         # tiles of 16 rows that are repacked at once


def has_int4(device: torch.device) -> bool:
    """Whether PyTorch has a fast kernel for 4-bit weights on a device."""
    if device.type == 'cpu':        # without AVX, the kernel is a scalar loop
        return (hasattr(torch.ops.aten, '_weight_int4pack_mm_for_cpu')
                and torch.backends.cpu.get_cpu_capability().startswith('AVX'))
    return (torch.version.hip is None and hasattr(torch.ops.aten, '_weight_int4pack_mm')
            and chip.capability(device) >= CAPABILITY)


def has_reordered(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has a kernel for reordered weights of a dtype on a device."""
    supported = {torch.bfloat16: '_is_mkldnn_bf16_supported',
                 torch.float16: '_is_mkldnn_fp16_supported'}.get(dtype)
    return (supported is not None and device.type == 'cpu'
            and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, name) for name in (
                supported, '_reorder_linear_weight', '_linear_pointwise'))
            and getattr(torch.ops.mkldnn, supported)())


class TorchForms:
    """Converts projections to the layout that is fastest on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, budget: float) -> None:
        """
        Choose the layouts.

        :param dtype: of the activations.
        :param budget: bytes that dequantised weights may use.
        """
        self._dtype, self._device, self._budget = dtype, device, budget
        self._packs = dtype == torch.bfloat16 and has_int4(device)
        self._reorders = has_reordered(dtype, device)
        self._unpacked = self._left = 0     # bytes dequantised at load, and at each step

    def layer(self, layer: Layer) -> Layer:
        """Convert the projections of a layer."""
        mlp = layer.mlp
        if isinstance(mlp, Mlp):
            mlp = replace(mlp, gate_up=self(mlp.gate_up, paired=True), down=self(mlp.down))
        else:
            mlp = replace(mlp, router=self(mlp.router), gate_up=self._stack(mlp.gate_up, True),
                          down=self._stack(mlp.down))
        return replace(layer, qkv=self(layer.qkv), out=self(layer.out), mlp=mlp)

    def __call__(self, weight: Linear, paired: bool = False, tied: bool = False) -> Linear:
        """
        Convert a projection.

        :param paired: whether it is gate and up, which are interleaved if quantised.
        :param tied: whether it is the embedding too, which can't use oneDNN's layout: reordered
            weights are a copy.
        """
        if isinstance(weight, (Reordered, TorchInt4)):
            return weight
        size = weight.shape[0] * weight.shape[1] * self._dtype.itemsize
        if isinstance(weight, Dense):
            return self._dense(weight, self._reorders and (not tied or self._reserve(size)))
        packed = _packed(weight) if self._packs and isinstance(weight, Int4) else None
        if packed is not None:
            return packed
        if not self._reserve(size):
            self._left += size
            return weight
        self._unpacked += size
        return self._dense(self._plain(weight, paired), self._reorders)

    @property
    def report(self) -> str:
        """The log message; empty if no weights are dequantised."""
        parts = []
        if self._unpacked:
            parts.append(f'quantised weights are kept unpacked, in {self._unpacked / 1e9:.3g} GB')
        if self._left:
            parts.append('quantised weights are unpacked at each step, which is tens of times '
                        f'slower: {self._left / 1e9:.3g} GB more of free memory would hold them')
        return '; other '.join(parts)

    def _stack(self, stack: Stack, paired: bool = False) -> Stack:
        """Dequantise experts; PyTorch's layouts can't be stacked."""
        if not isinstance(stack.stacked, Dense):
            size = stack.count * stack.shape[0] * stack.shape[1] * self._dtype.itemsize
            if not self._reserve(size):
                self._left += size
                return stack
            self._unpacked += size
        return Stack.from_parts((self._ordered(self._plain(stack[number], paired))
                                 for number in range(stack.count)), stack.count, stack.top_k)

    def _plain(self, weight: Stored, paired: bool) -> Dense:
        """Dequantise a projection."""
        if isinstance(weight, Dense):
            return weight
        dense, bias = fusion.dense_weight(weight, self._dtype), weight.bias
        if paired:
            dense, bias = _deinterleaved(dense), None if bias is None else _deinterleaved(bias)
        return Dense(dense, bias)

    def _reserve(self, size: int) -> bool:
        """Take ``size`` bytes from the budget; returns whether they fit."""
        fits = size <= self._budget
        if fits:
            self._budget -= size
        return fits

    def _dense(self, weight: Dense, reorders: bool) -> Dense | Reordered:
        if reorders:
            return Reordered(
                torch.ops.mkldnn._reorder_linear_weight(weight.weight), weight.bias)
        return self._ordered(weight)

    def _ordered(self, weight: Dense) -> Dense:
        # With many rows, a float32 matrix-vector product takes half the time if the weights are
        # column-major.
        rows, columns = weight.shape
        if self._device.type == 'cpu' and self._dtype == torch.float32 and rows >= columns:
            return replace(weight, weight=weight.weight.t().contiguous().t())
        return replace(weight, weight=weight.weight.contiguous())


def _packed(weight: Int4) -> TorchInt4 | None:
    """Repack a projection for PyTorch's int4 kernel; None if it does not support the shape."""
    (rows, columns), size = weight.shape, weight.group_size
    on_host = weight.packed.device.type == 'cpu'
    inner = next((tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0), None)
    if (weight.table or size not in GROUP_SIZES or columns % size or rows % TILE_ROWS
            or not (on_host or inner)):
        return None

    def by_group(values: Tensor) -> Tensor:
        """Return [tiles, blocks, 16, 4] as [groups, N]."""
        return values.transpose(1, 2).flatten(2).flatten(0, 1)[:, :columns // size].t().float()

    scales = by_group(weight.scales)
    zeros = torch.zeros_like(scales) if weight.zeros is None else \
        (8 - by_group(weight.zeros)) * scales
    numbers = replace(weight, scales=torch.ones_like(weight.scales), zeros=None)
    packed = []
    for first in range(0, weight.packed.shape[0], PIECE):
        nibbles = numbers.dequantise(slice(first, first + PIECE), torch.int32) + 8
        if on_host:
            packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1))
        else:
            pairs = (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).to(torch.uint8)
            packed.append(torch.ops.aten._convert_weight_to_int4pack(pairs, inner))
    return TorchInt4(torch.cat(packed), torch.stack((scales, zeros), 2).to(torch.bfloat16),
                     weight.order, weight.bias, columns, size)


def _deinterleaved(rows: Tensor) -> Tensor:
    """Move the rows of gate before the rows of up."""
    return rows.unflatten(0, (-1, 2, TILE_ROWS // 2)).transpose(0, 1).flatten(0, 2)
