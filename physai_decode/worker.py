"""
One thread that answers prompts one after another: queue, cancel, preempt, deadlines.

It drives an engine, turns ids into text and calls a sink. It knows nothing of ROS or torch, and
not what the sink does with what it gets.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
from contextlib import closing
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import gc
import threading
import time
from typing import Any
from typing import cast
from typing import Protocol
from typing import TypeVar

from physai_decode.config import DeadlineConfig
from physai_decode.config import DecodeConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.engine import Step
from physai_decode.roofline import Peak
from physai_decode.roofline import Roofline
from physai_decode.text import TextError
from physai_decode.timing import Recorder
from physai_decode.timing import RequestRecorder
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
from physai_decode.timing import WindowReport

Result = TypeVar('Result')
# A task gets the engine, and what to call after each step.
Work = Callable[[Engine, Callable[[], None]], Result]


class Sink(Protocol):
    """
    Where the worker's reports go.

    ``token`` is called from the worker's thread only. ``finished`` is called exactly once for each
    request: from the worker's thread, or, for a request that leaves without its turn (refused at
    ``submit``, waiting at ``cancel``, ``stop`` or a preemption), from the thread that made that
    call, before the call returns. So ``finished`` must be callable from several threads at once.
    An exception from either ends the request that it was called for.
    """

    def token(self, report: TokenReport) -> None:
        """
        Take one token, just known.

        A token whose text is not complete, or may be the beginning of a stop text, comes together
        with the next one or with the end of the answer: the text may belong to it after all.
        """
        ...

    def finished(self, report: RequestReport, text: str) -> None:
        """Take the end of one request; text is all its tokens' pieces joined."""
        ...


class Decoder(Protocol):
    """What the worker asks of one answer's decoder; see ``physai_decode.text.Decoder``."""

    stopped: bool

    @property
    def held(self) -> bool:
        """Tell whether text is held back."""
        ...

    def push(self, token_id: int) -> str:
        """Take a token, give the text that it completed."""
        ...

    def flush(self) -> str:
        """Give the text that is held back."""
        ...


