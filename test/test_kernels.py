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

"""Kernels of a decode step against their references in torch; on a CPU in Triton's interpreter."""

from dataclasses import astuple
from dataclasses import replace
import json
import os
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
triton = pytest.importorskip('triton')

from linear_contract import assert_close
from linear_contract import compare_gated
from linear_contract import DEVICE
from linear_contract import EPS
from linear_contract import maker
from linear_contract import REFERENCE
from physai_decode.engines.native import fusion
from physai_decode.engines.native import int4_kernels
from physai_decode.engines.native import kernels
from physai_decode.engines.native.architecture import Growth
from physai_decode.engines.native.int4_kernels import Int4Ops
from physai_decode.engines.native.kernels import TritonOps
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.ops import Attention
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.transformer import Product
from physai_decode.engines.native.tuning import TuningCache
import random_gptq

make = pytest.fixture(maker)


def packed(seed, n, k, group_size, act_order=False, symmetric=True):
    """Return a random GPTQ weight as the engine stores it, and its float32 values [n, k]."""
    stored, dense = random_gptq.tensors(seed, n, k, group_size, act_order, symmetric)
    return random_gptq.read(stored, n, k, group_size, device=DEVICE), dense.to(DEVICE)


def gate_up(seed, n, k, group_size, bias=None, **options):
    """Return a fused gate and up of 2 n rows, and their float32 values [2 n, k]."""
    parts = [packed(seed + at, n, k, group_size, **options) for at in range(2)]
    weights = [replace(weight, bias=None if bias is None else bias[n * at:n * (at + 1)])
               for at, (weight, _) in enumerate(parts)]
    return fusion.fuse(weights, paired=True), torch.cat([dense for _, dense in parts])


def test_embed(make):
    table, token = make(7, 200), torch.tensor([3], device=DEVICE)
    x = torch.full((200,), float('nan'), device=DEVICE)
    TritonOps(DEVICE).embed(table, token, x)
    assert torch.equal(x, table[3])


def test_embed_scaled(make):
    table, token, x = make(7, 200), torch.tensor([3], device=DEVICE), make(200)
    for ops in (REFERENCE, TritonOps(DEVICE)):
        ops.embed(table, token, x, 14.5)
        assert torch.equal(x, table[3] * 14.5)


@pytest.mark.parametrize('k', [640, 100])
def test_add_normed(make, k):
    branch, gain, x = make(k), make(k), make(k)
    expected = x + branch * torch.rsqrt(branch.square().mean() + EPS) * gain
    for ops in (REFERENCE, TritonOps(DEVICE)):
        got = x.clone()
        ops.add_normed(branch, gain, EPS, got)
        assert_close(got, expected)


@pytest.mark.parametrize('n, k', [(1, 128), (7, 100), (33, 640), (64, 513)])
@pytest.mark.parametrize('norm, add, bias', [
    (False, False, False), (True, False, True), (False, True, False)])
