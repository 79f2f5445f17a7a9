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

"""`model_config`: rotary embeddings, sliding windows and quantisation from config.json."""

from physai_decode import model_config
from physai_decode.model_config import Rope
import pytest

LLAMA3 = {'rope_type': 'llama3', 'factor': 8, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 8192}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64}


@pytest.mark.parametrize(('config', 'kind', 'theta'), [
    ({}, 'default', 1e4), ({'rope_theta': 5e5}, 'default', 5e5),
    ({'rope_theta': 5e5, 'rope_scaling': None}, 'default', 5e5),
    ({'rope_theta': 5e5, 'rope_scaling': {'type': 'linear', 'factor': 2}}, 'linear', 5e5),
    ({'rope_theta': 5e5, 'rope_scaling': LLAMA3}, 'llama3', 5e5),
    ({'rope_parameters': {**LLAMA3, 'rope_theta': 5e5}}, 'llama3', 5e5),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}, 'default', 5e5),
    ({'rope_parameters': {'rope_theta': 5e5}, 'rope_scaling': LLAMA3}, 'llama3', 5e5),
    ({'rope_parameters': {'rope_theta': 5e5}, 'rope_scaling': {'type': 'yarn'}}, 'yarn', 5e5)])
def test_reads_rope_in_old_and_new_spellings(config, kind, theta):
    rope = Rope(config)
    assert (rope.kind, rope.theta, rope.partial) == (kind, theta, 1.0)


def test_reads_llama3_scaling():
    rope = Rope({'rope_scaling': LLAMA3, 'max_position_embeddings': 131072})
    assert (rope.factor, rope.original_context) == (8, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)
    assert rope.stretched_context == 0      # max_position_embeddings is already scaled


@pytest.mark.parametrize(('fields', 'factor', 'original', 'stretched'), [
    ({}, 4.0, 64, 256), ({'factor': None}, 2.0, 64, 128),
    ({'original_max_position_embeddings': None}, 4.0, 128, 0)])
def test_reads_yarn_scaling(fields, factor, original, stretched):
    rope = Rope({'rope_scaling': {**YARN, **fields}, 'max_position_embeddings': 128})
    assert (rope.factor, rope.original_context) == (factor, original)
    assert rope.stretched_context == stretched
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True)


@pytest.mark.parametrize(('fields', 'scale'), [
    ({}, 1.1386294), ({'attention_factor': 0.5}, 0.5), ({'factor': 0.5}, 1.0),
    ({'mscale': 1.0, 'mscale_all_dim': 1.0}, 1.0), ({'mscale': 1.0}, 1.1386294),
    ({'mscale': 2.0, 'mscale_all_dim': 1.0}, 1.1217515)])
def test_attention_factor_of_yarn(fields, scale):
    assert Rope({'rope_scaling': {**YARN, **fields}}).attention_factor == pytest.approx(scale)


@pytest.mark.parametrize(('rope', 'name'), [
    ({'rope_theta': 'x'}, 'rope_theta'),
    ({'rope_type': 'linear'}, 'factor'), ({'rope_type': 'linear', 'factor': None}, 'factor'),
    ({**LLAMA3, 'low_freq_factor': '1'}, 'low_freq_factor'),
    ({**LLAMA3, 'high_freq_factor': 0}, 'high_freq_factor'),
    ({**LLAMA3, 'original_max_position_embeddings': None}, 'original_max_position_embeddings'),
    ({**YARN, 'beta_fast': 'x'}, 'beta_fast'), ({**YARN, 'beta_slow': -1}, 'beta_slow'),
    ({**YARN, 'attention_factor': 'x'}, 'attention_factor'),
    ({**YARN, 'mscale': 'x', 'mscale_all_dim': 1.0}, 'mscale')])
def test_rejects_a_wrong_number_when_it_is_read(rope, name):
    """The error names the key; other keys can still be read."""
    attribute = {'original_max_position_embeddings': 'original_context', 'rope_theta': 'theta',
                 'mscale': 'attention_factor'}.get(name, name)
    read = Rope({'rope_scaling': rope})
    assert read.kind
    with pytest.raises(ValueError, match=name):
        getattr(read, attribute)


