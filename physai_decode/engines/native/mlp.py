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
The gated MLP of a layer: down(activation(gate(x)) * up(x)), with gate and up fused.

`Experts` has the same methods.
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
    """Its weights; ``gate_up`` has the rows of both, ``activation`` is a key of `ACTIVATIONS`."""

    gate_up: Linear
    down: Linear
    activation: str = 'silu'

    def products(self) -> Iterator[tuple[str, Linear, bool, bool]]:
        """Yield each product: name, weight, whether its input is normed, whether it is gated."""
        yield 'gate and up', self.gate_up, True, True
        yield 'down', self.down, False, False

    def scratch(self, dtype: torch.dtype, device: torch.device, rows: int = 1) -> list[Tensor]:
        """Allocate the scratch buffers of passes of 1 to ``rows`` rows, for all layers."""
        scratch = torch.zeros(rows, self.down.shape[1], dtype=dtype, device=device)
        return [scratch[0], *(scratch[:count] for count in range(2, rows + 1))]

    def step(self, ops: TorchOps, x: Tensor, gain: Tensor, eps: float, scratch: Tensor,
             out: Tensor, add: bool) -> None:
        """
        Write (or add) the output for one token to ``out`` float32 [hidden_size].

        :param x: float32 [hidden_size], not normed yet; ``gain`` and ``eps`` are the norm's. It
            and the others can have a leading dimension, see `TorchOps`.
        :param scratch: [intermediate_size], from `scratch`.
        """
        ops.gated(x, self.gate_up, scratch, gain, eps, self.activation)
        ops.linear(scratch, self.down, out, add=add)

    def apply(self, ops: TorchOps, normed: Tensor, scratch: Tensor) -> Tensor:
        """Return the output for ``normed`` [tokens, hidden_size]."""
        gate, up = self.gate_up.halves(ops.apply(normed, self.gate_up))
        return ops.apply(ACTIVATIONS[self.activation](gate).mul_(up).flatten(1), self.down)