def test_dense(make, n, k, norm, add, bias):
    weight = Dense(make(n, k), make(n) if bias else None)
    x, gain = make(k), make(k) if norm else None
    out = make(n)
    expected = out.clone()
    REFERENCE.linear(x, weight, expected, gain=gain, eps=EPS, add=add)
    TritonOps(DEVICE).linear(x, weight, out, gain=gain, eps=EPS, add=add)
    assert_close(out, expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_dense_in_half_precision(make, dtype):
    weight, x, gain = Dense(make(24, 512, dtype=dtype)), make(512), make(512, dtype=dtype)
    out = make(24)
    TritonOps(DEVICE).linear(x, weight, out, gain=gain, eps=EPS)
    normed = x * torch.rsqrt(x.square().mean() + EPS) * gain.float()
    assert_close(out, weight.weight.float() @ normed)


@pytest.mark.parametrize('activation', ['silu', 'gelu_tanh'])
@pytest.mark.parametrize('bias', [False, True])
def test_gated(make, bias, activation):
    weight = Dense(make(2 * 21, 300), make(42) if bias else None)
    x, gain, out = make(300), make(300), make(21)
    expected = out.clone()
    REFERENCE.gated(x, weight, expected, gain, EPS, activation)
    TritonOps(DEVICE).gated(x, weight, out, gain, EPS, activation)
    assert_close(out, expected)


@pytest.mark.parametrize('group_size', [32, 64, 128, -1])
@pytest.mark.parametrize('act_order, symmetric', [(False, True), (True, False)])
@pytest.mark.parametrize('k', [256, 640])
def test_int4(make, group_size, act_order, symmetric, k):
    weight, dense = packed(1, 24, k, group_size, act_order, symmetric)
    x, gain, out = make(k), make(k), make(24)
    normed = x * torch.rsqrt(x.square().mean() + EPS) * gain
    expected = dense @ normed
    assert_close(weight.apply(normed), expected)
    Int4Ops(DEVICE).linear(x, weight, out, gain=gain, eps=EPS)
    assert_close(out, expected, 1e-4)
    start = out.clone()
    Int4Ops(DEVICE).linear(normed, weight, out, add=True)
    assert_close(out, start + expected, 1e-4)


@pytest.mark.parametrize('n, k, group_size, act_order', [
    (40, 328, 32, True), (8, 136, 128, False), (24, 264, 256, True), (8, 1032, 1024, False)])
def test_int4_with_partial_tiles(make, n, k, group_size, act_order):
    """The last tile, group and block are not full."""
    weight, dense = packed(6, n, k, group_size, act_order, symmetric=False)
    weight = replace(weight, bias=make(n))
    x, out = make(3, k), make(n)
    expected = x @ dense.t() + weight.bias
    assert_close(weight.apply(x), expected)
    assert_close(Int4Ops(DEVICE).apply(x, weight), expected)
    Int4Ops(DEVICE).linear(x[1], weight, out)
    assert_close(out, expected[1], 1e-4)


@pytest.mark.parametrize(
    'layout', int4_kernels.INT4_LAYOUTS, ids=lambda each: f'{each.warps}-{each.stages}')
@pytest.mark.parametrize('k', [384, 1280])
def test_int4_in_each_layout(make, layout, k):
    """With 3 or 10 blocks: a tile fits in registers or not, and some warps have fewer blocks."""
    weight, dense = packed(7, 24, k, 32, symmetric=False)
    x, out, ops = make(k), make(24), Int4Ops(DEVICE)
    ops._layouts[kernels.Shape(24, k, 'int4-g32', False, False)] = layout
    ops.linear(x, weight, out)
    assert_close(out, dense @ x, 1e-4)


@pytest.mark.parametrize('group_size, symmetric', [(32, True), (128, False)])
def test_int4_with_several_tokens(make, group_size, symmetric):
    weight, dense = packed(3, 40, 384, group_size, True, symmetric)
    x = make(5, 384)
    assert_close(Int4Ops(DEVICE).apply(x, weight), x @ dense.t())
    half = Int4Ops(DEVICE).apply(x.half(), weight)
    assert_close(half, x @ dense.t(), 2e-3)


def test_successive_int4_products(make):
    """The first kernel also writes the sums of its output that the second one reads."""
    gated, gated_dense = gate_up(2, 64, 256, 32)
    down, down_dense = packed(4, 32, 64, 32)
    x, gain, hidden, out = make(256), make(256), make(64), make(32)
    expected = out.clone()
    ops = Int4Ops(DEVICE)
    for _ in range(2):
        ops.gated(x, gated, hidden, gain, EPS)
        ops.linear(hidden, down, out, add=True)
        REFERENCE.gated(x, Dense(gated_dense), hidden, gain, EPS)
        REFERENCE.linear(hidden, Dense(down_dense), expected, add=True)
        assert_close(out, expected, 1e-4)
        x = make(256)


@pytest.mark.parametrize('group_size', [32, 64, 128])
@pytest.mark.parametrize('bias', [False, True])
def test_int4_gated(make, group_size, bias):
    bias = make(64) if bias else None
    weight, dense = gate_up(2, 32, 640, group_size, bias, symmetric=False)
    compare_gated(make, Int4Ops(DEVICE), weight, Dense(dense, bias), 32, 1e-4)


@pytest.mark.parametrize('layout', [(4, 3), (1, 1), (8, 0)])
def test_int4_gated_in_other_layouts(make, layout):
    weight, dense = gate_up(2, 32, 640, 64)
    ops = Int4Ops(DEVICE)
    ops._layouts[kernels.Shape(64, 640, 'int4-g64', True, True)] = kernels.Layout(16, 0, *layout)
    compare_gated(make, ops, weight, Dense(dense), 32, 1e-4)


def test_int4_gated_with_zero_points_in_up_only(make):
    gate, up = packed(2, 32, 640, 64), packed(3, 32, 640, 64, symmetric=False)
    assert gate[0].zeros is None and up[0].zeros is not None
    weight = fusion.fuse([gate[0], up[0]], paired=True)
    compare_gated(
        make, Int4Ops(DEVICE), weight, Dense(torch.cat([gate[1], up[1]])), 32, 1e-4)


def test_norm_with_float32_gains(make, dtype=torch.float16):
    """Its output has the engine's dtype."""
    weight, dense = packed(5, 32, 640, 64)
    x, gain, ops = make(640), make(640), Int4Ops(DEVICE, dtype=dtype)
    normed = (x * torch.rsqrt(x.square().mean() + EPS) * gain).to(dtype)
    assert ops._prepared(x, weight, gain, EPS).dtype == dtype
    for each in (ops, TorchOps(on_host=True, dtype=dtype), TorchOps(False, dtype)):
        out = make(32)
        each.linear(x, weight, out, gain=gain, eps=EPS)
        assert_close(out, dense @ normed.float(), 2e-2)


@pytest.mark.parametrize('dim', [64, 96, 128, 256])
@pytest.mark.parametrize('place', [0, 1, 31, 32, 33, 64, 127])
def test_attend(make, dim, place):
    check_attend(make, dim, place, heads=6, kv_heads=2)


@pytest.mark.parametrize('window', [1, 20, 200])
@pytest.mark.parametrize('splits', [4, None])
def test_attend_with_a_window(make, window, splits):
    check_attend(make, 64, 100, heads=2, kv_heads=1, window=window, splits=splits)


def test_attend_with_normed_heads(make):
    check_attend(make, 64, 77, heads=7, kv_heads=1, norm=True)


@pytest.mark.parametrize('place', [9, 10, 99])
def test_attend_with_scaled_queries(make, place):
    check_attend(make, 64, place, heads=2, kv_heads=1, growth=Growth(0.5, 10))


def check_attend(make, dim, place, heads, kv_heads, window=0, norm=False, growth=None, splits=4):
    keys, values = make(kv_heads, 128, dim), make(kv_heads, 128, dim)
    angles = make(128, dim // 2)
    layer = Attention(heads, kv_heads, dim, window, 0.9 / dim**0.5, EPS,
                      make(dim) if norm else None, make(dim) if norm else None, growth or Growth())
    qkv = make((heads + 2 * kv_heads) * dim)
    position = torch.tensor([place], device=DEVICE)
    results = []
    ops = TritonOps(DEVICE, splits)
    for each in (REFERENCE, ops, ops):
        cache = keys.clone(), values.clone()
        out = torch.full((heads * dim,), float('nan'), device=DEVICE)
        each.attend(qkv, *cache, position, angles.cos(), angles.sin(), layer, out)
        results.append((out, *cache))
    for got in results[1:]:
        for one, expected in zip(got, results[0]):
            assert_close(one, expected)


def fake_transformer(products, step=lambda: None):
    """Return the parts of a transformer that `TritonOps.tune` needs."""
    return SimpleNamespace(products=lambda: products, attention=[], step=step, max_context=1000,
                           position=torch.zeros(1, dtype=torch.int64), keys=torch.zeros(1))


@pytest.mark.parametrize('cached', [[8, 512, 4], [3, 512, 4, 1], 5])
def test_replaces_an_invalid_layout_in_the_cache(make, monkeypatch, tmp_path, cached):
    """Another version of the kernels may have written it. The new layout is stored."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'chip')
    monkeypatch.setattr(kernels, 'timed', lambda step: 1e-3)
    shape = str(kernels.Shape(8, 128, 'float32', False, False))
    transformer = fake_transformer([('out', Product(Dense(make(8, 128)), None))] * 2)
    messages = []
    TritonOps(DEVICE).tune(transformer, messages.append)
    file, = tmp_path.glob('physai_decode/*.json')
    owner, = json.loads(file.read_text())
    assert owner.startswith(f'chip, {TritonOps.name}')
    TuningCache(owner).put(shape, cached)
    for _ in range(2):
        TritonOps(DEVICE).tune(transformer, messages.append)
        assert messages == ['tuning the kernel for out'] * 2
        assert TuningCache(owner).get(shape) == list(astuple(kernels.DENSE_LAYOUTS[0]))


def test_selects_the_layout_with_the_fastest_step(make, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'chip')
    weight, x, out = Dense(make(8, 1024)), make(1024), make(8)
    ops = TritonOps(DEVICE)
    tried = []

    def timed(step):
        assert transformer.position.item() == 500
        step()
        tried.append(ops._layouts[kernels.Shape(8, 1024, 'float32', False, False)])
        if len(tried) == 2:
            raise triton.runtime.errors.OutOfResources(2, 1, 'shared memory')
        return abs(len(tried) - 5.0)

    monkeypatch.setattr(kernels, 'timed', timed)
    transformer = fake_transformer(
        [('out', Product(weight, None))], lambda: ops.linear(x, weight, out))
    ops.tune(transformer, lambda line: None)
    assert tried == list(kernels.DENSE_LAYOUTS)
    assert list(ops._layouts.values()) == [tried[4]]
    assert transformer.position.item() == 0


def test_a_step_that_no_layout_can_run_tells_why(make, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'chip')

    def timed(step):
        raise RuntimeError('Triton Error [CUDA]: invalid argument')

    monkeypatch.setattr(kernels, 'timed', timed)
    transformer = fake_transformer([('out', Product(Dense(make(8, 1024)), None))], None)
    with pytest.raises(RuntimeError, match='invalid argument'):
        TritonOps(DEVICE).tune(transformer, lambda line: None)
