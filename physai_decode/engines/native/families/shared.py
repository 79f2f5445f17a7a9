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

"""The config keys that all families share."""

from collections.abc import Mapping
import math
from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families import rotary
from physai_decode.engines.native.families.refusal import unsupported
from physai_decode.model_config import number
from physai_decode.model_config import Rope

HEAD_DIMS = (64, 96, 128, 256)       # that the kernels support
# The transformers library's defaults for keys missing from config.json; null counts as a value.
_DEFAULTS: dict[str, Any] = {
    'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'num_key_value_heads': None, 'head_dim': None}


def read(config: Mapping[str, Any], defaults: Mapping[str, Any], **differs: Any) -> Architecture:
    """
    Parse a language model's config.

    :param defaults: the family's own defaults.
    :param differs: fields of `Architecture` that the family has parsed itself.
    :raises EngineError: the native engine does not run it.
    :raises ValueError: a key is missing, or its value is invalid.
    """
    config = {**_DEFAULTS, **defaults, **config}
    if differs.get('activation', 'silu') == 'silu' and config['hidden_act'] != 'silu':
        raise unsupported(f'hidden_act {shown(config["hidden_act"])} (it runs silu)')
    heads, hidden, layers = (number(config, key) for key in (
        'num_attention_heads', 'hidden_size', 'num_hidden_layers'))
    kv_heads = heads if config['num_key_value_heads'] is None else number(
        config, 'num_key_value_heads')
    head_dim = hidden // heads if config['head_dim'] is None else number(config, 'head_dim')
    if head_dim not in HEAD_DIMS:
        raise unsupported(f'head_dim {head_dim} (it runs {", ".join(map(str, HEAD_DIMS))})')
    if heads % kv_heads:
        raise EngineError(f'config.json has {heads} heads and {kv_heads} key-value heads: '
                          'the first must be a multiple of the second')
    if 'rotaries' not in differs:
        differs['rotaries'] = (rotary.read(Rope(config), head_dim),) * layers
    return Architecture(**{
        'model_type': config['model_type'],
        'vocab_size': number(config, 'vocab_size'),
        'hidden_size': hidden,
        'intermediate_size': number(config, 'intermediate_size'),
        'layers': layers,
        'heads': heads,
        'kv_heads': kv_heads,
        'head_dim': head_dim,
        'norm_eps': number(config, 'rms_norm_eps', float),
        'tied_head': bool(config.get('tie_word_embeddings', False)),
        'windows': (0,) * layers,
        'attention_scale': 1 / math.sqrt(head_dim),
        **differs})
