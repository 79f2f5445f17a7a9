"""
What a config.json says of rotary positions, sliding windows and quantisation.

Every number is read and checked here, once; an engine refuses what it does not run. The functions
raise what nonsense in place of numbers, lists and objects raises, see `checkpoint.parsing`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import Any

_ROPE_NUMBERS = {
    'linear': ('factor',),
    'llama3': ('factor', 'original_max_position_embeddings', 'low_freq_factor',
               'high_freq_factor'),
    'yarn': ('factor', 'original_max_position_embeddings', 'beta_slow', 'beta_fast')}


@dataclass(frozen=True)
class Rope:
    """
    Rotary positions.

    llama3 and yarn divide a wave's frequency by ``factor`` where it turns at most ``low`` times in
    the ``original`` context, keep it from ``high`` turns on, and blend in between.
    """

    kind: str                   # default, linear, llama3, yarn, or another kind's name
    theta: float                # base of the frequencies
    partial: bool               # only a part of each head is rotated
    factor: float = 1.0
    original: float = 0.0       # tokens
    low: float = 0.0
    high: float = 0.0
    whole: bool = True          # yarn blends from a whole dimension to a whole dimension
    scale: float = 1.0          # multiplies cosine and sine


@dataclass(frozen=True)
class Quantization:
    """How weights are quantised; its text is a name such as gptq-int4-g128."""

    method: str                 # none, gptq, awq, exl2, bitsandbytes, ...
    bits: Any = None            # as the config says it
    group_size: int = 0         # -1: one group a row; 0: the config names none
    layout: str = ''            # gptq's format: gptq, gptq_v2 or another's name
    changed: tuple[str, ...] = ()   # gptq's patterns of modules with settings of their own

    def __str__(self) -> str:
        """Give the name."""
        bits = f'{self.bits}bpw' if self.method == 'exl2' else \
            f'int{self.bits}' if isinstance(self.bits, int) else self.bits
        group = f'g{self.group_size}' if self.group_size > 0 else ''
        return '-'.join(str(part) for part in (self.method, bits, group) if part)


def positive(config: Mapping[str, Any], key: str, kind: type = int) -> Any:
    """
    Give a positive number of a config.

    :param kind: int, or float, which an int will do for.
    :raises ValueError: naming the key; it is not there, or no such number.
    """
    if key not in config:
        raise ValueError(f'there is no {key}')
    value = config[key]
    if type(value) not in (int, kind) or not 0 < value < math.inf:
        raise ValueError(f'{key} is {value!r}, no positive {kind.__name__}')
    return value


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read rotary positions, where newer or where older versions of transformers write them."""
    said = config.get('rope_parameters') or config.get('rope_scaling') or {}
    kind = said.get('rope_type') or said.get('type') or 'default'
    given = {'rope_theta': config.get('rope_theta') or 10000.0,
             'partial_rotary_factor': config.get('partial_rotary_factor') or 1.0}
    if kind == 'yarn':
        given |= {'original_max_position_embeddings': config.get('max_position_embeddings'),
                  'beta_slow': 1, 'beta_fast': 32}
    given |= {key: value for key, value in said.items() if value is not None}
    if kind == 'yarn' and said.get('factor', ...) is None:      # the two limits say it
        given['factor'] = positive(config, 'max_position_embeddings') \
            / positive(given, 'original_max_position_embeddings', float)
    numbers = [positive(given, key, float) for key in _ROPE_NUMBERS.get(kind, ())]
    rope = Rope(kind, positive(given, 'rope_theta', float), given['partial_rotary_factor'] != 1.0,
                *numbers)
    if kind != 'yarn':
        return rope

    def magnitude(weight):
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    top, bottom = given.get('mscale'), given.get('mscale_all_dim')
    scale = given.get('attention_factor') or (
        magnitude(top) / magnitude(bottom) if top and bottom else magnitude(1.0))
    return replace(rope, whole=bool(given.get('truncate', True)), scale=float(scale))


def read_context_limit(config: Mapping[str, Any], rope: Rope) -> int | None:
    """Give the tokens that the model is made for, None where it isn't said; YaRN stretches it."""
    limit = next((positive(config, key) for key in (
        'max_position_embeddings', 'n_positions', 'max_seq_len', 'seq_length', 'n_ctx')
        if config.get(key) is not None), None)
    return max(limit, int(rope.factor * rope.original)) if limit and rope.kind == 'yarn' else limit


def read_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Give the tokens that each layer of a Llama, Mistral or Qwen sees back; 0: all."""
    family, layers = config.get('model_type'), positive(config, 'num_hidden_layers')
    slides = family == 'mistral' or (family != 'llama' and config.get('use_sliding_window'))
    # The transformers library's defaults; null is no window.
    config = {'sliding_window': 4096, 'max_window_layers': 28, **config}
    if not slides or config['sliding_window'] is None:
        return (0,) * layers
    window = positive(config, 'sliding_window')
    if family == 'mistral':
        return (window,) * layers
    kinds = config.get('layer_types')
    if kinds is None:
        first = config['max_window_layers']
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if len(kinds) != layers:
        raise ValueError(f'layer_types names {len(kinds)} of {layers} layers')
    return tuple({'sliding_attention': window, 'full_attention': 0}[kind] for kind in kinds)


def read_quantization(config: Mapping[str, Any]) -> Quantization:
    """Read how the weights are quantised."""
    said = config.get('quantization_config') or {'quant_method': 'none'}
    method, bits = str(said.get('quant_method', 'unknown')), said.get('bits')
    if method == 'bitsandbytes':
        four_bit = said.get('load_in_4bit') or said.get('_load_in_4bit')
        bits = said.get('bnb_4bit_quant_type', 'fp4') if four_bit else 'int8'
    if method != 'gptq':
        size = said.get('group_size')
        return Quantization(method, bits, size if isinstance(size, int) else 0)
    said = {'group_size': 128, **said}
    size = -1 if said['group_size'] == -1 else positive(said, 'group_size')
    layout = said.get('checkpoint_format') or said.get('format') or 'gptq'
    # GPTQModel's rules for single modules; those left dense are seen by their tensors.
    changed = [rule for rule in said.get('dynamic') or () if not rule.startswith('-:')]
    return Quantization(method, bits, size, layout, tuple(changed))
