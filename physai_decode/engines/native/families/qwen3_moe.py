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

"""Qwen3 with experts in all layers but those that the config excludes."""

from collections.abc import Mapping
from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.architecture import Routing
from physai_decode.engines.native.families import shared
from physai_decode.engines.native.families.refusal import unsupported
from physai_decode.model_config import number
from physai_decode.model_config import part
from physai_decode.model_config import Quantization
from physai_decode.model_config import quantization
from physai_decode.model_config import SLIDING_WINDOW

_DEFAULTS: dict[str, Any] = {
    'num_key_value_heads': 4, 'num_local_experts': 128, 'num_experts_per_tok': 8,
    'moe_intermediate_size': 768, 'decoder_sparse_step': 1, 'sliding_window': SLIDING_WINDOW}


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    config = {**_DEFAULTS, **config}
    layers = number(config, 'num_hidden_layers')
    bias = bool(config.get('attention_bias', False))
    window = 0
    if config.get('use_sliding_window') and config['sliding_window'] is not None:
        window = number(config, 'sliding_window')
    quantized = quantization(config)
    if quantized:
        _check(quantized)
    return shared.read(config, {}, qk_norm=True, qkv_bias=bias, out_bias=bias,
                       windows=(window,) * layers, routing=_routing(config, layers))


def _check(quantized: Quantization) -> None:
    """Refuse formats in which experts do not stack."""
    if quantized.settings.get('desc_act'):
        raise unsupported(f'experts of {quantized.name} with desc_act')
    groups = part(quantized.settings, 'config_groups')
    if any(part(part(groups, name), 'weights').get('actorder') == 'group' for name in groups):
        raise unsupported(f'experts of {quantized.name} with actorder group')


def _routing(config: Mapping[str, Any], layers: int) -> Routing:
    # Version 5 of the transformers library writes num_local_experts.
    count = number(config, 'num_experts' if 'num_experts' in config else 'num_local_experts')
    top_k, step = number(config, 'num_experts_per_tok'), number(config, 'decoder_sparse_step')
    if top_k > count:
        raise EngineError(f'config.json has num_experts_per_tok {top_k}, more than its {count} '
                          'experts: download the model again')
    plain = config.get('mlp_only_layers') or []
    if not isinstance(plain, list) or any(type(each) is not int for each in plain):
        raise ValueError(f'mlp_only_layers is {shown(plain)}, not a list of layers')
    return Routing(
        count, top_k, number(config, 'moe_intermediate_size'),
        bool(config.get('norm_topk_prob', False)),
        frozenset(range(step - 1, layers, step)) - frozenset(plain))
