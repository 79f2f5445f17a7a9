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

"""The table of an `Int4` as the kernels read it."""

from functools import cache

from physai_decode.engines.native.linear import Int4
import torch
from torch import Tensor

# Looks up the nibbles of two words, $4, in the 16-bit floats of `table`: $5 and $7 have their low
# bytes, $9 and $11 their high ones. An instruction selects four of 8 bytes, by bits 0 to 2 of four
# nibbles. Bit 3 of each nibble then selects between the results for the halves of the table.
ASSEMBLY = """{
.reg .b32 a, b, c, d, f, g, h, i, k, l, m, n, s, t, u;
mov.b64 {a, b}, $5; mov.b64 {c, d}, $7; mov.b64 {f, g}, $9; mov.b64 {h, i}, $11;
prmt.b32 u, $4, 0, 0x3120;
and.b32 n, u, 0x77777777; shl.b32 t, u, 4;
prmt.b32 s, u, t, 0x9D8C;
prmt.b32 k, a, b, n; prmt.b32 l, c, d, n; lop3.b32 k, s, l, k, 0xCA;
prmt.b32 l, f, g, n; prmt.b32 m, h, i, n; lop3.b32 l, s, m, l, 0xCA;
prmt.b32 $0, k, l, 0x6240; prmt.b32 $1, k, l, 0x7351;
shr.b32 n, n, 16;
prmt.b32 s, u, t, 0xBFAE;
prmt.b32 k, a, b, n; prmt.b32 l, c, d, n; lop3.b32 k, s, l, k, 0xCA;
prmt.b32 l, f, g, n; prmt.b32 m, h, i, n; lop3.b32 l, s, m, l, 0xCA;
prmt.b32 $2, k, l, 0x6240; prmt.b32 $3, k, l, 0x7351;
}""".replace('\n', ' ')


def table(weight: Int4, dtype: torch.dtype) -> Tensor:
    """
    Return what the kernels read of a weight's table; without one, another tensor.

    :param dtype: of the product's input.
    :returns: int64 [12]: the low and the high bytes of 16 numbers of ``dtype``, two each, and 16
        float32. For a ``dtype`` of 32 bits, the bytes are not used.
    """
    if weight.table is None:        # Triton requires a valid pointer even for unused arguments
        return weight.scales
    return _table(weight.table, dtype, weight.scales.device)


@cache
def _table(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    exact = torch.tensor(numbers)
    half = exact.to(dtype if dtype.itemsize == 2 else torch.bfloat16)
    low_high = half.view(torch.uint8).view(16, 2).t().contiguous()
    return torch.cat((low_high.flatten().view(torch.int64), exact.view(torch.int64))).to(device)
