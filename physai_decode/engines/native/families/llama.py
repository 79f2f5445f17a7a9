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

"""Llama, with biases if the config has them."""

from collections.abc import Mapping
from typing import Any

from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families import shared


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    bias = bool(config.get('attention_bias', False))
    return shared.read(config, {}, qkv_bias=bias, out_bias=bias,
                       mlp_bias=bool(config.get('mlp_bias', False)))
