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
Checkpoints of bitsandbytes: nf4 and fp4, optionally with double quantisation, and int8.

4 bits: ``weight`` [N * K / 2, 1] of any dtype has two codes per byte, the first one in the high
bits. The blocks of ``weight.absmax`` continue from row to row. Scalars are JSON in
``weight.quant_state.bitsandbytes__nf4``, whose name identifies the table. With double
quantisation, ``weight.absmax`` uint8 indexes ``weight.nested_quant_map``; a scale is that entry
times its block's ``weight.nested_absmax``, plus an offset.

8 bits: ``weight`` int8 [N, K]; 127 stands for the row's ``SCB`` [N]. Dettmers et al., arXiv
2305.14314 and 2208.07339.
"""

from collections.abc import Mapping
import json
import math
from typing import Any

from physai_decode.checkpoint import parsing
from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engines.native import packing
from physai_decode.engines.native.formats.refusal import refusal
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.linear import Stored
from physai_decode.engines.native.source import Source
from physai_decode.model_config import Quantization
import torch
from torch import Tensor

_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
TABLES = {
    # Quantiles of a normal distribution, scaled to -1 to 1.
    'nf4': (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    'fp4': (*_FP4, *(-number for number in _FP4))}
_STATE = 'weight.quant_state.bitsandbytes__'
_ROWS = 0               # the weight_format of plain rows
_MOST = 1e30            # limit of an offset


class BitsAndBytes:
    """4-bit codes, or 8-bit integers."""

    dtype = None

    def __init__(self, quantized: Quantization) -> None:
        """
        Parse a quantization_config.

        :raises EngineError: the native engine does not run it.
        """
        settings = quantized.settings
        four, eight = (bool(settings.get(f'load_in_{bits}bit')
                            or settings.get(f'_load_in_{bits}bit')) for bits in (4, 8))
        if four == eight:
            raise refusal('bitsandbytes with ' + ('both' if four else 'none') +
                          ' of load_in_4bit and load_in_8bit', 'bitsandbytes with one')
        self._kind = ''
        if four:
            self._kind = settings.get('bnb_4bit_quant_type', 'fp4')
            if self._kind not in TABLES:
                raise refusal(f'bitsandbytes of type {shown(self._kind)}', ', '.join(TABLES))

    def holds(self, source: Source, module: str) -> bool:
        """See `Format`."""
        entry = source.entry(f'{module}.weight')
        if entry is not None and entry.dtype in ('I8', 'U8'):
            return True
        return any(source.entry(f'{module}.{end}') is not None for end in (
            'SCB', 'weight.absmax', *(_STATE + kind for kind in TABLES)))

    def read(self, source: Source, module: str, rows: int, columns: int) -> Stored:
        """See `Format`."""
        return self._eight(source, module, rows, columns) if not self._kind else \
            self._four(source, module, rows, columns)

    def _eight(self, source: Source, module: str, rows: int, columns: int) -> Scaled:
        values = source.get(f'{module}.weight', (rows, columns))
        if values.dtype != torch.int8:
            raise EngineError(f'its weight is stored as {values.dtype}, but config.json implies '
                              'torch.int8: they do not belong together')
        name = f'{module}.weight_format'
        layout = source.entry(name)
        if layout is not None and source.get(name, layout.shape).flatten().tolist() != [_ROWS]:
            raise refusal('bitsandbytes int8 in a layout for one kind of GPU', 'plain rows')
        scales = source.get(f'{module}.SCB', (rows,)).float() / 127
        return packing.scale(values, _numbers(f'{module}.SCB', scales).unsqueeze(1), None, columns)

    def _four(self, source: Source, module: str, rows: int, columns: int) -> Int4:
        state = self._state(source, module)
        if state.get('shape') != [rows, columns]:
            raise EngineError(f'its quant_state has the shape {shown(state.get("shape"))}, '
                              f'but config.json implies {[rows, columns]}: they do not belong '
                              'together')
        block = _whole(state, 'blocksize')
        size = math.gcd(block, columns)
        if size % packing.GROUP_SIZES[0]:
            raise refusal(f'bitsandbytes in blocks of {block} over rows of {columns} columns',
                          f'multiples of {packing.GROUP_SIZES[0]}')
        blocks = -(-rows * columns // block)
        absmax = source.get(f'{module}.weight.absmax', (blocks,))
        if source.entry(f'{module}.weight.nested_absmax') is not None:
            absmax = _nested(source, module, state, absmax)
        elif not absmax.is_floating_point():
            raise EngineError(f'{module}.weight.absmax holds integers, but there is no '
                              f'{module}.weight.nested_absmax: download the model again')
        table = torch.tensor(TABLES[self._kind])
        stored = source.get(f'{module}.weight.quant_map', (16,)).float().cpu()
        if not torch.allclose(stored, table, rtol=0, atol=1e-4):
            raise EngineError(f'its quant_map is not that of {self._kind}: download the model '
                              'again')
        # A group divides both a block and a row, so it has one scale.
        first = torch.arange(0, rows * columns, size, device=absmax.device) // block
        scales = _numbers(f'{module}.weight.absmax', absmax.float())[first].view(rows, -1)
        packed = self._packed(source, f'{module}.weight', rows * columns // 2)
        swapped = (packed >> 4 | packed << 4).view(rows, -1)
        return packing.pack(packing.halves(swapped).t(), scales.t(), None, size,
                            table=TABLES[self._kind])

    def _state(self, source: Source, module: str) -> Mapping[str, Any]:
        """Read the JSON of a module's quant_state."""
        name = f'{module}.{_STATE}{self._kind}'
        entry = source.entry(name)
        state = source.get(name, entry.shape if entry and len(entry.shape) == 1 else (0,))
        with parsing(f'tensor {name}'):
            found = json.loads(state.cpu().numpy().tobytes())
            if not isinstance(found, dict):
                raise ValueError('it is not a JSON object')
        if found.get('quant_type', self._kind) != self._kind:
            raise EngineError(f'tensor {name} has the type {shown(found["quant_type"])}: download '
                              'the model again')
        return found

    def _packed(self, source: Source, name: str, count: int) -> Tensor:
        """Read the packed codes, stored with any dtype; returns uint8 [count]."""
        entry = source.entry(name)
        stored = source.get(name, entry.shape if entry else (count, 1)).contiguous()
        packed = stored.flatten().view(torch.uint8)
        if len(packed) != count:
            raise EngineError(f'tensor {name} has {len(packed)} bytes, but config.json '
                              f'implies {count}: they do not belong together')
        return packed


