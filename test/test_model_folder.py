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

"""No content of a model folder hangs or ends an engine: it decodes, or raises an EngineError."""

import json
import math
from pathlib import Path
import re

from engine_contract import decode
from engine_contract import load
from json_file import editing
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.engine import EngineError
from physai_decode.engines import libraries
from physai_decode.engines.native import NativeEngine
from physai_decode.engines.transformers import TransformersEngine
import pytest
import random_model
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch

ENGINES = {'native': NativeEngine, 'transformers': TransformersEngine}
CPU = EngineConfig(device='cpu', cpu_threads=1, max_context=64)
PROMPT = [3, 1, 4, 1, 5]
MISSING = object()
# One or two of each type.
VALUES = ('x', None, 0, 10**400, 1e308, [[1]], {'a': 1}, MISSING)


@pytest.fixture(params=ENGINES)
def kind(request):
    return ENGINES[request.param]


def change_tensors(folder, change, ends=''):
    """Replace each tensor, or those whose name ends so, by what ``change`` returns for it."""
    path = folder / 'model.safetensors'
    save_file({name: change(tensor) if name.endswith(ends) else tensor
               for name, tensor in load_file(path).items()}, path)


def error_of(kind, folder):
    """Return the message of the error that loading raises."""
    with pytest.raises(EngineError) as raised:
        load(kind, folder, CPU)
    return str(raised.value)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_decodes_although_its_weights_are_truncated_after_the_load(kind, tmp_path, dtype):
    """The engine maps no file, because reading a truncated mapping would kill the process."""
    folder = random_model.save(tmp_path, 'llama', 0)
    change_tensors(folder, lambda tensor: tensor.to(dtype))
    loop = load(kind, folder, CPU)
    expected = decode(loop, PROMPT)
    assert str(folder) not in Path('/proc/self/maps').read_text()
    with (folder / 'model.safetensors').open('r+b') as file:
        file.truncate(0)
    loop.forget()
    assert decode(loop, PROMPT) == expected
    loop.engine.close()


def test_rejects_weights_that_are_truncated_during_the_load(kind, tmp_path):
    model = inspect(random_model.save(tmp_path, 'llama', 0))
    with (tmp_path / 'model.safetensors').open('r+b') as file:
        file.truncate(model.tensors['model.norm.weight'].start)
    with pytest.raises(EngineError, match=r'model\.safetensors was truncated while it was read'):
        kind(model, CPU)


def test_rejects_weights_that_a_device_replaces(kind, tmp_path):
    model = inspect(random_model.save(tmp_path, 'llama', 0))
    (tmp_path / 'model.safetensors').unlink()
    (tmp_path / 'model.safetensors').symlink_to('/dev/zero')
    with pytest.raises(EngineError, match=r'model\.safetensors is a device'):
        kind(model, CPU)


@pytest.mark.parametrize(('change', 'words'), [
    (torch.zeros_like, 'are all 0, whatever'), (lambda tensor: tensor * math.nan, 'not numbers'),
    (lambda tensor: tensor * math.inf, 'not numbers')], ids=['zero', 'NaN', 'infinite'])
def test_rejects_weights_that_are_zero_or_not_finite(kind, tmp_path, change, words):
    folder = random_model.save(tmp_path, 'qwen2', 0)
    change_tensors(folder, change)
    assert words in error_of(kind, folder)


@pytest.mark.parametrize(('dtype', 'name'), [
    (torch.int8, 'I8'), (torch.float8_e4m3fn, 'F8_E4M3'), (torch.float8_e5m2, 'F8_E5M2')])
@pytest.mark.parametrize(('family', 'ends'), [
    ('qwen2', 'weight'), ('qwen2', 'down_proj.weight'), ('qwen3_moe', 'down_proj.weight')])
def test_rejects_weights_whose_quantisation_is_lost(kind, tmp_path, dtype, name, family, ends):
    folder = random_model.save(tmp_path, family, 0)
    change_tensors(folder, lambda tensor: (tensor * 100).to(dtype), ends)
    message = error_of(kind, folder)
    assert ends in message and f'is stored as {name}' in message
    assert str(folder) in message and 'quantization_config' in message


