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
Read RoPE, sliding windows, context and quantisation from a config.json.

This module knows the keys that the versions of transformers and the quantisers write, their
defaults, and the range of each number. `check` validates the sizes that determine
the memory of every engine. Other numbers are validated when they are read, so that an unused one
may have any value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields
import math
import re
from typing import Any

from physai_decode.config import check_value
from physai_decode.config import SamplingConfig
from physai_decode.config import shown_json as shown

# Defaults of the transformers library for absent keys; a null window means none.
SLIDING_WINDOW = 4096
FIRST_WINDOW_LAYER = 28
ROPE_THETA = 10000.0
GPTQ_GROUP_SIZE = 128

# Settings of a generation_config.json that change the text, but that no engine applies. The value
# of each has no effect, nor do null and empty ones. The second group takes effect with do_sample.
_UNAPPLIED: dict[str, Any] = {
    **dict.fromkeys((
        'bad_words_ids', 'begin_suppress_tokens', 'dola_layers',
        'exponential_decay_length_penalty', 'force_words_ids', 'forced_bos_token_id',
        'forced_decoder_ids', 'forced_eos_token_id', 'max_time', 'sequence_bias', 'stop_strings',
        'suppress_tokens', 'watermarking_config')),
    'encoder_no_repeat_ngram_size': 0, 'encoder_repetition_penalty': 1, 'guidance_scale': 1,
    'min_length': 0, 'min_new_tokens': 0, 'no_repeat_ngram_size': 0, 'num_beams': 1,
    'penalty_alpha': 0, 'token_healing': False}
_UNAPPLIED_WARPERS: dict[str, Any] = {
    'epsilon_cutoff': 0, 'eta_cutoff': 0, 'top_h': None, 'typical_p': 1}

_OWN_NUMBERS = ('bitsandbytes', 'modelopt', 'exl2')     # quantisers whose bits are not integers

# The range of each number. The lower bound is inclusive for a count and exclusive for a float; the
# upper bound is several times the value in the largest models.
_LAYERS, _HEADS, _WIDTH, _VOCAB, _CONTEXT = (
    (1, 10**4), (1, 2**14), (1, 2**20), (1, 2**24), (16, 2**40))
SIZES = {
    'num_hidden_layers': _LAYERS, 'n_layer': _LAYERS, 'n_layers': _LAYERS, 'num_layers': _LAYERS,
    'num_attention_heads': _HEADS, 'num_key_value_heads': _HEADS, 'n_head': _HEADS,
    'n_heads': _HEADS, 'hidden_size': _WIDTH, 'head_dim': _WIDTH, 'n_embd': _WIDTH,
    'd_model': _WIDTH, 'vocab_size': _VOCAB, 'max_position_embeddings': _CONTEXT,
    'n_positions': _CONTEXT, 'max_seq_len': _CONTEXT, 'seq_length': _CONTEXT, 'n_ctx': _CONTEXT}
_RANGES: dict[str, tuple[float, float]] = {
    **SIZES, 'intermediate_size': (1, 2**22), 'sliding_window': (1, 2**40),
    'max_window_layers': (0, 10**4), 'group_size': (1, 2**20), 'rms_norm_eps': (0, 1),
    'rope_theta': (1, 1e30), 'factor': (0, 1e6), 'original_max_position_embeddings': (0, 2**40),
    'low_freq_factor': (0, 1e6), 'high_freq_factor': (0, 1e6), 'beta_fast': (0, 1e6),
    'beta_slow': (0, 1e6), 'attention_factor': (0, 1e6), 'mscale': (0, 1e6),
    'mscale_all_dim': (0, 1e6), 'query_pre_attn_scalar': (0, 1e6),
    'sliding_window_pattern': (1, 10**4), 'rope_local_base_freq': (1, 1e30),
    'partial_rotary_factor': (0, 1), 'no_rope_layer_interval': (1, 10**4),
    'embedding_multiplier': (0, 1e6), 'residual_multiplier': (0, 1e6),
    'attention_multiplier': (0, 1e6), 'logits_scaling': (0, 1e6),
    'llama_4_scaling_beta': (0, 1e6), 'num_experts': (1, 2**14), 'num_local_experts': (1, 2**14),
    'num_experts_per_tok': (1, 2**14), 'moe_intermediate_size': (1, 2**22),
    'decoder_sparse_step': (1, 10**4)}

