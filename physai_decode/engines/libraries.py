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
The libraries that transformers needs for each quantisation method.

This module imports none of them. A method that is not listed needs only accelerate, or
transformers names what it needs.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version
from importlib.util import find_spec

# The modules of each method; _PIP has the package names that differ.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    'aqlm': ('aqlm',), 'auto-round': ('auto_round',), 'awq': ('gptqmodel',),
    'bitsandbytes': ('bitsandbytes',), 'compressed-tensors': ('compressed_tensors',),
    'eetq': ('eetq',), 'fbgemm_fp8': ('fbgemm_gpu',), 'gptq': ('gptqmodel', 'optimum'),
    'hqq': ('hqq',), 'quark': ('quark',), 'spqr': ('spqr_quant',), 'torchao': ('torchao',),
    'vptq': ('vptq',)}
_PIP = {'auto_round': 'auto-round', 'awq': 'autoawq', 'compressed_tensors': 'compressed-tensors',
        'fbgemm_gpu': 'fbgemm-gpu', 'quark': 'amd-quark', 'spqr_quant': 'spqr-quant'}


def missing(method: str) -> tuple[str, ...]:
    """
    Return the pip names of missing libraries.

    :param method: ``quant_method`` in config.json.
    """
    needed = _NEEDED.get(method, ())
    if method == 'awq' and _transformers_major() < 5:
        needed = ('awq',)
    if method == 'eetq' and _transformers_major() >= 5:
        needed = ('kernels',)
    return tuple(_PIP.get(name, name) for name in (*needed, 'accelerate')
                 if find_spec(name) is None)


def _transformers_major() -> int:
    try:
        return int(version('transformers').partition('.')[0])
    except PackageNotFoundError:
        return 0