class TextCoder(Protocol):
    """What the worker asks of its text; see ``physai_decode.text.Text``."""

    def encode(self, prompt: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Give the ids of a prompt in its conversation."""
        ...

    def decoder(self, stop: Sequence[str] = ()) -> Decoder:
        """Give a decoder for one answer."""
        ...


@dataclass
class _Request:
    """One prompt; guarded by the worker's lock, but for what never changes."""

    id: int
    prompt: str
    received_s: float
    end_reason: str = ''            # cancelled or preempted, once that was asked for
    end_message: str = ''
    end_asked_s: float | None = None
    finished: bool = False          # its end was reported, or is about to be
    answer: '_Answer | None' = None     # once it is taken


@dataclass
class _Task:
    """What is run on the engine between two requests."""

    work: Work[Any]
    outcome: 'futures.Future[Any]' = field(default_factory=futures.Future)
    end_message: str = ''           # why it is to end early; guarded by the worker's lock


class Busy(RuntimeError):
    """The engine is not free for a task; the message says why."""


class _Refused(Exception):
    """A prompt that the model can't take; the message says why."""


class Worker:
    """
    One engine, one thread, one queue.

    All methods and properties may be used from any thread, and none of them waits for the engine
    but ``run`` and ``stop``.
    """

    def __init__(self, engine: Engine, text: TextCoder, config: DecodeConfig, sink: Sink,
                 clock: Callable[[], float] = time.monotonic,
                 peak: Peak = Peak(None, 'unknown'), requests_before: int = 0) -> None:
        """
        Make a worker that is not running yet.

        :param engine: used by the worker's thread alone while that runs, and not closed.
        :param clock: monotonic, in seconds.
        :param peak: the memory bus that the tokens' floor is for.
        :param requests_before: how many ids are taken already; the first is the next.
        """
        self._engine = engine
        self._text = text
        self._sink = sink
        self._clock = clock
        self._requests_before = requests_before
        self._roofline = Roofline(engine.footprint, peak)
        self._queue_config = config.queue
        self._keep_history = config.chat.keep_history
        self._window_s = config.diagnostics.window_s
        self._stall_timeout_s = config.diagnostics.stall_timeout_s
        self._sampling = config.sampling
        self._recorder = Recorder(self._window_s, config.deadline, self._roofline)
        self._thread: threading.Thread | None = None

        self._wake = threading.Condition()
        # All below is guarded by _wake's lock.
        self._accepting = False
        self._queue: deque[_Request] = deque()
        self._running: _Request | None = None
        self._task: _Task | None = None     # waits for the thread, or is run by it
        self._sign_of_life_s = 0.0      # what runs: when it was taken, or its last step
        self._history: list[tuple[str, str]] = []
        self._conversation = 0          # counts the resets: a turn of an older one is not kept
        self._last_error = ''
        self._failed = False
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
        self._thread = threading.Thread(target=self._run, name='decode', daemon=True)
        self._thread.start()

    def submit(self, prompt: str, received_s: float | None = None) -> int:
        """
        Queue a prompt and give its request id, counted from ``requests_before`` + 1.

        A prompt that can't be queued is refused through the sink before this returns. One that
        turns out too long is refused from the worker's thread, when its turn comes.

        :param received_s: when it was received, by the worker's clock; None for now.
        """
        now_s = self._clock()
        removed: list[_Request] = []
        with self._wake:
            self._requests += 1
            request = _Request(self._requests_before + self._requests, prompt,
                               now_s if received_s is None else received_s)
            refusal = self._refusal(prompt)
            if refusal:
                self._refusals += 1
            else:
                if self._queue_config.policy == 'preempt':
                    removed = self._end_all('preempted', f'request {request.id} came', now_s)
                self._queue.append(request)
                self._wake.notify()
        if refusal:
            self._sink.finished(RequestReport(request.id, 'rejected', refusal), '')
        self._report_removed(removed)
        return request.id

    def cancel(self) -> str:
        """End the running request within one step, empty the queue, and say what was done."""
        with self._wake:
            running = self._running
            removed = self._end_all('cancelled', '', self._clock())
        self._report_removed(removed)
        done = [f'cancelled request {running.id}'] if running is not None else []
        if removed:
            done.append(f'removed {len(removed)} waiting')
        return ', '.join(done) or 'nothing running'

    def reset(self) -> str:
        """Forget the conversation, the turn that is running too, and say what was forgotten."""
        with self._wake:
            turns = len(self._history)
            self._history = []
            self._conversation += 1
        return f'forgot {turns} turn{"" if turns == 1 else "s"}'

    def run(self, work: Work[Result], timeout_s: float) -> Result:
        """
        Run a task on the engine in the worker's thread, where nothing runs or waits.

        Prompts that come meanwhile wait for their turn. The state is generating as long, or
        stalled; nothing of it is recorded.

        :param work: gets the engine, and a function to call after each step: a sign of life, which
            raises where the task is to end.
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
            removed = self._end_all('cancelled', 'the node stops answering', self._clock())
            if self._task is not None:
                self._task.end_message = 'the node stops answering'
            self._wake.notify()
        self._report_removed(removed)
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        gc.unfreeze()
        with self._wake:
            stuck = self._running
            if stuck is None or not self._thread.is_alive():
                return not self._thread.is_alive()
            lost, stuck.finished = not stuck.finished, True
        if lost:
            self._fail(f'the engine did not come back within {timeout_s:g} s')
            cast(_Answer, stuck.answer).end('error', self._last_error)
        return False

    def update(self, sampling: SamplingConfig | None = None,
               deadline: DeadlineConfig | None = None) -> None:
        """Take new settings: sampling from the next request on, deadlines at once."""
        if sampling is not None:
            self._sampling = sampling
        if deadline is not None:
            self._recorder.deadline = deadline

    def window(self) -> WindowReport:
        """Report on the last ``diagnostics.window_s`` seconds, and on all since ``start``."""
        return self._recorder.window(self._clock())

    @property
    def state(self) -> str:
        """
        Tell the state: idle, generating, stalled or failed.

        Stalled: no token, nor a piece of a prompt, for ``diagnostics.stall_timeout_s``. Failed:
        the last request ended with an error, and none runs. A task of ``run`` is like a request.
        """
        with self._wake:
            if self._running is None and self._task is None:
                return 'failed' if self._failed else 'idle'
            silent_s = self._clock() - self._sign_of_life_s
            return 'stalled' if silent_s > self._stall_timeout_s else 'generating'

    @property
    def occupied(self) -> str:
        """Say why no task can be run now; empty where one can."""
        with self._wake:
            if not self._accepting:
                return 'the node is not active: activate it first'
            if self._running is not None:
                return (f'request {self._running.id} is {self.state}: call again when it has '
                        'ended')
            if self._task is not None or self._queue:
                return 'the engine is about to be used: call again later'
            return ''

    @property
    def last_error(self) -> str:
        """Give the message of the last error, empty where there was none."""
        return self._last_error

    @property
    def queue_depth(self) -> int:
        """Count the prompts that wait."""
        return len(self._queue)

    @property
    def requests(self) -> int:
        """Count the prompts so far, refused ones too."""
        return self._requests

    @property
    def refusals(self) -> int:
        """Count the refused prompts."""
        return self._refusals

    @property
    def tokens(self) -> int:
        """Count the tokens so far."""
        return self._tokens

    def _refusal(self, prompt: str) -> str:
        """Say why a prompt can't be queued; empty where it can. With the lock held."""
        if not self._accepting:
            return 'the node is not active: activate it first'
        if not prompt:
            return 'the prompt is empty: send some text'
        if self._queue_config.policy == 'reject' and len(self._queue) >= self._queue_config.size:
            return (f'the queue is full with {len(self._queue)} waiting prompts: send it again '
                    'later, or raise queue.size')
        return ''

    def _end_all(self, reason: str, message: str, now_s: float) -> list[_Request]:
        """Flag the running request, take all others out of the queue. With the lock held."""
        removed = list(self._queue)
        self._queue.clear()
        for request in [*removed, *([self._running] if self._running is not None else [])]:
            if not request.end_reason:
                request.end_reason, request.end_message = reason, message
                request.end_asked_s = now_s
        return removed

    def _report_removed(self, removed: list[_Request]) -> None:
        """Report the end of requests that never had their turn. From the caller's thread."""
        for request in removed:
            now_s = self._clock()
            times = self._recorder.request(request.id, request.received_s, None)
            self._sink.finished(times.finish(
                now_s, request.end_reason, request.end_message, request.end_asked_s), '')

    # What follows runs in the worker's thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and self._task is None and self._accepting:
                    self._wake.wait()
                self._sign_of_life_s = self._clock()
                answer = None
                if self._task is None:
                    if not self._queue:
                        return
                    self._running = self._queue.popleft()
                    answer = self._running.answer = _Answer(self, self._running)
            with _COLLECTOR.paused(full=lambda: not self._queue):
                if answer is None:
                    self._perform()
                    continue
                try:
                    answer.give()
                except Exception as error:
                    # Only the sink's own finished() can get here: the engine's and the text's
                    # errors have ended the request in give().
                    self._fail(_said(error))
                with self._wake:
                    self._running = None

    def _perform(self) -> None:
        """Run the task; all that it raises is its caller's."""
        task = cast(_Task, self._task)
        try:
            try:
                self._go_on()
                result = task.work(self._engine, self._go_on)
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
        with self._wake:
            self._sign_of_life_s = self._clock()
            message = cast(_Task, self._task).end_message
        if message:
            raise Busy(message)

    def _fail(self, message: str) -> None:
        with self._wake:
            self._failed, self._last_error = True, message


class _Answer:
    """The answer to one request, in the worker's thread, from taken to finished."""

    def __init__(self, worker: Worker, request: _Request) -> None:
        self._worker = worker
        self._request = request
        self._sampling = worker._sampling
        self._conversation = worker._conversation
        self._times: RequestRecorder = worker._recorder.request(
            request.id, request.received_s, worker._clock())
        self._pieces: list[str] = []
        self._waiting: TokenReport | None = None    # its text is not known to the end
        self._publish_s: float | None = None
        self._note = ''

    def give(self) -> None:
        """Answer, and report the end."""
        worker, request = self._worker, self._request
        failure = ''
        try:
            self._decoder = worker._text.decoder(self._sampling.stop)
            try:
                reason, message = self._decode()
            finally:
                self._release(self._decoder.flush())
        except (_Refused, TextError) as error:
            reason, message = 'rejected', str(error)
        except Exception as error:
            # The top of the worker: whatever an engine raises ends its request and no more.
            reason, message, failure = 'error', _said(error), _said(error)
        with worker._wake:
            if request.finished:                    # stop() has given it up
                return
            if request.end_reason and reason not in ('rejected', 'error'):
                reason, message = request.end_reason, request.end_message
            request.finished = True
            worker._running = None
            if reason == 'rejected':
                worker._refusals += 1
            else:
                worker._failed = bool(failure)
                worker._last_error = failure or worker._last_error
            if (worker._keep_history and reason in ('stop', 'length')
                    and worker._conversation == self._conversation):
                worker._history.append((request.prompt, ''.join(self._pieces)))
        self.end(reason, message)

    def end(self, reason: str, message: str) -> None:
        """Report the end, once: from the worker's thread, or where that hangs from another."""
        worker = self._worker
        worker._sink.finished(self._times.finish(
            worker._clock(), reason, '; '.join(filter(None, (message, self._note))),
            self._request.end_asked_s), ''.join(self._pieces))

    def _decode(self) -> tuple[str, str]:
        """Drive the engine to the end of the answer; give the finish reason and its message."""
        worker, sampling = self._worker, self._sampling
        footprint = worker._engine.footprint
        if self._is_late():
            return 'deadline', 'deadline.request_ms had passed before its turn came'
        prompt_ids = self._encode()
        self._times.prompt_tokens = len(prompt_ids)
        if self._request.end_reason:
            return self._request.end_reason, self._request.end_message
        count = 0
        # Closing the generator is what cancels the engine, however this loop is left.
        with closing(cast('Generator[Step, None, None]',
                          worker._engine.stream(prompt_ids, sampling))) as steps:
            for step in steps:
                now_s = worker._clock()
                with worker._wake:
                    worker._sign_of_life_s = now_s
                    if self._request.end_reason:
                        return self._request.end_reason, self._request.end_message
                if not count:
                    self._times.cached_tokens = step.cached_tokens
                device_s = step.device_s
                for token_id in step.token_ids:
                    if token_id in footprint.eos_token_ids:
                        return 'stop', ''
                    self._token(now_s, token_id, device_s)
                    device_s = None                 # a step's time goes to its first token
                    count += 1
                    if self._decoder.stopped:
                        return 'stop', 'a text of sampling.stop was met'
                    if count == sampling.max_new_tokens:
                        return 'length', f'sampling.max_new_tokens is {count}'
                if self._is_late():
                    return 'deadline', 'deadline.request_ms has passed'
        return 'length', f'the context of {footprint.max_context} tokens is full'

    def _encode(self) -> list[int]:
        """
        Give the prompt's ids, with as much of the conversation as leaves room for an answer.

        :raises _Refused: the prompt alone is too long.
        """
        worker = self._worker
        context = worker._engine.footprint.max_context
        with worker._wake:
            turns = list(worker._history)
        known = len(turns)
        room = context - min(self._sampling.max_new_tokens, context // 2)
        prompt_ids = worker._text.encode(self._request.prompt, turns)
        while turns and len(prompt_ids) > room:
            del turns[0]
            prompt_ids = worker._text.encode(self._request.prompt, turns)
        if not prompt_ids:
            raise _Refused('the prompt holds no token: send some text')
        if len(prompt_ids) >= context:
            raise _Refused(
                f'the prompt is {len(prompt_ids)} tokens long with its chat template, and the '
                f'context holds {context} tokens, one of them for the answer: shorten the prompt, '
                "or raise engine.max_context if the model's own limit is higher")
        if len(turns) < known:
            dropped = known - len(turns)
            self._note = (f'the conversation no longer fits {room} tokens: its oldest {dropped} '
                          f'turn{"" if dropped == 1 else "s"} dropped')
            with worker._wake:
                if worker._conversation == self._conversation:
                    del worker._history[:dropped]
        return prompt_ids

    def _token(self, now_s: float, token_id: int, device_s: float | None) -> None:
        """Record a token, and give it to the sink unless its text is still open."""
        worker = self._worker
        piece = self._decoder.push(token_id)
        with worker._wake:
            worker._tokens += 1
        self._release('')
        report = self._times.token(now_s, token_id, piece, device_s, self._publish_s)
        if self._decoder.held:
            self._waiting = report
        else:
            self._publish(report)

    def _release(self, tail: str) -> None:
        """Give the sink the token that waits, with the text that turned out to be its own."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._publish(replace(waiting, text=waiting.text + tail))

    def _publish(self, report: TokenReport) -> None:
        worker = self._worker
        with worker._wake:
            if self._request.finished:
                return
        self._pieces.append(report.text)
        begin_s = worker._clock()
        worker._sink.token(report)
        self._publish_s = worker._clock() - begin_s

    def _is_late(self) -> bool:
        """Tell whether the request is to end because its time is over."""
        deadline = self._worker._recorder.deadline
        spent_ms = 1e3 * (self._worker._clock() - self._request.received_s)
        return (deadline.action == 'truncate' and deadline.request_ms > 0
                and spent_ms > deadline.request_ms)


class _Collector:
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


_COLLECTOR = _Collector()


def _said(error: Exception) -> str:
    """Give an exception in words: its type, and its message where it has one."""
    return f'{type(error).__name__}: {error}' if str(error) else type(error).__name__
