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

"""
Small random models of each family, written as model folders by the transformers library.

All weights are random, also biases and norms, so omitting one changes the logits.
"""

from pathlib import Path
from typing import Any

from json_file import editing
import torch
import transformers

_SHAPE = {
    'vocab_size': 512, 'hidden_size': 128, 'intermediate_size': 256, 'num_hidden_layers': 2,
    'num_attention_heads': 2, 'num_key_value_heads': 1, 'max_position_embeddings': 256,
    'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': None, 'tie_word_embeddings': False}
_OLD_NAMES = {'yarn': 'yarn', 'longrope': 'su'}
# Keyed by model_type, or by model_type_VARIANT; the settings can name the model_type instead.
FAMILIES = {
    'llama': {},
    'llama_tied': {'tie_word_embeddings': True},
    'llama_biases': {'attention_bias': True, 'mlp_bias': True},
    'llama_scaled': {'rope_parameters': {
        'rope_type': 'llama3', 'rope_theta': 500000.0, 'factor': 8.0, 'low_freq_factor': 1.0,
        'high_freq_factor': 4.0, 'original_max_position_embeddings': 64}},
    'mistral': {'sliding_window': None},
    'mistral_window': {'sliding_window': 48},
    'mistral_between': {        # the library loads it as a ministral
        'sliding_window': 48, 'layer_types': ['full_attention', 'sliding_attention']},
    'qwen2': {},
    'qwen2_tied': {'tie_word_embeddings': True},
    'qwen2_window': {
        'use_sliding_window': True, 'sliding_window': 40, 'max_window_layers': 1},
    'qwen2_yarn': {
        'max_position_embeddings': 64, 'rope_parameters': {
            'rope_type': 'yarn', 'rope_theta': 1000000.0, 'factor': 4.0,
            'original_max_position_embeddings': 64}},
    'qwen3': {'head_dim': 64},
    'qwen3_tied': {'head_dim': 64, 'num_key_value_heads': 2, 'tie_word_embeddings': True},
    'qwen3_moe': {
        'head_dim': 64, 'num_experts': 8, 'num_experts_per_tok': 3, 'moe_intermediate_size': 64,
        'norm_topk_prob': True},
    'qwen3_moe_between': {      # some layers have plain MLPs; routing weights are not normalised
        'model_type': 'qwen3_moe', 'head_dim': 64, 'num_hidden_layers': 4, 'num_experts': 6,
        'num_experts_per_tok': 2, 'moe_intermediate_size': 96, 'decoder_sparse_step': 2,
        'mlp_only_layers': [3], 'tie_word_embeddings': True},
    'gemma3_text': {
        'head_dim': 64, 'num_hidden_layers': 3, 'sliding_window': 40, 'tie_word_embeddings': True,
        'query_pre_attn_scalar': 100,
        'layer_types': ['sliding_attention'] * 2 + ['full_attention'],
        'rope_parameters': {
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
            'full_attention': {'rope_type': 'linear', 'rope_theta': 1e6, 'factor': 8.0}}},
    'smollm3': {'num_hidden_layers': 3, 'no_rope_layers': [1, 0, 1], 'attention_bias': True},
    'smollm3_window': {'no_rope_layer_interval': 2, 'use_sliding_window': True,
                       'sliding_window': 40, 'tie_word_embeddings': True},
    'granite': {
        'embedding_multiplier': 12.0, 'residual_multiplier': 0.22, 'logits_scaling': 3.0,
        'attention_multiplier': 0.1, 'rms_norm_eps': 1e-2},
    'ministral3': {'head_dim': 64, 'rope_parameters': {
        'rope_type': 'yarn', 'rope_theta': 1e6, 'factor': 4.0, 'mscale': 1.0,
        'mscale_all_dim': 1.0, 'original_max_position_embeddings': 64,
        'llama_4_scaling_beta': 0.5}},
    'phi3': {'sliding_window': 40},
    'phi3_part': {
        'num_key_value_heads': 2, 'tie_word_embeddings': True,
        'original_max_position_embeddings': 256, 'rope_parameters': {
            'rope_type': 'longrope', 'rope_theta': 1e4, 'partial_rotary_factor': 0.75,
            'short_factor': [1.0 + 0.1 * i for i in range(24)],
            'long_factor': [2.0 + i for i in range(24)], 'attention_factor': 1.19}},
    'gemma3_text_wide': {'model_type': 'gemma3_text', 'head_dim': 256, 'tie_word_embeddings': True,
                         'layer_types': ['full_attention', 'sliding_attention']}}
# Those without experts, which run passes of several tokens.
DENSE = tuple(family for family, settings in FAMILIES.items() if 'num_experts' not in settings)


def model_type(family: str) -> str:
    """Return the model_type of a key of `FAMILIES`; a model_type of the library is its own."""
    known = family if family in transformers.CONFIG_MAPPING else family.partition('_')[0]
    return FAMILIES.get(family, {}).get('model_type', known)


def save(folder: Path, family: str, seed: int, **overrides) -> Path:
    """
    Write a model folder.

    :param family: a key of `FAMILIES`, or a model_type of the library.
    :param overrides: fields of the config.
    :returns: the folder.
    """
    settings = {'model_type': model_type(family), **_SHAPE, **FAMILIES.get(family, {}),
                **overrides}
    config = transformers.AutoConfig.for_model(**settings)
    return save_config(folder, config, seed)


def save_config(folder: Path, config: transformers.PretrainedConfig, seed: int) -> Path:
    """Write a model folder with this config, and random weights of a seed."""
    save_network(folder, config, seed, transformers.AutoModelForCausalLM)
    return folder


def save_network(folder: Path, config: transformers.PretrainedConfig, seed: int, kind: Any) -> Any:
    """
    Write a model folder with this config, and random weights of a seed.

    :param kind: the library's auto class.
    :returns: the library's model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.dim() < 2:
                weight.copy_(drawn * 0.2 + (1.0 if 'norm' in name else 0.0))
            else:
                weight.copy_(drawn * 1.5 / weight.shape[-1] ** 0.5)
    network.save_pretrained(folder)
    return network.eval()


def rewrite_config_as_before(folder: Path) -> None:
    """Rewrite config.json in the format of earlier versions of the library, as in most folders."""
    with editing(folder / 'config.json') as config:
        rope = config.pop('rope_parameters')
        if 'full_attention' in rope:
            config['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
            config['sliding_window_pattern'] = 1 + config['layer_types'].index('full_attention')
            rope = rope['full_attention']
        if rope['rope_type'] == 'longrope':
            config['partial_rotary_factor'] = rope.pop('partial_rotary_factor')
        config['rope_theta'] = rope.pop('rope_theta')
        config['rope_scaling'] = None if rope['rope_type'] == 'default' else rope
        if rope['rope_type'] in _OLD_NAMES:
            rope['type'] = _OLD_NAMES[rope.pop('rope_type')]
        config.pop('layer_types', None)
        config['torch_dtype'] = config.pop('dtype')
