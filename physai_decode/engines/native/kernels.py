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
The operations of a decode step as Triton kernels; each one's twin is in ``ops``.

At batch 1, reading the weights bounds a decode step, so every kernel keeps the memory bus busy:
each program owns a few output rows and streams them once, and the norm, bias, SiLU and residual
around the product stay in registers. With programmatic dependent launch (compute capability 9.0
and newer), here ``PDL``, each kernel starts while the previous one ends, does the work that does
not depend on it, and then waits for its results. A kernel lets the next one start only after its
own main loop, unless it is small: earlier, the next one's blocks pile up on whichever SMs are
free.
"""

from collections.abc import Callable
from dataclasses import astuple
from dataclasses import dataclass
from hashlib import sha256
from inspect import getfile
import math
from pathlib import Path
from typing import Any
from typing import NamedTuple

from physai_decode.engines import chip
from physai_decode.engines import compiler
from physai_decode.engines.compiler import gdc_launch_dependents
from physai_decode.engines.compiler import gdc_wait
from physai_decode.engines.native import lookup
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import TILE_ROWS
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.tuning import timed
from physai_decode.engines.native.tuning import TuningCache
from physai_decode.engines.sampling_kernels import TritonSampler
import torch
from torch import Tensor
import triton
import triton.language as tl

# Columns in which the vector of a product with an `Int4` stands, see `_input`.
SIDE = tl.constexpr(compiler.LEAST_COLUMNS)
TUPLES = tl.constexpr(compiler.TUPLES)
LOOKUP = tl.constexpr(lookup.LOOKUP)
FILL_1, FILL_2, FILL_4, FILL_8 = (tl.constexpr(lookup.FILL[warps]) for warps in (1, 2, 4, 8))


@triton.jit
def _fetch(addresses):
    """Prefetch the cache lines at ``addresses`` into L2, without waiting."""
    tl.inline_asm_elementwise('prefetch.global.L2 [$1]; mov.u32 $0, 0;', '=r,l',
                              [addresses.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _embed(table, token, x, hidden, BLOCK: tl.constexpr, SCALE: tl.constexpr,
           PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token).to(tl.int64)
    values = tl.load(table + row * hidden + columns, mask=columns < hidden)
    if SCALE != 1.0:
        values = values.to(tl.float32) * SCALE
    tl.store(x + columns, values.to(tl.float32), mask=columns < hidden)


@triton.jit
def _finish(sums, squares, rows, n, K: tl.constexpr, eps, bias, NORM: tl.constexpr,
            BIAS: tl.constexpr):
    """Finish a projection from the sums of its products: apply the norm, then the bias."""
    if NORM:
        sums *= tl.rsqrt(squares / K + eps)
    if BIAS:
        sums += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
    return sums


@triton.jit
def _store(out, rows, n, values, ADD: tl.constexpr):
    if ADD:
        values += tl.load(out + rows, mask=rows < n, other=0.0)
    tl.store(out + rows, values.to(out.dtype.element_ty), mask=rows < n)


@triton.jit
def _activated(x, GELU: tl.constexpr):
    """Return SiLU, or the tanh approximation of GELU, which is a logistic function too."""
    z = x
    if GELU:
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)     # 2 sqrt(2 / pi)
    return x / (1.0 + tl.exp(-z))


@triton.jit
def _weights(row, columns, k, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile of a dense weight, from column ``k`` on."""
    if K % COLUMNS == 0:
        return tl.load(row + k, eviction_policy='evict_first')
    else:
        return tl.load(row + k, mask=(k + columns < K)[None, :], other=0.0,
                       eviction_policy='evict_first')


