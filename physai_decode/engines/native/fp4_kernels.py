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
Kernels for 4-bit floats, see `Fp4`: matrix-vector product and dequantisation.

A weight times its scale is exact in 16 bits, so the tensor cores take the product of both. The
exponent of E2M1 is moved into that of a 16-bit float, whose bias is larger, so codes are too small
by a power of 2. Scales make up for a part of it, so that products are exact, and `_sums` for the
rest.
"""

from physai_decode.engines.compiler import gdc_launch_dependents
from physai_decode.engines.compiler import gdc_wait
from physai_decode.engines.native.int4_kernels import _input
from physai_decode.engines.native.int4_kernels import _matrix
from physai_decode.engines.native.int4_kernels import _places
from physai_decode.engines.native.int4_kernels import _words
from physai_decode.engines.native.int4_kernels import compilable
from physai_decode.engines.native.int4_kernels import SIDE
from physai_decode.engines.native.kernels import _activated
from physai_decode.engines.native.kernels import _finish
from physai_decode.engines.native.kernels import _store
from physai_decode.engines.native.kernels import Layout
from physai_decode.engines.native.kernels import operand
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import FP4_GROUP
from physai_decode.engines.native.linear import TILE_ROWS
from physai_decode.engines.native.scaled_kernels import ScaledOps
import torch
from torch import Tensor
import triton
import triton.language as tl

GROUP = tl.constexpr(FP4_GROUP)


@triton.jit
def _scale_words(scales, ids, tile, first, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
                 STACK: tl.constexpr, SPLIT: tl.constexpr):
    """
    Load the scales of SPLIT blocks from ``first`` on, [SPLIT, GROUP / 32, 64].

    Each lane of a fragment has two words of four scales: those of a word's weights in its row, and
    in the row 8 below. Two lanes share them.
    """
    number = tl.arange(0, GROUP // 32 * SPLIT)
    at, inside = _places(ids, tile, first, number % SPLIT, BLOCKS, SIZE, STACK, SPLIT)
    own = tl.arange(0, 64)
    words = tl.load(
        scales + at[:, None] * GROUP + (number // SPLIT * 32)[:, None]
        + (own // 4 * 2 + own % 2)[None, :], mask=inside[:, None], other=0,
        eviction_policy='evict_first')
    return tl.permute(tl.reshape(words, (GROUP // 32, SPLIT, 64)), (1, 0, 2))


@triton.jit
def _weights(words, scales, NUMBER: tl.constexpr, KIND: tl.constexpr):
    """Return weight NUMBER of each word times its scale, as KIND."""
    SIGN: tl.constexpr = 16 - NUMBER if NUMBER > 1 else 15 - 3 * NUMBER     # `FP4_SIGNS`
    LOW: tl.constexpr = 9 if NUMBER == 3 else 6 - 3 * NUMBER                # `FP4_BITS`
    wide = words.to(tl.int32)
    numbers = _float32(((wide >> LOW) & 7) << 22 | ((wide >> SIGN) & 1) << 31, 126)
    own = _float32(((scales >> 8 * NUMBER) & 0x7F) << 20, 120)
    return (numbers * _spread(own, words)).to(KIND)


@triton.jit
def _float32(bits, EXPONENT: tl.constexpr):
    """Return the float32 of some bits, times 2^EXPONENT."""
    return bits.to(tl.float32, bitcast=True) * (2.0 ** EXPONENT)


@triton.jit
def _spread(scales, words):
    """Repeat scales for all words, without moving data between lanes."""
    SPLIT: tl.constexpr = words.shape[0]
    PAIRS: tl.constexpr = scales.shape[1]
    # pair, operand, lane, high, half, low
    parts = tl.reshape(scales, (SPLIT, PAIRS, 1, 32, 1, 2, 1))
    return tl.reshape(tl.broadcast_to(parts, (SPLIT, PAIRS, 2, 32, 2, 2, 2)), words.shape)


@triton.jit
def _fast_weights(words, scales, NUMBER: tl.constexpr, KIND: tl.constexpr):
    """Return what `_weights` does, for 16-bit floats on CUDA: times 2^-14 (float16) or 2^-8."""
    # Two copies of a scale in a register, as 16-bit floats. The bias of bfloat16 is too large to
    # make up for in one step, and older chips can only multiply it by fused operations.
    COPY: tl.constexpr = 0x4040 + 0x101 * NUMBER
    SIGN: tl.constexpr = NUMBER - 1 if NUMBER > 1 else 3 * NUMBER       # to bit 15
    if KIND == tl.float16:
        own = tl.inline_asm_elementwise(
            f'{{ .reg .b32 c, t; prmt.b32 t, $1, 0, {COPY}; shl.b32 t, t, 7; '
            f'mov.b32 c, 0x5C005C00; mul.f16x2 $0, t, c; }}',
            '=r,r', [scales], dtype=tl.int32, is_pure=True, pack=1)
        BITS: tl.constexpr = 0 if NUMBER == 3 else 3 + 3 * NUMBER       # to bits 9 to 11
        return tl.inline_asm_elementwise(
            f'{{ .reg .b32 s, t, u; shl.b32 t, $1, {BITS}; and.b32 t, t, 0x0E000E00; '
            f'shl.b32 s, $1, {SIGN}; lop3.b32 t, s, 0x80008000, t, 0xEA; '
            f'prmt.b32 u, $2, $3, 0x7610; mul.f16x2 $0, t, u; }}',
            '=r,r,r,r', [words, _spread(own, words)], dtype=tl.float16, is_pure=True, pack=2)
    else:
        own = tl.inline_asm_elementwise(
            f'{{ .reg .b32 c, t, z; prmt.b32 t, $1, 0, {COPY}; shl.b32 t, t, 4; '
            f'mov.b32 z, 0x80008000; mov.b32 c, 0x7F007F00; fma.rn.bf16x2 t, t, c, z; '
            f'mov.b32 c, 0x77007700; fma.rn.bf16x2 $0, t, c, z; }}',
            '=r,r', [scales], dtype=tl.int32, is_pure=True, pack=1)
        # To bits 6 to 8; the sign of the first two weights moves with them.
        TO: tl.constexpr = 'shr.b32 t, $1, 3' if NUMBER == 3 else f'shl.b32 t, $1, {3 * NUMBER}'
        CODE: tl.constexpr = 'and.b32 t, t, 0x81C081C0' if NUMBER < 2 else (
            f'and.b32 t, t, 0x01C001C0; shl.b32 s, $1, {SIGN}; '
            f'lop3.b32 t, s, 0x80008000, t, 0xEA')
        return tl.inline_asm_elementwise(
            f'{{ .reg .b32 s, t, u, z; {TO}; {CODE}; prmt.b32 u, $2, $3, 0x7610; '
            f'mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, t, u, z; }}',
            '=r,r,r,r', [words, _spread(own, words)], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _block(result, x, words, scales, factors, ids, first, rows, n, K: tl.constexpr,
           BLOCKS: tl.constexpr, SIZE: tl.constexpr, JOINED: tl.constexpr, SPLIT: tl.constexpr,
           COPIED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Add the products of SPLIT blocks to [SPLIT, 16, SIDE]; if JOINED, times their factors."""
    before = result
    if JOINED:
        result = tl.zeros(before.shape, tl.float32)
    for number in tl.static_range(4):
        v = _input(x, first, rows, number, K, GROUP, SPLIT, COPIED)
        if ASSEMBLY and v.dtype != tl.float32:
            w = _fast_weights(words, scales, number, v.dtype)
        else:
            w = _weights(words, scales, number, v.dtype)
        result = tl.dot(_matrix(w), v, result, input_precision='ieee')
    if JOINED:
        block = first + tl.arange(0, SPLIT)
        inside = (block < BLOCKS)[:, None]
        expert = tl.load(ids + block // SIZE, mask=block < BLOCKS, other=0)[:, None]
        row = tl.program_id(0) * 16 + tl.arange(0, 16)[None, :]
        factor = tl.load(factors + expert * n + row, mask=inside & (row < n), other=0.0)
        result = tl.fma(result, factor[:, :, None], before)
    return result


@triton.jit
def _sums(x, packed, scales, factors, ids, rows, n, K: tl.constexpr, BLOCKS: tl.constexpr,
          SIZE: tl.constexpr, STACK: tl.constexpr, JOINED: tl.constexpr, SPLIT: tl.constexpr,
          STAGES: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr):
    """
    Multiply a program's tile by ``x`` [K], or the rows of a pass; returns [SPLIT, 16, SIDE].

    SPLIT warps take turns at the blocks. With one stage, the next words are requested before the
    current ones are multiplied, and the first before the previous kernel has ended. With more,
    words are prefetched to shared memory.
    """
    LAST: tl.constexpr = (BLOCKS - 1) // SPLIT * SPLIT
    tile = tl.program_id(0).to(tl.int64)
    result = tl.zeros((SPLIT, 16, SIDE), tl.float32)
    if STAGES > 1:
        if PDL:
            gdc_wait()
        for first in tl.range(0, BLOCKS, SPLIT, num_stages=STAGES):
            words = _words(packed, ids, tile, first, BLOCKS, SIZE, STACK, GROUP, SPLIT)
            own = _scale_words(scales, ids, tile, first, BLOCKS, SIZE, STACK, SPLIT)
            result = _block(result, x, words, own, factors, ids, first, rows, n, K, BLOCKS, SIZE,
                            JOINED, SPLIT, rows is None, ASSEMBLY)
    else:
        # Scales come first, because the compiler gives their product with words the layout of the
        # last load: that of the scales would cost two permutations for each register of words.
        own = _scale_words(scales, ids, tile, 0, BLOCKS, SIZE, STACK, SPLIT)
        words = _words(packed, ids, tile, 0, BLOCKS, SIZE, STACK, GROUP, SPLIT)
        if PDL:
            gdc_wait()
        for first in tl.range(0, LAST, SPLIT, num_stages=1):
            next_own = _scale_words(scales, ids, tile, first + SPLIT, BLOCKS, SIZE, STACK, SPLIT)
            next_words = _words(packed, ids, tile, first + SPLIT, BLOCKS, SIZE, STACK, GROUP,
                                SPLIT)
            result = _block(result, x, words, own, factors, ids, first, rows, n, K, BLOCKS, SIZE,
                            JOINED, SPLIT, False, ASSEMBLY)
            words, own = next_words, next_own
        result = _block(result, x, words, own, factors, ids, LAST, rows, n, K, BLOCKS, SIZE,
                        JOINED, SPLIT, False, ASSEMBLY)
    if PDL:
        gdc_launch_dependents()
    if ASSEMBLY and x.dtype.element_ty == tl.float16:
        result *= 2.0 ** 14
    elif ASSEMBLY and x.dtype.element_ty == tl.bfloat16:
        result *= 2.0 ** 8
    return result


@triton.jit
def _fp4(x, packed, scales, factors, bias, ids, routing, out, n, stride, K: tl.constexpr,
         BLOCKS: tl.constexpr, SIZE: tl.constexpr, STACK: tl.constexpr, SPLIT: tl.constexpr,
         STAGES: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
         BIAS: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr):
    """Multiply an `Fp4` [n, K] by ``x`` [K]; a tile per program. For a stack, see `_int4`."""
    JOINED: tl.constexpr = STACK > 0 and not GATED
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    own = factors
    if GATED and STACK:
        if PDL:
            gdc_wait()
        ids += tl.program_id(1)
        out += tl.program_id(1) * stride
        own += tl.load(ids) * n
    sums = _sums(x, packed, scales, factors, ids, None, n, K, BLOCKS, SIZE, STACK, JOINED, SPLIT,
                 STAGES, ASSEMBLY, PDL)
    result = tl.sum(tl.max(sums, 2), 0)
    if not JOINED:
        result *= tl.load(own + rows, mask=rows < n, other=0.0)
    result = _finish(result, 0.0, rows, n, K, 0.0, bias, False, BIAS)
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(result, (2, 8))))
        result = _activated(gate, GELU) * up
        if STACK:
            result *= tl.load(routing + tl.program_id(1))
        rows = tl.program_id(0) * 8 + tl.arange(0, 8)
    _store(out, rows, n, result, ADD)


