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
AWQ checkpoints in the layout "gemm", as AutoAWQ and GPTQModel write them.

``qweight`` int32 [K, N / 8], ``qzeros`` int32 [groups, N / 8], ``scales`` [groups, N]. Nibble i of
a word belongs to the word's column ``ORDER[i]``. Lin et al., arXiv 2306.00978.
"""

from physai_decode.config import shown_json as shown
from physai_decode.engines.native import packing
from physai_decode.engines.native.formats.refusal import check_group
from physai_decode.engines.native.formats.refusal import refusal
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.source import Source
from physai_decode.model_config import Quantization
import torch
from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq:
    """AWQ with 4 bits."""

    dtype = torch.float16       # the dtype of its scales, in which the kernel is fastest

    def __init__(self, quantized: Quantization) -> None:
        """
        Parse a quantization_config.

        :raises EngineError: the native engine does not run it.
        """
        settings = quantized.settings
        # Key names in config.json, and in AutoAWQ's own quant_config.json.
        bits = settings.get('bits', settings.get('w_bit', 4))
        self._size = settings.get('group_size', settings.get('q_group_size', 128))
        layout = settings.get('version') or settings.get('checkpoint_format') \
            or settings.get('format') or 'gemm'
        if bits != 4:
            raise refusal(f'AWQ of {shown(bits)} bits', '4')
        if str(layout).lower() != 'gemm':
            raise refusal(f'the AWQ version {shown(layout)}', 'gemm')
        if not settings.get('zero_point', True):
            raise refusal('AWQ without zero points', 'AWQ with zero points')
        check_group('AWQ', self._size)

    def holds(self, source: Source, module: str) -> bool:
        """See `Format`."""
        return source.entry(f'{module}.qweight') is not None

    def read(self, source: Source, module: str, rows: int, columns: int) -> Int4:
        """See `Format`."""
        size = columns if self._size == -1 else self._size
        groups = -(-columns // size)
        return packing.pack(
            _numbers(source.get(f'{module}.qweight', (columns, rows // 8))),
            source.get(f'{module}.scales', (groups, rows)),
            _numbers(source.get(f'{module}.qzeros', (groups, rows // 8))), size)


def _numbers(words: Tensor) -> Tensor:
    """Unpack words [M, N / 8] to uint8 [M, N]."""
    nibbles = [ORDER.index(column) for column in range(8)]
    return packing.unpack(words, 4, 1).unflatten(1, (-1, 8))[..., nibbles].flatten(1)
