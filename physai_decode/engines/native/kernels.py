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

Products here are those of dense weights; each other form of weights has a file of its own.
"""

from collections.abc import Callable
from dataclasses import astuple
from dataclasses import dataclass
from functools import partial
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
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.tuning import timed
from physai_decode.engines.native.tuning import TuningCache
from physai_decode.engines.sampling_kernels import TritonSampler
import torch
from torch import Tensor
import triton
import triton.language as tl


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


@dataclass(frozen=True)
class AttentionLayout:
    """The layout of attention: programs for each 128 or so SMs, and warps per program."""

    programs: int
    warps: int


TILE_TOKENS = 32        # keys and values that attention loads at once
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


def dequantised(widen: Callable[[Any, slice, Tensor], None], weight: Any, part: slice,
                dtype: torch.dtype) -> Tensor:
    """Dequantise a part of a weight as its own method does, by an entry of ``wideners``."""
    unit = weight.part_rows
    rows = slice(unit * part.start, min(unit * part.stop, weight.shape[0]))
    out = weight.scales.new_empty(rows.stop - rows.start, weight.in_features, dtype=dtype)
    widen(weight, rows, out)
    return out


class TritonOps(TorchOps):
    """The operations of a decode step as kernels, with the interface of `TorchOps`."""

    name = f'triton {triton.__version__}'
    # Of other forms than `Dense`; each class adds its own.
    wideners: dict[type, Callable[[Any, slice, Tensor], None]] = {}     # dequantise rows
    _form_layouts: dict[str, tuple[Layout, ...]] = {}   # by a weight's kind, up to the first '-'
    _dense_layouts = DENSE_LAYOUTS
    _sources: tuple[str, ...] = ()      # files of the kernels, besides those of the classes

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
        widen = self.wideners.get(type(weight))
        return widen and partial(dequantised, widen)

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
            GROUP=group, PADDED=padded, D=dim, DIMS=dims, SPLITS=splits, TOKENS=TILE_TOKENS,
            WINDOW=layer.window, NORM=layer.q_norm is not None, BETA=layer.growth.beta,
            LENGTH=layer.growth.context, PDL=self._pdl, **self._launch(warps))
        _join[(layer.heads, dim // 32)](
            *parts, out, self._sums(out), D=dim, DIMS=dims, SPLITS=splits, BLOCK=32,
            PDL=self._pdl, **self._launch(1))

    def _split_attention(self, layer, dims, rows=1):
        """Return the warps and splits of a layer's attention, and the splits' buffers."""
        layout = self._attention_layouts.get(_heads(layer), ATTENTION_LAYOUTS[0])
        splits = max(
            1, layout.programs * self._programs // triton.next_power_of_2(layer.kv_heads))
        if layer.window:        # more splits would have nothing to do
            tiles = triton.cdiv(layer.window, TILE_TOKENS)
            splits = min(splits, triton.next_power_of_2(tiles))
        splits = self._splits or splits
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
        """Hash the source files of the kernels: of this class, its bases, and `_sources`."""
        files = [getfile(each) for each in cls.__mro__ if issubclass(each, TritonOps)]
        text = b''.join(Path(file).read_bytes() for file in (*files, *cls._sources))
        return sha256(text).hexdigest()[:8]

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
            times: dict[Any, float] = {}
            problem: Any = None
            for each in candidates:
                chosen[shape] = each
                try:
                    times[each] = sum(map(timed, steps))
                except triton.runtime.errors.OutOfResources as error:
                    problem = error     # this chip has too little shared memory for it
                except RuntimeError as error:       # ... and Triton does not count all of it
                    if 'invalid argument' not in str(error):
                        raise
                    problem = error
            if not times:
                raise problem
            layout = min(times, key=times.__getitem__)
            cache.put(str(shape), list(astuple(layout)))
        chosen[shape] = layout

    def _layout(self, weight, gain, gated):
        """Return the shape of a product, and the layout of its kernel."""
        shape = _shape(weight, gain, gated)
        return shape, self._layouts.get(shape) or self._candidates(shape)[0]

    def _candidates(self, shape):
        """Return the possible layouts of a product's kernel; the first fits every chip."""
        return self._form_layouts.get(shape.kind.partition('-')[0], self._dense_layouts)

    def _product(self, x, weight, out, gain, eps, add, gated, gelu=False, routed=None):
        shape, layout = self._layout(weight, gain, gated)
        one, whole, ids, routing, joined, each = operand(x, weight, routed, gated)
        self._current.discard(out.data_ptr())
        n, bias = shape.n // 2 if gated else shape.n, one.bias
        columns = math.gcd(layout.columns, shape.k) if joined > 1 else layout.columns
        _dense[(triton.cdiv(n, layout.rows), each)](
            x, whole.weight, x if bias is None else bias, x if gain is None else gain, ids,
            routing, out, n, out.stride(0), eps, K=joined * shape.k, SIZE=shape.k,
            STACK=0 if routed is None else one.weight.numel(), ROWS=layout.rows, COLUMNS=columns,
            STAGES=layout.stages, NORM=gain is not None, GATED=gated, GELU=gelu, ADD=add,
            BIAS=bias is not None, PDL=self._pdl, **self._launch(layout.warps))

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
