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

"""Checks that kernels for any kind of quantised weights must pass."""

from dataclasses import replace

from physai_decode.engines.native import fusion
from physai_decode.engines.native import kernels
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.ops import TorchOps
import random_formats
import torch

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
REFERENCE = TorchOps(on_host=False)
EPS = 1e-6


def maker():
    """Return a function that draws a random tensor of a shape."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return normal


def assert_close(got, expected, relative=1e-5):
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < relative     # a NaN does not pass


def random_weight(format_, n, k, seed=1):
    """Return a random weight in a format of `random_formats`, and its float32 values [n, k]."""
    config, draw = format_
    stored, exact = draw(torch.Generator().manual_seed(seed), n, k)
    weight, dense = random_formats.read(config, stored, n, k, DEVICE), exact.float().to(DEVICE)
    if isinstance(weight, Int4) and weight.table:       # it rounds its scales to float16
        rounded = weight.dequantise(slice(None), torch.float32)
        assert_close(rounded, dense, 3e-4)
        return weight, rounded
    return weight, dense


def check_product(make, ops, format_, n, k):
    """Compare products with a norm, added to the output, and with a bias to dense ones."""
    weight, dense = random_weight(format_, n, k)
    x, gain, out = make(k), make(k), make(n)
    normed = x * torch.rsqrt(x.square().mean() + EPS) * gain
    assert_close(weight.apply(normed), dense @ normed)
    assert_close(ops(DEVICE).apply(normed[None], weight)[0], dense @ normed)
    ops(DEVICE).linear(x, weight, out, gain=gain, eps=EPS)
    assert_close(out, dense @ normed)
    start, biased = out.clone(), replace(weight, bias=make(n))
    ops(DEVICE).linear(normed, weight, out, add=True)
    assert_close(out, start + dense @ normed)
    ops(DEVICE).linear(normed, biased, out)
    assert_close(out, dense @ normed + biased.bias)


def check_layout(make, ops, weight, dense, layout, dtype=torch.float32):
    """Compare a product in one kernel layout, with an input in a dtype, to the dense one."""
    x, out, ops = make(1280, dtype=dtype), make(len(dense)), ops(DEVICE)
    ops._layouts[kernels.Shape(*dense.shape, weight.kind, False, False)] = layout
    ops.linear(x, weight, out)
    assert_close(out, dense @ x.float())


def check_gated(make, ops, format_, bias, rows=24):
    """Compare fused gate and up to dense ones, with the kernels and with the reference."""
    parts = [random_weight(format_, rows, 640, seed) for seed in (2, 3)]
    dense = Dense(torch.cat([each for _, each in parts]), make(2 * rows) if bias else None)
    weight = fusion.fuse([replace(each, bias=half) for (each, _), half in zip(
        parts, dense.bias.chunk(2) if bias else (None, None), strict=True)], paired=True)
    compare_gated(make, ops(DEVICE), weight, dense, rows)


def compare_gated(make, ops, weight, dense, rows, relative=1e-5):
    """Compare a fused gate and up [2 rows, 640] to a dense one."""
    x, gain, out = make(640), make(640), make(rows)
    expected, reference = out.clone(), out.clone()
    REFERENCE.gated(x, dense, expected, gain, EPS)
    REFERENCE.gated(x, weight, reference, gain, EPS)
    assert_close(reference, expected)
    ops.gated(x, weight, out, gain, EPS)
    assert_close(out, expected, relative)


def check_fused(make, ops, format_):
    """Compare fused projections of one input to dense ones."""
    parts = [random_weight(format_, rows, 640, seed) for seed, rows in enumerate((7, 24))]
    weight = fusion.fuse([each for each, _ in parts])
    x, out = make(640), make(31)
    ops(DEVICE).linear(x, weight, out)
    assert_close(out, torch.cat([dense for _, dense in parts]) @ x)