def test_names_the_lost_quantisation_of_packed_weights(tmp_path):
    folder = random_model.save(tmp_path, 'qwen2', 0)
    change_tensors(folder, lambda tensor: tensor[:, ::2].to(torch.uint8), 'down_proj.weight')
    message = error_of(NativeEngine, folder)
    assert 'down_proj.weight is stored as U8' in message and 'quantization_config' in message


@pytest.mark.parametrize('settings', [
    {'quant_method': 'gptq', 'bits': 4, 'group_size': 128}, {'quant_method': 'awq', 'bits': 4},
    {'quant_method': 'fp8'}, {'quant_method': 'modelopt', 'quant_algo': 'FP8'},
    {'quant_method': 'bitsandbytes', 'load_in_8bit': True},
    {'quant_method': 'compressed-tensors', 'format': 'pack-quantized', 'config_groups': {'0': {
        'targets': ['Linear'], 'weights': {
            'num_bits': 4, 'strategy': 'group', 'group_size': 32}}}}],
    ids=lambda each: each['quant_method'])
def test_rejects_a_quantisation_that_no_tensor_has(kind, tmp_path, settings, monkeypatch):
    monkeypatch.setattr(libraries, 'missing', lambda method: ())
    folder = random_model.save(tmp_path, 'llama', 0)
    with editing(folder / 'config.json') as config:
        config['quantization_config'] = settings
    message = error_of(kind, folder)
    assert f'config.json says {settings["quant_method"]}' in message
    assert 'but no tensor is quantised' in message
    assert str(folder) in message and 'remove quantization_config' in message
    if kind is NativeEngine:            # which knows the tensors of each format
        add(folder, visual__indices=torch.zeros(3, dtype=torch.int32))
        assert 'but no tensor is quantised' in error_of(kind, folder)
        add(folder, scale=torch.zeros(1, dtype=torch.float8_e5m2))
        message = error_of(kind, folder)
        assert 'stored as F8_E5M2' in message and 'remove' not in message


def test_rejects_weights_of_another_shape(kind, tmp_path):
    folder = random_model.save(tmp_path, 'llama', 0)
    with editing(folder / 'config.json') as config:
        config['intermediate_size'] = 128
    message = error_of(kind, folder)
    assert re.search(r'mlp\.\w+_proj\.weight has shape \[.*256.*\], but config.json implies '
                     r'\[128, 128\]', message)
    assert str(folder) in message and 'download' in message


def test_names_the_folder_of_a_missing_tensor(kind, tmp_path):
    folder = random_model.save(tmp_path, 'llama', 0)
    tensors = load_file(folder / 'model.safetensors')
    del tensors['model.layers.1.mlp.up_proj.weight']
    save_file(tensors, folder / 'model.safetensors')
    message = error_of(kind, folder)
    assert str(folder) in message and 'up_proj.weight' in message and 'download' in message


def test_accepts_an_embedding_of_zeros(kind, tmp_path):
    """The embedding of a padding token is often all zeros."""
    folder = random_model.save(tmp_path, 'llama', 0)
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    tensors['model.embed_tokens.weight'][0] = 0
    save_file(tensors, path)
    load(kind, folder, CPU).engine.close()


def test_wrong_values_in_config_json(kind, tmp_path):
    """With any value of any key, the engine decodes or raises an error of one line."""
    folder = random_model.save(tmp_path, 'qwen2_window', 0)
    path = folder / 'config.json'
    valid = json.loads(path.read_text())
    keys = ['hidden_size', 'num_hidden_layers', 'rope_parameters', 'sliding_window']
    for key in keys if kind is TransformersEngine else [*valid, 'physai_decode_random_weights']:
        for value in VALUES:
            config = {**valid, key: value}
            if value is MISSING:
                del config[key]
            path.write_text(json.dumps(config))
            try:
                loop = load(kind, folder, CPU)
            except EngineError as error:
                assert '\n' not in str(error)
                assert len(str(error)) < 600
            else:
                assert len(decode(loop, PROMPT)) == 8
                loop.engine.close()


