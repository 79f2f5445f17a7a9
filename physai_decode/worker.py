"""
One thread that answers prompts one after another: queue, cancel, preempt, deadlines.

It drives an engine, turns ids into text and calls a sink. It knows nothing of ROS or torch.
"""

import time
from collections.abc import Callable
from typing import Any
from typing import Protocol

from physai_decode.config import DeadlineConfig
from physai_decode.config import DecodeConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import Engine
from physai_decode.roofline import Peak
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
from physai_decode.timing import WindowReport


class Sink(Protocol):
    """
    Where the worker's reports go.

    ``token`` is called from the worker's thread only. ``finished`` is called exactly once for each
    request: from the worker's thread, or, for a request that leaves without its turn (refused at
    ``submit``, waiting at ``cancel``, ``stop`` or a preemption), from the thread that made that
    call, before the call returns. So ``finished`` must be callable from several threads at once.
    """

    def token(self, report: TokenReport) -> None:
        """Take one token, just known."""
        ...

    def finished(self, report: RequestReport, text: str) -> None:
        """Take the end of one request; text is all its tokens' pieces joined."""
        ...


class Worker:
    """One engine, one thread, one queue."""

    def __init__(self, engine: Engine, text: Any, config: DecodeConfig, sink: Sink,
                 clock: Callable[[], float] = time.monotonic,
                 peak: Peak = Peak(None, 'unknown')) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread."""
        raise NotImplementedError

    def submit(self, prompt: str, received_s: float | None = None) -> int:
        """Queue a prompt and give its request id; never blocks on the model."""
        raise NotImplementedError

    def cancel(self) -> str:
        """End the running request, empty the queue, and say what was done."""
        raise NotImplementedError

    def reset(self) -> str:
        """Forget the conversation, and say what was forgotten."""
        raise NotImplementedError

    def stop(self, timeout_s: float) -> bool:
        """Cancel everything and end the thread; False where the engine did not come back."""
        raise NotImplementedError

    def update(self, sampling: SamplingConfig | None = None,
               deadline: DeadlineConfig | None = None) -> None:
        """Take new settings: sampling from the next request on, deadlines at once."""
        raise NotImplementedError

    def window(self) -> WindowReport:
        """Report on the last diagnostics.window_s seconds."""
        raise NotImplementedError

    @property
    def state(self) -> str:
        """Tell the state: idle, generating, stalled or failed (the last request ended error)."""
        raise NotImplementedError

    @property
    def last_error(self) -> str:
        """Give the message of the last engine error, empty where there was none."""
        raise NotImplementedError

    @property
    def queue_depth(self) -> int:
        """Count the prompts that wait."""
        raise NotImplementedError

    @property
    def requests(self) -> int:
        """Count the prompts so far, refused ones too."""
        raise NotImplementedError

    @property
    def refusals(self) -> int:
        """Count the refused prompts."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Count the tokens delivered so far."""
        raise NotImplementedError

    @property
    def last_token_s(self) -> float | None:
        """Give the clock's time of the last token, None before the first."""
        raise NotImplementedError
