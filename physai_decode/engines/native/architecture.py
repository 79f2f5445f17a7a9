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
The shapes and constants of one transformer, whatever family of models it is from.

RMSNorm, rotary positions, grouped query attention, a gated MLP or several; what of it differs
between families is a field. Knows no config and no tensors.
"""

from dataclasses import dataclass
from dataclasses import replace


@dataclass(frozen=True)
class Rotary:
    """
    How the positions of a layer turn its heads.

    Frequencies are those of pairs of dimensions, the first half of those that turn with the
    second; what is left of a head does not turn.
    """

    inverse_frequencies: tuple[float, ...]     # radians per position
    scale: float = 1.0                         # multiplies cosine and sine
    reach: int = 0                             # tokens of context up to which it is so; 0: any
    beyond: tuple[float, ...] = ()             # inverse frequencies in longer contexts

    def within(self, context: int) -> 'Rotary':
        """Return what applies in a context of so many tokens."""
        if self.reach and context > self.reach:
            return Rotary(self.beyond, self.scale)
        return Rotary(self.inverse_frequencies, self.scale)


@dataclass(frozen=True)
class Growth:
    """
    How queries grow with their place: by 1 + beta * log(1 + place // context).

    The number of tokens seen grows as well, and attention stays as sharp.
    """

    beta: float = 0.0                          # 0: they do not
    context: int = 1                           # tokens


@dataclass(frozen=True)
class Routing:
    """The layers whose MLP is one of experts: for each token a router takes some of them."""

    count: int                                 # experts of a layer
    taken: int                                 # of these for a token
    size: int                                  # intermediate_size of an expert
    shared_out: bool                           # whether what those taken count adds up to 1
    layers: frozenset[int]                     # which they are, from 0


@dataclass(frozen=True)
class Names:
    """
    What a family calls its parts; an empty name is of a part that it has not.

    ``trunks`` are what the names of all but the head may begin with, and what the head is called
    then.
    """

    trunks: tuple[tuple[str, str], ...] = (('model.', 'lm_head'),)
    qkv: tuple[str, ...] = ('q_proj', 'k_proj', 'v_proj')
    gate_up: tuple[str, ...] = ('gate_proj', 'up_proj')
    mlp_norm: str = 'post_attention_layernorm'
    out_norm: str = ''                         # of what attention adds
    down_norm: str = ''                        # of what the MLP adds


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
    tied_head: bool | None                     # None: where the files have no head
    windows: tuple[int, ...]                   # per layer, tokens seen back; 0: all
    rotaries: tuple[Rotary, ...]               # per layer
    attention_scale: float                     # multiplies the products of queries and keys
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = 'silu'                   # of `ops.ACTIVATIONS`
    embedding_scale: float = 1.0               # multiplies embeddings, but not a head tied to them
    rounded_scale: bool = False                # whether that is in the weights' precision
    logit_scale: float = 1.0                   # multiplies logits
    growth: Growth = Growth()
    routing: Routing | None = None
    wide_range: bool = False                   # whether float16 may be too small for activations
    gain_offset: float = 0.0                   # to be added to the stored gains of norms
    names: Names = Names()

    def within(self, context: int) -> 'Architecture':
        """Return the architecture for a context of so many tokens, which can change rotation."""
        return replace(self, rotaries=tuple(each.within(context) for each in self.rotaries))

    @property
    def turned(self) -> int:
        """The first dimensions of a head that turn, in the layers in which any do."""
        return 2 * max(len(each.inverse_frequencies) for each in self.rotaries)

    @property
    def q_size(self) -> int:
        """Width of all query heads side by side."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads side by side."""
        return self.kv_heads * self.head_dim
