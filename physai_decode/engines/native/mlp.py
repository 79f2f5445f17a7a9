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
The gated MLP of a layer: down(activation(gate(x)) * up(x)), gate and up as one projection.

A layer may have another part in its place that gives its products, runs a step and applies itself
to a prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.ops import ACTIVATIONS
from physai_decode.engines.native.ops import TorchOps
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mlp:
    """Its weights; ``gate_up`` has the rows of both, ``activation`` is one of `ACTIVATIONS`."""

    gate_up: Linear
    down: Linear
    activation: str = 'silu'

    def products(self) -> Iterator[tuple[str, Linear, bool, bool]]:
        """Give the name and weight of each product, whether it is normed, and whether gated."""
        yield 'gate and up', self.gate_up, True, True
        yield 'down', self.down, False, False

    def room(self, dtype: torch.dtype, device: torch.device, rows: int = 1) -> list[Tensor]:
        """Give what passes of 1 to ``rows`` rows work in; all layers of a model may share it."""
        room = torch.zeros(rows, self.down.shape[1], dtype=dtype, device=device)
        return [room[0], *(room[:count] for count in range(2, rows + 1))]

    def step(self, ops: TorchOps, x: Tensor, gain: Tensor, eps: float, room: Tensor,
             out: Tensor, add: bool) -> None:
        """
        Write, or add, the result for one token to ``out`` float32 [hidden_size].

        :param x: float32 [hidden_size], normalised here by ``gain`` and ``eps``; it and all others
            may have a leading dimension, see `TorchOps`.
        :param room: [intermediate_size], to work in.
        """
        ops.gated(x, self.gate_up, room, gain, eps, self.activation)
        ops.linear(room, self.down, out, add=add)

    def apply(self, ops: TorchOps, normed: Tensor, room: Tensor) -> Tensor:
        """Give the result for ``normed`` [tokens, hidden_size]."""
        gate, up = self.gate_up.halves(ops.apply(normed, self.gate_up))
        return ops.apply(ACTIVATIONS[self.activation](gate).mul_(up).flatten(1), self.down)