@triton.jit
def _widen(packed, scales, factors, out, first, rows, K: tl.constexpr, BLOCKS: tl.constexpr):
    """Dequantise a block of a tile of an `Fp4` to ``out`` [rows, K], from tile ``first`` on."""
    tile = first + tl.program_id(0).to(tl.int64)
    words = _words(packed, packed, tile, tl.program_id(1), BLOCKS, BLOCKS, 0, GROUP, 1)
    own = _scale_words(scales, packed, tile, tl.program_id(1), BLOCKS, BLOCKS, 0, 1)
    PAIRS: tl.constexpr = GROUP // 32
    row = (tl.arange(0, 2)[:, None] * 8 + tl.arange(0, 8)[None, :])[None, :, :, None]
    factor = tl.load(factors + tile * 16 + row, mask=tl.program_id(0) * 16 + row < rows, other=0.0)
    row += tl.program_id(0) * 16
    column = (tl.arange(0, PAIRS)[:, None] * 32 + tl.arange(0, 32)[None, :])[:, None, None, :]
    for number in tl.static_range(4):
        w = tl.reshape(_weights(words, own, number, tl.float32), (PAIRS, 2, 8, 4, 2, 2, 2))
        # pair, operand, row, lane, high, half, low -> a lane's words of a row are adjacent columns
        w = tl.reshape(tl.permute(w, (0, 5, 2, 3, 1, 4, 6)), (PAIRS, 2, 8, 32)) * factor
        columns = (tl.program_id(1) * 4 + number) * GROUP + column
        tl.store(out + row.to(tl.int64) * K + columns, w.to(out.dtype.element_ty),
                 mask=(row < rows) & (columns < K))


