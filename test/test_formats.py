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

"""The native engine runs each format of quantised weights, and rejects damaged checkpoints."""

from itertools import product
import json

from json_file import editing
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from engine_contract import load
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.engine import EngineError
from physai_decode.engines import build
from physai_decode.engines import device
from physai_decode.engines.native import families
from physai_decode.engines.native import NativeEngine
from physai_decode.engines.native import start
from physai_decode.engines.native import weights as native_weights
from physai_decode.engines.native.source import Files
from physai_decode.engines.native.weight_size import weight_bytes
import random_formats
import random_model
from safetensors.torch import load_file
from safetensors.torch import save_file
from test_gptq import assert_close
from test_gptq import check_answer
from test_gptq import library_logits
from test_gptq import RELATIVE

CPU = EngineConfig(device='cpu', dtype='float32', cpu_threads=1)
IDS = [(3 + 7 * index) % 512 for index in range(40)]
WIDE = {'hidden_size': 256, 'intermediate_size': 384, 'num_attention_heads': 4}
FORMATS = {
    **{f'awq-g{size}': random_formats.awq(size) for size in (32, 64, 128, -1)},
    **{f'packed4-g{size}': random_formats.packed(4, size) for size in (32, 64, 128, -1)},
    'packed4-zeros': random_formats.packed(4, 64, symmetric=False),
    'packed4-zeros-rows': random_formats.packed(4, -1, symmetric=False),
    'packed4-order': random_formats.packed(4, 32, symmetric=False, act_order=True),
    'packed4-tensor': random_formats.packed(4, -1, symmetric=False, strategy='tensor'),
    'packed4-half': random_formats.packed(4, 128, dtype=torch.float16),
    'nf4': random_formats.bitsandbytes('nf4'), 'fp4': random_formats.bitsandbytes('fp4'),
    'nf4-double': random_formats.bitsandbytes('nf4', double=True),
    'nf4-blocks': random_formats.bitsandbytes('nf4', block=4096, storage=torch.bfloat16),
    **{name: random_formats.float4(name) for name in ('nvfp4', 'mxfp4', 'modelopt')}}
EIGHT = {
    'packed8-g128': random_formats.packed(8, 128),
    'packed8-zeros': random_formats.packed(8, 64, symmetric=False),
    'packed8-rows': random_formats.packed(8, -1),
    'packed8-tensor': random_formats.packed(8, -1, symmetric=False, strategy='tensor'),
    'packed8-order': random_formats.packed(8, 32, act_order=True),
    'int8-rows': random_formats.int8(-1),
    'int8-rows-zeros': random_formats.int8(-1, symmetric=False),
    'int8-tensor': random_formats.int8(-1, strategy='tensor'),
    'int8-g128': random_formats.int8(128),
    'w8a8': random_formats.int8(-1, act={'num_bits': 8, 'type': 'int', 'dynamic': True}),
    **{f'float8-{kind}': random_formats.float8(kind) for kind in ('tensor', 'channel', 'block')},
    'fp8-block': random_formats.float8('block', 'fp8'),
    'fp8-tensor': random_formats.float8('tensor', 'fp8'),
    'fp8-tensor-inv': random_formats.float8(
        'tensor', 'fp8', ('weight_scale_inv', 'activation_scale')),
    'gptq8-g128': random_formats.gptq8(128),
    'gptq8-rows': random_formats.gptq8(-1),
    'gptq8-zeros-order': random_formats.gptq8(32, symmetric=False, act_order=True),
    'bnb-int8': random_formats.bitsandbytes('int8'),
    'modelopt-fp8': random_formats.float8('tensor', 'modelopt')}
FORMATS.update(EIGHT)
NAMES = {'awq-g64': 'awq-int4-g64', 'packed4-g128': 'compressed-tensors-int4-g128',
         'packed4-g-1': 'compressed-tensors-int4', 'nf4': 'bitsandbytes-nf4',
         'nvfp4': 'compressed-tensors-float4-g16', 'modelopt': 'modelopt-nvfp4'}


