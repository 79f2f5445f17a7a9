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
Gemma 3, text only: norms before and after attention and MLP, and mostly sliding windows.

Checkpoints store the norms' gains minus 1. Sliding layers have a rotary base of their own.
"""

from collections.abc import Mapping
import math
from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.architecture import Names
from physai_decode.engines.native.architecture import Rotary
from physai_decode.engines.native.families import rotary
from physai_decode.engines.native.families import shared
from physai_decode.engines.native.families.refusal import unsupported
from physai_decode.model_config import number
from physai_decode.model_config import part
from physai_decode.model_config import Rope
from physai_decode.model_config import windows_by_kind

_DEFAULTS: dict[str, Any] = {
    'vocab_size': 262208, 'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26,
    'num_attention_heads': 8, 'num_key_value_heads': 4, 'head_dim': 256,
    'tie_word_embeddings': True, 'query_pre_attn_scalar': 256, 'sliding_window': 4096,
    'sliding_window_pattern': 6, 'rope_theta': 1e6, 'rope_local_base_freq': 1e4,
    'hidden_activation': 'gelu_pytorch_tanh'}
_NAMES = Names(mlp_norm='pre_feedforward_layernorm', out_norm='post_attention_layernorm',
               down_norm='post_feedforward_layernorm')


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    config = {**_DEFAULTS, **config}
    if config['hidden_activation'] != 'gelu_pytorch_tanh':
        raise unsupported(f'hidden_activation {shown(config["hidden_activation"])} '
                          '(it runs gemma3 with gelu_pytorch_tanh)')
    for key in ('attn_logit_softcapping', 'final_logit_softcapping',
                'use_bidirectional_attention'):
        if config.get(key):
            raise unsupported(f'{key} {shown(config[key])} (it runs gemma3 without)')
    windows = _windows(config)
    local, whole = (_rotary(config, kind) for kind in ('sliding_attention', 'full_attention'))
    bias = bool(config.get('attention_bias', False))
    return shared.read(
        config, {}, windows=windows, rotaries=tuple(local if each else whole for each in windows),
        qkv_bias=bias, out_bias=bias, qk_norm=True, activation='gelu_tanh',
        attention_scale=number(config, 'query_pre_attn_scalar', float) ** -0.5,
        embedding_scale=math.sqrt(number(config, 'hidden_size')), rounded_scale=True,
        gain_offset=1.0, wide_range=True, names=_NAMES)


def _windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    layers, kinds = number(config, 'num_hidden_layers'), config.get('layer_types')
    if kinds is None:
        pattern = number(config, 'sliding_window_pattern')
        kinds = ['sliding_attention' if (index + 1) % pattern else 'full_attention'
                 for index in range(layers)]
    return windows_by_kind(kinds, layers, number(config, 'sliding_window'))


def _rotary(config: Mapping[str, Any], kind: str) -> Rotary:
    """Read the rotary embedding of a layer type; rope_scaling applies to full attention only."""
    whole, scaling = kind == 'full_attention', part(config, 'rope_scaling')
    by_kind = part(config, 'rope_parameters')
    if by_kind and not any(name in by_kind for name in ('full_attention', 'sliding_attention')):
        raise ValueError('rope_parameters has neither full_attention nor sliding_attention')
    older = scaling.get('type') or 'default'
    if older != 'default' and not scaling.get('rope_type'):
        raise EngineError(
            f'config.json has rope_scaling of type {shown(older)}, which some versions of the '
            'transformers library apply to gemma3, and others ignore: rename type to rope_type '
            'to apply it, or set rope_scaling to null')
    said = {'rope_theta': config['rope_theta' if whole else 'rope_local_base_freq'],
            **part(by_kind, kind),
            **(scaling if whole else {})}
    rope = Rope({**config, 'rope_parameters': said, 'rope_scaling': None})
    if rope.kind == 'yarn' and not rope.truncate:
        raise EngineError(
            'config.json has truncate false in the rotary embedding of a gemma3, which the '
            'transformers library ignores: delete truncate to get the same answers')
    return rotary.read(rope, number(config, 'head_dim'))
