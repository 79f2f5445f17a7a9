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

"""The size of a checkpoint's weights in the layouts of `linear`, before they are read."""

from collections.abc import Iterable
from collections.abc import Mapping
import math

from physai_decode.checkpoint import TensorEntry
from physai_decode.engines import stored
from physai_decode.engines.native.linear import FP4_COLUMNS
from physai_decode.engines.native.linear import FP4_GROUP
from physai_decode.engines.native.linear import TILE_ROWS
from physai_decode.engines.native.packing import GROUP_SIZES
from physai_decode.engines.native.packing import TABLE_GROUP
from physai_decode.model_config import Quantization
import torch

# By format, the names of a module's weights, their scales and their zero points.
_WEIGHTS = 'qweight', 'weight_packed', 'weight'
_SCALES = 'scales', 'weight_scale', 'weight_scale_inv', 'SCB', 'absmax'
_ZEROS = 'qzeros', 'weight_zero_point'


def weight_bytes(tensors: Mapping[str, TensorEntry], quantized: Quantization | None,
                 dtype: torch.dtype) -> int:
    """
    Return the size of all weights, which are quantised if their scales are beside them.

    :param tensors: by name.
    :param dtype: of the weights that are not quantised.
    """
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        module, _, end = name.rpartition('.')
        modules.setdefault(module.removesuffix('.weight'), {})[end] = entry
    return sum(_module_bytes(found, quantized, dtype) for found in modules.values())


def _module_bytes(found: Mapping[str, TensorEntry], quantized: Quantization | None,
                  dtype: torch.dtype) -> int:
    """Return the size of one module's tensors, which have the ends of their names."""
    weight, scales, zeros = (next((found[end] for end in ends if end in found), None)
                             for ends in (_WEIGHTS, _SCALES, _ZEROS))
    if weight is None or scales is None or quantized is None or len(weight.shape) != 2 \
            or not all((*weight.shape, *scales.shape)):
        return _plain_bytes(found.values(), dtype)
    rest = _plain_bytes((each for each in found.values()
                         if each not in (weight, scales, zeros)), dtype)
    rows, columns = weight.shape
    has_zeros = zeros is not None and not quantized.settings.get('sym')
    if 'absmax' in found:               # per block of codes, two of which are a byte
        codes = 2 * weight.bytes
        size = max(1, min(TABLE_GROUP, codes // math.prod(scales.shape)))
        return rest + weight.bytes + 2 * (codes // size)
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    if weight.dtype == 'U8':
        return rest + _fp4_bytes(rows, 2 * columns)
    if weight.dtype != 'I32':
        return rest + _scaled_bytes(rows, columns, groups, has_zeros)
    bits = quantized.bits if quantized.bits in (4, 8) else 4
    if 'qweight' in found and len(scales.shape) == 2:
        groups, rows = scales.shape
        if zeros is not None and len(zeros.shape) == 2:
            bits = max(4, 32 * zeros.shape[1] // rows)
    columns = 32 * math.prod(weight.shape) // bits // rows
    size_of = _int4_bytes if bits == 4 else _scaled_bytes
    return rest + size_of(rows, columns, groups, has_zeros)


def _plain_bytes(entries: Iterable[TensorEntry], dtype: torch.dtype) -> int:
    return sum(dtype.itemsize * math.prod(entry.shape) if entry.dtype in stored.FLOATS
               else entry.bytes for entry in entries)


def _int4_bytes(rows: int, columns: int, groups: int, has_zeros: bool) -> int:
    size = _kernel_group(columns, groups)
    blocks = -(-rows // TILE_ROWS) * -(-columns // (4 * size))
    return blocks * TILE_ROWS * (2 * size + 4 * 2 * (1 + has_zeros))


def _fp4_bytes(rows: int, columns: int) -> int:
    blocks = -(-rows // TILE_ROWS) * -(-columns // (4 * FP4_GROUP))
    return blocks * TILE_ROWS * (2 * FP4_GROUP + 4 * FP4_GROUP // FP4_COLUMNS) + 4 * rows


def _scaled_bytes(rows: int, columns: int, groups: int, has_zeros: bool) -> int:
    if groups > 1 or has_zeros:
        groups = -(-columns // _kernel_group(columns, groups))
    return rows * (columns + 4 * groups * (1 + has_zeros))


def _kernel_group(columns: int, groups: int) -> int:
    """Return the columns that share a scale in the kernels; see `packing`."""
    size = -(-columns // groups)
    return next((each for each in reversed(GROUP_SIZES) if size % each == 0), GROUP_SIZES[0])
