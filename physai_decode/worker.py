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
One thread that answers requests one after another: submit, cancel, preempt, stop.

It gives one `Answer` of an engine, or `ServerAnswer` of a server, after the other and tells
listeners. It knows nothing of ROS or torch, and not what the listeners do with what they get.
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
import secrets
import threading
import time
from types import MappingProxyType
from typing import Any
from typing import cast
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
from physai_decode.request_queue import Listener
from physai_decode.request_queue import RequestQueue
from physai_decode.request_queue import tell_end
from physai_decode.request_queue import Ticket
from physai_decode.result import ANSWERED
from physai_decode.roofline import Peak
from physai_decode.roofline import Roofline
from physai_decode.server_answer import ServerAnswer
from physai_decode.timing import ItemReport
from physai_decode.timing import Recorder
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
from physai_decode.timing import WindowReport
from physai_decode.tokenizer_files import TextError

KEPT = ('stop', 'length', 'deadline', 'preempted')  # ends whose turn stays in the conversation
PARTS = 10                      # of a wait: of them a stopped process (SIGSTOP) loses one, not all
SEEDS = 2**31                               # a fresh seed is below

Result = TypeVar('Result')
# A task gets the decode loop, and what to call after each step.
Work = Callable[[DecodeLoop, Callable[[], None]], Result]


class Sink(Listener, Protocol):
    """Hears of every request."""

    def accepted(self, number: int, request: Request) -> None:
        """Take a request that was queued; from the thread that submitted it."""
        ...


@dataclass
class _Task:
    """What is run on the engine between two requests."""

    work: Work[Any]
    outcome: 'futures.Future[Any]' = field(default_factory=futures.Future)
    end_message: str = ''           # why it is to end early; guarded by the worker's lock


class Busy(RuntimeError):
    """The engine is not free for a task; the message says why."""