# The first fits every chip.
FP4_LAYOUTS = compilable(tuple(Layout(TILE_ROWS, 0, *each) for each in (
    (4, 1), (8, 1), (2, 1), (1, 1), (1, 2), (2, 2), (2, 3), (4, 3), (4, 4))))


def widen(weight: Fp4, rows: slice, out: Tensor) -> None:
    """Dequantise some rows of a weight, from a whole tile on, to ``out`` [rows, K]."""
    count, k = out.shape
    blocks = weight.packed.shape[1]
    _widen[(triton.cdiv(count, TILE_ROWS), blocks)](
        weight.packed, weight.scales.view(torch.int32), weight.factors, out,
        rows.start // TILE_ROWS, count, K=k, BLOCKS=blocks, num_warps=1)


class Fp4Ops(ScaledOps):
    """The step's operations as kernels, for 4-bit floats too."""

    wideners = {**ScaledOps.wideners, Fp4: widen}
    _form_layouts = {**ScaledOps._form_layouts, 'fp4': FP4_LAYOUTS}

    def _product(self, x, weight, out, gain, eps, add, gated, gelu=False, routed=None):
        one, whole, ids, routing, joined, each = operand(x, weight, routed, gated)
        if not isinstance(one, Fp4):
            super()._product(x, weight, out, gain, eps, add, gated, gelu, routed)
            return
        shape, layout = self._layout(weight, gain, gated)
        if gain is not None:
            x = self._prepared(x, one, gain, eps)
        self._current.discard(out.data_ptr())
        tiles, blocks = one.packed.shape[:2]
        bias = one.bias
        _fp4[(tiles, each)](
            x, whole.packed, whole.scales.view(torch.int32), whole.factors,
            x if bias is None else bias, ids, routing, out, shape.n, out.stride(0), K=x.numel(),
            BLOCKS=joined * blocks, SIZE=blocks, STACK=0 if routed is None else tiles * blocks,
            SPLIT=layout.warps, STAGES=layout.stages, GATED=gated, GELU=gelu, ADD=add,
            BIAS=bias is not None, ASSEMBLY=self._device.type == 'cuda', PDL=self._pdl,
            **self._launch(layout.warps))
