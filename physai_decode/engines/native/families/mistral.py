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

"""Mistral: one sliding window for all layers, or none."""

from collections.abc import Mapping
from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families import shared
from physai_decode.model_config import number
from physai_decode.model_config import windows


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    layers = number(config, 'num_hidden_layers')
    return shared.read(config, {'num_key_value_heads': 8}, windows=windows(config, layers))


def parse_nested(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`; for a nested config, in which the library ignores ``layer_types``."""
    found = parse(config)
    if found.windows != parse({**config, 'layer_types': None}).windows:
        raise EngineError(
            f'config.json has layer_types {shown(config["layer_types"])} in its text_config, '
            'which the transformers library ignores: delete layer_types, so that all layers '
            'have the sliding_window, or also set sliding_window to null, so that none has one')
    return found
