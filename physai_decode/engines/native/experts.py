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
Several gated MLPs in the place of one: for each token a router takes some of them.

What those give is added up, each times its share: the router's products by softmax.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.ops import ACTIVATIONS
from physai_decode.engines.native.ops import Taken
from physai_decode.engines.native.ops import taken
from physai_decode.engines.native.ops import TorchOps
import torch
from torch import Tensor

FEW = 16            # tokens that are run one by one: most experts would have one token or none


@dataclass(frozen=True)
class Room:
    """What a step works in."""

    logits: Tensor          # float32 [experts]
    taken: Taken
    hidden: Tensor          # [experts taken, columns of ``down`` with what pads them]


@dataclass(frozen=True)
class Experts:
    """
    Their weights; see `Mlp`.

    ``shared_out``: whether the shares of the experts taken are scaled to add up to 1.
    """

    router: Linear
    gate_up: Stack
    down: Stack
    shared_out: bool
    activation: str = 'silu'

    def products(self) -> Iterator[tuple[str, Linear | Stack, bool, bool]]:
        """See `Mlp.products`."""
        yield 'router', self.router, True, False
        yield 'gate and up', self.gate_up, True, True
        yield 'down', self.down, False, False

    def room(self, dtype: torch.dtype, device: torch.device, rows: int = 1) -> list[Room]:
        """Give what a step works in; all layers of a model may share it. Passes have one row."""
        assert rows == 1
        one, count = self.down[0], self.down.taken
        columns = one.padded_features if isinstance(one, Int4) else one.shape[1]
        return [Room(
            torch.zeros(self.down.count, dtype=torch.float32, device=device),
            Taken(torch.zeros(count, dtype=torch.int64, device=device),
                  torch.zeros(count, dtype=torch.float32, device=device)),
            torch.zeros(count, columns, dtype=dtype, device=device))]

    def step(self, ops: TorchOps, x: Tensor, gain: Tensor, eps: float, room: Room,
             out: Tensor, add: bool) -> None:
        """See `Mlp.step`."""
        ops.linear(x, self.router, room.logits, gain=gain, eps=eps)
        ops.take(room.logits, room.taken, self.shared_out)
        ops.gated_each(x, self.gate_up, room.taken, room.hidden, gain, eps, self.activation)
        ops.joined(room.hidden, self.down, room.taken, out, add=add)

    def apply(self, ops: TorchOps, normed: Tensor, room: Room) -> Tensor:
        """See `Mlp.apply`; gives float32."""
        logits = ops.apply(normed, self.router).float()
        ids, shares = taken(logits, self.down.taken, self.shared_out)
        out = torch.zeros(normed.shape, dtype=torch.float32, device=normed.device)
        if normed.shape[0] <= FEW:
            for x, *each, row in zip(normed, ids, shares, out):
                ops.gated_each(x, self.gate_up, Taken(*each), room.hidden, None, 0.0,
                               self.activation)
                ops.joined(room.hidden, self.down, Taken(*each), row)
            return out
        # Token after token, of one expert after the other.
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=self.down.count).tolist()
        for number, places in enumerate(order.split(counts)):
            if not len(places):
                continue
            tokens = places // self.down.taken
            weight = self.gate_up[number]
            gate, up = weight.halves(ops.apply(normed[tokens], weight))
            hidden = ACTIVATIONS[self.activation](gate).mul_(up).flatten(1)
            out.index_add_(0, tokens, ops.apply(hidden, self.down[number])
                           * shares.flatten()[places].unsqueeze(1))
        return out
