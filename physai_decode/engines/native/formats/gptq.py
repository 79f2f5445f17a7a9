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
GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

4 bits: ``qweight`` int32 [K / 8, N], ``qzeros`` int32 [groups, N / 8], ``scales`` [groups, N],
``g_idx`` int32 [K]. 8 bits: a word has 4 values instead of 8. The format ``gptq`` stores zero
points minus 1, ``gptq_v2`` stores them unchanged. Frantar et al., arXiv 2210.17323.
"""

from physai_decode.config import shown_json as shown
from physai_decode.engines.native import packing
from physai_decode.engines.native.formats.refusal import check_group
from physai_decode.engines.native.formats.refusal import refusal
from physai_decode.engines.native.linear import Stored
from physai_decode.engines.native.source import Source
from physai_decode.model_config import part
from physai_decode.model_config import Quantization
import torch

BITS = (4, 8)


class Gptq:
    """GPTQ with one setting for all modules, or with GPTQModel's rules for some."""

    def __init__(self, quantized: Quantization) -> None:
        """
        Parse a quantization_config.

        :raises EngineError: the native engine does not run it.
        """
        if quantized.layout not in ('gptq', 'gptq_v2'):
            raise refusal(f'the GPTQ format {shown(quantized.layout)}', 'gptq and gptq_v2')
        # The shapes of a module's tensors tell which setting it has.
        self._settings = [(quantized.bits, quantized.group_size)]
        rules = part(quantized.settings, 'dynamic')
        for changed in (part(rules, rule) for rule in rules if not rule.startswith('-:')):
            self._settings.append((changed.get('bits', quantized.bits),
                                   changed.get('group_size', quantized.group_size)))
        for bits, size in self._settings:
            if bits not in BITS:
                raise refusal(f'GPTQ of {shown(bits)} bits', ' and '.join(map(str, BITS)))
            check_group('GPTQ', size)
        # With 4 bits, scales are float16, and the kernel is fastest in it.
        self.dtype = torch.float16 if quantized.bits == 4 else None
        self._zeros_less_one = quantized.layout == 'gptq'

    def holds(self, source: Source, module: str) -> bool:
        """See `Format`."""
        return source.entry(f'{module}.qweight') is not None

    def read(self, source: Source, module: str, rows: int, columns: int) -> Stored:
        """See `Format`."""
        bits, size = self._setting(source, module, columns)
        groups = -(-columns // size)
        # Some writers omit g_idx if groups are contiguous.
        g_idx = None
        if source.entry(f'{module}.g_idx') is not None:
            g_idx = source.get(f'{module}.g_idx', (columns,))
        values = packing.unpack(
            source.get(f'{module}.qweight', (columns * bits // 32, rows)), bits, 0)
        zeros = packing.unpack(
            source.get(f'{module}.qzeros', (groups, rows * bits // 32)), bits, 1)
        if self._zeros_less_one:
            zeros = (zeros + 1) & (1 << bits) - 1
        scales = source.get(f'{module}.scales', (groups, rows))
        if bits == 4:
            return packing.pack(values, scales, zeros, size, g_idx)
        return packing.scale(
            packing.signed(values.t()), scales.t(), packing.signed(zeros.t()), size, g_idx)

    def _setting(self, source: Source, module: str, columns: int) -> tuple[int, int]:
        """Return the bits and the group size that match the shapes of a module's tensors."""
        def first(end: str) -> tuple[int, ...] | None:
            entry = source.entry(f'{module}.{end}')
            return entry.shape[:1] if entry else None

        settings = [(bits, columns if size == -1 else size) for bits, size in self._settings]
        matches = (
            (bits, size) for bits, size in settings if first('qweight') == (columns * bits // 32,)
            and first('scales') == (-(-columns // size),))
        return next(matches, settings[0])
