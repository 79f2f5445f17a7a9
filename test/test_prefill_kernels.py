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

"""Each kernel of a prefill against torch; on a CPU in Triton's interpreter."""

from dataclasses import replace
import math
import os

import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
triton = pytest.importorskip('triton')

from linear_contract import assert_close
from linear_contract import maker
from physai_decode.engines.native import fusion
from physai_decode.engines.native import prefill
from physai_decode.engines.native import prefill_kernels as kernels
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.ops import ACTIVATIONS
from physai_decode.engines.native.prefill_tiling import LIBRARY
from physai_decode.engines.native.prefill_tiling import rule
from physai_decode.engines.native.prefill_tiling import Tiling
import random_gptq
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
DEVICE = torch.device('cuda' if CUDA else 'cpu')
H100 = 132, 232448
L4 = 58, 101376
ORIN = 16, 166912
THOR = 20, 232448, True


make = pytest.fixture(maker)


def nans(*shape):
    return torch.full(shape, float('nan'), device=DEVICE)


def packed(seed, n, k, group_size, symmetric=True):
    """Return a random GPTQ weight as the engine stores it, and its float32 values [n, k]."""
    stored, dense = random_gptq.tensors(seed, n, k, group_size, False, symmetric)
    return random_gptq.read(stored, n, k, group_size, device=DEVICE), dense.to(DEVICE)


def fragment_order(x):
    """Permute a product's input [tokens, k] to the fragment order of an `Int4`."""
    parts = x.unflatten(1, (-1, 4, 2, 2, 2)).permute(0, 1, 3, 4, 2, 5)
    return parts.reshape(x.shape).contiguous()      # operand, high, lane, low


@pytest.mark.parametrize('n, splits', [(40, 1), (64, 3), (130, 2)])
def test_dense(make, n, splits):
    x, weight, out = make(32, 160), make(n, 160), nans(splits, 32, n)
    kernels._dense[(2 * triton.cdiv(n, 32), splits)](
        x, weight, x, out, x, x, x, 0, n, 160, 32, 0, n, ROWS=32, COLUMNS=32, TOKENS=16, STAGES=2,
        PAIRED=False, GATED=False, GELU=False, BIAS=False, PLACED=False, EXPERTS=False, PDL=False)
    assert_close(out.sum(0), x @ weight.t())


@pytest.mark.parametrize('n', [8, 40])
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_dense_gated(make, n, activation):
    x, weight, bias, out = make(16, 64), make(2 * n, 64), make(2 * n), nans(16, n)
    kernels._dense[(triton.cdiv(2 * n, 32), 1)](
        x, weight, bias, out, x, x, x, 0, 2 * n, 64, 16, 0, n, ROWS=32, COLUMNS=32, TOKENS=16,
        STAGES=2, PAIRED=True, GATED=True, GELU=activation == 'gelu_tanh', BIAS=True, PLACED=False,
        EXPERTS=False, PDL=False)
    gate, up = F.linear(x, weight, bias).chunk(2, 1)
    assert_close(out, ACTIVATIONS[activation](gate) * up)


@pytest.mark.parametrize('group_size, k, splits, symmetric', [
    (32, 256, 1, True), (64, 320, 2, False), (128, 640, 3, False), (128, 512, 1, True)])
def test_int4(make, group_size, k, splits, symmetric):
    weight, dense = packed(1, 48, k, group_size, symmetric)
    x, out = make(16, k), nans(splits, 16, 48)
    kernels._int4[(2, splits)](
        fragment_order(x), weight.packed, weight.scales,
        weight.scales if weight.zeros is None else weight.zeros, x, x, out, x, x, x, 0, 48,
        k, weight.packed.shape[1], 16, 0, 48, GROUP=group_size, TILES=2, WARPS=4, TOKENS=16,
        STAGES=2, EXACT=k % (4 * group_size) == 0, GATED=False, GELU=False, BIAS=False,
        ZEROS=not symmetric, TABLE=False, PLACED=False, ASSEMBLY=CUDA, EXPERTS=False, PDL=False)
    assert_close(out.sum(0), x @ dense.t())


def test_int4_gated(make):
    """The output is in fragment order, for another int4 product."""
    parts = [packed(seed, 64, 128, 32) for seed in (1, 2)]
    bias = make(128)
    weight = fusion.fuse([replace(part, bias=bias[64 * at:64 * at + 64])
                        for at, (part, _) in enumerate(parts)], paired=True)
    x, out = make(16, 128), nans(16, 64)
    kernels._int4[(4, 1)](
        fragment_order(x), weight.packed, weight.scales, weight.scales, x, weight.bias, out, x,
        x, x, 0, 128, 128, 1, 16, 0, 64, GROUP=32, TILES=2, WARPS=4, TOKENS=16, STAGES=2,
        EXACT=True, GATED=True, GELU=False, BIAS=True, ZEROS=False, TABLE=False, PLACED=True,
        ASSEMBLY=CUDA, EXPERTS=False, PDL=False)
    gate, up = (F.linear(x, dense, bias[64 * at:64 * at + 64])
                for at, (_, dense) in enumerate(parts))
    assert_close(out, fragment_order(F.silu(gate) * up))


