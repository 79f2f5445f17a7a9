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
The operations of a prefill as Triton kernels, for a chunk of a fixed, padded number of tokens.

The chunk's position and its number of real tokens are read on the device, so a captured chunk runs
anywhere in a context. The products are built for few tokens: weights are the long side of a tensor
core's tile, tokens the short one, and each weight is read once. If the output has too few tiles to
saturate memory bandwidth, the columns are split over programs too (split-K), and the kernel that
reads a product sums the splits: ``parts`` is [splits, tokens, n] in all kernels.

The input of a product with an `Int4` or an `Fp4` is permuted to its fragment order, see `_placed`.
"""

from physai_decode.engines.compiler import gdc_launch_dependents
from physai_decode.engines.compiler import gdc_wait
from physai_decode.engines.native import fp4_kernels
from physai_decode.engines.native.int4_kernels import _looked_up
from physai_decode.engines.native.int4_kernels import _matrix
from physai_decode.engines.native.int4_kernels import _nibble
from physai_decode.engines.native.int4_kernels import _of
from physai_decode.engines.native.int4_kernels import _pairs
from physai_decode.engines.native.kernels import _activated
from physai_decode.engines.native.scaled_kernels import _numbers
import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)        # below all scores; unlike for -inf, x - x is 0
_exact_weights, _fast_weights = fp4_kernels._weights, fp4_kernels._fast_weights


@triton.jit
def _placed(columns):
    """
    Return the position of each input column in fragment order; see `linear.fragments`.

    Within 32 columns, lane * 8 + operand * 4 + high * 2 + low moves to
    operand * 16 + high * 8 + lane * 2 + low, as the tensor cores expect it.
    """
    return (columns // 32 * 32 + columns // 4 % 2 * 16 + columns // 2 % 2 * 8
            + columns // 8 % 4 * 2 + columns % 2)


@triton.jit
def _unplaced(places):
    """Invert `_placed`."""
    return (places // 32 * 32 + places // 2 % 4 * 8 + places // 16 * 4 % 8
            + places // 8 % 2 * 2 + places % 2)


@triton.jit
def _sum_splits(parts, at, inside, stride, bias, columns, PARTS: tl.constexpr, BIAS: tl.constexpr):
    """Sum the splits of a product at offsets ``at``, and add its bias."""
    total = tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * stride + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _embed(table, ids, x, gain, out, eps, K: tl.constexpr, BLOCK: tl.constexpr,
           SCALE: tl.constexpr, PLACED: tl.constexpr, PDL: tl.constexpr):
    """Write a token's embedding to ``x`` [tokens, K], and normalised to ``out``."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    token = tl.load(ids + row)
    v = tl.load(table + token * K + columns, mask=inside, other=0.0).to(tl.float32)
    if SCALE != 1.0:
        v *= SCALE
    tl.store(x + row * K + columns, v, mask=inside)
    _normed(v, gain, out + row * K, columns, inside, eps, K, PLACED)


