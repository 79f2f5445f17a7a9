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

"""Kernels for 4-bit codes against dense products; on a CPU in Triton's interpreter."""

from dataclasses import replace
import os
from pathlib import Path

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
from physai_decode.engines.native import coded_kernels
from physai_decode.engines.native import fp4_kernels
from physai_decode.engines.native import fusion
from physai_decode.engines.native import kernels
from physai_decode.engines.native import pass_kernels
from physai_decode.engines.native import scaled_kernels
from physai_decode.engines.native.coded_kernels import CodedOps
from physai_decode.engines.native.pass_kernels import PassOps
import random_formats

FORMATS = {
    'nf4': random_formats.bitsandbytes('nf4'),
    'fp4-double-g128': random_formats.bitsandbytes('fp4', block=128, double=True)}


make = pytest.fixture(linear_contract.maker)


def random_weight(name, n, k, seed=1):
    return linear_contract.random_weight(FORMATS[name], n, k, seed)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('n, k', [(7, 640), (24, 1024), (16, 144)])
def test_product(make, name, n, k):
    check_product(make, CodedOps, FORMATS[name], n, k)


@pytest.mark.parametrize('name', ['nf4'])
@pytest.mark.parametrize('layout', kernels.CODED_LAYOUTS)
def test_each_layout(make, name, layout):
    check_layout(make, CodedOps, FORMATS[name], layout)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('bias', [False, True])
def test_gated(make, name, bias):
    check_gated(make, CodedOps, FORMATS[name], bias)


@pytest.mark.parametrize('name', FORMATS)
def test_fused_projections(make, name):
    check_fused(make, CodedOps, FORMATS[name])


def test_does_not_fuse_different_layouts():
    nf4, other = (random_weight(name, 24, 640)[0] for name in FORMATS)
    fp4, _ = linear_contract.random_weight(random_formats.float4('mxfp4'), 24, 640)
    for another in (other, replace(nf4, table=nf4.table.flip(0)), fp4):
        assert fusion.fuse([nf4, another]) is None
    assert fusion.fuse([random_weight('nf4', 12, 640)[0]] * 2, paired=True) is None


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('k', [1280, 144])
def test_dequantises_rows(name, k):
    weight, dense = random_weight(name, 24, k)
    out = torch.full((8, k), float('nan'), device=DEVICE)
    coded_kernels.widen(weight, slice(8, 16), out)
    assert_close(out, weight.dequantise(slice(8, 16), torch.float32), 1e-6)
    assert_close(out, dense[8:16])


@pytest.mark.parametrize('ops, file', [
    *((CodedOps, file) for file in (kernels, scaled_kernels, fp4_kernels, coded_kernels)),
    *((PassOps, file) for file in (kernels, fp4_kernels, pass_kernels))])
def test_kernel_version_depends_on_each_source_file(monkeypatch, ops, file):
    """A new version tunes its layouts again."""
    before, read = ops._version(), Path.read_bytes
    monkeypatch.setattr(Path, 'read_bytes', lambda path: read(path) + (
        b'#' if path == Path(file.__file__) else b''))
    assert ops._version() != before
