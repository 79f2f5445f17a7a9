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

"""Experts: kernels against their references, checkpoint formats, and what a step reads."""

from dataclasses import replace
import json
import os

from json_file import editing
import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
triton = pytest.importorskip('triton')
pytest.importorskip('transformers')

from engine_contract import load
import linear_contract
from linear_contract import maker
from physai_decode import engines
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.engine import EngineError
from physai_decode.engines.native import experts
from physai_decode.engines.native import families
from physai_decode.engines.native import fusion
from physai_decode.engines.native import kernels
from physai_decode.engines.native import NativeEngine
from physai_decode.engines.native import routing_kernels
from physai_decode.engines.native import self_check
from physai_decode.engines.native import source
from physai_decode.engines.native import weights
from physai_decode.engines.native.fp4_kernels import Fp4Ops
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.ops import Routed
from physai_decode.engines.native.ops import top_k
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.prefill import Prefill
from physai_decode.engines.native.prefill_tiling import runs_experts
from physai_decode.engines.native.torch_forms import TorchForms
from physai_decode.engines.native.transformer import EagerPrefill
from physai_decode.engines.native.transformer import Transformer
import random_formats
import random_gptq
import random_model
from safetensors.torch import load_file
from safetensors.torch import save_file

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
CPU = EngineConfig(device='cpu', dtype='float32', cpu_threads=1, max_context=64)
REFERENCE = TorchOps(on_host=False)
EPS = 1e-6
COUNT, TOP_K = 5, 3
IDS = (4, 0, 3)
NVFP4 = random_formats.float4('nvfp4')
EXPERTS = {'awq': random_formats.awq(32), 'nf4': random_formats.bitsandbytes('nf4', block=32),
           'nvfp4': NVFP4, 'fp8': random_formats.float8('block')}      # by format


make = pytest.fixture(maker)


@pytest.fixture
def routed(make):
    """Return three selected experts, with random routing weights."""
    return Routed(torch.tensor(IDS, device=DEVICE), make(TOP_K))


def error(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def stack_of(parts):
    return Stack.from_parts(parts, COUNT, TOP_K)


def int4(seed, n, k, symmetric=True):
    """Return random 4-bit weights, and their dequantised values."""
    stored, dense = random_gptq.tensors(seed, n, k, 32, symmetric=symmetric)
    return random_gptq.read(stored, n, k, 32, device=DEVICE), dense.to(DEVICE)


@pytest.mark.parametrize('count', [5, 128, 300])
@pytest.mark.parametrize('normalised', [False, True])
def test_selects_experts(make, count, normalised):
    logits = make(count)
    routings = [Routed(torch.full((4,), 99, device=DEVICE), make(4)) for _ in range(2)]
    for ops, into in zip((REFERENCE, Fp4Ops(DEVICE)), routings):
        ops.select(logits, into, normalised)
    assert routings[0].ids.tolist() == routings[1].ids.tolist() == logits.topk(4).indices.tolist()
    assert error(routings[1].weights, routings[0].weights) < 1e-6
    assert (abs(float(routings[1].weights.sum()) - 1) < 1e-6) == normalised


def test_selects_equal_experts_once(make):
    into = Routed(torch.zeros(3, dtype=torch.int64, device=DEVICE), make(3))
    Fp4Ops(DEVICE).select(torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0], device=DEVICE), into, True)
    assert into.ids.tolist() == [4, 1, 2]


def test_routing_weights_of_nan_logits_are_nan(make):
    """The ids are valid, because kernels use them as indices."""
    into = Routed(torch.zeros(3, dtype=torch.int64, device=DEVICE), make(3))
    Fp4Ops(DEVICE).select(torch.full((6,), float('nan'), device=DEVICE), into, True)
    assert into.weights.isnan().any()
    assert all(0 <= number < 6 for number in into.ids.tolist())


@pytest.mark.parametrize('size, columns', [(40, 512), (96, 64), (512, 256)])
def test_dense(make, routed, size, columns, monkeypatch):
    """Some sizes have partial tiles."""
    monkeypatch.setattr(kernels, 'DENSE_LAYOUTS', (kernels.Layout(16, columns, 1, 1),))
    gate_up = stack_of(Dense(make(2 * size, 100)) for _ in range(COUNT))
    down = stack_of(Dense(make(33, size)) for _ in range(COUNT))
    check_products(make, routed, gate_up, down, size)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('size', [64, 96])
