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
The decode thread: it answers queued requests one at a time and reports to listeners.

Each request becomes an `Answer` of an engine, or a `ServerAnswer` of a server. This module depends
on neither ROS nor torch.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent import futures
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import partial
import gc
from itertools import count
import math
import secrets
import threading
import time
from types import MappingProxyType
from typing import Any
from typing import cast
from typing import NamedTuple
from typing import Protocol
from typing import TypeVar

from physai_decode.answer import Answer
from physai_decode.answer import TextCoder
from physai_decode.collector import COLLECTOR
from physai_decode.collector import give_back
from physai_decode.config import DeadlineConfig
from physai_decode.config import DecodeConfig
from physai_decode.config import PaceConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import ThinkingConfig
from physai_decode.conversation import Conversation
from physai_decode.decode_loop import DecodeLoop
from physai_decode.delivery import Delivery
from physai_decode.delivery import End
from physai_decode.delivery import Refused
from physai_decode.engine import described
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.engines.openai import Server
from physai_decode.engines.openai import ServerError
from physai_decode.realtime import InForce
from physai_decode.realtime import Placement
from physai_decode.request import Form
from physai_decode.request import Refusal
from physai_decode.request import Request
from physai_decode.request_queue import LATE_IN_QUEUE
from physai_decode.request_queue import Listener
from physai_decode.request_queue import notify_end
from physai_decode.request_queue import RequestQueue
from physai_decode.request_queue import Ticket
from physai_decode.result import ANSWERED
from physai_decode.roofline import Peak
from physai_decode.roofline import Roofline
from physai_decode.server_answer import ServerAnswer
from physai_decode.telemetry import spent_j
from physai_decode.timing import ItemReport
from physai_decode.timing import Recorder
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
from physai_decode.timing import WindowReport
from physai_decode.tokenizer_files import TextError

KEPT = ('stop', 'length', 'deadline', 'preempted')  # their turns stay in the conversation
JOIN_PARTS = 10                 # the wait is split, so that a SIGSTOP costs only one part of it
SEEDS = 2**31                   # random seeds are below this

Result = TypeVar('Result')
# A task receives the decode loop and a heartbeat to call after each step.
Work = Callable[[DecodeLoop, Callable[[], None]], Result]


class Sink(Listener, Protocol):
    """Receives the reports of all requests."""

    def accepted(self, number: int, request: Request) -> None:
        """Receive a request that was queued; called by the thread that submitted it."""
        ...


@dataclass
class _Task:
    """Work on the engine between two requests."""

    work: Work[Any]
    outcome: 'futures.Future[Any]' = field(default_factory=futures.Future)
    end_message: str = ''           # why to end early; guarded by the worker's lock


class Busy(RuntimeError):
    """The engine is busy; the message says why."""


class Cancelled(NamedTuple):
    """The requests that a cancel ended."""

    running: int | None = None  # number of the running request that ended
    waiting: int = 0            # number of waiting requests that were removed

    def __bool__(self) -> bool:
        """Whether any request ended."""
        return self.running is not None or self.waiting > 0

    def __str__(self) -> str:
        """Return what was done, for people."""
        parts = [f'cancelled request {self.running}'] if self.running is not None else []
        if self.waiting:
            parts.append(f'removed {self.waiting} waiting')
        return ', '.join(parts) or 'nothing running'


