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
Kernels for 8-bit weights, see `Scaled`: matrix-vector product and dequantisation.

As in ``kernels``, each program streams a few rows once, and loads its first tile while the
previous kernel still runs. An E4M3 float is converted by moving its bits to their positions in a
float16, which is the value times 2^-8. So older GPUs need no instruction for 8-bit floats.
"""

import math

from physai_decode.engines import compiler
from physai_decode.engines.compiler import gdc_launch_dependents
from physai_decode.engines.compiler import gdc_wait
from physai_decode.engines.native import kernels
from physai_decode.engines.native.int4_kernels import Int4Ops
from physai_decode.engines.native.linear import LOADED_COLUMNS
from physai_decode.engines.native.linear import Scaled
import torch
from torch import Tensor
import triton
import triton.language as tl

_activated, _finish, _store = kernels._activated, kernels._finish, kernels._store
BLOCK = 1024                # columns that a program dequantises
RUN = tl.constexpr(LOADED_COLUMNS)
# Spread a word's four bytes to the high bytes of float16s; shift all bits but the sign right by 1.
_FLOATS = tl.constexpr(
    '{ .reg .b32 a, b, s, t; prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424; '
    'and.b32 s, a, 0x80008000; shr.b32 t, a, 1; lop3.b32 $0, t, 0x3F803F80, s, 0xEA; '
    'and.b32 s, b, 0x80008000; shr.b32 t, b, 1; lop3.b32 $1, t, 0x3F803F80, s, 0xEA; }')


@triton.jit
def _numbers(values, FLOAT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Convert int8 to float32; if FLOAT, from the bits of E4M3 floats, times 2^-8."""
    if FLOAT and ASSEMBLY:
        # Two values at a time; compilers convert them one by one.
        return tl.inline_asm_elementwise(_FLOATS, '=r,=r,r', [values], dtype=tl.float16,
                                         is_pure=True, pack=4).to(tl.float32)
    elif FLOAT:
        # Shift left by 7, and clear bit 14, which is a copy of the sign.
        bits = ((values.to(tl.int16) << 7) & -16512).to(tl.int16)
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return values.to(tl.float32)


