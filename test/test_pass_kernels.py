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

"""Kernels of passes against their references; each row has the bits of a pass of its own."""

from dataclasses import replace

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('triton')

import linear_contract
from linear_contract import assert_close
from linear_contract import DEVICE
from linear_contract import EPS
from linear_contract import REFERENCE
from physai_decode.engines.native import pass_kernels
from physai_decode.engines.native.architecture import Growth
from physai_decode.engines.native.fusion import fuse
from physai_decode.engines.native.kernels import _heads
from physai_decode.engines.native.kernels import ATTENTION_LAYOUTS
from physai_decode.engines.native.kernels import AttentionLayout
from physai_decode.engines.native.kernels import Layout
from physai_decode.engines.native.kernels import Shape
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.ops import Attention
from physai_decode.engines.native.pass_kernels import PassOps
import random_formats
from test_kernels import gate_up
from test_kernels import packed
from triton.runtime.interpreter import interpreter_builder

NVFP4 = random_formats.float4('nvfp4')
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3}

make = pytest.fixture(linear_contract.maker)


def check_rows(run, rows, ops, *outs, relative=1e-5, alone=None):
    """
    Compare a pass with a pass per row, bit for bit, and with the reference.

    :param run: a function of the operations, a slice of rows or one row, and the outputs.
    :param alone: the rows to compare bit for bit; by default all.
    """
    alone = list(range(rows)) if alone is None else alone
    together, single, references = ([out.clone() for out in outs] for _ in range(3))
    run(ops, slice(rows), together)
    for row in range(rows):
        run(REFERENCE, row, references)
    for row in alone:
        run(ops, row, single)
    for got, one, reference in zip(together, single, references):
        assert got.isfinite().all()
        assert_close(got, reference, relative)
        if len(alone) < rows:
            got, one = got[alone], one[alone]
        assert torch.equal(got, one)


@pytest.mark.parametrize('rows, dtype', [
    (2, torch.float32), (8, torch.float32), (5, torch.float16), (8, torch.float16)])
@pytest.mark.parametrize('n, k, norm, add, gated', [
    (33, 513, True, False, False), (24, 1024, False, True, False), (21, 640, True, False, True)])
def test_dense(make, rows, dtype, n, k, norm, add, gated):
    x, gain = make(rows, k, dtype=torch.float32 if norm else dtype), make(k, dtype=dtype)
    weight = Dense(make(2 * n if gated else n, k, dtype=dtype), None if add else make(
        2 * n if gated else n, dtype=dtype))

    def run(ops, at, outs):
        if gated:
            ops.gated(x[at], weight, outs[0][at], gain, EPS, 'gelu_tanh')
        else:
            ops.linear(x[at], weight, outs[0][at], gain=gain if norm else None, eps=EPS, add=add)

    check_rows(run, rows, PassOps(DEVICE), make(rows, n), relative=CLOSE[dtype])


@pytest.mark.parametrize('layout', pass_kernels.PASS_DENSE_LAYOUTS[1::3])
def test_dense_in_other_layouts(make, layout):
    weight, x = Dense(make(24, 1000)), make(8, 1000)
    ops = PassOps(DEVICE)
    ops._layouts[Shape(24, 1000, 'float32', False, False)] = layout
    check_rows(lambda ops, at, outs: ops.linear(x[at], weight, outs[0][at]), 8, ops, make(8, 24))


