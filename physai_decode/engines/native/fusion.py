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
Projections of one input stacked to one, so that a step reads them in one pass.

Where their forms differ, or do not fit together, nothing is stacked: what can't be had in one
form is for the caller to make dense.
"""

from dataclasses import replace

from physai_decode.engines.native.linear import Coded
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.linear import Stored
from physai_decode.engines.native.linear import TILE_ROWS
import torch
from torch import Tensor


def fuse(parts: list[Stored], paired: bool = False) -> Stored | None:
    """
    Stack projections of one input, all with a bias or none.

    :param paired: the two are gate and up.
    :returns: None where they do not fit together.
    """
    if len(parts) == 1:
        return parts[0]
    int4 = [part for part in parts if isinstance(part, Int4)]
    if len(int4) == len(parts):
        return _int4(int4, paired)
    scaled = [part for part in parts if isinstance(part, Scaled)]
    if len(scaled) == len(parts):
        return _scaled(scaled, paired)
    coded = [part for part in parts if isinstance(part, Coded)]
    return _coded(coded, paired) if len(coded) == len(parts) else None


def in_turn(rows: int, device: torch.device) -> Tensor | None:
    """
    Return the order in which 8 rows of gate and 8 of up, stacked, take turns, int64 [2 * rows].

    :returns: None where such tiles would not be full.
    """
    half = TILE_ROWS // 2
    if rows % half:
        return None
    index = torch.arange(2 * rows, device=device).view(2, -1, half)
    return index.transpose(0, 1).flatten()


def densified(part: Stored, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] of a projection dense, its columns as they are in the input."""
    if isinstance(part, Dense):
        return part.weight
    weight = part.dequantise(slice(None), dtype)
    if part.order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, part.order.long(), weight)


def _int4(parts: list[Int4], paired: bool) -> Int4 | None:
    """Stack; where ``paired``, gate's and up's rows share tiles, see `Int4`."""
    first = parts[0]
    if any(part.out_features % TILE_ROWS for part in parts):
        return None
    if not _same_order(parts) or any(part.group_size != first.group_size for part in parts):
        return None

    def joined(tensors, width):
        return _in_turn(tensors[0], tensors[1], width) if paired else torch.cat(tensors)

    half = TILE_ROWS // 2
    zeros = bias = None
    if any(p.zeros is not None for p in parts):
        zeros = joined([torch.full_like(p.scales, 8) if p.zeros is None else p.zeros
                        for p in parts], 4 * half)
    if first.bias is not None:
        bias = joined([p.bias.view(-1, 1, TILE_ROWS) for p in parts if p.bias is not None],
                      half).flatten()
    return Int4(
        # In `fragments` the halves of a tile take turns every two words.
        packed=joined([p.packed for p in parts], 2),
        scales=joined([p.scales for p in parts], 4 * half), zeros=zeros, order=first.order,
        bias=bias, out_features=sum(p.out_features for p in parts),
        in_features=first.in_features)


def _scaled(parts: list[Scaled], paired: bool) -> Scaled | None:
    """Stack; where ``paired``, 8 rows of gate and of up take turns."""
    first = parts[0]
    if not _same_order(parts) or not _stackable(parts, paired):
        return None

    zeros = bias = None
    if any(part.zeros is not None for part in parts):
        zeros = _by_rows([torch.zeros_like(part.scales) if part.zeros is None else part.zeros
                          for part in parts], paired)
    if first.bias is not None:
        bias = _by_rows([part.bias for part in parts if part.bias is not None], paired)
    # Floats of 8 bits are joined as bits: not every operation takes them.
    values = _by_rows([part.values.view(torch.int8) for part in parts], paired)
    return replace(first, values=values.view(first.values.dtype),
                   scales=_by_rows([part.scales for part in parts], paired), zeros=zeros,
                   bias=bias)


def _coded(parts: list[Coded], paired: bool) -> Coded | None:
    """Stack; where ``paired``, 8 rows of gate and of up take turns."""
    first = parts[0]
    if not _stackable(parts, paired) or any(
            not torch.equal(part.table, first.table) for part in parts):
        return None
    bias = None
    if first.bias is not None:
        bias = _by_rows([part.bias for part in parts if part.bias is not None], paired)
    scales = _by_rows([part.scales.view(torch.uint8) for part in parts], paired)
    return replace(first, codes=_by_rows([part.codes for part in parts], paired),
                   scales=scales.view(first.scales.dtype),
                   factors=_by_rows([part.factors for part in parts], paired), bias=bias)


def _stackable(parts, paired):
    return len({part.kind for part in parts}) == 1 and not (
        paired and any(part.shape[0] % (TILE_ROWS // 2) for part in parts))


def _by_rows(tensors, paired):
    """Stack [N, ...]; where ``paired``, 8 rows of one and 8 of the other take turns."""
    if not paired:
        return torch.cat(tensors)
    return torch.stack([each.unflatten(0, (-1, TILE_ROWS // 2)) for each in tensors],
                       1).flatten(0, 2)


def _same_order(parts):
    orders = [part.order for part in parts]
    return all(order is None for order in orders) or all(
        order is not None and orders[0] is not None and torch.equal(order, orders[0])
        for order in orders)


def _in_turn(gate: Tensor, up: Tensor, width: int) -> Tensor:
    """
    Take half a tile of one and half a tile of the other in turn.

    :param gate: and ``up``, [tiles, blocks, ...], in which the halves of a tile take turns every
        ``width`` elements.
    """
    both = torch.stack([each.flatten(2).unflatten(2, (-1, 2, width)) for each in (gate, up)], 4)
    # tile, block, place | half, part, low -> tile, half | block | place, part, low
    return both.permute(0, 3, 1, 2, 4, 5).reshape(-1, *gate.shape[1:])
