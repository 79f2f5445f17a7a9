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

"""Phi-3 and Phi-4-mini: fused projections, partial rotary embeddings, longrope."""

from collections.abc import Mapping
from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.architecture import Names
from physai_decode.engines.native.architecture import Rotary
from physai_decode.engines.native.families import rotary
from physai_decode.engines.native.families import shared
from physai_decode.engines.native.families.refusal import unsupported
from physai_decode.model_config import number
from physai_decode.model_config import Rope
from physai_decode.model_config import rope_settings

_DEFAULTS: dict[str, Any] = {
    'vocab_size': 32064, 'hidden_size': 3072, 'intermediate_size': 8192, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 4096,
    'original_max_position_embeddings': 4096, 'sliding_window': None}
_NAMES = Names(qkv=('qkv_proj',), gate_up=('gate_up_proj',))
_LONGROPE = {'su': 'longrope', 'yarn': 'longrope'}      # as early checkpoints call it


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    config = {**_DEFAULTS, **config}
    layers, window = number(config, 'num_hidden_layers'), config['sliding_window']
    if window is not None:
        window = number(config, 'sliding_window')
    return shared.read(config, {}, windows=(window or 0,) * layers,
                       rotaries=(_rotary(config),) * layers, names=_NAMES)


def _rotary(config: Mapping[str, Any]) -> Rotary:
    said = rope_settings(config)
    kind = said.get('rope_type', 'default')
    rope = Rope({**config, 'rope_parameters': {
        'rope_theta': config.get('rope_theta'),
        'partial_rotary_factor': config.get('partial_rotary_factor', 1.0), **said,
        'rope_type': _LONGROPE.get(kind, kind),
        'original_max_position_embeddings': config['original_max_position_embeddings']}})
    if rope.kind not in ('default', 'longrope'):
        raise unsupported(f'rope type {shown(rope.kind)} (it runs phi3 with default, longrope)')
    head_dim = config.get('head_dim') or number(config, 'hidden_size') // number(
        config, 'num_attention_heads')
    rotary_dim = int(head_dim * rope.partial)
    if rotary_dim % 2 or not rotary_dim:
        raise unsupported(f'rotary embeddings of {rotary_dim} dimensions of {head_dim}')
    return rotary.of_part(rope, rotary_dim)
