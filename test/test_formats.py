"""Formats of quantised weights in the native engine, each against its definition; bad ones."""

import json

import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from engine_contract import load
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engine import EngineError
from physai_decode.engines import build
from physai_decode.engines.native import NativeEngine
import random_formats
from safetensors.torch import load_file
from safetensors.torch import save_file
from test_gptq import assert_close
from test_gptq import library_logits

CPU = EngineConfig(device='cpu', dtype='float32', cpu_threads=1)
IDS = [(3 + 7 * index) % 512 for index in range(40)]
WIDE = {'hidden_size': 256, 'intermediate_size': 384, 'num_attention_heads': 4}
FORMS = {
    **{f'awq-g{size}': random_formats.awq(size) for size in (32, 64, 128, -1)},
    **{f'packed4-g{size}': random_formats.packed(4, size) for size in (32, 64, 128, -1)},
    'packed4-zeros': random_formats.packed(4, 64, symmetric=False),
    'packed4-zeros-rows': random_formats.packed(4, -1, symmetric=False),
    'packed4-order': random_formats.packed(4, 32, symmetric=False, act_order=True),
    'packed4-half': random_formats.packed(4, 128, dtype=torch.float16)}
EIGHT = {
    'packed8-g128': random_formats.packed(8, 128),
    'packed8-zeros': random_formats.packed(8, 64, symmetric=False),
    'packed8-rows': random_formats.packed(8, -1),
    'packed8-order': random_formats.packed(8, 32, act_order=True),
    'int8-rows': random_formats.int8(-1),
    'int8-rows-zeros': random_formats.int8(-1, symmetric=False),
    'int8-tensor': random_formats.int8(-1, strategy='tensor'),
    'int8-g128': random_formats.int8(128),
    'w8a8': random_formats.int8(-1, act={'num_bits': 8, 'type': 'int', 'dynamic': True}),
    **{f'float8-{kind}': random_formats.float8(kind) for kind in ('tensor', 'channel', 'block')},
    'fp8-block': random_formats.float8('block', 'fp8'),
    'fp8-tensor': random_formats.float8('tensor', 'fp8'),
    'gptq8-g128': random_formats.gptq8(128),
    'gptq8-rows': random_formats.gptq8(-1),
    'gptq8-zeros-order': random_formats.gptq8(32, symmetric=False, act_order=True)}
FORMS.update(EIGHT)
NAMES = {'awq-g64': 'awq-int4-g64', 'packed4-g128': 'compressed-tensors-int4-g128',
         'packed4-g-1': 'compressed-tensors-int4'}


def check(folder, state):
    """Hold prompt and step against the library's model of these weights; gives the footprint."""
    engine = load(NativeEngine, folder, CPU).engine
    assert_close(engine.prefill_logits(IDS), library_logits(folder, state, IDS))
    steps = DecodeLoop(engine).stream(IDS, SamplingConfig(max_new_tokens=5))
    answer = [token for step in steps for token in step.token_ids]
    expected = library_logits(folder, state, IDS + answer)[len(IDS) - 1:-1]
    assert answer == expected.argmax(-1).tolist()
    engine.close()
    return engine.footprint


@pytest.mark.parametrize('name', FORMS)
def test_every_form(tmp_path, name):
    state = random_formats.save(tmp_path, 'llama', FORMS[name], **WIDE)
    footprint = check(tmp_path, state)
    assert footprint.quantization == NAMES.get(name, footprint.quantization)
    assert 'dense_fallbacks' not in footprint.details
    assert 'input_scale' in footprint.details.get('unused_tensors', 'input_scale')


@pytest.mark.parametrize('name', ['awq-g64', 'packed4-zeros', 'int8-rows', 'fp8-block'])
def test_biases_and_a_quantised_head(tmp_path, name):
    check(tmp_path, random_formats.save(tmp_path, 'qwen2', FORMS[name], dense=()))


@pytest.mark.parametrize('name', ['awq-g64', 'packed4-order', 'float8-channel'])
def test_modules_that_are_left_dense(tmp_path, name):
    """A whole one stays as it is; one of several that are run as one makes these dense."""
    state = random_formats.save(tmp_path, 'llama', FORMS[name],
                                dense=('lm_head', '0.mlp.down', '1.self_attn.k_proj'), **WIDE)
    assert check(tmp_path, state).details['dense_fallbacks'] == '1'


def test_groups_of_several_sizes(tmp_path):
    """As a config with several groups says it; one size for what is run as one, or not."""
    form, other = random_formats.packed(4, 32), random_formats.packed(4, 128)
    groups = form[0]['config_groups']
    groups['group_1'] = other[0]['config_groups']['group_0']
    state = random_formats.save(tmp_path, 'llama', form, **WIDE,
                                other={'down_proj': other[1], '0.self_attn.v': other[1]})
    footprint = check(tmp_path, state)
    assert footprint.details['dense_fallbacks'] == '1'
    assert footprint.quantization == 'compressed-tensors-int4'


@pytest.mark.parametrize('name', ['awq-g64', 'packed4-g64'])
def test_auto_takes_native(tmp_path, name):
    random_formats.save(tmp_path, 'llama', FORMS[name])
    engine = build(inspect(tmp_path), EngineConfig(device='cpu', cpu_threads=1))
    assert engine.footprint.engine == 'native'
    engine.close()


MODULE = 'model.layers.1.mlp.down_proj'


