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
The layouts of a projection's weights: dense, or quantised in one of three ways.

The engine's own kernels read these; `torch_linear` has two more, for PyTorch's kernels. A fused
projection has the rows of all its parts. ``apply`` is the matrix product of the prefill and, for
one row, the reference of the decode kernels.
"""

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
import platform
from typing import Any
from typing import ClassVar
from typing import TYPE_CHECKING
from typing import Union

import torch
from torch import Tensor
import torch.nn.functional as F

if TYPE_CHECKING:
    from physai_decode.engines.native.torch_linear import Reordered
    from physai_decode.engines.native.torch_linear import TorchInt4

DEQUANTISE_BYTES = 128 * 2**20   # limit of the weights that a prefill dequantises at once
TILE_ROWS = 16                   # rows of a tensor core's tile
FP4_GROUP = 64                   # columns of each of a word's four weights, see `Fp4`
FP4_SIGNS = 15, 12, 14, 13       # the sign bit of each weight in a word
FP4_BITS = 6, 3, 0, 9            # the lowest of its other three bits
FP4_COLUMNS = 16                 # that share a scale
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_POSITIVE, *(-number for number in _POSITIVE))     # 4-bit floats, indexed by their bits
LOADED_COLUMNS = 16              # of a `Scaled`, that a thread loads at once
# On x86, oneDNN multiplies float32 matrices of at least ONEDNN_ELEMENTS faster than F.linear. For
# smaller ones, it loses more time at each new number of rows than it saves.
ONEDNN_ELEMENTS = 2**19
HAS_ONEDNN = (platform.machine() in ('x86_64', 'AMD64') and torch.backends.mkldnn.is_available()
              and hasattr(torch.ops.mkldnn, '_linear_pointwise'))


class Weight:
    """A projection; of a fused gate and up, all rows of the gate come first."""

    @property
    def read_bytes(self) -> int:
        """Bytes that one matrix-vector product reads."""
        return sum(each.numel() * each.element_size() for each in _tensors(self).values())

    def halves(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """Split a product [..., N] of a fused gate and up; returns [..., N / 2] each."""
        gate, up = product.chunk(2, -1)
        return gate, up


class Interleaved(Weight):
    """A projection; gate and up, if fused, alternate every 8 rows."""

    def halves(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """Split a product [..., N] of a fused gate and up; returns [..., N / 16, 8] each."""
        gate, up = product.unflatten(-1, (-1, 2, TILE_ROWS // 2)).unbind(-2)
        return gate, up


@dataclass(frozen=True)
class Dense(Weight):
    """``weight`` [N, K] and ``bias`` [N] or None, in the engine's dtype."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def kind(self) -> str:
        """The properties of the layout that a kernel's speed depends on."""
        return str(self.weight.dtype).removeprefix('torch.')

    def rows(self, index: Tensor) -> 'Dense':
        """Return the weight with its rows permuted by ``index`` int64 [N]."""
        return Dense(self.weight[index], None if self.bias is None else self.bias[index])

    def apply(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., K] by the transposed weight; returns [..., N]."""
        if x.dim() > 1:
            return _product(x, self.weight, self.bias)
        if x.dtype != torch.float32:        # on a CPU, torch.mv is up to three times slower
            return F.linear(x.unsqueeze(0), self.weight, self.bias)[0]
        # On a CPU, F.linear of a vector is half as fast.
        if self.bias is None:
            return torch.mv(self.weight, x)
        return torch.addmv(self.bias, self.weight, x)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply ``x`` [..., K] by the transposed ``weight`` [N, K], of the same dtype."""
    if (HAS_ONEDNN and x.dtype == torch.float32 and x.device.type == 'cpu'
            and x.numel() > x.shape[-1] and weight.numel() >= ONEDNN_ELEMENTS
            # It takes hundreds of times as long for rows with gaps between them.
            and x.is_contiguous() and (weight.is_contiguous() or weight.t().is_contiguous())):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
        return product
    return F.linear(x, weight, bias)


