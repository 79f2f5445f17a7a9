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
Computes latencies and deadline misses from time stamps, and reports them.

All times are of one monotonic clock, in seconds internally and in milliseconds in reports. An
unknown value is None, never 0. This module reads no clock itself.
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

# The figures of a token that the window keeps; `itl_ms` has to be the first.
WINDOW_FIGURES = ('itl_ms', 'host_gap_ms', 'floor_ms', 'r_floor', 'bandwidth_gb_s', 'wait_ms',
                  'mask_ms', 'draft_ms')
_R_FLOOR, _WAIT = map(WINDOW_FIGURES.index, ('r_floor', 'wait_ms'))

BEST_COUNT = 30                 # tokens that a window needs to count as the best


@dataclass(frozen=True)
class TokenReport:
    """One token; the keys of ``~/token_stats``."""

    request_id: int
    index: int                        # 0 is the first token of the answer
    token_id: int | None              # None: a server sent text
    text: str                         # the piece that this token completed; may be empty
    context_tokens: int | None        # tokens in the KV cache that the step read
    itl_ms: float | None              # without wait_ms; None for the first token
    device_ms: float | None
    host_gap_ms: float | None
    publish_ms: float | None          # time to publish the previous token
    floor_ms: float | None
    r_floor: float | None
    bandwidth_gb_s: float | None
    deadline_missed: bool
    client_id: str = ''               # the client's name for its request
    mask_ms: float | None = None      # time to compute the constraint's mask; None: unconstrained
    wait_ms: float | None = None      # delay of the step by pacing; None: not paced
    reasoning: str = ''               # the piece of a thought that this token completed
    tool_calls: tuple[Call, ...] = ()   # the tool calls that this token completed
    pass_tokens: int | None = 1       # number of tokens of its pass; None if a server sent text


@dataclass(frozen=True)
class ItemReport:
    """One element of an array in an answer, for ``~/item``."""

    request_id: int
    client_id: str                    # the client's name for its request
    index: int                        # 0 is the first element of the array
    path: str                         # JSON Pointer of the array; empty: the answer itself
    t_ms: float                       # from the receipt of the request to the end of the element
    value: str                        # JSON, as the model wrote it

    def to_json(self) -> str:
        """Return the JSON form, with the value as the model wrote it."""
        head = json.dumps({
            'request_id': self.request_id, 'id': self.client_id or None, 'index': self.index,
            'path': self.path, 't_ms': round(self.t_ms, 3)})
        return f'{head[:-1]}, "value": {self.value}}}'


@dataclass(frozen=True)
class RequestReport:
    """One request, possibly refused; the keys of ``~/request_stats``."""

    request_id: int
    finish_reason: str                # stop tool_calls length deadline cancelled preempted
                                      # rejected error
    message: str                      # details of the finish reason; may be empty
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
    cancel_ms: float | None = None    # from the cancel to the end of the request
    client_id: str = ''               # the client's name for the request
    seed: int | None = None           # of the sampler
    items: int | None = None          # elements reported; None: the answer is not JSON
    first_item_ms: float | None = None      # from the receipt of the request to the first element
    paced: bool = False               # whether pacing delayed steps; itl_ms is without the delay
    energy_j: float | None = None     # used by the device, including all other programs on it
    j_per_token: float | None = None  # including the energy of the prompt
    power_w: float | None = None      # mean while the engine that answered ran
    reasoning_tokens: int = 0         # the part of output_tokens that belongs to a thought
    reasoning: str = ''               # the thought
    tool_calls: tuple[Call, ...] = ()
    refusal: str = ''                 # rejected: invalid too_large full inactive
    engine: str = ''                  # that answered; empty if none did
    fallback: str = ''                # why the local engine answered instead of the server
    server_tokens: int | None = None  # tokens of the answer, as the server counted them
    encode_ms: float | None = None    # the part of prefill_ms for the chat template and tokenizer
    sample_ms: float | None = None    # the part of prefill_ms for the choice of the first token
    ttft_floor_ms: float | None = None  # to read the weights, and the keys and values in the cache
    r_ttft: float | None = None       # ttft_floor_ms over prefill_ms
    pass_tokens: float | None = None  # mean tokens of a pass, after the first token


# Fields of a `WindowReport` that are not keys of ``/diagnostics``.
INTERNAL = ('miss_limit_reached', 'context_tokens', 'kv_bytes', 'best_r_floor', 'drafted',
            'draft_ms', 'floor_count')


