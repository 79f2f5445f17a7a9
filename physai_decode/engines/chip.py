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
The features of a GPU by its compute capability.

For development, ``PHYSAI_DECODE_CAPABILITY=8.7`` makes a newer GPU run the code path of a Jetson
Orin. The variable can only lower the capability.
"""

from functools import cache
import os
import re

from physai_decode.engine import EngineError
import torch

VARIABLE = 'PHYSAI_DECODE_CAPABILITY'
# Maximum shared memory per block, from NVIDIA's table.
_SHARED_KIB = {(7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (11, 0): 227}
_LEAST_KIB = 99


def capability(device: torch.device) -> tuple[int, int]:
    """
    Return the compute capability, such as (8, 7), limited by the variable.

    :raises EngineError: the value of the variable is invalid.
    """
    actual = torch.cuda.get_device_capability(device)
    forced = _forced(os.environ.get(VARIABLE))
    return actual if forced is None else min(actual, forced)


def pretended(device: torch.device) -> str | None:
    """Return the lowered capability, such as '8.7'; None if it is not lowered."""
    limited = capability(device)
    if limited == torch.cuda.get_device_capability(device):
        return None
    return f'{limited[0]}.{limited[1]}'


def shared_bytes(device: torch.device) -> int:
    """Return the maximum shared memory per block in bytes."""
    listed = 1024 * _SHARED_KIB.get(capability(device), _LEAST_KIB)
    # PyTorch 2.5 lacks this attribute.
    properties = torch.cuda.get_device_properties(device)
    actual: int = getattr(properties, 'shared_memory_per_block_optin', listed)
    return actual if pretended(device) is None else min(actual, listed)


def has_tensor_memory(device: torch.device) -> bool:
    """Whether the tensor cores add up in a memory of their own, as in a B200 and a Jetson Thor."""
    return capability(device)[0] in (10, 11)


@cache
def _forced(value: str | None) -> tuple[int, int] | None:
    if not value:
        return None
    if not re.fullmatch(r'\d+\.\d', value):
        raise EngineError(
            f'{VARIABLE} is {value!r}: set it to a compute capability such as 8.7, or unset it')
    major, minor = value.split('.')
    return int(major), int(minor)
