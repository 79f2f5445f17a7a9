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
What a checkpoint's config.json says of the transformer, for the families that this engine runs.

Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, grouped query attention, gated SiLU.
Whatever else a config asks for is refused by name. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
import math
from typing import Any

from physai_decode.checkpoint import parsing
from physai_decode.engine import EngineError
from physai_decode.model_config import number
from physai_decode.model_config import Rope
from physai_decode.model_config import windows

HEAD_DIMS = (64, 96, 128)
# What the transformers library takes for a key that config.json does not have; null is a value.
_DEFAULTS: dict[str, Any] = {
    'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'num_key_value_heads': None, 'head_dim': None}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    'llama': {},
    'mistral': {'num_key_value_heads': 8},
    'qwen2': {'num_key_value_heads': 32},
    'qwen3': {'num_key_value_heads': 32, 'head_dim': 128}}
FAMILIES = tuple(_FAMILY_DEFAULTS)


@dataclass(frozen=True)
class Architecture:
    """Shapes and constants of one transformer; counts unless a unit is named."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tied_head: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]                   # per layer, tokens seen back; 0: all
    inverse_frequencies: tuple[float, ...]     # [head_dim / 2], radians per position
    rotary_scale: float                        # multiplies cosine and sine

    @property
    def q_size(self) -> int:
        """Width of all query heads side by side."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads side by side."""
        return self.kv_heads * self.head_dim


@parsing('config.json')
def parse(config: Mapping[str, Any]) -> Architecture:
    """
    Read a Hugging Face config.json.

    :raises EngineError: naming what the native engine does not run, or is damaged.
    """
    family = config.get('model_type')
    if family not in FAMILIES:
        raise _unsupported(f'model_type {family!r} (it runs {", ".join(FAMILIES)})')
    config = {**_DEFAULTS, **_FAMILY_DEFAULTS[family], **config}
    if config['hidden_act'] != 'silu':
        raise _unsupported(f'hidden_act {config["hidden_act"]!r} (it runs silu)')
    heads, hidden, layers = (number(config, key) for key in (
        'num_attention_heads', 'hidden_size', 'num_hidden_layers'))
    kv_heads = heads if config['num_key_value_heads'] is None else number(
        config, 'num_key_value_heads')
    head_dim = hidden // heads if config['head_dim'] is None else number(config, 'head_dim')
    if head_dim not in HEAD_DIMS:
        raise _unsupported(f'head_dim {head_dim} (it runs {", ".join(map(str, HEAD_DIMS))})')
    if heads % kv_heads:
        raise EngineError(f'config.json has {heads} heads and {kv_heads} key-value heads: '
                          'the first must be a multiple of the second')
    frequencies, rotary_scale = _rotary(Rope(config), head_dim)
    attention_bias = bool(config.get('attention_bias', False))
    return Architecture(
        model_type=family,
        vocab_size=number(config, 'vocab_size'),
        hidden_size=hidden,
        intermediate_size=number(config, 'intermediate_size'),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=number(config, 'rms_norm_eps', float),
        tied_head=bool(config.get('tie_word_embeddings', False)),
        qkv_bias=family == 'qwen2' or (family != 'mistral' and attention_bias),
        out_bias=family in ('llama', 'qwen3') and attention_bias,
        mlp_bias=family == 'llama' and bool(config.get('mlp_bias', False)),
        qk_norm=family == 'qwen3',
        windows=windows(config, layers),
        inverse_frequencies=frequencies,
        rotary_scale=rotary_scale)


def _unsupported(what: str) -> EngineError:
    return EngineError(f'the native engine does not run {what}; '
                       'set engine.name to transformers, which runs every architecture it knows')


def _rotary(rope, head_dim):
    """Return (inverse frequencies [head_dim / 2], scale), Su et al. 2021 and its extensions."""
    if rope.partial:
        raise _unsupported('partial rotary positions')
    inverse = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if rope.kind == 'default':
        return tuple(inverse), 1.0
    if rope.kind == 'linear':
        return tuple(f / rope.factor for f in inverse), 1.0
    if rope.kind == 'llama3':
        return tuple(_llama3(f, rope) for f in inverse), 1.0
    if rope.kind == 'yarn':
        return _yarn(inverse, rope, head_dim), rope.attention_factor
    raise _unsupported(f'rope type {rope.kind!r} (it runs default, linear, llama3, yarn)')


def _llama3(frequency, rope):
    """Slow waves are stretched, fast ones kept, those between blended (Llama 3.1's rule)."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    stretched = frequency / rope.factor
    turns = rope.original_context * frequency / (2 * math.pi)
    if turns < low:
        return stretched
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * stretched + blend * frequency


def _yarn(inverse, rope, head_dim):
    """YaRN (arXiv 2309.00071): a ramp over the dimensions."""
    theta, factor, original = rope.theta, rope.factor, rope.original_context

    def dimension(turns):
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001

    def blended(i, frequency):
        stretch = min(max((i - low) / (high - low), 0.0), 1.0)
        return frequency / factor * stretch + frequency * (1 - stretch)

    return tuple(blended(i, f) for i, f in enumerate(inverse))
