"""
Checkpoints of the library compressed-tensors, as LLM Compressor writes them.

Read are weights alone: activations stay in half precision, whatever the config says of them.
Bits, groups and zero points of a module show in its tensors. Of ``pack-quantized``:
``weight_packed`` int32 [N, K / 8], numbers from 0 on; ``weight_scale`` [N, groups];
``weight_zero_point`` int32 [N / 8, groups], likewise; ``weight_g_idx`` int32 [K];
``weight_shape`` [2]. Of ``int-quantized``: ``weight`` and ``weight_zero_point`` int8, else the
same. Of ``float-quantized``: ``weight`` float8_e4m3fn, ``weight_scale`` of a tensor, of rows or of
blocks.
"""

from typing import Any

from physai_decode.engine import EngineError
from physai_decode.engines.native import packing
from physai_decode.engines.native.formats.fp8 import FLOAT8
from physai_decode.engines.native.formats.fp8 import of_blocks
from physai_decode.engines.native.formats.fp8 import of_rows
from physai_decode.engines.native.formats.refusal import check_group
from physai_decode.engines.native.formats.refusal import refusal
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.source import Source
from physai_decode.model_config import part
from physai_decode.model_config import Quantization
import torch

_NAME = 'compressed-tensors'
# By a layout's name what its weights are: type, bits, strategies.
_RUN = {
    'pack-quantized': ('int', (4, 8), ('group', 'channel')),
    'int-quantized': ('int', (8,), ('group', 'channel', 'tensor')),
    'float-quantized': ('float', (8,), ('channel', 'tensor', 'block'))}
_STORED = {'int-quantized': 'I8', 'float-quantized': FLOAT8}


