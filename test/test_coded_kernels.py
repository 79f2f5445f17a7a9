"""The kernels for codes of 4 bits against their twins; on a CPU in Triton's interpreter."""

from dataclasses import replace
import os
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
pytest.importorskip('triton')

from physai_decode.engines.native import coded_kernels
from physai_decode.engines.native import fusion
from physai_decode.engines.native import kernels
from physai_decode.engines.native import scaled_kernels
from physai_decode.engines.native.coded_kernels import CodedOps
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.ops import TorchOps
import random_formats

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
TWIN = TorchOps(on_host=False)
EPS = 1e-6
FORMS = {
    'nf4': random_formats.bitsandbytes('nf4'),
    'fp4-double-g128': random_formats.bitsandbytes('fp4', block=128, double=True),
    **{name: random_formats.float4(name) for name in ('nvfp4', 'mxfp4', 'modelopt')}}


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
@pytest.mark.parametrize('n, k', [(7, 640), (24, 1024), (16, 144)])
def test_product(make, name, n, k):
    weight, dense = drawn(name, n, k)
    x, gain, out = make(k), make(k), make(n)
    normed = x * torch.rsqrt(x.square().mean() + EPS) * gain
    assert_close(weight.apply(normed), dense @ normed)
    CodedOps(DEVICE).linear(x, weight, out, gain=gain, eps=EPS)
    assert_close(out, dense @ normed)
    start, biased = out.clone(), replace(weight, bias=make(n))
    CodedOps(DEVICE).linear(normed, weight, out, add=True)
    assert_close(out, start + dense @ normed)
    CodedOps(DEVICE).linear(normed, biased, out)
    assert_close(out, dense @ normed + biased.bias)


@pytest.mark.parametrize('name', ['nf4', 'nvfp4'])
@pytest.mark.parametrize('choice', kernels.CODED_CHOICES)
def test_every_layout(make, name, choice):
    weight, dense = drawn(name, 24, 1280)
    x, out, ops = make(1280), make(24), CodedOps(DEVICE)
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
    CodedOps(DEVICE).gated(x, weight, out, gain, EPS)
    assert_close(out, expected)


@pytest.mark.parametrize('name', ['nvfp4', 'mxfp4'])
def test_fused_of_one_input(make, name):
    """Each part has its own factor."""
    parts = [drawn(name, rows, 640, seed) for seed, rows in enumerate((7, 24))]
    weight = fusion.fuse([each for each, _ in parts])
    x, out = make(640), make(31)
    CodedOps(DEVICE).linear(x, weight, out)
    assert_close(out, torch.cat([dense for _, dense in parts]) @ x)


def test_what_does_not_fit_is_not_fused():
    parts = [drawn(name, 24, 640)[0] for name in ('nf4', 'fp4-double-g128', 'nvfp4', 'mxfp4')]
    nf4 = parts[0]
    for other in (*parts[1:], replace(nf4, table=nf4.table.flip(0))):
        assert fusion.fuse([nf4, other]) is None
    assert fusion.fuse([drawn('nf4', 12, 640)[0]] * 2, paired=True) is None


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('k', [1280, 144])
def test_made_dense(name, k):
    weight, dense = drawn(name, 24, k)
    out = torch.full((8, k), float('nan'), device=DEVICE)
    coded_kernels.widen(weight, slice(8, 16), out)
    assert_close(out, weight.dequantise(slice(8, 16), torch.float32), 1e-6)
    assert_close(out, dense[8:16])


def test_every_scale_of_8_bits(make):
    """Floats, the smallest and largest too, and powers of 2, of which 2^-127 counts as 0."""
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    for name, numbers in (('nvfp4', bits[bits & 0x7F != 0x7F].view(torch.float8_e4m3fn)),
                          ('mxfp4', bits[:-1])):
        weight, _ = drawn(name, len(numbers), 32)
        scales = numbers.view(torch.uint8)[:, None].repeat(1, weight.scales.shape[1])
        weight = replace(weight, scales=scales.view(weight.scales.dtype),
                         factors=torch.ones(len(numbers), device=DEVICE),
                         codes=torch.full_like(weight.codes, 0x22))     # 1.0 all
        exact = numbers.double() if name == 'nvfp4' else 2.0 ** (numbers.double() - 127)
        exact[exact < 2.0 ** -126] *= name == 'nvfp4'
        out = torch.empty(len(numbers), 32, device=DEVICE)
        coded_kernels.widen(weight, slice(0, len(numbers)), out)
        for got in (out, weight.dequantise(slice(None), torch.float32)):
            assert torch.equal(got, exact.float()[:, None].expand(-1, 32))


@pytest.mark.parametrize('file', [kernels, scaled_kernels, coded_kernels])
def test_tuned_layouts_hold_for_these_kernels(monkeypatch, file):
    """A change of any of the step's kernels is another version."""
    before, read = CodedOps._version(), Path.read_bytes
    monkeypatch.setattr(Path, 'read_bytes', lambda path: read(path) + (
        b'#' if path == Path(file.__file__) else b''))
    assert CodedOps._version() != before
