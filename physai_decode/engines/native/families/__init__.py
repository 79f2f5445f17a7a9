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
The registry of model families; each family is one file.

A family parses a config.json into an `Architecture`, with the transformers library's default for a
missing key, and refuses by name what the engine does not run. No other module knows families.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from physai_decode.checkpoint import parsing
from physai_decode.config import shown_json as shown
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families import gemma3
from physai_decode.engines.native.families import granite
from physai_decode.engines.native.families import llama
from physai_decode.engines.native.families import ministral3
from physai_decode.engines.native.families import mistral
from physai_decode.engines.native.families import phi3
from physai_decode.engines.native.families import qwen2
from physai_decode.engines.native.families import qwen3
from physai_decode.engines.native.families import qwen3_moe
from physai_decode.engines.native.families import smollm3
from physai_decode.engines.native.families import text_part
from physai_decode.engines.native.families.refusal import unsupported

# Parses a config. Raises EngineError if the engine does not run it, and ValueError if a value is
# invalid; both name the key.
Family = Callable[[Mapping[str, Any]], Architecture]
# Keyed by model_type.
FAMILIES: dict[str, Family] = {
    'llama': llama.parse, 'mistral': mistral.parse, 'qwen2': qwen2.parse, 'qwen3': qwen3.parse,
    'gemma3_text': gemma3.parse, 'phi3': phi3.parse, 'smollm3': smollm3.parse,
    'granite': granite.parse, 'ministral3': ministral3.parse, 'qwen3_moe': qwen3_moe.parse}
# Vision-language models, whose language model alone is run.
TEXT_PARTS: dict[str, Family] = {
    'gemma3': text_part.of({'gemma3_text': gemma3.parse}, tied=True),
    'qwen2_5_vl': text_part.of(
        {'qwen2_5_vl_text': qwen2.parse}, num_key_value_heads=8, rms_norm_eps=1e-5,
        rope_theta=1e6, max_window_layers=80),
    'qwen3_vl': text_part.of({'qwen3_vl_text': qwen3.parse_whole}, rope_theta=5e5),
    'mistral3': text_part.of(
        {'mistral': mistral.parse_nested, 'ministral3': ministral3.parse}, tied=None)}


@parsing('config.json')
def parse(config: Mapping[str, Any]) -> Architecture:
    """
    Parse a Hugging Face config.json.

    :raises EngineError: the native engine does not run it, or a value is invalid.
    """
    name, known = config.get('model_type'), {**FAMILIES, **TEXT_PARTS}
    if name not in known:
        raise unsupported(f'model_type {shown(name)} (it runs {", ".join(known)})')
    return known[name](config)
