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
Granite 3: Llama with multipliers.

``residual_multiplier`` scales the output of each attention and MLP. RMSNorm ignores the scale of
its input, so the residual stream is divided by the multiplier instead, and epsilon by its square.
"""

from collections.abc import Mapping
from typing import Any

from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families import shared
from physai_decode.model_config import number

_DEFAULTS: dict[str, Any] = {
    'rms_norm_eps': 1e-6, 'embedding_multiplier': 1.0, 'residual_multiplier': 1.0,
    'attention_multiplier': 1.0, 'logits_scaling': 1.0}


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    config = {**_DEFAULTS, **config}
    embedding, residual, attention, logits = (number(config, key, float) for key in (
        'embedding_multiplier', 'residual_multiplier', 'attention_multiplier', 'logits_scaling'))
    bias = bool(config.get('attention_bias', False))
    return shared.read(
        config, {}, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get('mlp_bias', False)),
        embedding_scale=embedding / residual, attention_scale=attention, logit_scale=1 / logits,
        norm_eps=number(config, 'rms_norm_eps', float) / residual ** 2)