def _nested(source: Source, module: str, state: Mapping[str, Any], codes: Tensor) -> Tensor:
    """Dequantise the scales of double quantisation; returns float32 [blocks]."""
    if codes.dtype != torch.uint8:
        raise EngineError(f'{module}.weight.absmax is stored as {codes.dtype}, but there is a '
                          f'{module}.weight.nested_absmax: download the model again')
    block = _whole(state, 'nested_blocksize')
    offset: Any = state.get('nested_offset')
    if type(offset) not in (int, float) or not abs(offset) < _MOST:
        raise EngineError(f'its quant_state has the nested_offset {shown(offset)}: download the '
                          'model again')
    scales = source.get(f'{module}.weight.nested_absmax', (-(-len(codes) // block),)).float()
    table = source.get(f'{module}.weight.nested_quant_map', (256,)).float()
    numbers = table[codes.long()] * scales.repeat_interleave(block)[:len(codes)]
    return numbers + float(offset)


def _whole(state: Mapping[str, Any], key: str) -> int:
    """Return a positive integer of a quant_state."""
    number = state.get(key)
    if type(number) is not int or not 0 < number <= 2**24:
        raise EngineError(f'its quant_state has the {key} {shown(number)}: download the model '
                          'again')
    return number


def _numbers(name: str, values: Tensor) -> Tensor:
    """Return floats, which must be finite."""
    if not bool(values.isfinite().all()):
        raise EngineError(f'tensor {name} has scales that are NaN or infinite: download the model '
                          'again')
    return values
