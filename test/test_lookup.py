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
from physai_decode.engines.native import fp4_kernels
from physai_decode.engines.native import fusion
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
DTYPES = [torch.float16] if DEVICE.type == 'cpu' else [torch.float16, torch.bfloat16]


make = pytest.fixture(linear_contract.maker)


def random_weight(name, n, k, seed=1):
    return linear_contract.random_weight(FORMATS[name], n, k, seed)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('n, k', [(7, 640), (24, 1024), (16, 160)])
def test_product(make, name, n, k):
    check_product(make, Fp4Ops, FORMATS[name], n, k)


@pytest.mark.parametrize('name', ['nf4'])
@pytest.mark.parametrize('layout', kernels.INT4_LAYOUTS)
def test_each_layout(make, name, layout):
    check_layout(make, Fp4Ops, FORMATS[name], layout)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('layout', kernels.INT4_LAYOUTS)
def test_numbers_are_rounded_to_the_input(make, dtype, layout):
    weight, _ = random_weight('nf4', 40, 1280)
    table = torch.tensor(weight.table).to(dtype).tolist()
    rounded = replace(weight, table=tuple(table)).dequantise(slice(None), torch.float32)
    x, out, ops = make(1280, dtype=dtype), make(40), Fp4Ops(DEVICE)
    ops._layouts[kernels.Shape(40, 1280, weight.kind, False, False)] = layout
    ops.linear(x, weight, out)
    assert_close(out, rounded @ x.float())


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('bias', [False, True])
def test_gated(make, name, bias):
    check_gated(make, Fp4Ops, FORMATS[name], bias, rows=32)


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
    kernels.unpack(weight, slice(16, 36), out)
    assert_close(out, dense[16:36], 1e-6)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def _off(name, dtype):
    """Emulates its instructions, for all pairs of adjacent nibbles."""
    weight, _ = random_weight(name, 16, 640)
    numbers = torch.tensor(weight.table).to(dtype).view(torch.int16)
    table = lookup.table(weight, dtype).tolist()[:4]
    for word in range(0, 2**16, 257):
        both = word | (word * 40503 & 0xFFFF) << 16
        found = emulated(lookup.ASSEMBLY, {'$4': both, **{
            f'${5 + 2 * at}': number for at, number in enumerate(table)}})
        for number in range(4):
            pair = [numbers[both >> shift + 4 * number & 0xF].item() & 0xFFFF for shift in (0, 16)]
            assert found[f'${number}'] == pair[0] | pair[1] << 16


def emulated(text, registers):
    """Run PTX instructions; returns the registers by name."""
    def value(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    for line in text[1:-1].split(';'):
        name, _, rest = line.strip().partition(' ')
        if name in ('', '.reg'):
            continue
        if name == 'mov.b64':
            target, _, source = rest.strip('{ ').partition('}')
            low, high = target.split(', ')
            number = registers[source.strip(', ')]
            registers[low], registers[high] = number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF
            continue
        target, *operands = (each.strip() for each in rest.split(','))
        numbers = [value(each) for each in operands]
        if name == 'prmt.b32':
            both, result = numbers[0] | numbers[1] << 32, 0
            for place in range(4):
                selector = numbers[2] >> 4 * place & 0xF
                byte = both >> 8 * (selector & 7) & 0xFF
                if selector & 8:
                    byte = 0xFF if byte & 0x80 else 0
                result |= byte << 8 * place
        elif name == 'lop3.b32':
            a, b, c, table = numbers
            assert table == 0xCA        # a selects b or c
            result = a & b | ~a & c
        else:
            result = {'and.b32': lambda a, b: a & b,
                      'shl.b32': lambda a, b: a << b, 'shr.b32': lambda a, b: a >> b}[name](
                          *numbers)
        registers[target] = result & 0xFFFFFFFF
    return registers


@pytest.mark.parametrize('ops, file', [
    *((Fp4Ops, file) for file in (kernels, scaled_kernels, fp4_kernels)),
    *((PassOps, file) for file in (kernels, fp4_kernels, pass_kernels))])
def test_kernel_version_depends_on_each_source_file(monkeypatch, ops, file):
    """A new version tunes its layouts again."""
    before, read = ops._version(), Path.read_bytes
    monkeypatch.setattr(Path, 'read_bytes', lambda path: read(path) + (
        b'#' if path == Path(file.__file__) else b''))
    assert ops._version() != before
