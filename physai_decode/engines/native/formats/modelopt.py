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
Checkpoints of NVIDIA's ModelOpt: NVFP4 and FP8.

NVFP4: ``weight`` uint8 [N, K / 2]; ``weight_scale`` float8_e4m3fn [N, K / 16], multiplied by
``weight_scale_2`` float32 of the whole tensor. FP8: ``weight`` float8_e4m3fn; ``weight_scale`` per
tensor or row. Activations stay in half precision, even if the config quantises them.
"""

from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engines.native import packing
from physai_decode.engines.native.formats import fp4
from physai_decode.engines.native.formats.fp8 import FLOAT8
from physai_decode.engines.native.formats.fp8 import of_rows
from physai_decode.engines.native.formats.refusal import refusal
from physai_decode.engines.native.linear import Stored
from physai_decode.engines.native.source import Source
from physai_decode.model_config import Quantization

_STORED = {'NVFP4': 'U8', 'FP8': FLOAT8}


class ModelOpt:
    """One algorithm of `_STORED` for all quantised modules."""

    dtype = None

    def __init__(self, quantized: Quantization) -> None:
        """
        Parse a quantization_config.

        :raises EngineError: the native engine does not run it.
        """
        self._kind: Any = quantized.settings.get('quant_algo')
        if self._kind not in _STORED:
            raise refusal(f'modelopt with the quant_algo {shown(self._kind)}', ', '.join(_STORED))

    def holds(self, source: Source, module: str) -> bool:
        """See `Format`."""
        entry = source.entry(f'{module}.weight')
        return entry is not None and entry.dtype == _STORED[self._kind]

    def read(self, source: Source, module: str, rows: int, columns: int) -> Stored:
        """See `Format`."""
        if self._kind == 'NVFP4':
            return fp4.nvfp4(source, f'{module}.weight', f'{module}.weight_scale',
                             fp4.factor(source, f'{module}.weight_scale_2'), rows, columns)
        return packing.scale(source.get(f'{module}.weight', (rows, columns)),
                             of_rows(source, f'{module}.weight_scale', rows), None, columns)