# Classes and model_types whose family is certain; fine-tunes may have classes of their own.
_CLASS = re.compile(
    r'(llama|mistral|ministral|qwen|gemma|phi|smollm|granite|bert|roberta|gpt2|t5)\d*'
    r'(?:_text|(?:for(?:causallm|conditionalgeneration|maskedlm)|(?:lmhead)?model))?', re.I)
_SAME = {'mistral': 'llama', 'ministral': 'llama'}     # either may name a class of the other


def check(config: Mapping[str, Any]) -> None:
    """
    Validate the sizes of a model, its rotary embedding, and the family that it names.

    A list has one number per layer, and null selects the default of the family; the engine
    validates both.

    :raises ValueError: a size is out of range, or two keys contradict each other; the message
        names the keys.
    """
    for key in (*SIZES, 'rms_norm_eps'):
        if not isinstance(config.get(key), (list, type(None))):
            number(config, key, int if key in SIZES else float)
    for key in ('rope_parameters', 'rope_scaling'):
        inner, outer = (each.get('rope_theta') for each in (part(config, key), config))
        if inner is not None and outer is not None and inner != outer:
            raise ValueError(f'rope_theta is {shown(outer)}, but {shown(inner)} in {key}')
    newer, older = (_typed(part(config, key)) for key in ('rope_parameters', 'rope_scaling'))
    for key in newer.keys() & older.keys():
        if newer[key] != older[key]:
            raise ValueError(f'{key} is {shown(newer[key])} in rope_parameters, but '
                             f'{shown(older[key])} in rope_scaling')
    # Those by layer type, of gemma3, are merged by the library.
    for key, value in newer.items() if older else ():
        if key not in older and not isinstance(value, dict) and value not in (
                None, 'default', config.get(key)):
            raise ValueError(f'{key} is in rope_parameters, but not in rope_scaling, beside which '
                             'the transformers library does not read it')
    key = 'original_max_position_embeddings'
    inner, outer = rope_settings(config).get(key), config.get(key)
    if inner is not None and outer is not None and inner != outer:
        raise ValueError(f'{key} is {shown(outer)}, but {shown(inner)} for the rotary embedding')
    family, classes = config.get('model_type'), config.get('architectures')
    named = {_family(each) for each in classes if type(each) is str} - {''} \
        if isinstance(classes, list) else set()
    if named and type(family) is str and _family(family) not in ('', *named):
        raise ValueError(f'architectures is {shown(classes)}, but model_type is {shown(family)}')


def notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """
    Return the ambiguities in a config.json that `check` accepts, and how they are resolved.

    ``model_type`` selects the network, as in the transformers library. The dtype in the config is
    not used, because each tensor of the weights has its own.
    """
    family, classes = str(config.get('model_type')), config.get('architectures')
    found = []
    if not isinstance(classes, list) or not any(
            type(each) is str and _is_of(each, family) for each in classes):
        named = 'architectures is missing' if classes is None else \
            f'architectures is {shown(classes)}'
        found.append(f'{named}: model_type {shown(family)} decides')
    dtype, older = config.get('dtype'), config.get('torch_dtype')
    if None not in (dtype, older) and dtype != older:
        found.append(
            f'dtype is {shown(dtype)}, but torch_dtype {shown(older)}: engine.dtype decides')
    return tuple(found)


def _is_of(name: str, family: str) -> bool:
    """Return whether a class is certainly of the family of a model_type."""
    return (_family(name) == _family(family) != ''
            or name.lower().startswith(family.lower().replace('_', '')))


def _family(name: str) -> str:
    """Return the family of a class or a model_type; empty if it is not known for certain."""
    found = _CLASS.fullmatch(name)
    return _SAME.get(found[1].lower(), found[1].lower()) if found else ''


