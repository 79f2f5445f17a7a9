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

"""Qwen3: normalised queries and keys; sliding windows as in Qwen2."""

from collections.abc import Mapping
from typing import Any

from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families import shared
from physai_decode.model_config import number
from physai_decode.model_config import windows


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    layers = number(config, 'num_hidden_layers')
    bias = bool(config.get('attention_bias', False))
    return shared.read(config, {'num_key_value_heads': 32, 'head_dim': 128}, qk_norm=True,
                       qkv_bias=bias, out_bias=bias, windows=windows(config, layers))


def parse_whole(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`; for Qwen3-VL, which ignores the keys of sliding windows."""
    return parse({**config, 'use_sliding_window': False, 'layer_types': None})
