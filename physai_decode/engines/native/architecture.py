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
The shapes and constants of one transformer, independent of its model family.

RMSNorm, rotary embeddings, grouped-query attention, and a gated MLP or a mixture of experts. Each
difference between families is a field.
"""

from dataclasses import dataclass
from dataclasses import replace


@dataclass(frozen=True)
class Rotary:
    """
    The rotary embedding of a layer.

    Each frequency rotates a pair of dimensions: one in the first half of the rotated dimensions,
    and its counterpart in the second. The rest of a head is not rotated.
    """

    inverse_frequencies: tuple[float, ...]     # radians per position
    scale: float = 1.0                         # multiplies cosine and sine
    reach: int = 0                             # longest context for these, in tokens; 0: any
    beyond: tuple[float, ...] = ()             # inverse frequencies in longer contexts

    def within(self, context: int) -> 'Rotary':
        """Return the rotary embedding for a context of ``context`` tokens."""
        if self.reach and context > self.reach:
            return Rotary(self.beyond, self.scale)
        return Rotary(self.inverse_frequencies, self.scale)


@dataclass(frozen=True)
class Growth:
    """
    The scale of queries by position: 1 + beta * log(1 + position // context).

    It keeps attention as sharp as the number of attended tokens grows.
    """

    beta: float = 0.0                          # 0: queries are not scaled
    context: int = 1                           # tokens


@dataclass(frozen=True)
class Routing:
    """A mixture of experts: its shape, and the layers that have one as their MLP."""

    count: int                                 # experts of a layer
    top_k: int                                 # experts that a router selects for a token
    size: int                                  # intermediate_size of an expert
    normalised: bool                           # whether routing weights are scaled to a sum of 1
    layers: frozenset[int]                     # indices of these layers, from 0


@dataclass(frozen=True)
class Names:
    """
    The names of a family's modules; an empty name marks a module that it does not have.

    ``trunks`` are the possible prefixes of all names but the head's, each with the head's name.
    """

    trunks: tuple[tuple[str, str], ...] = (('model.', 'lm_head'),)
    qkv: tuple[str, ...] = ('q_proj', 'k_proj', 'v_proj')
    gate_up: tuple[str, ...] = ('gate_proj', 'up_proj')
    mlp_norm: str = 'post_attention_layernorm'
    out_norm: str = ''                         # norm of attention's output
    down_norm: str = ''                        # norm of the MLP's output


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
    tied_head: bool | None                     # None: if the files have no head
    windows: tuple[int, ...]                   # per layer, tokens attended to; 0: all
    rotaries: tuple[Rotary, ...]               # per layer
    attention_scale: float                     # multiplies attention scores
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = 'silu'                   # of `ops.ACTIVATIONS`
    embedding_scale: float = 1.0               # multiplies embeddings, but not a head tied to them
    rounded_scale: bool = False                # whether that is rounded to the weights' dtype
    logit_scale: float = 1.0                   # multiplies logits
    growth: Growth = Growth()
    routing: Routing | None = None
    wide_range: bool = False                   # whether activations may overflow float16
    gain_offset: float = 0.0                   # added to the stored gains of norms
    names: Names = Names()

    def within(self, context: int) -> 'Architecture':
        """Return the architecture for a context of ``context`` tokens; see `Rotary`."""
        return replace(self, rotaries=tuple(each.within(context) for each in self.rotaries))

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head, in the layers with a rotary embedding."""
        return 2 * max(len(each.inverse_frequencies) for each in self.rotaries)

    @property
    def q_size(self) -> int:
        """Width of all query heads side by side."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads side by side."""
        return self.kv_heads * self.head_dim