@dataclass(frozen=True)
class Int4(Interleaved):
    """
    4-bit integers in groups, repacked for the tensor cores in tiles of 16 rows.

    A weight is scale * (nibble - zero) or, with a table, scale * table[nibble].

    Columns are sorted by group (``order`` has each one's place in the input) and padded to whole
    blocks of four groups; rows are padded to whole tiles. In a block, nibble j of word i belongs
    to column ``j * group_size + i``: one load serves four groups, and the columns of one nibble
    share a scale. The words of a tile's block are in the order of a warp's fragments, see
    `fragments`. A fused gate and up interleave 8 rows of each in a tile, so that one program has
    both; bias and product have the same order.

    ``packed`` int16 [tiles, blocks, 16 * group_size]; ``scales`` float16 [tiles, blocks, 16, 4];
    ``zeros`` likewise, or None where all are 8; ``order`` int32 [K] or None; ``bias`` [N] or None.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    out_features: int
    in_features: int
    table: tuple[float, ...] | None = None      # of 16 numbers; then there are no zeros
    part_rows: ClassVar[int] = TILE_ROWS        # that `dequantise` counts as one

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.out_features, self.in_features

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.packed.shape[2] // TILE_ROWS

    @property
    def padded_features(self) -> int:
        """Columns of all blocks."""
        return self.packed.shape[1] * 4 * self.group_size

    @property
    def kind(self) -> str:
        """The properties of the layout that a kernel's speed depends on."""
        return f'{"table" if self.table else "int"}4-g{self.group_size}'

    def rows(self, index: Tensor) -> 'Int4':
        """Return the weight, of whole tiles, with its rows permuted by ``index`` int64 [N]."""
        def by_row(values: Tensor) -> Tensor:
            return _permuted(values.transpose(1, 2), index).contiguous()

        return replace(
            self, packed=fragments(_permuted(_rows(self.packed), index)),
            scales=by_row(self.scales),
            zeros=None if self.zeros is None else by_row(self.zeros),
            bias=None if self.bias is None else self.bias[index])

    def dequantise(self, tiles: slice, dtype: torch.dtype) -> Tensor:
        """Dequantise some tiles; returns [rows, K], columns sorted by group."""
        packed = _rows(self.packed[tiles]).unsqueeze(3)     # [tiles, 16, blocks, 1, group_size]
        shifts = torch.arange(0, 16, 4, device=packed.device, dtype=torch.int16)
        nibbles = (packed >> shifts.unsqueeze(1)) & 0xF

        def by_group(values: Tensor) -> Tensor:
            return values[tiles].transpose(1, 2).unsqueeze(4).float()

        if self.table:
            numbers = torch.tensor(self.table, device=packed.device)[nibbles.int()]
        else:
            numbers = nibbles.float().sub_(8.0 if self.zeros is None else by_group(self.zeros))
        dense = numbers.mul_(by_group(self.scales)).flatten(2).flatten(0, 1)
        rows = self.out_features - (tiles.start or 0) * TILE_ROWS
        return dense[:rows, :self.in_features].to(dtype)

    def apply(self, x: Tensor,
              dequantise: Callable[['Int4', slice, torch.dtype], Tensor] = dequantise) -> Tensor:
        """
        Multiply ``x`` [..., K] by the transposed weight; returns [..., N].

        :param dequantise: dequantises some tiles, as `dequantise` does.
        """
        if self.order is not None:
            x = x[..., self.order]
        return _apply(self, x, dequantise)


@dataclass(frozen=True)
class Fp4(Interleaved):
    """
    4-bit floats, E2M1, with a scale per row and `FP4_COLUMNS` columns, for the tensor cores.

    A weight is code * scale * factor. Tiles, blocks and fragments are those of an `Int4` with
    groups of `FP4_GROUP` columns. The bits of a word's four codes are placed so that the kernels
    need few instructions to move them into 16-bit floats: see `FP4_SIGNS` and `FP4_BITS`. A fused
    gate and up interleave 8 rows of each in a tile.

    ``packed`` int16 [tiles, blocks, 16 * FP4_GROUP]; ``scales`` uint8 [tiles, blocks, 4 *
    FP4_GROUP], the bits of float8_e4m3fn without sign, in the order of `scale_fragments`;
    ``factors`` float32 [N]; ``bias`` [N] or None.
    """

    packed: Tensor
    scales: Tensor
    factors: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    order: ClassVar[None] = None        # columns are in the order of the input
    kind: ClassVar[str] = 'fp4-g16'     # the properties that a kernel's speed depends on
    part_rows: ClassVar[int] = TILE_ROWS        # that `dequantise` counts as one

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.out_features, self.in_features

    @property
    def padded_features(self) -> int:
        """Columns of all blocks."""
        return self.packed.shape[1] * 4 * FP4_GROUP

    def rows(self, index: Tensor) -> 'Fp4':
        """Return the weight, of whole tiles, with its rows permuted by ``index`` int64 [N]."""
        return replace(
            self, packed=fragments(_permuted(_rows(self.packed), index)),
            scales=scale_fragments(_permuted(_scale_rows(self.scales), index)),
            factors=self.factors[index], bias=None if self.bias is None else self.bias[index])

    def dequantise(self, tiles: slice, dtype: torch.dtype) -> Tensor:
        """Dequantise some tiles; returns [rows, K]."""
        words = _rows(self.packed[tiles])                   # [tiles, 16, blocks, FP4_GROUP]
        signs, bits = (torch.tensor(each, dtype=torch.int16, device=words.device).view(4, 1)
                       for each in (FP4_SIGNS, FP4_BITS))
        words = words.unsqueeze(3)
        codes = words >> bits & 7 | (words >> signs & 1) << 3
        numbers = torch.tensor(E2M1, device=words.device)[codes.int()]
        scales = _scale_rows(self.scales[tiles]).view(torch.float8_e4m3fn).float()
        numbers.unflatten(4, (-1, FP4_COLUMNS)).mul_(scales.unsqueeze(5))
        first = (tiles.start or 0) * TILE_ROWS
        dense = numbers.flatten(2).flatten(0, 1)[:self.out_features - first, :self.in_features]
        return dense.mul_(self.factors[first:first + len(dense), None]).to(dtype)

    def apply(self, x: Tensor,
              dequantise: Callable[['Fp4', slice, torch.dtype], Tensor] = dequantise) -> Tensor:
        """See `Int4.apply`."""
        return _apply(self, x, dequantise)


