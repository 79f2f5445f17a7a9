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
The table of an `Int4`, as the kernels read it, and the assembly that looks up nibbles in it.

A lookup has the index of two nibbles, and its result is a pair of 16-bit floats, so a program
keeps all 256 pairs in shared memory: 32 times, one for each lane, because lanes that read one bank
wait for each other.
"""

from functools import cache

from physai_decode.engines.native.linear import Int4
import torch
from torch import Tensor

PAIRS = 256
STATIC_BYTES = 128 * PAIRS      # of shared memory


def _fill(warps: int) -> str:
    """Return the assembly that copies the pairs at $1 to shared memory; $0 is a lane's copy."""
    # A thread has every (32 * warps)th pair. The lanes of a warp write to different banks.
    rows = range(PAIRS // (32 * warps))
    quads = [f'{{a{row}, b{row}, c{row}, d{row}}}' for row in rows]
    load = 'ld.global.nc.L1::evict_last.v4.b32'
    text = [f'{load} {quads[row]}, [p + {row * 512 * warps}];' for row in rows]
    text += ['and.b32 l, t, 31; mad.lo.u32 $0, l, 4, s; mad.lo.u32 s, t, 128, s; shl.b32 l, l, 4;']
    for turn in range(8):
        text += [f'add.u32 t, l, {16 * turn}; and.b32 t, t, 112; add.u32 t, t, s;']
        text += [f'st.shared.v4.b32 [t + {row * 4096 * warps}], {quads[row]};' for row in rows]
    registers = ', '.join(f'{name}<{len(rows)}>' for name in 'abcd')
    return f"""{{
        .shared .align 16 .b8 pairs[{STATIC_BYTES}];
        .reg .b32 l, s, t, {registers}; .reg .b64 p;
        mov.u32 t, %tid.x; mov.u32 s, pairs; mad.wide.u32 p, t, 16, $1;
        {' '.join(text)}
        bar.sync 0; }}""".replace('\n', ' ')


FILL = {warps: _fill(warps) for warps in (1, 2, 4, 8)}
# A dot product with one byte that is not 0 moves a byte to bit 7, and adds the address.
LOOKUP = """{
    .reg .b32 a, b, c, d;
    dp4a.u32.u32 a, $4, 0x80, $5; dp4a.u32.u32 b, $4, 0x8000, $5;
    dp4a.u32.u32 c, $4, 0x800000, $5; dp4a.u32.u32 d, $4, 0x80000000, $5;
    ld.shared.b32 a, [a]; ld.shared.b32 b, [b]; ld.shared.b32 c, [c]; ld.shared.b32 d, [d];
    prmt.b32 $0, a, c, 0x5410; prmt.b32 $1, a, c, 0x7632;
    prmt.b32 $2, b, d, 0x5410; prmt.b32 $3, b, d, 0x7632; }""".replace('\n', ' ')


def table(weight: Int4, dtype: torch.dtype) -> Tensor:
    """
    Return what the kernels read of a weight's table; without one, another tensor.

    :param dtype: of the product's input.
    :returns: int32 [1040]: 16 float32, and each pair of ``dtype`` four times; its low half is the
        number of the low nibble. For a ``dtype`` of 32 bits, the pairs are not used.
    """
    if weight.table is None:        # Triton requires a valid pointer even for unused arguments
        return weight.scales
    return _table(weight.table, dtype, weight.scales.device)


@cache
def _table(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    exact = torch.tensor(numbers)
    half = exact.to(dtype if dtype.itemsize == 2 else torch.bfloat16)
    pairs = torch.stack((half.repeat(16), half.repeat_interleave(16)), 1)
    four = pairs.view(torch.int32).repeat_interleave(4)         # loads and stores take four
    return torch.cat((exact.view(torch.int32), four)).to(device)