def test_int4(make, routed, size, symmetric):
    """Some sizes have partial blocks of 128 columns."""
    pairs = [[int4(2 * number + at, size, 256, symmetric) for at in range(2)]
             for number in range(COUNT)]
    gate_up = stack_of(fusion.fuse([gate[0], up[0]], paired=True) for gate, up in pairs)
    downs = [int4(50 + number, 32, size, symmetric) for number in range(COUNT)]
    hidden, out = check_products(
        make, routed, gate_up, stack_of(down for down, _ in downs), size, 256, 32)
    plain = stack_of(Dense(torch.cat([gate[1], up[1]])) for gate, up in pairs), stack_of(
        Dense(dense) for _, dense in downs)
    expected = run(REFERENCE, make, routed, *plain, size)
    assert error(hidden, expected[0]) < 1e-4 and error(out, expected[1]) < 1e-4


def check_form(make, routed, form, size, *blocks):
    """Compare stacks of gates, ups and downs in a format with the same weights dense."""
    parts = [[linear_contract.random_weight(form, *shape, 3 * number + at) for at, shape in (
        (0, (size, 256)), (1, (size, 256)), (2, (32, size)))] for number in range(COUNT)]
    gate_up = stack_of(fusion.fuse([gate[0], up[0]], paired=True) for gate, up, _ in parts)
    down = stack_of(down[0] for *_, down in parts)
    hidden, out = check_products(make, routed, gate_up, down, size, *blocks)
    plain = stack_of(Dense(torch.cat([gate[1], up[1]])) for gate, up, _ in parts), stack_of(
        Dense(down[1]) for *_, down in parts)
    expected = run(REFERENCE, make, routed, *plain, size)
    assert error(hidden, expected[0]) < 1e-4 and error(out, expected[1]) < 1e-4


@pytest.mark.parametrize('size', [48, 256, 304])
def test_fp4(make, routed, size):
    """Some sizes have partial blocks of 256 columns; each projection has its own factor."""
    check_form(make, routed, NVFP4, size, 256, 32)


@pytest.mark.parametrize('form, size', [
    (random_formats.int8(-1), 96), (random_formats.packed(8, 32, symmetric=False), 96),
    (random_formats.float8('block'), 128), (random_formats.float8('channel'), 64)])
def test_8_bits(make, routed, form, size):
    check_form(make, routed, form, size)


def test_int4_with_zero_points_in_one_expert(make, routed):
    """The zero points of the others are 8."""
    downs = [int4(number, 32, 96, symmetric=number != 3) for number in range(COUNT)]
    stack = stack_of(down for down, _ in downs)
    x, out = torch.zeros(TOP_K, 128, device=DEVICE), make(32)
    x[:, :96] = make(TOP_K, 96)
    expected = sum(downs[number][1] @ row[:96] for number, row in zip(IDS, x))
    for ops in (REFERENCE, Fp4Ops(DEVICE)):
        ops.summed_experts(x, stack, routed, out)
        assert error(out, expected) < 1e-4


def run(ops, make, routed, gate_up, down, size, columns=None):
    """Run both products on the same random input; return their outputs."""
    generator = torch.Generator().manual_seed(1)
    x, gain, out = (torch.randn(count, generator=generator).to(DEVICE) for count in (
        gate_up.shape[1], gate_up.shape[1], down.shape[0]))
    hidden = torch.zeros(TOP_K, columns or size, device=DEVICE)
    ops.gated_experts(x, gate_up, routed, hidden, gain, EPS)
    for _ in range(2):
        ops.summed_experts(hidden, down, routed, out, add=True)
    ops.summed_experts(hidden, down, routed, out)
    ops.summed_experts(hidden, down, routed, out, add=True)
    return hidden[:, :size], out


def check_products(make, routed, gate_up, down, size, k=100, n=33):
    """Compare all operations; return the outputs of the kernels."""
    columns = getattr(down[0], 'padded_features', size)
    every = [run(ops, make, routed, gate_up, down, size, columns)
             for ops in (TorchOps(on_host=True), REFERENCE, Fp4Ops(DEVICE))]
    for got in every[1:]:
        for one, expected in zip(got, every[0]):
            assert error(one, expected) < 1e-4
    return every[-1]


