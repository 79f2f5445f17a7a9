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
A mixture of experts: a router selects some gated MLPs for each token.

Their results are added up, each times its routing weight: the softmax of the router's logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.ops import ACTIVATIONS
from physai_decode.engines.native.ops import Routed
from physai_decode.engines.native.ops import top_k
from physai_decode.engines.native.ops import TorchOps
import torch
from torch import Tensor

FEW = 16            # up to this many tokens run one by one: most experts would get one or none


@dataclass(frozen=True)
class Scratch:
    """Scratch buffers of a decode step."""

    logits: Tensor          # float32 [experts]
    routed: Routed
    hidden: Tensor          # [selected experts, padded columns of ``down``]


@dataclass(frozen=True)
class Experts:
    """
    The weights of all experts; see `Mlp`.

    ``normalised``: whether the routing weights of the selected experts are scaled to a sum of 1.
    """

    router: Linear
    gate_up: Stack
    down: Stack
    normalised: bool
    activation: str = 'silu'

    def products(self) -> Iterator[tuple[str, Linear | Stack, bool, bool]]:
        """See `Mlp.products`."""
        yield 'router', self.router, True, False
        yield 'gate and up', self.gate_up, True, True
        yield 'down', self.down, False, False

    def scratch(self, dtype: torch.dtype, device: torch.device, rows: int = 1) -> list[Scratch]:
        """See `Mlp.scratch`; ``rows`` must be 1."""
        assert rows == 1
        one, count = self.down[0], self.down.top_k
        columns = one.padded_features if isinstance(one, Int4) else one.shape[1]
        return [Scratch(
            torch.zeros(self.down.count, dtype=torch.float32, device=device),
            Routed(torch.zeros(count, dtype=torch.int64, device=device),
                   torch.zeros(count, dtype=torch.float32, device=device)),
            torch.zeros(count, columns, dtype=dtype, device=device))]

    def step(self, ops: TorchOps, x: Tensor, gain: Tensor, eps: float, scratch: Scratch,
             out: Tensor, add: bool) -> None:
        """See `Mlp.step`."""
        ops.linear(x, self.router, scratch.logits, gain=gain, eps=eps)
        ops.select(scratch.logits, scratch.routed, self.normalised)
        ops.gated_experts(x, self.gate_up, scratch.routed, scratch.hidden, gain, eps,
                          self.activation)
        ops.summed_experts(scratch.hidden, self.down, scratch.routed, out, add=add)

    def apply(self, ops: TorchOps, normed: Tensor, scratch: Scratch) -> Tensor:
        """See `Mlp.apply`; returns float32."""
        logits = ops.apply(normed, self.router).float()
        ids, routing_weights = top_k(logits, self.down.top_k, self.normalised)
        out = torch.zeros(normed.shape, dtype=torch.float32, device=normed.device)
        if normed.shape[0] <= FEW:
            for x, *each, row in zip(normed, ids, routing_weights, out):
                ops.gated_experts(x, self.gate_up, Routed(*each), scratch.hidden, None, 0.0,
                                  self.activation)
                ops.summed_experts(scratch.hidden, self.down, Routed(*each), row)
            return out
        # Sorted by expert, then by token, so that the order of sums is fixed.
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=self.down.count).tolist()
        for expert, routed in enumerate(order.split(counts)):
            if not len(routed):
                continue
            tokens = routed // self.down.top_k
            weight = self.gate_up[expert]
            gate, up = weight.halves(ops.apply(normed[tokens], weight))
            hidden = ACTIVATIONS[self.activation](gate).mul_(up).flatten(1)
            out.index_add_(0, tokens, ops.apply(hidden, self.down[expert])
                           * routing_weights.flatten()[routed].unsqueeze(1))
        return out
