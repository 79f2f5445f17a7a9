"""
GPTQ checkpoints: from the tensors that quantisers write to the form that the engine reads.

4 bits; ``qweight`` int32 [K / 8, N], ``qzeros`` int32 [groups, N / 8], ``scales`` [groups, N],
``g_idx`` int32 [K]. The format ``gptq`` stores zeros less one, ``gptq_v2`` as they are. Frantar et
al., arXiv 2210.17323.
"""

from dataclasses import dataclass

from physai_decode.engine import EngineError
from physai_decode.engines.native.linear import fragments
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import TILE_ROWS
from physai_decode.model_config import Quantization
import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class GptqFormat:
    """What of the checkpoint's quantisation its tensors do not show."""

    group_size: int       # -1: one group a row
    zeros_less_one: bool


def parse(quantized: Quantization) -> GptqFormat:
    """
    Take what a checkpoint says of its quantisation.

    :raises EngineError: naming what the native engine does not run.
    """
    if quantized.method != 'gptq':
        other = 'exllamav2' if quantized.method == 'exl2' else 'transformers'
        raise EngineError(f'the native engine does not run {quantized.method} checkpoints (it '
                          f'runs gptq); set engine.name to {other}')
    if quantized.bits != 4:
        raise EngineError(f'the native engine does not run GPTQ of {quantized.bits!r} bits (it '
                          'runs 4); set engine.name to transformers')
    if quantized.layout not in ('gptq', 'gptq_v2'):
        raise EngineError(f'the native engine does not run the GPTQ format {quantized.layout!r} '
                          '(it runs gptq and gptq_v2); set engine.name to transformers')
    if quantized.changed:
        raise EngineError('the native engine does not run GPTQ whose modules differ in their '
                          f'settings ({quantized.changed[0]}); set engine.name to transformers')
    size = quantized.group_size
    if size != -1 and size % GROUP_SIZES[0]:
        raise EngineError(f'the native engine does not run GPTQ groups of {size} (it runs '
                          'multiples of 32, and -1); set engine.name to transformers')
    return GptqFormat(size, quantized.layout == 'gptq')


def repack(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None,
           bias: Tensor | None, form: GptqFormat) -> Int4:
    """
    Repack one projection; the shapes are those of the module's docstring.

    :raises EngineError: where the groups do not fit the shapes.
    """
    columns, rows = qweight.shape[0] * 8, qweight.shape[1]
    groups = scales.shape[0]
    size = columns if form.group_size == -1 else form.group_size
    if groups != -(-columns // size):
        raise EngineError(f'a GPTQ tensor has {groups} groups for {columns} columns, but the '
                          f'config says groups of {size}: the checkpoint is inconsistent')
    order = _order(g_idx, size, columns)
    shifts = torch.arange(0, 32, 4, device=qweight.device, dtype=torch.int32)
    nibbles = ((qweight.unsqueeze(1) >> shifts.view(1, 8, 1)) & 0xF).to(torch.uint8)
    nibbles = nibbles.reshape(columns, rows)
    if order is not None:
        nibbles = nibbles[order.long()]
    zeros = ((qzeros.unsqueeze(2) >> shifts) & 0xF).reshape(groups, rows)
    if form.zeros_less_one:
        zeros = (zeros + 1) & 0xF

    kernel_group = next((g for g in reversed(GROUP_SIZES) if size % g == 0), 0)
    if not kernel_group:
        raise EngineError(f'GPTQ groups of {size} columns are no multiple of 32; '
                          'set engine.name to transformers')
    blocks, tiles = -(-columns // (4 * kernel_group)), -(-rows // TILE_ROWS)

    def tiled(values, length):
        """Pad [columns, rows], and give it as [tiles, 16, blocks, 4, length]."""
        full = values.new_zeros(4 * length * blocks, TILE_ROWS * tiles)
        full[:values.shape[0], :rows] = values[:full.shape[0]]  # the last group may be short
        return full.t().view(tiles, TILE_ROWS, blocks, 4, length)

    def by_group(values):
        wide = values.repeat_interleave(size // kernel_group, 0).to(torch.float16)
        return tiled(wide, 1).squeeze(4).transpose(1, 2).contiguous()

    planes = tiled(nibbles.to(torch.int16), kernel_group).unbind(3)
    packed = planes[0] | planes[1] << 4 | planes[2] << 8 | planes[3] << 12
    return Int4(
        packed=fragments(packed.transpose(1, 2)), scales=by_group(scales),
        zeros=None if bool((zeros == 8).all()) else by_group(zeros),
        order=order, bias=bias, out_features=rows, in_features=columns)


def fuse(parts: list[Int4], paired: bool = False) -> Int4 | None:
    """
    Stack projections of one input, all with a bias or none.

    :param paired: the two are gate and up, whose rows share tiles, see `Int4`.
    :returns: None where their orders differ, or a tile is not full.
    """
    first = parts[0]
    if any(part.out_features % TILE_ROWS for part in parts):
        return None
    for part in parts[1:]:
        orders = [each for each in (part.order, first.order) if each is not None]
        if len(orders) == 1 or part.group_size != first.group_size:
            return None
        if orders and not torch.equal(*orders):
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


def _in_turn(gate: Tensor, up: Tensor, width: int) -> Tensor:
    """
    Take half a tile of one and half a tile of the other in turn.

    :param gate: and ``up``, [tiles, blocks, ...], in which the halves of a tile take turns every
        ``width`` elements.
    """
    both = torch.stack([each.flatten(2).unflatten(2, (-1, 2, width)) for each in (gate, up)], 4)
    # tile, block, place | half, part, low -> tile, half | block | place, part, low
    return both.permute(0, 3, 1, 2, 4, 5).reshape(-1, *gate.shape[1:])


def _order(g_idx, size, columns):
    """Return the columns by group, int32 [K], or None where they are in order already."""
    if g_idx is None:
        return None
    plain = torch.arange(columns, device=g_idx.device) // size
    if torch.equal(g_idx.long(), plain):
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], plain):
        raise EngineError(f'g_idx does not give groups of {size} columns: '
                          'the GPTQ checkpoint is inconsistent')
    return order.to(torch.int32)
