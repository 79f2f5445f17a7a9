"""
What a checkpoint's config.json says of the transformer, for the families that this engine runs.

Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, grouped query attention, gated SiLU.
Whatever else a config asks for is refused by name. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
import math
from typing import Any

from physai_decode.engine import EngineError

HEAD_DIMS = (64, 96, 128)
# What the transformers library takes for a key that config.json does not have; null is a value.
_DEFAULTS: dict[str, Any] = {
    'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'num_key_value_heads': None, 'head_dim': None,
    'use_sliding_window': False, 'sliding_window': 4096, 'max_window_layers': 28}
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


def parse(config: Mapping[str, Any]) -> Architecture:
    """
    Read a Hugging Face config.json.

    :raises EngineError: naming what the native engine does not run.
    """
    family = config.get('model_type')
    if family not in FAMILIES:
        raise _unsupported(f'model_type {family!r} (it runs {", ".join(FAMILIES)})')
    config = {**_DEFAULTS, **_FAMILY_DEFAULTS[family], **config}
    if config['hidden_act'] != 'silu':
        raise _unsupported(f'hidden_act {config["hidden_act"]!r} (it runs silu)')
    try:
        heads = config['num_attention_heads']
        hidden = config['hidden_size']
        layers = config['num_hidden_layers']
        kv_heads = config['num_key_value_heads'] or heads
        head_dim = config['head_dim'] or hidden // heads
        frequencies, rotary_scale = _rotary(config, head_dim)
        attention_bias = bool(config.get('attention_bias', False))
        architecture = Architecture(
            model_type=family,
            vocab_size=config['vocab_size'],
            hidden_size=hidden,
            intermediate_size=config['intermediate_size'],
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=config['rms_norm_eps'],
            tied_head=bool(config.get('tie_word_embeddings', False)),
            qkv_bias=family == 'qwen2' or (family != 'mistral' and attention_bias),
            out_bias=family in ('llama', 'qwen3') and attention_bias,
            mlp_bias=family == 'llama' and bool(config.get('mlp_bias', False)),
            qk_norm=family == 'qwen3',
            windows=_windows(config, family, layers),
            inverse_frequencies=frequencies,
            rotary_scale=rotary_scale)
    except KeyError as missing:
        raise EngineError(
            f'config.json has no {missing}: the model folder is incomplete; download it again'
        ) from None
    if head_dim not in HEAD_DIMS:
        raise _unsupported(f'head_dim {head_dim} (it runs {", ".join(map(str, HEAD_DIMS))})')
    if heads % kv_heads:
        raise EngineError(f'config.json has {heads} heads and {kv_heads} key-value heads: '
                          'the first must be a multiple of the second')
    return architecture


def _unsupported(what: str) -> EngineError:
    return EngineError(f'the native engine does not run {what}; '
                       'set engine.name to transformers, which runs every architecture it knows')


def _windows(config, family, layers):
    window = config['sliding_window']
    if family == 'mistral':
        return (window or 0,) * layers
    if family == 'llama' or not config['use_sliding_window'] or not window:
        return (0,) * layers
    kinds = config.get('layer_types')
    if not kinds:
        first = config['max_window_layers']
        return tuple(window if i >= first else 0 for i in range(layers))
    return tuple(window if kind == 'sliding_attention' else 0 for kind in kinds)


def _rotary(config, head_dim):
    """Return (inverse frequencies [head_dim / 2], scale), Su et al. 2021 and its extensions."""
    rope = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    theta = rope.get('rope_theta') or config.get('rope_theta') or 10000.0
    if rope.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0)) != 1.0:
        raise _unsupported('partial rotary positions')
    inverse = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == 'default':
        return tuple(inverse), 1.0
    if kind == 'linear':
        return tuple(f / rope['factor'] for f in inverse), 1.0
    if kind == 'llama3':
        return tuple(_llama3(f, rope) for f in inverse), 1.0
    if kind == 'yarn':
        return _yarn(inverse, theta, head_dim, rope, config)
    raise _unsupported(f'rope type {kind!r} (it runs default, linear, llama3, yarn)')


def _llama3(frequency, rope):
    """Slow waves are stretched, fast ones kept, those between blended (Llama 3.1's rule)."""
    turns = rope['original_max_position_embeddings'] * frequency / (2 * math.pi)
    low, high = rope['low_freq_factor'], rope['high_freq_factor']
    if turns < low:
        return frequency / rope['factor']
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * frequency / rope['factor'] + blend * frequency


def _yarn(inverse, theta, head_dim, rope, config):
    """YaRN (arXiv 2309.00071): a ramp over the dimensions, and a scale of cosine and sine."""
    original = rope.get('original_max_position_embeddings') or config['max_position_embeddings']
    factor = rope.get('factor') or config['max_position_embeddings'] / original

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
    return tuple(blended(i, f) for i, f in enumerate(inverse)), scale
