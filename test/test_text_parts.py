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

"""The native engine runs the language model of vision-language models, without images."""

import dataclasses

from engine_contract import load
from json_file import editing
from physai_decode import engines
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engine import EngineError
from physai_decode.engines.native import families
from physai_decode.engines.native import NativeEngine
import pytest
import random_model
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
import transformers

CPU = EngineConfig(device='cpu', dtype='float32', cpu_threads=1)
IDS = [(3 + 7 * index) % 500 for index in range(60)]
SHAPE = {
    'vocab_size': 512, 'hidden_size': 128, 'intermediate_size': 256, 'num_hidden_layers': 2,
    'num_attention_heads': 2, 'num_key_value_heads': 1, 'head_dim': 64, 'pad_token_id': None,
    'max_position_embeddings': 256}
QWEN_VISION = {'depth': 1, 'hidden_size': 32, 'intermediate_size': 32, 'num_heads': 2,
              'out_hidden_size': 128}
OTHER_VISION = {'hidden_size': 32, 'intermediate_size': 32, 'num_hidden_layers': 1,
               'num_attention_heads': 2, 'image_size': 28, 'patch_size': 14}
MODELS = {
    'gemma3': {
        'text_config': {**SHAPE, 'sliding_window': 30, 'layer_types': [
            'sliding_attention', 'full_attention']},
        'vision_config': OTHER_VISION, 'mm_tokens_per_image': 4},
    'qwen2_5_vl': {
        'text_config': {**SHAPE, 'rope_parameters': {
            'rope_type': 'default', 'rope_theta': 1e6, 'mrope_section': [8, 12, 12]}},
        'vision_config': {**QWEN_VISION, 'fullatt_block_indexes': [0]}},
    'qwen3_vl': {
        'text_config': {**SHAPE, 'rope_parameters': {
            'rope_type': 'default', 'rope_theta': 5e6, 'mrope_section': [12, 10, 10],
            'mrope_interleaved': True}},
        'vision_config': {**QWEN_VISION, 'deepstack_visual_indexes': [0]}},
    'mistral3': {
        'text_config': {**SHAPE, 'model_type': 'mistral', 'sliding_window': None},
        'vision_config': {**OTHER_VISION, 'head_dim': 16}, 'tie_word_embeddings': False},
    'mistral3, ministral3': {
        'text_config': {**SHAPE, 'model_type': 'ministral3'},
        'vision_config': {**OTHER_VISION, 'head_dim': 16}, 'tie_word_embeddings': True}}


def save(folder, name):
    """Write a folder; return the library's model."""
    config = transformers.AutoConfig.for_model(name.partition(',')[0], **MODELS[name])
    return random_model.save_network(
        folder, config, 0, transformers.AutoModelForImageTextToText)


def check(folder, network):
    """Compare logits and answer with the library's model; returns the footprint."""
    engine = load(NativeEngine, folder, CPU).engine
    steps = DecodeLoop(engine).stream(IDS, SamplingConfig(max_new_tokens=20))
    answer = [token for step in steps for token in step.token_ids]
    with torch.no_grad():
        expected = network(input_ids=torch.tensor([IDS + answer])).logits[0]
    assert answer == expected[len(IDS) - 1:-1].argmax(-1).tolist()
    difference = (engine.prefill_logits(IDS + answer) - expected).abs().max()
    assert difference <= 1e-4 * expected.abs().max()
    engine.close()
    return engine.footprint


def rename_prefixes(folder, names):
    """Replace the prefixes of tensor names; return the new names."""
    path = folder / 'model.safetensors'
    tensors = {}
    for name, tensor in load_file(path).items():
        old = next((each for each in names if name.startswith(each)), '')
        tensors[names.get(old, '') + name.removeprefix(old)] = tensor
    save_file(tensors, path, metadata={'format': 'pt'})
    return set(tensors)


@pytest.mark.parametrize('name', MODELS)
def test_agrees_with_the_library(tmp_path, name):
    network = save(tmp_path, name)
    model = inspect(tmp_path)
    footprint = check(tmp_path, network)
    name = name.partition(',')[0]
    assert footprint.model_type == name
    own = sum(entry.bytes for tensor, entry in model.tensors.items()
              if not any(part in tensor for part in ('vis', 'multi_modal')))
    assert footprint.checkpoint_weight_bytes == own < model.weight_bytes
    assert 'vis' in footprint.details['unused_tensors']
    chosen = engines.choose(model, CPU)
    assert chosen.name == 'native' and name in chosen.reason


