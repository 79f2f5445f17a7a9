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
Run steps on a CUDA device ahead of the host, in CUDA graphs or operation by operation.

Each step reads the results of the previous one on the device, so the host can keep a few steps in
flight. Tokens are copied to pinned memory on a separate stream, and the host waits for the event
of a copy, never for the device. A pass of several rows is a step with several tokens.

If sampling needs a mask from the host, it is launched separately after the forward pass, and the
host computes the mask meanwhile. The mask depends on the previous token, so only one such step is
in flight. The forward pass of the next one needs that token only on the device, so it is launched
before the host has read it.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from physai_decode.engines import device as devices
from physai_decode.engines.sampling import Plan
from physai_decode.engines.sampling import ROWS
import torch
from torch import Tensor

AHEAD = 2            # steps in flight
MOST_AHEAD = 8       # maximum, while the host is late
CALM_STEPS = 256     # steps without a late host, after which one fewer is in flight


class _Slot:
    """One step in flight."""

    def __init__(self, blocking: bool) -> None:
        self.tokens = torch.zeros(ROWS, dtype=torch.int64).pin_memory()
        # With a mask, sampling waits for the host between forwarded and restricted.
        self.begin, self.forwarded, self.restricted, self.end = (
            torch.cuda.Event(enable_timing=True) for _ in range(4))
        self.copied = torch.cuda.Event(blocking=blocking)
        self.masked = False


class _Part(NamedTuple):
    """The kernels that are launched together."""

    rows: int                   # of the pass
    forward: bool               # whether it has the forward pass
    plan: Plan | None           # of the sampling; None if it does not sample


class Depth:
    """The number of steps to keep in flight."""

    def __init__(self, fixed: int = 0) -> None:
        """
        Start with `AHEAD`.

        :param fixed: a constant number; 0 adapts it to the host.
        """
        self.steps = fixed or AHEAD
        self.most = fixed or MOST_AHEAD
        self._least = self.steps
        self._calm = 0              # steps since the host was last late

    def learn(self, late: bool) -> None:
        """Update after a step; ``late``: the host was late, so the device was idle."""
        self._calm = 0 if late else self._calm + 1
        if late and self.steps < self.most:
            self.steps += 1
        elif self._calm >= CALM_STEPS and self.steps > self._least:
            self.steps, self._calm = self.steps - 1, 0


class Pipeline:
    """
    Runs steps ahead of the host.

    One thread at a time uses it, with its current stream.
    """

    sizes: tuple[int, ...] = (1,)           # rows of the passes to prepare

    def __init__(self, forward: Callable[[int], None], draw: Callable[[Plan, int], None],
                 history: Tensor, capture: bool, ahead: int = 0, priority: int = 0,
                 blocking: bool = False):
        """
        Wrap the two parts of a step.

        :param forward: computes the logits of a number of rows.
        :param draw: samples with a plan from a number of rows, and writes the tokens to
            ``history`` int64 [positions].
        :param capture: whether to capture CUDA graphs, one per plan and number of rows.
        :param ahead: steps in flight; 0 means `AHEAD`, and more while the host is late.
        :param priority: of the stream for copies; below 0 is higher.
        :param blocking: whether the host sleeps while it waits, instead of polling.
        """
        self._forward, self._draw, self._history, self._capture = forward, draw, history, capture
        self._depth = Depth(ahead)
        self._copies = torch.cuda.Stream(history.device, priority=priority)
        # One more than can be in flight, for the step of `begin`.
        self._free = deque(_Slot(blocking) for _ in range(self._depth.most + 1))
        self._flying: deque[_Slot] = deque()
        self._begun = False         # whether the forward pass of the next step is launched
        self._graphs: dict[_Part, torch.cuda.CUDAGraph] = {}

    def prepare(self, plan: Plan, begin: Callable[[], object]) -> None:
        """
        Capture the passes of a plan, unless they are captured already.

        :param begin: called before each capture, which runs the pass a few times.
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
        """Whether the maximum number of steps is in flight."""
        return len(self._flying) >= self._depth.steps

    def begin(self, plan: Plan) -> None:
        """Launch the forward pass of the next step of a plan with masks."""
        if not self._begun:
            self._start(self._free[0], plan, 1)
            self._begun = True

    def launch(self, plan: Plan, place: int, restrict: Callable[[], None] | None = None,
               rows: int = 1) -> None:
        """
        Launch a prepared step or pass.

        :param place: index in the history of its first token.
        :param restrict: writes the masks while the forward pass runs, if the plan has masks.
        """
        if self._flying:
            # If even the newest step has ended, the device is waiting for the host.
            self._depth.learn(self._flying[-1].copied.query())
        slot = self._free[0]        # it stays free if the step can't be launched
        stream = torch.cuda.current_stream()
        assert rows == 1 or not self._begun
        if not self._begun:
            self._start(slot, plan, rows)
        slot.masked = plan.mask
        if plan.mask:
            if restrict is not None:
                restrict()
            slot.restricted.record(stream)
            self._replay(_parts(plan, rows)[1])
        slot.end.record(stream)
        self._begun = False
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.end)
            slot.tokens[:rows].copy_(self._history[place:place + rows], non_blocking=True)
            slot.copied.record(self._copies)
        self._flying.append(self._free.popleft())

    def collect(self) -> tuple[Tensor, float]:
        """
        Wait for the tokens of the oldest step.

        :returns: int64 [ROWS], which starts with the tokens of the step and is valid until the
            next launch; and the time of the step on the device in seconds, without the wait for
            a mask.
        """
        slot = self._flying.popleft()
        self._free.append(slot)
        slot.copied.synchronize()
        if slot.masked:
            device_ms = (slot.begin.elapsed_time(slot.forwarded)
                         + slot.restricted.elapsed_time(slot.end))
        else:
            device_ms = slot.begin.elapsed_time(slot.end)
        return slot.tokens, device_ms * 1e-3

    def drain(self) -> None:
        """Wait for the steps in flight; discard them and a forward pass that `begin` launched."""
        while self._flying:
            self.collect()
        self._begun = False

    def _start(self, slot: _Slot, plan: Plan, rows: int) -> None:
        """Launch the first part of a step."""
        stream = torch.cuda.current_stream()
        slot.begin.record(stream)
        self._replay(_parts(plan, rows)[0])
        if plan.mask:
            slot.forwarded.record(stream)

    def _replay(self, part: _Part) -> None:
        self._graphs[part].replay() if self._capture else self._run(part)

    def _run(self, part: _Part) -> None:
        if part.forward:
            self._forward(part.rows)
        if part.plan is not None:
            self._draw(part.plan, part.rows)


def _parts(plan: Plan, rows: int) -> tuple[_Part, ...]:
    """Return the parts of a pass."""
    if plan.mask:
        return _Part(rows, True, None), _Part(rows, False, plan)
    return (_Part(rows, True, plan),)
