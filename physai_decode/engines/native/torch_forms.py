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
The forms of weights where PyTorch's own operations compute: on a CPU, and without Triton.

Integers of 4 bits stay packed where PyTorch has a product with them. All other quantised weights
are unpacked once, when they are loaded, while there is room: to unpack them at each step takes
tens of times as long as the product. On a CPU dense weights get the order that is read fastest.
"""

from dataclasses import replace

from physai_decode.engines import chip
from physai_decode.engines.native import fusion
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.linear import TILE_ROWS
from physai_decode.engines.native.mlp import Mlp
from physai_decode.engines.native.torch_linear import Reordered
from physai_decode.engines.native.torch_linear import TorchInt4
from physai_decode.engines.native.weights import Layer
import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128, 256)    # of PyTorch's product
CAPABILITY = (8, 0)                 # of the CUDA devices that it runs on
PIECE = 256                         # tiles of 16 rows that are packed at a time


def has_int4(device: torch.device) -> bool:
    """Whether PyTorch has a product with 4-bit weights on a device, and a fast one."""
    if device.type == 'cpu':        # others than these go weight by weight
        return (hasattr(torch.ops.aten, '_weight_int4pack_mm_for_cpu')
                and torch.backends.cpu.get_cpu_capability().startswith('AVX'))
    return (torch.version.hip is None and hasattr(torch.ops.aten, '_weight_int4pack_mm')
            and chip.capability(device) >= CAPABILITY)


def has_reordered(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has a product with reordered weights of a format on a device."""
    supported = {torch.bfloat16: '_is_mkldnn_bf16_supported',
                 torch.float16: '_is_mkldnn_fp16_supported'}.get(dtype)
    return (supported is not None and device.type == 'cpu'
            and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, name) for name in (
                supported, '_reorder_linear_weight', '_linear_pointwise'))
            and getattr(torch.ops.mkldnn, supported)())


class TorchForms:
    """Gives one projection after the other the form that is fastest on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, room: float) -> None:
        """
        Begin with nothing unpacked.

        :param dtype: of the activations.
        :param room: bytes that may be taken beyond those of the stored weights.
        """
        self._dtype, self._device, self._room = dtype, device, room
        self._packs = dtype == torch.bfloat16 and has_int4(device)
        self._reorders = has_reordered(dtype, device)
        self._unpacked = self._left = 0     # bytes of unpacked weights: held, and without room

    def layer(self, layer: Layer) -> Layer:
        """Convert the projections of a layer to the form of the step."""
        mlp = layer.mlp
        if isinstance(mlp, Mlp):
            mlp = replace(mlp, gate_up=self(mlp.gate_up, paired=True), down=self(mlp.down))
        else:
            mlp = replace(mlp, router=self(mlp.router), gate_up=self._stack(mlp.gate_up, True),
                          down=self._stack(mlp.down))
        return replace(layer, qkv=self(layer.qkv), out=self(layer.out), mlp=mlp)

    def __call__(self, weight: Linear, paired: bool = False, tied: bool = False) -> Linear:
        """
        Convert a projection to the form of the step.

        :param paired: it is gate and up: in a quantised one 8 rows of each take turns.
        :param tied: it is an embedding too, which can't do with oneDNN's order: that is a copy.
        """
        if isinstance(weight, (Reordered, TorchInt4)):
            return weight
        size = weight.shape[0] * weight.shape[1] * self._dtype.itemsize
        if isinstance(weight, Dense):
            return self._dense(weight, self._reorders and (not tied or self._takes(size)))
        packed = _packed(weight) if self._packs and isinstance(weight, Int4) else None
        if packed is not None:
            return packed
        if not self._takes(size):
            self._left += size
            return weight
        self._unpacked += size
        return self._dense(self._plain(weight, paired), self._reorders)

    @property
    def report(self) -> str:
        """What the log should say of it; empty where all 4-bit weights stay packed."""
        said = []
        if self._unpacked:
            said.append(f'quantised weights are kept unpacked, in {self._unpacked / 1e9:.3g} GB')
        if self._left:
            said.append('quantised weights are unpacked at each step, which is tens of times '
                        f'slower: {self._left / 1e9:.3g} GB more of free memory would hold them')
        return '; other '.join(said)

    def _stack(self, stack, paired=False):
        """Convert experts; the forms of PyTorch can not be stacked."""
        if not isinstance(stack.every, Dense):
            size = stack.count * stack.shape[0] * stack.shape[1] * self._dtype.itemsize
            if not self._takes(size):
                self._left += size
                return stack
            self._unpacked += size
        return Stack.from_parts((self._dense(self._plain(stack[number], paired), False)
                                 for number in range(stack.count)), stack.count, stack.taken)

    def _plain(self, weight, paired):
        """Unpack a projection, where it is quantised."""
        if isinstance(weight, Dense):
            return weight
        dense, bias = fusion.dense_weight(weight, self._dtype), weight.bias
        if paired:
            dense, bias = _apart(dense), None if bias is None else _apart(bias)
        return Dense(dense, bias)

    def _takes(self, size):
        """Take memory, where there is as much."""
        fits = size <= self._room
        if fits:
            self._room -= size
        return fits

    def _dense(self, weight, reorders):
        if reorders:
            return Reordered(
                torch.ops.mkldnn._reorder_linear_weight(weight.weight), weight.bias)
        # By columns the product of float32 with a vector takes half the time where rows are many.
        rows, columns = weight.shape
        if self._device.type == 'cpu' and self._dtype == torch.float32 and rows >= columns:
            return replace(weight, weight=weight.weight.t().contiguous().t())
        return weight


def _packed(weight: Int4) -> TorchInt4 | None:
    """Repack a projection for PyTorch's product; None where it does not take its shape."""
    (rows, columns), size = weight.shape, weight.group_size
    on_host = weight.packed.device.type == 'cpu'
    inner = next((tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0), None)
    if size not in GROUP_SIZES or columns % size or rows % TILE_ROWS or not (on_host or inner):
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


def _apart(rows: Tensor) -> Tensor:
    """Put the rows of gate before those of up."""
    return rows.unflatten(0, (-1, 2, TILE_ROWS // 2)).transpose(0, 1).flatten(0, 2)
