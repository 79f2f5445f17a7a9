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
The features of the installed Triton that depend on its version and on the GPU.

Programmatic dependent launch (PDL) starts a kernel while the previous one ends. It needs Triton
3.5 and compute capability 9.0. Otherwise kernels are compiled without ``PDL`` and never call
``gdc_launch_dependents`` and ``gdc_wait``.
"""

import errno
import re

from physai_decode.engines import chip
from physai_decode.pip_command import install
import torch
import triton
import triton.language as tl

LEAST = (3, 1)          # the oldest version that compiles all kernels
_NO_CACHE = errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EROFS
LEAST_CAPABILITY = (9, 0)       # for programmatic dependent launch (PDL)
VERSION = tuple(int(number) for number in re.findall(r'\d+', triton.__version__)[:2])
if VERSION < LEAST:
    raise ImportError(f'Triton {triton.__version__} is too old: install {LEAST[0]}.{LEAST[1]} or '
                      'newer')

KNOWS_PDL = VERSION >= (3, 5)
LEAST_COLUMNS = 8 if VERSION >= (3, 5) else 16      # of a product on the tensor cores
PIPELINES = VERSION >= (3, 3)       # three-dimensional loads; older versions abort the process
TUPLES = VERSION >= (3, 3)          # several results of assembly, likewise

if KNOWS_PDL:
    from triton.language.extra.cuda import gdc_launch_dependents
    from triton.language.extra.cuda import gdc_wait
else:
    @triton.jit
    def gdc_launch_dependents():
        """Let the next kernel start."""

    @triton.jit
    def gdc_wait():
        """Wait for the results of the previous kernels."""


def supports_pdl(device: torch.device) -> bool:
    """Whether a kernel on this device can start while the previous one ends."""
    return KNOWS_PDL and device.type == 'cuda' and chip.capability(device) >= LEAST_CAPABILITY


def problem(device: torch.device, float32: bool = False) -> str | None:
    """
    Return why this Triton cannot compile the kernels for a device; None if it can.

    :param float32: whether quantised weights are multiplied in float32.
    """
    major, minor = chip.capability(device)
    if VERSION < (3, 3) and float32:        # products of 4-bit weights would abort the process
        return (f'Triton {triton.__version__} cannot compile all products of quantised weights in '
                'float32: set engine.dtype to auto, or install Triton 3.3 or newer')
    if VERSION == (3, 3) and major < 8:
        return (f'Triton {triton.__version__} cannot compile attention for compute capability '
                f'{major}.{minor}: install another version')
    try:
        _write[(1,)](torch.empty(1, dtype=torch.int32, device=device))
    except Exception as error:          # of ptxas for a newer chip, or of the C compiler
        reason = ' '.join(str(error).split())[:200]
        remedy = ('set TRITON_CACHE_DIR to a folder that can be written and has space'
                  if isinstance(error, OSError) and error.errno in _NO_CACHE else
                  f'{install("-U", "triton")}, and apt install gcc python3-dev')
        return (f'Triton {triton.__version__} cannot compile for compute capability '
                f'{major}.{minor} ({type(error).__name__}: {reason}): {remedy}')
    return None


@triton.jit
def _write(number):
    """Write a number, to see whether kernels compile and start."""
    tl.store(number, 1)
