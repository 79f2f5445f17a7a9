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
Kernels for 4-bit integers and tables, see `Int4`: matrix-vector product and dequantisation.

A tile of 16 rows is stored in the order in which the lanes of a warp hold it for the tensor cores,
see `linear.fragments`. So `_words` loads it straight into registers, `_input` gives the vector the
order of its columns, and `_matrix` moves no data. ``fp4_kernels`` uses these three too.
"""

from physai_decode.engines import compiler
from physai_decode.engines.compiler import gdc_launch_dependents
from physai_decode.engines.compiler import gdc_wait
from physai_decode.engines.native import lookup
from physai_decode.engines.native.kernels import _activated
from physai_decode.engines.native.kernels import _finish
from physai_decode.engines.native.kernels import _store
from physai_decode.engines.native.kernels import Layout
from physai_decode.engines.native.kernels import operand
from physai_decode.engines.native.kernels import TritonOps
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import TILE_ROWS
from torch import Tensor
import triton
import triton.language as tl

# Columns in which the vector of a product with an `Int4` stands, see `_input`.
SIDE = tl.constexpr(compiler.LEAST_COLUMNS)
TUPLES = tl.constexpr(compiler.TUPLES)
LOOKUP = tl.constexpr(lookup.LOOKUP)
FILL_1, FILL_2, FILL_4, FILL_8 = (tl.constexpr(lookup.FILL[warps]) for warps in (1, 2, 4, 8))


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
    TABLE, nibbles are looked up in ``table``, see `lookup`. For a stack, see `kernels._dense`;
    SIZE and STACK are in blocks.
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


def compilable(layouts: tuple[Layout, ...]) -> tuple[Layout, ...]:
    """Return the layouts, of a kernel that copies ahead, that this Triton can compile."""
    if compiler.PIPELINES:
        return layouts
    # Older versions need shared memory for each warp: few fit.
    return tuple(sorted((each for each in layouts if each.stages == 1),
                        key=lambda layout: layout.warps))


# The first of each fits every chip.
INT4_LAYOUTS = tuple(Layout(TILE_ROWS, 0, *each) for each in (
    (4, 1), (4, 3), (4, 2), (4, 0), (8, 0), (8, 1), (8, 2), (2, 3), (2, 4), (1, 1), (1, 3)))
# Of an `Int4` with a table. Its shared memory fits into 48 KiB; with more, a launch would fail.
TABLE_LAYOUTS = compilable(tuple(Layout(tiles * TILE_ROWS, 0, *each) for tiles, *each in (
    (1, 4, 1), (1, 8, 1), (1, 2, 1), (1, 1, 1), (1, 8, 0), (1, 4, 0), (1, 2, 3), (1, 2, 4),
    (1, 1, 3), (2, 4, 1), (4, 4, 1), (2, 8, 1), (2, 8, 0), (2, 4, 2))))
if not compiler.PIPELINES:      # with few warps first, as in `compilable`
    INT4_LAYOUTS = tuple(sorted(INT4_LAYOUTS, key=lambda layout: layout.warps))


def widen(weight: Int4, rows: slice, out: Tensor) -> None:
    """Dequantise some rows of a weight, from a whole tile on, to ``out`` [rows, K]."""
    count, k = out.shape
    blocks = weight.packed.shape[1]
    _dequantise[(triton.cdiv(count, TILE_ROWS), blocks)](
        weight.packed, weight.scales, weight.scales if weight.zeros is None else weight.zeros,
        lookup.table(weight, out.dtype), out, rows.start // TILE_ROWS, count, K=k, BLOCKS=blocks,
        GROUP=weight.group_size, ZEROS=weight.zeros is not None, TABLE=weight.table is not None,
        num_warps=1)


class Int4Ops(TritonOps):
    """The step's operations as kernels, for 4-bit integers and tables too."""

    wideners = {**TritonOps.wideners, Int4: widen}
    _sources = (lookup.__file__,)
    _form_layouts = {
        **TritonOps._form_layouts, 'int4': INT4_LAYOUTS, 'table4': TABLE_LAYOUTS}

    def _candidates(self, shape):
        """See `TritonOps._candidates`; no program has tiles past the end."""
        layouts = super()._candidates(shape)
        if not shape.kind.startswith('table4'):
            return layouts
        tiles = triton.cdiv(shape.n, TILE_ROWS)
        return tuple(each for each in layouts if tiles % (each.rows // TILE_ROWS) == 0)

    def _product(self, x, weight, out, gain, eps, add, gated, gelu=False, routed=None):
        one, whole, ids, routing, joined, each = operand(x, weight, routed, gated)
        if not isinstance(one, Int4):
            super()._product(x, weight, out, gain, eps, add, gated, gelu, routed)
            return
        shape, layout = self._layout(weight, gain, gated)
        if gain is not None or one.order is not None or x.data_ptr() not in self._current:
            x = self._prepared(x, one, gain, eps)
        tiles, blocks = one.packed.shape[:2]
        own, bias = layout.rows // TILE_ROWS, one.bias
        _int4[(tiles // own, each)](
            x, self._sums(x), whole.packed, whole.scales,
            x if whole.zeros is None else whole.zeros, lookup.table(whole, x.dtype),
            x if bias is None else bias, ids, routing, out, self._sums(out) if gated else x,
            shape.n, out.stride(0), K=x.numel(), BLOCKS=joined * blocks, SIZE=blocks,
            STACK=0 if routed is None else tiles * blocks, GROUP=one.group_size, ROWS=layout.rows,
            SPLIT=layout.warps // own, STAGES=layout.stages, GATED=gated, GELU=gelu, ADD=add,
            BIAS=bias is not None, ZEROS=whole.zeros is not None, TABLE=whole.table is not None,
            ASSEMBLY=self._device.type == 'cuda', PDL=self._pdl, **self._launch(layout.warps))
