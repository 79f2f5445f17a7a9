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
4-bit floats, E2M1, with a scale per group: NVFP4 and MXFP4.

A byte has two values, that of the lower column in its low bits. OCP Microscaling Formats (MX)
Specification 1.0, sections 5.3.3 and 5.4.1.
"""

from physai_decode.engine import EngineError
from physai_decode.engines.native import packing
from physai_decode.engines.native.linear import E2M1
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import FP4_COLUMNS
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.source import Source
import torch
from torch import Tensor
import torch.nn.functional as F

GROUP = {'nvfp4': FP4_COLUMNS, 'mxfp4': 32}      # columns that share a scale
E4M3_EXPONENTS = -9, 8                  # of the powers of 2 that float8_e4m3fn has


def nvfp4(source: Source, packed: str, scales: str, factor: Tensor, rows: int,
          columns: int) -> Fp4:
    """
    Read a projection whose scales are float8_e4m3fn times ``factor``.

    :param packed: and ``scales``, the names of the tensors.
    :raises EngineError: a tensor is missing, or has another dtype or shape.
    """
    codes, found = _read(source, packed, scales, torch.float8_e4m3fn, rows, columns,
                         GROUP['nvfp4'])
    return packing.fp4(codes, found, factor.to(codes.device))


def mxfp4(source: Source, packed: str, scales: str, rows: int, columns: int) -> Fp4 | Int4:
    """
    Read a projection whose scales are exponents of 2, uint8 with a bias of 127; see `nvfp4`.

    :returns: an `Fp4`, unless the scales of a row differ by more than float8_e4m3fn can hold.
    """
    size = GROUP['mxfp4']
    codes, found = _read(source, packed, scales, torch.uint8, rows, columns, size)
    if bool((found == 255).any()):
        raise EngineError(f'tensor {scales} has scales that are NaN: download the model again')
    # The scale of zeros does not matter.
    used = F.pad((codes & 7).bool(), (0, -columns % size)).unflatten(1, (-1, size)).any(2)
    exponents = torch.where(used, found.int(), 0) - 127
    lowest, highest = E4M3_EXPONENTS
    top = exponents.amax(1, keepdim=True) - highest
    relative = torch.where(used, exponents - top, 0)
    if bool((relative < lowest).any()):
        return packing.pack(codes.t(), torch.exp2(exponents.float()).t(), None, size, table=E2M1)
    wide = torch.exp2(relative.float()).to(torch.float8_e4m3fn).view(torch.uint8)
    wide = wide.repeat_interleave(size // FP4_COLUMNS, 1)[:, :-(-columns // FP4_COLUMNS)]
    return packing.fp4(codes, wide.view(torch.float8_e4m3fn), torch.exp2(top.float()).squeeze(1))


def factor(source: Source, name: str) -> Tensor:
    """
    Read the factor common to all scales of a tensor.

    :raises EngineError: it is missing, or not one finite number above 0.
    """
    entry = source.entry(name)
    shape = entry.shape if entry and entry.shape == (1,) else ()
    number = source.get(name, shape).reshape(()).float()
    if not (number > 0 and number.isfinite()):
        raise EngineError(f'tensor {name} is {number.item():g}, not a number above 0: download '
                          'the model again')
    return number


def _read(source: Source, packed: str, scales: str, kind: torch.dtype, rows: int, columns: int,
          size: int) -> tuple[Tensor, Tensor]:
    """Read codes uint8 [rows, columns] and their scales."""
    words = source.get(packed, (rows, -(-columns // 2)))
    found = source.get(scales, (rows, -(-columns // size)))
    for name, tensor, wanted in ((packed, words, torch.uint8), (scales, found, kind)):
        if tensor.dtype != wanted:
            raise EngineError(f'tensor {name} is stored as {tensor.dtype}, config.json implies '
                              f'{wanted}: they do not belong together')
    return packing.halves(words)[:, :columns], found