def test_does_not_stack_weights_of_several_layouts(make):
    with pytest.raises(ValueError, match='layouts differ'):
        stack_of([Dense(make(32, 64)), int4(0, 32, 64)[0]])
    with pytest.raises(ValueError, match='layouts differ'):
        stack_of(linear_contract.random_weight(form, 32, 64)[0] for form in (
            random_formats.int8(-1), random_formats.float8('channel')))
    with pytest.raises(ValueError, match='layouts differ'):
        stack_of(linear_contract.random_weight(random_formats.bitsandbytes(kind), 32, 64)[0]
                 for kind in ('nf4', 'fp4'))
    stored, _ = random_gptq.tensors(0, 32, 64, 32, act_order=True)
    with pytest.raises(ValueError, match='own order of columns'):
        stack_of([random_gptq.read(stored, 32, 64, 32, device=DEVICE)])


# --- a whole model ------------------------------------------------------------------------------

def transformers(folder, dtype=torch.float32):
    """Return transformers with the same weights: kernels, torch as on a GPU, and as on a CPU."""
    checkpoint = inspect(folder)
    shape = families.parse(checkpoint.config)
    loaded = weights.load(shape, source.Files(checkpoint, DEVICE), checkpoint.quantized,
                          dtype, lambda message: None)
    return [Transformer(shape, loaded, 64, dtype, DEVICE, ops)
            for ops in (Fp4Ops(DEVICE, splits=2), REFERENCE, TorchOps(on_host=True))]


def save(folder, kind, layers=1):
    """Write a model of few tokens; a quantised one has one layer, or ``layers``."""
    small = {'vocab_size': 64, 'num_hidden_layers': layers}
    if kind == 'gptq':
        random_gptq.save(folder, 'qwen3_moe', 0, 32, symmetric=False, **small)
        plain = random_model.save(folder.with_name('plain'), 'qwen3_moe', 0, **small)
        restore_routers(folder, plain)
    elif kind in EXPERTS:
        random_formats.save(folder, 'qwen3_moe', EXPERTS[kind], dense=(
            'lm_head', *(f'{layer}.mlp.gate' for layer in range(layers))), **small)
    else:
        random_model.save(folder, kind, 0, vocab_size=64)
    return folder


def restore_routers(folder, plain):
    """Restore unquantised routers, as checkpoints have them."""
    path = folder / 'model.safetensors'
    tensors = {name: tensor for name, tensor in load_file(path).items()
               if '.mlp.gate.' not in name}
    tensors |= {name: tensor for name, tensor in load_file(
        plain / 'model.safetensors').items() if '.mlp.gate.' in name}
    save_file(tensors, path, metadata={'format': 'pt'})


@pytest.mark.parametrize('name', ['gate and up', 'down'])
@pytest.mark.parametrize('kind', ['gptq', *EXPERTS])
def test_check_finds_a_wrong_dequantisation(tmp_path, kind, name):
    """Only prompts of more tokens than that of the check dequantise experts."""
    t = transformers(save(tmp_path, kind))[0]
    self_check._check_dequantisers(t, t.ops.dequantiser, 1e-5)
    mlp = t.weights.layers[0].mlp
    wrong = (mlp.gate_up if name == 'gate and up' else mlp.down)[0]

    def is_wrong(weight):
        return (not isinstance(weight, Dense) and weight.scales.untyped_storage().data_ptr()
                == wrong.scales.untyped_storage().data_ptr())

    def dequantiser(weight):
        right = t.ops.dequantiser(weight)
        return (lambda *some: right(*some).roll(1, 0)) if is_wrong(weight) else right

    with pytest.raises(EngineError, match=rf'a long prompt wrongly.*experts \({name}, '
                                          rf'{wrong.kind}\) in layer 1'):
        self_check._check_dequantisers(t, dequantiser, 1e-5)


def test_load_refuses_a_wrong_dequantisation(tmp_path, monkeypatch):
    model = inspect(save(tmp_path, 'awq'))
    NativeEngine(model, CPU).close()
    monkeypatch.setattr(EagerPrefill, 'dequantiser', lambda self, weight: (
        None if isinstance(weight, Dense) else
        lambda one, part, dtype: -one.dequantise(part, dtype)))
    monkeypatch.setattr(TorchForms, 'layer', lambda self, layer: layer)     # as on a GPU
    with pytest.raises(EngineError, match='computes a long prompt wrongly.*in layer 1'):
        NativeEngine(model, CPU)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['qwen3_moe', 'qwen3_moe_between', *EXPERTS])