class CompressedTensors:
    """The layouts of `_RUN`, in groups of modules each of which may have another one."""

    def __init__(self, quantized: Quantization) -> None:
        """
        Take what a checkpoint says of its quantisation.

        :raises EngineError: naming what the native engine does not run.
        """
        settings = quantized.settings
        if part(part(settings, 'transform_config'), 'config_groups'):
            raise refusal(f'{_NAME} with a transform_config', 'weights as they are')
        if part(settings, 'sparsity_config').get('format', 'dense') != 'dense':
            raise refusal(f'{_NAME} with the sparsity_config '
                          f'{settings["sparsity_config"]["format"]!r}', 'dense')
        groups = part(settings, 'config_groups')
        if not groups:
            raise refusal(f'{_NAME} without config_groups', 'those that name their weights')
        every = [_check(settings, part(groups, name)) for name in groups]
        self.dtype = torch.float16 if any(bits == 4 for bits, _ in every) else None
        self._sizes = [size for _, size in every]
        self._stored = {_STORED.get(_layout(settings, part(groups, name))) for name in groups}
        self._blocks = [part(part(groups, name), 'weights')['block_structure'] for name in groups
                        if part(part(groups, name), 'weights').get('strategy') == 'block']

    def holds(self, source: Source, module: str) -> bool:
        """See `Format`."""
        plain = source.entry(f'{module}.weight')
        return (source.entry(f'{module}.weight_packed') is not None
                or plain is not None and plain.dtype in ('I8', FLOAT8))

    def read(self, source: Source, module: str, rows: int, columns: int) -> Linear:
        """See `Format`."""
        if source.entry(f'{module}.weight_packed') is None:
            return self._eight(source, module, rows, columns)
        shape = source.get(f'{module}.weight_shape', (2,)).tolist()
        if shape != [rows, columns]:
            raise EngineError(f'weight_shape is {shape}, config.json implies {[rows, columns]}: '
                              'they do not belong together')
        groups, size = self._groups(source, module, columns)
        scales = source.get(f'{module}.weight_scale', (rows, groups)).t()
        packed = source.entry(f'{module}.weight_packed')
        bits = 8 if packed and packed.shape[-1] == -(-columns // 4) else 4
        each = 32 // bits
        values = packing.unpack(
            source.get(f'{module}.weight_packed', (rows, -(-columns // each))), bits, 1)
        zeros = None
        if source.entry(f'{module}.weight_zero_point') is not None:
            stored = source.get(f'{module}.weight_zero_point', (-(-rows // each), groups))
            zeros = packing.unpack(stored, bits, 0)[:rows].t()
        g_idx = None
        if source.entry(f'{module}.weight_g_idx') is not None:
            g_idx = source.get(f'{module}.weight_g_idx', (columns,))
        values = values[:, :columns]
        if bits == 4:
            return packing.pack(values.t(), scales, zeros, size, g_idx)
        return packing.scale(packing.signed(values), scales.t(), None if zeros is None else
                             packing.signed(zeros.t()), size, g_idx)

    def _eight(self, source, module, rows, columns):
        stored = source.entry(f'{module}.weight').dtype
        if stored not in self._stored:
            raise EngineError(f'its weight is stored as {stored}, which config.json does not say: '
                              'they do not belong together')
        values = source.get(f'{module}.weight', (rows, columns))
        name = f'{module}.weight_scale'
        entry = source.entry(name)
        if entry is None or len(entry.shape) < 2 or entry.shape[1] == 1 and \
                entry.shape[0] in (1, rows):
            scales, size = of_rows(source, name, rows), columns
        elif values.is_floating_point():
            fits = (block for block in self._blocks
                    if entry.shape == (-(-rows // block[0]), -(-columns // block[1])))
            high, size = next(fits, self._blocks[0] if self._blocks else (1, columns))
            scales = of_blocks(source, name, rows, columns, high, size)
        else:
            groups, size = self._groups(source, module, columns)
            scales = source.get(name, (rows, groups))
        zeros, zero_name = None, f'{module}.weight_zero_point'
        zero = source.entry(zero_name)
        if zero is not None:
            if values.is_floating_point():
                if source.get(zero_name, zero.shape).float().any():
                    raise EngineError('its floats have zero points: download the model again')
            elif scales.shape[1] == 1:
                zeros = of_rows(source, zero_name, rows)
            else:
                zeros = source.get(zero_name, tuple(scales.shape))
        return packing.scale(values, scales, zeros, size)

    def _groups(self, source, module, columns):
        """Give how many groups of columns a module has, and of how many columns."""
        entry = source.entry(f'{module}.weight_scale')
        groups = entry.shape[-1] if entry and len(entry.shape) == 2 else 1
        size = -(-columns // max(1, groups))
        if groups != 1 and size not in self._sizes:
            raise EngineError(f'its weight_scale has groups of {size} columns, config.json says '
                              f'{", ".join(map(str, self._sizes))}: they do not belong together')
        return groups, size


def _layout(settings, group):
    return group.get('format') or settings.get('format')


def _check(settings, group):
    """Hold one of the config's groups against what is run; gives its bits and group size."""
    layout = _layout(settings, group)
    if layout not in _RUN:
        raise refusal(f'the {_NAME} format {layout!r}', ', '.join(_RUN))
    kind, bits, strategies = _RUN[layout]
    weights: dict[str, Any] = {'type': 'int', **part(group, 'weights')}
    found = f'{weights["type"]} of {weights.get("num_bits")!r} bits'
    if weights['type'] != kind or weights.get('num_bits') not in bits:
        raise refusal(f'{_NAME} {layout} weights as {found}',
                      f'{kind} of {" and ".join(map(str, bits))}')
    if weights.get('strategy') not in strategies:
        raise refusal(f'{_NAME} {layout} weights by {weights.get("strategy")!r}',
                      ', '.join(strategies))
    if weights['strategy'] == 'block':
        check_group(_NAME, weights['block_structure'][1])
    if weights['strategy'] == 'group':
        check_group(_NAME, weights.get('group_size'))
    return weights['num_bits'], weights['group_size'] if weights['strategy'] == 'group' else -1
