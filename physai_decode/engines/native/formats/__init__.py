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
The formats of quantised weights: one file each, and here which there are.

A format is made from what config.json says of it, and refuses by name what is not run; it then
turns the tensors of one module after the other into the form that the kernels read.
"""

from collections.abc import Callable
from typing import Protocol

from physai_decode.checkpoint import parsing
from physai_decode.engine import EngineError
from physai_decode.engines.native.formats.awq import Awq
from physai_decode.engines.native.formats.bitsandbytes import BitsAndBytes
from physai_decode.engines.native.formats.compressed_tensors import CompressedTensors
from physai_decode.engines.native.formats.fp8 import Fp8
from physai_decode.engines.native.formats.gptq import Gptq
from physai_decode.engines.native.formats.modelopt import ModelOpt
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.source import Source
from physai_decode.model_config import Quantization
import torch


class Format(Protocol):
    """How the quantised modules of one checkpoint are stored."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The number format in which its kernels have least to do; None: the model's own."""
        ...

    def holds(self, source: Source, module: str) -> bool:
        """Whether a module is quantised; others have a weight like any other model's."""
        ...

    def read(self, source: Source, module: str, rows: int, columns: int) -> Linear:
        """
        Read a quantised module, without its bias.

        :param rows: numbers that it gives.
        :param columns: numbers that it takes.
        :raises EngineError: a tensor is missing, or they do not belong together.
        """
        ...


# By quant_method. A format raises EngineError where it does not run what is asked for.
_FORMATS: dict[str, Callable[[Quantization], Format]] = {
    'gptq': Gptq, 'awq': Awq, 'compressed-tensors': CompressedTensors,
    'fp8': Fp8, 'bitsandbytes': BitsAndBytes, 'modelopt': ModelOpt}


def parse(quantized: Quantization) -> Format:
    """
    Return the format that a checkpoint says it has.

    :raises EngineError: naming what the native engine does not run, and the engine that may.
    """
    if quantized.method not in _FORMATS:
        other = 'exllamav2' if quantized.method == 'exl2' else 'transformers'
        raise EngineError(f'the native engine does not run {quantized.method} checkpoints (it '
                          f'runs {", ".join(_FORMATS)}); set engine.name to {other}')
    with parsing('quantization_config in config.json'):
        return _FORMATS[quantized.method](quantized)
