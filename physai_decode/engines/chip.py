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
What a CUDA device's chip has, by its compute capability; a variable makes it look older.

``PHYSAI_DECODE_CAPABILITY=8.7`` has a newer GPU take the path that a Jetson Orin takes: it is for
development, and never adds what the chip lacks.
"""

from functools import cache
import os
import re

from physai_decode.engine import EngineError
import torch

VARIABLE = 'PHYSAI_DECODE_CAPABILITY'
# Shared memory that a program can have, in bytes, by the vendor's table; 99 KiB elsewhere.
_SHARED_KIB = {(7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (11, 0): 227}
_LEAST_KIB = 99


def capability(device: torch.device) -> tuple[int, int]:
    """
    Give the compute capability, as (8, 7); no higher than the variable says.

    :raises EngineError: the variable's value is none.
    """
    own = torch.cuda.get_device_capability(device)
    forced = _forced(os.environ.get(VARIABLE))
    return own if forced is None else min(own, forced)


def pretended(device: torch.device) -> str | None:
    """Give the capability that the device is held to, such as '8.7'; None where it is its own."""
    held = capability(device)
    return None if held == torch.cuda.get_device_capability(device) else f'{held[0]}.{held[1]}'


def shared_bytes(device: torch.device) -> int:
    """Give the shared memory that one program can have."""
    listed = 1024 * _SHARED_KIB.get(capability(device), _LEAST_KIB)
    # PyTorch 2.5 does not tell it.
    properties = torch.cuda.get_device_properties(device)
    own = getattr(properties, 'shared_memory_per_block_optin', listed)
    return own if pretended(device) is None else min(own, listed)


@cache
def _forced(value):
    if not value:
        return None
    if not re.fullmatch(r'\d+\.\d', value):
        raise EngineError(
            f'{VARIABLE} is {value!r}: set it to a compute capability such as 8.7, or unset it')
    major, minor = value.split('.')
    return int(major), int(minor)
