"""The kernels for weights of 8 bits against their twins; on a CPU in Triton's interpreter."""

from dataclasses import replace
import os

import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
pytest.importorskip('triton')

from physai_decode.engines.native import fusion
from physai_decode.engines.native import kernels
from physai_decode.engines.native import scaled_kernels
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.scaled_kernels import ScaledOps
import random_formats

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
TWIN = TorchOps(on_host=False)
EPS = 1e-6
FORMS = {
    'int8': random_formats.int8(-1), 'int8-zeros': random_formats.int8(-1, symmetric=False),
    'int8-g32': random_formats.packed(8, 32, symmetric=False, act_order=True),
    'int8-g128': random_formats.int8(128), 'float8': random_formats.float8('channel'),
    'float8-block': random_formats.float8('block')}


@pytest.fixture
def make():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)


def assert_close(got, expected, relative=1e-5):
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < relative     # a NaN does not pass


def drawn(name, n, k, seed=1):
    """Give a weight of a form, and the float32 one [n, k] that it stands for."""
    config, draw = FORMS[name]
    stored, exact = draw(torch.Generator().manual_seed(seed), n, k)
    return random_formats.read(config, stored, n, k, DEVICE), exact.float().to(DEVICE)


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('n, k', [(7, 640), (24, 1024)])
def test_product(make, name, n, k):
    weight, dense = drawn(name, n, k)
    x, gain, out = make(k), make(k), make(n)
    normed = x * torch.rsqrt(x.square().mean() + EPS) * gain
    assert_close(weight.apply(normed), dense @ normed)
    ScaledOps(DEVICE).linear(x, weight, out, gain=gain, eps=EPS)
    assert_close(out, dense @ normed)
    start, biased = out.clone(), replace(weight, bias=make(n))
    ScaledOps(DEVICE).linear(normed, weight, out, add=True)
    assert_close(out, start + dense @ normed)
    ScaledOps(DEVICE).linear(normed, biased, out)
    assert_close(out, dense @ normed + biased.bias)


def test_columns_that_fill_no_group(make):
    """As the last block of floats in blocks."""
    weight, dense = drawn('float8-block', 24, 400)
    x, out = make(400), make(24)
    ScaledOps(DEVICE).linear(x, weight, out)
    assert_close(out, dense @ x)


@pytest.mark.parametrize('name', ['int8', 'float8-block'])
@pytest.mark.parametrize('choice', kernels.DENSE_CHOICES[::3])
def test_every_layout(make, name, choice):
    weight, dense = drawn(name, 24, 1280)
    x, out, ops = make(1280), make(24), ScaledOps(DEVICE)
    ops._choices[kernels.Shape(24, 1280, weight.kind, False, False)] = choice
    ops.linear(x, weight, out)
    assert_close(out, dense @ x)


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('bias', [False, True])
def test_gated(make, name, bias):
    parts = [drawn(name, 24, 640, seed) for seed in (2, 3)]
    dense = Dense(torch.cat([each for _, each in parts]), make(48) if bias else None)
    weight = fusion.fuse([replace(each, bias=half) for (each, _), half in zip(
        parts, dense.bias.chunk(2) if bias else (None, None), strict=True)], paired=True)
    x, gain, out = make(640), make(640), make(24)
    expected, twin = out.clone(), out.clone()
    TWIN.gated(x, dense, expected, gain, EPS)
    TWIN.gated(x, weight, twin, gain, EPS)
    assert_close(twin, expected)
    ScaledOps(DEVICE).gated(x, weight, out, gain, EPS)
    assert_close(out, expected)


def test_fused_of_one_input(make):
    parts = [drawn('int8-g32', rows, 640, seed) for seed, rows in enumerate((7, 24))]
    weight = fusion.fuse([each for each, _ in parts])
    x, out = make(640), make(31)
    ScaledOps(DEVICE).linear(x, weight, out)
    assert_close(out, torch.cat([dense for _, dense in parts]) @ x)


@pytest.mark.parametrize('name', FORMS)
def test_made_dense(name):
    weight, _ = drawn(name, 24, 1280)
    out = torch.full((8, 1280), float('nan'), device=DEVICE)
    scaled_kernels.widen(weight, slice(8, 16), out)
    assert_close(out, weight.dequantise(slice(8, 16), torch.float32))


def test_every_float_of_8_bits(make):
    """The smallest and the largest too, of either sign."""
    bits = torch.arange(-128, 128, dtype=torch.int16)
    values = bits[bits & 0x7F != 0x7F].to(torch.int8).to(DEVICE)
    weight, _ = drawn('float8', 1, len(values))
    weight = replace(weight, values=values.view(torch.float8_e4m3fn)[None],
                     scales=torch.ones(1, 1, device=DEVICE))
    out = torch.empty(1, len(values), device=DEVICE)
    scaled_kernels.widen(weight, slice(0, 1), out)
    assert torch.equal(out, weight.values.float())