class Worker:
    """
    One engine, or a server, or both; one thread, one queue.

    Where there is a server, it answers, and the engine in its place where it fails.

    All methods and properties may be used from any thread, and none of them waits for the engine
    but ``run`` and ``stop``.
    """

    def __init__(self, engine: Engine | None, text: TextCoder | None, config: DecodeConfig,
                 sink: Sink,
                 clock: Callable[[], float] = time.monotonic,
                 peak: Peak = Peak(None, 'unknown'),
                 numbers: Iterator[int] | None = None,
                 checkpoint_sampling: Mapping[str, Any] = MappingProxyType({}),
                 form: Form | None = None,
                 energy_j: Callable[[], float | None] = lambda: None,
                 server: Server | None = None) -> None:
        """
        Make a worker that is not running yet.

        :param engine: used by the worker's thread alone while that runs, and not closed; None,
            as ``text``, where there is only a server.
        :param clock: monotonic, in seconds.
        :param peak: the memory bus that the tokens' floor is for.
        :param numbers: gives each request its number, also in several threads; None: from 1 on.
        :param checkpoint_sampling: settings that ``sampling.from_checkpoint`` takes.
        :param form: what an answer has to look like whose request does not say it.
        :param energy_j: gives the energy that the device has taken up to now, in joules.
        """
        self._device_energy_j = energy_j
        self._energy_j: float | None = None         # of all answers
        self._energy_tokens = 0                     # theirs
        self._server, self._remote = server, config.remote
        self._local: tuple[DecodeLoop, TextCoder] | None = None
        if engine is not None and text is not None:
            self._local = DecodeLoop(engine, config.engine.prefill_chunk_ms, clock), text
        self._sink = sink
        self._clock = clock
        self._numbers = numbers or count(1)
        runs = engine or server
        assert runs is not None
        self._roofline = Roofline(runs.footprint, peak)
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
        # All below is guarded by _wake's lock.
        self._accepting = False
        self._queue = RequestQueue(config.queue)
        self._answer: Delivery | None = None
        self._task: _Task | None = None     # waits for the thread, or is run by it
        self._sign_of_life_s = 0.0      # what runs: when it was taken, or its last step
        self._last_error = ''
        self._fallback = ''
        self._failed = False
        self._fallbacks = 0
        self._requests = 0
        self._refusals = 0
        self._tokens = 0

    def start(self) -> None:
        """
        Start the thread, with nothing recorded yet.

        :raises RuntimeError: the thread of an earlier start still runs.
        """
        if self._thread is not None and self._thread.is_alive():
            raise RuntimeError('the worker still runs: its engine has not come back')
        self._recorder = Recorder(self._window_s, self._recorder.deadline, self._roofline)
        with self._wake:
            self._failed = False
            self._accepting = True
        # What is loaded by now is here to stay: no collection need look at it again.
        gc.collect()
        gc.freeze()
        give_back()
        self._thread = threading.Thread(target=self._run, name='decode', daemon=True)
        with self._wake:                            # it takes nothing before it has its place
            self._thread.start()
            assert self._thread.native_id is not None
            self._placement = Placement(self._thread.native_id, self._realtime)

    def submit(self, request: Request, received_s: float | None = None,
               listener: Listener | None = None) -> int:
        """
        Queue a request and give its number.

        A request that can't be queued is refused before this returns. One that turns out too long
        is refused on the worker's thread, when its turn comes.

        :param received_s: when it was received, by the worker's clock; None for now.
        :param listener: hears of this request alone, after the sink.
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
                                        f'request {ticket.number} came')
                if request.prompt:
                    ticket.turn = self._conversation.open(request.prompt)
                self._queue.add(ticket)
                self._wake.notify()
        try:
            if refusal is not None:
                self._tell_end(ticket, RequestReport(
                    ticket.number, 'rejected', refusal.message, client_id=request.client_id,
                    refusal=refusal.kind), '')
            else:
                self._sink.accepted(ticket.number, request)
        finally:
            self._report_removed(removed)
        return ticket.number

    def cancel(self, number: int | None = None, client_id: str = '', message: str = '') -> str:
        """
        End requests within one step, and say what was done.

        :param number: of the request to end.
        :param client_id: the client's id of the request to end. Where neither is given the
            running request ends and the queue is emptied.
        :param message: why, in words, where that is not plain.
        """
        with self._wake:
            running = self._queue.running
            tickets = [each for each in self._queue.unfinished()
                       if number in (None, each.number)
                       and client_id in ('', each.request.client_id)]
            removed = self._end(tickets, 'cancelled', message)
        self._report_removed(removed)
        done = [f'cancelled request {running.number}'] \
            if running is not None and running in tickets else []
        if removed:
            done.append(f'removed {len(removed)} waiting')
        return ', '.join(done) or 'nothing running'

    def reset(self) -> str:
        """Forget the conversation, the turn that is running too, and say what was forgotten."""
        turns = self._conversation.forget()
        return f'forgot {turns} turn{"" if turns == 1 else "s"}'

    def run(self, work: Work[Result], timeout_s: float) -> Result:
        """
        Run a task on the engine in the worker's thread, where nothing runs or waits.

        Requests that come meanwhile wait for their turn. While the task runs, the state is
        ``generating`` (or ``stalled``); its steps are not recorded.

        :param work: gets the decode loop, and a function to call after each step: a sign of life,
            which raises where the task is to end.
        :raises Busy: the engine is not free, or ``stop`` was called.
        :raises EngineError: the task did not end in time. It ends with its next step then.
        :return: what the task gives; what it raises is raised here.
        """
        task = _Task(work)
        with self._wake:
            if self.occupied:
                raise Busy(self.occupied)
            self._task = task
            self._sign_of_life_s = self._clock()
            self._wake.notify()
        if not futures.wait([task.outcome], timeout_s).done:
            with self._wake:
                task.end_message = f'the engine did not come back within {timeout_s:g} s'
            raise EngineError(task.end_message)
        try:
            return cast(Result, task.outcome.result())
        finally:
            del task                # else an error keeps itself, and what it holds of the device

    def stop(self, timeout_s: float) -> bool:
        """
        Cancel everything, refuse what comes, and wait for the thread to end.

        :return: False where the engine did not come back in time. Its request has then ended with
            an error, and the thread will touch nothing but the engine any more; the engine can't
            be closed until then.
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
        for _ in range(PARTS):
            self._thread.join(timeout_s / PARTS)
        gc.unfreeze()
        if self._placement is not None and not self._thread.is_alive():
            self._placement.end()
        with self._wake:
            stuck, answer = self._queue.running, self._answer
            if stuck is None or answer is None or not self._thread.is_alive():
                return not self._thread.is_alive()
            lost, stuck.finished = not stuck.finished, True
        if lost:
            self._fail(f'the engine did not come back within {timeout_s:g} s')
            self._report_end(stuck, answer, End('error', self._last_error))
        return False

    def update(self, sampling: SamplingConfig | None = None,
               deadline: DeadlineConfig | None = None, pace: PaceConfig | None = None,
               thinking: ThinkingConfig | None = None) -> None:
        """Take new settings: deadlines at once, all others from the next request on."""
        if pace is not None:
            self._pace = pace
        if sampling is not None:
            self._sampling = sampling
        if thinking is not None:
            self._thinking = thinking
        if deadline is not None:
            self._recorder.deadline = deadline

    def window(self) -> WindowReport:
        """Report on the last ``diagnostics.window_s`` seconds, and on all since ``start``."""
        return self._recorder.window(self._clock())

    @property
    def state(self) -> str:
        """
        Tell the state: idle, generating, stalled or failed.

        Stalled: no token, nor a chunk of a prompt, for ``diagnostics.stall_timeout_s``. Failed:
        the last request ended with an error, and none runs. A task of ``run`` is like a request.
        """
        with self._wake:
            if self._queue.running is None and self._task is None:
                return 'failed' if self._failed else 'idle'
            silent_s = self._clock() - self._sign_of_life_s
            return 'stalled' if silent_s > self._stall_timeout_s else 'generating'

    @property
    def occupied(self) -> str:
        """Say why no task can be run now; empty where one can."""
        with self._wake:
            if not self._accepting:
                return 'the node is not active: activate it first'
            if self._queue.running is not None:
                return (f'request {self._queue.running.number} is {self.state}: call again when '
                        'it has ended')
            if self._task is not None or self._queue:
                return 'the engine is about to be used: call again later'
            return ''

    @property
    def peak(self) -> Peak:
        """The memory bus that the tokens' floor is for; may be replaced at any time."""
        return self._roofline.peak

    @peak.setter
    def peak(self, peak: Peak) -> None:
        self._roofline.peak = peak

    @property
    def energy_j(self) -> float | None:
        """Give the energy that the device took for all answers; None where it does not tell."""
        return self._energy_j

    @property
    def j_per_token(self) -> float | None:
        """Give that for each of their tokens."""
        energy_j, tokens = self._energy_j, self._energy_tokens
        return None if energy_j is None or not tokens else energy_j / tokens

    @property
    def in_force(self) -> InForce | None:
        """Tell how the thread is scheduled, as the kernel says; None before `start`."""
        return None if self._placement is None else self._placement.in_force()

    @property
    def fallback(self) -> str:
        """Say why the engine answered the last request in the server's place; empty: not so."""
        return self._fallback

    @property
    def fallbacks(self) -> int:
        """Count the requests that the engine answered in the server's place."""
        return self._fallbacks

    @property
    def last_error(self) -> str:
        """Give the message of the last error, empty where there was none."""
        return self._last_error

    @property
    def queue_depth(self) -> int:
        """Count the requests that wait."""
        return len(self._queue)

    @property
    def requests(self) -> int:
        """Count the requests so far, refused ones too."""
        return self._requests

    @property
    def refusals(self) -> int:
        """Count the refused requests."""
        return self._refusals

    @property
    def tokens(self) -> int:
        """Count the tokens so far."""
        return self._tokens

    def _oversize(self, request: Request) -> Refusal | None:
        """Say that a request is too long to be looked at; None where it is not."""
        limit = self._max_request_bytes
        if len(request.text) <= limit and request.size <= limit:
            return None
        return Refusal('too_large', f'the prompt has more than {limit} bytes: shorten it, or '
                       'raise queue.max_request_bytes')

    def _end(self, tickets: list[Ticket], reason: str, message: str) -> list[Ticket]:
        """Ask for the end of these; give those that waited, to be reported. Needs the lock."""
        removed = self._queue.end(tickets, reason, message, self._clock())
        for ticket in removed:
            self._close_turn(ticket, ticket.end_reason, '')
        return removed

    def _close_turn(self, ticket: Ticket, reason: str, answer: str) -> None:
        """End a request's turn of the conversation. Needs the lock: the next one reads it."""
        if ticket.turn is not None:
            self._conversation.close(ticket.turn, answer if reason in KEPT else None)

    def _report_removed(self, removed: list[Ticket]) -> None:
        """Report the end of requests that never had their turn. From the caller's thread."""
        with ExitStack() as rest:                   # all of them, also where a listener raises
            for ticket in reversed(removed):
                rest.callback(self._report_one_removed, ticket)

    def _report_one_removed(self, ticket: Ticket) -> None:
        times = self._recorder.request(ticket.number, ticket.received_s, None,
                                       ticket.request.client_id, ticket.request.deadline)
        self._tell_end(ticket, times.finish(
            self._clock(), ticket.end_reason, ticket.end_message, ticket.end_asked_s), '')

    def _tell_end(self, ticket: Ticket, report: RequestReport, text: str) -> None:
        tell_end((self._sink, ticket.listener), report, text)

    # What follows runs in the worker's thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and self._task is None and self._accepting:
                    self._wake.wait()
                self._sign_of_life_s = self._clock()
                ticket = None
                if self._task is None:
                    if not self._queue:
                        return
                    ticket = self._queue.take()
                    self._answer = self._begin(ticket)
            with COLLECTOR.paused(full=lambda: not self._queue):
                if ticket is None:
                    self._perform()
                    continue
                try:
                    self._give(ticket, cast(Delivery, self._answer))
                except Exception as error:
                    # Only a listener's own finished() can get here: the engine's and the text's
                    # errors have ended the request in _give().
                    self._fail(described(error))
                with self._wake:
                    self._queue.running = self._answer = None

    def _begin(self, ticket: Ticket) -> Delivery:
        request, listener = ticket.request, ticket.listener
        own = self._sampling
        taken = self._checkpoint_sampling if own.from_checkpoint else {}
        sampling = replace(own, **{**taken, **request.sampling})
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

        given = {
            'ticket': ticket, 'conversation': self._conversation, 'sampling': sampling,
            'times': times, 'emit': emit, 'emit_item': emit_item, 'alive': self._live,
            'clock': self._clock, 'form': None if request.is_free else request.form or self._form,
            'tokens_per_s': replace(self._pace, **request.pace).tokens_per_s,
            'thought_tokens': request.thinking.get('max_tokens', self._thinking.max_tokens)}
        local = self._local and partial(Answer, *self._local, **given)
        if self._server is None:
            assert local is not None
            return local()
        return ServerAnswer(self._server, self._remote, local=local, **given)

    def _give(self, ticket: Ticket, answer: Delivery) -> None:
        """Answer, and report the end."""
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
            # The top of the worker: whatever an engine raises ends its request and no more.
            failure = described(error)
            end = End('error', failure)
        else:
            failure = end.message if end.reason == 'error' else ''
        with self._wake:
            if ticket.finished:                     # stop() has given it up
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
        """Let the engine's answer take the place of the server's."""
        answer.times.fallback = self._fallback = reason
        with self._wake:
            self._answer = answer
            self._fallbacks += 1
        return answer

    def _report_end(self, ticket: Ticket, answer: Delivery, end: End) -> None:
        message = '; '.join(filter(None, (end.message, answer.note)))
        if answer.energy_j is not None and (after_j := self._device_energy_j()) is not None:
            answer.times.energy_j = after_j - answer.energy_j
        report = answer.times.finish(self._clock(), end.reason, message, ticket.end_asked_s)
        if report.energy_j is not None:
            self._energy_j = (self._energy_j or 0.0) + report.energy_j
            self._energy_tokens += report.output_tokens
        if answer.reasoning or answer.calls:
            report = replace(report, reasoning=answer.reasoning, tool_calls=tuple(answer.calls))
        if end.reason == 'rejected':
            report = replace(report, refusal='invalid')
        self._tell_end(ticket, report, answer.text)

    def _perform(self) -> None:
        """Run the task; all that it raises is its caller's."""
        task = cast(_Task, self._task)
        try:
            try:
                self._go_on()
                assert self._local is not None      # of a server, nobody asks for a task
                result = task.work(self._local[0], self._go_on)
            finally:
                with self._wake:
                    self._task = None
        except BaseException as error:
            task.outcome.set_exception(error)
        else:
            task.outcome.set_result(result)
        finally:
            del task                # else an error keeps itself, as in `run`

    def _go_on(self) -> None:
        """Take a sign of life of the task; raise Busy where it is to end."""
        self._live(self._clock())
        with self._wake:
            message = cast(_Task, self._task).end_message
        if message:
            raise Busy(message)

    def _live(self, now_s: float) -> None:
        self._sign_of_life_s = now_s

    def _fail(self, message: str) -> None:
        with self._wake:
            self._failed, self._last_error = True, message