@dataclass(frozen=True)
class WindowReport:
    """The tokens of the last ``window_s`` seconds, and counts since activation."""

    window_s: float
    count: int                        # tokens with an itl_ms in the window
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    itl_p99_ms: float | None
    itl_max_ms: float | None
    jitter_ms: float | None           # standard deviation of itl_ms
    ttft_last_ms: float | None        # of the newest answer that had a token
    ttft_deadline_ms: float | None    # None: no deadline
    token_deadline_ms: float | None
    request_deadline_ms: float | None
    deadline_misses: int              # since activation
    consecutive_misses: int           # late tokens in a row, up to the newest token
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
    paced: bool                       # whether the newest token in the window was paced
    best_r_floor: float | None        # the best of all windows since the peak last changed
    mask_ms: float | None             # median of the constrained tokens
    drafted: bool                     # whether a pass in the window had a draft
    draft_ms: float | None            # median time of the draft model, 0 for a token without it
    floor_count: int                  # tokens in the window with an r_floor


class Recorder:
    """
    Records the times of all requests since activation.

    The decode thread records requests. Any thread may call ``window``, which never blocks the
    decode thread for long. Its report is exact for up to `histogram.EXACT_ROWS` tokens in the
    window. Beyond that, memory is bounded, medians and percentiles are within 0.5 %, and the
    window starts up to 1/64 of its length too early. Warm-up steps are not recorded.
    """

    def __init__(self, window_s: float, deadline: DeadlineConfig,
                 roofline: Roofline | None = None) -> None:
        """
        Start with an empty record.

        :param window_s: length of the window in seconds.
        :param deadline: can be replaced at any time: ``recorder.deadline = ...``.
        :param roofline: the floor of a step; None if there is none.
        """
        self.deadline = deadline
        self._window_s = window_s
        self._roofline = roofline
        self._lock = threading.Lock()
        self._tokens = SlidingWindow(window_s, len(WINDOW_FIGURES))
        # _lock guards everything below.
        self._context_tokens: int | None = None     # of the newest token in the window
        self._paced = False                         # whether that token was paced
        self._drafted_s = -math.inf                 # when the last pass with a draft ended
        self._ttft_last_ms: float | None = None
        self._misses = 0
        self._consecutive_misses = 0
        self._last_deadline_s = -math.inf           # time of the last token with a deadline
        self._worst_overrun_ms: float | None = None
        self._itl_max_ms: float | None = None
        self._best_r_floor: float | None = None
        self._best_peak = roofline and roofline.peak
        self._best_from_s = -math.inf               # earlier windows have tokens of another peak

    def request(self, request_id: int, received_s: float, taken_s: float | None,
                client_id: str = '',
                deadline: Mapping[str, Any] | None = None) -> 'RequestRecorder':
        """
        Start to record a request.

        :param received_s: when the request was received.
        :param taken_s: when its turn came; None if that never happened.
        :param client_id: the client's name for the request.
        :param deadline: fields that override ``deadline`` of the recorder for this request. All
            other fields follow that of the recorder, including later changes.
        """
        return RequestRecorder(self, request_id, received_s, taken_s, client_id, deadline or {})

    @property
    def deadline_misses(self) -> int:
        """Number of missed deadlines so far."""
        with self._lock:
            return self._misses

    def window(self, now_s: float) -> WindowReport:
        """Report on the tokens of the last ``window_s`` seconds before ``now_s``."""
        with self._lock:
            context, paced = self._context_tokens, self._paced
            drafted = self._drafted_s >= now_s - self._window_s
            ttft_last_ms, misses = self._ttft_last_ms, self._misses
            worst_overrun_ms, itl_max_ms = self._worst_overrun_ms, self._itl_max_ms
            consecutive_misses = 0 if self._is_stale(now_s) else self._consecutive_misses
        itl, *summaries = self._tokens.read(now_s)
        medians = {name: percentile(each.ordered, 50)
                   for name, each in zip(WINDOW_FIGURES[1:], summaries, strict=True)}
        floor_count = len(summaries[_R_FLOOR - 1].ordered)
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
            deadline_misses=misses, consecutive_misses=consecutive_misses,
            miss_limit_reached=consecutive_misses >= deadline.max_consecutive_misses,
            worst_overrun_ms=worst_overrun_ms, itl_max_activation_ms=itl_max_ms,
            context_tokens=context if itl.ordered else None,
            kv_bytes=None if roofline is None or context is None else roofline.kv_bytes(context),
            paced=paced and bool(itl.ordered), drafted=drafted,
            floor_count=floor_count,
            best_r_floor=self._update_best(now_s, medians['r_floor'], floor_count), **medians)

    def _update_best(self, now_s: float, r_floor: float | None, count: int) -> float | None:
        """Update the best r_floor with that of a window, and return it."""
        peak = self._roofline and self._roofline.peak
        with self._lock:
            if peak != self._best_peak:
                self._best_peak, self._best_r_floor = peak, None
                self._best_from_s = now_s + self._window_s
            if r_floor is not None and count >= BEST_COUNT and now_s > self._best_from_s:
                self._best_r_floor = _larger(self._best_r_floor, r_floor)
            return self._best_r_floor

    def _add_first(self, now_s: float, ttft_ms: float) -> None:
        """Add the first token of a request."""
        with self._lock:
            self._ttft_last_ms = ttft_ms
            if self._is_stale(now_s):
                self._consecutive_misses = 0

    def _add_next(self, now_s: float, context_tokens: int | None, itl_ms: float,
                  drafted: bool, figures: tuple[float | None, ...]) -> None:
        """Add a token after the first, with its `WINDOW_FIGURES`."""
        self._tokens.add(now_s, figures)
        with self._lock:
            self._context_tokens, self._paced = context_tokens, figures[_WAIT] is not None
            self._itl_max_ms = _larger(self._itl_max_ms, itl_ms)
            if drafted:
                self._drafted_s = now_s

    def _add_token_overrun(self, now_s: float, overrun_ms: float) -> None:
        """Add the overrun of a token that has a deadline; the token is late if it is positive."""
        with self._lock:
            self._last_deadline_s = now_s
            self._consecutive_misses = self._consecutive_misses + 1 if overrun_ms > 0 else 0
            self._add_overrun(overrun_ms)

    def _is_stale(self, now_s: float) -> bool:
        """Return whether the last token with a deadline is older than the window."""
        return self._last_deadline_s < now_s - self._window_s

    def _add_request_overrun(self, overrun_ms: float) -> None:
        with self._lock:
            self._add_overrun(overrun_ms)

    def _add_overrun(self, overrun_ms: float) -> None:
        if overrun_ms > 0:
            self._misses += 1
            self._worst_overrun_ms = _larger(self._worst_overrun_ms, overrun_ms)


