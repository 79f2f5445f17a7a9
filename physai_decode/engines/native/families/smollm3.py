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

"""SmolLM3: no rotary embedding in every fourth layer."""

from collections.abc import Mapping
from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.architecture import Rotary
from physai_decode.engines.native.families import rotary
from physai_decode.engines.native.families import shared
from physai_decode.model_config import number
from physai_decode.model_config import Rope
from physai_decode.model_config import windows_by_kind

_DEFAULTS: dict[str, Any] = {
    'vocab_size': 128256, 'hidden_size': 2048, 'intermediate_size': 11008,
    'num_hidden_layers': 36, 'num_attention_heads': 16, 'num_key_value_heads': 4,
    'tie_word_embeddings': True, 'rope_theta': 2e6, 'no_rope_layer_interval': 4,
    'sliding_window': None}


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    config = {**_DEFAULTS, **config}
    # 1 marks a layer with a rotary embedding, despite the key's name.
    layers, rotates = number(config, 'num_hidden_layers'), config.get('no_rope_layers')
    if rotates is None:
        interval = number(config, 'no_rope_layer_interval')
        rotates = [int((index + 1) % interval != 0) for index in range(layers)]
    if not isinstance(rotates, list) or len(rotates) < layers:
        raise ValueError(f'no_rope_layers is {shown(rotates)}, not a list for {layers} layers')
    rotates = rotates[:layers]
    head_dim = config.get('head_dim') or number(config, 'hidden_size') // number(
        config, 'num_attention_heads')
    rotated = rotary.read(Rope(config), head_dim)
    bias = bool(config.get('attention_bias', False))
    return shared.read(
        config, {}, windows=_windows(config, rotates),
        rotaries=tuple(rotated if each else Rotary(()) for each in rotates), qkv_bias=bias,
        out_bias=bias, mlp_bias=bool(config.get('mlp_bias', False)))


def _windows(config: Mapping[str, Any], rotates: list[int]) -> tuple[int, ...]:
    slides = config.get('use_sliding_window') and config['sliding_window'] is not None
    kinds = config.get('layer_types')
    if kinds is None:
        kinds = ['sliding_attention' if slides and not each else 'full_attention'
                 for each in rotates]
    window = number(config, 'sliding_window') if 'sliding_attention' in kinds else 0
    return windows_by_kind(kinds, len(rotates), window)