@pytest.mark.parametrize(('name', 'trunk', 'head'), [
    *((name, 'model.language_model.', 'lm_head.') for name in MODELS),
    *((name, 'language_model.model.', 'language_model.lm_head.') for name in (
        'gemma3', 'mistral3')),
    ('qwen2_5_vl', 'model.', 'lm_head.')])
def test_tensor_names_of_other_versions(tmp_path, name, trunk, head):
    network = save(tmp_path, name)
    found = next(tensor for tensor in inspect(tmp_path).tensors if 'embed_tokens' in tensor)
    prefix = found.removesuffix('embed_tokens.weight')
    names = rename_prefixes(tmp_path, {
        **({'model.visual.': 'visual.'} if trunk == 'model.' else {}), prefix: trunk,
        'language_model.lm_head.': head, 'lm_head.': head})
    assert f'{trunk}embed_tokens.weight' in names
    check(tmp_path, network)


def test_flat_config(tmp_path):
    """The first folders of Qwen2.5-VL have one, with rope type mrope."""
    network = save(tmp_path, 'qwen2_5_vl')
    with editing(tmp_path / 'config.json') as config:
        text = config.pop('text_config')
        text.pop('rope_parameters')
        config.update(**{**text, **config}, rope_theta=1e6,
                      rope_scaling={'type': 'mrope', 'mrope_section': [8, 12, 12]})
    check(tmp_path, network)


def test_rejects_a_missing_tensor_of_the_language_model(tmp_path):
    save(tmp_path, 'qwen3_vl')
    rename_prefixes(tmp_path, {'model.language_model.layers.1.mlp.up_proj.weight':
                      'model.language_model.layers.2.mlp.up_proj.weight'})
    with pytest.raises(EngineError, match=r'no tensor model\.language_model\.layers\.1\.mlp\.up'):
        load(NativeEngine, tmp_path, CPU)


def test_rejects_a_language_model_of_an_unsupported_family(tmp_path):
    config = {'model_type': 'mistral3', 'text_config': {'model_type': 'mamba'}}
    with pytest.raises(EngineError, match='"mamba" of the text_config.*it runs mistral'):
        families.parse(config)


def test_qwen3_vl_has_no_sliding_window(tmp_path):
    network = save(tmp_path, 'qwen3_vl')
    with editing(tmp_path / 'config.json') as config:
        config['text_config'] |= {
            'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 0,
            'layer_types': ['sliding_attention'] * 2}
    check(tmp_path, network)


@pytest.mark.parametrize(('window', 'kinds', 'runs'), [
    (30, ['full_attention', 'sliding_attention'], False), (30, ['full_attention'] * 2, False),
    (30, ['sliding_attention'] * 2, True), (None, ['full_attention'] * 2, True)])
def test_rejects_layer_types_that_the_library_ignores(tmp_path, window, kinds, runs):
    """The library applies them to a mistral, but not to one that is nested in a mistral3."""
    settings = MODELS['mistral3']
    text = {**settings['text_config'], 'sliding_window': window, 'layer_types': kinds}
    config = transformers.AutoConfig.for_model('mistral3', **{**settings, 'text_config': text})
    network = random_model.save_network(
        tmp_path, config, 0, transformers.AutoModelForImageTextToText)
    with editing(tmp_path / 'config.json') as config:
        config['text_config']['layer_types'] = kinds
    if runs:
        check(tmp_path, network)
        return
    with pytest.raises(EngineError, match='layer_types .* in its text_config.*: delete layer_ty'):
        load(NativeEngine, tmp_path, CPU)


def test_memory_check_ignores_the_vision_tower(tmp_path, monkeypatch):
    from physai_decode.engines import device

    save(tmp_path, 'mistral3')
    model = inspect(tmp_path)
    own = sum(entry.bytes for name, entry in model.tensors.items() if 'vision' not in name)
    monkeypatch.setattr(device, 'free_bytes', lambda device: own + 2 * 2 * 64 * 4 * 64)
    load(NativeEngine, tmp_path, dataclasses.replace(CPU, max_context=64)).engine.close()