def test_prompts_and_steps(tmp_path, kind, monkeypatch):
    """A short prompt, a step after it, and the same tokens sorted by expert."""
    monkeypatch.setattr(experts, 'FEW', 2)
    results = []
    for each in transformers(save(tmp_path / 'model', kind)):
        ids = torch.tensor([7, 60], device=DEVICE)
        logits = [each.prefill(ids, 0).clone()]
        each.token.fill_(5)
        each.position.fill_(2)
        each.step()
        logits += [each.logits.clone(), each.prefill(torch.tensor([7, 60, 5], device=DEVICE), 0)]
        assert error(logits[2], logits[1]) < 1e-4
        results.append(torch.stack(logits))
    for got in results[:2]:
        assert error(got, results[2]) < 1e-4


@pytest.mark.parametrize('kind', ['qwen3_moe', 'qwen3_moe_between'])
def test_loads_a_folder_with_all_experts_in_one_tensor(tmp_path, kind):
    apart = random_model.save(tmp_path / 'apart', kind, 0)
    results = [load(NativeEngine, folder, CPU).engine.prefill_logits([3, 1, 4, 1, 5])
               for folder in (apart, joined(apart, tmp_path / 'joined'))]
    assert torch.equal(*results)


def joined(folder, to):
    """Write a folder whose experts are in one tensor, as in memory in transformers."""
    to.mkdir()
    (to / 'config.json').write_text((folder / 'config.json').read_text())
    stored, parts = {}, {}
    for name, tensor in load_file(folder / 'model.safetensors').items():
        if '.experts.' in name:
            lead, _, rest = name.partition('.experts.')
            number, part, _ = rest.split('.')
            parts.setdefault(lead, {})[int(number), part] = tensor
        else:
            stored[name] = tensor
    for lead, found in parts.items():
        numbers = range(len(found) // 3)
        stored[f'{lead}.experts.gate_up_proj'] = torch.stack([torch.cat(
            [found[number, 'gate_proj'], found[number, 'up_proj']]) for number in numbers])
        stored[f'{lead}.experts.down_proj'] = torch.stack(
            [found[number, 'down_proj'] for number in numbers])
    save_file(stored, to / 'model.safetensors', metadata={'format': 'pt'})
    return to


@pytest.mark.parametrize('kind', ['qwen3_moe', 'qwen3_moe_between', 'gptq'])
def test_step_reads_only_the_selected_experts(tmp_path, kind, monkeypatch):
    """The weights of the others are NaN."""
    t = transformers(save(tmp_path / 'model', kind))[0]
    t.token.fill_(9)
    selected, select = [], Fp4Ops.select

    def record(self, logits, into, normalised):
        select(self, logits, into, normalised)
        selected.append(into.ids.tolist())

    monkeypatch.setattr(Fp4Ops, 'select', record)
    t.step()
    expected = t.logits.clone()
    layers = [layer for layer in t.weights.layers if isinstance(layer.mlp, experts.Experts)]
    assert len(layers) == len(selected)
    unread = 0
    for layer, numbers in zip(layers, selected):
        for stack in (layer.mlp.gate_up, layer.mlp.down):
            one, floats = stack[0], 'weight' if kind != 'gptq' else 'scales'
            for number in set(range(stack.count)) - set(numbers):
                getattr(stack.stacked, floats)[number] = float('nan')
                unread += one.read_bytes
    t.step()
    assert torch.equal(t.logits, expected)
    # `read_bytes` counts all weights except those, and one row of the input embedding.
    every = [tensor for layer in t.weights.layers for tensor in layer.norms]
    every += [t.weights.norm, t.weights.head.weight]
    whole = sum(tensor.numel() * tensor.element_size() for tensor in every)
    for layer in t.weights.layers:
        for weight in layer.linears:
            whole += weight.read_bytes * weight.count // weight.top_k \
                if isinstance(weight, Stack) else weight.read_bytes
    tied = t.weights.head.weight is t.weights.embedding
    row = 0 if tied else t.weights.embedding[0].numel() * 4
    assert t.weights.read_bytes == whole - unread + row
    read = [size for kernel, operation, size in t.reads(1) if operation != 'attention']
    norms = sum(4 * tensor.numel() for layer in t.weights.layers for tensor in layer.norms)
    assert sum(read) == t.weights.read_bytes - norms - 4 * t.weights.norm.numel() - row


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('kind', ['qwen3_moe', 'qwen3_moe_between', 'gptq', *EXPERTS])
def test_chunks(tmp_path, kind, dtype):
    """
    In chunks, the device assigns tokens to experts; a chunk has 4 tokens that pad it.

    Chunks run all layers but the MLP of the last.
    """
    own, reference, _ = transformers(save(tmp_path / 'model', kind, layers=2), dtype)
    fed = Prefill(own, (16, 32), capture=DEVICE.type == 'cuda')
    ids = torch.arange(1, 41, device=DEVICE)
    for start, stop in ((0, 12), (12, 40)):
        fed.feed(ids[start:stop].tolist(), start)
        expected = reference.prefill(ids[start:stop], start)
    limit = 1e-4 if dtype == torch.float32 else 0.02
    assert error(fed.logits(), expected) < limit
    for cache in ('keys', 'values'):
        assert error(getattr(own, cache)[:, :, :40], getattr(reference, cache)[:, :, :40]) < limit


@pytest.mark.parametrize('count, normalised, splits', [(6, True, 1), (40, False, 3)])
def test_routes_tokens(make, count, normalised, splits):
    parts = make(splits, 16, count)
    parts[:, 3] = float('nan')
    ids, routing = (torch.full((2, 16), 99, dtype=kind, device=DEVICE)
                    for kind in (torch.int32, torch.float32))
    routing_kernels._route[(16,)](
        parts, torch.tensor([9], device=DEVICE), ids, routing, 16, 16 * count, EXPERTS=count,
        WIDE=triton.next_power_of_2(count), BLOCK=8, TOP_K=2, NORMALISED=normalised, PARTS=splits,
        PDL=False)
    expected, weights = top_k(parts.sum(0), 2, normalised)
    for token in range(16):
        if token >= 9:
            assert ids[:, token].tolist() == [-1, -1]
        elif token == 3:
            assert routing[:, token].isnan().all() and 0 <= ids[:, token].min() < count
        else:
            assert ids[:, token].tolist() == expected[token].tolist()
            assert error(routing[:, token], weights[token]) < 1e-6


@pytest.mark.parametrize('count, tokens, size', [(5, 16, 16), (5, 64, 16), (130, 32, 16)])
def test_assigns_blocks(count, tokens, size):
    """Each place that has an expert is in one slot of its blocks, in order."""
    total = 3 * tokens
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(-1, count - 1, (total,), generator=generator, dtype=torch.int32)
    ids = ids.to(DEVICE)
    blocks = total // size + min(count, total)
    counts, slots, owners = (torch.full((each,), 77, dtype=torch.int32, device=DEVICE)
                             for each in (count, blocks * size, blocks))
    routing_kernels._count[(count,)](ids, counts, total, BLOCK=32, PDL=False)
    assert counts.tolist() == [(ids == expert).sum() for expert in range(count)]
    routing_kernels._arrange[(count,)](
        ids, counts, slots, owners, total, blocks, EXPERTS=count,
        WIDE=triton.next_power_of_2(count), TOKENS=size, BLOCK=32,
        MOST=triton.next_power_of_2(blocks), PDL=False)
    places = []
    for owner, block in zip(owners.tolist(), slots.view(-1, size).tolist()):
        if owner < 0:
            continue
        own = [slot for slot in block if slot >= 0]
        assert own == block[:len(own)] and own
        assert all(ids[slot] == owner for slot in own)
        places += own
    assert sorted(places) == [place for place in range(total) if ids[place] >= 0]
    assert owners.tolist() == sorted(owner for owner in owners.tolist() if owner >= 0) + [
        -1] * owners.tolist().count(-1)


def test_runs_what_fits(tmp_path):
    """Chunks need a router without groups, and tiles that fit."""
    t = transformers(random_model.save(tmp_path, 'qwen3_moe', 0))[0]
    mlp = t.weights.layers[-1].mlp
    assert runs_experts(mlp, 200_000)
    assert not runs_experts(mlp, 5_000)
    biased = replace(mlp, router=replace(mlp.router, bias=torch.zeros(6)))
    assert not runs_experts(biased, 200_000)


def test_order_of_sums_is_fixed(tmp_path):
    """The same prompt gives bitwise equal logits."""
    t = transformers(random_model.save(tmp_path, 'qwen3_moe', 0))[1]
    ids = torch.arange(50, device=DEVICE)
    first = t.prefill(ids, 0).clone()
    assert torch.equal(t.prefill(ids, 0), first)


@pytest.mark.parametrize('form, what', [
    (random_formats.packed(8, 32, act_order=True),
     'experts of compressed-tensors-int8-g32 with actorder group')])
def test_rejects_formats(tmp_path, form, what):
    """``auto`` selects the engine that the error names."""
    random_formats.save(tmp_path, 'qwen3_moe', form)
    with pytest.raises(EngineError, match=f'does not run {what}.*engine.name to transformers'):
        NativeEngine(inspect(tmp_path), CPU)
    assert engines.choose(inspect(tmp_path), EngineConfig(device='cpu')).name == 'transformers'


@pytest.mark.parametrize('form, size, multiple', [
    (random_formats.float8('channel'), 40, 16), (random_formats.float8('block'), 192, 128)])
def test_rejects_experts_of_which_a_tile_would_have_two(tmp_path, form, size, multiple):
    random_formats.save(tmp_path, 'qwen3_moe', form, moe_intermediate_size=size)
    with pytest.raises(EngineError, match=(
            f'experts as stored: {size} columns, not a multiple of {multiple}; set engine.name')):
        NativeEngine(inspect(tmp_path), CPU)


def test_experts_with_separate_column_orders(tmp_path):
    random_gptq.save(tmp_path, 'qwen3_moe', 0, 32, act_order=True)
    with pytest.raises(EngineError, match='experts of gptq-int4-g32 with desc_act'):
        NativeEngine(inspect(tmp_path), CPU)
    with editing(tmp_path / 'config.json') as config:
        config['quantization_config'].pop('desc_act')
    what = r'layers\.0\.mlp\.experts as stored: each has its own order of columns'
    with pytest.raises(EngineError, match=f'{what}; set engine.name to transformers'):
        NativeEngine(inspect(tmp_path), CPU)


@pytest.mark.parametrize('room', [0, float('inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_layouts_of_experts_for_pytorch(tmp_path, room, dtype):
    """Dequantised if there is memory; the log says how much."""
    checkpoint = inspect(save(tmp_path / 'model', 'gptq'))
    shape = families.parse(checkpoint.config)
    results = []
    for forms in (None, TorchForms(dtype, torch.device('cpu'), room)):
        loaded = weights.load(shape, source.Files(checkpoint, torch.device('cpu')),
                              checkpoint.quantized, dtype, lambda message: None, forms)
        t = Transformer(shape, loaded, 64, dtype, torch.device('cpu'), TorchOps(on_host=True))
        t.token.fill_(9)
        t.step()
        results.append(t.logits)
    assert isinstance(loaded.layers[0].mlp.down.stacked, Dense) == bool(room)
    assert ('kept unpacked' if room else 'unpacked at each step') in forms.report
    assert error(*results) < (1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize('fields, what', [
    ({'num_experts_per_tok': 9}, 'num_experts_per_tok 9, more than its 8 experts'),
    ({'num_experts_per_tok': 0}, 'num_experts_per_tok is 0'),
    ({'num_local_experts': '8'}, 'num_local_experts is "8"'),
    ({'moe_intermediate_size': None}, 'moe_intermediate_size is null'),
    ({'decoder_sparse_step': 0}, 'decoder_sparse_step is 0'),
    ({'mlp_only_layers': 1}, 'mlp_only_layers is 1'),
    ({'mlp_only_layers': ['1']}, 'mlp_only_layers is'),
    ({'hidden_act': 'gelu'}, 'does not run hidden_act "gelu"')])
def test_rejects_configs(tmp_path, fields, what):
    config = json.loads((random_model.save(tmp_path, 'qwen3_moe', 0) / 'config.json').read_text())
    families.parse(config)
    with pytest.raises(EngineError, match=what):
        families.parse({**config, **fields})


def test_older_name_of_the_number_of_experts(tmp_path):
    config = json.loads((random_model.save(tmp_path, 'qwen3_moe', 0) / 'config.json').read_text())
    routing = families.parse(config).routing
    config['num_experts'] = config.pop('num_local_experts')
    assert families.parse(config).routing == routing
    assert routing.count == 8 and routing.layers == {0, 1}


def test_layers_without_experts(tmp_path):
    random_model.save(tmp_path, 'qwen3_moe_between', 0)
    assert families.parse(inspect(tmp_path).config).routing.layers == {1}