class Worker:
    """
    One thread and one queue for an engine, a server, or both.

    If there is a server, it answers, and the engine is the fallback.

    All methods and properties are thread-safe. Only ``run`` and ``stop`` wait for the engine.
    """

    def __init__(self, engine: Engine | None, text: TextCoder | None, config: DecodeConfig,
                 sink: Sink,
                 clock: Callable[[], float] = time.monotonic,
                 peak: Peak = Peak(None, 'unknown'),
                 numbers: Iterator[int] | None = None,
                 checkpoint_sampling: Mapping[str, Any] = MappingProxyType({}),
                 form: Form | None = None,
                 energy_j: Callable[[], float | None] = lambda: None,
                 server: Server | None = None,
                 warn: Callable[[str], object] = lambda message: None) -> None:
        """
        Create a worker; `start` starts its thread.

        :param engine: used only by the decode thread while that runs, and never closed here. None,
            like ``text``, if there is only a server.
        :param clock: monotonic, in seconds.
        :param peak: peak memory bandwidth, for the floor of the tokens.
        :param numbers: thread-safe source of request numbers; None counts from 1.
        :param checkpoint_sampling: settings for ``sampling.from_checkpoint``.
        :param form: constraint on answers whose request sets none.
        :param energy_j: returns the energy that the device has used so far, in joules.
        :param warn: see `DecodeLoop`.
        """
        self._device_energy_j = energy_j
        self._energy_j: float | None = None         # of all answers
        self._energy_tokens = 0                     # tokens of those answers
        self._server, self._remote = server, config.remote
        self._local: tuple[DecodeLoop, TextCoder] | None = None
        if engine is not None and text is not None:
            self._local = DecodeLoop(
                engine, config.engine.prefill_chunk_ms, clock, config.speculation, warn), text
        self._sink = sink
        self._clock = clock
        self._numbers = numbers or count(1)
        runs = engine or server
        assert runs is not None
        self._roofline = Roofline(runs.footprint, peak)
        self._sleeps = runs.footprint.sleeps
        self._max_request_bytes = config.queue.max_request_bytes
        self._window_s = config.diagnostics.window_s
        self._stall_timeout_s = config.diagnostics.stall_timeout_s
        self._sampling, self._thinking = config.sampling, config.thinking
        self._pace = config.pace
        self._checkpoint_sampling = checkpoint_sampling
        self._form = form
        self._recorder = Recorder(self._window_s, config.deadline, self._roofline)
        self._conversation = Conversation(config.chat.system_prompt, config.chat.keep_history)
        self._thread: threading.Thread | None = None
        self._realtime = config.realtime
        self._placement: Placement | None = None    # of the thread

        self._wake = threading.Condition()
        # The lock of _wake guards everything below.
        self._accepting = False
        self._queue = RequestQueue(config.queue)
        self._answer: Delivery | None = None
        self._task: _Task | None = None     # waiting or running
        self._last_heartbeat_s = 0.0    # when the running request or task began, or its last step
        self._last_error = ''
        self._fallback = ''
        self._failed = False
        self._fallbacks = 0
        self._requests = 0
        self._refusals = 0
        self._tokens = 0

    def start(self) -> None:
        """
        Start the decode thread with empty statistics.

        :raises RuntimeError: the thread of an earlier start still runs.
        """
        if self._thread is not None and self._thread.is_alive():
            raise RuntimeError('the decode thread still runs: its engine has not returned')
        self._recorder = Recorder(self._window_s, self._recorder.deadline, self._roofline)
        with self._wake:
            self._failed = False
            self._accepting = True
        # All objects loaded so far stay; exclude them from later garbage collections.
        gc.collect()
        gc.freeze()
        give_back()
        self._thread = threading.Thread(target=self._run, name='decode', daemon=True)
        with self._wake:            # the thread takes no request before it has its scheduling
            self._thread.start()
            assert self._thread.native_id is not None
            self._placement = Placement(self._thread.native_id, self._realtime, self._sleeps)

    def submit(self, request: Request, received_s: float | None = None,
               listener: Listener | None = None) -> int:
        """
        Queue a request and return its number.

        A request that cannot be queued is refused before this method returns. The decode thread
        refuses a prompt that turns out to be too long for the context.

        :param received_s: time of receipt by the worker's clock; None for now.
        :param listener: receives the reports of this request, after the sink.
        """
        now_s = self._clock()
        oversize = self._oversize(request)
        removed: list[Ticket] = []
        with self._wake:
            self._requests += 1
            ticket = Ticket(next(self._numbers), request,
                            now_s if received_s is None else received_s, listener)
            refusal = oversize or self._queue.refusal(request)
            if not self._accepting:
                refusal = Refusal('inactive', 'the node is not active: activate it first')
            if refusal is not None:
                self._refusals += 1
            else:
                if self._queue.preempts:
                    removed = self._end(self._queue.unfinished(), 'preempted',
                                        f'request {ticket.number} arrived')
                ticket.late_s = self._late_s(ticket)
                if request.prompt:
                    ticket.turn = self._conversation.open(request.prompt)
                self._queue.add(ticket)
                self._wake.notify()
        try:
            if refusal is not None:
                self._notify_end(ticket, RequestReport(
                    ticket.number, 'rejected', refusal.message, client_id=request.client_id,
                    refusal=refusal.kind), '')
            else:
                self._sink.accepted(ticket.number, request)
        finally:
            self._report_removed(removed)
        return ticket.number

    def cancel(self, number: int | None = None, client_id: str = '',
               message: str = '') -> Cancelled:
        """
        End requests within one step, and return which.

        Without a number or a client id, the running request ends and the queue is emptied.

        :param number: number of the request to end.
        :param client_id: client id of the request to end.
        :param message: reason, for the report.
        """
        with self._wake:
            running = self._queue.running
            tickets = [each for each in self._queue.unfinished()
                       if number in (None, each.number)
                       and client_id in ('', each.request.client_id)]
            removed = self._end(tickets, 'cancelled', message)
        self._report_removed(removed)
        return Cancelled(
            running.number if running is not None and running in tickets else None, len(removed))

    def reset(self) -> str:
        """Forget the conversation, including the running turn, and return what was forgotten."""
        turns = self._conversation.forget()
        return f'forgot {turns} turn{"" if turns == 1 else "s"}'

    def run(self, work: Work[Result], timeout_s: float) -> Result:
        """
        Run a task on the engine in the decode thread, if no request runs or waits.

        Requests that arrive meanwhile wait. While the task runs, the state is ``generating`` or
        ``stalled``; its steps are not recorded.

        :param work: receives the decode loop and a heartbeat to call after each step; the
            heartbeat raises `Busy` to end the task.
        :raises Busy: the engine is not free, or ``stop`` was called.
        :raises EngineError: the task exceeded ``timeout_s``; it ends with its next step.
        :return: the result of the task; its exceptions are raised here.
        """
        task = _Task(work)
        with self._wake:
            if self.busy_reason:
                raise Busy(self.busy_reason)
            self._task = task
            self._last_heartbeat_s = self._clock()
            self._wake.notify()
        if not futures.wait([task.outcome], timeout_s).done:
            with self._wake:
                task.end_message = f'the engine did not return within {timeout_s:g} s'
            raise EngineError(task.end_message)
        try:
            return cast(Result, task.outcome.result())
        finally:
            del task                # breaks the cycle of an error, its traceback and this frame

    def stop(self, timeout_s: float) -> bool:
        """
        Cancel all requests, refuse new ones, and wait for the thread to end.

        :return: False if the engine did not return in time. Its request has then ended with an
            error. The thread still uses the engine, and nothing else, so the engine must not be
            closed yet.
        """
        with self._wake:
            self._accepting = False
            removed = self._end(self._queue.unfinished(), 'cancelled', 'the node stops answering')
            if self._task is not None:
                self._task.end_message = 'the node stops answering'
            self._wake.notify()
        self._report_removed(removed)
        if self._thread is None:
            return True
        for _ in range(JOIN_PARTS):
            self._thread.join(timeout_s / JOIN_PARTS)
        gc.unfreeze()
        if self._placement is not None and not self._thread.is_alive():
            self._placement.end()
        with self._wake:
            stuck, answer = self._queue.running, self._answer
            if stuck is None or answer is None or not self._thread.is_alive():
                return not self._thread.is_alive()
            unreported, stuck.finished = not stuck.finished, True
        if unreported:
            self._fail(f'the engine did not return within {timeout_s:g} s')
            self._report_end(stuck, answer, End('error', self._last_error))
        return False

    def update(self, sampling: SamplingConfig | None = None,
               deadline: DeadlineConfig | None = None, pace: PaceConfig | None = None,
               thinking: ThinkingConfig | None = None) -> None:
        """Apply new settings: deadlines at once, others from the next request on."""
        if pace is not None:
            self._pace = pace
        if sampling is not None:
            self._sampling = sampling
        if thinking is not None:
            self._thinking = thinking
        if deadline is not None:
            self._recorder.deadline = deadline
            with self._wake:
                self._queue.set_late_s(self._late_s)

    def window(self) -> WindowReport:
        """Report on the last ``diagnostics.window_s`` seconds and on the time since ``start``."""
        return self._recorder.window(self._clock())

    @property
    def state(self) -> str:
        """
        The state: idle, generating, stalled or failed.

        Stalled: no token and no prefill chunk for ``diagnostics.stall_timeout_s``. Failed: the
        last request ended with an error, and none runs. A task of ``run`` counts as a request.
        """
        with self._wake:
            if self._queue.running is None and self._task is None:
                return 'failed' if self._failed else 'idle'
            silent_s = self._clock() - self._last_heartbeat_s
            return 'stalled' if silent_s > self._stall_timeout_s else 'generating'

    @property
    def busy_reason(self) -> str:
        """Why no task can run now; empty if one can."""
        with self._wake:
            if not self._accepting:
                return 'the node is not active: activate it first'
            if self._queue.running is not None:
                return (f'request {self._queue.running.number} is {self.state}: call again when '
                        'it has ended')
            if self._task is not None or self._queue:
                return 'the engine is about to run a request or a task: call again later'
            return ''

    @property
    def peak(self) -> Peak:
        """Peak memory bandwidth, for the floor of the tokens; may change at any time."""
        return self._roofline.peak

    @peak.setter
    def peak(self, peak: Peak) -> None:
        self._roofline.peak = peak

    @property
    def energy_j(self) -> float | None:
        """Energy of all answers; None if the device does not report it."""
        return self._energy_j

    @property
    def j_per_token(self) -> float | None:
        """Energy per token of those answers; None if unknown."""
        energy_j, tokens = self._energy_j, self._energy_tokens
        return energy_j / tokens if energy_j and tokens else None

    @property
    def in_force(self) -> InForce | None:
        """The scheduling of the decode thread, as the kernel reports it; None before `start`."""
        return None if self._placement is None else self._placement.in_force()

    @property
    def fallback(self) -> str:
        """Why the engine replaced the server for the last request; empty if it did not."""
        return self._fallback

    @property
    def fallbacks(self) -> int:
        """Number of requests that the engine answered instead of the server."""
        return self._fallbacks

    @property
    def last_error(self) -> str:
        """Message of the last error; empty if there was none."""
        return self._last_error

    @property
    def queue_depth(self) -> int:
        """Number of waiting requests."""
        return len(self._queue)

    @property
    def requests(self) -> int:
        """Number of requests so far, including refused ones."""
        return self._requests

    @property
    def refusals(self) -> int:
        """Number of refused requests."""
        return self._refusals

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return self._tokens

    @property
    def deadline_misses(self) -> int:
        """Number of missed deadlines so far."""
        return self._recorder.deadline_misses

    def _oversize(self, request: Request) -> Refusal | None:
        """Return the refusal of a request that is too large to process, or None."""
        limit = self._max_request_bytes
        if len(request.text) <= limit and request.size <= limit:
            return None
        return Refusal('too_large', f'the prompt has more than {limit} bytes: shorten it, or '
                       'raise queue.max_request_bytes')

    def _end(self, tickets: list[Ticket], reason: str, message: str) -> list[Ticket]:
        """Request the end of tickets; return those that waited. Call with the lock held."""
        removed = self._queue.end(tickets, reason, message, self._clock())
        for ticket in removed:
            self._close_turn(ticket, ticket.end_reason, '')
        return removed

    def _late_s(self, ticket: Ticket) -> float:
        """Return when the deadline of a request ends it."""
        deadline = replace(self._recorder.deadline, **ticket.request.deadline)
        if deadline.action != 'truncate' or not deadline.request_ms:
            return math.inf
        return ticket.received_s + 1e-3 * deadline.request_ms

    def _close_turn(self, ticket: Ticket, reason: str, answer: str) -> None:
        """End the turn of a request. Call with the lock held: the next request reads it."""
        if ticket.turn is not None:
            self._conversation.close(ticket.turn, answer if reason in KEPT else None)

    def _report_removed(self, removed: list[Ticket]) -> None:
        """Report the end of requests that never ran. Runs in the caller's thread."""
        with ExitStack() as calls:                  # runs all, even if a listener raises
            for ticket in reversed(removed):
                calls.callback(self._report_one_removed, ticket)

    def _report_one_removed(self, ticket: Ticket) -> None:
        times = self._recorder.request(ticket.number, ticket.received_s, None,
                                       ticket.request.client_id, ticket.request.deadline)
        cancelled_s = None if ticket.end_reason == 'deadline' else ticket.end_requested_s
        self._notify_end(ticket, times.finish(
            self._clock(), ticket.end_reason, ticket.end_message, cancelled_s), '')

    def _notify_end(self, ticket: Ticket, report: RequestReport, text: str) -> None:
        notify_end((self._sink, ticket.listener), report, text)

    # The decode thread runs everything below.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and self._task is None and self._accepting:
                    self._wake.wait()
                self._last_heartbeat_s = self._clock()
                ticket = None
                if self._task is None:
                    if not self._queue:
                        return
                    ticket = self._queue.take()
                    self._answer = self._create_answer(ticket)
            with COLLECTOR.paused(full=lambda: not self._queue):
                if ticket is None:
                    self._run_task()
                    continue
                try:
                    self._serve(ticket, cast(Delivery, self._answer))
                except Exception as error:
                    # Only an error of a listener's finished() arrives here: _serve() converts
                    # errors of the engine and the text to the end of the request.
                    self._fail(described(error))
                with self._wake:
                    self._queue.running = self._answer = None

    def _create_answer(self, ticket: Ticket) -> Delivery:
        request, listener = ticket.request, ticket.listener
        checkpoint = self._checkpoint_sampling if self._sampling.from_checkpoint else {}
        sampling = replace(self._sampling, **{**checkpoint, **request.sampling})
        if sampling.seed < 0:
            sampling = replace(sampling, seed=secrets.randbelow(SEEDS))
        times = self._recorder.request(ticket.number, ticket.received_s, self._clock(),
                                       request.client_id, request.deadline)
        times.seed = sampling.seed

        def emit(report: TokenReport) -> None:
            self._tokens += 1
            self._sink.token(report)
            if listener is not None:
                listener.token(report)

        def emit_item(report: ItemReport) -> None:
            self._sink.item(report)
            if listener is not None:
                listener.item(report)

        arguments: dict[str, Any] = {
            'ticket': ticket, 'conversation': self._conversation, 'sampling': sampling,
            'times': times, 'emit': emit, 'emit_item': emit_item, 'alive': self._record_heartbeat,
            'end_late': self._end_late, 'clock': self._clock,
            'form': None if request.is_free else request.form or self._form,
            'tokens_per_s': replace(self._pace, **request.pace).tokens_per_s,
            'thought_tokens': request.thinking.get('max_tokens', self._thinking.max_tokens)}
        local = self._local and partial(Answer, *self._local, **arguments)
        if self._server is None:
            assert local is not None
            return local()
        return ServerAnswer(self._server, self._remote, local=local, **arguments)

    def _serve(self, ticket: Ticket, answer: Delivery) -> None:
        """Answer a request and report its end."""
        failure = ''
        try:
            if isinstance(answer, ServerAnswer):
                try:
                    end = answer.give()
                except ServerError as error:
                    if answer.local is None:
                        raise
                    answer = self._fall_back(answer.local(), str(error))
                else:
                    if end.reason in ANSWERED:
                        self._fallback = ''
            if not isinstance(answer, ServerAnswer):
                answer.energy_j = self._device_energy_j()
                end = answer.give()
        except (Refused, TextError) as error:
            end = End('rejected', str(error))
        except ServerError as error:
            failure = str(error)
            end = End('error', failure)
        except Exception as error:
            # The top of the worker: an error of the engine ends only its request.
            failure = described(error)
            end = End('error', failure)
        else:
            failure = end.message if end.reason == 'error' else ''
        with self._wake:
            if ticket.finished:                     # stop() has reported its end
                return
            if ticket.end_reason and end.reason not in ('rejected', 'error'):
                end = End(ticket.end_reason, ticket.end_message)
            ticket.finished = True
            self._queue.running = None
            if end.reason == 'rejected':
                self._refusals += 1
            else:
                self._failed = bool(failure)
                self._last_error = failure or self._last_error
            self._close_turn(ticket, end.reason, answer.text)
        self._report_end(ticket, answer, end)

    def _fall_back(self, answer: Delivery, reason: str) -> Delivery:
        """Replace the server's answer with the engine's."""
        answer.times.fall_back(self._clock(), reason)
        self._fallback = reason
        with self._wake:
            self._answer = answer
            self._fallbacks += 1
        return answer

    def _report_end(self, ticket: Ticket, answer: Delivery, end: End) -> None:
        message = '; '.join(filter(None, (end.message, answer.note)))
        before_j = answer.energy_j
        used_j = None if before_j is None else spent_j(before_j, self._device_energy_j())
        answer.times.energy_j = used_j or None      # 0: the counter has not advanced meanwhile
        report = answer.times.finish(self._clock(), end.reason, message, ticket.end_requested_s)
        if used_j is not None:
            self._energy_j = (self._energy_j or 0.0) + used_j
            self._energy_tokens += report.output_tokens
        if answer.reasoning or answer.calls:
            report = replace(report, reasoning=answer.reasoning, tool_calls=tuple(answer.calls))
        if end.reason == 'rejected':
            report = replace(report, refusal='invalid', engine='')
        self._notify_end(ticket, report, answer.text)

    def _run_task(self) -> None:
        """Run the task; `run` raises its exceptions."""
        task = cast(_Task, self._task)
        try:
            try:
                self._heartbeat()
                assert self._local is not None      # callers need an engine
                result = task.work(self._local[0], self._heartbeat)
            finally:
                with self._wake:
                    self._task = None
        except BaseException as error:
            task.outcome.set_exception(error)
        else:
            task.outcome.set_result(result)
        finally:
            del task                # breaks the cycle as in `run`

    def _heartbeat(self) -> None:
        """Record that the task is alive; raise `Busy` if it has to end."""
        self._record_heartbeat(self._clock())
        self._end_late()
        with self._wake:
            message = cast(_Task, self._task).end_message
        if message:
            raise Busy(message)

    def _record_heartbeat(self, now_s: float) -> None:
        self._last_heartbeat_s = now_s

    def _end_late(self) -> None:
        """End the waiting requests whose deadline has passed."""
        if not self._queue:
            return
        with self._wake:
            removed = self._end(self._queue.late(self._clock()), 'deadline', LATE_IN_QUEUE)
        try:
            self._report_removed(removed)
        except Exception as error:      # of a listener; it must not end the running request
            self._fail(described(error))

    def _fail(self, message: str) -> None:
        with self._wake:
            self._failed, self._last_error = True, message
