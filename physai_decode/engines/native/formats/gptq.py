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

Of 4 bits: ``qweight`` int32 [K / 8, N], ``qzeros`` int32 [groups, N / 8], ``scales`` [groups, N],
``g_idx`` int32 [K]. Of 8 bits a word has 4 numbers instead of 8. The format ``gptq`` stores zeros
less one, ``gptq_v2`` as they are. Frantar et al., arXiv 2210.17323.
"""

from physai_decode.engines.native import packing
from physai_decode.engines.native.formats.refusal import check_group
from physai_decode.engines.native.formats.refusal import refusal
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.source import Source
from physai_decode.model_config import part
from physai_decode.model_config import Quantization
import torch

BITS = (4, 8)


class Gptq:
    """GPTQ with one setting for all modules, or with rules for some of them."""

    def __init__(self, quantized: Quantization) -> None:
        """
        Take what a checkpoint says of its quantisation.

        :raises EngineError: naming what the native engine does not run.
        """
        if quantized.layout not in ('gptq', 'gptq_v2'):
            raise refusal(f'the GPTQ format {quantized.layout!r}', 'gptq and gptq_v2')
        # Which module one of GPTQModel's rules is for shows in the shapes of its tensors.
        self._settings = [(quantized.bits, quantized.group_size)]
        rules = part(quantized.settings, 'dynamic')
        for changed in (part(rules, rule) for rule in rules if not rule.startswith('-:')):
            self._settings.append((changed.get('bits', quantized.bits),
                                   changed.get('group_size', quantized.group_size)))
        for bits, size in self._settings:
            if bits not in BITS:
                raise refusal(f'GPTQ of {bits!r} bits', ' and '.join(map(str, BITS)))
            check_group('GPTQ', size)
        # The scales of 4 bits are float16, and the kernel has less to do in it.
        self.dtype = torch.float16 if quantized.bits == 4 else None
        self._zeros_less_one = quantized.layout == 'gptq'

    def holds(self, source: Source, module: str) -> bool:
        """See `Format`."""
        return source.entry(f'{module}.qweight') is not None

    def read(self, source: Source, module: str, rows: int, columns: int) -> Linear:
        """See `Format`."""
        bits, size = self._setting(source, module, columns)
        groups = -(-columns // size)
        # Some writers leave g_idx out where it is plain.
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

    def _setting(self, source, module, columns):
        """Return the bits and the group size of a module: those that its tensors have."""
        def shape(end):
            entry = source.entry(f'{module}.{end}')
            return entry.shape[:1] if entry else None

        every = [(bits, columns if size == -1 else size) for bits, size in self._settings]
        fitting = (
            each for each in every if shape('qweight') == (columns * each[0] // 32,)
            and shape('scales') == (-(-columns // each[1]),))
        return next(fitting, every[0])