def check_products(make, rows, dtype, weight, both, down, layout):
    """
    Check products with and without a norm, and gated, followed by another one.

    :param weight: [24, k]; ``both``, gate and up, [128, k]; ``down`` [32, 64].
    :param layout: of the first two.
    """
    k = weight.shape[1]
    weight = replace(weight, bias=make(24, dtype=dtype))
    x, gain = make(rows, k), make(k, dtype=dtype)
    ops = PassOps(DEVICE)
    for shape in ((24, k, weight.kind, False, True), (24, k, weight.kind, False, False),
                  (128, k, weight.kind, True, True)):
        ops._layouts[Shape(*shape)] = layout

    def run(ops, at, outs):
        normed, plain, hidden, added = (out[at] for out in outs)
        ops.linear(x[at], weight, normed, gain=gain, eps=EPS)
        ops.linear(x.to(dtype)[at], weight, plain)
        ops.gated(x[at], both, hidden, gain, EPS)
        ops.linear(hidden, down, added, add=True)

    check_rows(run, rows, ops, make(rows, 24), make(rows, 24), make(rows, 64, dtype=dtype),
               make(rows, 32), relative=CLOSE[dtype], alone=sorted({0, rows // 2, rows - 1}))


@pytest.mark.parametrize('rows, dtype', [(2, torch.float32), (8, torch.float16)])
@pytest.mark.parametrize('group_size, act_order, symmetric, warps, stages', [
    (32, False, True, 4, 2), (128, True, False, 2, 1), (64, False, False, 1, 2)])
def test_int4(make, rows, dtype, group_size, act_order, symmetric, warps,
              stages):
    """With and without a norm, and gated, followed by another product."""
    weight, _ = packed(1, 24, 384, group_size, act_order, symmetric)
    both, _ = gate_up(2, 64, 384, group_size, symmetric=symmetric)
    down, _ = packed(4, 32, 64, 32)
    check_products(make, rows, dtype, weight, both, down, Layout(16, 0, warps, stages))


@pytest.mark.parametrize('rows, dtype', [(2, torch.float32), (8, torch.float16)])
@pytest.mark.parametrize('warps', [1, 4])
def test_fp4(make, rows, dtype, warps):
    """With and without a norm, and gated, followed by another product."""
    shapes = (24, 640), (64, 640), (64, 640), (32, 64)
    weight, gate, up, down = (linear_contract.random_weight(NVFP4, *shape, seed)[0]
                              for seed, shape in enumerate(shapes))
    check_products(make, rows, dtype, weight, fuse([gate, up], paired=True), down,
                   Layout(16, 0, warps, 1))


ATTENTION = [
    (0, 7, 1, 0, False, Growth()), (31, 7, 1, 0, False, Growth()),
    (100, 7, 1, 0, False, Growth()), (0, 6, 2, 40, False, Growth(0.5, 16)),
    (31, 4, 4, 0, True, Growth()), (100, 6, 2, 40, False, Growth(0.5, 16)),
    (31, 28, 1, 0, False, Growth()), (120, 7, 1, 3, True, Growth())]


@pytest.mark.parametrize('rows, dtype, case', [
    *((3, torch.float32, case) for case in ATTENTION),
    *((8, torch.float16, case) for case in ATTENTION[4:])])
def test_attention(make, rows, dtype, case):
    """
    With splits that are empty for a row, and rows on both sides of a tile's border.

    Also with a window of fewer positions than rows, at the end of the context.
    """
    check_attention(make, rows, dtype, *case)


@pytest.mark.parametrize('warps, case, dim', [
    (4, ATTENTION[1], 64), (4, ATTENTION[5], 64), (2, (31, 9, 1, 0, False, Growth()), 128),
    (4, (31, 5, 1, 0, False, Growth()), 256)])
def test_attention_of_more_rows_per_program(make, warps, case, dim):
    check_attention(make, 8, torch.float32, *case, dim=dim, layout=AttentionLayout(2, warps))


def check_attention(make, rows, dtype, place, heads, kv_heads, window, norm,
                    growth, dim=64, layout=ATTENTION_LAYOUTS[0]):
    keys, values = (make(kv_heads, 128, dim, dtype=dtype) for _ in range(2))
    angles = make(128, dim // 2)
    gains = (make(dim), make(dim)) if norm else (None, None)
    layer = Attention(heads, kv_heads, dim, window, 0.1, EPS, *gains, growth)
    qkv = make(rows, (heads + 2 * kv_heads) * dim)

    def run(ops, at, outs):
        out, *cache = outs
        position = torch.tensor([place if isinstance(at, slice) else place + at], device=DEVICE)
        ops.attend(qkv[at], *cache, position, angles.cos(), angles.sin(), layer, out[at])

    ops = PassOps(DEVICE, splits=4 if window else 2)
    ops._attention_layouts[_heads(layer)] = layout
    check_rows(run, rows, ops, make(rows, heads * dim), keys, values, relative=CLOSE[dtype])


@pytest.mark.skipif(DEVICE.type == 'cuda', reason='there the programs have no order')
@pytest.mark.parametrize('case', [ATTENTION[1], ATTENTION[5]])
def test_programs_of_later_rows_can_be_first(make, monkeypatch, case):
    """A program may not need keys and values that another one writes."""
    forward, programs = interpreter_builder.set_grid_idx, []

    def backward(*program):
        programs.append([size - 1 - each for size, each in zip(
            interpreter_builder.grid_dim, program)])
        forward(*programs[-1])

    monkeypatch.setattr(interpreter_builder, 'set_grid_idx', backward)
    check_attention(make, 8, torch.float32, *case)
    assert any(row > 0 for _, _, row in programs)


def test_compiler_may_not_fuse_operations():
    """It would do so for some rows only; the interpreter does not show that."""
    assert PassOps(DEVICE)._launch(1)['enable_fp_fusion'] is False


def test_overflow_of_a_value_does_not_reach_previous_rows(make):
    keys, values = (make(1, 128, 64, dtype=torch.float16) for _ in range(2))
    angles, layer = make(128, 32), Attention(2, 1, 64, 0, 0.1, EPS, None, None, Growth())
    qkv = make(8, 4 * 64)
    qkv[3, -5] = 1e6

    def attended(rows, place):
        out = make(*rows.shape[:-1], 2 * 64)
        PassOps(DEVICE, splits=2).attend(
            rows, keys, values, torch.tensor([place], device=DEVICE), angles.cos(), angles.sin(),
            layer, out)
        return out

    together, single = attended(qkv, 31), [attended(qkv[row], 31 + row) for row in range(8)]
    assert together[:3].isfinite().all()
    assert torch.equal(together[:3], torch.stack(single[:3]))
    assert not any(row.isfinite().any() for row in (*together[3:], *single[3:]))


def test_add_normed(make):
    branch, gain = make(3, 700), make(700)
    check_rows(lambda ops, at, outs: ops.add_normed(branch[at], gain, EPS, outs[0][at]), 3,
               PassOps(DEVICE), make(3, 700))


def test_embed(make):
    """A row of padding (token -1) reads a valid row of the table."""
    table, tokens = make(7, 200), torch.tensor([3, 5, -1, 6], device=DEVICE)
    x = torch.full((4, 200), float('nan'), device=DEVICE)
    PassOps(DEVICE).embed(table, tokens, x, 2.0)
    assert torch.equal(x[[0, 1, 3]], 2 * table[[3, 5, 6]])
    assert x[2].isfinite().all()
