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

"""Ministral 3: Mistral whose queries are scaled up beyond the original context."""

from collections.abc import Mapping
from typing import Any

from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.architecture import Growth
from physai_decode.engines.native.families import shared
from physai_decode.model_config import number
from physai_decode.model_config import Rope
from physai_decode.model_config import rope_settings

_DEFAULTS: dict[str, Any] = {
    'vocab_size': 131072, 'hidden_size': 4096, 'intermediate_size': 14336,
    'num_hidden_layers': 34, 'num_attention_heads': 32, 'num_key_value_heads': 8, 'head_dim': 128,
    'rms_norm_eps': 1e-5, 'max_position_embeddings': 262144, 'sliding_window': None}
_ORIGINAL = 'original_max_position_embeddings'
_ROPE = {'rope_type': 'yarn', 'rope_theta': 1e6, 'factor': 16.0, 'beta_fast': 32.0,
         _ORIGINAL: 16384, 'beta_slow': 1.0, 'mscale_all_dim': 1.0,
         'mscale': 1.0, 'llama_4_scaling_beta': 0.1}


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    config = {**_DEFAULTS, **config}
    said = rope_settings(config) or {
        **_ROPE, _ORIGINAL: config.get(_ORIGINAL) or _ROPE[_ORIGINAL]}
    config['rope_parameters'] = said
    window = config['sliding_window']
    if window is not None:
        window = number(config, 'sliding_window')
    return shared.read(
        config, {}, windows=(window or 0,) * number(config, 'num_hidden_layers'),
        growth=Growth(number(said, 'llama_4_scaling_beta', float),
                      int(Rope(config).original_context)))