def check(folder, state):
    """Compare logits and answer with the library's model of ``state``; returns the footprint."""
    engine = load(NativeEngine, folder, CPU).engine
    # The scales of bitsandbytes with 4 bits are float32, and become float16.
    near = 3e-3 if engine.footprint.quantization in ('bitsandbytes-nf4', 'bitsandbytes-fp4') \
        else RELATIVE
    assert_close(engine.prefill_logits(IDS), library_logits(folder, state, IDS), near)
    check_answer(engine, folder, state)
    return engine.footprint


@pytest.mark.parametrize('name', FORMATS)
def test_each_format(tmp_path, name):
    state = random_formats.save(tmp_path, 'llama', FORMATS[name], **WIDE)
    footprint = check(tmp_path, state)
    assert footprint.quantization == NAMES.get(name, footprint.quantization)
    assert 'dense_fallbacks' not in footprint.details
    unused = footprint.details.get('unused_tensors', 'input_')
    assert 'input_' in unused or 'activation_scale' in unused


@pytest.mark.parametrize('name', FORMATS)
def test_slow_formats(tmp_path, name):
    """Those without the kernels for unquantised weights or integers of four bits."""
    random_formats.save(tmp_path, 'llama', FORMATS[name], **WIDE)
    model = inspect(tmp_path)
    loaded = native_weights.load(families.parse(model.config), Files(model, torch.device('cpu')),
                                 model.quantized, torch.bfloat16, print)
    assert loaded.slow_format is (name in EIGHT)


@pytest.mark.parametrize('name', [None, *FORMATS])
def test_estimates_the_memory_of_the_weights(tmp_path, name):
    """Layouts widen the scales: those of FP8 blocks take 3 %, and those of MXFP4 twice as much."""
    if name:
        random_formats.save(tmp_path, 'llama', FORMATS[name], **WIDE)
    else:
        random_model.save(tmp_path, 'llama', 1)
    model = inspect(tmp_path)
    loaded = native_weights.load(families.parse(model.config), Files(model, torch.device('cpu')),
                                 model.quantized, torch.bfloat16, print)
    tensors = [loaded.embedding, loaded.norm, *_tensors(loaded.head)]
    for layer in loaded.layers:
        tensors += [*layer.norms, *(each for weight in layer.linears for each in _tensors(weight))]
    taken = sum(each.numel() * each.element_size() for each in tensors)
    estimate = weight_bytes(model.tensors, model.quantized, torch.bfloat16)
    # The rows of bitsandbytes with 4 bits, and so their padding, are only in a tensor's content.
    unknown = name in ('nf4', 'fp4', 'nf4-double', 'nf4-blocks')
    assert (0.96 if unknown else 1.0) <= estimate / taken < 1.02


@pytest.mark.parametrize('name', ['fp8-block', 'mxfp4'])
def test_refuses_what_fits_only_as_stored(tmp_path, monkeypatch, name):
    random_formats.save(tmp_path, 'llama', FORMATS[name], **WIDE)
    model = inspect(tmp_path)
    shape = families.parse(model.config)
    cache_bytes = 4 * 2 * shape.layers * shape.kv_size * 64
    needed = start.check_memory(model, shape, 64, torch.float32, torch.device('cpu'))
    assert needed > 1.004 * (model.weight_bytes + cache_bytes)
    monkeypatch.setattr(device, 'free_bytes', lambda device: needed - 1)
    with pytest.raises(EngineError, match='not enough memory on cpu'):
        start.check_memory(model, shape, 64, torch.float32, torch.device('cpu'))


