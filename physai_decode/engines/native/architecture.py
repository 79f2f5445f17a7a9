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
from physai_decode.checkpoint import positive
from physai_decode.checkpoint import SLIDING_WINDOW
from physai_decode.checkpoint import yarn_factor
from physai_decode.engine import EngineError

HEAD_DIMS = (64, 96, 128)
# What the transformers library takes for a key that config.json does not have; null is a value.
_DEFAULTS: dict[str, Any] = {
    'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'num_key_value_heads': None, 'head_dim': None,
    'use_sliding_window': False, 'sliding_window': SLIDING_WINDOW, 'max_window_layers': 28}
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
    heads, hidden, layers = (positive(config, key) for key in (
        'num_attention_heads', 'hidden_size', 'num_hidden_layers'))
    kv_heads = heads if config['num_key_value_heads'] is None else positive(
        config, 'num_key_value_heads')
    head_dim = hidden // heads if config['head_dim'] is None else positive(config, 'head_dim')
    if head_dim not in HEAD_DIMS:
        raise _unsupported(f'head_dim {head_dim} (it runs {", ".join(map(str, HEAD_DIMS))})')
    if heads % kv_heads:
        raise EngineError(f'config.json has {heads} heads and {kv_heads} key-value heads: '
                          'the first must be a multiple of the second')
    frequencies, rotary_scale = _rotary(config, head_dim)
    attention_bias = bool(config.get('attention_bias', False))
    return Architecture(
        model_type=family,
        vocab_size=positive(config, 'vocab_size'),
        hidden_size=hidden,
        intermediate_size=positive(config, 'intermediate_size'),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=positive(config, 'rms_norm_eps', float),
        tied_head=bool(config.get('tie_word_embeddings', False)),
        qkv_bias=family == 'qwen2' or (family != 'mistral' and attention_bias),
        out_bias=family in ('llama', 'qwen3') and attention_bias,
        mlp_bias=family == 'llama' and bool(config.get('mlp_bias', False)),
        qk_norm=family == 'qwen3',
        windows=_windows(config, family, layers),
        inverse_frequencies=frequencies,
        rotary_scale=rotary_scale)


def _unsupported(what: str) -> EngineError:
    return EngineError(f'the native engine does not run {what}; '
                       'set engine.name to transformers, which runs every architecture it knows')


def _windows(config, family, layers):
    slides = family == 'mistral' or (family != 'llama' and config['use_sliding_window'])
    if not slides or config['sliding_window'] is None:
        return (0,) * layers
    window = positive(config, 'sliding_window')
    if family == 'mistral':
        return (window,) * layers
    kinds = config.get('layer_types')
    if kinds is None:
        first = config['max_window_layers']
        return tuple(window if i >= first else 0 for i in range(layers))
    if len(kinds) != layers:
        raise ValueError(f'layer_types names {len(kinds)} of {layers} layers')
    return tuple({'sliding_attention': window, 'full_attention': 0}[kind] for kind in kinds)


def _rotary(config, head_dim):
    """Return (inverse frequencies [head_dim / 2], scale), Su et al. 2021 and its extensions."""
    rope = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    rope['rope_theta'] = rope.get('rope_theta') or config.get('rope_theta') or 10000.0
    theta = positive(rope, 'rope_theta', float)
    if rope.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0)) != 1.0:
        raise _unsupported('partial rotary positions')
    inverse = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == 'default':
        return tuple(inverse), 1.0
    if kind == 'linear':
        factor = positive(rope, 'factor', float)
        return tuple(f / factor for f in inverse), 1.0
    if kind == 'llama3':
        return tuple(_llama3(f, rope) for f in inverse), 1.0
    if kind == 'yarn':
        return _yarn(inverse, theta, head_dim, rope, config)
    raise _unsupported(f'rope type {kind!r} (it runs default, linear, llama3, yarn)')


def _llama3(frequency, rope):
    """Slow waves are stretched, fast ones kept, those between blended (Llama 3.1's rule)."""
    original, low, high, factor = (positive(rope, key, float) for key in (
        'original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor', 'factor'))
    turns = original * frequency / (2 * math.pi)
    if turns < low:
        return frequency / factor
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * frequency / factor + blend * frequency


def _yarn(inverse, theta, head_dim, rope, config):
    """YaRN (arXiv 2309.00071): a ramp over the dimensions, and a scale of cosine and sine."""
    original = rope.get('original_max_position_embeddings') or positive(
        config, 'max_position_embeddings')
    factor = yarn_factor(rope, config, original)

    def dimension(turns):
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(rope.get('beta_fast') or 32)
    high = dimension(rope.get('beta_slow') or 1)
    if rope.get('truncate', True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001

    def blended(i, frequency):
        stretch = min(max((i - low) / (high - low), 0.0), 1.0)
        return frequency / factor * stretch + frequency * (1 - stretch)

    def magnitude(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get('attention_factor')
    if scale is None:
        top, bottom = rope.get('mscale'), rope.get('mscale_all_dim')
        scale = magnitude(top) / magnitude(bottom) if top and bottom else magnitude(1.0)
    return tuple(blended(i, f) for i, f in enumerate(inverse)), float(scale)
