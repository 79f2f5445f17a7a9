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
Steps on a CUDA device, launched ahead of the host: captured in a graph, or op by op.

One step reads what the one before it wrote, so the host has nothing to say between them: it keeps
a few steps in flight, and reads each token from pinned memory when the token's copy, on a stream
of its own, has arrived. It waits for that copy's event, never for the device. A pass of several
rows is a step that leaves several tokens.

A draw that needs a mask from the host is a part of its own, after the forward pass: the host makes
the mask while that runs. The mask follows from the token before, so one such step is in flight.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from physai_decode.engines import device as devices
from physai_decode.engines.sampling import Plan
from physai_decode.engines.sampling import ROWS
import torch
from torch import Tensor

AHEAD = 2            # steps in flight,
MOST_AHEAD = 8       # and at most, where the host comes late
CALM_STEPS = 256     # without a late one, after which there is one less


@dataclass
class _Slot:
    """One step in flight."""

    tokens: Tensor              # int64 [ROWS], pinned
    begin: torch.cuda.Event
    end: torch.cuda.Event
    copied: torch.cuda.Event


class _Part(NamedTuple):
    """What is launched in one go."""

    rows: int                   # of the pass
    forward: bool               # whether it begins with the forward pass
    plan: Plan | None           # of the draw that it ends with, None where it has none


class Depth:
    """How many steps are kept in flight."""

    def __init__(self, fixed: int = 0) -> None:
        """
        Begin with a few.

        :param fixed: so many for ever; 0 follows the host.
        """
        self.steps = fixed or AHEAD
        self.most = fixed or MOST_AHEAD
        self._least = self.steps
        self._calm = 0              # steps since the last late one

    def learn(self, late: bool) -> None:
        """Take whether the host came so late that the device had nothing left to do."""
        self._calm = 0 if late else self._calm + 1
        if late and self.steps < self.most:
            self.steps += 1
        elif self._calm >= CALM_STEPS and self.steps > self._least:
            self.steps, self._calm = self.steps - 1, 0


class Pipeline:
    """
    Runs a step of one plan again and again, ahead of the host.

    Driven from one thread at a time, on that thread's current stream.
    """

    sizes: tuple[int, ...] = (1,)           # rows of the passes that are prepared

    def __init__(self, forward: Callable[[int], None], draw: Callable[[Plan, int], None],
                 history: Tensor, capture: bool, ahead: int = 0, priority: int = 0):
        """
        Take the two halves of a step.

        :param forward: computes the logits of so many rows.
        :param draw: takes a plan and the rows; writes their tokens to ``history`` int64 [places].
        :param capture: whether they run in a CUDA graph, one for each plan and number of rows.
        :param ahead: steps in flight; 0: `AHEAD`, and more while the host comes late.
        :param priority: of the copies' stream; below 0 goes first.
        """
        self._forward, self._draw, self._history, self._capture = forward, draw, history, capture
        self._depth = Depth(ahead)
        self._copies = torch.cuda.Stream(history.device, priority=priority)
        self._free = deque(_Slot(
            torch.zeros(ROWS, dtype=torch.int64).pin_memory(),
            torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True),
            torch.cuda.Event()) for _ in range(self._depth.most))
        self._flying: deque[_Slot] = deque()
        self._graphs: dict[_Part, torch.cuda.CUDAGraph] = {}

    def prepare(self, plan: Plan, begin: Callable[[], object]) -> None:
        """
        Capture the passes of a plan, where that was not done.

        :param begin: is called before each; it runs a few times then.
        """
        for part in (each for rows in self.sizes for each in _parts(plan, rows)):
            if self._capture and part not in self._graphs:
                begin()
                pool = next((graph.pool() for graph in self._graphs.values()), None)
                self._graphs[part] = devices.capture(
                    partial(self._run, part), self._history.device, pool)

    @property
    def flying(self) -> int:
        """Steps in flight."""
        return len(self._flying)

    @property
    def full(self) -> bool:
        """Whether as many steps are in flight as may be."""
        return len(self._flying) >= self._depth.steps

    def launch(self, plan: Plan, place: int, restrict: Callable[[], None] | None = None,
               rows: int = 1) -> None:
        """
        Start a step, or a pass, that was prepared.

        :param place: of the history, where its first token will stand.
        :param restrict: of a plan with masks: writes them, while the forward pass runs.
        """
        if self._flying:
            # Where even the newest step has ended, the device has waited for the host.
            self._depth.learn(self._flying[-1].copied.query())
        slot = self._free[0]        # it stays free if the step can't be launched
        stream = torch.cuda.current_stream()
        slot.begin.record(stream)
        for part in _parts(plan, rows):
            if not part.forward and restrict is not None:
                restrict()
            self._graphs[part].replay() if self._capture else self._run(part)
        slot.end.record(stream)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.end)
            slot.tokens[:rows].copy_(self._history[place:place + rows], non_blocking=True)
            slot.copied.record(self._copies)
        self._flying.append(self._free.popleft())

    def collect(self) -> tuple[Tensor, float]:
        """
        Wait for the oldest step's tokens.

        :returns: int64 [ROWS], of which the step's come first, until the next one is launched; and
            its time on the device in s.
        """
        slot = self._flying.popleft()
        self._free.append(slot)
        slot.copied.synchronize()
        return slot.tokens, slot.begin.elapsed_time(slot.end) * 1e-3

    def drain(self) -> None:
        """Forget the steps in flight, after their end."""
        while self._flying:
            self.collect()

    def _run(self, part: _Part) -> None:
        if part.forward:
            self._forward(part.rows)
        if part.plan is not None:
            self._draw(part.plan, part.rows)


def _parts(plan: Plan, rows: int) -> tuple[_Part, ...]:
    """Give what a pass of a plan is launched in."""
    if plan.mask:
        return _Part(rows, True, None), _Part(rows, False, plan)
    return (_Part(rows, True, plan),)
