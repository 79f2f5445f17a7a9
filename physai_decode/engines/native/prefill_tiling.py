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

"""The tilings of the products of a prefill, by format, size and chip."""

from dataclasses import dataclass

from physai_decode.engines import compiler
from physai_decode.engines.native import lookup
from physai_decode.engines.native.experts import Experts
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import FP4_GROUP
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.linear import TILE_ROWS
import triton

DEFAULT_SHARED = 48 * 2**10             # bytes of shared memory that every kernel may use
TENSOR_MEMORY = 128 * 64                # sums of a 4-bit tile that fit into it, for four groups


@dataclass(frozen=True)
class Tiling:
    """
    The tiling of a product by a kernel of `prefill_kernels`; with ``rows`` 0, the library runs it.

    ``rows`` and ``columns`` are the size of a tile of weights; for an `Int4` and an `Fp4`,
    ``columns`` counts those of each of four groups. ``tokens`` are the tokens of a tile, and
    ``splits`` the programs that split the columns.
    """

    rows: int = 0
    columns: int = 0
    tokens: int = 0
    warps: int = 0
    stages: int = 0
    splits: int = 1


LIBRARY = Tiling()


def rule(weight: Linear, tokens: int, gated: bool, processors: int, shared: int,
         tensor_memory: bool = False) -> Tiling:
    """
    Choose how to compute a product, by measurements on an H100; see docs/performance.md.

    :param processors: of the chip.
    :param shared: maximum shared memory per block in bytes.
    :param tensor_memory: see `chip.has_tensor_memory`.
    """
    n, k = weight.shape
    wide = min(tokens, 128)
    if not is_packed(weight) and tokens > 128:
        return LIBRARY
    if isinstance(weight, Dense) and not gated and (
            tokens == 64 and n > k or tokens == 128 and n >= k):
        return LIBRARY
    layouts, programs = _kernel_layouts(weight, tokens, gated)
    for rows, columns, warps, stages in layouts:
        if tensor_memory and is_packed(weight) and rows * wide > TENSOR_MEMORY:
            continue
        if _takes(weight, rows, columns, wide, stages, shared):
            steps = k // ((4 if is_packed(weight) else 1) * columns)
            tiles = triton.cdiv(n, rows) * (tokens // wide)
            splits = 1 if gated else min(9, steps // 2, round(programs * processors / tiles))
            return Tiling(rows, columns, wide, warps, stages, max(1, splits))
    return LIBRARY


def _takes(weight, rows, columns, tokens, stages, shared):
    """Whether tiles fit into the weight, its groups and the shared memory."""
    k = weight.shape[1]
    if not compiler.PIPELINES and 8 * rows * tokens > shared:
        return False        # older versions take that to part gate and up
    if isinstance(weight, Dense):
        return k % columns == 0 and stages * 2 * columns * (rows + tokens) <= shared
    if isinstance(weight, Scaled):
        step = columns * (rows + 2 * tokens) + 8 * rows
        return k % columns == 0 and stages * step <= shared and (
            weight.by_row or weight.group_size % columns == 0)
    group = FP4_GROUP if isinstance(weight, Fp4) else weight.group_size
    step = 4 * columns * (rows // 2 + 2 * tokens) + (
        columns * rows // 4 if isinstance(weight, Fp4) else 8 * rows)
    if has_table(weight):
        # Beside the pairs, a launch fails unless Triton itself allocates more than the default. It
        # may have a buffer less than stages.
        shared = shared - lookup.STATIC_BYTES if (stages - 1) * step > DEFAULT_SHARED else 0
    return k % 32 == 0 and group % columns == 0 and stages * step <= shared


# Rows, columns, warps, stages: the first that fits is taken. Dense: not gated, gated, gated of 64
# tokens and more.
_DENSE = (((64, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 3), (64, 32, 4, 3)),
          ((64, 128, 4, 3), (64, 64, 4, 4), (64, 64, 4, 3), (64, 32, 4, 3)),
          ((128, 128, 4, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3)))
# Of 8-bit weights: not gated or of less than 64 tokens, and gated of more.
_SCALED = (((64, 128, 4, 4), (64, 64, 4, 4), (64, 32, 4, 4), (64, 32, 4, 3)),
           ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)))


def _kernel_layouts(weight, tokens, gated):
    """Return the layouts of a product, and its programs per processor."""
    if is_packed(weight):
        return _packed_layouts(weight, tokens, gated)
    if isinstance(weight, Scaled):
        return _SCALED[gated and tokens >= 64], 1
    return _DENSE[gated + (gated and tokens >= 64)], 1


def _packed_layouts(weight, tokens, gated):
    """Return the layouts of the product of 4-bit weights, and its programs per processor."""
    n, k = weight.shape
    largest = 512 if gated and not has_table(weight) else 256
    if tokens > largest or (tokens == 256 and n > k and not gated):
        return (), 1        # the library is faster, with unpacking
    # Five stages only fit a table, see `_takes`.
    small = (64, 32, 4, 4), (64, 32, 4, 5), (64, 32, 4, 3), (64, 32, 4, 2)
    if tokens >= 256:
        return ((256, 32, 8, 3) if gated else (128, 32, 8, 4), (128, 32, 8, 2), *small), 1
    if gated and tokens >= 64:
        return ((128, 32, 8, 4), (128, 32, 8, 2), *small), 1
    return ((128, 32, 4, 4), (128, 32, 4, 5), *small), 1 if tokens == 128 and k <= n else 2


def expert_rule(stack: Stack, tokens: int, gated: bool, shared: int) -> Tiling:
    """Choose how to multiply blocks of ``tokens`` by their experts; see `rule`."""
    weight = stack[0]
    for rows, columns, warps, stages in _kernel_layouts(weight, tokens, gated)[0]:
        if _takes(weight, rows, columns, tokens, stages, shared):
            return Tiling(rows, columns, tokens, warps, stages)
    return LIBRARY


def runs_experts(mlp: Experts, shared: int) -> bool:
    """Return whether kernels can run all experts in chunks; see `rule`."""
    return isinstance(mlp.router, Dense) and mlp.router.bias is None and all(
        stack.stacked.bias is None and stack.shape[0] % TILE_ROWS == 0
        and all(expert_rule(stack, tokens, gated, shared).rows for tokens in (16, 32, 64))
        for stack, gated in ((mlp.gate_up, True), (mlp.down, False)))


def is_packed(weight: Linear) -> bool:
    """Return whether the weights are fragments of four bits, whose input is in fragment order."""
    return isinstance(weight, (Int4, Fp4))


def has_table(weight: Linear) -> bool:
    """Return whether the weights are looked up by four bits."""
    return isinstance(weight, Int4) and weight.table is not None
