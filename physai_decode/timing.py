"""
When tokens came and how late: stamps in, frozen reports out.

All times come from one monotonic clock, in seconds inside and milliseconds in reports. What is not
known is None, never 0. It reads no clock itself, and knows neither text nor engines.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import math
import threading
from typing import Any
from typing import NamedTuple

from physai_decode.config import DeadlineConfig
from physai_decode.roofline import r_floor as roofline_ratio
from physai_decode.roofline import Roofline


@dataclass(frozen=True)
class TokenReport:
    """One token; the keys of ``~/token_stats``."""

    request_id: int
    index: int                        # 0 is the first token of the answer
    token_id: int
    text: str                         # the piece this token completed; may be empty
    context_tokens: int               # tokens of keys and values that the step read
    itl_ms: float | None              # None for the first token
    device_ms: float | None
    host_gap_ms: float | None
    publish_ms: float | None          # what the token before this one took to publish
    floor_ms: float | None
    r_floor: float | None
    bandwidth_gb_s: float | None
    deadline_missed: bool
    client_id: str = ''               # what the client called its request


@dataclass(frozen=True)
class RequestReport:
    """One request, also one that was refused; the keys of ``~/request_stats``."""

    request_id: int
    finish_reason: str                # stop length deadline cancelled preempted rejected error
    message: str                      # why, in words, where the reason alone does not say it
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    queue_ms: float | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    itl_p99_ms: float | None = None
    itl_max_ms: float | None = None
    jitter_ms: float | None = None
    tokens_per_s: float | None = None
    r_floor_p50: float | None = None
    deadline_misses: int = 0
    max_consecutive_misses: int = 0
    worst_overrun_ms: float | None = None
    cancel_ms: float | None = None    # from the cancel asked for to the request ended
    client_id: str = ''               # what the client called it
    seed: int | None = None           # that its tokens were drawn with


@dataclass(frozen=True)
class WindowReport:
    """The tokens of the last ``window_s`` seconds, and counts since the recorder was made."""

    window_s: float
    count: int                        # tokens with an itl_ms in the window
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    itl_p99_ms: float | None
    itl_max_ms: float | None
    jitter_ms: float | None           # standard deviation of itl_ms
    ttft_last_ms: float | None
    ttft_deadline_ms: float | None    # None: no deadline
    token_deadline_ms: float | None
    request_deadline_ms: float | None
    deadline_misses: int              # since activation
    consecutive_misses: int           # late tokens in a row, up to now
    miss_limit_reached: bool          # consecutive_misses >= deadline.max_consecutive_misses
    worst_overrun_ms: float | None    # since activation
    itl_max_activation_ms: float | None
    context_tokens: int | None        # of the newest token in the window
    kv_bytes: int | None              # at that context
    floor_ms: float | None            # medians over the window
    r_floor: float | None
    bandwidth_gb_s: float | None
    host_gap_ms: float | None


class Recorder:
    """
    Keeps the times of all requests since activation.

    Requests are recorded by the decode thread; ``window`` may be called from any thread. The
    recorder never sees a warm-up: an engine does that before it can be had.
    """

    def __init__(self, window_s: float, deadline: DeadlineConfig,
                 roofline: Roofline | None = None) -> None:
        """
        Start with nothing recorded.

        :param window_s: seconds that ``window`` looks back.
        :param deadline: may be replaced at any time: ``recorder.deadline = ...``.
        :param roofline: the floor; None where there is none to compare with.
        """
        self.deadline = deadline
        self._window_s = window_s
        self._roofline = roofline
        self._lock = threading.Lock()
        self._samples: deque[_Sample] = deque()     # guarded by _lock, as all below
        self._ttft_last_ms: float | None = None
        self._misses = 0
        self._row = 0
        self._last_due_s = -math.inf                # when the last token with a deadline came
        self._worst_overrun_ms: float | None = None
        self._itl_max_ms: float | None = None

    def request(self, request_id: int, received_s: float, taken_s: float | None,
                client_id: str = '',
                deadline: Mapping[str, Any] | None = None) -> 'RequestRecorder':
        """Begin a request that was received and taken at these times in s; None: never taken."""
        return RequestRecorder(self, request_id, received_s, taken_s, client_id, deadline or {})

    def window(self, now_s: float) -> WindowReport:
        """Report on the tokens of the last ``window_s`` seconds before ``now_s``."""
        with self._lock:
            self._forget(now_s)
            samples = list(self._samples)
            ttft_last_ms, misses, row = self._ttft_last_ms, self._misses, self._row
            worst_overrun_ms, itl_max_ms = self._worst_overrun_ms, self._itl_max_ms
            if self._is_old(now_s):
                row = 0
        itl = sorted(sample.itl_ms for sample in samples)
        deadline = self.deadline
        context = samples[-1].context_tokens if samples else None
        return WindowReport(
            window_s=self._window_s, count=len(samples),
            itl_p50_ms=percentile(itl, 50), itl_p95_ms=percentile(itl, 95),
            itl_p99_ms=percentile(itl, 99), itl_max_ms=itl[-1] if itl else None,
            jitter_ms=deviation(itl), ttft_last_ms=ttft_last_ms,
            ttft_deadline_ms=deadline.ttft_ms or None,
            token_deadline_ms=deadline.token_ms or None,
            request_deadline_ms=deadline.request_ms or None,
            deadline_misses=misses, consecutive_misses=row,
            miss_limit_reached=row >= deadline.max_consecutive_misses,
            worst_overrun_ms=worst_overrun_ms, itl_max_activation_ms=itl_max_ms,
            context_tokens=context,
            kv_bytes=(self._roofline.kv_bytes(context)
                      if self._roofline is not None and context is not None else None),
            floor_ms=_median(sample.floor_ms for sample in samples),
            r_floor=_median(sample.r_floor for sample in samples),
            bandwidth_gb_s=_median(sample.bandwidth_gb_s for sample in samples),
            host_gap_ms=_median(sample.host_gap_ms for sample in samples))

    def _forget(self, now_s: float) -> None:
        """Drop what has left the window; amortised, each sample is dropped once."""
        while self._samples and self._samples[0].now_s < now_s - self._window_s:
            self._samples.popleft()

    def _add(self, now_s: float, sample: '_Sample | None', ttft_ms: float | None,
             overrun_ms: float | None) -> None:
        """Add a token: its sample where it has one, how late it is, None without a deadline."""
        with self._lock:
            if sample is not None:
                self._forget(now_s)
                self._samples.append(sample)
                self._itl_max_ms = _largest(self._itl_max_ms, sample.itl_ms)
            else:
                self._ttft_last_ms = ttft_ms
                if self._is_old(now_s):
                    self._row = 0
            if overrun_ms is not None:
                self._last_due_s = now_s
                self._row = self._row + 1 if overrun_ms > 0 else 0
                self._count(overrun_ms)

    def _is_old(self, now_s: float) -> bool:
        """Tell whether no token with a deadline came for a whole window: its row is over."""
        return self._last_due_s < now_s - self._window_s

    def _add_request(self, overrun_ms: float) -> None:
        with self._lock:
            self._count(overrun_ms)

    def _count(self, overrun_ms: float) -> None:
        if overrun_ms > 0:
            self._misses += 1
            self._worst_overrun_ms = _largest(self._worst_overrun_ms, overrun_ms)


class RequestRecorder:
    """
    Keeps the times of one request; used by one thread.

    A miss is a first token later than ``ttft_ms``, a further token later than ``token_ms`` and an
    end later than ``request_ms``; misses in a row are of tokens.
    """

    def __init__(self, recorder: Recorder, request_id: int, received_s: float,
                 taken_s: float | None, client_id: str, deadline: Mapping[str, Any]) -> None:
        """Begin; see ``Recorder.request``."""
        self._recorder = recorder
        self._client_id, self._own = client_id, deadline
        self.seed: int | None = None
        self._id = request_id
        self._received_s = received_s
        self._taken_s = taken_s
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._count = 0
        self._itl_ms: list[float] = []
        self._r_floor: list[float] = []
        self._misses = 0
        self._row = 0
        self._longest_row = 0
        self._worst_overrun_ms: float | None = None
        self.prompt_tokens: int | None = None       # set by the owner when known
        self.cached_tokens: int | None = None

    @property
    def deadline(self) -> DeadlineConfig:
        """The request's deadlines."""
        return replace(self._recorder.deadline, **self._own)

    def token(self, now_s: float, token_id: int, text: str, device_s: float | None = None,
              publish_s: float | None = None) -> TokenReport:
        """
        Record one token.

        :param now_s: when the host knew the token. Tokens that one step brought together share
            their time: all but the first have an ``itl_ms`` of 0.
        :param text: the piece of text that it completed.
        :param device_s: its step's time on the device, in seconds.
        :param publish_s: what publishing the token before it took, in seconds.
        """
        recorder, index = self._recorder, self._count
        deadline = self.deadline
        context = (self.prompt_tokens or 0) + index
        device_ms = _to_ms(device_s)
        itl_ms = gap_ms = floor_ms = r_floor = bandwidth_gb_s = sample = ttft_ms = None
        if self._last_s is None:
            self._first_s = now_s
            ttft_ms = 1e3 * (now_s - self._received_s)
            overrun_ms = ttft_ms - deadline.ttft_ms if deadline.ttft_ms else None
        else:
            itl_s = now_s - self._last_s
            itl_ms = 1e3 * itl_s
            overrun_ms = itl_ms - deadline.token_ms if deadline.token_ms else None
            if device_ms is not None:
                gap_ms = itl_ms - device_ms
            if recorder._roofline is not None and itl_s > 0:
                roofline = recorder._roofline
                floor_s = roofline.floor_s(context)
                floor_ms, r_floor = _to_ms(floor_s), roofline_ratio(floor_s, itl_s)
                bandwidth_gb_s = roofline.step_bytes(context) / itl_s / 1e9
            sample = _Sample(now_s, context, itl_ms, gap_ms, floor_ms, r_floor, bandwidth_gb_s)
            self._itl_ms.append(itl_ms)
            if r_floor is not None:
                self._r_floor.append(r_floor)
        self._last_s = now_s
        self._count += 1
        missed = overrun_ms is not None and overrun_ms > 0
        if overrun_ms is not None:
            self._row = self._row + 1 if missed else 0
            self._longest_row = max(self._longest_row, self._row)
            self._miss(overrun_ms)
        recorder._add(now_s, sample, ttft_ms, overrun_ms)
        return TokenReport(
            self._id, index, token_id, text, context, itl_ms, device_ms, gap_ms,
            _to_ms(publish_s), floor_ms, r_floor, bandwidth_gb_s, missed,
            self._client_id)

    def finish(self, now_s: float, finish_reason: str, message: str = '',
               cancel_s: float | None = None) -> RequestReport:
        """
        End the request.

        :param now_s: when it ended.
        :param message: why, in words, where the reason alone does not say it.
        :param cancel_s: when its end was asked for, where it was.
        """
        request_ms = self.deadline.request_ms
        total_ms = 1e3 * (now_s - self._received_s)
        if request_ms and total_ms > request_ms:
            self._miss(total_ms - request_ms)
            self._recorder._add_request(total_ms - request_ms)
        itl = sorted(self._itl_ms)
        first_s, taken_s = self._first_s, self._taken_s
        decode_ms = math.fsum(itl)
        return RequestReport(
            request_id=self._id, finish_reason=finish_reason, message=message,
            prompt_tokens=self.prompt_tokens, cached_tokens=self.cached_tokens,
            output_tokens=self._count,
            queue_ms=None if taken_s is None else 1e3 * (taken_s - self._received_s),
            prefill_ms=None if first_s is None or taken_s is None else 1e3 * (first_s - taken_s),
            ttft_ms=None if first_s is None else 1e3 * (first_s - self._received_s),
            total_ms=total_ms,
            itl_p50_ms=percentile(itl, 50), itl_p95_ms=percentile(itl, 95),
            itl_p99_ms=percentile(itl, 99), itl_max_ms=itl[-1] if itl else None,
            jitter_ms=deviation(itl),
            tokens_per_s=1e3 * len(itl) / decode_ms if decode_ms > 0 else None,
            r_floor_p50=_median(self._r_floor),
            deadline_misses=self._misses, max_consecutive_misses=self._longest_row,
            worst_overrun_ms=self._worst_overrun_ms,
            cancel_ms=None if cancel_s is None else 1e3 * (now_s - cancel_s),
            client_id=self._client_id, seed=self.seed)

    def _miss(self, overrun_ms: float) -> None:
        if overrun_ms > 0:
            self._misses += 1
            self._worst_overrun_ms = _largest(self._worst_overrun_ms, overrun_ms)


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """
    Give a percentile by linear interpolation between the two nearest ranks.

    :param ordered: values in ascending order.
    :param percent: 0 to 100.
    :return: None where there are no values.
    """
    if not ordered:
        return None
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def deviation(values: Sequence[float]) -> float | None:
    """Give the standard deviation of all these values, None for fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


class _Sample(NamedTuple):
    """What the window keeps of one token."""

    now_s: float
    context_tokens: int
    itl_ms: float
    host_gap_ms: float | None
    floor_ms: float | None
    r_floor: float | None
    bandwidth_gb_s: float | None


def _median(values: Iterable[float | None]) -> float | None:
    return percentile(sorted(value for value in values if value is not None), 50)


def _largest(known: float | None, value: float) -> float:
    return value if known is None else max(known, value)


def _to_ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
