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

"""Kernels for 8-bit weights against dense products; on a CPU in Triton's interpreter."""

from dataclasses import replace
import os

import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
pytest.importorskip('triton')

import linear_contract
from linear_contract import assert_close
from linear_contract import check_fused
from linear_contract import check_gated
from linear_contract import check_layout
from linear_contract import check_product
from linear_contract import DEVICE
from physai_decode.engines.native import kernels
from physai_decode.engines.native import scaled_kernels
from physai_decode.engines.native.scaled_kernels import ScaledOps
import random_formats

FORMATS = {
    'int8': random_formats.int8(-1), 'int8-zeros': random_formats.int8(-1, symmetric=False),
    'int8-g32': random_formats.packed(8, 32, symmetric=False, act_order=True),
    'int8-g128': random_formats.int8(128), 'float8': random_formats.float8('channel'),
    'float8-block': random_formats.float8('block')}


make = pytest.fixture(linear_contract.maker)


def random_weight(name, n, k, seed=1):
    return linear_contract.random_weight(FORMATS[name], n, k, seed)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('n, k', [(7, 640), (24, 1024)])
def test_product(make, name, n, k):
    check_product(make, ScaledOps, FORMATS[name], n, k)


def test_partial_last_block(make):
    """400 columns are not a multiple of the 128 columns of a block."""
    weight, dense = random_weight('float8-block', 24, 400)
    x, out = make(400), make(24)
    ScaledOps(DEVICE).linear(x, weight, out)
    assert_close(out, dense @ x)


@pytest.mark.parametrize('name', ['int8', 'float8-block'])
@pytest.mark.parametrize('layout', kernels.DENSE_LAYOUTS[::3])
def test_each_layout(make, name, layout):
    check_layout(make, ScaledOps, *random_weight(name, 24, 1280), layout)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('bias', [False, True])
def test_gated(make, name, bias):
    check_gated(make, ScaledOps, FORMATS[name], bias)


def test_fused_projections(make):
    check_fused(make, ScaledOps, FORMATS['int8-g32'])


@pytest.mark.parametrize('name', FORMATS)
def test_dequantises_rows(name):
    weight, _ = random_weight(name, 24, 1280)
    out = torch.full((8, 1280), float('nan'), device=DEVICE)
    scaled_kernels.widen(weight, slice(8, 16), out)
    assert_close(out, weight.dequantise(slice(8, 16), torch.float32))


def test_each_8_bit_float(make):
    bits = torch.arange(-128, 128, dtype=torch.int16)
    values = bits[bits & 0x7F != 0x7F].to(torch.int8).to(DEVICE)
    weight, _ = random_weight('float8', 1, len(values))
    weight = replace(weight, values=values.view(torch.float8_e4m3fn)[None],
                     scales=torch.ones(1, 1, device=DEVICE))
    out = torch.empty(1, len(values), device=DEVICE)
    scaled_kernels.widen(weight, slice(0, 1), out)
    assert torch.equal(out, weight.values.float())