@pytest.mark.parametrize('engine', ENGINES)
def test_rejects_random_weights_of_another_shape(engine, tmp_path):
    """config.json must imply the shapes in the header, so no other size is allocated."""
    folder = random_model.save(tmp_path, 'llama', 0)
    with editing(folder / 'config.json') as config:
        config['physai_decode_random_weights'] = {}
    load(ENGINES[engine], folder, CPU).engine.close()
    with editing(folder / 'config.json') as config:
        config.update(vocab_size=2**24, hidden_size=2**20)
    assert 'config.json implies' in error_of(ENGINES[engine], folder)


def add(folder, **tensors):
    """Add tensors to a folder; ``__`` in a name stands for a dot."""
    path = folder / 'model.safetensors'
    named = {name.replace('__', '.'): tensor for name, tensor in tensors.items()}
    save_file({**load_file(path), **named}, path)


@pytest.mark.parametrize('tensors', [
    {'lm_head__weight': torch.ones(512, 128)},
    {'model__layers__0__mlp__down_proj__weight_scale': torch.ones(1)},
    {'model__layers__1__self_attn__o_proj__bias': torch.ones(128)},
    {'model__layers__2__input_layernorm__weight': torch.ones(128)}], ids=lambda each: [*each][0])
def test_rejects_an_unused_tensor_that_would_change_the_logits(kind, tmp_path, tensors):
    folder = random_model.save(tmp_path, 'llama_tied', 0)
    add(folder, **tensors)
    assert next(iter(tensors)).replace('__', '.') in error_of(kind, folder)


@pytest.mark.parametrize(('key', 'value'), [
    ('tie_word_embeddings', True), ('num_hidden_layers', 1), ('num_hidden_layers', 3)])
def test_names_the_key_of_config_json_that_contradicts_the_weights(kind, tmp_path, key, value):
    folder = random_model.save(tmp_path, 'llama', 0)
    with editing(folder / 'config.json') as config:
        config[key] = value
    message = error_of(kind, folder)
    assert str(folder) in message and key in message
    assert key[0] == 't' or f'is {value}, but the weights have 2 layers' in message


@pytest.mark.parametrize('family', ['gpt2', 'gemma2', 'phi3', 'mixtral', 'bloom', 'smollm3'])
def test_accepts_all_tensors_that_transformers_writes(tmp_path, family):
    folder = random_model.save(tmp_path, family, 0, n_embd=128, n_head=2, n_layer=2)
    load(TransformersEngine, folder, CPU).engine.close()


def add_unused(folder):
    """Add tensors that do not change the logits."""
    add(folder, lm_head__weight=load_file(
        folder / 'model.safetensors')['model.embed_tokens.weight'].clone(),
        model__layers__0__self_attn__q_proj__bias=torch.zeros(128),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(32),
        visual__weight=torch.ones(3))


def test_transformers_accepts_unused_tensors_that_change_nothing(tmp_path):
    folder = random_model.save(tmp_path, 'llama_tied', 0)
    expected = decode(load(TransformersEngine, folder, CPU), PROMPT)
    add_unused(folder)
    assert decode(load(TransformersEngine, folder, CPU), PROMPT) == expected


def test_native_lists_unused_tensors_that_change_nothing(tmp_path):
    folder = random_model.save(tmp_path, 'llama_tied', 0)
    plain = load(NativeEngine, folder, CPU)
    expected = decode(plain, PROMPT)
    assert 'unused_tensors' not in plain.engine.footprint.details
    add_unused(folder)
    loop = load(NativeEngine, folder, CPU)
    assert decode(loop, PROMPT) == expected
    assert loop.engine.footprint.details['unused_tensors'] == (
        'lm_head.weight, model.layers.0.self_attn.q_proj.bias, '
        'model.layers.0.self_attn.rotary_emb.inv_freq, visual.weight')
