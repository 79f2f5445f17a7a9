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
Checkpoints of the library compressed-tensors, as LLM Compressor writes them.

Activations stay in half precision, even if the config quantises them. A module's name determines
its group in the config; its tensors determine how many groups of columns it has. The formats:

``pack-quantized``: ``weight_packed`` int32 [N, K / 8], unsigned values; ``weight_scale``
[N, groups]; ``weight_zero_point`` int32 [N / 8, groups], unsigned too; ``weight_g_idx`` int32 [K];
``weight_shape`` [2].
``int-quantized``: the same, but ``weight`` and ``weight_zero_point`` are int8.
``float-quantized``: ``weight`` float8_e4m3fn; ``weight_scale`` per tensor, row or block.
``nvfp4-pack-quantized``: ``weight_packed`` uint8 [N, K / 2]; ``weight_scale`` float8_e4m3fn
[N, K / 16], divided by ``weight_global_scale`` float32 of the whole tensor.
``mxfp4-pack-quantized``: ``weight_packed`` likewise; ``weight_scale`` uint8 [N, K / 32].
"""

from collections.abc import Mapping
from dataclasses import dataclass
import re
from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engines.native import packing
from physai_decode.engines.native.formats import fp4
from physai_decode.engines.native.formats.fp8 import FLOAT8
from physai_decode.engines.native.formats.fp8 import of_blocks
from physai_decode.engines.native.formats.fp8 import of_rows
from physai_decode.engines.native.formats.refusal import check_group
from physai_decode.engines.native.formats.refusal import refusal
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.linear import Stored
from physai_decode.engines.native.source import Source
from physai_decode.model_config import part
from physai_decode.model_config import Quantization
import torch

_NAME = 'compressed-tensors'
# The supported weights of each format: type, bits, strategies.
_RUN = {
    'pack-quantized': ('int', (4, 8), ('group', 'channel', 'tensor')),
    'int-quantized': ('int', (8,), ('group', 'channel', 'tensor')),
    'float-quantized': ('float', (8,), ('channel', 'tensor', 'block')),
    'nvfp4-pack-quantized': ('float', (4,), ('tensor_group',)),
    'mxfp4-pack-quantized': ('float', (4,), ('group',))}
_STORED = {'int-quantized': 'I8', 'float-quantized': FLOAT8}
_CLASSES = ('Linear', 'Module')     # targets that match any projection


@dataclass(frozen=True)
class _Group:
    """One of the config's groups: its modules, and how they are stored."""

    targets: tuple[str, ...]
    layout: str
    bits: int
    size: int                           # columns per group; -1: all
    block: tuple[int, int] | None       # rows and columns


class CompressedTensors:
    """The formats of `_RUN`; each group of modules may have another one."""

    def __init__(self, quantized: Quantization) -> None:
        """
        Parse a quantization_config.

        :raises EngineError: the native engine does not run it.
        """
        settings = quantized.settings
        if part(part(settings, 'transform_config'), 'config_groups'):
            raise refusal(f'{_NAME} with a transform_config', f'{_NAME} without')
        if part(settings, 'sparsity_config').get('format', 'dense') != 'dense':
            raise refusal(f'{_NAME} with the sparsity_config '
                          f'{shown(settings["sparsity_config"]["format"])}', 'dense')
        groups = part(settings, 'config_groups')
        if not groups:
            raise refusal(f'{_NAME} without config_groups', f'{_NAME} with config_groups')
        self._groups = [_group(settings, part(groups, name)) for name in groups]
        self._ignored = _names(settings, 'ignore')
        self.dtype = torch.float16 if any(
            group.layout == 'pack-quantized' and group.bits == 4 for group in self._groups) \
            else None

    def holds(self, source: Source, module: str) -> bool:
        """See `Format`."""
        plain = source.entry(f'{module}.weight')
        return (source.entry(f'{module}.weight_packed') is not None
                or plain is not None and plain.dtype in _STORED.values())

    def read(self, source: Source, module: str, rows: int, columns: int) -> Stored:
        """See `Format`."""
        group = self._of(module)
        if group.layout == 'nvfp4-pack-quantized':
            factor = 1 / fp4.factor(source, f'{module}.weight_global_scale')
            return fp4.nvfp4(source, f'{module}.weight_packed', f'{module}.weight_scale', factor,
                             rows, columns)
        if group.layout == 'mxfp4-pack-quantized':
            return fp4.mxfp4(source, f'{module}.weight_packed', f'{module}.weight_scale', rows,
                             columns)
        read = _packed if group.layout == 'pack-quantized' else _eight
        return read(source, module, rows, columns, group)

    def _of(self, module: str) -> _Group:
        """
        Return the group of a module: by name, else by pattern, else by class.

        The alphabetical order decides between patterns, and the last group between equal targets.
        """
        if not any(_fit(name, module) for name in self._ignored):
            fits = [(fit, target, -index) for index, group in enumerate(self._groups)
                    for target in group.targets if (fit := _fit(target, module))]
            if fits:
                return self._groups[-min(fits)[2]]
        raise EngineError('it is stored quantised, but quantization_config in config.json lists '
                          'it in ignore, or in the targets of no group: they do not belong '
                          'together')


