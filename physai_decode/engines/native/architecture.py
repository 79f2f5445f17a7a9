"""
What a checkpoint's config.json says of the transformer, for the families that this engine runs.

Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, grouped query attention, gated SiLU.
Whatever else a config asks for is refused by name. Knows no tensors.
"""

from dataclasses import dataclass
import math
from typing import Any

from physai_decode.checkpoint import Checkpoint
from physai_decode.checkpoint import parsing
from physai_decode.engine import EngineError
from physai_decode.model_config import positive

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
ROPE_KINDS = ('default', 'linear', 'llama3', 'yarn')


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
def parse(model: Checkpoint) -> Architecture:
    """
    Read a checkpoint's config.json.

    :raises EngineError: naming what the native engine does not run, or is damaged.
    """
    family = model.model_type
    if family not in FAMILIES:
        raise _unsupported(f'model_type {family!r} (it runs {", ".join(FAMILIES)})')
    config = {**_DEFAULTS, **_FAMILY_DEFAULTS[family], **model.config}
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
        windows=model.windows,
        inverse_frequencies=_rotary(model.rope, head_dim),
        rotary_scale=model.rope.scale)


def _unsupported(what: str) -> EngineError:
    return EngineError(f'the native engine does not run {what}; '
                       'set engine.name to transformers, which runs every architecture it knows')


def _rotary(rope, head_dim):
    """Give the inverse frequencies [head_dim / 2], Su et al. 2021 and its extensions."""
    if rope.partial:
        raise _unsupported('partial rotary positions')
    if rope.kind not in ROPE_KINDS:
        raise _unsupported(f'rope type {rope.kind!r} (it runs {", ".join(ROPE_KINDS)})')
    waves = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    kept = [0.0] * len(waves)
    if rope.kind == 'llama3':
        kept = [_ramp(rope.original * wave / (2 * math.pi), rope.low, rope.high)
                for wave in waves]
    elif rope.kind == 'yarn':
        kept = _yarn(rope, head_dim)
    return tuple(wave * part + wave / rope.factor * (1 - part)
                 for wave, part in zip(waves, kept))


def _ramp(value, low, high):
    """Rise from 0 at ``low`` to 1 at ``high``."""
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _yarn(rope, head_dim):
    """Give how much of each wave YaRN keeps (arXiv 2309.00071): a ramp over the dimensions."""
    def dimension(turns):
        return head_dim * math.log(rope.original / (turns * 2 * math.pi)) / (
            2 * math.log(rope.theta))

    fast, slow = dimension(rope.high), dimension(rope.low)
    if rope.whole:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, head_dim - 1)
    if fast == slow:
        slow += 0.001
    return [1 - _ramp(i, fast, slow) for i in range(head_dim // 2)]