def change(folder, config=None, replace=None):
    """Change a written checkpoint: what its config says, tensors of one module (None: drop)."""
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    for end, make in (replace or {}).items():
        tensors[f'{MODULE}.{end}'] = made = make(tensors.pop(f'{MODULE}.{end}'))
        if made is None:
            del tensors[f'{MODULE}.{end}']
    save_file(tensors, path, metadata={'format': 'pt'})
    path = folder / 'config.json'
    content = json.loads(path.read_text())
    (config or (lambda settings: None))(content['quantization_config'])
    path.write_text(json.dumps(content))


def weights(**changed):
    """Change what a config of compressed-tensors says of the weights."""
    return lambda settings: settings['config_groups']['group_0']['weights'].update(changed)


@pytest.mark.parametrize('name, changes, said', [
    ('awq-g64', {'config': lambda it: it.update(bits=3)}, ('AWQ of 3 bits', 'runs 4')),
    ('awq-g64', {'config': lambda it: it.update(version='gemv')}, ("'gemv'", 'runs gemm')),
    *(('awq-g64', {'config': lambda it, size=size: it.update(group_size=size)},
       (f'groups of {size!r}', 'multiples of 32')) for size in (48, '64', None, 0, True)),
    ('awq-g64', {'config': lambda it: it.update(group_size=128)}, ('q_proj', '[2, ', '[1, ')),
    ('awq-g64', {'replace': {'qzeros': lambda it: None}}, (f'{MODULE}.qzeros', 'no tensor')),
    ('packed4-g64', {'config': weights(num_bits=3)}, ('int of 3 bits', 'int of 4 and 8')),
    ('packed4-g64', {'config': weights(type='float')}, ('float of 4 bits', 'int of 4 and 8')),
    ('packed4-g64', {'config': weights(group_size=16)}, ('groups of 16', 'multiples of 32')),
    ('packed4-g64', {'config': weights(group_size=32)}, ('q_proj', 'groups of 64', '32')),
    ('packed4-g64', {'config': weights(strategy='token')}, ("'token'", 'group, channel')),
    ('packed4-g64', {'config': lambda it: it.update(format='marlin-24')}, ("'marlin-24'",)),
    ('packed4-g64', {'config': lambda it: it.update(config_groups={})}, ('config_groups',)),
    ('packed4-g64', {'config': lambda it: it.update(config_groups=3)}, ('damaged', 'again')),
    ('packed4-g64', {'config': lambda it: it.update(sparsity_config={'format': 'sparse-24'})},
     ("'sparse-24'", 'dense')),
    ('packed4-g64', {'config': lambda it: it.update(transform_config={'config_groups': {'R1': {
        'type': 'hadamard'}}})}, ('transform_config',)),
    ('packed4-g64', {'replace': {'weight_shape': lambda it: it + 1}}, (MODULE, '[129, 257]')),
    ('packed4-g64', {'replace': {'weight_shape': lambda it: None}}, (MODULE, 'no tensor')),
    ('packed4-g64', {'replace': {'weight_scale': lambda it: it[:, :0].contiguous()}},
     (MODULE, 'weight_scale')),
    ('packed4-g64', {'replace': {'weight_scale': lambda it: it * 1e-8}}, (MODULE, 'float16')),
    ('fp8-block', {'config': lambda it: it.update(fmt='e5m2')}, ("'e5m2'", 'runs e4m3')),
    ('fp8-block', {'config': lambda it: it.update(weight_block_size=[128, 48])}, ('of 48',)),
    ('fp8-block', {'config': lambda it: it.update(weight_block_size=[128, 64])},
     ('weight_scale_inv', '[1, 1]', '[1, 2]')),
    ('fp8-tensor', {'replace': {'weight_scale': lambda it: None}}, (MODULE, 'no tensor')),
    ('fp8-tensor', {'replace': {'weight_scale': lambda it: torch.ones(3)}}, (MODULE, '[3]')),
    ('fp8-tensor', {'replace': {'weight': lambda it: (it.view(torch.int8) | 0x7F).view(it.dtype)}},
     (MODULE, 'not numbers')),
    ('fp8-tensor', {'replace': {'weight': lambda it: it.view(torch.int8)}}, (MODULE,)),
    ('float8-channel', {'replace': {'weight': lambda it: it.view(torch.int8)}},
     (MODULE, 'stored as I8')),
    ('int8-rows',
     {'replace': {'weight': lambda it: it.clamp(-100, 100).view(torch.float8_e4m3fn)}},
     (MODULE, 'stored as F8_E4M3')),
    ('float8-channel', {'config': weights(num_bits=4)}, ('float of 4 bits', 'float of 8')),
    ('packed4-order', {'replace': {'weight_g_idx': lambda it: it * 0}}, (MODULE, 'g_idx'))])
def test_refusals(tmp_path, name, changes, said):
    random_formats.save(tmp_path, 'llama', FORMS[name])
    change(tmp_path, **changes)
    with pytest.raises(EngineError) as error:
        load(NativeEngine, tmp_path, CPU)
    text = str(error.value)
    for part in (*said, *['set engine.name to transformers'] * ('does not run' in text)):
        assert part in text


def test_no_config_for_quantised_weights(tmp_path):
    random_formats.save(tmp_path, 'llama', FORMS['awq-g64'])
    path = tmp_path / 'config.json'
    config = json.loads(path.read_text())
    del config['quantization_config']
    path.write_text(json.dumps(config))
    with pytest.raises(EngineError, match='quantised, but config.json has no quantization_config'):
        load(NativeEngine, tmp_path, CPU)