def _packed(source: Source, module: str, rows: int, columns: int,
            group: _Group) -> Int4 | Scaled:
    """Read integers packed in words."""
    shape = source.get(f'{module}.weight_shape', (2,)).tolist()
    if shape != [rows, columns]:
        raise EngineError(f'weight_shape is {shape}, but config.json implies {[rows, columns]}: '
                          'they do not belong together')
    bits, offset = group.bits, 1 << group.bits - 1
    per_word = 32 // bits
    words = source.get(f'{module}.weight_packed', (rows, -(-columns // per_word)))
    values = packing.unpack(words, bits, 1)[:, :columns]
    zeros, name = None, f'{module}.weight_zero_point'
    zero = source.entry(name)
    if _is_whole(source, module):
        scales, size = of_rows(source, f'{module}.weight_scale', rows), columns
        if zero is not None:
            zeros = of_rows(source, name, rows).int() + offset
    else:
        groups, size = _columns(source, module, columns, group)
        scales = source.get(f'{module}.weight_scale', (rows, groups))
        if zero is not None:
            stored = source.get(name, (-(-rows // per_word), groups))
            zeros = packing.unpack(stored, bits, 0)[:rows]
    g_idx = None
    if source.entry(f'{module}.weight_g_idx') is not None:
        g_idx = source.get(f'{module}.weight_g_idx', (columns,))
    if bits == 4:
        return packing.pack(values.t(), scales.t(), None if zeros is None else zeros.t(), size,
                            g_idx)
    return packing.scale(packing.signed(values), scales, None if zeros is None else
                         zeros.int() - offset, size, g_idx)


def _eight(source: Source, module: str, rows: int, columns: int, group: _Group) -> Scaled:
    """Read 8-bit integers or floats."""
    values = source.get(f'{module}.weight', (rows, columns))
    weight = source.entry(f'{module}.weight')
    stored = weight and weight.dtype
    if stored != _STORED[group.layout]:
        raise EngineError(f'its weight is stored as {stored}, but config.json implies '
                          f'{_STORED[group.layout]}: they do not belong together')
    name = f'{module}.weight_scale'
    entry = source.entry(name)
    if entry is None or len(entry.shape) < 2 or entry.shape[1] == 1 and \
            entry.shape[0] in (1, rows):
        scales, size = of_rows(source, name, rows), columns
    elif values.is_floating_point():
        high, size = group.block or (1, columns)
        scales = of_blocks(source, name, rows, columns, high, size)
    else:
        groups, size = _columns(source, module, columns, group)
        scales = source.get(name, (rows, groups))
    zeros, zero_name = None, f'{module}.weight_zero_point'
    zero = source.entry(zero_name)
    if zero is not None:
        if values.is_floating_point():
            if source.get(zero_name, zero.shape).float().any():
                raise EngineError('its float weights have zero points: download the model again')
        elif scales.shape[1] == 1:
            zeros = of_rows(source, zero_name, rows)
        else:
            zeros = source.get(zero_name, tuple(scales.shape))
    return packing.scale(values, scales, zeros, size)


def _is_whole(source: Source, module: str) -> bool:
    """Whether the whole tensor has one scale."""
    entry = source.entry(f'{module}.weight_scale')
    return entry is not None and entry.shape in ((), (1,), (1, 1))


def _columns(source: Source, module: str, columns: int, group: _Group) -> tuple[int, int]:
    """Return the number of groups of columns, and the columns per group."""
    entry = source.entry(f'{module}.weight_scale')
    groups = entry.shape[-1] if entry and len(entry.shape) == 2 else 1
    size = -(-columns // max(1, groups))
    if groups != 1 and size != group.size:
        raise EngineError(f'its weight_scale has groups of {size} columns, but config.json says '
                          f'{group.size}: they do not belong together')
    return groups, size


def _fit(target: str, module: str) -> int:
    """Return how a target matches a module: 1 by name, 2 by pattern, 3 by class, 0 not at all."""
    if target.startswith('re:'):
        return 2 if re.match(target[3:], module) else 0
    return 1 if target == module else 3 if target in _CLASSES else 0


def _names(settings: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """
    Read a list of module names, patterns and classes.

    :raises ValueError: it is not a list of strings, or a pattern is invalid.
    """
    names = settings.get(key) or []
    if not isinstance(names, list) or any(type(name) is not str for name in names):
        raise ValueError(f'{key} is {shown(names)}, not a list of names')
    for name in names:
        try:
            _fit(name, '')
        except re.error as error:
            raise ValueError(f'{key} has the invalid pattern {shown(name)} ({error})') from None
    return tuple(names)


def _group(settings: Mapping[str, Any], found: Mapping[str, Any]) -> _Group:
    """
    Parse one of the config's groups.

    :raises EngineError: the native engine does not run it.
    :raises ValueError: a value is invalid.
    """
    layout = found.get('format') or settings.get('format')
    if layout not in _RUN:
        raise refusal(f'the {_NAME} format {shown(layout)}', ', '.join(_RUN))
    kind, bits, strategies = _RUN[layout]
    weights: dict[str, Any] = {'type': 'int', **part(found, 'weights')}
    strategy = weights.get('strategy')
    said = f'{shown(weights["type"])} of {shown(weights.get("num_bits"))}'
    if weights['type'] != kind or weights.get('num_bits') not in bits:
        raise refusal(f'{_NAME} {layout} weights as {said} bits',
                      f'{kind} of {" and ".join(map(str, bits))}')
    if strategy not in strategies:
        raise refusal(f'{_NAME} {layout} weights by {shown(strategy)}', ', '.join(strategies))
    size: Any = -1
    block = None
    if strategy in ('group', 'tensor_group'):
        size = weights.get('group_size')
        own = fp4.GROUP.get(layout.partition('-')[0])
        if own is None:
            check_group(_NAME, size)
        elif size != own:
            raise refusal(f'{_NAME} {layout} groups of {shown(size)}', str(own))
    if strategy == 'block':
        high, wide = weights['block_structure']
        check_group(_NAME, wide)
        if type(high) is not int or high < 1:
            raise refusal(f'{_NAME} blocks of {shown(high)} rows', 'positive integers')
        block = high, wide
    return _Group(_names(found, 'targets'), layout, weights['num_bits'], size, block)