class RequestRecorder:
    """
    Records the times of one request; used by one thread at a time.

    A deadline miss is a first token after ``ttft_ms``, a later token after ``token_ms``, or an end
    after ``request_ms``. Only tokens count as consecutive misses. The figures are exact for up to
    `histogram.EXACT_VALUES` tokens. Beyond that, memory is bounded, and medians and percentiles
    are within 0.5 %.
    """

    def __init__(self, recorder: Recorder, request_id: int, received_s: float,
                 taken_s: float | None, client_id: str, deadline: Mapping[str, Any]) -> None:
        """Start to record; see ``Recorder.request``."""
        self._recorder = recorder
        self._id = request_id
        self._client_id = client_id
        self._received_s = received_s
        self._taken_s = taken_s
        self._begun_s = taken_s                     # when the engine that answers took over
        self._first_s: float | None = None
        self._last_s: float | None = None           # when the newest pass ended
        self._share_s = 0.0                         # each token's share of the time of that pass
        self._due = 0                               # tokens of that pass that are still to come
        self._passes = 0                            # after the first token
        self._count = 0
        self._itl_ms = Distribution()
        self._r_floor = Distribution()
        self._misses = 0
        self._consecutive_misses = 0
        self._max_consecutive_misses = 0
        self._worst_overrun_ms: float | None = None
        self.prompt_tokens: int | None = None       # the owner sets these when they are known
        self.cached_tokens: int | None = None
        self.seed: int | None = None
        self.items: int | None = None               # the owner sets 0 if the answer is JSON
        self._first_item_ms: float | None = None
        self.paced = False
        self.energy_j: float | None = None
        self.reasoning_tokens = 0
        self.server_tokens: int | None = None
        self.encoded_s: float | None = None         # when the prompt was ids; not on a server
        self.added_tokens = 0                       # fed in mid-answer, to end a thought
        self.sample_s: float | None = None          # duration of the first choice
        self.engine = self.fallback = ''
        self._overrides = deadline
        self._deadlines = (recorder.deadline, replace(recorder.deadline, **deadline))

    @property
    def deadline(self) -> DeadlineConfig:
        """The deadlines of the request: those of the recorder with its own overrides."""
        common, own = self._deadlines
        if self._recorder.deadline is not common:
            common = self._recorder.deadline
            own = replace(common, **self._overrides)
            self._deadlines = common, own
        return own

    def token(self, now_s: float, token_id: int | None, text: str,
              device_s: float | None = None, publish_s: float | None = None,
              mask_s: float | None = None, waited_s: float | None = None,
              pass_tokens: int = 1, draft_s: float | None = None) -> TokenReport:
        """
        Record one token.

        :param now_s: when the token was known on the host.
        :param token_id: None if a server sent text; context and floor are unknown then.
        :param text: the piece of text that the token completed.
        :param device_s: time of the pass on the device, in seconds.
        :param publish_s: time to publish the previous token, in seconds.
        :param mask_s: time to compute the constraint's masks on the host, in seconds.
        :param waited_s: delay of the pass by pacing, in seconds, which does not count as latency;
            None if not paced.
        :param pass_tokens: number of tokens of the pass, reported one by one; they share its times
            and floor evenly.
        :param draft_s: the part of ``device_s`` in which a draft model ran; None if the pass had
            no draft.
        """
        recorder, index = self._recorder, self._count
        deadline = self.deadline
        context = None if token_id is None else \
            (self.prompt_tokens or 0) + self.added_tokens + index
        device_ms, mask_ms, wait_ms, draft_ms = (
            None if each is None else 1e3 * each / pass_tokens
            for each in (device_s, mask_s, waited_s, draft_s))
        itl_ms = gap_ms = floor_ms = r_floor = bandwidth_gb_s = None
        if self._last_s is None:
            self._first_s = self._last_s = now_s
            self._due = pass_tokens - 1
            ttft_ms = 1e3 * (now_s - self._received_s)
            overrun_ms = ttft_ms - deadline.ttft_ms if deadline.ttft_ms else None
            recorder._add_first(now_s, ttft_ms)
        else:
            if not self._due or now_s != self._last_s:
                self._share_s = (now_s - self._last_s - (waited_s or 0.0)) / pass_tokens
                self._last_s, self._due = now_s, pass_tokens
                self._passes += token_id is not None
            self._due -= 1
            itl_s = self._share_s
            itl_ms = 1e3 * itl_s
            overrun_ms = itl_ms - deadline.token_ms if deadline.token_ms else None
            if device_ms is not None:
                gap_ms = itl_ms - device_ms
            roofline = recorder._roofline
            if roofline is not None and context is not None and itl_s > 0:
                step_bytes = roofline.step_bytes(context) / pass_tokens
                floor_s = least_s(step_bytes, 0, roofline.peak.floor_bytes_per_s)
                floor_ms, r_floor = _to_ms(floor_s), floor_ratio(floor_s, itl_s)
                bandwidth_gb_s = step_bytes / itl_s / 1e9
            recorder._add_next(now_s, context, itl_ms, draft_ms is not None, (
                itl_ms, gap_ms, floor_ms, r_floor, bandwidth_gb_s, wait_ms, mask_ms,
                draft_ms or 0.0))
            self._itl_ms.add(itl_ms)
            if r_floor is not None:
                self._r_floor.add(r_floor)
        self._count += 1
        missed = overrun_ms is not None and overrun_ms > 0
        if overrun_ms is not None:
            self._consecutive_misses = self._consecutive_misses + 1 if missed else 0
            self._max_consecutive_misses = max(
                self._max_consecutive_misses, self._consecutive_misses)
            self._add_overrun(overrun_ms)
            recorder._add_token_overrun(now_s, overrun_ms)
        return TokenReport(
            self._id, index, token_id, text, context, itl_ms, device_ms, gap_ms,
            _to_ms(publish_s), floor_ms, r_floor, bandwidth_gb_s, missed, self._client_id,
            mask_ms, wait_ms, pass_tokens=None if token_id is None else pass_tokens)

    def fall_back(self, now_s: float, reason: str) -> None:
        """
        Start again with the local engine, because the server failed before its first piece.

        :param now_s: when the local engine takes over.
        :param reason: how the server failed.
        """
        self._begun_s, self.engine, self.fallback = now_s, '', reason
        self.prompt_tokens = self.cached_tokens = self.server_tokens = None

    def item(self, now_s: float, path: str, index: int, value: str) -> ItemReport:
        """
        Record one element of the answer.

        :param now_s: when the element was complete.
        :param path: see `ItemReport`, also for ``index`` and ``value``.
        """
        t_ms = 1e3 * (now_s - self._received_s)
        if self._first_item_ms is None:
            self._first_item_ms = t_ms
        self.items = (self.items or 0) + 1
        return ItemReport(self._id, self._client_id, index, path, t_ms, value)

    def finish(self, now_s: float, finish_reason: str, message: str = '',
               cancel_s: float | None = None) -> RequestReport:
        """
        End the request and return its report.

        :param now_s: when the request ended.
        :param message: details of the finish reason.
        :param cancel_s: when the request was cancelled, if it was.
        """
        request_ms = self.deadline.request_ms
        total_ms = 1e3 * (now_s - self._received_s)
        if request_ms and total_ms > request_ms:
            self._add_overrun(total_ms - request_ms)
            self._recorder._add_request_overrun(total_ms - request_ms)
        itl = self._itl_ms.summary()
        first_s, last_s = self._first_s, self._last_s
        taken_s, begun_s = self._taken_s, self._begun_s
        prefill_s = None if first_s is None or taken_s is None else first_s - taken_s
        floor_s = None if prefill_s is None else self._prompt_floor_s()
        energy_j = self.energy_j
        busy_s = 0.0 if begun_s is None else now_s - begun_s
        decode_s = 0.0 if first_s is None or last_s is None else last_s - first_s
        return RequestReport(
            request_id=self._id, finish_reason=finish_reason, message=message,
            prompt_tokens=self.prompt_tokens, cached_tokens=self.cached_tokens,
            output_tokens=self._count,
            queue_ms=None if taken_s is None else 1e3 * (taken_s - self._received_s),
            prefill_ms=_to_ms(prefill_s),
            ttft_ms=None if first_s is None else 1e3 * (first_s - self._received_s),
            total_ms=total_ms,
            itl_p50_ms=percentile(itl.ordered, 50), itl_p95_ms=percentile(itl.ordered, 95),
            itl_p99_ms=percentile(itl.ordered, 99), itl_max_ms=itl.largest,
            jitter_ms=itl.deviation,
            tokens_per_s=len(itl.ordered) / decode_s if decode_s > 0 else None,
            r_floor_p50=percentile(self._r_floor.summary().ordered, 50),
            deadline_misses=self._misses, max_consecutive_misses=self._max_consecutive_misses,
            worst_overrun_ms=self._worst_overrun_ms,
            cancel_ms=None if cancel_s is None else 1e3 * (now_s - cancel_s),
            client_id=self._client_id, seed=self.seed, items=self.items,
            first_item_ms=self._first_item_ms, paced=self.paced, energy_j=energy_j,
            j_per_token=None if energy_j is None or not self._count else energy_j / self._count,
            power_w=None if energy_j is None or not busy_s else energy_j / busy_s,
            reasoning_tokens=self.reasoning_tokens, engine=self.engine, fallback=self.fallback,
            server_tokens=self.server_tokens,
            encode_ms=None if self.encoded_s is None or begun_s is None
            else 1e3 * (self.encoded_s - begun_s),
            sample_ms=_to_ms(self.sample_s), ttft_floor_ms=_to_ms(floor_s),
            r_ttft=floor_ratio(floor_s, prefill_s),
            pass_tokens=(self._count - 1) / self._passes if self._passes else None)

    def _prompt_floor_s(self) -> float | None:
        """
        Return the least time to prefill a prompt of any length: that of a decode step.

        :returns: None if it is unknown, or if a server prefills.
        """
        roofline = self._recorder._roofline
        if roofline is None or self.encoded_s is None:
            return None
        return roofline.floor_s(self.cached_tokens or 0)

    def _add_overrun(self, overrun_ms: float) -> None:
        if overrun_ms > 0:
            self._misses += 1
            self._worst_overrun_ms = _larger(self._worst_overrun_ms, overrun_ms)


def _larger(known: float | None, value: float) -> float:
    return value if known is None else max(known, value)


def _to_ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
