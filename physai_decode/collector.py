"""The garbage collector, kept out of generations."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import gc
import threading


class Collector:
    """
    Keeps the garbage collector out of generations.

    A collection stops all threads, for longer than a token takes. One for the process, as the
    collector is: several workers may share it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pauses = 0
        self._was_enabled = False

    @contextmanager
    def paused(self, full: Callable[[], bool]) -> Iterator[None]:
        """
        Pause collection; when the last pause ends, make up for it.

        :param full: asked then: True collects all, False only what is new since.
        """
        with self._lock:
            if not self._pauses:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                if not self._pauses and self._was_enabled:
                    gc.collect(2 if full() else 0)
                    gc.enable()


COLLECTOR = Collector()
