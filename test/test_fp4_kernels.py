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

"""Kernels for 4-bit floats against dense products; on a CPU in Triton's interpreter."""

from dataclasses import replace
import os

import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
pytest.importorskip('triton')

import linear_contract
from linear_contract import assert_close
from linear_contract import check_gated
from linear_contract import check_layout
from linear_contract import check_product
from linear_contract import DEVICE
from physai_decode.engines.native import fp4_kernels
from physai_decode.engines.native import fusion
from physai_decode.engines.native import packing
from physai_decode.engines.native.fp4_kernels import Fp4Ops
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import Int4
import random_formats

FORMATS = {name: random_formats.float4(name) for name in ('nvfp4', 'mxfp4', 'modelopt')}
# The interpreter multiplies the bits of bfloat16.
DTYPES = [torch.float16] if DEVICE.type == 'cpu' else [torch.float16, torch.bfloat16]
FINITE = torch.arange(256, dtype=torch.uint8)
FINITE = FINITE[FINITE & 0x7F != 0x7F].view(torch.float8_e4m3fn)     # all scales


make = pytest.fixture(linear_contract.maker)


def random_weight(name, n, k, seed=1):
    return linear_contract.random_weight(FORMATS[name], n, k, seed)


def each_number():
    """Return a weight that has each code with each scale, and its values, float64 [16, K]."""
    codes = torch.arange(16, dtype=torch.uint8)[:, None].repeat(1, 16 * len(FINITE))
    scales = FINITE.view(torch.uint8)[None].repeat(16, 1).view(torch.float8_e4m3fn)
    exact = random_formats.E2M1[codes.long()] * scales.double().repeat_interleave(16, 1)
    weight = packing.fp4(codes.to(DEVICE), scales.to(DEVICE), torch.ones((), device=DEVICE))
    return weight, exact.to(DEVICE)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('n, k', [(7, 640), (24, 1024), (16, 144)])
def test_product(make, name, n, k):
    check_product(make, Fp4Ops, FORMATS[name], n, k)


@pytest.mark.parametrize('layout', fp4_kernels.FP4_LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, *DTYPES])
def test_each_layout(make, layout, dtype):
    check_layout(make, Fp4Ops, *random_weight('nvfp4', 24, 1280), layout, dtype)


@pytest.mark.parametrize('bias', [False, True])
def test_gated(make, bias):
    check_gated(make, Fp4Ops, FORMATS['nvfp4'], bias, rows=32)


def test_fused_projections_have_their_own_factors(make):
    parts = [random_weight('nvfp4', rows, 640, seed) for seed, rows in enumerate((16, 32))]
    weight = fusion.fuse([each for each, _ in parts])
    assert len(set(weight.factors.tolist())) == 2
    x, out = make(640), make(48)
    Fp4Ops(DEVICE).linear(x, weight, out)
    assert_close(out, torch.cat([dense for _, dense in parts]) @ x)
    assert fusion.fuse([random_weight('nvfp4', 24, 640)[0]] * 2) is None    # no whole tiles


def test_permutes_rows():
    weight, dense = random_weight('nvfp4', 32, 640)
    index = torch.randperm(32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert_close(weight.rows(index).dequantise(slice(None), torch.float32), dense[index])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_each_code_with_each_scale_is_exact(dtype):
    weight, exact = each_number()
    assert torch.equal(weight.dequantise(slice(None), torch.float64).abs(), exact.abs())
    out = torch.empty(exact.shape, dtype=dtype, device=DEVICE)
    fp4_kernels.widen(weight, slice(0, 16), out)
    assert torch.equal(out.double(), exact)
    if dtype not in (torch.float32, *DTYPES):
        return
    for column in range(0, exact.shape[1], 16 * 23):
        x = torch.zeros(exact.shape[1], dtype=dtype, device=DEVICE)
        x[column] = 1.0
        product = torch.empty(16, device=DEVICE)
        Fp4Ops(DEVICE).linear(x, weight, product)
        assert torch.equal(product.double(), exact[:, column])


@pytest.mark.parametrize('k', [1280, 144])
def test_dequantises_rows(k):
    weight, dense = random_weight('nvfp4', 40, k)
    out = torch.full((20, k), float('nan'), device=DEVICE)
    fp4_kernels.widen(weight, slice(16, 36), out)
    assert_close(out, dense[16:36])


def test_mxfp4_scales_beyond_float8_keep_their_values():
    """Scales of a row that differ by up to 2^17 fit; the scale of zeros does not matter."""
    config, draw = FORMATS['mxfp4']
    stored, exact = draw(torch.Generator().manual_seed(1), 16, 96)
    for low, zeros, form in ((120, False, Fp4), (103, False, Fp4), (102, False, Int4),
                             (0, True, Fp4)):
        scales = stored['weight_scale'].clone()
        before = scales.double()
        scales[:, ::2], scales[:, 1] = 120, low
        values = exact.view(16, 3, 32) * 2.0 ** (scales.double() - before)[:, :, None]
        codes = stored['weight_packed'].clone()
        if zeros:
            codes[:, 16:32] = 0
            values[:, 1] = 0
        weight = random_formats.read(
            config, {**stored, 'weight_scale': scales, 'weight_packed': codes}, 16, 96, DEVICE)
        assert type(weight) is form
        # The scales of an `Int4` are float16, which rounds 2^-25 to 0.
        assert_close(weight.dequantise(slice(None), torch.float32).cpu(), values.flatten(1),
                     1e-5 if form is Int4 else 1e-9)


def test_a_negative_scale_is_the_same_as_negative_codes():
    codes = torch.randint(0, 16, (16, 256), dtype=torch.uint8, device=DEVICE)
    scales = torch.ones(16, 16, device=DEVICE).to(torch.float8_e4m3fn)
    one = torch.ones((), device=DEVICE)
    plus, minus = (packing.fp4(codes, each, one) for each in (
        scales, (-scales.float()).to(torch.float8_e4m3fn)))
    assert torch.equal(plus.dequantise(slice(None), torch.float32),
                       -minus.dequantise(slice(None), torch.float32))


def test_rows_past_the_end_of_a_tile_are_not_written(make):
    weight, _ = random_weight('nvfp4', 7, 640)
    out = torch.full((16,), 5.0, device=DEVICE)
    Fp4Ops(DEVICE).linear(make(640), weight, out[:7])
    assert out[7:].eq(5).all() and replace(weight, bias=None).shape == (7, 640)