def test_rejects_settings_by_layer_type_in_other_families():
    settings = {'rope_type': 'default', 'rope_theta': 5e5}
    rope = Rope({'rope_parameters': {'full_attention': settings, 'sliding_attention': settings}})
    with pytest.raises(ValueError, match='rope_parameters has settings by layer type'):
        _ = rope.theta


def test_original_context_may_be_outside_the_rope_settings():
    key = 'original_max_position_embeddings'
    config = {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}, key: 64}
    assert (Rope(config).original_context, Rope(config).stretched_context) == (64, 256)
    model_config.check({'rope_scaling': YARN, key: 64})
    with pytest.raises(ValueError, match=f'{key} is 128, but 64'):
        model_config.check({'rope_scaling': YARN, key: 128})


@pytest.mark.parametrize(('config', 'expected'), [
    ({'model_type': 'llama', 'use_sliding_window': True, 'sliding_window': 8}, (0, 0, 0)),
    ({'model_type': 'mistral'}, (4096,) * 3),
    ({'model_type': 'mistral', 'sliding_window': None}, (0, 0, 0)),
    ({'model_type': 'mistral', 'layer_types': None}, (4096,) * 3),
    ({'model_type': 'mistral', 'sliding_window': 8,
      'layer_types': ['full_attention', 'sliding_attention', 'sliding_attention']}, (0, 8, 8)),
    ({'model_type': 'qwen2', 'sliding_window': 8}, (0, 0, 0)),
    ({'model_type': 'qwen2', 'sliding_window': 8, 'use_sliding_window': True}, (0, 0, 0)),
    ({'model_type': 'qwen3', 'sliding_window': 8, 'use_sliding_window': True,
      'max_window_layers': 1}, (0, 8, 8)),
    ({'model_type': 'qwen2', 'sliding_window': 8, 'use_sliding_window': True,
      'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention']}, (8, 0, 8))])
def test_sliding_window_of_each_layer(config, expected):
    assert model_config.windows(config, 3) == expected


@pytest.mark.parametrize('fields', [
    {'model_type': 'mistral', 'sliding_window': None}, {'model_type': 'qwen2'},
    {'model_type': 'qwen3', 'use_sliding_window': True, 'sliding_window': None}])
def test_rejects_sliding_layers_without_a_window(fields):
    """The library loads such a model, but can't run it."""
    kinds = ['full_attention', 'sliding_attention', 'full_attention']
    with pytest.raises(ValueError, match='layer_types has sliding_attention, but'):
        model_config.windows({**fields, 'layer_types': kinds}, 3)
    assert model_config.windows({**fields, 'layer_types': ['full_attention'] * 3}, 3) == (0, 0, 0)


def test_config_without_quantisation():
    assert model_config.quantization({}) is None
    assert model_config.quantization({'quantization_config': None}) is None


def test_gptq_defaults_for_missing_keys():
    quantization = model_config.quantization({
        'quantization_config': {'quant_method': 'gptq', 'bits': 4}})
    assert quantization == model_config.Quantization(
        'gptq-int4-g128', 'gptq', 4, 128, 'gptq',
        {'quant_method': 'gptq', 'bits': 4, 'group_size': 128})


@pytest.mark.parametrize(('fields', 'layout'), [
    ({'checkpoint_format': 'gptq_v2'}, 'gptq_v2'), ({'format': 'gptq_v2'}, 'gptq_v2'),
    ({'checkpoint_format': None, 'format': 'marlin'}, 'marlin')])
def test_gptq_checkpoint_format(fields, layout):
    config = {'quantization_config': {'quant_method': 'gptq', 'bits': 4, **fields}}
    assert model_config.quantization(config).layout == layout


@pytest.mark.parametrize('size', [None, '32', 0, -32, 64.5])
def test_rejects_a_wrong_group_size(size):
    with pytest.raises(ValueError, match='group_size'):
        model_config.quantization({'quantization_config': {
            'quant_method': 'gptq', 'bits': 4, 'group_size': size}})
    # Only the keys of GPTQ are checked here.
    model_config.quantization({'quantization_config': {
        'quant_method': 'awq', 'bits': 4, 'group_size': size}})
