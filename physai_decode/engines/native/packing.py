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
Repacks 4-bit and 8-bit weights into the layouts that the kernels read.

The input is independent of the checkpoint's format: one weight per element.
"""

import math

from physai_decode.engine import EngineError
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import FP4_BITS
from physai_decode.engines.native.linear import FP4_COLUMNS
from physai_decode.engines.native.linear import FP4_GROUP
from physai_decode.engines.native.linear import FP4_SIGNS
from physai_decode.engines.native.linear import fragments
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import scale_fragments
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.linear import TILE_ROWS
import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)     # of the kernels; other multiples of 32 are split into these
TABLE_GROUP = 64                # with a table, more need too many registers and shared memory
ROUNDING = 1e-3                 # relative error allowed for scales in float16, about 2^-10


def pack(nibbles: Tensor, scales: Tensor, zeros: Tensor | None, size: int,
         g_idx: Tensor | None = None, table: tuple[float, ...] | None = None) -> Int4:
    """
    Repack a 4-bit projection of N rows and K columns; a weight is scale * (nibble - zero).

    :param nibbles: uint8 [K, N], from 0 to 15.
    :param scales: float [groups, N].
    :param zeros: zero points, integers [groups, N]; None: all are 8.
    :param size: columns per group.
    :param g_idx: group of each column, int [K]; None: groups are contiguous.
    :param table: 16 numbers; a weight is then scale * table[nibble].
    :raises EngineError: the groups do not match the shapes, or the scales are not floats or do
        not fit float16.
    """
    columns, rows = nibbles.shape
    _check_floats(scales)
    order = group_order(g_idx, size, columns)
    if order is not None:
        nibbles = nibbles[order.long()]
    kernel_group = _kernel_group(math.gcd(size, TABLE_GROUP) if table else size)
    half, exact = scales.half(), scales.double()        # float32 has no room for all squares
    if not (half.double() - exact).norm() <= ROUNDING * exact.norm():
        raise EngineError(f'its scales, {scales.abs().min():g} to {scales.abs().max():g}, are not '
                          'in the range of float16; set engine.name to transformers')
    blocks, tiles = -(-columns // (4 * kernel_group)), -(-rows // TILE_ROWS)

    def tiled(values: Tensor, length: int) -> Tensor:
        """Pad [columns, rows] and reshape it to [tiles, 16, blocks, 4, length]."""
        full = values.new_zeros(4 * length * blocks, TILE_ROWS * tiles)
        full[:values.shape[0], :rows] = values[:full.shape[0]]  # the last group may be short
        return full.t().view(tiles, TILE_ROWS, blocks, 4, length)

    def by_group(values: Tensor) -> Tensor:
        wide = values.repeat_interleave(size // kernel_group, 0).to(torch.float16)
        return tiled(wide, 1).squeeze(4).transpose(1, 2).contiguous()

    planes = tiled(nibbles.to(torch.int16), kernel_group).unbind(3)
    packed = planes[0] | planes[1] << 4 | planes[2] << 8 | planes[3] << 12
    return Int4(
        packed=fragments(packed.transpose(1, 2)), scales=by_group(half),
        zeros=None if zeros is None or bool((zeros == 8).all()) else by_group(zeros),
        order=order, bias=None, out_features=rows, in_features=columns, table=table)


def scale(values: Tensor, scales: Tensor, zeros: Tensor | None, size: int,
          g_idx: Tensor | None = None) -> Scaled:
    """
    Repack an 8-bit projection; a weight is scale * (value - zero).

    :param values: int8 or float8_e4m3fn [N, K].
    :param scales: float [N, groups].
    :param zeros: zero points, integers [N, groups]; None: all are 0.
    :param size: columns per group.
    :param g_idx: group of each column, int [K]; None: groups are contiguous.
    :raises EngineError: the groups do not match the shapes, the scales are not floats, or a value
        is NaN.
    """
    columns = values.shape[1]
    _check_floats(scales)
    if values.is_floating_point() and bool((values.view(torch.int8) & 0x7F == 0x7F).any()):
        raise EngineError('it has weights that are NaN: download the model again')
    order = group_order(g_idx, size, columns)
    if order is not None:
        values = values.view(torch.int8)[:, order.long()].view(values.dtype)
    if zeros is not None and not bool(zeros.any()):
        zeros = None
    if scales.shape[1] == 1 and zeros is None:
        kernel_group = columns
    else:
        kernel_group = _kernel_group(size)
        times = -(-columns // kernel_group) if scales.shape[1] == 1 else size // kernel_group
        scales = scales.repeat_interleave(times, 1)
        zeros = None if zeros is None else zeros.repeat_interleave(times, 1).float().contiguous()
    groups = -(-columns // kernel_group)        # the last of the checkpoint's may be short
    return Scaled(
        values.contiguous(), scales[:, :groups].float().contiguous(),
        None if zeros is None else zeros[:, :groups].contiguous(), order, None, kernel_group)


def fp4(codes: Tensor, scales: Tensor, factors: Tensor) -> Fp4:
    """
    Repack a projection of 4-bit floats; a weight is code * scale * factor.

    :param codes: uint8 [N, K], the bits of E2M1.
    :param scales: float8_e4m3fn [N, K / 16, rounded up].
    :param factors: float32, a scalar or [N].
    :raises EngineError: a scale is NaN or infinite.
    """
    rows, columns = codes.shape
    _check_scales(scales, factors)
    bits = scales.view(torch.uint8)
    # A scale has no sign in the kernels: the codes take it.
    codes = codes ^ (bits >> 7 << 3).repeat_interleave(FP4_COLUMNS, 1)[:, :columns]
    blocks, tiles = -(-columns // (4 * FP4_GROUP)), -(-rows // TILE_ROWS)

    def tiled(values: Tensor, length: int) -> Tensor:
        """Pad [rows, columns] and reshape it to [tiles, 16, blocks, 4, length]."""
        full = values.new_zeros(TILE_ROWS * tiles, 4 * length * blocks)
        full[:rows, :values.shape[1]] = values
        return full.view(tiles, TILE_ROWS, blocks, 4, length)

    packed = torch.zeros((), dtype=torch.int16, device=codes.device)
    planes = tiled(codes, FP4_GROUP).unbind(3)
    for plane, sign, low in zip(planes, FP4_SIGNS, FP4_BITS, strict=True):
        wide = plane.to(torch.int16)
        packed = packed | (wide & 7) << low | (wide >> 3) << sign
    return Fp4(
        fragments(packed.transpose(1, 2)),
        scale_fragments(tiled(bits & 0x7F, FP4_GROUP // FP4_COLUMNS).transpose(1, 2)),
        factors.expand(rows).contiguous(), None, rows, columns)


def _check_floats(scales: Tensor) -> None:
    """Refuse integers, which may be exponents: bytes of the type E8M0."""
    if not scales.is_floating_point():
        raise EngineError(f'its scales are stored as {scales.dtype}, not as floats: download the '
                          'model again, or set engine.name to transformers')


def _check_scales(*scales: Tensor) -> None:
    if not all(bool(each.float().isfinite().all()) for each in scales):
        raise EngineError('it has scales that are NaN or infinite: download the model again')


def halves(packed: Tensor) -> Tensor:
    """Split bytes [N, M] into nibbles, low ones first; returns uint8 [N, 2 * M]."""
    return torch.stack((packed & 0xF, packed >> 4), 2).flatten(1)


def _kernel_group(size: int) -> int:
    """Return the largest group size of the kernels that divides the checkpoint's."""
    for group in reversed(GROUP_SIZES):
        if size % group == 0:
            return group
    raise EngineError(f'its groups of {size} columns are not a multiple of 32; '
                      'set engine.name to transformers')


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """
    Unpack int32 ``words`` of two dimensions, lowest bits first; returns uint8.

    :param bits: bits per value, 4 or 8.
    :param dim: dimension along which the values of a word lie.
    """
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    last = words.unsqueeze(2) if dim == 1 else words.t().unsqueeze(2)
    numbers = (last >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(1)
    return numbers if dim == 1 else numbers.t()


def signed(values: Tensor) -> Tensor:
    """Subtract 128 from uint8; returns int8."""
    return (values ^ 0x80).view(torch.int8)


def group_order(g_idx: Tensor | None, size: int, columns: int) -> Tensor | None:
    """
    Return the columns sorted by group, int32 [K], or None if they are sorted already.

    :param g_idx: group of each column, int [K].
    :param size: columns per group.
    :raises EngineError: the groups are of other sizes.
    """
    if g_idx is None:
        return None
    contiguous = torch.arange(columns, device=g_idx.device) // size
    if torch.equal(g_idx.long(), contiguous):
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], contiguous):
        raise EngineError(f'g_idx does not have groups of {size} columns: '
                          'the checkpoint is inconsistent')
    return order.to(torch.int32)
