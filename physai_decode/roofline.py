"""
How fast a decode step can be at best: the bytes it must read over the memory bus's peak.

Pure functions of shapes. It knows nothing of engines, of torch or of ROS, and of no limit but the
memory bus: an arithmetic-bound step (a long prefill, a large batch) has another floor.
"""

from collections.abc import Callable
from dataclasses import dataclass

from physai_decode.engine import Footprint


@dataclass(frozen=True)
class Peak:
    """The memory's peak read bandwidth in bytes per second, None where unknown, and its source."""

    bytes_per_s: float | None
    source: str                     # parameter, driver, datasheet: NAME, measured, unknown


def kv_bytes(layers: int, kv_heads: int, head_dim: int, context: int, element_bytes: int,
             sliding_window: int = 0) -> int:
    """Give the bytes of keys and values that one step reads."""
    raise NotImplementedError


def floor_s(weight_bytes: int, kv_bytes: int, peak_bytes_per_s: float | None) -> float | None:
    """Give the least time of one step in seconds, None where the peak is unknown."""
    raise NotImplementedError


def r_floor(floor_s: float | None, observed_s: float | None) -> float | None:
    """Give the floor over the observed time: 1 is the limit."""
    raise NotImplementedError


class Roofline:
    """The floor of one engine's decode step on one memory bus."""

    def __init__(self, footprint: Footprint, peak: Peak) -> None:
        self.footprint = footprint
        self.peak = peak

    def kv_bytes(self, context: int) -> int:
        """Give the bytes of keys and values read at this context."""
        raise NotImplementedError

    def step_bytes(self, context: int, convention: str = 'read') -> int:
        """Give all bytes of one step; the convention is read or checkpoint."""
        raise NotImplementedError

    def floor_s(self, context: int, convention: str = 'read') -> float | None:
        """Give the least time of one step in seconds."""
        raise NotImplementedError


def find_peak(parameter_gb_s: float, device_name: str,
              driver: Callable[[], tuple[float, int] | None] | None = None,
              measure: Callable[[], float] | None = None) -> Peak:
    """Find the peak; driver gives (memory clock in kHz, bus width in bits), measure bytes/s."""
    raise NotImplementedError


def datasheet_bytes_per_s(device_name: str) -> float | None:
    """Look the device up in the table of datasheets."""
    raise NotImplementedError


def measure_cpu_read_bandwidth(threads: int = 0) -> float:
    """Read a large buffer and give the best rate in bytes per second."""
    raise NotImplementedError
