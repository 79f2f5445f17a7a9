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

"""4-bit weights with a table against dense products; on a CPU in Triton's interpreter."""

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
from linear_contract import check_gated
from linear_contract import check_layout
from linear_contract import check_product
from linear_contract import DEVICE
from linear_contract import EPS
from linear_contract import REFERENCE
from physai_decode.engines.native import fp4_kernels
from physai_decode.engines.native import fusion
from physai_decode.engines.native import int4_kernels
from physai_decode.engines.native import kernels
from physai_decode.engines.native import lookup
from physai_decode.engines.native import pass_kernels
from physai_decode.engines.native import scaled_kernels
from physai_decode.engines.native.fp4_kernels import Fp4Ops
from physai_decode.engines.native.pass_kernels import PassOps
import random_formats

FORMATS = {
    'nf4': random_formats.bitsandbytes('nf4'),
    'fp4-double-g128': random_formats.bitsandbytes('fp4', block=128, double=True)}
# The interpreter multiplies the bits of bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type != 'cpu')


make = pytest.fixture(linear_contract.maker)


def random_weight(name, n, k, seed=1):
    return linear_contract.random_weight(FORMATS[name], n, k, seed)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('n, k', [(7, 640), (24, 1024), (16, 160)])
def test_product(make, name, n, k):
    check_product(make, Fp4Ops, FORMATS[name], n, k)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('layout', int4_kernels.TABLE_LAYOUTS)
def test_each_layout_rounds_numbers_to_the_input(make, dtype, layout):
    weight, _ = random_weight('nf4', 56, 1280)
    table = torch.tensor(weight.table).to(dtype).tolist()
    rounded = replace(weight, table=tuple(table)).dequantise(slice(None), torch.float32)
    check_layout(make, Fp4Ops, weight, rounded, layout, dtype)


@pytest.mark.parametrize('layout', int4_kernels.TABLE_LAYOUTS)
def test_each_layout_gated(make, layout):
    """Also the sums of the output, which a product with integers would need."""
    weight = fusion.fuse([random_weight('nf4', 64, 640, seed)[0] for seed in (2, 3)], paired=True)
    x, gain, out, ops = make(640), make(640), make(64), Fp4Ops(DEVICE)
    expected = out.clone()
    REFERENCE.gated(x, weight, expected, gain, EPS)
    ops._layouts[kernels.Shape(128, 640, weight.kind, True, True)] = layout
    ops.gated(x, weight, out, gain, EPS)
    assert_close(out, expected)
    assert_close(ops._sums(out), out.view(-1, 8).sum(1))


@pytest.mark.parametrize('n, fits', [(64, 14), (32, 13), (16, 9)])
def test_layouts_have_whole_tiles(n, fits):
    weight, _ = random_weight('nf4', n, 640)
    shape = kernels.Shape(n, 640, weight.kind, False, False)
    assert len(Fp4Ops(DEVICE)._candidates(shape)) == fits


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('bias, rows', [(False, 32), (True, 32), (False, 16)])
def test_gated(make, name, bias, rows):
    check_gated(make, Fp4Ops, FORMATS[name], bias, rows)


def test_does_not_fuse_different_tables_or_groups():
    nf4, other = (random_weight(name, 32, 640)[0] for name in FORMATS)
    assert fusion.fuse([nf4, nf4]).table == nf4.table
    for another in (other, replace(nf4, table=nf4.table[::-1]), replace(nf4, table=None)):
        assert fusion.fuse([nf4, another]) is None


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('k', [1280, 160])
def test_dequantises_rows(name, k):
    weight, dense = random_weight(name, 40, k)
    out = torch.full((20, k), float('nan'), device=DEVICE)
    int4_kernels.widen(weight, slice(16, 36), out)
    assert_close(out, dense[16:36], 1e-6)


@pytest.mark.parametrize('ops, file', [
    *((Fp4Ops, file) for file in (kernels, lookup, int4_kernels, scaled_kernels, fp4_kernels)),
    *((PassOps, file) for file in (kernels, lookup, int4_kernels, fp4_kernels, pass_kernels))])
def test_kernel_version_depends_on_each_source_file(monkeypatch, ops, file):
    """A new version tunes its layouts again."""
    before, read = ops._version(), Path.read_bytes
    monkeypatch.setattr(Path, 'read_bytes', lambda path: read(path) + (
        b'#' if path == Path(file.__file__) else b''))
    assert ops._version() != before
