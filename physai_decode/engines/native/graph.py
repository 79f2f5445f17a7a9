"""
Steps on a CUDA device, launched ahead of the host: captured in a graph, or op by op.

One step reads what the one before it wrote, so the host has nothing to say between them: it keeps
a step or two in flight, and reads each token from pinned memory when the token's copy, on a stream
of its own, has arrived. It waits for that copy's event, never for the device.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from physai_decode.engines import device as devices
from physai_decode.engines.sampling import Plan
import torch
from torch import Tensor

AHEAD = 2            # steps in flight


@dataclass
class _Slot:
    """One step in flight."""

    token: Tensor               # int64 [1], pinned
    begin: torch.cuda.Event
    end: torch.cuda.Event
    copied: torch.cuda.Event


class Pipeline:
    """
    Runs a step of one plan again and again, ``AHEAD`` of the host.

    Driven from one thread at a time, on the device's default stream.
    """

    def __init__(self, step: Callable[[Plan], None], history: Tensor, capture: bool):
        """
        Take the step.

        :param step: takes a plan; writes its token to ``history`` int64 [places].
        :param capture: whether it runs in a CUDA graph, one for each plan.
        """
        self._step, self._history, self._capture = step, history, capture
        self._copies = torch.cuda.Stream(history.device)
        self._free = deque(_Slot(
            torch.zeros(1, dtype=torch.int64).pin_memory(),
            torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True),
            torch.cuda.Event()) for _ in range(AHEAD))
        self._flying: deque[_Slot] = deque()
        self._graphs: dict[Plan, torch.cuda.CUDAGraph] = {}

    def prepare(self, plan: Plan) -> None:
        """Capture the step of a plan, where that was not done; runs it a few times before."""
        if not self._capture or plan in self._graphs:
            return
        pool = next((graph.pool() for graph in self._graphs.values()), None)
        self._graphs[plan] = devices.capture(
            lambda: self._step(plan), self._history.device, pool)

    @property
    def flying(self) -> int:
        """Steps in flight."""
        return len(self._flying)

    @property
    def full(self) -> bool:
        """Whether as many steps are in flight as may be."""
        return not self._free

    def launch(self, plan: Plan, place: int) -> None:
        """Start a step that was prepared; its token will stand at ``place`` of the history."""
        slot = self._free[0]        # it stays free if the step can't be launched
        stream = torch.cuda.current_stream()
        slot.begin.record(stream)
        self._graphs[plan].replay() if self._capture else self._step(plan)
        slot.end.record(stream)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.end)
            slot.token.copy_(self._history[place:place + 1], non_blocking=True)
            slot.copied.record(self._copies)
        self._flying.append(self._free.popleft())

    def collect(self) -> tuple[int, float]:
        """Wait for the oldest step's token; give its id and the step's time on the device in s."""
        slot = self._flying.popleft()
        self._free.append(slot)
        slot.copied.synchronize()
        return int(slot.token), slot.begin.elapsed_time(slot.end) * 1e-3

    def drain(self) -> None:
        """Forget the steps in flight, after their end."""
        while self._flying:
            self.collect()
