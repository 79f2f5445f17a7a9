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
When tokens came and how late: stamps in, frozen reports out.

All times come from one monotonic clock, in seconds inside and milliseconds in reports. What is not
known is None, never 0. It reads no clock itself, and knows neither text nor engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
import json
import math
import threading
from typing import Any

from physai_decode.config import DeadlineConfig
from physai_decode.histogram import Distribution
from physai_decode.histogram import percentile
from physai_decode.histogram import SlidingWindow
from physai_decode.request import Call
from physai_decode.roofline import floor_s as least_s
from physai_decode.roofline import r_floor as floor_ratio
from physai_decode.roofline import Roofline

# What the window keeps of each token, by these names of `TokenReport`; `itl_ms` comes first.
WINDOW_FIGURES = (
    'itl_ms', 'host_gap_ms', 'floor_ms', 'r_floor', 'bandwidth_gb_s', 'wait_ms', 'mask_ms')
_WAIT = WINDOW_FIGURES.index('wait_ms')

BEST_COUNT = 30                 # tokens that a window has to have to be the best


@dataclass(frozen=True)
class TokenReport:
    """One token; the keys of ``~/token_stats``."""

    request_id: int
    index: int                        # 0 is the first token of the answer
    token_id: int | None              # None: it came as text
    text: str                         # the piece this token completed; may be empty
    context_tokens: int | None        # tokens of keys and values that the step read
    itl_ms: float | None              # less wait_ms; None for the first token
    device_ms: float | None
    host_gap_ms: float | None
    publish_ms: float | None          # what the token before this one took to publish
    floor_ms: float | None
    r_floor: float | None
    bandwidth_gb_s: float | None
    deadline_missed: bool
    client_id: str = ''               # what the client called its request
    mask_ms: float | None = None      # what the constraint's mask took; None: no constraint
    wait_ms: float | None = None      # for which its step was held back; None: it was not paced
    reasoning: str = ''               # the piece of a thought that this token completed
    tool_calls: tuple[Call, ...] = ()   # calls of tools that it completed


@dataclass(frozen=True)
class ItemReport:
    """One element of an array of an answer; ``~/item`` has its JSON form."""

    request_id: int
    client_id: str                    # what the client called its request
    index: int                        # 0 is the first element of its array
    path: str                         # of the array, as a JSON Pointer; empty: the answer itself
    t_ms: float                       # from the request received to the element known
    value: str                        # its JSON, as the model wrote it

    def to_json(self) -> str:
        """Give the JSON form; the value stands in it as it was written."""
        head = json.dumps({
            'request_id': self.request_id, 'id': self.client_id or None, 'index': self.index,
            'path': self.path, 't_ms': round(self.t_ms, 3)})
        return f'{head[:-1]}, "value": {self.value}}}'


@dataclass(frozen=True)
class RequestReport:
    """One request, also one that was refused; the keys of ``~/request_stats``."""

    request_id: int
    finish_reason: str                # stop tool_calls length deadline cancelled preempted
                                      # rejected error
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
    items: int | None = None          # elements that were given; None: the answer is no JSON
    first_item_ms: float | None = None      # from received to the first of them
    paced: bool = False               # steps were held back; times of tokens are without that
    energy_j: float | None = None     # that the device took, for all programs on it
    j_per_token: float | None = None  # the prompt's part too
    power_w: float | None = None      # its mean, since the request's turn came
    reasoning_tokens: int = 0         # of output_tokens, those of a thought
    reasoning: str = ''               # the thought
    tool_calls: tuple[Call, ...] = ()
    refusal: str = ''                 # rejected: invalid too_large full inactive
    engine: str = ''                  # what answered; empty where nothing did
    fallback: str = ''                # why a local engine did in the server's place
    server_tokens: int | None = None  # of the answer, by the server's count


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
    wait_ms: float | None             # None: no token of the window was paced
    paced: bool                       # the newest token in the window
    best_r_floor: float | None        # the best of all windows that were asked for
    mask_ms: float | None             # of those with a constraint


