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
The registry of formats of quantised checkpoints; each format is one file.

A format parses the ``quantization_config`` and refuses by name what the engine does not run. Then
it repacks one module at a time into a layout that the kernels read.
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
from physai_decode.engines.native.linear import Stored
from physai_decode.engines.native.source import Source
from physai_decode.model_config import Quantization
import torch


class Format(Protocol):
    """How one checkpoint stores its quantised modules."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of activations in which its kernels are fastest; None: the model's own."""
        ...

    def holds(self, source: Source, module: str) -> bool:
        """Whether a module is quantised; if not, it has a plain weight."""
        ...

    def read(self, source: Source, module: str, rows: int, columns: int) -> Stored:
        """
        Read a quantised module, without its bias.

        :param rows: output features.
        :param columns: input features.
        :raises EngineError: a tensor is missing or does not match the others.
        """
        ...


# Keyed by quant_method. A format raises EngineError if the engine does not run the checkpoint.
_FORMATS: dict[str, Callable[[Quantization], Format]] = {
    'gptq': Gptq, 'awq': Awq, 'compressed-tensors': CompressedTensors,
    'fp8': Fp8, 'bitsandbytes': BitsAndBytes, 'modelopt': ModelOpt}


def parse(quantized: Quantization) -> Format:
    """
    Return the format of a checkpoint.

    :raises EngineError: the native engine does not run it; names an engine that may.
    """
    if quantized.method not in _FORMATS:
        other = 'exllamav2' if quantized.method == 'exl2' else 'transformers'
        raise EngineError(f'the native engine does not run {quantized.method} checkpoints (it '
                          f'runs {", ".join(_FORMATS)}); set engine.name to {other}')
    with parsing('quantization_config in config.json'):
        return _FORMATS[quantized.method](quantized)
