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
The operations of a pass of several rows as Triton kernels; the reference of each is in ``ops``.

A step is a pass of one row. The bits of a row do not depend on the number of rows: it is an
argument of the same compiled kernel, in which only `tl.fma` fuses multiplications with additions,
as the compiler might do so for some rows only. Products use the tensor cores, with a row of the
pass in each column, so the weights are read once for all rows. Unused columns repeat the last row.

For ``PDL``, see ``kernels``.
"""

from functools import partial

from physai_decode.engines import compiler
from physai_decode.engines.compiler import gdc_launch_dependents
from physai_decode.engines.compiler import gdc_wait
from physai_decode.engines.native import lookup
from physai_decode.engines.native.fp4_kernels import _sums
from physai_decode.engines.native.fp4_kernels import FP4_LAYOUTS
from physai_decode.engines.native.fp4_kernels import Fp4Ops
from physai_decode.engines.native.int4_kernels import _block
from physai_decode.engines.native.int4_kernels import _pairs
from physai_decode.engines.native.int4_kernels import _tile
from physai_decode.engines.native.int4_kernels import SIDE
from physai_decode.engines.native.kernels import _activated
from physai_decode.engines.native.kernels import _add_normed
from physai_decode.engines.native.kernels import _fetch
from physai_decode.engines.native.kernels import _join
from physai_decode.engines.native.kernels import _prepare
from physai_decode.engines.native.kernels import _rotated
from physai_decode.engines.native.kernels import Layout
from physai_decode.engines.native.kernels import TILE_TOKENS
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import TILE_ROWS
from physai_decode.engines.sampling import ROWS
import torch
import triton
import triton.language as tl

MOST_ROWS = tl.constexpr(ROWS)


@triton.jit
def _embed_rows(table, token, x, hidden, BLOCK: tl.constexpr, SCALE: tl.constexpr,
                PDL: tl.constexpr):
    """Write the rows of ``table`` for all tokens to ``x``; padding gets row 0."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.maximum(tl.load(token + tl.program_id(1)), 0).to(tl.int64)
    values = tl.load(table + row * hidden + columns, mask=columns < hidden)
    if SCALE != 1.0:
        values = values.to(tl.float32) * SCALE
    tl.store(x + tl.program_id(1) * hidden + columns, values.to(tl.float32),
             mask=columns < hidden)


