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

"""Weights in the layouts of PyTorch's own kernels give the products of the dense weights."""

from dataclasses import replace
import gc
import math
import weakref

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from engine_contract import load
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engines import device
from physai_decode.engines import stored
from physai_decode.engines.native import families
from physai_decode.engines.native import fusion
from physai_decode.engines.native import NativeEngine
from physai_decode.engines.native import source
from physai_decode.engines.native import start
from physai_decode.engines.native import torch_forms
from physai_decode.engines.native import weights
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.torch_forms import TorchForms
from physai_decode.engines.native.torch_linear import Reordered
from physai_decode.engines.native.torch_linear import TorchInt4
import random_formats
import random_gptq
import random_model
from test_formats import FORMATS
from test_formats import WIDE

CPU = torch.device('cpu')
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
CONFIG = EngineConfig(device=DEVICE.type, cpu_threads=1)
packs = pytest.mark.skipif(
    not torch_forms.has_int4(DEVICE), reason='PyTorch has no int4 product here')


def bfloat16_forms():
    return TorchForms(torch.bfloat16, DEVICE, math.inf)


def relative_error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@packs
@pytest.mark.parametrize('tokens', [1, 5, 300])
@pytest.mark.parametrize(('rows', 'columns', 'size', 'order', 'symmetric'), [
    (96, 256, 32, False, True), (48, 512, 128, True, False), (4176, 128, 64, False, False),
    (64, 512, 128, True, True)])
def test_int4_product_matches_dense(rows, columns, size, order, symmetric, tokens):
    words, dense = random_gptq.tensors(1, rows, columns, size, order, symmetric)
    weight = replace(random_gptq.read(words, rows, columns, size, DEVICE),
                     bias=torch.randn(rows, device=DEVICE).bfloat16())
    packed = bfloat16_forms()(weight)
    assert isinstance(packed, TorchInt4) and packed.shape == (rows, columns)
    x = torch.randn(tokens, columns, device=DEVICE)
    expected = x.double() @ dense.double().t().to(DEVICE) + weight.bias.double()
    assert relative_error(packed.apply(x.bfloat16()), expected) < 0.01
    assert relative_error(packed.apply(x), expected) < 0.01           # the scales are bfloat16
    assert packed.apply(x[0].bfloat16()).shape == (rows,)
    # Half a byte per weight; a scale and a zero point per group; bias and column order.
    groups = columns // size
    assert packed.read_bytes <= rows * (columns / 2 + 4 * groups + 2) + 4 * columns


@packs
@pytest.mark.parametrize(('rows', 'columns', 'size'), [(40, 256, 32), (64, 288, 128)])
def test_int4_product_is_not_used_for_unsupported_shapes(rows, columns, size):
    words, dense = random_gptq.tensors(2, rows, columns, size)
    converted = bfloat16_forms()(random_gptq.read(words, rows, columns, size, DEVICE))
    assert not isinstance(converted, (TorchInt4, Int4))
    x = torch.randn(3, columns, device=DEVICE)
    assert relative_error(converted.apply(x.bfloat16()), x @ dense.t().to(DEVICE)) < 0.01


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_unpacks_gate_and_up_without_interleaving(dtype):
    parts = [random_gptq.tensors(seed, 64, 256, 32, act_order=False) for seed in (1, 2)]
    fused = fusion.fuse([random_gptq.read(words, 64, 256, 32) for words, _ in parts], True)
    fused = replace(fused, bias=torch.arange(128.0).to(dtype))
    forms = TorchForms(dtype, CPU, math.inf)
    forms._packs = False
    x = torch.randn(5, 256).to(dtype)
    for got, expected in zip(forms(fused, paired=True).halves(
            forms(fused, paired=True).apply(x)), fused.halves(fused.apply(x)), strict=True):
        assert relative_error(got, expected.flatten(1)) < 0.01
    assert 'unpacked' in forms.report


@pytest.mark.parametrize(('shared', 'spare'), [(True, 2**30), (False, 0)])
def test_unpacked_weights_leave_memory_to_other_programs(monkeypatch, shared, spare):
    """On a Jetson without Triton, they would otherwise take all memory of the board."""
    assert device.shares_memory(CPU)
    monkeypatch.setattr(device, 'free_bytes', lambda which: 8 * 2**30)
    monkeypatch.setattr(device, 'shares_memory', lambda which: shared)
    assert start.unpacked_limit(CPU, 3 * 2**30) == 5 * 2**30 - spare
    monkeypatch.setattr(device, 'free_bytes', lambda which: None)
    assert start.unpacked_limit(CPU, 3 * 2**30) == math.inf


@pytest.mark.parametrize('rows, columns', [(256, 640), (1280, 256)])
def test_unpacked_weights_have_no_gaps(rows, columns):
    """Stored rows are padded to whole blocks; products of padded weights are far slower."""
    words, _ = random_gptq.tensors(1, rows, columns, 128, act_order=False)
    weight = fusion.fuse([random_gptq.read(words, rows, columns, 128)], False)
    dense = TorchForms(torch.float32, CPU, math.inf)(weight).weight
    assert dense.shape == (rows, columns)
    assert dense.is_contiguous() or dense.t().is_contiguous()