def _tensors(weight):
    return [each for each in vars(weight).values() if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize('name', ['awq-g64', 'packed4-zeros', 'int8-rows', 'fp8-block',
                                  'nf4-double', 'nvfp4'])
def test_biases_and_quantised_head(tmp_path, name):
    check(tmp_path, random_formats.save(tmp_path, 'qwen2', FORMATS[name], dense=()))


@pytest.mark.parametrize(('family', 'name'), [
    *((family, 'awq-g64') for family in families.FAMILIES if family in random_model.DENSE),
    *product(('phi3_part', 'gemma3_text'), (
        'packed4-order', 'int8-rows', 'fp8-block', 'nf4', 'nvfp4', 'mxfp4'))])
def test_other_families(tmp_path, family, name):
    """Phi-3 stores projections fused, and the engine reorders their rows."""
    footprint = check(tmp_path, random_formats.save(tmp_path, family, FORMATS[name], **WIDE))
    assert 'dense_fallbacks' not in footprint.details


def test_fused_gate_and_up_that_do_not_fill_tiles_become_dense(tmp_path):
    state = random_formats.save(tmp_path, 'phi3', FORMATS['packed4-g-1'], intermediate_size=260,
                                dense=('lm_head', 'down'))
    assert check(tmp_path, state).details['dense_fallbacks'] == '2'


@pytest.mark.parametrize('name', ['awq-g64', 'packed4-order', 'float8-channel', 'nf4', 'mxfp4'])
def test_dense_module_beside_quantised_ones(tmp_path, name):
    """If one of several projections that the engine fuses is dense, all of them become dense."""
    state = random_formats.save(tmp_path, 'llama', FORMATS[name],
                                dense=('lm_head', '0.mlp.down', '1.self_attn.k_proj'), **WIDE)
    assert check(tmp_path, state).details['dense_fallbacks'] == '1'


@pytest.mark.parametrize('targets', [
    ['Linear'], ['Linear', 're:.*proj'], ['Linear', 're:.*down_proj']])
def test_group_size_differs_between_modules(tmp_path, targets):
    """
    Projections that the engine fuses become dense if their group sizes differ.

    As in the library, the alphabetical order of patterns decides, and not that of groups.
    """
    format_, other = random_formats.packed(4, 32), random_formats.packed(4, 128)
    groups = format_[0]['config_groups']
    groups['group_0']['targets'] = targets
    groups['group_1'] = {**other[0]['config_groups']['group_0'], 'targets': [
        're:.*down_proj', 'model.layers.0.self_attn.v_proj']}
    state = random_formats.save(tmp_path, 'llama', format_, **WIDE,
                                other={'down_proj': other[1], '0.self_attn.v': other[1]})
    footprint = check(tmp_path, state)
    assert footprint.details['dense_fallbacks'] == '1'
    assert footprint.quantization == 'compressed-tensors-int4'


@pytest.mark.parametrize('change_config', [
    lambda it: it['config_groups']['group_0'].update(targets=['re:.*self_attn.*']),
    lambda it: it['config_groups']['group_0'].update(targets=['model.layers.1.mlp.up_proj']),
    lambda it: it.update(ignore=['lm_head', 'model.layers.0.mlp.gate_proj'])])
def test_rejects_a_quantised_module_that_no_group_targets(tmp_path, change_config):
    random_formats.save(tmp_path, 'llama', FORMATS['packed4-g64'])
    change(tmp_path, change_config)
    with pytest.raises(EngineError, match='layers.0.* stored quantised, but .*ignore.*targets'):
        load(NativeEngine, tmp_path, CPU)


def test_nf4_blocks_that_span_rows(tmp_path):
    """With rows of 160 columns and blocks of 64, the engine uses groups of 32 columns."""
    check(tmp_path, random_formats.save(
        tmp_path, 'llama', FORMATS['nf4-double'], hidden_size=160, intermediate_size=96,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64))


@pytest.mark.parametrize('name', ['awq-g64', 'packed4-g64', 'nf4', 'nvfp4'])
def test_auto_selects_native(tmp_path, name):
    random_formats.save(tmp_path, 'llama', FORMATS[name])
    engine = build(inspect(tmp_path), EngineConfig(device='cpu', cpu_threads=1))
    assert engine.footprint.engine == 'native'
    engine.close()


STATE = 'weight.quant_state.bitsandbytes__nf4'


def quant_state(content):
    """Return a change that replaces a quant_state."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda it: torch.tensor(list(text), dtype=torch.uint8)


def state_fields(**changed):
    """Return a change of some fields of a quant_state."""
    return lambda it: quant_state({**json.loads(bytes(it.tolist())), **changed})(it)


def filled(number, dtype=None):
    """Return a change that fills a tensor with a number, stored as another dtype if given."""
    return lambda it: torch.full_like(it.float(), number).to(dtype or it.dtype)


MODULE = 'model.layers.1.mlp.down_proj'


def change(folder, config=None, replace=None):
    """
    Change a written checkpoint.

    :param config: changes the quantization_config.
    :param replace: changes tensors of `MODULE`, by the end of their names; None drops the tensor.
    """
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    for end, make in (replace or {}).items():
        tensors[f'{MODULE}.{end}'] = made = make(tensors.pop(f'{MODULE}.{end}'))
        if made is None:
            del tensors[f'{MODULE}.{end}']
    save_file(tensors, path, metadata={'format': 'pt'})
    if config:
        with editing(folder / 'config.json') as content:
            config(content['quantization_config'])


def weights(**changed):
    """Return a change of the weights' settings in a config of compressed-tensors."""
    return lambda settings: settings['config_groups']['group_0']['weights'].update(changed)


@pytest.mark.parametrize('name, changes, message', [
    ('awq-g64', {'config': lambda it: it.update(bits=3)}, ('AWQ of 3 bits', 'runs 4')),
    ('awq-g64', {'config': lambda it: it.update(version='gemv')}, ('"gemv"', 'runs gemm')),
    *(('awq-g64', {'config': lambda it, size=size: it.update(group_size=size)},
       (f'groups of {json.dumps(size)} ', 'multiples of 32'))
      for size in (48, '64', None, 0, True)),
    ('awq-g64', {'config': lambda it: it.update(group_size=128)}, ('q_proj', '[2, ', '[1, ')),
    ('awq-g64', {'replace': {'qzeros': lambda it: None}}, (f'{MODULE}.qzeros', 'no tensor')),
    ('packed4-g64', {'config': weights(num_bits=3)}, ('"int" of 3 bits', 'int of 4 and 8')),
    ('packed4-g64', {'config': weights(type='float')}, ('"float" of 4 bits', 'int of 4 and 8')),
    ('packed4-g64', {'config': weights(type=None)}, ('null of 4 bits',)),
    ('packed4-g64', {'config': weights(strategy=None)}, ('weights by null',)),
    ('packed4-g64', {'config': lambda it: it.update(ignore=[True, 'a'])}, ('[true, "a"]',)),
    ('packed4-g64', {'config': weights(group_size=16)}, ('groups of 16', 'multiples of 32')),
    ('packed4-g64', {'config': weights(group_size=32)}, ('q_proj', 'groups of 64', '32')),
    ('packed4-g64', {'config': weights(strategy='token')}, ('"token"', 'group, channel')),
    ('packed4-g64', {'config': lambda it: it.update(format='marlin-24')}, ('"marlin-24"',)),
    ('packed4-g64', {'config': lambda it: it.update(config_groups={})}, ('config_groups',)),
    ('packed4-g64', {'config': lambda it: it.update(config_groups=3)}, ('damaged', 'again')),
    ('packed4-g64', {'config': lambda it: it.update(sparsity_config={'format': 'sparse-24'})},
     ('"sparse-24"', 'dense')),
    ('packed4-g64', {'config': lambda it: it.update(transform_config={'config_groups': {'R1': {
        'type': 'hadamard'}}})}, ('transform_config',)),
    ('packed4-g64', {'replace': {'weight_shape': lambda it: it + 1}}, (MODULE, '[129, 257]')),
    ('packed4-g64', {'replace': {'weight_shape': lambda it: None}}, (MODULE, 'no tensor')),
    ('packed4-g64', {'replace': {'weight_scale': lambda it: it[:, :0].contiguous()}},
     (MODULE, 'weight_scale')),
    *(('packed4-g64', {'replace': {'weight_scale': lambda it, by=by: it * by}},
       (MODULE, 'float16')) for by in (1e-30, 1e-8, 1e30)),
    ('fp8-block', {'config': lambda it: it.update(fmt='e5m2')}, ('"e5m2"', 'runs e4m3')),
    ('fp8-block', {'config': lambda it: it.update(weight_block_size=[128, 48])}, ('of 48',)),
    ('fp8-block', {'config': lambda it: it.update(weight_block_size=[128, 64])},
     ('weight_scale_inv', '[1, 1]', '[1, 2]')),
    *((name, {'replace': {end: filled(120, torch.uint8)}}, (MODULE, 'scales', 'torch.uint8'))
      for name, end in (('fp8-block', 'weight_scale_inv'), ('modelopt-fp8', 'weight_scale'),
                        ('awq-g64', 'scales'))),
    ('fp8-tensor', {'replace': {'weight_scale': lambda it: None}},
     (MODULE, 'no tensor', 'weight_scale,')),
    ('fp8-tensor', {'replace': {'weight_scale': lambda it: torch.ones(3)}}, (MODULE, '[3]')),
    ('fp8-tensor', {'replace': {'weight': lambda it: (it.view(torch.int8) | 0x7F).view(it.dtype)}},
     (MODULE, 'NaN')),
    ('fp8-tensor', {'replace': {'weight': lambda it: it.view(torch.int8)}}, (MODULE,)),
    ('float8-channel', {'replace': {'weight': lambda it: it.view(torch.int8)}},
     (MODULE, 'stored as I8')),
    ('int8-rows', {'replace': {'weight': lambda it: it.clamp(-9, 9).view(torch.float8_e4m3fn)}},
     (MODULE, 'stored as F8_E4M3')),
    ('float8-channel', {'config': weights(num_bits=4)}, ('"float" of 4 bits', 'float of 8')),
    ('packed4-order', {'replace': {'weight_g_idx': lambda it: it * 0}}, (MODULE, 'g_idx')),
    *(('packed4-g64', {'config': lambda it, bad=bad: it.update(ignore=bad)}, ('ignore', 'damaged'))
      for bad in (3, ['re:('], [7])),
    ('nvfp4', {'config': weights(group_size=32)}, ('groups of 32', 'runs 16')),
    ('nvfp4', {'config': weights(strategy='group')}, ('"group"', 'tensor_group')),
    ('nvfp4', {'config': weights(num_bits=8)}, ('"float" of 8 bits', 'float of 4')),
    ('mxfp4', {'config': weights(group_size=16)}, ('groups of 16', 'runs 32')),
    *(('nvfp4', {'replace': {'weight_global_scale': filled(number)}},
       (MODULE, 'weight_global_scale', 'above 0')) for number in (0.0, -1.0, float('nan'))),
    ('nvfp4', {'replace': {'weight_global_scale': lambda it: None}}, (MODULE, 'no tensor')),
    ('nvfp4', {'replace': {'weight_global_scale': lambda it: it.repeat(3)}}, (MODULE, '[3]')),
    ('nvfp4', {'replace': {'weight_scale': lambda it: it.float()}}, (MODULE, 'float32')),
    ('nvfp4', {'replace': {'weight_scale': filled(float('nan'))}}, (MODULE, 'NaN')),
    ('nvfp4', {'replace': {'weight_packed': lambda it: it.view(torch.int8)}}, (MODULE, 'int8')),
    ('nvfp4', {'replace': {'weight_packed': lambda it: it[:, ::2].contiguous()}},
     (MODULE, 'weight_packed', '[128, 64]')),
    ('mxfp4', {'replace': {'weight_scale': filled(255)}}, (MODULE, 'NaN')),
    ('mxfp4', {'replace': {'weight_scale': lambda it: it.float()}}, (MODULE, 'float32')),
    ('modelopt', {'config': lambda it: it.update(quant_algo=None)}, ('null', 'NVFP4')),
    ('modelopt', {'config': lambda it: it.update(quant_algo='W4A8_AWQ')}, ('"W4A8_AWQ"', 'NVFP4')),
    ('modelopt', {'replace': {'weight_scale_2': lambda it: None}}, (MODULE, 'no tensor')),
    ('modelopt-fp8', {'replace': {'weight_scale': lambda it: None}}, (MODULE, 'no tensor')),
    ('modelopt-fp8', {'replace': {'weight': lambda it: it.view(torch.int8)}}, (MODULE,)),
    ('nf4', {'config': lambda it: it.update(bnb_4bit_quant_type='int4')}, ('"int4"', 'nf4, fp4')),
    ('nf4', {'config': lambda it: it.update(bnb_4bit_quant_type='fp4')}, ('q_proj', '__fp4')),
    ('nf4', {'config': lambda it: it.update(load_in_8bit=True)}, ('both', 'with one')),
    ('nf4', {'config': lambda it: it.update(load_in_4bit=False)}, ('none', 'with one')),
    *(('nf4', {'replace': {STATE: quant_state(content)}}, (MODULE, STATE, 'damaged'))
      for content in (b'', b'\xff\x00', b'{', b'[' * 9000, b'[]', b'3', b'"' + b'9' * 99)),
    *(('nf4', {'replace': {STATE: state_fields(**{key: bad})}}, (MODULE, key)) for key, bad in (
        ('blocksize', 0), ('blocksize', 64.0), ('blocksize', True), ('blocksize', None),
        ('blocksize', 1 << 70), ('shape', [1, 2]), ('shape', None), ('shape', 'no'))),
    ('nf4', {'replace': {STATE: state_fields(quant_type='fp4')}}, (MODULE, '"fp4"')),
    ('nf4', {'replace': {STATE: state_fields(blocksize=128)}}, (MODULE, 'absmax', '[512]')),
    ('nf4', {'replace': {STATE: lambda it: it.float()}}, (MODULE, 'damaged')),
    ('nf4', {'replace': {STATE: lambda it: None}}, (MODULE, 'no tensor')),
    ('nf4', {'replace': {STATE: state_fields(blocksize=8)}}, (MODULE, 'blocks of 8')),
    ('nf4', {'replace': {'weight.absmax': lambda it: None}}, (MODULE, 'no tensor')),
    ('nf4', {'replace': {'weight.absmax': lambda it: it.repeat(99)}}, (MODULE, 'absmax')),
    ('nf4', {'replace': {'weight.absmax': filled(float('inf'))}}, (MODULE, 'NaN')),
    ('nf4', {'replace': {'weight.absmax': lambda it: it.to(torch.uint8)}}, (MODULE, 'nested')),
    ('nf4', {'replace': {'weight.quant_map': filled(0.0)}}, (MODULE, 'not that of nf4')),
    ('nf4', {'replace': {'weight.quant_map': lambda it: it[:9].clone()}}, (MODULE, '[9]')),
    ('nf4', {'replace': {'weight': lambda it: it[9:].clone()}}, (MODULE, 'bytes')),
    *(('nf4-double', {'replace': {STATE: state_fields(**{key: bad})}}, (MODULE, key))
      for key, bad in (
          ('nested_blocksize', 0), ('nested_blocksize', '256'), ('nested_offset', None),
          ('nested_offset', float('nan')), ('nested_offset', 10**400))),
    ('nf4-double', {'replace': {'weight.absmax': lambda it: it.float()}}, (MODULE, 'nested')),
    ('nf4-double', {'replace': {'weight.nested_absmax': filled(float('nan'))}},
     (MODULE, 'NaN')),
    ('nf4-double', {'replace': {'weight.nested_quant_map': lambda it: it[1:].clone()}},
     (MODULE, '[255]')),
    ('bnb-int8', {'replace': {'SCB': filled(float('nan'))}}, (MODULE, 'NaN')),
    ('bnb-int8', {'replace': {'SCB': lambda it: None}}, (MODULE, 'no tensor')),
    ('bnb-int8', {'replace': {'weight': lambda it: it.view(torch.uint8)}}, (MODULE, 'uint8')),
    ('bnb-int8', {'replace': {'weight_format': filled(2)}}, (MODULE, 'plain rows'))])
def test_rejects_damaged_or_unsupported_checkpoints(tmp_path, name, changes, message):
    random_formats.save(tmp_path, 'llama', FORMATS[name])
    change(tmp_path, **changes)
    with pytest.raises(EngineError) as error:
        load(NativeEngine, tmp_path, CPU)
    text = str(error.value)
    for part in (*message, *['set engine.name to transformers'] * ('does not run' in text)):
        assert part in text


def test_rejects_quantised_weights_without_quantization_config(tmp_path):
    random_formats.save(tmp_path, 'llama', FORMATS['awq-g64'])
    with editing(tmp_path / 'config.json') as config:
        del config['quantization_config']
    with pytest.raises(EngineError, match='quantised, but config.json has no quantization_config'):
        load(NativeEngine, tmp_path, CPU)