def number(config: Mapping[str, Any], key: str, kind: type = int) -> Any:
    """
    Read a number.

    :param kind: int, or float, which accepts integers too.
    :raises ValueError: the key is missing, or its value is out of range; the message names it.
    """
    if key not in config:
        raise ValueError(f'there is no {key}')
    value, (low, high) = config[key], _RANGES[key]
    if kind is int and (type(value) is not int or not low <= value <= high):
        raise ValueError(f'{key} is {shown(value)}, not an integer from {low} to {high}')
    if kind is float and (type(value) not in (int, float) or not low < value <= high):
        raise ValueError(f'{key} is {shown(value)}, not a number above {low:g}, up to {high:g}')
    return value


def part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """
    Read a nested object; empty if it is missing or null.

    :raises ValueError: the value is not an object; the message names the key.
    """
    value = config.get(key)
    if not isinstance(value, (dict, type(None))):
        raise ValueError(f'{key} is {shown(value)}, not an object')
    return value or {}


def rope_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Merge the rotary embedding's settings, which versions of transformers write in two objects.

    :raises ValueError: one of these is not an object.
    """
    return _typed({**part(config, 'rope_scaling'), **part(config, 'rope_parameters')})


def _typed(rope: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a rotary embedding's settings with the type, if it is set, under its newer key."""
    kind = rope.get('rope_type') or rope.get('type')
    return {**rope, 'rope_type': kind} if kind else rope


def end_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """
    Read the ids that end an answer; empty if the config sets none.

    :raises ValueError: a value is not a token id.
    """
    value = config.get('eos_token_id')
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(each) is not int or each < 0 for each in ids):
        raise ValueError(f'eos_token_id is {shown(value)}, not a token id or a list of token ids')
    return tuple(ids)


def sampling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Read the sampling settings of a generation_config.json, by field of `SamplingConfig`.

    Temperature, top_k, top_p and min_p apply only with ``do_sample``; without it, the config is
    greedy.

    :raises ValueError: a value is out of the range of its setting.
    """
    names = ('repetition_penalty', *(
        ('temperature', 'top_k', 'top_p', 'min_p') if config.get('do_sample') else ()))
    given = {name: config[name] for name in names if config.get(name) is not None}
    return {spec.name: check_value(spec.name, given[spec.name], spec, shown)
            for spec in fields(SamplingConfig) if spec.name in given}


def unapplied(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings of a generation_config.json that change the text but are not applied."""
    known = {**_UNAPPLIED, **(_UNAPPLIED_WARPERS if config.get('do_sample') else {})}
    return tuple(sorted(key for key, idle in known.items()
                        if config.get(key) not in (None, [], {}, idle)))


def random_weights(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """
    Read how to create random weights, for a folder that only describes its weights; else None.

    :raises ValueError: the value is not an object, or its seed is out of range.
    """
    key = 'physai_decode_random_weights'
    if config.get(key) is None:
        return None
    seed = part(config, key).get('seed', 0)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f'{key} has the seed {shown(seed)}, not an integer from 0 to 2**63 - 1')
    return part(config, key)


