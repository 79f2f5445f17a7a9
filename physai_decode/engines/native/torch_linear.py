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
The layouts of a projection's weights for PyTorch's own kernels; see `linear` for the others.

`torch_forms` converts weights to these layouts.
"""

from dataclasses import dataclass

from physai_decode.engines.native.linear import Interleaved
from physai_decode.engines.native.linear import Weight
import torch
from torch import Tensor
import torch.nn.functional as F

PIECE = 4096        # rows of a weight that are in another dtype at once


@dataclass(frozen=True)
class Reordered(Weight):
    """
    A dense projection in oneDNN's memory layout, for a CPU.

    It halves the time of a matrix-vector product: oneDNN reorders plain weights at each product.

    ``weight`` [N, K], opaque; ``bias`` [N] or None, in the engine's dtype.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def kind(self) -> str:
        """The properties of the layout that a kernel's speed depends on."""
        return f'reordered-{str(self.weight.dtype).removeprefix("torch.")}'

    def apply(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., K] by the transposed weight, in the dtype of ``x``."""
        if x.dtype == self.weight.dtype:
            product = torch.ops.mkldnn._linear_pointwise(
                x.reshape(-1, x.shape[-1]), self.weight, self.bias, 'none', [], '')
            return product.view(*x.shape[:-1], -1)
        product = torch.cat([F.linear(x, rows.to(x.dtype))
                             for rows in self.weight.to_dense().split(PIECE)], -1)
        return product if self.bias is None else product.add_(self.bias)


@dataclass(frozen=True)
class TorchInt4(Interleaved):
    """
    4-bit integers in groups, for PyTorch's kernel; rows and columns are as in an `Int4`.

    A weight is scale * (nibble - 8) + zero.

    ``packed`` in PyTorch's layout; ``scales_and_zeros`` bfloat16 [groups, N, 2]; ``order`` int32
    [K] or None; ``bias`` [N] or None.
    """

    packed: Tensor
    scales_and_zeros: Tensor
    order: Tensor | None
    bias: Tensor | None
    in_features: int
    group_size: int         # columns that share a scale: 32, 64, 128 or 256

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.scales_and_zeros.shape[1], self.in_features

    @property
    def kind(self) -> str:
        """The properties of the layout that a kernel's speed depends on."""
        return f'torch-int4-g{self.group_size}'

    def apply(self, x: Tensor) -> Tensor:
        """
        Multiply ``x`` [..., K] by the transposed weight; returns [..., N].

        A GPU computes in bfloat16, a CPU in the dtype of ``x``, which is fast in bfloat16 only.
        """
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        if x.device.type == 'cpu':
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.contiguous(), self.packed, self.group_size,
                self.scales_and_zeros.to(x.dtype))
        else:
            product = torch.ops.aten._weight_int4pack_mm(
                rows.to(torch.bfloat16).contiguous(), self.packed, self.group_size,
                self.scales_and_zeros).to(x.dtype)
        if self.bias is not None:
            product.add_(self.bias)
        return product.view(*x.shape[:-1], -1)
