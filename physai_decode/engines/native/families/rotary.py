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

"""The frequencies of rotary embeddings (Su et al. 2021) and their extensions, from a config."""

import math

from physai_decode.config import shown_json as shown
from physai_decode.engines.native.architecture import Rotary
from physai_decode.engines.native.families.refusal import unsupported
from physai_decode.model_config import Rope

KINDS = ('default', 'linear', 'llama3', 'yarn', 'longrope')


def read(rope: Rope, head_dim: int) -> Rotary:
    """
    Return the rotary embedding of whole heads.

    :raises EngineError: the native engine does not run the rope type, or partial embeddings.
    """
    if rope.partial != 1:
        raise unsupported('partial rotary embeddings of this family')
    return of_part(rope, head_dim)


def of_part(rope: Rope, head_dim: int) -> Rotary:
    """
    Return the rotary embedding of the first ``head_dim`` dimensions of a head.

    :raises EngineError: the native engine does not run the rope type.
    """
    inverse = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if rope.kind == 'default':
        return Rotary(tuple(inverse))
    if rope.kind == 'linear':
        return Rotary(tuple(f / rope.factor for f in inverse))
    if rope.kind == 'llama3':
        return Rotary(tuple(_llama3(f, rope) for f in inverse))
    if rope.kind == 'yarn':
        return Rotary(_yarn(inverse, rope, head_dim), rope.attention_factor)
    if rope.kind == 'longrope':
        short, long = (tuple(f / factor for f, factor in zip(
            inverse, rope.by_wave(key, len(inverse)))) for key in ('short_factor', 'long_factor'))
        return Rotary(short, rope.attention_factor, int(rope.original_context), long)
    raise unsupported(f'rope type {shown(rope.kind)} (it runs {", ".join(KINDS)})')


def _llama3(frequency: float, rope: Rope) -> float:
    """Divide low frequencies by the factor, keep high ones, blend in between (Llama 3.1)."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    stretched = frequency / rope.factor
    turns = rope.original_context * frequency / (2 * math.pi)
    if turns < low:
        return stretched
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * stretched + blend * frequency


def _yarn(inverse: list[float], rope: Rope, head_dim: int) -> tuple[float, ...]:
    """Blend both frequencies by a ramp over the dimensions: YaRN (arXiv 2309.00071)."""
    theta, factor, original = rope.theta, rope.factor, rope.original_context

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001

    def blended(i: int, frequency: float) -> float:
        stretch = min(max((i - low) / (high - low), 0.0), 1.0)
        return frequency / factor * stretch + frequency * (1 - stretch)

    return tuple(blended(i, f) for i, f in enumerate(inverse))