class Rope:
    """
    Rotary position embeddings (Su et al. 2021) and their extensions.

    A property raises ValueError if its number is missing or out of range. Read only the properties
    that belong to `kind`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """
        Read the kind of RoPE.

        :param config: of a language model.
        """
        self._config = config
        key = 'original_max_position_embeddings'
        outer = {} if config.get(key) is None else {key: config[key]}
        self._rope = {**outer, **rope_settings(config)}
        self.kind: str = self._rope.get('rope_type') or 'default'

    @property
    def theta(self) -> float:
        """The base of the frequencies."""
        if any(isinstance(value, dict) for value in self._rope.values()):
            raise ValueError('rope_parameters has settings by layer type, which this family lacks')
        theta = self._rope.get('rope_theta') or self._config.get('rope_theta') or ROPE_THETA
        return number({'rope_theta': theta}, 'rope_theta', float)

    @property
    def partial(self) -> float:
        """The fraction of each head that is rotated."""
        key = 'partial_rotary_factor'
        return number({key: self._rope.get(key, self._config.get(key, 1.0))}, key, float)

    @property
    def factor(self) -> float:
        """The factor that extends the context; by default, the ratio of the two context limits."""
        by_limits = {'yarn': ..., 'longrope': None}.get(self.kind, 0)
        if by_limits != 0 and self._rope.get('factor', by_limits) is None:
            return number(self._config, 'max_position_embeddings') / self.original_context
        return number(self._rope, 'factor', float)

    @property
    def original_context(self) -> float:
        """The context before the extension, in tokens."""
        key = 'original_max_position_embeddings'
        if self.kind in ('yarn', 'longrope') and not self._rope.get(key):
            return number(self._config, 'max_position_embeddings')
        return number(self._rope, key, float)

    @property
    def stretched_context(self) -> int:
        """The context after the extension, in tokens; 0 unless yarn sets the original one."""
        named = self.kind == 'yarn' and self._rope.get('original_max_position_embeddings')
        return int(self.factor * self.original_context) if named else 0

    @property
    def low_freq_factor(self) -> float:
        """For llama3: frequencies with fewer turns in the original context are scaled."""
        return number(self._rope, 'low_freq_factor', float)

    @property
    def high_freq_factor(self) -> float:
        """For llama3: frequencies with more turns in the original context are kept."""
        return number(self._rope, 'high_freq_factor', float)

    @property
    def beta_fast(self) -> float:
        """For yarn: frequencies with at least this many turns in the original context are kept."""
        return self._optional('beta_fast', 32.0)

    @property
    def beta_slow(self) -> float:
        """For yarn: frequencies with up to this many turns in the original context are scaled."""
        return self._optional('beta_slow', 1.0)

    @property
    def truncate(self) -> bool:
        """For yarn: whether the bounds of beta_fast and beta_slow are rounded to dimensions."""
        return bool(self._rope.get('truncate', True))

    def by_wave(self, key: str, count: int) -> tuple[float, ...]:
        """For longrope: the scale of each frequency, from ``short_factor`` or ``long_factor``."""
        factors = self._rope.get(key)
        if not isinstance(factors, list) or len(factors) != count:
            raise ValueError(f'{key} is {shown(factors)}, not a list of {count} numbers')
        return tuple(number({'factor': each}, 'factor', float) for each in factors)

    @property
    def attention_factor(self) -> float:
        """For yarn and longrope: the factor on cosine and sine."""
        if self._rope.get('attention_factor') is not None:
            return number(self._rope, 'attention_factor', float)
        if self.kind == 'longrope':
            return math.sqrt(1 + math.log(max(1.0, self.factor)) / math.log(self.original_context))
        if self._rope.get('mscale') and self._rope.get('mscale_all_dim'):
            return self._magnitude(number(self._rope, 'mscale', float)) / self._magnitude(
                number(self._rope, 'mscale_all_dim', float))
        return self._magnitude(1.0)

    def _magnitude(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def _optional(self, key: str, default: float) -> float:
        return number(self._rope, key, float) if self._rope.get(key) else default


def windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """
    Return the sliding window of each layer in tokens; 0 for the whole context.

    :param config: of a llama, mistral, qwen2 or qwen3 model.
    :raises ValueError: the config contradicts itself, or a number is missing or out of range.
    """
    family = config['model_type']
    slides = family == 'mistral' or (family != 'llama' and config.get('use_sliding_window'))
    config = {'sliding_window': SLIDING_WINDOW, 'max_window_layers': FIRST_WINDOW_LAYER, **config}
    kinds = config.get('layer_types')
    if not slides or config['sliding_window'] is None:
        if family != 'llama' and isinstance(kinds, list) and 'sliding_attention' in kinds:
            raise ValueError('layer_types has sliding_attention, but sliding_window is null or '
                             'use_sliding_window is not true')
        return (0,) * layers
    window = number(config, 'sliding_window')
    if kinds is not None:
        return windows_by_kind(kinds, layers, window)
    first = 0 if family == 'mistral' else number(config, 'max_window_layers')
    return tuple(window if index >= first else 0 for index in range(layers))


def windows_by_kind(kinds: Any, layers: int, window: int) -> tuple[int, ...]:
    """
    Return the sliding window of each layer in tokens; 0 for the whole context.

    :param kinds: ``layer_types`` of a config.
    :raises ValueError: ``kinds`` is not a list of ``layers`` known types.
    """
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(f'layer_types is {shown(kinds)}, not a list for {layers} layers')
    known = {'sliding_attention': window, 'full_attention': 0}
    unknown = next((kind for kind in kinds if type(kind) is not str or kind not in known), None)
    if unknown is not None:
        raise ValueError(f'layer_types has {shown(unknown)}: expected one of {", ".join(known)}')
    return tuple(known[kind] for kind in kinds)


def context_limit(config: Mapping[str, Any]) -> int | None:
    """
    Return the context that a model supports, in tokens; None if the config does not set it.

    YaRN extends the limit in ``max_position_embeddings``.

    :raises ValueError: the value is out of range.
    """
    rope = Rope(config)
    limit = next((number(config, key) for key in (
        'max_position_embeddings', 'n_positions', 'max_seq_len', 'seq_length', 'n_ctx')
        if config.get(key) is not None), None)
    return limit and max(limit, rope.stretched_context)


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are quantised; each engine decides what it supports."""

    name: str                   # gptq-int4-g128, bitsandbytes-nf4, ...
    method: str                 # gptq, awq, exl2, ...
    bits: Any                   # as in the config; None if absent
    group_size: int             # columns that share a scale; -1: all; 0: not set
    layout: str                 # of gptq: gptq, gptq_v2, or another name
    settings: Mapping[str, Any]     # the whole quantization_config