@triton.jit
def _vector(x, columns, k, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Load the columns of a tile from a vector [K], as float32."""
    if K % COLUMNS == 0:
        return tl.load(x + k + columns).to(tl.float32)
    else:
        return tl.load(x + k + columns, mask=k + columns < K, other=0.0).to(tl.float32)


@triton.jit
def _multiplied(sums, more, squares, w, u, x, gain, columns, k, K: tl.constexpr,
                COLUMNS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr):
    """Add the products of a tile with ``x`` from column ``k`` on, and the squares of ``x``."""
    v = _vector(x, columns, k, K, COLUMNS)
    if NORM:
        squares += v * v
        v *= _vector(gain, columns, k, K, COLUMNS)
    sums += w.to(tl.float32) * v[None, :]
    if GATED:
        more += u.to(tl.float32) * v[None, :]
    return sums, more, squares


@triton.jit
def _stack_offsets(ids, k, K: tl.constexpr, SIZE: tl.constexpr, STACK: tl.constexpr,
           COLUMNS: tl.constexpr):
    """Return the offsets of columns from ``k`` on in a `Stack`, and those in the weight."""
    if STACK == 0:
        return 0, k
    elif K == SIZE:
        return tl.load(ids) * STACK, k
    else:
        # Without this, Triton does not see the divisibility, and loads single numbers.
        return tl.load(ids + k // SIZE) * STACK, k % SIZE // COLUMNS * COLUMNS


@triton.jit
def _dense(x, weight, bias, gain, ids, routing, out, n, stride, eps, K: tl.constexpr,
           SIZE: tl.constexpr, STACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           STAGES: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
           ADD: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr):
    """
    Multiply ``weight`` [n, K] (gated: [2 n, K]) by ``x`` [K]; ROWS rows a program.

    Of a stack of weights with STACK elements each, multiply those at ``ids``. If gated, each has
    programs of its own, and rows of ``out`` that are ``stride`` apart. Otherwise they are side by
    side, with SIZE of the K columns from each.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    # Rows past the end read the last row again: no mask in the loop.
    row = weight + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * SIZE + columns[None, :]
    up_row = row
    if GATED:
        up_row += n.to(tl.int64) * SIZE
        if STACK:
            if PDL:
                gdc_wait()      # for the router; without gate it ran two kernels before
            ids += tl.program_id(1)
            out += tl.program_id(1) * stride
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    more = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    # The first tile is requested while the kernel before still runs.
    base, first = _stack_offsets(ids, 0, K, SIZE, STACK, COLUMNS)
    w = _weights(row + base, columns, first, SIZE, COLUMNS)
    u = w
    if GATED:
        u = _weights(up_row + base, columns, first, SIZE, COLUMNS)
    if PDL:
        gdc_wait()
    sums, more, squares = _multiplied(
        sums, more, squares, w, u, x, gain, columns, 0, K, COLUMNS, NORM, GATED)
    for k in tl.range(COLUMNS, K, COLUMNS, num_stages=STAGES):
        base, first = _stack_offsets(ids, k, K, SIZE, STACK, COLUMNS)
        w = _weights(row + base, columns, first, SIZE, COLUMNS)
        u = w
        if GATED:
            u = _weights(up_row + base, columns, first, SIZE, COLUMNS)
        sums, more, squares = _multiplied(
            sums, more, squares, w, u, x, gain, columns, k, K, COLUMNS, NORM, GATED)
    if PDL:
        gdc_launch_dependents()
    square = tl.sum(squares)
    result = _finish(tl.sum(sums, 1), square, rows, n, K, eps, bias, NORM, BIAS)
    if GATED:
        up = _finish(tl.sum(more, 1), square, rows, n, K, eps, bias + n, NORM, BIAS)
        result = _activated(result, GELU) * up
        if STACK:
            result *= tl.load(routing + tl.program_id(1))
    _store(out, rows, n, result, ADD)


@triton.jit
def _nibble(words, NUMBER: tl.constexpr, KIND: tl.constexpr, ASSEMBLY: tl.constexpr):
    """
    Return nibble NUMBER of int16 ``words`` as KIND.

    With ASSEMBLY, two nibbles at once go into the mantissas of two 16-bit floats, without a
    conversion: the result is 128 plus the nibble (bfloat16), or 1024 plus the nibble (float16). A
    float16 has room for two nibbles, so an odd one needs no shift: 1024 plus 16 times the nibble.
    """
    if ASSEMBLY and KIND == tl.bfloat16:
        OVER: tl.constexpr = 4 * NUMBER
        return tl.inline_asm_elementwise(
            f'{{ .reg .b32 t; shr.b32 t, $1, {OVER}; '
            f'lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA; }}',
            '=r,r', [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif ASSEMBLY and KIND == tl.float16:
        SHIFT: tl.constexpr = 8 * (NUMBER // 2)
        MASK: tl.constexpr = 0x00F000F0 if NUMBER % 2 else 0x000F000F
        return tl.inline_asm_elementwise(
            f'{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; '
            f'lop3.b32 $0, t, {MASK}, 0x64006400, 0xEA; }}',
            '=r,r', [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return ((words.to(tl.int32) >> (4 * NUMBER)) & 0xF).to(KIND)


@triton.jit
def _pairs(x, table, WARPS: tl.constexpr, TABLE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """
    Copy the pairs of a table to shared memory; returns the address of a lane's copy.

    An ``x`` of float32 does not use them, and its product needs the shared memory.
    """
    if TABLE and (ASSEMBLY and (TUPLES and x.dtype.element_ty != tl.float32)):
        FILL: tl.constexpr = FILL_1 if WARPS == 1 else FILL_2 if WARPS == 2 else (
            FILL_4 if WARPS == 4 else FILL_8)
        return tl.inline_asm_elementwise(FILL, '=r,l', [(table + 16).to(tl.int64)],
                                         dtype=tl.int32, is_pure=False, pack=1)
    else:
        return 0


@triton.jit
def _looked_up(words, table, pairs, KIND: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the numbers of a table for the four nibbles of each of ``words``, as KIND."""
    if (ASSEMBLY and TUPLES) and KIND == tl.bfloat16:
        return tl.inline_asm_elementwise(
            LOOKUP, '=r,=r,=r,=r,r,r,r', [words, pairs],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
    elif (ASSEMBLY and TUPLES) and KIND == tl.float16:
        return tl.inline_asm_elementwise(
            LOOKUP, '=r,=r,=r,=r,r,r,r', [words, pairs],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        return (_number(words, table, 0).to(KIND), _number(words, table, 1).to(KIND),
                _number(words, table, 2).to(KIND), _number(words, table, 3).to(KIND))


@triton.jit
def _number(words, table, NUMBER: tl.constexpr):
    """Return the number of a table for nibble NUMBER of ``words``, as float32."""
    numbers = table.to(tl.pointer_type(tl.float32))
    return tl.load(numbers + ((words.to(tl.int32) >> (4 * NUMBER)) & 0xF))


@triton.jit
def _of(four, NUMBER: tl.constexpr):
    """Return float16 NUMBER of the four in an int64, as float32."""
    return (four >> (16 * NUMBER)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _grouped(result, words, v, total, scales, zeros, NUMBER: tl.constexpr, ZEROS: tl.constexpr,
             ASSEMBLY: tl.constexpr):
    """
    Multiply one group of each row of ``words`` by ``v`` [SPLIT, GROUP, SIDE]; add to ``result``.

    Subtracts the zeros afterwards, times ``total``, the sum of ``v``. The compiler may fuse a
    multiplication with an addition in some columns only, so `tl.fma` does it in all.
    """
    inner = tl.dot(_matrix(_nibble(words, NUMBER, v.dtype, ASSEMBLY)), v, input_precision='ieee')
    scale = _of(scales, NUMBER)[:, :, None]
    zero = 8.0
    if ZEROS:
        zero = _of(zeros, NUMBER)[:, :, None]
    if ASSEMBLY and v.dtype == tl.bfloat16:
        zero += 128.0
    elif ASSEMBLY and v.dtype == tl.float16:
        FACTOR: tl.constexpr = 16.0 if NUMBER % 2 else 1.0
        zero = zero * FACTOR + 1024.0
        scale *= 1.0 / FACTOR
    return tl.fma(tl.fma(-total, zero, inner), scale, result)


@triton.jit
def _added(result, numbers, v, scales, NUMBER: tl.constexpr):
    """Multiply one group of ``numbers`` by ``v``, as `_grouped` does, without zeros."""
    inner = tl.dot(_matrix(numbers), v, input_precision='ieee')
    return tl.fma(inner, _of(scales, NUMBER)[:, :, None], result)


@triton.jit
def _matrix(words):
    """
    Reshape fragments [SPLIT, GROUP / 16, 256] to [SPLIT, 16, GROUP], without moving data.

    The columns are in the order in which `_input` gives theirs.
    """
    SPLIT: tl.constexpr = words.shape[0]
    parts = tl.reshape(words, (SPLIT, words.shape[1], 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(parts, (0, 5, 2, 1, 4, 3, 6)), (SPLIT, 16, 16 * words.shape[1]))


@triton.jit
def _tile(packed, scales, zeros, ids, tile, first, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
          STACK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, ZEROS: tl.constexpr,
          TILES: tl.constexpr = 1):
    """Load what `_words` loads, and four scales and zeros for each row of the blocks."""
    words = _words(packed, ids, tile, first, BLOCKS, SIZE, STACK, GROUP, SPLIT, TILES)
    # Four float16 are read as one number.
    warp = tl.arange(0, TILES * SPLIT)
    at, inside = _places(ids, tile, first, warp, BLOCKS, SIZE, STACK, SPLIT, TILES)
    rows = at[:, None] * 16 + tl.arange(0, 16)[None, :]
    four = tl.load(scales.to(tl.pointer_type(tl.int64)) + rows, mask=inside[:, None], other=0)
    zero = four
    if ZEROS:
        zero = tl.load(zeros.to(tl.pointer_type(tl.int64)) + rows, mask=inside[:, None], other=0)
    return words, four, zero


@triton.jit
def _words(packed, ids, tile, first, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
           STACK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
           TILES: tl.constexpr = 1):
    """
    Load the fragments of SPLIT blocks of TILES tiles from ``first`` on, [warps, GROUP / 16, 256].

    They are loaded in two dimensions, so that each warp loads its own block: for more, the layout
    depends on the version of Triton.
    """
    WARPS: tl.constexpr = TILES * SPLIT
    number = tl.arange(0, GROUP // 16 * WARPS)
    at, inside = _places(ids, tile, first, number % WARPS, BLOCKS, SIZE, STACK, SPLIT, TILES)
    words = tl.load(
        packed + at[:, None] * (16 * GROUP) + (number // WARPS * 256)[:, None]
        + tl.arange(0, 256)[None, :], mask=inside[:, None], other=0,
        eviction_policy='evict_first')
    return tl.permute(tl.reshape(words, (GROUP // 16, WARPS, 256)), (1, 0, 2))


@triton.jit
def _places(ids, tile, first, warp, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
            STACK: tl.constexpr, SPLIT: tl.constexpr, TILES: tl.constexpr = 1):
    """Return where the blocks of warps are, from block ``first`` on, and which of them exist."""
    block = first + warp
    if TILES > 1:
        block = first + warp % SPLIT
        tile += warp // SPLIT
    inside = block < BLOCKS if BLOCKS % SPLIT else tl.full(block.shape, True, tl.int1)
    at = tile * SIZE + block
    if STACK:
        base = tl.load(ids + block // SIZE, mask=inside, other=0) * STACK
        at = base + tile * SIZE + block % SIZE
    return at, inside


@triton.jit
def _input(x, first, rows, NUMBER: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
           SPLIT: tl.constexpr, COPIED: tl.constexpr, TILES: tl.constexpr = 1):
    """
    Load x for group NUMBER of SPLIT blocks from ``first`` on.

    The matrix units need a matrix, so x is repeated in SIDE columns, in the order of the words:
    [warps, GROUP, SIDE]. If COPIED, it is loaded once, through shared memory. Otherwise every lane
    loads what it multiplies. If ``rows`` is not None, x is that of a pass, [rows, K]: each column
    has one row, or repeats the last.
    """
    WARPS: tl.constexpr = TILES * SPLIT
    if COPIED:
        warp = tl.arange(0, WARPS)
        column = ((first + (warp % SPLIT if TILES > 1 else warp)) * 4 + NUMBER) * GROUP
        at = tl.arange(0, GROUP)[None, :]       # pair, operand, high, lane, low
        columns = column[:, None] + (at // 32 * 32 + at // 2 % 4 * 8 + at // 16 % 2 * 4
                                     + at // 8 % 2 * 2 + at % 2)
        v = tl.load(x + columns, mask=columns < K, other=0.0)
        return tl.broadcast_to(v[:, :, None], (WARPS, GROUP, SIDE))
    # Four lanes load one column of 8; after the lanes come the warps, and then the registers.
    number = tl.arange(0, GROUP // 32 * WARPS * SIDE * 4)
    column = ((first + number // 32 % SPLIT) * 4 + NUMBER) * GROUP \
        + number // (4 * SIDE * WARPS) * 32 + number % 4 * 8
    columns = column[:, None] + tl.arange(0, 8)[None, :]
    if rows is not None:
        row = number // (32 * WARPS) % (SIDE // 8) * 8 + number // 4 % 8
        x += (tl.minimum(row, rows - 1) * K)[:, None]
    v = tl.load(x + columns, mask=columns < K, other=0.0)
    v = tl.reshape(v, (GROUP // 32, SIDE // 8, WARPS, 8, 4, 2, 2, 2))
    v = tl.permute(v, (2, 0, 5, 6, 4, 7, 1, 3))
    return tl.reshape(v, (WARPS, GROUP, SIDE))


@triton.jit
def _input_sums(sums, first, rows, NUMBER: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                SPLIT: tl.constexpr):
    """Add the sums of x for group NUMBER of SPLIT blocks, [SPLIT, 1, 1]; [SPLIT, 1, SIDE] rows."""
    if rows is None:
        eighth = (((first + tl.arange(0, SPLIT)) * 4 + NUMBER) * (GROUP // 8))[:, None] \
            + tl.arange(0, GROUP // 8)[None, :]
        parts = tl.load(sums + eighth, mask=eighth * 8 < K, other=0.0)
        return tl.sum(parts, 1)[:, None, None]
    else:
        return _row_sums(sums, first, rows, NUMBER, K, GROUP, SPLIT)


@triton.jit
def _row_sums(sums, first, rows, NUMBER: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
              SPLIT: tl.constexpr):
    """
    Add the sums of a group for each row of a pass, [SPLIT, 1, SIDE].

    Each lane loads and keeps what it needs for its columns of the product.
    """
    PARTS: tl.constexpr = GROUP // 8
    WIDTH: tl.constexpr = PARTS // 8 if PARTS > 8 else 1
    number = tl.arange(0, SIDE * SPLIT * 8)     # a lane's columns, blocks, parts, columns
    column = number // (32 * SPLIT)
    row = tl.minimum(column // 2 * 8 + number % 4 * 2 + column % 2, rows - 1)
    part = ((first + number // 32 % SPLIT) * 4 + NUMBER) * PARTS + number // 4 % 8 * WIDTH % PARTS
    parts = part[:, None] + tl.arange(0, WIDTH)[None, :]
    values = tl.load(sums + (row * ((K + 7) // 8))[:, None] + parts, mask=parts * 8 < K, other=0.0)
    total = tl.sum(tl.reshape(tl.sum(values, 1), (SIDE // 8, 2, SPLIT, 8, 4)), 3)
    if PARTS < 8:       # eight lanes share them, so some are added repeatedly
        total *= PARTS / 8
    return tl.reshape(tl.permute(total, (2, 0, 3, 1)), (SPLIT, SIDE))[:, None, :]


@triton.jit
def _block(result, x, sums, words, four, zero, table, pairs, first, rows, K: tl.constexpr,
           GROUP: tl.constexpr, SPLIT: tl.constexpr, COPIED: tl.constexpr, ZEROS: tl.constexpr,
           TABLE: tl.constexpr, ASSEMBLY: tl.constexpr, TILES: tl.constexpr = 1):
    """Add the products of the blocks that `_tile` loaded to [warps, 16, SIDE]."""
    v0 = _input(x, first, rows, 0, K, GROUP, SPLIT, COPIED, TILES)
    v1 = _input(x, first, rows, 1, K, GROUP, SPLIT, COPIED, TILES)
    v2 = _input(x, first, rows, 2, K, GROUP, SPLIT, COPIED, TILES)
    v3 = _input(x, first, rows, 3, K, GROUP, SPLIT, COPIED, TILES)
    if TABLE:
        w0, w1, w2, w3 = _looked_up(words, table, pairs, v0.dtype, ASSEMBLY)
        result = _added(result, w0, v0, four, 0)
        result = _added(result, w1, v1, four, 1)
        result = _added(result, w2, v2, four, 2)
        result = _added(result, w3, v3, four, 3)
    else:
        total0 = _input_sums(sums, first, rows, 0, K, GROUP, SPLIT)
        total1 = _input_sums(sums, first, rows, 1, K, GROUP, SPLIT)
        total2 = _input_sums(sums, first, rows, 2, K, GROUP, SPLIT)
        total3 = _input_sums(sums, first, rows, 3, K, GROUP, SPLIT)
        result = _grouped(result, words, v0, total0, four, zero, 0, ZEROS, ASSEMBLY)
        result = _grouped(result, words, v1, total1, four, zero, 1, ZEROS, ASSEMBLY)
        result = _grouped(result, words, v2, total2, four, zero, 2, ZEROS, ASSEMBLY)
        result = _grouped(result, words, v3, total3, four, zero, 3, ZEROS, ASSEMBLY)
    return result


@triton.jit
def _int4(x, sums, packed, scales, zeros, table, bias, ids, routing, out, out_sums, n, stride,
          K: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, STACK: tl.constexpr,
          GROUP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
          GATED: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
          ZEROS: tl.constexpr, TABLE: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr):
    """
    Multiply an `Int4` [n, K] by ``x`` [K]; a program has tiles of 16 rows, ROWS in all.

    SPLIT warps a tile take turns at the blocks and add up their sums at the end. The words go
    straight to registers or, with more than one of STAGES, are prefetched to shared memory. If the
    registers can hold all words of a tile, they are requested while the previous kernel still
    runs. With no STAGES, that holds for the first words, and the next words are requested before
    the current ones are multiplied.

    ``sums`` has the sum of every 8 of ``x``; a gated product also writes those of ``out``. If
    TABLE, nibbles are looked up in ``table``, see `lookup`. For a stack, see `_dense`; SIZE and
    STACK are in blocks.
    """
    COPIED: tl.constexpr = STAGES > 1
    TILES: tl.constexpr = ROWS // 16
    LAST: tl.constexpr = (BLOCKS - 1) // SPLIT * SPLIT
    tile = tl.program_id(0).to(tl.int64) * TILES
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    result = tl.zeros((TILES * SPLIT, 16, SIDE), tl.float32)
    if GATED and STACK:
        if PDL:
            gdc_wait()
        ids += tl.program_id(1)
        out += tl.program_id(1) * stride
        out_sums += tl.program_id(1) * (stride // 8)
    if BLOCKS <= 2 * SPLIT and not COPIED or STAGES == 0:
        words, four, zero = _tile(packed, scales, zeros, ids, tile, 0, BLOCKS, SIZE, STACK, GROUP,
                                  SPLIT, ZEROS, TILES)
        if LAST == SPLIT:
            more, more_four, more_zero = _tile(packed, scales, zeros, ids, tile, SPLIT, BLOCKS,
                                               SIZE, STACK, GROUP, SPLIT, ZEROS, TILES)
        pairs = _pairs(x, table, TILES * SPLIT, TABLE, ASSEMBLY)
        if PDL:
            gdc_wait()
        if LAST == SPLIT:
            result = _block(result, x, sums, words, four, zero, table, pairs, 0, None, K, GROUP,
                            SPLIT, COPIED, ZEROS, TABLE, ASSEMBLY, TILES)
            words, four, zero = more, more_four, more_zero
        else:
            for first in tl.range(0, LAST, SPLIT, num_stages=1):
                more, more_four, more_zero = _tile(packed, scales, zeros, ids, tile, first + SPLIT,
                                                   BLOCKS, SIZE, STACK, GROUP, SPLIT, ZEROS, TILES)
                result = _block(result, x, sums, words, four, zero, table, pairs, first, None, K,
                                GROUP, SPLIT, COPIED, ZEROS, TABLE, ASSEMBLY, TILES)
                words, four, zero = more, more_four, more_zero
        result = _block(result, x, sums, words, four, zero, table, pairs, LAST, None, K, GROUP,
                        SPLIT, COPIED, ZEROS, TABLE, ASSEMBLY, TILES)
    else:
        pairs = _pairs(x, table, TILES * SPLIT, TABLE, ASSEMBLY)
        if PDL:
            gdc_wait()
        for first in tl.range(0, BLOCKS, SPLIT, num_stages=STAGES):
            words, four, zero = _tile(packed, scales, zeros, ids, tile, first, BLOCKS, SIZE, STACK,
                                      GROUP, SPLIT, ZEROS, TILES)
            result = _block(result, x, sums, words, four, zero, table, pairs, first, None, K,
                            GROUP, SPLIT, COPIED, ZEROS, TABLE, ASSEMBLY, TILES)
    if PDL:
        gdc_launch_dependents()
    result = tl.reshape(tl.sum(tl.reshape(tl.max(result, 2), (TILES, SPLIT, 16)), 1), (ROWS,))
    result = _finish(result, 0.0, rows, n, K, 0.0, bias, False, BIAS)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(result, (TILES, 2, 8)), (0, 2, 1)))
        result = _activated(gate, GELU) * up
        if STACK:
            result *= tl.load(routing + tl.program_id(1))
        rounded = result.to(out.dtype.element_ty).to(tl.float32)
        tl.store(out_sums + tl.program_id(0) * TILES + tl.arange(0, TILES), tl.sum(rounded, 1))
        result = tl.reshape(result, (ROWS // 2,))
        rows = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    _store(out, rows, n, result, ADD)


@triton.jit
def _dequantise(packed, scales, zeros, table, out, first, rows, K: tl.constexpr,
                BLOCKS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
                TABLE: tl.constexpr):
    """Write a block of a tile of an `Int4` to ``out`` [rows, K], row 0 being ``first`` tile's."""
    tile = first + tl.program_id(0).to(tl.int64)
    words, four, zero = _tile(packed, scales, zeros, packed, tile, tl.program_id(1), BLOCKS,
                              BLOCKS, 0, GROUP, 1, ZEROS)
    parts = tl.reshape(words, (GROUP // 32, 2, 8, 4, 2, 2, 2))
    words = tl.reshape(tl.permute(parts, (5, 2, 0, 3, 1, 4, 6)), (16, GROUP)).to(tl.int32)
    row = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
    for number in tl.static_range(4):
        column = (tl.program_id(1) * 4 + number) * GROUP + tl.arange(0, GROUP)[None, :]
        if TABLE:
            values = _number(words, table, number)
        elif ZEROS:
            values = ((words >> (4 * number)) & 0xF) - tl.reshape(_of(zero, number), (16, 1))
        else:
            values = ((words >> (4 * number)) & 0xF).to(tl.float32) - 8.0
        values *= tl.reshape(_of(four, number), (16, 1))
        tl.store(out + row.to(tl.int64) * K + column, values.to(out.dtype.element_ty),
                 mask=(row < rows) & (column < K))


@triton.jit
def _prepare(x, gain, order, out, out_sums, eps, K: tl.constexpr, WIDE: tl.constexpr,
             BLOCK: tl.constexpr, NORM: tl.constexpr, ORDERED: tl.constexpr, PDL: tl.constexpr):
    """
    Write ``x`` [K] normalised, in the order of a weight's columns, and the sums of every 8.

    BLOCK columns a program; WIDE is K rounded up to a power of two.
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    source = columns
    if ORDERED:
        source = tl.load(order + columns, mask=inside, other=0)
    if NORM:
        scale = tl.load(gain + source, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    v = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        every = tl.arange(0, WIDE)
        whole = tl.load(x + every, mask=every < K, other=0.0)
        v *= scale * tl.rsqrt(tl.sum(whole * whole) / K + eps)
    rounded = v.to(out.dtype.element_ty)
    tl.store(out + columns, rounded, mask=inside)
    eighths = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    sums = tl.sum(tl.reshape(rounded.to(tl.float32), (BLOCK // 8, 8)), 1)
    tl.store(out_sums + eighths, sums, mask=eighths * 8 < K)


@triton.jit
def _add_normed(branch, gain, x, eps, K: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
                PDL: tl.constexpr):
    """
    Add ``branch`` [K], normalised, to ``x``; BLOCK columns a program.

    WIDE is K rounded up to a power of two.
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    scale = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    every = tl.arange(0, WIDE)
    whole = tl.load(branch + every, mask=every < K, other=0.0)
    v = tl.load(branch + columns, mask=inside, other=0.0)
    v *= scale * tl.rsqrt(tl.sum(whole * whole) / K + eps)
    tl.store(x + columns, tl.load(x + columns, mask=inside, other=0.0) + v, mask=inside)


@triton.jit
def _select(logits, ids, routing, COUNT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
          TOP_K: tl.constexpr, NORMALISED: tl.constexpr, PDL: tl.constexpr):
    """
    Write the ids of the TOP_K largest of COUNT ``logits``, largest first, and their weights.

    WIDE is COUNT rounded up to a multiple of BLOCK, both powers of two. If logits are NaN, the
    ids keep their values, and the first weight is NaN.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    every = tl.arange(0, WIDE)
    own = tl.load(logits + every, mask=every < COUNT, other=float('-inf'))
    rank = tl.zeros((WIDE,), tl.int32)
    for first in tl.static_range(0, WIDE, BLOCK):
        other = first + tl.arange(0, BLOCK)
        others = tl.load(logits + other, mask=other < COUNT, other=float('-inf'))
        before = (others[None, :] > own[:, None]) | (
            (others[None, :] == own[:, None]) & (other[None, :] < every[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    weight = tl.exp(own - tl.max(own, 0))
    taken = rank < TOP_K
    total = tl.sum(tl.where(taken, weight, 0.0) if NORMALISED else weight, 0)
    tl.store(ids + rank, every.to(tl.int64), mask=taken & (every < COUNT))
    tl.store(routing + rank, weight / total, mask=taken & (every < COUNT))


@triton.jit
def _rotated(head, gain, cos, sin, dims, D: tl.constexpr, eps, inside, NORM: tl.constexpr):
    """
    Load heads at ``head`` [rows, 1] or scalar, normalise and rotate them.

    ``dims`` are the indices of the head's dimensions, in the shape of ``inside``. Each element is
    rotated with its partner half a head away.
    """
    half: tl.constexpr = D // 2
    other = tl.where(dims < half, dims + half, dims - half)
    a = tl.load(head + dims, mask=inside, other=0.0)
    b = tl.load(head + other, mask=inside, other=0.0)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a, -1, keep_dims=True) / D + eps)
        a *= scale * tl.load(gain + dims, mask=dims < D, other=0.0).to(tl.float32)
        b *= scale * tl.load(gain + other, mask=dims < D, other=0.0).to(tl.float32)
    angle = tl.where(dims < half, dims, dims - half)
    c = tl.load(cos + angle, mask=dims < D, other=0.0)
    s = tl.load(sin + angle, mask=dims < D, other=0.0)
    return a * c + tl.where(dims < half, -b, b) * s


@triton.jit
def _attend(qkv, keys, values, position, cos, sin, q_gain, k_gain, part_sums, part_maxima,
            part_totals, max_context, scale, eps, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
            PADDED: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr,
            TOKENS: tl.constexpr, WINDOW: tl.constexpr, NORM: tl.constexpr, BETA: tl.constexpr,
            LENGTH: tl.constexpr, PDL: tl.constexpr):
    """
    Attend over one split of the context for the queries of one key-value head.

    The last split, often the shortest, also has the new token, and writes its key and value to
    the cache. PADDED and DIMS are GROUP and D rounded up to what the matrix units need. BETA and
    LENGTH are those of `Growth`.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    place = tl.load(position).to(tl.int32)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(0, place + 1 - WINDOW)
    length = tl.cdiv(tl.cdiv(place - start, SPLITS), TOKENS) * TOKENS
    begin = start + split * length
    end = tl.minimum(place, begin + length)
    cache = kv_head.to(tl.int64) * max_context * D
    queries = tl.arange(0, PADDED)
    dims = tl.arange(0, DIMS)
    if PDL:
        # The split's keys and values are older than this step.
        first = tl.minimum(begin + tl.arange(0, TOKENS), max_context - 1)
        lines = cache + first.to(tl.int64)[:, None] * D + (tl.arange(0, DIMS // 64) * 64)[None, :]
        _fetch(keys + lines)
        _fetch(values + lines)
        gdc_launch_dependents()
        gdc_wait()

    angles = place * (D // 2)
    if BETA > 0:
        scale *= 1.0 + BETA * tl.log(1.0 + place // LENGTH)
    q_head = qkv + (kv_head * GROUP + queries)[:, None] * D
    q_inside = (queries < GROUP)[:, None] & (dims < D)[None, :]
    q = _rotated(q_head, q_gain, cos + angles, sin + angles, dims[None, :], D, eps, q_inside, NORM)
    kind = keys.dtype.element_ty
    q = q.to(kind)

    maxima = tl.full((PADDED,), float('-inf'), tl.float32)
    totals = tl.zeros((PADDED,), tl.float32)
    sums = tl.zeros((PADDED, DIMS), tl.float32)
    if split == SPLITS - 1:
        k_head = qkv + (KV_HEADS * GROUP + kv_head) * D
        k = _rotated(k_head, k_gain, cos + angles, sin + angles, dims[None, :], D, eps,
                    (dims < D)[None, :], NORM).to(kind)
        v = tl.load(qkv + (KV_HEADS * GROUP + KV_HEADS + kv_head) * D + dims[None, :],
                    mask=(dims < D)[None, :], other=0.0).to(kind)
        new = cache + place * D + dims[None, :]
        tl.store(keys + new, k, mask=(dims < D)[None, :])
        tl.store(values + new, v, mask=(dims < D)[None, :])
        maxima = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        totals += 1.0
        sums += v.to(tl.float32)
    for token in tl.range(begin, end, TOKENS):
        tokens = token + tl.arange(0, TOKENS)
        live = (tokens < end)[:, None] & (dims < D)[None, :]
        at = cache + tokens.to(tl.int64)[:, None] * D + dims[None, :]
        k = tl.load(keys + at, mask=live, other=0.0)
        v = tl.load(values + at, mask=live, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
        scores = tl.where((tokens < end)[None, :], scores, float('-inf'))
        highest = tl.maximum(maxima, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        fade = tl.exp(maxima - highest)
        totals = totals * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(kind), v, input_precision='ieee')
        maxima = highest
    # Ordered by query, so that its splits are adjacent.
    slot = (kv_head * GROUP + queries) * SPLITS + split
    tl.store(part_maxima + slot, maxima, mask=queries < GROUP)
    tl.store(part_totals + slot, totals, mask=queries < GROUP)
    tl.store(part_sums + slot[:, None] * DIMS + dims[None, :], sums,
             mask=(queries < GROUP)[:, None])


@triton.jit
def _join(part_sums, part_maxima, part_totals, out, out_sums, D: tl.constexpr,
          DIMS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Merge BLOCK dimensions of a query head's splits; also write the sums of every 8."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.program_id(0) * SPLITS + tl.arange(0, SPLITS)
    maxima = tl.load(part_maxima + slots)
    totals = tl.load(part_totals + slots)
    sums = tl.load(part_sums + slots[:, None] * DIMS + dims[None, :])
    fades = tl.exp(maxima - tl.max(maxima, 0))
    result = tl.sum(sums * fades[:, None], 0) / tl.sum(totals * fades, 0)
    rounded = result.to(out.dtype.element_ty)
    tl.store(out + tl.program_id(0) * D + dims, rounded)
    eighths = (tl.program_id(0) * D + tl.program_id(1) * BLOCK) // 8 + tl.arange(0, BLOCK // 8)
    tl.store(out_sums + eighths, tl.sum(tl.reshape(rounded.to(tl.float32), (BLOCK // 8, 8)), 1))


@dataclass(frozen=True)
class Shape:
    """The shape of a product, on which the layout of its kernel depends."""

    n: int
    k: int
    kind: str          # as the weight calls it
    gated: bool
    normed: bool


@dataclass(frozen=True)
class Layout:
    """
    The layout of a product's kernel; ``rows`` and ``columns`` are those of a tile of weights.

    An `Int4` or `Fp4` has columns 0: its tiles are as wide as its blocks, with one block per warp.
    ``split`` is the number of warps that share the columns of a dense pass.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    split: int = 1


TUNING_CONTEXT = 8192   # tokens; layouts are timed behind half as many, if there is room
# Layouts that were fast for some shape; see docs/performance.md. The first fits every chip.
DENSE_LAYOUTS = tuple(Layout(*each) for each in (
    (8, 512, 4, 1), (4, 512, 2, 1), (4, 512, 2, 4), (4, 512, 4, 1), (4, 512, 4, 4),
    (8, 256, 2, 4), (8, 256, 4, 1), (8, 512, 2, 1), (16, 256, 8, 1), (4, 1024, 4, 1),
    (2, 1024, 4, 1), (1, 2048, 4, 1), (2, 2048, 4, 1), (2, 2048, 8, 1), (4, 2048, 4, 1),
    (4, 2048, 8, 1)))
# A lane loads 16 weights of 8 bits at once.
SCALED_LAYOUTS = DENSE_LAYOUTS + tuple(Layout(*each) for each in (
    (8, 1024, 4, 1), (16, 512, 4, 1), (16, 1024, 8, 1), (8, 2048, 8, 1), (4, 1024, 2, 1),
    (8, 1024, 8, 1), (4, 4096, 8, 1)))
INT4_LAYOUTS = tuple(Layout(TILE_ROWS, 0, *each) for each in (
    (4, 1), (4, 3), (4, 2), (2, 3), (2, 4), (1, 1), (1, 2), (1, 3), (8, 1)))
FP4_LAYOUTS = tuple(Layout(TILE_ROWS, 0, *each) for each in (
    (4, 1), (8, 1), (2, 1), (1, 1), (1, 2), (2, 2), (2, 3), (4, 3), (4, 4)))
# Of an `Int4` with a table: its shared memory fits into 48 KiB; with more, a launch would fail.
TABLE_LAYOUTS = tuple(Layout(tiles * TILE_ROWS, 0, *each) for tiles, *each in (
    (1, 4, 1), (1, 8, 1), (1, 2, 1), (1, 1, 1), (1, 8, 0), (1, 4, 0), (1, 2, 3), (1, 2, 4),
    (1, 1, 3), (2, 4, 1), (2, 8, 1), (4, 8, 1), (2, 8, 0), (2, 4, 2)))
if not compiler.PIPELINES:      # older versions need shared memory for each warp: few fit
    INT4_LAYOUTS, FP4_LAYOUTS, TABLE_LAYOUTS = (
        tuple(sorted(each, key=lambda layout: layout.warps))
        for each in (INT4_LAYOUTS, FP4_LAYOUTS, TABLE_LAYOUTS))


@dataclass(frozen=True)
class AttentionLayout:
    """The layout of attention: programs for each 128 or so SMs, and warps per program."""

    programs: int
    warps: int


ATTENTION_LAYOUTS = tuple(
    AttentionLayout(*each) for each in ((2, 1), (4, 1), (1, 4), (2, 4), (2, 2)))


class Operand(NamedTuple):
    """The weight of a product, or a stack of weights of which a step selects some."""

    one: Any            # the weight, or the first of the stack
    whole: Any          # the weight, or the whole stack
    ids: Tensor         # of the selected
    routing: Tensor     # weights of the selected
    joined: int         # selected weights whose columns are side by side
    each: int           # selected weights with programs of their own


def operand(x, weight, routed, gated):
    """Return the operand of a product of `TorchOps`; ``routed`` is None without experts."""
    if routed is None:      # Triton requires a valid pointer even for unused arguments
        return Operand(weight, weight, x, x, 1, 1)
    joined, each = (1, weight.top_k) if gated else (weight.top_k, 1)
    return Operand(weight[0], weight.stacked, routed.ids, routed.weights, joined, each)


def unpack(weight: Int4, rows: slice, out: Tensor) -> None:
    """Dequantise some rows of a weight, from a whole tile on, to ``out`` [rows, K]."""
    count, k = out.shape
    blocks = weight.packed.shape[1]
    _dequantise[(triton.cdiv(count, TILE_ROWS), blocks)](
        weight.packed, weight.scales, weight.scales if weight.zeros is None else weight.zeros,
        lookup.table(weight, out.dtype), out, rows.start // TILE_ROWS, count, K=k, BLOCKS=blocks,
        GROUP=weight.group_size, ZEROS=weight.zeros is not None, TABLE=weight.table is not None,
        num_warps=1)


def _unpack(weight, tiles, dtype):
    """Dequantise some tiles of an `Int4` as its own method does."""
    rows = slice(TILE_ROWS * tiles.start, min(TILE_ROWS * tiles.stop, weight.out_features))
    out = weight.scales.new_empty(rows.stop - rows.start, weight.in_features, dtype=dtype)
    unpack(weight, rows, out)
    return out


class TritonOps(TorchOps):
    """The operations of a decode step as kernels, with the interface of `TorchOps`."""

    name = f'triton {triton.__version__}'
    _dequantisers: dict[type, Callable[..., Tensor]] = {Int4: _unpack}      # of `apply`

    def __init__(self, device: torch.device, splits: int | None = None,
                 dtype: torch.dtype | None = None):
        """
        Allocate scratch memory.

        :param splits: the number of programs that split the context of a head.
        :param dtype: see `TorchOps`.
        """
        super().__init__(on_host=False, dtype=dtype)
        self._device = device
        if device.type == 'cuda' and (held := chip.pretended(device)):
            self.name = f'{self.name} as on {held}'
        self._pdl = compiler.supports_pdl(device)
        self._processors = 4
        if device.type == 'cuda':
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._programs = 2 ** int(math.log2(self._processors))
        self._splits = splits
        self._layouts: dict[Shape, Layout] = {}
        self._attention_layouts: dict[tuple[int, ...], AttentionLayout] = {}    # by `_heads`
        self._scratch: dict[tuple[object, ...], Tensor] = {}
        self._summed: dict[int, tuple[Tensor, Tensor]] = {}     # by address: see _sums
        self._current: set[int] = set()     # addresses of the vectors whose sums are up to date

    def embed(self, table, token, x, scale=1.0):
        """See `TorchOps.embed`."""
        hidden = x.shape[0]
        _embed[(triton.cdiv(hidden, 1024),)](
            table, token, x, hidden, BLOCK=1024, SCALE=scale, PDL=self._pdl,
            **self._launch(4))

    def linear(self, x, weight, out, *, gain=None, eps=0.0, add=False):
        """See `TorchOps.linear`."""
        self._product(x, weight, out, gain, eps, add, gated=False)

    def gated(self, x, weight, out, gain, eps, activation='silu'):
        """See `TorchOps.gated`."""
        self._product(x, weight, out, gain, eps, False, gated=True,
                      gelu=activation == 'gelu_tanh')

    def select(self, logits, into, normalised):
        """See `TorchOps.select`."""
        count = logits.shape[0]
        wide = max(32, triton.next_power_of_2(count))
        _select[(1,)](
            logits, into.ids, into.weights, COUNT=count, WIDE=wide, BLOCK=min(128, wide),
            TOP_K=into.ids.shape[0], NORMALISED=normalised, PDL=self._pdl,
            **self._launch(4))

    def gated_experts(self, x, stack, routed, out, gain, eps, activation='silu'):
        """See `TorchOps.gated_experts`."""
        self._product(x, stack, out, gain, eps, False, gated=True,
                      gelu=activation == 'gelu_tanh', routed=routed)

    def summed_experts(self, x, stack, routed, out, *, add=False):
        """See `TorchOps.summed_experts`."""
        self._product(x, stack, out, None, 0.0, add, gated=False, routed=routed)

    def add_normed(self, branch, gain, eps, x):
        """See `TorchOps.add_normed`."""
        k = x.shape[0]
        self._current.discard(x.data_ptr())
        _add_normed[(triton.cdiv(k, 512),)](
            branch, gain, x, eps, K=k, WIDE=triton.next_power_of_2(k), BLOCK=512,
            PDL=self._pdl, **self._launch(8))

    def apply(self, x, weight):
        """See `TorchOps.apply`."""
        dequantise = self.dequantiser(weight)
        return weight.apply(x, dequantise) if dequantise else weight.apply(x)

    def dequantiser(self, weight):
        """See `TorchOps.dequantiser`."""
        return self._dequantisers.get(type(weight))

    def attend(self, qkv, keys, values, position, cos, sin, layer, out):
        """See `TorchOps.attend`."""
        kv_heads, max_context, dim = keys.shape
        group = layer.heads // layer.kv_heads
        padded = max(16, triton.next_power_of_2(group))
        dims = triton.next_power_of_2(dim)
        warps, splits, parts = self._split_attention(layer, dims)
        _attend[(kv_heads, splits)](
            qkv, keys, values, position, cos, sin,
            layer.q_norm if layer.q_norm is not None else qkv,
            layer.k_norm if layer.k_norm is not None else qkv,
            *parts, max_context, layer.scale, layer.norm_eps, KV_HEADS=kv_heads,
            GROUP=group, PADDED=padded, D=dim, DIMS=dims, SPLITS=splits, TOKENS=32,
            WINDOW=layer.window, NORM=layer.q_norm is not None, BETA=layer.growth.beta,
            LENGTH=layer.growth.context, PDL=self._pdl, **self._launch(warps))
        _join[(layer.heads, dim // 32)](
            *parts, out, self._sums(out), D=dim, DIMS=dims, SPLITS=splits, BLOCK=32,
            PDL=self._pdl, **self._launch(1))

    def _split_attention(self, layer, dims, rows=1):
        """Return the warps and splits of a layer's attention, and the splits' buffers."""
        layout = self._attention_layouts.get(_heads(layer), ATTENTION_LAYOUTS[0])
        splits = self._splits or max(
            1, layout.programs * self._programs // triton.next_power_of_2(layer.kv_heads))
        return layout.warps, splits, [
            self._buffer(f'attention {part}', rows * layer.heads * splits * width, torch.float32)
            for part, width in (('sums', dims), ('maxima', 1), ('totals', 1))]

    def sampler(self, vocab_size, device):
        """See `TorchOps.sampler`."""
        return TritonSampler(vocab_size, device, self._processors, self._pdl)

    def tune(self, transformer, progress):
        """
        Find the fastest layout for each shape of product, or read it from the cache.

        Whole steps behind a context are timed, because only they show how kernels affect each
        other, such as by crowding the programs of attention on few processors.
        """
        version = self._version()
        place = min(transformer.max_context, TUNING_CONTEXT) // 2
        cache = TuningCache(', '.join((
            torch.cuda.get_device_name(self._device), self.name, f'kernels {version}',
            str(transformer.keys.dtype), f'at {place}')))
        transformer.position.fill_(place)
        steps = self._tuned(transformer)
        for name, product in transformer.products():
            shape = _shape(*product)
            self._tune(name, shape, self._layouts, self._candidates(shape), cache, steps, progress)
        for layer in transformer.attention:
            self._tune('attention', _heads(layer), self._attention_layouts, ATTENTION_LAYOUTS,
                       cache, steps, progress)
        transformer.position.zero_()

    @classmethod
    def _version(cls):
        """Hash the source files of the kernels: of this class and its bases."""
        files = (Path(getfile(each)) for each in cls.__mro__ if issubclass(each, TritonOps))
        return sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:8]

    def _tuned(self, transformer):
        """Return the steps whose times are added to compare layouts."""
        return (transformer.step,)

    def _tune(self, name, shape, chosen, candidates, cache, steps, progress):
        """Select the layout of one kernel, unless it is known."""
        if shape in chosen:
            return
        kept = cache.get(str(shape))
        layout = next((each for each in candidates if list(astuple(each)) == kept), None)
        if layout is None:
            progress(f'tuning the kernel for {name}')
            times = {}
            for each in candidates:
                chosen[shape] = each
                try:
                    times[each] = sum(map(timed, steps))
                except triton.runtime.errors.OutOfResources:
                    continue     # this chip has too little shared memory for it
                except RuntimeError as error:       # ... and Triton does not count all of it
                    if 'invalid argument' not in str(error):
                        raise
            layout = min(times, key=times.__getitem__)
            cache.put(str(shape), list(astuple(layout)))
        chosen[shape] = layout

    def _layout(self, weight, gain, gated):
        """Return the shape of a product, and the layout of its kernel."""
        shape = _shape(weight, gain, gated)
        return shape, self._layouts.get(shape) or self._candidates(shape)[0]

    def _candidates(self, shape):
        """Return the possible layouts of a product's kernel; the first fits every chip."""
        number = shape.kind.partition('-')[0]
        layouts = {'int4': INT4_LAYOUTS, 'table4': TABLE_LAYOUTS, 'fp4': FP4_LAYOUTS,
                   'int8': SCALED_LAYOUTS, 'float8': SCALED_LAYOUTS}.get(number, DENSE_LAYOUTS)
        if not compiler.PIPELINES and number in ('table4', 'fp4', 'int8', 'float8'):
            layouts = tuple(layout for layout in layouts if layout.stages == 1)
        if number == 'table4':
            tiles = triton.cdiv(shape.n, TILE_ROWS)
            layouts = tuple(each for each in layouts if tiles % (each.rows // TILE_ROWS) == 0)
        return layouts

    def _product(self, x, weight, out, gain, eps, add, gated, gelu=False, routed=None):
        shape, layout = self._layout(weight, gain, gated)
        weight, whole, ids, routing, joined, each = operand(x, weight, routed, gated)
        bias = weight.bias
        common = {
            'ROWS': layout.rows, 'STAGES': layout.stages, 'GATED': gated, 'GELU': gelu,
            'ADD': add, 'BIAS': bias is not None, 'PDL': self._pdl,
            **self._launch(layout.warps)}
        bias = x if bias is None else bias
        if isinstance(weight, Dense):
            self._current.discard(out.data_ptr())
            n = shape.n // 2 if gated else shape.n
            columns = math.gcd(layout.columns, shape.k) if joined > 1 else layout.columns
            _dense[(triton.cdiv(n, layout.rows), each)](
                x, whole.weight, bias, x if gain is None else gain, ids, routing, out, n,
                out.stride(0), eps, K=joined * shape.k, SIZE=shape.k,
                STACK=0 if routed is None else weight.weight.numel(), COLUMNS=columns,
                NORM=gain is not None, **common)
            return
        if gain is not None or weight.order is not None or x.data_ptr() not in self._current:
            x = self._prepared(x, weight, gain, eps)
        tiles, blocks = weight.packed.shape[:2]
        own = layout.rows // TILE_ROWS
        _int4[(tiles // own, each)](
            x, self._sums(x), whole.packed, whole.scales,
            x if whole.zeros is None else whole.zeros, lookup.table(whole, x.dtype), bias, ids,
            routing, out, self._sums(out) if gated else x, shape.n, out.stride(0), K=x.numel(),
            BLOCKS=joined * blocks, SIZE=blocks, STACK=0 if routed is None else tiles * blocks,
            GROUP=weight.group_size, SPLIT=layout.warps // own, ZEROS=whole.zeros is not None,
            TABLE=whole.table is not None, ASSEMBLY=self._device.type == 'cuda', **common)

    def _prepared(self, x, weight, gain, eps):
        k = x.numel()
        dtype = x.dtype if gain is None else self._dtype or gain.dtype
        out = self._buffer('prepared', k, dtype)
        _prepare[(triton.cdiv(k, 512),)](
            x, x if gain is None else gain, x if weight.order is None else weight.order, out,
            self._sums(out), eps, K=k, WIDE=triton.next_power_of_2(k), BLOCK=512,
            NORM=gain is not None, ORDERED=weight.order is not None, PDL=self._pdl,
            **self._launch(8))
        return out

    def _sums(self, vector):
        """Return the buffer for the sums of every 8 elements of a vector that a kernel writes."""
        key = vector.data_ptr()
        self._current.add(key)
        if key not in self._summed:
            # Never freed: a captured step has the addresses. The vector is kept too, so that no
            # other one gets its address. Zeros, for no kernel writes those of columns that pad.
            self._summed[key] = vector, torch.zeros(
                triton.cdiv(vector.numel(), 8), dtype=torch.float32, device=self._device)
        return self._summed[key][1]

    def _buffer(self, purpose, count, dtype):
        """Return scratch memory, which all layers share."""
        key = purpose, count, dtype
        if key not in self._scratch:
            self._scratch[key] = torch.empty(count, dtype=dtype, device=self._device)
        return self._scratch[key]

    def _launch(self, warps):
        options = {'num_warps': warps}
        if self._pdl:
            options['launch_pdl'] = True
        return options


def _shape(weight, gain, gated):
    n, k = weight.shape
    return Shape(n, k, weight.kind, gated, gain is not None)


def _heads(layer):
    """Return the shape that the layout of attention depends on."""
    return layer.heads, layer.kv_heads, layer.head_dim, layer.window
