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
What the installed Triton has, of what not every version and chip does.

Programmatic dependent launch starts a kernel while the one before it ends. Triton has it from 3.5
on, chips from compute capability 9.0 on. Where either lacks it, kernels are compiled without
``EARLY``, and the two functions here are never called.
"""

import re

from physai_decode.engines import chip
import torch
import triton

LEAST = (3, 1)          # the oldest version whose compiler takes all kernels
EARLY = (9, 0)          # the capability from which on chips launch early
VERSION = tuple(int(number) for number in re.findall(r'\d+', triton.__version__)[:2])
if VERSION < LEAST:
    raise ImportError(f'Triton {triton.__version__} is too old: install {LEAST[0]}.{LEAST[1]} or '
                      'newer')

KNOWS_EARLY = VERSION >= (3, 5)
LEAST_COLUMNS = 8 if VERSION >= (3, 5) else 16      # of a product on the matrix units
PIPELINES = VERSION >= (3, 3)       # loads of three dimensions; older versions abort the process

if KNOWS_EARLY:
    from triton.language.extra.cuda import gdc_launch_dependents
    from triton.language.extra.cuda import gdc_wait
else:
    @triton.jit
    def gdc_launch_dependents():
        """Let the next kernel start."""

    @triton.jit
    def gdc_wait():
        """Wait for what the kernels before have written."""


def launches_early(device: torch.device) -> bool:
    """Say whether kernels on this device can start while the one before ends."""
    return KNOWS_EARLY and device.type == 'cuda' and chip.capability(device) >= EARLY


def problem(device: torch.device) -> str | None:
    """Tell why this Triton can't compile the kernels for this device; None where it can."""
    major, minor = chip.capability(device)
    if VERSION == (3, 3) and major < 8:
        return (f'Triton {triton.__version__} compiles no attention for compute capability '
                f'{major}.{minor}: install another version')
    return None
