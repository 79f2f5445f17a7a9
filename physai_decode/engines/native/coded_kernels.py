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
Kernels for 4-bit codes, see `Coded`: matrix-vector product and dequantisation.

As in ``scaled_kernels``, each program streams a few rows once, and loads its first tile while the
previous kernel still runs. The table has 64 bytes, so look-ups hit the L1 cache.
"""

from physai_decode.engines.compiler import gdc_launch_dependents
from physai_decode.engines.compiler import gdc_wait
from physai_decode.engines.native import kernels
from physai_decode.engines.native import scaled_kernels
from physai_decode.engines.native.linear import Coded
from physai_decode.engines.native.scaled_kernels import BLOCK
from physai_decode.engines.native.scaled_kernels import ScaledOps
import torch
from torch import Tensor
import triton
import triton.language as tl

_activated, _finish, _store = kernels._activated, kernels._finish, kernels._store
_numbers = scaled_kernels._numbers
# Convert the E2M1 codes in the low (or high) nibbles of a word's four bytes to float16 * 2^-14:
# move sign, exponent and mantissa bit to their positions there, two values at a time.
_E2M1_LOW, _E2M1_HIGH = (tl.constexpr(
    '{ .reg .b32 a, b, s, t; prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424; ' + ''.join(
        f'{shift}.b32 t, {half}, {places}; shl.b32 s, {half}, {sign}; and.b32 s, s, 0x80008000; '
        f'lop3.b32 {out}, t, 0x0E000E00, s, 0xEA; ' for half, out in (('a', '$0'), ('b', '$1')))
    + '}') for shift, places, sign in (('shl', 1, 4), ('shr', 3, 0)))


@triton.jit
def _scale(scales):
    """Convert scales to float32; int8 has the bits of an E4M3 float, uint8 a biased exponent."""
    if scales.dtype == tl.float32:
        return scales
    elif scales.dtype == tl.int8:
        return _numbers(scales, True, False) * 256.0
    else:
        return (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load_tile(codes, scales, block, K: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """
    Load a tile [ROWS, PARTS, 16] of bytes, and the scales of both halves of its blocks.

    :param codes: and ``scales``, pointers [ROWS, 1, 1] and [ROWS, 1] to the rows.
    :param block: [PARTS], indices of blocks of 32 columns.
    """
    inside = block * 32 < K
    place = codes + (block[:, None] * 16 + tl.arange(0, 16)[None, :])[None, :, :]
    if K % COLUMNS == 0:
        tile = tl.load(place, eviction_policy='evict_first')
    else:
        tile = tl.load(place, mask=inside[None, :, None], other=0, eviction_policy='evict_first')
    low = tl.load(scales + (block * 32 // GROUP)[None, :], mask=inside[None, :], other=0)
    high = low
    if GROUP % 32 != 0:
        # The second half of a block belongs to another group.
        column = block * 32 + 16
        high = tl.load(scales + (column // GROUP)[None, :], mask=(column < K)[None, :], other=0)
    return tile, low, high


@triton.jit
def _load_input(x, gain, block, half: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr):
    """Load a half of each block of ``x`` [K] times the gain, [PARTS, 16]; and the squares of x."""
    columns = block[:, None] * 32 + half * 16 + tl.arange(0, 16)[None, :]
    v = tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32)
    squares = v * v
    if NORM:
        v *= tl.load(gain + columns, mask=columns < K, other=0.0).to(tl.float32)
    return v, squares


@triton.jit
def _decode(tile, table, HIGH: tl.constexpr, E2M1: tl.constexpr):
    """Decode the low (or HIGH) nibbles of bytes to float32; of E2M1, times 2^-14."""
    if E2M1 and HIGH:
        return tl.inline_asm_elementwise(_E2M1_HIGH, '=r,=r,r', [tile], dtype=tl.float16,
                                         is_pure=True, pack=4).to(tl.float32)
    elif E2M1:
        return tl.inline_asm_elementwise(_E2M1_LOW, '=r,=r,r', [tile], dtype=tl.float16,
                                         is_pure=True, pack=4).to(tl.float32)
    else:
        codes = tile.to(tl.int32)
        return tl.load(table + (codes >> 4 if HIGH else codes & 0xF))


@triton.jit
def _products(tile, low, high, table, v, w, GROUP: tl.constexpr, E2M1: tl.constexpr):
    """Multiply a tile by the halves of its input, ``v`` and ``w``; returns [ROWS, PARTS]."""
    first = tl.sum(_decode(tile, table, False, E2M1) * v[None, :, :], 2)
    second = tl.sum(_decode(tile, table, True, E2M1) * w[None, :, :], 2)
    if GROUP % 32 == 0:
        return (first + second) * _scale(low)
    else:
        return first * _scale(low) + second * _scale(high)


@triton.jit
def _coded(x, codes, scales, factors, table, bias, gain, out, n, eps, K: tl.constexpr,
           GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
           GATED: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
           E2M1: tl.constexpr, PDL: tl.constexpr):
    """Multiply a `Coded` [n, K], if GATED [2 n, K], by ``x`` [K]; a program has ROWS rows."""
    PARTS: tl.constexpr = COLUMNS // 32
    BLOCKS: tl.constexpr = (K + 31) // 32
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.arange(0, PARTS)
    # Rows past the end are clamped to the last row, so the loop needs no row mask.
    own = tl.minimum(rows, n - 1)
    up = own
    if GATED:
        own = own // 8 * 16 + own % 8
        up = own + 8
    row = codes + own.to(tl.int64)[:, None, None] * (BLOCKS * 16)
    up_row = codes + up.to(tl.int64)[:, None, None] * (BLOCKS * 16)
    groups = scales + own[:, None] * GROUPS
    up_groups = scales + up[:, None] * GROUPS
    sums = tl.zeros((ROWS, PARTS), tl.float32)
    more = tl.zeros((ROWS, PARTS), tl.float32)
    squares = tl.zeros((PARTS, 16), tl.float32)
    tile, low, high = _load_tile(row, groups, block, K, GROUP, COLUMNS)
    up_tile, up_low, up_high = tile, low, high
    if GATED:
        up_tile, up_low, up_high = _load_tile(up_row, up_groups, block, K, GROUP, COLUMNS)
    if PDL:
        gdc_wait()
    v, square = _load_input(x, gain, block, 0, K, NORM)
    w, squared = _load_input(x, gain, block, 1, K, NORM)
    squares += square + squared
    sums += _products(tile, low, high, table, v, w, GROUP, E2M1)
    if GATED:
        more += _products(up_tile, up_low, up_high, table, v, w, GROUP, E2M1)
    for first in tl.range(PARTS, BLOCKS, PARTS, num_stages=1):
        tile, low, high = _load_tile(row, groups, first + block, K, GROUP, COLUMNS)
        v, square = _load_input(x, gain, first + block, 0, K, NORM)
        w, squared = _load_input(x, gain, first + block, 1, K, NORM)
        squares += square + squared
        sums += _products(tile, low, high, table, v, w, GROUP, E2M1)
        if GATED:
            up_tile, up_low, up_high = _load_tile(
                up_row, up_groups, first + block, K, GROUP, COLUMNS)
            more += _products(up_tile, up_low, up_high, table, v, w, GROUP, E2M1)
    if PDL:
        gdc_launch_dependents()
    total = tl.sum(tl.sum(squares, 1), 0)
    factor: tl.constexpr = 16384.0 if E2M1 else 1.0
    result = tl.sum(sums, 1) * (tl.load(factors + own) * factor)
    result = _finish(result, total, own, 2 * n if GATED else n, K, eps, bias, NORM, BIAS)
    if GATED:
        other = tl.sum(more, 1) * (tl.load(factors + up) * factor)
        result = _activated(result, GELU)
        result *= _finish(other, total, up, 2 * n, K, eps, bias, NORM, BIAS)
    _store(out, rows, n, result, ADD)


@triton.jit
def _widen(codes, scales, factors, table, out, first, K: tl.constexpr, GROUP: tl.constexpr,
           BLOCK: tl.constexpr):
    """Dequantise BLOCK columns of a row of a `Coded` to ``out`` [rows, K]; row 0 is ``first``."""
    row = (first + tl.program_id(0)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    place = columns // 32 * 16 + columns % 16
    packed = tl.load(codes + row * ((K + 31) // 32 * 16) + place, mask=inside, other=0)
    numbers = tl.load(table + (packed.to(tl.int32) >> (columns // 16 % 2 * 4) & 0xF))
    group = row * ((K + GROUP - 1) // GROUP) + columns // GROUP
    scale = _scale(tl.load(scales + group, mask=inside, other=0)) * tl.load(factors + row)
    tl.store(out + tl.program_id(0).to(tl.int64) * K + columns,
             (numbers * scale).to(out.dtype.element_ty), mask=inside)


def widen(weight: Coded, rows: slice, out: Tensor) -> None:
    """Dequantise some rows of a weight to ``out`` [rows, K]."""
    k = weight.in_features
    _widen[(rows.stop - rows.start, triton.cdiv(k, BLOCK))](
        *_pointers(weight), out, rows.start, K=k, GROUP=weight.group_size, BLOCK=BLOCK,
        num_warps=4)


class CodedOps(ScaledOps):
    """The step's operations as kernels, for weights of all layouts."""

    def _product(self, x, weight, out, gain, eps, add, gated, gelu=False, routed=None):
        if not isinstance(weight, Coded):
            super()._product(x, weight, out, gain, eps, add, gated, gelu, routed)
            return
        shape, layout = self._layout(weight, gain, gated)
        self._current.discard(out.data_ptr())
        n, bias = out.shape[0], weight.bias
        _coded[(triton.cdiv(n, layout.rows),)](
            x, *_pointers(weight), x if bias is None else bias, x if gain is None else gain, out,
            n, eps, K=shape.k, GROUP=weight.group_size, ROWS=layout.rows, COLUMNS=layout.columns,
            NORM=gain is not None, GATED=gated, GELU=gelu, ADD=add, BIAS=bias is not None,
            E2M1=weight.is_e2m1 and self._device.type == 'cuda', PDL=self._pdl,
            **self._launch(layout.warps))


def _pointers(weight: Coded) -> tuple[Tensor, ...]:
    scales = weight.scales
    return (weight.codes, scales.view(torch.int8) if scales.dtype == torch.float8_e4m3fn else
            scales, weight.factors, weight.table)