class Recorder:
    """
    Keeps the times of all requests since activation.

    Requests are recorded by the decode thread; ``window`` may be called from any thread, and
    does its work without a lock that the decode thread waits for. What it reports is exact for up
    to `histogram.EXACT_ROWS` tokens in the window. For more, medians and percentiles are within
    0.5 %, the window begins up to 1/64 of itself too early, and memory grows no further. The
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
        self._tokens = SlidingWindow(window_s, len(WINDOW_FIGURES))
        # Guarded by _lock, as all below.
        self._context_tokens: int | None = None     # of the newest token in the window
        self._paced = False                         # likewise
        self._ttft_last_ms: float | None = None
        self._misses = 0
        self._row = 0
        self._last_due_s = -math.inf                # when the last token with a deadline came
        self._worst_overrun_ms: float | None = None
        self._itl_max_ms: float | None = None
        self._best_r_floor: float | None = None

    def request(self, request_id: int, received_s: float, taken_s: float | None,
                client_id: str = '',
                deadline: Mapping[str, Any] | None = None) -> 'RequestRecorder':
        """
        Begin a request.

        :param received_s: when it was received.
        :param taken_s: when its turn came; None for one that never had its turn.
        :param client_id: what the client called it.
        :param deadline: what replaces the recorder's ``deadline`` for this request, by the names
            of its fields. A field that is absent follows the recorder's, also where that changes.
        """
        return RequestRecorder(self, request_id, received_s, taken_s, client_id, deadline or {})

    def window(self, now_s: float) -> WindowReport:
        """Report on the tokens of the last ``window_s`` seconds before ``now_s``."""
        with self._lock:
            context, paced = self._context_tokens, self._paced
            ttft_last_ms, misses, row = self._ttft_last_ms, self._misses, self._row
            worst_overrun_ms, itl_max_ms = self._worst_overrun_ms, self._itl_max_ms
            if self._is_old(now_s):
                row = 0
        itl, *others = self._tokens.read(now_s)
        medians = {name: percentile(each.ordered, 50)
                   for name, each in zip(WINDOW_FIGURES[1:], others, strict=True)}
        deadline = self.deadline
        roofline = self._roofline if itl.ordered else None
        return WindowReport(
            window_s=self._window_s, count=len(itl.ordered),
            itl_p50_ms=percentile(itl.ordered, 50), itl_p95_ms=percentile(itl.ordered, 95),
            itl_p99_ms=percentile(itl.ordered, 99), itl_max_ms=itl.largest,
            jitter_ms=itl.deviation, ttft_last_ms=ttft_last_ms,
            ttft_deadline_ms=deadline.ttft_ms or None,
            token_deadline_ms=deadline.token_ms or None,
            request_deadline_ms=deadline.request_ms or None,
            deadline_misses=misses, consecutive_misses=row,
            miss_limit_reached=row >= deadline.max_consecutive_misses,
            worst_overrun_ms=worst_overrun_ms, itl_max_activation_ms=itl_max_ms,
            context_tokens=context if itl.ordered else None,
            kv_bytes=None if roofline is None or context is None else roofline.kv_bytes(context),
            paced=paced and bool(itl.ordered),
            best_r_floor=self._best(medians['r_floor'], len(itl.ordered)), **medians)

    def _best(self, r_floor: float | None, count: int) -> float | None:
        """Take a window's share of the floor, and give the best so far."""
        with self._lock:
            if r_floor is not None and count >= BEST_COUNT:
                self._best_r_floor = _largest(self._best_r_floor, r_floor)
            return self._best_r_floor

    def _add_first(self, now_s: float, ttft_ms: float) -> None:
        """Add a request's first token."""
        with self._lock:
            self._ttft_last_ms = ttft_ms
            if self._is_old(now_s):
                self._row = 0

    def _add_further(self, now_s: float, context_tokens: int | None, itl_ms: float,
                     figures: tuple[float | None, ...]) -> None:
        """Add a further token, with its `WINDOW_FIGURES`."""
        self._tokens.add(now_s, figures)
        with self._lock:
            self._context_tokens, self._paced = context_tokens, figures[_WAIT] is not None
            self._itl_max_ms = _largest(self._itl_max_ms, itl_ms)

    def _add_due(self, now_s: float, overrun_ms: float) -> None:
        """Add how late a token is that has a deadline; not late where that is not above 0."""
        with self._lock:
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
    Keeps the times of one request; used by one thread, and at its end by another.

    A miss is a first token later than ``ttft_ms``, a further token later than ``token_ms`` and an
    end later than ``request_ms``; misses in a row are of tokens. Its figures are exact for up to
    `histogram.EXACT_VALUES` tokens; for more, medians and percentiles are within 0.5 %, and
    memory grows no further.
    """

    def __init__(self, recorder: Recorder, request_id: int, received_s: float,
                 taken_s: float | None, client_id: str, deadline: Mapping[str, Any]) -> None:
        """Begin; see ``Recorder.request``."""
        self._recorder = recorder
        self._id = request_id
        self._client_id = client_id
        self._received_s = received_s
        self._taken_s = taken_s
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._count = 0
        self._itl_ms = Distribution()
        self._r_floor = Distribution()
        self._misses = 0
        self._row = 0
        self._longest_row = 0
        self._worst_overrun_ms: float | None = None
        self.prompt_tokens: int | None = None       # set by the owner when known
        self.cached_tokens: int | None = None
        self.seed: int | None = None
        self.items: int | None = None               # likewise, where the answer is JSON: 0
        self._first_item_ms: float | None = None
        self.paced = False
        self.energy_j: float | None = None
        self.reasoning_tokens = 0
        self.server_tokens: int | None = None
        self.engine = self.fallback = ''
        self._own = deadline
        self._deadlines = (recorder.deadline, replace(recorder.deadline, **deadline))

    @property
    def deadline(self) -> DeadlineConfig:
        """Give the request's own deadlines, and the recorder's where it has none."""
        common, own = self._deadlines
        if self._recorder.deadline is not common:
            common = self._recorder.deadline
            own = replace(common, **self._own)
            self._deadlines = common, own
        return own

    def token(self, now_s: float, token_id: int | None, text: str,
              device_s: float | None = None, publish_s: float | None = None,
              mask_s: float | None = None, waited_s: float | None = None) -> TokenReport:
        """
        Record one token.

        :param now_s: when the host knew the token. Tokens that one step brought together share
            their time: all but the first have an ``itl_ms`` of 0.
        :param token_id: None where it came as text: then its context and its floor are not known.
        :param text: the piece of text that it completed.
        :param device_s: its step's time on the device, in seconds.
        :param publish_s: what publishing the token before it took, in seconds.
        :param mask_s: what the constraint's mask took on the host, in seconds.
        :param waited_s: for how long its step was held back, in seconds, which counts as no time
            of the token; None where it is not paced.
        """
        recorder, index = self._recorder, self._count
        deadline = self.deadline
        context = None if token_id is None else (self.prompt_tokens or 0) + index
        device_ms = _to_ms(device_s)
        itl_ms = gap_ms = floor_ms = r_floor = bandwidth_gb_s = None
        if self._last_s is None:
            self._first_s = now_s
            ttft_ms = 1e3 * (now_s - self._received_s)
            overrun_ms = ttft_ms - deadline.ttft_ms if deadline.ttft_ms else None
            recorder._add_first(now_s, ttft_ms)
        else:
            itl_s = now_s - self._last_s - (waited_s or 0.0)
            itl_ms = 1e3 * itl_s
            overrun_ms = itl_ms - deadline.token_ms if deadline.token_ms else None
            if device_ms is not None:
                gap_ms = itl_ms - device_ms
            roofline = recorder._roofline
            if roofline is not None and context is not None and itl_s > 0:
                step_bytes = roofline.step_bytes(context)
                floor_s = least_s(step_bytes, 0, roofline.peak.floor_bytes_per_s)
                floor_ms, r_floor = _to_ms(floor_s), floor_ratio(floor_s, itl_s)
                bandwidth_gb_s = step_bytes / itl_s / 1e9
            recorder._add_further(now_s, context, itl_ms, (
                itl_ms, gap_ms, floor_ms, r_floor, bandwidth_gb_s, _to_ms(waited_s),
                _to_ms(mask_s)))
            self._itl_ms.add(itl_ms)
            if r_floor is not None:
                self._r_floor.add(r_floor)
        self._last_s = now_s
        self._count += 1
        missed = overrun_ms is not None and overrun_ms > 0
        if overrun_ms is not None:
            self._row = self._row + 1 if missed else 0
            self._longest_row = max(self._longest_row, self._row)
            self._miss(overrun_ms)
            recorder._add_due(now_s, overrun_ms)
        return TokenReport(
            self._id, index, token_id, text, context, itl_ms, device_ms, gap_ms,
            _to_ms(publish_s), floor_ms, r_floor, bandwidth_gb_s, missed, self._client_id,
            _to_ms(mask_s), _to_ms(waited_s))

    def item(self, now_s: float, path: str, index: int, value: str) -> ItemReport:
        """
        Record one element of the answer.

        :param now_s: when it was complete.
        :param path: and the following: see `ItemReport`.
        """
        t_ms = 1e3 * (now_s - self._received_s)
        if self._first_item_ms is None:
            self._first_item_ms = t_ms
        self.items = (self.items or 0) + 1
        return ItemReport(self._id, self._client_id, index, path, t_ms, value)

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
        itl = self._itl_ms.summary()
        first_s, last_s, taken_s = self._first_s, self._last_s, self._taken_s
        energy_j = self.energy_j
        busy_s = 0.0 if taken_s is None else now_s - taken_s
        decode_s = 0.0 if first_s is None or last_s is None else last_s - first_s
        return RequestReport(
            request_id=self._id, finish_reason=finish_reason, message=message,
            prompt_tokens=self.prompt_tokens, cached_tokens=self.cached_tokens,
            output_tokens=self._count,
            queue_ms=None if taken_s is None else 1e3 * (taken_s - self._received_s),
            prefill_ms=None if first_s is None or taken_s is None else 1e3 * (first_s - taken_s),
            ttft_ms=None if first_s is None else 1e3 * (first_s - self._received_s),
            total_ms=total_ms,
            itl_p50_ms=percentile(itl.ordered, 50), itl_p95_ms=percentile(itl.ordered, 95),
            itl_p99_ms=percentile(itl.ordered, 99), itl_max_ms=itl.largest,
            jitter_ms=itl.deviation,
            tokens_per_s=len(itl.ordered) / decode_s if decode_s > 0 else None,
            r_floor_p50=percentile(self._r_floor.summary().ordered, 50),
            deadline_misses=self._misses, max_consecutive_misses=self._longest_row,
            worst_overrun_ms=self._worst_overrun_ms,
            cancel_ms=None if cancel_s is None else 1e3 * (now_s - cancel_s),
            client_id=self._client_id, seed=self.seed, items=self.items,
            first_item_ms=self._first_item_ms, paced=self.paced, energy_j=energy_j,
            j_per_token=None if energy_j is None or not self._count else energy_j / self._count,
            power_w=None if energy_j is None or not busy_s else energy_j / busy_s,
            reasoning_tokens=self.reasoning_tokens, engine=self.engine, fallback=self.fallback,
            server_tokens=self.server_tokens)

    def _miss(self, overrun_ms: float) -> None:
        if overrun_ms > 0:
            self._misses += 1
            self._worst_overrun_ms = _largest(self._worst_overrun_ms, overrun_ms)


def _largest(known: float | None, value: float) -> float:
    return value if known is None else max(known, value)


def _to_ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