@triton.jit
def _add(x, parts, bias, own_gain, gain, out, stride, eps, K: tl.constexpr, BLOCK: tl.constexpr,
         PARTS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, PLACED: tl.constexpr,
         PDL: tl.constexpr):
    """
    Add a product to the residual ``x`` [tokens, K], and write the sum normalised to ``out``.

    A program has one row. If NORM, the product is normalised first, by ``own_gain``.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    v = tl.load(x + row * K + columns, mask=inside, other=0.0)
    more = _sum_splits(parts, row * K + columns, inside, stride, bias, columns, PARTS, BIAS)
    if NORM:
        more *= tl.rsqrt(tl.sum(more * more, 0) / K + eps)
        more *= tl.load(own_gain + columns, mask=inside, other=0.0).to(tl.float32)
    v += more
    tl.store(x + row * K + columns, v, mask=inside)
    _normed(v, gain, out + row * K, columns, inside, eps, K, PLACED)


@triton.jit
def _normed(v, gain, out, columns, inside, eps, K: tl.constexpr, PLACED: tl.constexpr):
    v *= tl.rsqrt(tl.sum(v * v, 0) / K + eps)
    v *= tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    if PLACED:
        columns = _placed(columns)
    tl.store(out + columns, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _reorder(x, order, out, K: tl.constexpr, BLOCK: tl.constexpr, PLACED: tl.constexpr,
             PDL: tl.constexpr):
    """Permute ``x`` [tokens, K] to the order of an `Int4`'s columns."""
    row = tl.program_id(0).to(tl.int64) * K
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < K
    columns = places
    if PLACED:
        columns = _unplaced(places)
    source = tl.load(order + columns, mask=inside, other=0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(out + row + places, tl.load(x + row + source, mask=inside), mask=inside)


@triton.jit
def _gate_up(parts, bias, out, first, width, stride, N: tl.constexpr, BLOCK: tl.constexpr,
             PARTS: tl.constexpr, BIAS: tl.constexpr, PAIRED: tl.constexpr, GELU: tl.constexpr,
             PLACED: tl.constexpr, PDL: tl.constexpr):
    """
    Write activation(gate) * up to ``width`` columns of ``out`` [tokens, N], from ``first`` on.

    ``parts`` is [splits, tokens, 2 * width]. If PAIRED, gate and up alternate every 8 columns, as
    in an `Int4`; otherwise ``width`` is N.
    """
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate_at, further = columns, N
    if PAIRED:
        gate_at = columns // 8 * 16 + columns % 8
        further = 8
    at = tl.program_id(0).to(tl.int64) * 2 * width + gate_at
    column = 2 * first + gate_at
    gate = _sum_splits(parts, at, inside, stride, bias, column, PARTS, BIAS)
    up = _sum_splits(parts, at + further, inside, stride, bias, column + further, PARTS, BIAS)
    columns += first
    if PLACED:
        columns = _placed(columns)
    tl.store(out + tl.program_id(0).to(tl.int64) * N + columns,
             (_activated(gate, GELU) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _place(slots, owners, tokens, held, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
           PDL: tl.constexpr):
    """
    Return a program's tile of weights, and its rows of the input and of the output.

    If EXPERTS, ``tokens`` are those of all blocks, see `routing_kernels._arrange`; a slot is a
    row of the output, and modulo ``held``, the rows of the input, one of the input. Also return
    the expert, and whether there is one; a row of the output below 0 is none.
    """
    # Programs that share a tile of weights have adjacent ids, so that they run together.
    blocks = tl.cdiv(tokens, TOKENS)
    block = tl.program_id(0) % blocks
    at = block * TOKENS + tl.arange(0, TOKENS)
    if EXPERTS:
        if PDL:
            gdc_wait()
        expert = tl.load(owners + block)
        slot = tl.where(expert < 0, -1, tl.load(slots + at))
        return (tl.program_id(0) // blocks, tl.maximum(slot, 0) % held, slot,
                tl.maximum(expert, 0).to(tl.int64), expert >= 0)
    else:
        return tl.program_id(0) // blocks, at, at, 0, True


@triton.jit
def _split_range(steps, used, EXPERTS: tl.constexpr):
    """Return the range of steps of this program's split; if EXPERTS, an empty one if not used."""
    each = tl.cdiv(steps, tl.num_programs(1))
    begin = tl.program_id(1) * each
    end = tl.minimum(steps, begin + each)
    if EXPERTS:
        end = tl.where(used, end, begin)
    return begin, end


@triton.jit
def _dense(x, weight, bias, out, slots, owners, routing, first, n, k, tokens, held, width,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
           PAIRED: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr,
           PLACED: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr):
    """
    Multiply ``x`` [tokens, k] by rows of ``weight`` [n, k], from ``first`` on.

    ``k`` is a multiple of COLUMNS. ``out`` is [splits, tokens, width]. If PAIRED, a tile
    interleaves 8 rows of the first half (gate) and 8 of the second (up). If GATED, ``out`` is
    activation(gate) * up, after ``bias`` is added. If EXPERTS, ``weight`` is a stack, and a row of
    ``x`` is multiplied by those that are assigned to it; see `_place`.
    """
    block, at, place, expert, used = _place(slots, owners, tokens, held, TOKENS, EXPERTS, PDL)
    begin, end = _split_range(k // COLUMNS, used, EXPERTS)
    if EXPERTS:
        weight += expert * n * k
    rows = first + block * ROWS + tl.arange(0, ROWS)
    # Rows past the end are clamped to the last row, so the loop needs no row mask.
    source = tl.minimum(rows, n - 1)
    if PAIRED:
        source = tl.minimum(rows // 16 * 8 + rows % 8, n // 2 - 1) + rows // 8 % 2 * (n // 2)
    columns = tl.arange(0, COLUMNS)
    row = weight + source.to(tl.int64)[:, None] * k + columns[None, :]
    column = x + at[None, :] * k + columns[:, None]
    result = tl.zeros((ROWS, TOKENS), tl.float32)
    if PDL:
        gdc_wait()
    for step in tl.range(begin, end, num_stages=STAGES):
        w = tl.load(row + step * COLUMNS)
        v = tl.load(column + step * COLUMNS)
        result = tl.dot(w, v, result, input_precision='ieee')
    if PDL:
        gdc_launch_dependents()
    if BIAS:
        result += tl.load(bias + source).to(tl.float32)[:, None]
    _store(out, result, block, place, routing, n - first, tokens, width, GATED, GELU, PLACED,
           EXPERTS)


@triton.jit
def _scaled(x, values, scales, zeros, bias, out, slots, owners, routing, first, n, k, tokens, held,
            width, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            TOKENS: tl.constexpr, STAGES: tl.constexpr, FLOAT: tl.constexpr, ZEROS: tl.constexpr,
            BY_ROW: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr,
            PLACED: tl.constexpr, ASSEMBLY: tl.constexpr, EXPERTS: tl.constexpr,
            PDL: tl.constexpr):
    """
    Multiply ``x`` [tokens, k] by rows of a `Scaled` [n, k]; see `_dense`.

    GROUP is a multiple of COLUMNS. BY_ROW, there is one scale per row, and no zeros.
    """
    block, at, place, expert, used = _place(slots, owners, tokens, held, TOKENS, EXPERTS, PDL)
    begin, end = _split_range(k // COLUMNS, used, EXPERTS)
    own = tl.minimum(first + block * ROWS + tl.arange(0, ROWS), n - 1)
    if EXPERTS:
        own += expert * n
    columns = tl.arange(0, COLUMNS)
    row = values + own.to(tl.int64)[:, None] * k + columns[None, :]
    column = x + at[None, :] * k + columns[:, None]
    group = own * tl.cdiv(k, GROUP)
    scale = tl.load(scales + group)
    result = tl.zeros((ROWS, TOKENS), tl.float32)
    if PDL:
        gdc_wait()
    for step in tl.range(begin, end, num_stages=STAGES):
        w = _whole_numbers(tl.load(row + step * COLUMNS), x.dtype.element_ty, FLOAT, ASSEMBLY)
        v = tl.load(column + step * COLUMNS)
        if not BY_ROW:
            scale = tl.load(scales + group + step * COLUMNS // GROUP)
            if ZEROS:
                w -= tl.load(zeros + group + step * COLUMNS // GROUP).to(w.dtype)[:, None]
        # Scaled at each step: Triton would leave half of a product that is only added up in
        # flight, while the next step overwrites the registers of its weights.
        result += tl.dot(w, v, input_precision='ieee') * scale[:, None]
    if PDL:
        gdc_launch_dependents()
    if FLOAT:
        result *= 256.0
    if BIAS:
        result += tl.load(bias + own).to(tl.float32)[:, None]
    _store(out, result, block, place, routing, n - first, tokens, width, GATED, GELU, PLACED,
           EXPERTS)


@triton.jit
def _whole_numbers(values, KIND: tl.constexpr, FLOAT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Convert int8 to KIND; if FLOAT, from the bits of E4M3 floats, times 2^-8. All are exact."""
    if FLOAT:
        return _numbers(values, FLOAT, ASSEMBLY).to(KIND)
    else:
        return values.to(KIND)


@triton.jit
def _gated(result, GELU: tl.constexpr):
    """Return activation(gate) * up of a tile [rows, tokens] that interleaves 8 rows of each."""
    TILES: tl.constexpr = result.shape[0] // 16
    TOKENS: tl.constexpr = result.shape[1]
    result = tl.permute(tl.reshape(result, (TILES, 2, 8, TOKENS)), (0, 2, 3, 1))
    gate, up = tl.split(result)
    return tl.reshape(_activated(gate, GELU) * up, (8 * TILES, TOKENS))


@triton.jit
def _store(out, result, block, at, routing, n, tokens, width, GATED: tl.constexpr,
           GELU: tl.constexpr, PLACED: tl.constexpr, EXPERTS: tl.constexpr):
    """
    Write tile ``block`` [rows, tokens], of n rows, to ``out`` [splits, tokens, width].

    If EXPERTS, rows of ``out`` below 0 are left out, and gated ones are times ``routing``.
    """
    if GATED:
        result = _gated(result, GELU)
        n = n // 2
    rows = block * result.shape[0] + tl.arange(0, result.shape[0])
    inside = (rows < n)[None, :]
    if EXPERTS:
        inside &= (at >= 0)[:, None]
        if GATED:
            result *= tl.load(routing + at, mask=at >= 0, other=0.0)[None, :]
    if PLACED:
        rows = _placed(rows)
    place = out + (tl.program_id(1) * tokens + at).to(tl.int64)[:, None] * width + rows[None, :]
    tl.store(place, tl.trans(result).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weights(words, four, zero, NUMBER: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr,
             ASSEMBLY: tl.constexpr):
    """Dequantise nibble NUMBER of words [2, TILES, 256] to [16 * TILES, 32] of KIND."""
    w = _fragments(_nibble(words, NUMBER, KIND, ASSEMBLY))
    point = _zero_point(zero, NUMBER, KIND, ZEROS, ASSEMBLY)
    w = _whole(w, NUMBER, KIND, ASSEMBLY) - point[:, None]
    return w * _of(four, NUMBER).to(KIND)[:, None]


@triton.jit
def _fragments(words):
    """
    Reshape fragments [2, TILES, 256] to [16 * TILES, 32].

    No data moves between lanes: a lane's words are its fragments for the tensor cores.
    """
    TILES: tl.constexpr = words.shape[1]
    w = tl.reshape(words, (2, TILES, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(w, (1, 5, 2, 0, 4, 3, 6)), (16 * TILES, 32))


@triton.jit
def _whole(w, NUMBER: tl.constexpr, KIND: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Remove the factor that `_nibble` leaves; exact, since values are small integers."""
    if ASSEMBLY and KIND == tl.float16:
        if NUMBER % 2:
            w *= tl.full((1,), 1.0 / 16, KIND)
    return w


@triton.jit
def _zero_point(zero, NUMBER: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr,
                ASSEMBLY: tl.constexpr):
    """Return the zero point in terms of `_whole`, with the offset that `_nibble` leaves; exact."""
    point = tl.full(zero.shape, 8.0, tl.float32)
    if ZEROS:
        point = _of(zero, NUMBER)
    if ASSEMBLY and KIND == tl.bfloat16:
        point += 128.0
    elif ASSEMBLY and KIND == tl.float16:
        point += 64.0 if NUMBER % 2 else 1024.0
    return point.to(KIND)


@triton.jit
def _tiles(index, n, expert, EXPERTS: tl.constexpr):
    """Return tiles of 16 of an expert's n rows; instead of those past the end, the last."""
    count = tl.cdiv(n, 16)
    tiles = tl.minimum(index, count - 1).to(tl.int64)
    if EXPERTS:
        tiles += expert * count
    return tiles


@triton.jit
def _words(packed, tiles, blocks, GROUP: tl.constexpr):
    """Return pointers [2, tiles, 256] to the first words of tiles."""
    return (packed + tiles[None, :, None] * blocks * (16 * GROUP)
            + tl.arange(0, 2)[:, None, None] * 256 + tl.arange(0, 256)[None, None, :])


@triton.jit
def _inputs(x, at, columns, k, EXACT: tl.constexpr):
    """Load rows ``at`` of ``x`` [tokens, k], transposed; unless EXACT, columns from k on are 0."""
    place = x + at[None, :] * k + columns[:, None]
    if EXACT:
        return tl.load(place)
    else:
        return tl.load(place, mask=(columns < k)[:, None], other=0.0)


@triton.jit
def _int4(x, packed, scales, zeros, table, bias, out, slots, owners, routing, first, n, k, blocks,
          tokens, held, width, GROUP: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
          TOKENS: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr, GATED: tl.constexpr,
          GELU: tl.constexpr, BIAS: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr,
          PLACED: tl.constexpr, ASSEMBLY: tl.constexpr, EXPERTS: tl.constexpr,
          PDL: tl.constexpr):
    """
    Multiply ``x`` [tokens, k], in fragment order, by rows of an `Int4` [n, k]; see `_dense`.

    A step reads the words of 32 columns of each of a block's four groups. If EXACT, all blocks are
    full. For TABLE and WARPS, see `int4_kernels._int4` and `int4_kernels._pairs`.
    """
    STEPS: tl.constexpr = GROUP // 32
    turn, at, place, expert, used = _place(slots, owners, tokens, held, TOKENS, EXPERTS, PDL)
    tile = first // 16 + turn * TILES
    tiles = _tiles(tile + tl.arange(0, TILES), n, expert, EXPERTS)
    begin, end = _split_range(blocks * STEPS, used, EXPERTS)
    columns = tl.arange(0, 32)
    word = _words(packed, tiles, blocks, GROUP)
    each = tl.arange(0, 16 * TILES)
    row = _tiles(tile + each // 16, n, expert, EXPERTS) * blocks * 16 + each % 16
    result = tl.zeros((16 * TILES, TOKENS), tl.float32)
    pairs = _pairs(x, table, WARPS, TABLE, ASSEMBLY)
    if PDL:
        gdc_wait()
    for step in tl.range(begin, end, num_stages=STAGES):
        words = tl.load(word + step * 512)
        if TABLE:
            w0, w1, w2, w3 = _looked_up(words, table, pairs, x.dtype.element_ty, ASSEMBLY)
        # Load four float16 as one int64.
        block = step // STEPS
        four = tl.load(scales.to(tl.pointer_type(tl.int64)) + row + block * 16)
        zero = four
        if ZEROS:
            zero = tl.load(zeros.to(tl.pointer_type(tl.int64)) + row + block * 16)
        # One dot per group: Triton would leave half of a wider one in flight, while the next step
        # overwrites the registers of its weights.
        for number in tl.static_range(4):
            column = (block * 4 + number) * GROUP + step % STEPS * 32 + columns
            v = _inputs(x, at, column, k, EXACT)
            if TABLE:
                w = w0 if number == 0 else w1 if number == 1 else w2 if number == 2 else w3
                w = _fragments(w) * _of(four, number).to(v.dtype)[:, None]
            else:
                w = _weights(words, four, zero, number, v.dtype, ZEROS, ASSEMBLY)
            result = tl.dot(w, v, result, input_precision='ieee')
    if PDL:
        gdc_launch_dependents()
    if BIAS:
        own = first + turn * (16 * TILES) + each
        result += tl.load(bias + own, mask=own < n, other=0.0).to(tl.float32)[:, None]
    _store(out, result, turn, place, routing, n - first, tokens, width, GATED, GELU, PLACED,
           EXPERTS)


@triton.jit
def _fp4(x, packed, scales, factors, bias, out, slots, owners, routing, first, n, k, blocks,
         tokens, held, width, GROUP: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr,
         STAGES: tl.constexpr, EXACT: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
         BIAS: tl.constexpr, PLACED: tl.constexpr, ASSEMBLY: tl.constexpr, EXPERTS: tl.constexpr,
         PDL: tl.constexpr):
    """Multiply ``x`` [tokens, k], in fragment order, by rows of an `Fp4` [n, k]; see `_int4`."""
    STEPS: tl.constexpr = GROUP // 32
    turn, at, place, expert, used = _place(slots, owners, tokens, held, TOKENS, EXPERTS, PDL)
    tile = first // 16 + turn * TILES
    tiles = _tiles(tile + tl.arange(0, TILES), n, expert, EXPERTS)
    begin, end = _split_range(blocks * STEPS, used, EXPERTS)
    columns = tl.arange(0, 32)
    lane = tl.arange(0, 64)
    word = _words(packed, tiles, blocks, GROUP)
    scale = (scales + tiles[None, :, None] * blocks * GROUP
             + (lane // 4 * 2 + lane % 2)[None, None, :])
    result = tl.zeros((16 * TILES, TOKENS), tl.float32)
    if PDL:
        gdc_wait()
    for step in tl.range(begin, end, num_stages=STAGES):
        own = tl.permute(tl.load(scale + step * 32), (1, 0, 2))
        words = tl.permute(tl.load(word + step * 512), (1, 0, 2))
        for number in tl.static_range(4):       # one product at a time, as in `_int4`
            column = (step // STEPS * 4 + number) * GROUP + step % STEPS * 32 + columns
            v = _inputs(x, at, column, k, EXACT)
            if ASSEMBLY and v.dtype != tl.float32:
                w = _fast_weights(words, own, number, v.dtype)
            else:
                w = _exact_weights(words, own, number, v.dtype)
            w = tl.reshape(_matrix(w), (16 * TILES, 32))
            result = tl.dot(w, v, result, input_precision='ieee')
    if PDL:
        gdc_launch_dependents()
    own = first + turn * (16 * TILES) + tl.arange(0, 16 * TILES)
    if EXPERTS:
        factors += expert * n
    factor = tl.load(factors + own, mask=own < n, other=0.0)
    if ASSEMBLY and x.dtype.element_ty == tl.float16:       # what `_fast_weights` leaves
        factor *= 2.0 ** 14
    elif ASSEMBLY and x.dtype.element_ty == tl.bfloat16:
        factor *= 2.0 ** 8
    result *= factor[:, None]
    if BIAS:
        result += tl.load(bias + own, mask=own < n, other=0.0).to(tl.float32)[:, None]
    _store(out, result, turn, place, routing, n - first, tokens, width, GATED, GELU, PLACED,
           EXPERTS)


@triton.jit
def _unpack(packed, scales, zeros, out, first, rows, k, blocks, GROUP: tl.constexpr,
            TILES: tl.constexpr, ZEROS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """
    Dequantise a block of TILES tiles to ``out`` [rows, k], from tile ``first`` on; TILES warps.

    A lane's words of a row are 8 adjacent columns, so no data moves between lanes.
    """
    PAIRS: tl.constexpr = GROUP // 32
    KIND: tl.constexpr = out.dtype.element_ty
    block = tl.program_id(1)
    last = tl.cdiv(rows, 16) - 1
    local = tl.minimum(tl.program_id(0) * TILES + tl.arange(0, TILES), last)
    words = tl.load(packed + ((first + local).to(tl.int64)[None, :, None] * blocks + block)
                    * (16 * GROUP) + tl.arange(0, 2 * PAIRS)[:, None, None] * 256
                    + tl.arange(0, 256)[None, None, :])
    half, each = tl.arange(0, 2)[:, None], tl.arange(0, 8 * TILES)[None, :]
    own = (tl.program_id(0) * TILES + each // 8) * 16 + half * 8 + each % 8
    at = (first + tl.minimum(own // 16, last)).to(tl.int64) * blocks + block
    four = tl.load(scales.to(tl.pointer_type(tl.int64)) + at * 16 + own % 16)
    zero = four
    if ZEROS:
        zero = tl.load(zeros.to(tl.pointer_type(tl.int64)) + at * 16 + own % 16)
    column = tl.arange(0, PAIRS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    for number in tl.static_range(4):
        w = tl.reshape(_nibble(words, number, KIND, ASSEMBLY), (PAIRS, 2, TILES, 8, 4, 2, 2, 2))
        # pair, operand, tile, row, lane, high, half, low
        w = tl.reshape(tl.permute(w, (0, 6, 2, 3, 4, 1, 5, 7)), (PAIRS, 2, 8 * TILES, 32))
        w = (_whole(w, number, KIND, ASSEMBLY)
             - _zero_point(zero, number, KIND, ZEROS, ASSEMBLY)[None, :, :, None])
        w *= _of(four, number).to(KIND)[None, :, :, None]
        columns = ((block * 4 + number) * GROUP + column)[:, None, None, :]
        tl.store(out + own.to(tl.int64)[None, :, :, None] * k + columns, w,
                 mask=(own < rows)[None, :, :, None] & (columns < k))


@triton.jit
def _rotated(parts, at, stride, bias, column, gain, cos, sin, dims, eps, inside, D: tl.constexpr,
             PARTS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr):
    """Load heads of a product at ``at``, normalise and rotate them; returns both halves."""
    half: tl.constexpr = D // 2
    low = _sum_splits(parts, at, inside, stride, bias, column, PARTS, BIAS)
    high = _sum_splits(parts, at + half, inside, stride, bias, column + half, PARTS, BIAS)
    if NORM:
        scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / D + eps)[:, None]
        low *= scale * tl.load(gain + dims, mask=dims < half, other=0.0).to(tl.float32)
        high *= scale * tl.load(gain + half + dims, mask=dims < half, other=0.0).to(tl.float32)
    c = tl.load(cos + dims, mask=dims < half, other=0.0)
    s = tl.load(sin + dims, mask=dims < half, other=0.0)
    return low * c - high * s, high * c + low * s


@triton.jit
def _store_head(out, low, high, inside, D: tl.constexpr):
    tl.store(out, low.to(out.dtype.element_ty), mask=inside)
    tl.store(out + D // 2, high.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(parts, bias, keys, values, q, start, count, cos, sin, q_gain, k_gain, stride,
            max_context, eps, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, FIRST: tl.constexpr,
            ROWS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, PARTS: tl.constexpr,
            BIAS: tl.constexpr, NORM: tl.constexpr, BETA: tl.constexpr, LENGTH: tl.constexpr,
            PDL: tl.constexpr):
    """
    Rotate ROWS heads of a token: write queries to ``q`` [tokens, HEADS * D], keys to the KV cache.

    Values are copied to the cache. ``parts`` is [splits, tokens, (HEADS + 2 * KV_HEADS) * D];
    heads before FIRST are skipped. Keys and values of padding tokens are not written. DIMS is half
    a head, rounded up to a power of 2. BETA and LENGTH are ``beta`` and ``context`` of `Growth`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    begin = FIRST + tl.program_id(1) * ROWS
    heads = begin + tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, DIMS)[None, :]
    place = tl.minimum(tl.load(start) + row, max_context - 1)
    real = row < tl.load(count)
    cos += place * (D // 2)
    sin += place * (D // 2)
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    column = heads * D + dims
    at = row.to(tl.int64) * (ALL * D) + column
    known = dims < D // 2
    if begin < HEADS:
        inside = known & (heads < HEADS)
        low, high = _rotated(parts, at, stride, bias, column, q_gain, cos, sin, dims, eps, inside,
                             D, PARTS, BIAS, NORM)
        if BETA > 0:
            growth = 1.0 + BETA * tl.log(1.0 + place // LENGTH)
            low *= growth
            high *= growth
        _store_head(q + row.to(tl.int64) * (HEADS * D) + column, low, high, inside, D)
    cache = (heads - HEADS).to(tl.int64) * max_context * D + place * D + dims
    if (begin + ROWS > HEADS) & (begin < HEADS + KV_HEADS):
        inside = known & (heads >= HEADS) & (heads < HEADS + KV_HEADS)
        low, high = _rotated(parts, at, stride, bias, column, k_gain, cos, sin, dims, eps, inside,
                             D, PARTS, BIAS, NORM)
        _store_head(keys + cache, low, high, inside & real, D)
    if begin + ROWS > HEADS + KV_HEADS:
        inside = known & (heads >= HEADS + KV_HEADS) & (heads < ALL)
        low = _sum_splits(parts, at, inside, stride, bias, column, PARTS, BIAS)
        high = _sum_splits(parts, at + D // 2, inside, stride, bias, column + D // 2, PARTS, BIAS)
        cache -= KV_HEADS * max_context.to(tl.int64) * D
        _store_head(values + cache, low, high, inside & real, D)


@triton.jit
def _attend_range(q, sums, totals, maxima, keys, values, begin, end, place, scale, D: tl.constexpr,
                  DIMS: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
                  STAGES: tl.constexpr):
    """Attend from q [M, DIMS] at positions ``place`` [M] to the cache, ``begin`` to ``end``."""
    dims = tl.arange(0, DIMS)
    for token in tl.range(begin, end, N, num_stages=STAGES):
        tokens = token + tl.arange(0, N)
        at = tokens.to(tl.int64)[:, None] * D + dims[None, :]
        if MASKED or D < DIMS:
            live = (tokens < end)[:, None] & (dims < D)[None, :]
            k = tl.load(keys + at, mask=live, other=0.0)
            v = tl.load(values + at, mask=live, other=0.0)
        else:
            k = tl.load(keys + at)
            v = tl.load(values + at)
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
        if MASKED:
            seen = (tokens[None, :] <= place[:, None]) & (tokens < end)[None, :]
            if WINDOW > 0:
                seen &= tokens[None, :] > place[:, None] - WINDOW
            scores = tl.where(seen, scores, float('-inf'))
        highest = tl.maximum(maxima, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        fade = tl.exp2(maxima - highest)
        totals = totals * fade + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision='ieee')
        maxima = highest
    return sums, totals, maxima


@triton.jit
def _attend(q, keys, values, start, count, out, part_sums, part_maxima, part_totals, max_context,
            tokens, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
            DIMS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
            WINDOW: tl.constexpr, STAGES: tl.constexpr, PLACED: tl.constexpr,
            PDL: tl.constexpr):
    """
    Attend from M queries of one key-value head to one split of their context.

    ``q`` and ``out`` are [tokens, HEADS * D]; a row of the tile is one of a token's GROUP queries.
    With several SPLITS, `_join` merges the splits' sums. ``scale`` includes log2(e), for exp2.
    """
    if PDL:
        gdc_wait()
    block = tl.num_programs(0) - 1 - tl.program_id(0)      # longest first
    kv_head = tl.program_id(1)
    share = tl.program_id(2)
    first = tl.load(start).to(tl.int32)
    real = tl.load(count).to(tl.int32)
    rows = block * M + tl.arange(0, M)
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, DIMS)
    inside = (token < tokens)[:, None] & (dims < D)[None, :]
    at = token.to(tl.int64) * HEADS + head
    place = first + token
    low = block * M // GROUP
    high = tl.minimum((block * M + M - 1) // GROUP, real - 1)
    if low < real:
        stop = first + high + 1
        since = 0
        if WINDOW > 0:
            since = tl.maximum(0, first + low + 1 - WINDOW)
        length = tl.cdiv(tl.cdiv(stop - since, SPLITS), N) * N
        begin = since + share * length
        end = tl.minimum(stop, begin + length)
        values_q = tl.load(q + at[:, None] * D + dims[None, :], mask=inside, other=0.0)
        maxima = tl.full((M,), LOWEST, tl.float32)
        totals = tl.zeros((M,), tl.float32)
        sums = tl.zeros((M, DIMS), tl.float32)
        cache = kv_head.to(tl.int64) * max_context * D
        # Positions that all rows attend to need no mask.
        clear = begin
        if WINDOW == 0:
            clear += tl.maximum(0, tl.minimum(end, first + low + 1) - begin) // N * N
            sums, totals, maxima = _attend_range(
                values_q, sums, totals, maxima, keys + cache, values + cache, begin, clear, place,
                scale, D, DIMS, N, WINDOW, False, STAGES)
        sums, totals, maxima = _attend_range(
            values_q, sums, totals, maxima, keys + cache, values + cache, clear, end, place,
            scale, D, DIMS, N, WINDOW, True, STAGES)
        if PDL:
            gdc_launch_dependents()
        if SPLITS == 1:
            result = sums / tl.where(totals == 0, 1.0, totals)[:, None]
            column = (head * D)[:, None] + dims[None, :]
            if PLACED:
                column = _placed(column)
            tl.store(out + token.to(tl.int64)[:, None] * (HEADS * D) + column,
                     result.to(out.dtype.element_ty), mask=inside)
        else:
            slot = share.to(tl.int64) * tokens * HEADS + at
            tl.store(part_maxima + slot, maxima, mask=token < tokens)
            tl.store(part_totals + slot, totals, mask=token < tokens)
            seen = inside & (end > begin)
            tl.store(part_sums + slot[:, None] * D + dims[None, :], sums, mask=seen)


@triton.jit
def _join(part_sums, part_maxima, part_totals, count, out, tokens, HEADS: tl.constexpr,
          ROWS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr,
          PLACED: tl.constexpr, PDL: tl.constexpr):
    """Merge the splits of ROWS heads of a token."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    if row < tl.load(count):
        heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        dims = tl.arange(0, DIMS)
        known = heads < HEADS
        slot = row.to(tl.int64) * HEADS + heads
        further = tokens.to(tl.int64) * HEADS
        shares = tl.arange(0, SPLITS)[:, None] * further + slot[None, :]
        maxima = tl.load(part_maxima + shares, mask=known[None, :], other=LOWEST)
        totals = tl.load(part_totals + shares, mask=known[None, :], other=0.0)
        highest = tl.max(maxima, 0)
        totals = tl.sum(totals * tl.exp2(maxima - highest[None, :]), 0)
        sums = tl.zeros((ROWS, DIMS), tl.float32)
        for share in tl.static_range(SPLITS):
            at = share * further + slot
            # A split without tokens has written no sums.
            seen = known & (tl.load(part_totals + at, mask=known, other=0.0) > 0)
            part = tl.load(part_sums + at[:, None] * D + dims[None, :],
                           mask=seen[:, None] & (dims < D)[None, :], other=0.0)
            maximum = tl.load(part_maxima + at, mask=known, other=LOWEST)
            sums += part * tl.exp2(maximum - highest)[:, None]
        column = (heads * D)[:, None] + dims[None, :]
        if PLACED:
            column = _placed(column)
        result = sums / tl.where(totals == 0, 1.0, totals)[:, None]
        tl.store(out + row.to(tl.int64) * (HEADS * D) + column, result.to(out.dtype.element_ty),
                 mask=known[:, None] & (dims < D)[None, :])


@triton.jit
def _last(x, parts, bias, start, count, row_x, row_qkv, place, stride, hidden, n,
          BLOCK: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr):
    """Copy the last real token's ``x``, query, key, value and position."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(count) - 1
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + row * hidden + columns, mask=columns < hidden, other=0.0)
    tl.store(row_x + columns, v, mask=columns < hidden)
    v = _sum_splits(parts, row * n + columns, columns < n, stride, bias, columns, PARTS, BIAS)
    tl.store(row_qkv + columns, v, mask=columns < n)
    tl.store(place, tl.load(start) + row)
