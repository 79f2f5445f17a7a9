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
8-bit floats of the quant_method fp8, with a scale per block (Qwen, DeepSeek) or as from AutoFP8.

``weight`` float8_e4m3fn [N, K]. With blocks, ``weight_scale_inv`` [N / block, K / block], which
multiplies the weights despite its name. Without, ``weight_scale`` per tensor or row, which the
transformers library calls ``weight_scale_inv`` too.

Activations stay in half precision, even if the config quantises them.
"""

from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engines.native import packing
from physai_decode.engines.native.formats.refusal import check_group
from physai_decode.engines.native.formats.refusal import refusal
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.source import Source
from physai_decode.model_config import Quantization
from torch import Tensor

FLOAT8 = 'F8_E4M3'


class Fp8:
    """E4M3 floats, with or without blocks."""

    dtype = None

    def __init__(self, quantized: Quantization) -> None:
        """
        Parse a quantization_config.

        :raises EngineError: the native engine does not run it.
        """
        kind = quantized.settings.get('fmt', 'e4m3')
        if str(kind).lower() not in ('e4m3', 'float8_e4m3fn'):
            raise refusal(f'fp8 with fmt {shown(kind)}', 'e4m3')
        self._block = quantized.settings.get('weight_block_size')
        if self._block is not None:
            if len(self._block) != 2 or type(self._block[0]) is not int or self._block[0] < 1:
                raise refusal(f'fp8 with weight_block_size {shown(self._block)}',
                              'rows and columns')
            check_group('fp8', self._block[1])

    def holds(self, source: Source, module: str) -> bool:
        """See `Format`."""
        entry = source.entry(f'{module}.weight')
        return entry is not None and entry.dtype == FLOAT8

    def read(self, source: Source, module: str, rows: int, columns: int) -> Scaled:
        """See `Format`."""
        values = source.get(f'{module}.weight', (rows, columns))
        if self._block is None:
            name = f'{module}.weight_scale'
            if source.entry(f'{name}_inv') is not None:
                name += '_inv'
            scales = of_rows(source, name, rows)
            return packing.scale(values, scales, None, columns)
        high, wide = self._block
        wide = columns if wide == -1 else wide
        return packing.scale(
            values, of_blocks(source, f'{module}.weight_scale_inv', rows, columns, high, wide),
            None, wide)


def of_rows(source: Source, name: str, rows: int) -> Tensor:
    """
    Read one scale per tensor or per row; returns [rows, 1].

    :raises EngineError: the tensor is missing or has another shape.
    """
    entry = source.entry(name)
    shape = entry.shape if entry else (rows, 1)
    if shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise EngineError(f'tensor {name} has shape {list(shape)}, but config.json implies '
                          f'{[rows, 1]} or one number: they do not belong together')
    return source.get(name, shape).reshape(-1, 1).expand(rows, 1)


def of_blocks(source: Source, name: str, rows: int, columns: int, high: int,
              wide: int) -> Tensor:
    """
    Read one scale per block of ``high`` rows and ``wide`` columns; returns [rows, groups].

    :raises EngineError: the tensor is missing or has another shape.
    """
    scales = source.get(name, (-(-rows // high), -(-columns // wide)))
    return scales.repeat_interleave(high, 0)[:rows]