@dataclass(frozen=True)
class Scaled(Interleaved):
    """
    8-bit weights with a scale per row and group of columns.

    Columns are sorted by group (``order`` has each one's place in the input). A fused gate and up
    interleave 8 rows of each, as in an `Int4`.

    ``values`` int8 or float8_e4m3fn [N, K]; ``scales`` float32 [N, groups]; ``zeros`` float32
    likewise, or None where all are 0; ``order`` int32 [K] or None; ``bias`` [N] or None.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    group_size: int         # columns that share a scale: 32, 64, 128, or all
    part_rows: ClassVar[int] = 1        # that `dequantise` counts as one

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def in_features(self) -> int:
        """K."""
        return self.values.shape[1]

    @property
    def is_float(self) -> bool:
        """Whether the values are floats."""
        return self.values.is_floating_point()

    @property
    def by_row(self) -> bool:
        """Whether each row has one scale, and no zero point."""
        return self.scales.shape[1] == 1 and self.zeros is None

    @property
    def kind(self) -> str:
        """The properties of the layout that a kernel's speed depends on."""
        return f'{"float8" if self.is_float else "int8"}-g{self.group_size}'

    def rows(self, index: Tensor) -> 'Scaled':
        """Return the weight with its rows permuted by ``index`` int64 [N]."""
        # Indexed as int8: not every operation supports float8.
        return replace(
            self, values=self.values.view(torch.int8)[index].view(self.values.dtype),
            scales=self.scales[index], zeros=None if self.zeros is None else self.zeros[index],
            bias=None if self.bias is None else self.bias[index])

    def dequantise(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Dequantise some rows; returns [rows, K], columns sorted by group."""
        def by_column(values: Tensor) -> Tensor:
            return values[rows].repeat_interleave(self.group_size, 1)[:, :self.in_features]

        dense = self.values[rows].float()
        if self.zeros is not None:
            dense.sub_(by_column(self.zeros))
        return dense.mul_(by_column(self.scales)).to(dtype)

    def apply(self, x: Tensor,
              dequantise: Callable[['Scaled', slice, torch.dtype], Tensor] = dequantise
              ) -> Tensor:
        """
        Multiply ``x`` [..., K] by the transposed weight; returns [..., N].

        :param dequantise: dequantises some rows, as `dequantise` does.
        """
        if self.order is not None:
            x = x[..., self.order]
        return _apply(self, x, dequantise, F.linear)


Stored = Dense | Int4 | Fp4 | Scaled
Linear = Union[Stored, 'Reordered', 'TorchInt4']


@dataclass(frozen=True)
class Stack:
    """
    The weights of all experts, of one layout and shape.

    ``stacked`` has the tensors of one weight, each with a leading dimension of experts.
    """

    stacked: Stored
    count: int
    top_k: int              # weights that a step reads

    @classmethod
    def from_parts(cls, parts: Iterable[Stored], count: int, top_k: int) -> 'Stack':
        """
        Stack weights one at a time, so that only one of them is in memory twice.

        :raises ValueError: their layouts differ, or each has its own order of columns.
        """
        whole: dict[str, Any] = {}      # tensors by name
        forms = set()
        for index, part in enumerate(parts):
            tensors = _tensors(part)
            forms.add((part.kind, part.shape, getattr(part, 'table', None)))
            if len(forms) > 1:
                raise ValueError('their layouts differ')
            if 'order' in tensors:
                raise ValueError('each has its own order of columns')
            for name, tensor in tensors.items():
                if name not in whole:
                    whole[name] = tensor.new_empty_strided(
                        (count, *tensor.shape), (tensor.numel(), *tensor.stride()))
                    if name in ('zeros', 'bias'):       # some weights may lack these
                        whole[name].fill_(8 if isinstance(part, Int4) and name == 'zeros' else 0)
                whole[name][index] = tensor
        return cls(replace(part, **whole), count, top_k)

    def __getitem__(self, number: int) -> Stored:
        """Return the weight of one expert, as views."""
        return self._map(lambda tensor: tensor[number])

    def copied(self, number: Tensor) -> Stored:
        """Copy the weight of expert ``number`` int64 [1], which stays on the device."""
        def select(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float8_e4m3fn:     # not every operation supports it
                return tensor.view(torch.int8).index_select(0, number)[0].view(tensor.dtype)
            return tensor.index_select(0, number)[0]

        return self._map(select)

    def _map(self, select: Callable[[Tensor], Tensor]) -> Stored:
        tensors: dict[str, Any] = {
            name: select(tensor) for name, tensor in _tensors(self.stacked).items()}
        return replace(self.stacked, **tensors)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of each."""
        return self[0].shape

    @property
    def kind(self) -> str:
        """The properties of the layout that a kernel's speed depends on."""
        return f'{self[0].kind}-{self.top_k} of {self.count}'

    @property
    def read_bytes(self) -> int:
        """Bytes that the products of a step read."""
        return self.top_k * self[0].read_bytes


def fragments(words: Tensor) -> Tensor:
    """
    Permute a tile's words [..., 16, size] into fragment order; returns [..., 16 * size].

    Two A fragments of 16 rows and 16 columns (PTX ISA, mma.m16n8k16) cover 32 columns. Each of the
    32 lanes holds 8 words of each, permuted so that its columns are adjacent in the input. So a
    lane loads 16 bytes at a time, of the words and of the input.
    """
    lead = words.shape[:-2]
    parts = words.unflatten(-1, (-1, 4, 2, 2, 2)).unflatten(-6, (2, 8))
    # half, row | pair, lane, operand, high, low -> pair, operand, row, lane, high, half, low
    order = [len(lead) + axis for axis in (2, 4, 1, 3, 5, 0, 6)]
    return parts.permute(*range(len(lead)), *order).reshape(*lead, -1)


def _rows(packed: Tensor) -> Tensor:
    """Invert `fragments`: [tiles, blocks, 16 * size] to [tiles, 16, blocks, size]."""
    parts = packed.unflatten(2, (-1, 2, 8, 4, 2, 2, 2)).permute(0, 7, 4, 1, 2, 5, 3, 6, 8)
    return parts.reshape(packed.shape[0], TILE_ROWS, packed.shape[1], -1)


def scale_fragments(scales: Tensor) -> Tensor:
    """
    Permute scales [tiles, blocks, 16, 4, FP4_GROUP / 16]; returns [tiles, blocks, 4 * FP4_GROUP].

    The last two dimensions are the weight of a word and the group of its columns. A lane reads the
    8 scales of its two rows for one group at once, row by row.
    """
    parts = scales.unflatten(4, (-1, 2)).unflatten(2, (2, 8))
    # half, row, weight, pair, group -> pair, row, group, half, weight
    return parts.permute(0, 1, 5, 3, 6, 2, 4).flatten(2)


def _scale_rows(scales: Tensor) -> Tensor:
    """Invert `scale_fragments`, to [tiles, 16, blocks, 4, FP4_GROUP / 16]."""
    parts = scales.unflatten(2, (-1, 8, 2, 2, 4)).permute(0, 5, 3, 1, 6, 2, 4)
    return parts.flatten(5).flatten(1, 2)


def _permuted(values: Tensor, index: Tensor) -> Tensor:
    """Permute the rows of [tiles, 16, blocks, ...]; returns [tiles, blocks, 16, ...]."""
    return values.flatten(0, 1)[index].unflatten(0, (-1, TILE_ROWS)).transpose(1, 2)


def _apply(weight: Any, x: Tensor, dequantise: Callable[[Any, slice, torch.dtype], Tensor],
           product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _product) -> Tensor:
    """Multiply ``x`` [..., K], in the weight's order of columns, some ``part_rows`` at a time."""
    (rows, columns), unit = weight.shape, weight.part_rows
    piece = max(1, DEQUANTISE_BYTES // (4 * unit * columns))
    out = x.new_empty(*x.shape[:-1], rows)
    for start in range(0, -(-rows // unit), piece):
        some = slice(unit * start, unit * (start + piece))
        bias = None if weight.bias is None else weight.bias[some]
        out[..., some] = product(x, dequantise(weight, slice(start, start + piece), x.dtype), bias)
    return out


def _tensors(weight: Any) -> dict[str, Any]:
    """Return a weight's tensors by field name."""
    found = {each.name: getattr(weight, each.name) for each in fields(weight)}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