@triton.jit
def _load_tile(values, scales, zeros, part, columns, k, K: tl.constexpr, GROUP: tl.constexpr,
               COLUMNS: tl.constexpr, ZEROS: tl.constexpr, BY_ROW: tl.constexpr):
    """Load a tile [ROWS, PARTS, LENGTH] at column ``k``, and its groups' scales and zeros."""
    if K % COLUMNS == 0:
        tile = tl.load(values + k, eviction_policy='evict_first')
    else:
        tile = tl.load(values + k, mask=(k + columns < K)[None, :, :], other=0,
                       eviction_policy='evict_first')
    scale = tile
    zero = tile
    if not BY_ROW:
        inside = (k + part * GROUP < K)[None, :]
        scale = tl.load(scales + k // GROUP, mask=inside, other=0.0)
        zero = scale
        if ZEROS:
            zero = tl.load(zeros + k // GROUP, mask=inside, other=0.0)
    return tile, scale, zero


@triton.jit
def _scaled(tile, scale, zero, v, FLOAT: tl.constexpr, ZEROS: tl.constexpr, BY_ROW: tl.constexpr,
            ASSEMBLY: tl.constexpr):
    """
    Multiply a tile by ``v`` [PARTS, LENGTH]; BY_ROW, `_row_sums` applies the scales.

    :returns: [ROWS, PARTS, LENGTH / RUN], the partial sums of each thread.
    """
    ROWS: tl.constexpr = tile.shape[0]
    PARTS: tl.constexpr = tile.shape[1]
    RUNS: tl.constexpr = tile.shape[2] // RUN
    numbers = _numbers(tile, FLOAT, ASSEMBLY)
    if ZEROS:
        numbers -= zero[:, :, None]
    products = tl.reshape(numbers * v[None, :, :], (ROWS, PARTS, RUNS, RUN))
    sums = tl.sum(products, 3)
    if not BY_ROW:
        sums *= scale[:, :, None]
    return sums


@triton.jit
def _load_input(x, gain, squares, columns, k, K: tl.constexpr, COLUMNS: tl.constexpr,
                NORM: tl.constexpr):
    """Load a tile's part of ``x`` [K], times the gain, and accumulate its squares."""
    inside = k + columns < K
    v = tl.load(x + k + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares += v * v
        v *= tl.load(gain + k + columns, mask=inside, other=0.0).to(tl.float32)
    return v, squares


@triton.jit
def _row_sums(sums, scales, rows, FLOAT: tl.constexpr, BY_ROW: tl.constexpr):
    """Reduce the partial sums of each row, and apply the scales that are left."""
    result = tl.sum(tl.sum(sums, 2), 1)
    if BY_ROW:
        result *= tl.load(scales + rows)
    if FLOAT:
        result *= 256.0
    return result


@triton.jit
def _expert(ids, k, K: tl.constexpr, SIZE: tl.constexpr, STACK: tl.constexpr,
            COLUMNS: tl.constexpr):
    """Return the number of the weight in a stack that has column ``k``, and the column in it."""
    if STACK == 0:
        return 0, k
    elif K == SIZE:
        return tl.load(ids), k
    else:
        # Without this, Triton does not see the divisibility, and loads single numbers.
        return tl.load(ids + k // SIZE), k % SIZE // COLUMNS * COLUMNS


@triton.jit
def _load_tiles(values, scales, zeros, place, group, up_place, up_group, part, columns, ids,
                stored, k, K: tl.constexpr, SIZE: tl.constexpr, STACK: tl.constexpr,
                GROUP: tl.constexpr, COLUMNS: tl.constexpr, ZEROS: tl.constexpr,
                BY_ROW: tl.constexpr, GATED: tl.constexpr):
    """Load a program's tile at column ``k``, and if GATED that of up, else the same again."""
    expert, local = _expert(ids, k, K, SIZE, STACK, COLUMNS)
    values += expert * STACK
    scales += expert * stored
    zeros += expert * stored
    tile, scale, zero = _load_tile(values + place, scales + group, zeros + group, part, columns,
                                   local, SIZE, GROUP, COLUMNS, ZEROS, BY_ROW)
    up_tile, up_scale, up_zero = tile, scale, zero
    if GATED:
        up_tile, up_scale, up_zero = _load_tile(
            values + up_place, scales + up_group, zeros + up_group, part, columns, local, SIZE,
            GROUP, COLUMNS, ZEROS, BY_ROW)
    return tile, scale, zero, up_tile, up_scale, up_zero


@triton.jit
def _multiply(x, values, scales, zeros, bias, gain, ids, routing, out, n, stride, eps,
              K: tl.constexpr, SIZE: tl.constexpr, STACK: tl.constexpr, GROUP: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
              FLOAT: tl.constexpr, ZEROS: tl.constexpr, BY_ROW: tl.constexpr, NORM: tl.constexpr,
              GATED: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
              ASSEMBLY: tl.constexpr, PDL: tl.constexpr):
    """
    Multiply a `Scaled` [n, K], if GATED [2 n, K], by ``x`` [K]; a program has ROWS rows.

    For a stack of weights with STACK elements each, see `kernels._dense`.
    """
    LENGTH: tl.constexpr = COLUMNS if BY_ROW else GROUP
    GROUPS: tl.constexpr = 1 if BY_ROW else (SIZE + GROUP - 1) // GROUP
    # The scales of rows apply to their sums, but not if the columns are those of several experts.
    LATE: tl.constexpr = BY_ROW and K == SIZE
    part = tl.arange(0, COLUMNS // LENGTH)
    columns = part[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows past the end are clamped to the last row, so the loop needs no row mask.
    own = tl.minimum(rows, n - 1)
    up = own
    stored = n * GROUPS         # scales of a weight in the stack
    if GATED:
        own = own // 8 * 16 + own % 8
        up = own + 8
        stored *= 2
        if STACK:
            if PDL:
                gdc_wait()      # for the router; without gate it ran two kernels before
            ids += tl.program_id(1)
            out += tl.program_id(1) * stride
    place = own.to(tl.int64)[:, None, None] * SIZE + columns[None, :, :]
    up_place = up.to(tl.int64)[:, None, None] * SIZE + columns[None, :, :]
    group = own[:, None] * GROUPS + part[None, :]
    up_group = up[:, None] * GROUPS + part[None, :]
    sums = tl.zeros((ROWS, COLUMNS // LENGTH, LENGTH // RUN), tl.float32)
    more = tl.zeros((ROWS, COLUMNS // LENGTH, LENGTH // RUN), tl.float32)
    squares = tl.zeros((COLUMNS // LENGTH, LENGTH), tl.float32)
    tile, scale, zero, up_tile, up_scale, up_zero = _load_tiles(
        values, scales, zeros, place, group, up_place, up_group, part, columns, ids, stored, 0, K,
        SIZE, STACK, GROUP, COLUMNS, ZEROS, LATE, GATED)
    if PDL:
        gdc_wait()
    v, squares = _load_input(x, gain, squares, columns, 0, K, COLUMNS, NORM)
    sums += _scaled(tile, scale, zero, v, FLOAT, ZEROS, LATE, ASSEMBLY)
    if GATED:
        more += _scaled(up_tile, up_scale, up_zero, v, FLOAT, ZEROS, LATE, ASSEMBLY)
    for k in tl.range(COLUMNS, K, COLUMNS, num_stages=STAGES):
        tile, scale, zero, up_tile, up_scale, up_zero = _load_tiles(
            values, scales, zeros, place, group, up_place, up_group, part, columns, ids,
            stored, k, K, SIZE, STACK, GROUP, COLUMNS, ZEROS, LATE, GATED)
        v, squares = _load_input(x, gain, squares, columns, k, K, COLUMNS, NORM)
        sums += _scaled(tile, scale, zero, v, FLOAT, ZEROS, LATE, ASSEMBLY)
        if GATED:
            more += _scaled(up_tile, up_scale, up_zero, v, FLOAT, ZEROS, LATE, ASSEMBLY)
    if PDL:
        gdc_launch_dependents()
    square = tl.sum(tl.sum(squares, 1), 0)
    if LATE and STACK:
        scales += tl.load(ids) * stored
    sums = _row_sums(sums, scales, own, FLOAT, LATE)
    result = _finish(sums, square, own, 2 * n if GATED else n, K, eps, bias, NORM, BIAS)
    if GATED:
        more = _row_sums(more, scales, up, FLOAT, LATE)
        result = _activated(result, GELU)
        result *= _finish(more, square, up, 2 * n, K, eps, bias, NORM, BIAS)
        if STACK:
            result *= tl.load(routing + tl.program_id(1))
    _store(out, rows, n, result, ADD)


@triton.jit
def _widen(values, scales, zeros, out, first, K: tl.constexpr, GROUP: tl.constexpr,
           GROUPS: tl.constexpr, BLOCK: tl.constexpr, FLOAT: tl.constexpr, ZEROS: tl.constexpr,
           ASSEMBLY: tl.constexpr):
    """Dequantise BLOCK columns of a row of a `Scaled` to ``out`` [rows, K]; row 0 is ``first``."""
    row = (first + tl.program_id(0)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    stored = tl.load(values + row * K + columns, mask=inside, other=0)
    numbers = _numbers(stored, FLOAT, ASSEMBLY)
    if FLOAT:
        numbers *= 256.0
    group = row * GROUPS + columns // GROUP
    if ZEROS:
        numbers -= tl.load(zeros + group, mask=inside, other=0.0)
    numbers *= tl.load(scales + group, mask=inside, other=0.0)
    tl.store(out + tl.program_id(0).to(tl.int64) * K + columns,
             numbers.to(out.dtype.element_ty), mask=inside)


# A lane loads 16 weights of 8 bits at once.
SCALED_LAYOUTS = kernels.DENSE_LAYOUTS + tuple(kernels.Layout(*each) for each in (
    (8, 1024, 4, 1), (16, 512, 4, 1), (16, 1024, 8, 1), (8, 2048, 8, 1), (4, 1024, 2, 1),
    (8, 1024, 8, 1), (4, 4096, 8, 1)))
if not compiler.PIPELINES:      # no three-dimensional loads
    SCALED_LAYOUTS = tuple(each for each in SCALED_LAYOUTS if each.stages == 1)


def widen(weight: Scaled, rows: slice, out: Tensor) -> None:
    """Dequantise some rows of a weight to ``out`` [rows, K], columns sorted by group."""
    k = weight.in_features
    _widen[(rows.stop - rows.start, triton.cdiv(k, BLOCK))](
        *pointers(weight), out, rows.start, K=k, GROUP=weight.group_size,
        GROUPS=weight.scales.shape[1], BLOCK=BLOCK, FLOAT=weight.is_float,
        ZEROS=weight.zeros is not None, ASSEMBLY=out.device.type == 'cuda', num_warps=4)


class ScaledOps(Int4Ops):
    """The step's operations as kernels, for 8-bit weights too."""

    wideners = {**Int4Ops.wideners, Scaled: widen}
    _form_layouts = {
        **Int4Ops._form_layouts, 'int8': SCALED_LAYOUTS, 'float8': SCALED_LAYOUTS}

    def _product(self, x, weight, out, gain, eps, add, gated, gelu=False, routed=None):
        one, whole, ids, routing, joined, each = kernels.operand(x, weight, routed, gated)
        if not isinstance(one, Scaled):
            super()._product(x, weight, out, gain, eps, add, gated, gelu, routed)
            return
        shape, layout = self._layout(weight, gain, gated)
        if one.order is not None:
            x, gain = self._prepared(x, one, gain, eps), None
        self._current.discard(out.data_ptr())
        n, bias = shape.n // 2 if gated else shape.n, one.bias
        _multiply[(triton.cdiv(n, layout.rows), each)](
            x, *pointers(whole), x if bias is None else bias, x if gain is None else gain, ids,
            routing, out, n, out.stride(0), eps, K=joined * shape.k, SIZE=shape.k,
            STACK=0 if routed is None else one.values.numel(), GROUP=one.group_size,
            ROWS=layout.rows,
            COLUMNS=math.gcd(layout.columns, shape.k) if joined > 1 else layout.columns,
            STAGES=layout.stages, FLOAT=one.is_float, ZEROS=whole.zeros is not None,
            BY_ROW=one.by_row, NORM=gain is not None,
            GATED=gated, GELU=gelu, ADD=add, BIAS=bias is not None,
            ASSEMBLY=self._device.type == 'cuda', PDL=self._pdl, **self._launch(layout.warps))


def pointers(weight: Scaled) -> tuple[Tensor, ...]:
    """Return values, scales and zeros; Triton requires a valid pointer even if unused."""
    return (weight.values.view(torch.int8), weight.scales,
            weight.scales if weight.zeros is None else weight.zeros)
