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
Fuses projections of the same input, so that one kernel computes all of them.

Projections whose layouts do not fit together are not fused; the caller dequantises them.
"""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace

from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.linear import Stored
from physai_decode.engines.native.linear import TILE_ROWS
import torch
from torch import Tensor


def fuse(parts: list[Stored], paired: bool = False) -> Stored | None:
    """
    Fuse projections of the same input, which all have a bias or none.

    :param paired: whether they are gate and up, which are interleaved.
    :returns: None if they do not fit together.
    """
    if len(parts) == 1:
        return parts[0]
    kinds = {type(part) for part in parts}
    fused = _FUSED.get(kinds.pop()) if len(kinds) == 1 else None
    return fused(parts, paired) if fused else None


def interleaved(rows: int, device: torch.device) -> Tensor | None:
    """
    Return the permutation that interleaves 8 rows of gate and 8 of up, int64 [2 * rows].

    :returns: None if ``rows`` is not a multiple of 8.
    """
    half = TILE_ROWS // 2
    if rows % half:
        return None
    index = torch.arange(2 * rows, device=device).view(2, -1, half)
    return index.transpose(0, 1).flatten()


def dense_weight(part: Stored, dtype: torch.dtype) -> Tensor:
    """Dequantise a projection; returns [N, K], columns in the order of the input."""
    if isinstance(part, Dense):
        return part.weight
    weight = part.dequantise(slice(None), dtype)
    if part.order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, part.order.long(), weight)


def _int4(parts: list[Int4], paired: bool) -> Int4 | None:
    """Concatenate; if ``paired``, each tile has 8 rows of gate and 8 of up."""
    first = parts[0]
    if any(part.out_features % TILE_ROWS for part in parts):
        return None
    if not _same_order(parts) or any(
            (part.group_size, part.table) != (first.group_size, first.table) for part in parts):
        return None

    width, zeros = 4 * TILE_ROWS // 2, None
    if any(part.zeros is not None for part in parts):
        zeros = _by_tiles([torch.full_like(part.scales, 8) if part.zeros is None else part.zeros
                           for part in parts], paired, width)
    return replace(
        # In `fragments`, the halves of a tile alternate every two words.
        first, packed=_by_tiles([part.packed for part in parts], paired, 2),
        scales=_by_tiles([part.scales for part in parts], paired, width), zeros=zeros,
        bias=_biases(parts, paired), out_features=sum(part.out_features for part in parts))


def _fp4(parts: list[Fp4], paired: bool) -> Fp4 | None:
    """Concatenate; if ``paired``, each tile has 8 rows of gate and 8 of up."""
    first = parts[0]
    if any(part.out_features % TILE_ROWS for part in parts):
        return None

    return replace(
        # In `fragments`, the halves of a tile alternate every two words; every four scales.
        first, packed=_by_tiles([part.packed for part in parts], paired, 2),
        scales=_by_tiles([part.scales for part in parts], paired, 4),
        factors=_by_rows([part.factors for part in parts], paired),
        bias=_biases(parts, paired), out_features=sum(part.out_features for part in parts))


def _scaled(parts: list[Scaled], paired: bool) -> Scaled | None:
    """Concatenate; if ``paired``, interleave 8 rows of each."""
    first = parts[0]
    if not _same_order(parts) or not _fusible(parts, paired):
        return None

    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = _by_rows([torch.zeros_like(part.scales) if part.zeros is None else part.zeros
                          for part in parts], paired)
    # Concatenated as int8: not every operation supports float8.
    values = _by_rows([part.values.view(torch.int8) for part in parts], paired)
    return replace(first, values=values.view(first.values.dtype),
                   scales=_by_rows([part.scales for part in parts], paired), zeros=zeros,
                   bias=_biases(parts, paired))


_FUSED: dict[type, Callable[..., Stored | None]] = {
    Int4: _int4, Fp4: _fp4, Scaled: _scaled}


def _fusible(parts: list[Scaled], paired: bool) -> bool:
    return len({part.kind for part in parts}) == 1 and not (
        paired and any(part.shape[0] % (TILE_ROWS // 2) for part in parts))


def _by_rows(tensors: list[Tensor], paired: bool) -> Tensor:
    """Concatenate [N, ...]; if ``paired``, interleave 8 rows of each."""
    if not paired:
        return torch.cat(tensors)
    return torch.stack([each.unflatten(0, (-1, TILE_ROWS // 2)) for each in tensors],
                       1).flatten(0, 2)


def _biases(parts: Sequence[Stored], paired: bool) -> Tensor | None:
    """Concatenate the biases, which all parts have or none; see `_by_rows`."""
    found = [part.bias for part in parts if part.bias is not None]
    return _by_rows(found, paired) if found else None


def _by_tiles(tensors: list[Tensor], paired: bool, width: int) -> Tensor:
    """Concatenate [tiles, ...]; if ``paired``, interleave half tiles, see `_interleave`."""
    return _interleave(tensors[0], tensors[1], width) if paired else torch.cat(tensors)


def _same_order(parts: list[Int4] | list[Scaled]) -> bool:
    orders = [part.order for part in parts]
    return all(order is None for order in orders) or all(
        order is not None and orders[0] is not None and torch.equal(order, orders[0])
        for order in orders)


def _interleave(gate: Tensor, up: Tensor, width: int) -> Tensor:
    """
    Interleave half tiles of gate and up.

    :param gate: and ``up``, [tiles, blocks, ...], in which the halves of a tile alternate every
        ``width`` elements.
    """
    both = torch.stack([each.flatten(2).unflatten(2, (-1, 2, width)) for each in (gate, up)], 4)
    # tile, block, place | half, part, low -> tile, half | block | place, part, low
    # With one tile, `reshape` may return a view, which kernels would misread.
    return both.permute(0, 3, 1, 2, 4, 5).reshape(-1, *gate.shape[1:]).contiguous()