@pytest.mark.parametrize('group_size, symmetric', [(32, True), (64, False), (128, False)])
def test_unpack(group_size, symmetric):
    """Some tiles of a weight with a partial last block."""
    weight, dense = packed(3, 80, 352, group_size, symmetric)
    out = nans(48, 352)
    kernels._unpack[(2, weight.packed.shape[1])](
        weight.packed, weight.scales, weight.scales if symmetric else weight.zeros, out, 2, 48,
        352, weight.packed.shape[1], GROUP=group_size, TILES=2, ZEROS=not symmetric, ASSEMBLY=CUDA,
        num_warps=2)
    assert_close(out, dense[32:], 1e-6)


@pytest.mark.parametrize('start, count, window', [
    (0, 16, 0), (0, 5, 0), (37, 16, 0), (50, 9, 20), (80, 16, 3), (3, 1, 0)])
@pytest.mark.parametrize('splits', [1, 4])
def test_attention(make, start, count, window, splits):
    heads, kv_heads, dim, context, tokens = 6, 2, 96, 96, 16
    q = make(tokens, heads * dim)
    keys, values = make(kv_heads, context, dim), make(kv_heads, context, dim)
    at, real = (torch.tensor([number], device=DEVICE) for number in (start, count))
    out = nans(tokens, heads * dim)
    parts = [nans(splits * tokens * heads * width) for width in (dim, 1, 1)]
    kernels._attend[(2, kv_heads, splits)](
        q, keys, values, at, real, out, *parts, context, tokens,
        math.log2(math.e) / math.sqrt(dim), HEADS=heads, GROUP=3, D=dim, DIMS=128, M=32, N=16,
        SPLITS=splits, WINDOW=window, STAGES=2, PLACED=False, PDL=False)
    if splits > 1:
        kernels._join[(tokens, 2)](
            *parts, real, out, tokens, HEADS=heads, ROWS=4, D=dim, DIMS=128, SPLITS=splits,
            PLACED=False, PDL=False)
    positions = torch.arange(context, device=DEVICE)
    own = start + torch.arange(count, device=DEVICE).unsqueeze(1)
    mask = positions <= own
    if window:
        mask &= positions > own - window
    expected = F.scaled_dot_product_attention(
        q[:count].view(count, heads, dim).transpose(0, 1)[None], keys[None], values[None],
        attn_mask=mask, enable_gqa=True)[0].transpose(0, 1).flatten(1)
    assert_close(out[:count], expected)


@pytest.mark.parametrize('chip', [H100, L4, THOR])
@pytest.mark.parametrize('tokens', [16, 64, 128, 512, 2048])
@pytest.mark.parametrize('gated', [False, True])
def test_tiles_fit_in_shared_memory(chip, tokens, gated):
    for weight in (Dense(torch.empty(4608, 3584, device='meta')), packed(1, 64, 1024, 32)[0]):
        tiling = rule(weight, tokens, gated, *chip)
        assert isinstance(tiling, Tiling)
        if tiling == LIBRARY:
            assert tokens > 32
            continue
        wide = 1 if isinstance(weight, Dense) else 4
        room = tiling.columns * wide * (2 * tiling.tokens + 2 * tiling.rows // wide)
        assert tiling.stages * room <= chip[1]
        assert not gated or tiling.splits == 1
        assert tokens % tiling.tokens == 0
        if chip is THOR and wide == 4:
            assert tiling.rows * tiling.tokens <= 8192


@pytest.mark.parametrize('chip', [H100, L4, ORIN])
@pytest.mark.parametrize('gated', [False, True])
def test_launches_of_tables_do_not_fail(chip, gated):
    """Beside 32 KiB that Triton does not know of, it must allocate more than 48 KiB."""
    weight = replace(packed(1, 64, 1024, 32)[0], table=(0.0,) * 16)
    tilings = [rule(weight, tokens, gated, *chip) for tokens in prefill.SIZES]
    assert tilings[0].rows and (tilings[3].rows or chip == L4)
    for tiling in tilings:
        if tiling.rows:
            step = 4 * tiling.columns * (tiling.rows // 2 + 2 * tiling.tokens)
            least = (tiling.stages - 1) * (step + 8 * tiling.rows)
            assert 48 * 1024 < least < tiling.stages * step < chip[1] - 32 * 1024


@pytest.mark.parametrize('chip', [H100, L4, ORIN])
def test_tiles_fit_with_older_compilers(chip, monkeypatch):
    """They take 8 bytes of shared memory per element of a tile to part gate and up."""
    monkeypatch.setattr(prefill.compiler, 'PIPELINES', False)
    for weight in (Dense(torch.empty(4608, 3584, device='meta')), packed(1, 64, 1024, 32)[0]):
        for tokens in prefill.SIZES:
            tiling = rule(weight, tokens, True, *chip)
            assert 8 * tiling.rows * tiling.tokens <= chip[1]
