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
from physai_decode.engines.native.fp4_kernels import Fp4Ops
from physai_decode.engines.native.linear import Coded
from physai_decode.engines.native.scaled_kernels import BLOCK
from torch import Tensor
import triton
import triton.language as tl

_activated, _finish, _store = kernels._activated, kernels._finish, kernels._store


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
def _products(tile, low, high, table, v, w, GROUP: tl.constexpr):
    """Multiply a tile by the halves of its input, ``v`` and ``w``; returns [ROWS, PARTS]."""
    codes = tile.to(tl.int32)
    first = tl.sum(tl.load(table + (codes & 0xF)) * v[None, :, :], 2)
    second = tl.sum(tl.load(table + (codes >> 4)) * w[None, :, :], 2)
    if GROUP % 32 == 0:
        return (first + second) * low
    else:
        return first * low + second * high


@triton.jit
def _coded(x, codes, scales, table, bias, gain, out, n, eps, K: tl.constexpr,
           GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
           GATED: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
           PDL: tl.constexpr):
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
    sums += _products(tile, low, high, table, v, w, GROUP)
    if GATED:
        more += _products(up_tile, up_low, up_high, table, v, w, GROUP)
    for first in tl.range(PARTS, BLOCKS, PARTS, num_stages=1):
        tile, low, high = _load_tile(row, groups, first + block, K, GROUP, COLUMNS)
        v, square = _load_input(x, gain, first + block, 0, K, NORM)
        w, squared = _load_input(x, gain, first + block, 1, K, NORM)
        squares += square + squared
        sums += _products(tile, low, high, table, v, w, GROUP)
        if GATED:
            up_tile, up_low, up_high = _load_tile(
                up_row, up_groups, first + block, K, GROUP, COLUMNS)
            more += _products(up_tile, up_low, up_high, table, v, w, GROUP)
    if PDL:
        gdc_launch_dependents()
    total = tl.sum(tl.sum(squares, 1), 0)
    result = _finish(tl.sum(sums, 1), total, own, 2 * n if GATED else n, K, eps, bias, NORM, BIAS)
    if GATED:
        result = _activated(result, GELU)
        result *= _finish(tl.sum(more, 1), total, up, 2 * n, K, eps, bias, NORM, BIAS)
    _store(out, rows, n, result, ADD)


@triton.jit
def _widen(codes, scales, table, out, first, K: tl.constexpr, GROUP: tl.constexpr,
           BLOCK: tl.constexpr):
    """Dequantise BLOCK columns of a row of a `Coded` to ``out`` [rows, K]; row 0 is ``first``."""
    row = (first + tl.program_id(0)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    place = columns // 32 * 16 + columns % 16
    packed = tl.load(codes + row * ((K + 31) // 32 * 16) + place, mask=inside, other=0)
    numbers = tl.load(table + (packed.to(tl.int32) >> (columns // 16 % 2 * 4) & 0xF))
    group = row * ((K + GROUP - 1) // GROUP) + columns // GROUP
    scale = tl.load(scales + group, mask=inside, other=0)
    tl.store(out + tl.program_id(0).to(tl.int64) * K + columns,
             (numbers * scale).to(out.dtype.element_ty), mask=inside)


def widen(weight: Coded, rows: slice, out: Tensor) -> None:
    """Dequantise some rows of a weight to ``out`` [rows, K]."""
    k = weight.in_features
    _widen[(rows.stop - rows.start, triton.cdiv(k, BLOCK))](
        weight.codes, weight.scales, weight.table, out, rows.start, K=k, GROUP=weight.group_size,
        BLOCK=BLOCK, num_warps=4)


class CodedOps(Fp4Ops):
    """The step's operations as kernels, for weights of all layouts."""

    def _product(self, x, weight, out, gain, eps, add, gated, gelu=False, routed=None):
        if not isinstance(weight, Coded):
            super()._product(x, weight, out, gain, eps, add, gated, gelu, routed)
            return
        shape, layout = self._layout(weight, gain, gated)
        self._current.discard(out.data_ptr())
        n, bias = out.shape[0], weight.bias
        _coded[(triton.cdiv(n, layout.rows),)](
            x, weight.codes, weight.scales, weight.table, x if bias is None else bias,
            x if gain is None else gain, out, n, eps, K=shape.k, GROUP=weight.group_size,
            ROWS=layout.rows, COLUMNS=layout.columns, NORM=gain is not None, GATED=gated,
            GELU=gelu, ADD=add, BIAS=bias is not None, PDL=self._pdl,
            **self._launch(layout.warps))