def quantization(config: Mapping[str, Any]) -> Quantization | None:
    """
    Read the quantisation of the weights.

    :param config: the whole config.json.
    :returns: None if the weights are not quantised.
    :raises ValueError: quantization_config is not an object, or the group_size of GPTQ is neither
        -1 nor a positive integer.
    """
    found = part(config, 'quantization_config')
    if not found:
        return None
    method = str(found.get('quant_method') or 'unknown')
    bits, size = found.get('bits'), found.get('group_size')
    kind: Any = '' if method in _OWN_NUMBERS else 'int'     # of numbers
    if method == 'gptq':
        found = {'group_size': GPTQ_GROUP_SIZE, **found}
        size = found['group_size']
        if size != -1:
            number(found, 'group_size')
    if method == 'compressed-tensors':
        kind, bits, size = (_shared(found, key) for key in ('type', 'num_bits', 'group_size'))
    return Quantization(
        name=_quantization_name(found, method, kind or '', bits, size), method=method, bits=bits,
        group_size=size if isinstance(size, int) else 0,
        layout=str(found.get('checkpoint_format') or found.get('format') or 'gptq'),
        settings=found)


def _shared(found: Mapping[str, Any], key: str) -> Any:
    """Return a setting that all groups of compressed-tensors share, else None."""
    groups = part(found, 'config_groups')
    values = [part(part(groups, name), 'weights').get(key) for name in groups]
    return values[0] if values and values.count(values[0]) == len(values) else None


def _quantization_name(found: Mapping[str, Any], method: str, kind: str, bits: Any,
                       size: Any) -> str:
    if method == 'bitsandbytes':
        four_bit = found.get('load_in_4bit') or found.get('_load_in_4bit')
        kind = found.get('bnb_4bit_quant_type', 'fp4') or 'unknown'
        return f'{method}-{kind if four_bit else "int8"}'
    if method == 'modelopt':
        return f'{method}-{str(found.get("quant_algo") or "unknown").lower()}'
    name = method
    if bits is not None:
        name += f'-{bits}bpw' if method == 'exl2' else f'-{kind}{bits}'
    return f'{name}-g{size}' if isinstance(size, int) and size > 0 else name
