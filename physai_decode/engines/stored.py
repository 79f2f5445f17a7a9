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
Read the tensors of safetensors files into memory, and check how they are stored.

Files are read, not memory-mapped: if a mapped file is truncated, even long after the load, SIGBUS
kills the process.
"""

from collections.abc import Iterable
from typing import Any

from physai_decode import regular_file
from physai_decode.checkpoint import Checkpoint
from physai_decode.checkpoint import TensorEntry
from physai_decode.engine import EngineError
import torch
from torch import Tensor

_DTYPES = {
    'BOOL': torch.bool, 'U8': torch.uint8, 'I8': torch.int8, 'F8_E4M3': torch.float8_e4m3fn,
    'F8_E5M2': torch.float8_e5m2, 'U16': torch.uint16, 'I16': torch.int16, 'F16': torch.float16,
    'BF16': torch.bfloat16, 'U32': torch.uint32, 'I32': torch.int32, 'F32': torch.float32,
    'U64': torch.uint64, 'I64': torch.int64, 'F64': torch.float64, 'C64': torch.complex64}
if hasattr(torch, 'float8_e8m0fnu'):        # PyTorch 2.7
    _DTYPES['F8_E8M0'] = torch.float8_e8m0fnu
FLOATS = ('F64', 'F32', 'F16', 'BF16')      # of unquantised weights
# The methods whose checkpoints always have quantised tensors, and the dtypes of other tensors.
_METHODS = ('gptq', 'awq', 'compressed-tensors', 'fp8', 'bitsandbytes', 'modelopt', 'exl2')
_PLAIN = (*FLOATS, 'I64', 'BOOL')


def check_quantised(model: Checkpoint) -> None:
    """
    Check that a checkpoint whose config names a quantisation has quantised tensors.

    :raises EngineError: it has none.
    """
    found = model.quantized
    if found and found.method in _METHODS and found.settings.get('format') != 'dense' and all(
            entry.dtype in _PLAIN for entry in model.tensors.values()):
        raise not_quantised(model)


def not_quantised(model: Checkpoint) -> EngineError:
    """Return the error for a checkpoint that lacks the quantisation that its config names."""
    said = f'{model.folder}: config.json says {model.quantization}, but no tensor is quantised'
    others = sorted({entry.dtype for entry in model.tensors.values()} - {*_PLAIN, 'I32'})
    if others:
        return EngineError(
            f'{said} that way (some are stored as {", ".join(others)}): copy or download the '
            'model again, with the config.json of these weights')
    return EngineError(
        f'{said} that way: remove quantization_config from config.json if the weights are '
        'unquantised, or download the quantised model again')


def wrong_shape(model: Checkpoint, name: str, found: Iterable[int],
                implied: Iterable[int]) -> EngineError:
    """Return the error for a tensor whose shape is not the one that config.json implies."""
    return EngineError(
        f'{model.folder}: tensor {name} has shape {list(found)}, but config.json implies '
        f'{list(implied)}: copy or download the model again, with the config.json of these '
        'weights')


def check_float(name: str, entry: TensorEntry) -> None:
    """
    Check that an unquantised weight is stored as floats of at least 16 bits.

    :raises EngineError: it is stored otherwise, so its quantisation is unknown.
    """
    if entry.dtype not in FLOATS and entry.dtype in _DTYPES:    # `read` refuses unknown types
        raise EngineError(
            f'{entry.path}: tensor {name} is stored as {entry.dtype}, but config.json names no '
            'quantisation with it: download the model again, with its quantization_config in '
            'config.json')


def read(entry: TensorEntry) -> Tensor:
    """
    Read one tensor.

    :returns: the tensor on the CPU, in the stored dtype and shape. It owns its memory.
    :raises EngineError: the file changed since it was inspected, cannot be read, or has a dtype
        that PyTorch lacks.
    """
    if entry.dtype not in _DTYPES:
        raise EngineError(
            f'{entry.path} has tensors of type {entry.dtype}, which PyTorch {torch.__version__} '
            'does not have: choose another format of the model, or copy or download it again')
    content = torch.empty(entry.bytes, dtype=torch.uint8)
    try:
        with regular_file.opened(entry.path) as file:
            file.seek(entry.start)
            count = file.readinto(content.numpy().data)
    except OSError as error:
        raise EngineError(f'{entry.path} cannot be read ({error}): copy or download the model '
                          'again') from None
    if count < entry.bytes:
        raise EngineError(f'{entry.path} was truncated while it was read: copy or download the '
                          'model again')
    return content.view(_DTYPES[entry.dtype]).view(entry.shape)


class Lazy:
    """A tensor that is read when it is indexed; it has the interface of a safetensors slice."""

    def __init__(self, entry: TensorEntry) -> None:
        self._entry = entry

    def get_dtype(self) -> str:
        """Return the stored dtype by its safetensors name."""
        return self._entry.dtype

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._entry.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Read the tensor and return the indexed part."""
        return read(self._entry)[index]
