"""
The two forms in which the engine keeps a projection: dense, and 4-bit integers in groups.

Both have out_features rows and in_features columns, whatever they were fused from. ``apply`` is
the large matrix product of the prefill and, on one row, the reference of the decode kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
import torch.nn.functional as F

DEQUANTISE_BYTES = 128 * 2**20   # dense weights that a prefill unpacks at a time


@dataclass(frozen=True)
class Dense:
    """``weight`` [N, K] and ``bias`` [N] or None, in the engine's dtype."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return tuple(self.weight.shape)

    @property
    def read_bytes(self) -> int:
        """Bytes that one product with a vector reads."""
        return _bytes(self.weight, self.bias)

    def apply(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., K] by the transposed weight; gives [..., N]."""
        if x.dim() > 1:
            return F.linear(x, self.weight, self.bias)
        # What F.linear makes of a vector is half as fast on a CPU.
        if self.bias is None:
            return torch.mv(self.weight, x)
        return torch.addmv(self.bias, self.weight, x)


@dataclass(frozen=True)
class Int4:
    """
    GPTQ weights, repacked for the matrix units, a row from left to right.

    The columns are in the order of their groups (``order`` gives each one's place in the input)
    and padded to whole blocks of four groups. In a block, nibble j of word i belongs to column
    ``j * group_size + i``: one load of a group's words serves four groups, and all of one nibble's
    columns share a scale.

    ``packed`` int16 [N, blocks * group_size]; ``scales`` float16 [N, 4 * blocks]; ``zeros``
    float16 [N, 4 * blocks], or None where all are 8; ``order`` int32 [K] or None; ``bias`` [N] or
    None.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    in_features: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape[0], self.in_features

    @property
    def read_bytes(self) -> int:
        """Bytes that one product with a vector reads."""
        return _bytes(self.packed, self.scales, self.zeros, self.order, self.bias)

    def dequantise(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Unpack some rows; gives [rows, K] with the columns in the order of their groups."""
        packed = self.packed[rows]
        count = packed.shape[0]
        shifts = torch.arange(0, 16, 4, device=packed.device, dtype=torch.int16)
        blocks = packed.view(count, -1, 1, self.group_size)
        nibbles = (blocks >> shifts.view(1, 1, 4, 1)) & 0xF
        groups = nibbles.reshape(count, -1, self.group_size).float()
        zeros = 8.0 if self.zeros is None else self.zeros[rows].float().unsqueeze(-1)
        dense = (groups - zeros) * self.scales[rows].float().unsqueeze(-1)
        return dense.view(count, -1)[:, :self.in_features].to(dtype)

    def apply(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., K] by the transposed weight, in pieces of rows; gives [..., N]."""
        if self.order is not None:
            x = x[..., self.order]
        rows_out, columns = self.shape
        piece = max(1, DEQUANTISE_BYTES // (4 * columns))
        out = x.new_empty(*x.shape[:-1], rows_out)
        for start in range(0, rows_out, piece):
            rows = slice(start, start + piece)
            bias = None if self.bias is None else self.bias[rows]
            out[..., rows] = F.linear(x, self.dequantise(rows, x.dtype), bias)
        return out


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