@triton.jit
def _prepare_rows(x, gain, order, out, out_sums, eps, K: tl.constexpr, WIDE: tl.constexpr,
                  BLOCK: tl.constexpr, NORM: tl.constexpr, ORDERED: tl.constexpr,
                  PDL: tl.constexpr):
    """Run `_prepare` for each row."""
    row = tl.program_id(1)
    _prepare(x + row * K, gain, order, out + row * K, out_sums + row * ((K + 7) // 8), eps, K,
             WIDE, BLOCK, NORM, ORDERED, PDL)


@triton.jit
def _add_normed_rows(branch, gain, x, eps, K: tl.constexpr, WIDE: tl.constexpr,
                     BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Run `_add_normed` for each row."""
    row = tl.program_id(1)
    _add_normed(branch + row * K, gain, x + row * K, eps, K, WIDE, BLOCK, PDL)


@triton.jit
def _column(pointers, k, columns, K: tl.constexpr, WIDTH: tl.constexpr):
    """Load WIDTH of K columns from ``k`` on; ``columns`` are their offsets in the tile."""
    if K % WIDTH == 0:
        return tl.load(pointers + k)
    else:
        return tl.load(pointers + k, mask=k + columns < K, other=0.0)


@triton.jit(do_not_specialize=['rows'])
def _dense_rows(x, weight, bias, out, n, rows, K: tl.constexpr, TILE: tl.constexpr,
                COLUMNS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
                GATED: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
                PDL: tl.constexpr):
    """
    Multiply ``weight`` [n, K] (gated: [2 n, K]) by ``x`` [rows, K]; TILE rows per program.

    SPLIT warps share the columns, and their sums are added at the end.
    """
    tile = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # Rows past the end read the last row again: no mask in the loop.
    row = tl.minimum(tile, n - 1).to(tl.int64) * K
    each = tl.arange(0, SIDE)
    source = tl.minimum(each, rows - 1) * K
    columns = tl.arange(0, COLUMNS)
    WIDTH: tl.constexpr = SPLIT * COLUMNS
    up = n.to(tl.int64) * K
    kind = weight.dtype.element_ty
    if PDL:
        gdc_wait()
    if SPLIT == 1:
        w_at = weight + row[:, None] + columns[None, :]
        v_at = x + source[None, :] + columns[:, None]
        sums = tl.zeros((TILE, SIDE), tl.float32)
        more = tl.zeros((TILE, SIDE), tl.float32)
        for k in tl.range(0, K, WIDTH, num_stages=STAGES):
            w = _column(w_at, k, columns[None, :], K, WIDTH)
            v = _column(v_at, k, columns[:, None], K, WIDTH).to(kind)
            sums = tl.dot(w, v, sums, input_precision='ieee')
            if GATED:
                u = _column(w_at + up, k, columns[None, :], K, WIDTH)
                more = tl.dot(u, v, more, input_precision='ieee')
    else:
        column = tl.arange(0, SPLIT)[:, None] * COLUMNS + columns[None, :]
        w_at = weight + row[None, :, None] + column[:, None, :]
        v_at = x + source[None, None, :] + column[:, :, None]
        parts = tl.zeros((SPLIT, TILE, SIDE), tl.float32)
        more_parts = tl.zeros((SPLIT, TILE, SIDE), tl.float32)
        for k in tl.range(0, K, WIDTH, num_stages=STAGES):
            w = _column(w_at, k, column[:, None, :], K, WIDTH)
            v = _column(v_at, k, column[:, :, None], K, WIDTH).to(kind)
            parts = tl.dot(w, v, parts, input_precision='ieee')
            if GATED:
                u = _column(w_at + up, k, column[:, None, :], K, WIDTH)
                more_parts = tl.dot(u, v, more_parts, input_precision='ieee')
        sums = tl.sum(parts, 0)
        more = tl.sum(more_parts, 0)
    if PDL:
        gdc_launch_dependents()
    if BIAS:
        sums += tl.load(bias + tile, mask=tile < n, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if BIAS:
            more += tl.load(bias + n + tile, mask=tile < n, other=0.0).to(tl.float32)[:, None]
        sums = _activated(sums, GELU) * more
    _store_rows(out, tile, n, rows, sums, ADD)


@triton.jit
def _store_rows(out, tile, n, rows, values, ADD: tl.constexpr):
    """Write (or add) ``values`` [tile, SIDE] to ``out`` [rows, n]."""
    each = tl.arange(0, SIDE)
    at = out + each[None, :] * n + tile[:, None]
    inside = (each < rows)[None, :] & (tile < n)[:, None]
    if ADD:
        values += tl.load(at, mask=inside, other=0.0)
    tl.store(at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['rows'])
def _int4_rows(x, sums, packed, scales, zeros, table, bias, out, out_sums, n, rows,
               K: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
               AHEAD: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
               BIAS: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr,
               ASSEMBLY: tl.constexpr, PDL: tl.constexpr):
    """
    Multiply an `Int4` [n, K] by ``x`` [rows, K], like `int4_kernels._int4`; 16 rows per program.

    If AHEAD, the next words are requested before the current ones are multiplied, which takes
    twice the registers. If there are two tiles of words, both are requested before the previous
    kernel has ended.
    """
    program = tl.program_id(0).to(tl.int64)
    result = tl.zeros((SPLIT, 16, SIDE), tl.float32)
    if AHEAD:
        LAST: tl.constexpr = (BLOCKS - 1) // SPLIT * SPLIT
        words, four, zero = _tile(packed, scales, zeros, packed, program, 0, BLOCKS, BLOCKS, 0,
                                  GROUP, SPLIT, ZEROS)
        if LAST == SPLIT:
            next_words, next_four, next_zero = _tile(
                packed, scales, zeros, packed, program, SPLIT, BLOCKS, BLOCKS, 0, GROUP, SPLIT,
                ZEROS)
        pairs = _pairs(x, table, SPLIT, TABLE, ASSEMBLY)
        if PDL:
            gdc_wait()
        if LAST == SPLIT:
            result = _block(result, x, sums, words, four, zero, table, pairs, 0, rows, K, GROUP,
                            SPLIT, False, ZEROS, TABLE, ASSEMBLY)
            words, four, zero = next_words, next_four, next_zero
        else:
            for first in tl.range(0, LAST, SPLIT, num_stages=1):
                next_words, next_four, next_zero = _tile(
                    packed, scales, zeros, packed, program, first + SPLIT, BLOCKS, BLOCKS, 0,
                    GROUP, SPLIT, ZEROS)
                result = _block(result, x, sums, words, four, zero, table, pairs, first, rows, K,
                                GROUP, SPLIT, False, ZEROS, TABLE, ASSEMBLY)
                words, four, zero = next_words, next_four, next_zero
        result = _block(result, x, sums, words, four, zero, table, pairs, LAST, rows, K, GROUP,
                        SPLIT, False, ZEROS, TABLE, ASSEMBLY)
    else:
        pairs = _pairs(x, table, SPLIT, TABLE, ASSEMBLY)
        if PDL:
            gdc_wait()
        for first in tl.range(0, BLOCKS, SPLIT, num_stages=1):
            words, four, zero = _tile(packed, scales, zeros, packed, program, first, BLOCKS,
                                      BLOCKS, 0, GROUP, SPLIT, ZEROS)
            result = _block(result, x, sums, words, four, zero, table, pairs, first, rows, K,
                            GROUP, SPLIT, False, ZEROS, TABLE, ASSEMBLY)
    if PDL:
        gdc_launch_dependents()
    _store_tile(tl.sum(result, 0), bias, out, out_sums, n, rows, GATED, GELU, ADD, BIAS)


@triton.jit(do_not_specialize=['rows'])
def _fp4_rows(x, packed, scales, factors, bias, out, n, rows, K: tl.constexpr,
              BLOCKS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
              GATED: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
              ASSEMBLY: tl.constexpr, PDL: tl.constexpr):
    """Multiply an `Fp4` [n, K] by ``x`` [rows, K], like `fp4_kernels._fp4`."""
    result = _sums(x, packed, scales, factors, packed, rows, n, K, BLOCKS, BLOCKS, 0, False, SPLIT,
                   STAGES, ASSEMBLY, PDL)
    tile = tl.program_id(0) * 16 + tl.arange(0, 16)
    factor = tl.load(factors + tile, mask=tile < n, other=0.0)
    _store_tile(tl.sum(result, 0) * factor[:, None], bias, out, None, n, rows, GATED, GELU, ADD,
                BIAS)


@triton.jit
def _store_tile(values, bias, out, out_sums, n, rows, GATED: tl.constexpr, GELU: tl.constexpr,
                ADD: tl.constexpr, BIAS: tl.constexpr):
    """Finish and store a program's product, [16, SIDE], and if gated the sums of every 8."""
    tile = tl.program_id(0) * 16 + tl.arange(0, 16)
    if BIAS:
        values += tl.load(bias + tile, mask=tile < n, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(values, (2, 8, SIDE)), (1, 2, 0)))
        values = _activated(gate, GELU) * up
        if out_sums is not None:
            rounded = values.to(out.dtype.element_ty).to(tl.float32)
            each = tl.arange(0, SIDE)
            tl.store(out_sums + each * (n // 16) + tl.program_id(0), tl.sum(rounded, 0),
                     mask=each < rows)
        half = tl.program_id(0) * 8 + tl.arange(0, 8)
        _store_rows(out, half, n // 2, rows, values, ADD)
    else:
        _store_rows(out, tile, n, rows, values, ADD)


@triton.jit
def _write_cache(qkv, keys, values, begin, last, cos, sin, gain, cache, eps,
                 KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
                 SPLITS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr):
    """
    Write the program's share of the keys and values from position ``begin`` to ``last``.

    ``cache`` is the offset of the program's key-value head in the cache.
    """
    place = tl.minimum(begin + tl.arange(0, MOST_ROWS), last)[:, None]
    dims = tl.arange(0, DIMS)[None, :]
    inside = (place // TOKENS % SPLITS == tl.program_id(1)) & (dims < D)
    angles = place * (D // 2)
    head = (place - begin) * ((GROUP + 2) * KV_HEADS) + KV_HEADS * GROUP + tl.program_id(0)
    k = _rotated(qkv + head * D, gain, cos + angles, sin + angles, dims, D, eps, inside, NORM)
    v = tl.load(qkv + (head + KV_HEADS) * D + dims, mask=inside, other=0.0)
    k, v = k.to(keys.dtype.element_ty), v.to(values.dtype.element_ty)
    # A value that overflowed would reach earlier rows as 0 * inf; its key tells the rows after it.
    finite = tl.sum((v - v).to(tl.float32), 1, keep_dims=True) == 0
    new = cache + place * D + dims
    tl.store(keys + new, tl.where(finite, k, float('nan')), mask=inside)
    tl.store(values + new, tl.where(finite, v, 0.0), mask=inside)
    tl.debug_barrier()      # other threads of the program read them


@triton.jit(do_not_specialize=['rows'])
def _attend_rows(qkv, keys, values, position, cos, sin, q_gain, k_gain, part_sums, part_maxima,
                 part_totals, max_context, scale, eps, rows, KV_HEADS: tl.constexpr,
                 GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
                 SPLITS: tl.constexpr, TOKENS: tl.constexpr, TOGETHER: tl.constexpr,
                 WINDOW: tl.constexpr, NORM: tl.constexpr, BETA: tl.constexpr,
                 LENGTH: tl.constexpr, PDL: tl.constexpr):
    """
    Attend over one split of the context, for one key-value head and TOGETHER rows.

    The splits interleave in tiles of TOKENS positions, so that the split and the tile of a
    position are the same for all rows. A program itself writes each key and value of the pass that
    it reads, also those of earlier rows, because the programs of these run at the same time.
    """
    kv_head, split = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * TOGETHER
    queries = tl.arange(0, PADDED)
    dims = tl.arange(0, DIMS)
    row = first + queries // GROUP
    inside = (queries < TOGETHER * GROUP) & (row < rows)
    row = tl.minimum(row, rows - 1)
    begin = tl.load(position).to(tl.int32) + first
    place = begin - first + row
    last = begin + tl.minimum(TOGETHER, rows - first) - 1
    tile = 0
    if WINDOW > 0:
        tile = tl.maximum(0, begin + 1 - WINDOW) // TOKENS
    start = (tile + (split + SPLITS - tile % SPLITS) % SPLITS) * TOKENS
    cache = kv_head.to(tl.int64) * max_context * D
    if PDL:
        # Except for those of the pass, the split's keys and values are older.
        ahead = tl.minimum(start + tl.arange(0, TOKENS), max_context - 1)
        lines = cache + ahead.to(tl.int64)[:, None] * D + (tl.arange(0, DIMS // 64) * 64)[None, :]
        _fetch(keys + lines)
        _fetch(values + lines)
        gdc_launch_dependents()
        gdc_wait()
    angles = place[:, None] * (D // 2)
    factor = tl.zeros((PADDED,), tl.float32) + scale
    if BETA > 0:
        factor *= 1.0 + BETA * tl.log(1.0 + place // LENGTH)
    head = row * ((GROUP + 2) * KV_HEADS) + kv_head * GROUP + queries % GROUP
    kind = keys.dtype.element_ty
    q = _rotated(qkv + head[:, None] * D, q_gain, cos + angles, sin + angles, dims[None, :], D,
                eps, inside[:, None] & (dims < D)[None, :], NORM).to(kind)
    # The positions of the pass are in two tiles at most.
    if ((begin - first) // TOKENS % SPLITS == split) | (last // TOKENS % SPLITS == split):
        _write_cache(qkv, keys, values, begin - first, last, cos, sin, k_gain, cache, eps,
                     KV_HEADS, GROUP, D, DIMS, SPLITS, TOKENS, NORM)
    maxima = tl.full((PADDED,), float('-inf'), tl.float32)
    totals = tl.zeros((PADDED,), tl.float32)
    sums = tl.zeros((PADDED, DIMS), tl.float32)
    for token in tl.range(start, last + 1, SPLITS * TOKENS):
        tokens = token + tl.arange(0, TOKENS)
        live = (tokens <= last)[:, None] & (dims < D)[None, :]
        at = cache + tokens.to(tl.int64)[:, None] * D + dims[None, :]
        k = tl.load(keys + at, mask=live, other=0.0)
        v = tl.load(values + at, mask=live, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * factor[:, None]
        seen = tokens[None, :] <= place[:, None]
        if WINDOW > 0:
            seen &= tokens[None, :] > place[:, None] - WINDOW
        scores = tl.where(seen, scores, float('-inf'))
        highest = tl.maximum(maxima, tl.max(scores, 1))
        base = tl.where(highest == float('-inf'), 0.0, highest)     # no visible position
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(maxima - base)
        totals = totals * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(kind), v, input_precision='ieee')
        maxima = highest
    slot = ((row * KV_HEADS + kv_head) * GROUP + queries % GROUP) * SPLITS + split
    tl.store(part_maxima + slot, maxima, mask=inside)
    tl.store(part_totals + slot, totals, mask=inside)
    tl.store(part_sums + slot[:, None] * DIMS + dims[None, :], sums, mask=inside[:, None])


# The first fits every chip.
PASS_DENSE_LAYOUTS = tuple(Layout(*each) for each in (
    (16, 128, 1, 3), (16, 128, 1, 4), (16, 256, 1, 3), (16, 256, 1, 4), (32, 128, 2, 3),
    (32, 128, 2, 4), (32, 256, 2, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4),
    (16, 128, 2, 3, 2), (16, 128, 2, 4, 2), (16, 128, 4, 3, 4), (16, 128, 4, 4, 4),
    (32, 128, 2, 3, 2), (32, 64, 4, 4, 4)))
if not compiler.PIPELINES:      # no three-dimensional loads
    PASS_DENSE_LAYOUTS = tuple(each for each in PASS_DENSE_LAYOUTS if each.split == 1)
# With two stages, the next words are requested ahead.
PASS_INT4_LAYOUTS = tuple(Layout(TILE_ROWS, 0, warps, stages) for stages in (2, 1) for warps in (
    (4, 2, 1, 8) if compiler.PIPELINES else (1, 2, 4, 8)))
PASS_FP4_LAYOUTS = tuple(each for each in FP4_LAYOUTS if each.stages == 1)


class PassOps(Fp4Ops):
    """The operations of passes as kernels, with the interface of `TorchOps`."""

    _form_layouts = {'int4': PASS_INT4_LAYOUTS, 'table4': PASS_INT4_LAYOUTS,
                     'fp4': PASS_FP4_LAYOUTS}
    _dense_layouts = PASS_DENSE_LAYOUTS

    def _tuned(self, transformer):
        """See `TritonOps._tuned`."""
        return transformer.step, partial(transformer.step, ROWS)

    def embed(self, table, token, x, scale=1.0):
        """See `TorchOps.embed`."""
        hidden = x.shape[-1]
        _embed_rows[(triton.cdiv(hidden, 1024), token.shape[0])](
            table, token, x, hidden, BLOCK=1024, SCALE=scale, PDL=self._pdl,
            **self._launch(4))

    def add_normed(self, branch, gain, eps, x):
        """See `TorchOps.add_normed`."""
        k = x.shape[-1]
        self._current.discard(x.data_ptr())
        _add_normed_rows[(triton.cdiv(k, 512), _rows(x))](
            branch, gain, x, eps, K=k, WIDE=triton.next_power_of_2(k), BLOCK=512,
            PDL=self._pdl, **self._launch(8))

    def attend(self, qkv, keys, values, position, cos, sin, layer, out):
        """See `TorchOps.attend`."""
        kv_heads, max_context, dim = keys.shape
        group, rows = layer.heads // layer.kv_heads, _rows(qkv)
        dims = triton.next_power_of_2(dim)
        warps, splits, parts = self._split_attention(layer, dims, ROWS)
        # Each warp takes 16 queries, so that rows share the loads of keys and values. More queries
        # of a wide head would not fit the shared memory of small chips.
        padded = max(16, triton.next_power_of_2(group),
                     min(16 * warps, 8192 // dims, triton.next_power_of_2(group * ROWS)))
        together = min(ROWS, padded // group)
        norm = layer.q_norm is not None
        q_gain, k_gain = (layer.q_norm, layer.k_norm) if norm else (qkv, qkv)
        _attend_rows[(kv_heads, splits, triton.cdiv(rows, together))](
            qkv, keys, values, position, cos, sin, q_gain, k_gain, *parts, max_context,
            layer.scale, layer.norm_eps, rows, KV_HEADS=kv_heads, GROUP=group, PADDED=padded,
            D=dim, DIMS=dims, SPLITS=splits, TOKENS=TILE_TOKENS, TOGETHER=together,
            WINDOW=layer.window, NORM=norm, BETA=layer.growth.beta, LENGTH=layer.growth.context,
            PDL=self._pdl, **self._launch(warps))
        _join[(rows * layer.heads, dim // 32)](
            *parts, out, self._sums(out), D=dim, DIMS=dims, SPLITS=splits, BLOCK=32,
            PDL=self._pdl, **self._launch(1))

    def _product(self, x, weight, out, gain, eps, add, gated, gelu=False, routed=None):
        assert routed is None       # experts run token by token
        shape, layout = self._layout(weight, gain, gated)
        n, rows, bias = shape.n, _rows(x), weight.bias
        dense = isinstance(weight, Dense)
        fp4 = isinstance(weight, Fp4)
        ordered = not dense and not fp4 and (
            weight.order is not None or x.data_ptr() not in self._current)
        if gain is not None or ordered:
            x = self._prepared(x, None if dense else weight.order, gain, eps)
        k = x.shape[-1]
        # Triton requires a valid pointer even for unused arguments.
        common = {'GATED': gated, 'GELU': gelu, 'ADD': add, 'BIAS': bias is not None,
                  'PDL': self._pdl, **self._launch(layout.warps)}
        bias = x if bias is None else bias
        if dense:
            self._current.discard(out.data_ptr())
            n = n // 2 if gated else n
            _dense_rows[(triton.cdiv(n, layout.rows),)](
                x, weight.weight, bias, out, n, rows, K=k, TILE=layout.rows,
                COLUMNS=layout.columns, SPLIT=layout.split, STAGES=layout.stages, **common)
            return
        tiles, blocks = weight.packed.shape[:2]
        common['ASSEMBLY'] = self._device.type == 'cuda'
        if fp4:
            self._current.discard(out.data_ptr())
            _fp4_rows[(tiles,)](
                x, weight.packed, weight.scales.view(torch.int32), weight.factors, bias, out, n,
                rows, K=k, BLOCKS=blocks, SPLIT=layout.warps, STAGES=layout.stages, **common)
            return
        _int4_rows[(tiles,)](
            x, self._sums(x), weight.packed, weight.scales,
            x if weight.zeros is None else weight.zeros, lookup.table(weight, x.dtype), bias, out,
            self._sums(out) if gated else x, n, rows, K=k, BLOCKS=blocks, GROUP=weight.group_size,
            SPLIT=layout.warps, AHEAD=layout.stages > 1, ZEROS=weight.zeros is not None,
            TABLE=weight.table is not None, **common)

    def _launch(self, warps):
        """See `TritonOps._launch`; the compiler must not fuse operations for some rows only."""
        return {**super()._launch(warps), 'enable_fp_fusion': False}

    def _prepared(self, x, order, gain, eps):
        k, rows = x.shape[-1], _rows(x)
        dtype = x.dtype if gain is None else self._dtype or gain.dtype
        out = self._buffer('prepared', ROWS * k, dtype).view(ROWS, k)
        _prepare_rows[(triton.cdiv(k, 512), rows)](
            x, x if gain is None else gain, x if order is None else order, out, self._sums(out),
            eps, K=k, WIDE=triton.next_power_of_2(k), BLOCK=512, NORM=gain is not None,
            ORDERED=order is not None, PDL=self._pdl, **self._launch(8))
        return out

    def _sums(self, vector):
        """Return the buffer for the sums of every 8 elements of the rows of a buffer."""
        key = vector.data_ptr()
        self._current.add(key)
        if key not in self._summed:
            self._summed[key] = vector, torch.zeros(
                ROWS * triton.cdiv(vector.shape[-1], 8), dtype=torch.float32, device=self._device)
        return self._summed[key][1]


def _rows(x):
    return x.shape[0] if x.dim() > 1 else 1