@pytest.mark.parametrize('rows', [1, 2, 33])
@pytest.mark.parametrize('layout', ['rows', 'columns', 'gaps'])
@pytest.mark.parametrize('bias', [True, False])
def test_float32_product_of_each_memory_layout(rows, layout, bias):
    """With oneDNN for large matrices without gaps, otherwise without."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 640), torch.randn(1024, 640)
    expected = x.double() @ weight.double().t()
    if layout == 'columns':
        weight = weight.t().contiguous().t()
    elif layout == 'gaps':
        weight = torch.nn.functional.pad(weight, (0, 384))[:, :640]
    offset = torch.randn(1024) if bias else None
    got = Dense(weight, offset).apply(x)
    torch.testing.assert_close(got.double(), expected + (offset if bias else 0), rtol=1e-4,
                               atol=1e-4)


def test_log_states_the_missing_memory():
    words, _ = random_gptq.tensors(1, 64, 256, 32)
    weight = random_gptq.read(words, 64, 256, 32)
    forms = TorchForms(torch.float32, CPU, 64 * 256 * 4)
    assert isinstance(forms(weight), Dense)
    assert forms(weight) is weight
    assert '6.55e-05 GB more of free memory' in forms.report


@pytest.mark.parametrize(('capability', 'chip', 'device', 'has'), [
    ('DEFAULT', (9, 0), 'cpu', False), ('AVX512', (7, 5), 'cuda', False)])
def test_old_hardware_has_no_int4_product(monkeypatch, capability, chip, device, has):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: chip)
    assert torch_forms.has_int4(torch.device(device)) == has


@pytest.mark.parametrize('bias', [False, True])
def test_bfloat16_product_with_a_vector_without_onednn(bias):
    weight = Dense(torch.randn(50, 70).bfloat16(), torch.randn(50).bfloat16() if bias else None)
    x = torch.randn(70).bfloat16()
    expected = weight.weight.double() @ x.double() + (weight.bias.double() if bias else 0)
    assert relative_error(weight.apply(x), expected) < 0.01


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('room', [0, math.inf])
def test_converts_a_tied_head(tmp_path, dtype, room):
    checkpoint = inspect(random_model.save(tmp_path, 'llama', 1, tie_word_embeddings=True))
    shape = families.parse(checkpoint.config)
    read = weights.load(shape, source.Files(checkpoint, CPU), None, dtype, lambda text: None,
                        TorchForms(dtype, CPU, room))
    table = stored.read(checkpoint.tensors['model.embed_tokens.weight']).to(dtype)
    assert torch.equal(read.embedding, table)
    row = 0
    if dtype == torch.float32 or not room or not torch_forms.has_reordered(dtype, CPU):
        assert read.head.weight is read.embedding       # one tensor serves both
    else:
        row = table[0].nbytes
        assert torch.equal(read.head.weight.to_dense(), table)
    linears = [linear for layer in read.layers for linear in layer.linears]
    norms = 2 * len(read.layers) + 1
    assert read.read_bytes == row + norms * table[0].nbytes + table.nbytes + sum(
        linear.shape[0] * linear.shape[1] * dtype.itemsize for linear in linears)


@pytest.mark.skipif(not torch_forms.has_reordered(torch.bfloat16, CPU),
                    reason='oneDNN has no bfloat16 product on this processor')
@pytest.mark.parametrize('bias', [False, True])
def test_reordered_weights_match_dense(bias):
    weight = Dense(torch.randn(50, 70).bfloat16(), torch.randn(50).bfloat16() if bias else None)
    reordered = TorchForms(torch.bfloat16, CPU, math.inf)(weight)
    assert isinstance(reordered, Reordered)
    assert (reordered.shape, reordered.read_bytes) == (weight.shape, weight.read_bytes)
    for x in (torch.randn(70), torch.randn(4, 70)):
        expected = x.double() @ weight.weight.double().t() + (weight.bias.double() if bias else 0)
        assert relative_error(reordered.apply(x.bfloat16()), expected) < 0.01
        assert relative_error(reordered.apply(x), expected) < 1e-6
        assert reordered.apply(x).shape == expected.shape


@packs
def test_load_frees_the_stored_form(tmp_path, monkeypatch):
    stored_weights = []

    def record(weight, pack=torch_forms._packed):
        stored_weights.append(weakref.ref(weight))
        return pack(weight)

    monkeypatch.setattr(torch_forms, '_packed', record)
    random_formats.save(tmp_path, 'llama', FORMATS['awq-g64'], **WIDE)
    engine = load(NativeEngine, tmp_path, replace(CONFIG, device='cpu')).engine
    gc.collect()
    assert stored_weights and not any(weight() for weight in stored_weights)
    engine.close()


@pytest.mark.parametrize('name', [
    'awq-g64', 'packed4-order', 'int8-rows', 'fp8-block', 'nf4', 'nvfp4', 'modelopt'])
def test_engine_runs_each_format(tmp_path, name):
    """The load's self-check compares prompt and steps; int4 weights stay packed on a CPU."""
    random_formats.save(tmp_path, 'llama', FORMATS[name], **WIDE)
    loop = load(NativeEngine, tmp_path, CONFIG)
    footprint = loop.engine.footprint
    packed = name in ('awq-g64', 'packed4-order') and torch_forms.has_int4(DEVICE)
    if DEVICE == CPU:
        assert footprint.dtype == ('bfloat16' if packed else 'float32')
        forms = {type(layer.mlp.down) for layer in loop.engine.transformer.weights.layers}
        assert forms == {TorchInt4 if packed else Dense}
    steps = list(loop.stream(list(range(20)), SamplingConfig(max_new_tokens=5)))
    assert isinstance(loop, DecodeLoop) and len([s for s in steps if s.token_ids]) == 5
    loop.engine.close()
