"""
The lifecycle node: it owns the worker and turns ROS calls into calls on it.

Three threads serve its callbacks: one may be in a transition that loads a model, one may wait for
a measurement, and the third then goes on with prompts, services, parameters and `/diagnostics`.
Tokens pass by them all: the worker's thread publishes them. It knows nothing of models or text.
"""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
import os
import signal
import sys
import threading
import time
from typing import NamedTuple

from diagnostic_msgs.msg import DiagnosticStatus
from lifecycle_msgs.srv import ChangeState
from physai_decode import checkpoint
from physai_decode import engines
from physai_decode import gap
from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.roofline import Peak
from physai_decode.ros import messages
from physai_decode.ros import parameters
from physai_decode.ros.topics import stream_qos
from physai_decode.ros.topics import Topics
from physai_decode.telemetry import find_engine_peak
from physai_decode.telemetry import Telemetry
from physai_decode.text import load_tokenizer
from physai_decode.text import Text
from physai_decode.text import TextError
from physai_decode.timing import RequestReport
from physai_decode.worker import Busy
from physai_decode.worker import Worker
from rcl_interfaces.msg import SetParametersResult
import rclpy
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock
from rclpy.clock import ClockType
from rclpy.executors import MultiThreadedExecutor
from rclpy.lifecycle import LifecycleNodeMixin
from rclpy.lifecycle import LifecycleState
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args
from std_msgs.msg import String
from std_srvs.srv import Trigger

STOP_TIMEOUT_S = 5.0            # a decode step that takes longer is a hung engine
EXIT_TIMEOUT_S = 1.0            # the same at the end of the process
GAP_TIMEOUT_S = 60.0            # a measurement that takes longer is given up
EXIT_LIMIT_S = 1.8              # from a signal to the end of the process, whatever hangs
POLL_S = 0.2                    # how often the main thread looks whether the executor has ended
NO_PEAK = Peak(None, 'unknown')


class Loaded(NamedTuple):
    """What `configure` brings."""

    engine: Engine
    text: Text
    peak: Peak


def load(config: DecodeConfig, progress: Callable[[str], None]) -> Loaded:
    """
    Load the model that the settings name, all of it or nothing.

    :raises EngineError: it can't be had; the message says why and what to do.
    """
    folder = checkpoint.locate(config.model.path, config.model.revision)
    checkpoint.inspect(folder)      # says more plainly than a tokenizer what is wrong with it
    text = Text(load_tokenizer(str(folder)), config.chat)
    engine = engines.build(config, progress)
    try:
        progress('finding the peak bandwidth of the memory')
        return Loaded(engine, text, find_engine_peak(engine.footprint, config))
    except BaseException:
        engine.close()
        raise


class _Leaving(Exception):
    """The process ends while a model loads."""


class DecodeNode(LifecycleNodeMixin, Node):
    """One language model on ROS topics; the README lists names and types."""

    def __init__(self, load: Callable[[DecodeConfig, Callable[[str], None]], Loaded] = load,
                 name: str = 'decode', **arguments) -> None:
        """
        Declare everything; load nothing yet.

        :param load: gives an engine, its text and its memory's peak; may raise.
        :param arguments: for rclpy's Node.
        :raises ConfigError: a parameter given at start is wrong.
        """
        self._load = load
        self._loaded: Loaded | None = None          # from configure to cleanup
        self._telemetry: Telemetry | None = None    # likewise
        self._worker: Worker | None = None          # from activate until its thread ends
        self._config = DecodeConfig()               # what runs; the parameters may be newer
        self._transition = threading.Lock()         # held during a transition
        self._counting = threading.Lock()           # held while a prompt gets its number
        self._before = dict.fromkeys(('requests', 'tokens', 'refusals'), 0)  # not this worker's
        self._loading = ''                          # how far a load is; empty: none
        self._failure = ''                          # why the last load failed
        self._leaving = False                       # the process ends
        self._misses = 0                            # deadline misses at the last /diagnostics
        transitions = ReentrantCallbackGroup()
        Node.__init__(self, name, **arguments)
        LifecycleNodeMixin.__init__(self, callback_group=transitions)
        parameters.declare(self)
        self._config = parameters.read(self)
        for service in self.services:
            if service.srv_type is ChangeState:
                service.callback = self._guarded(service.callback)
        self._topics = Topics(self, self._log_end)
        self.create_subscription(String, '~/prompt', self._on_prompt, stream_qos())
        self.create_service(Trigger, '~/cancel', self._on_cancel)
        self.create_service(Trigger, '~/reset', self._on_reset)
        # It waits for the worker; all else goes on meanwhile.
        self.create_service(Trigger, '~/measure_gap', self._on_measure_gap,
                            callback_group=MutuallyExclusiveCallbackGroup())
        self._unknown = parameters.unknown(self)
        for unknown in self._unknown:
            self.get_logger().warning(parameters.unknown_text(unknown))
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = self.create_timer(
            self._config.diagnostics.period_s, self._publish_diagnostics, clock=steady)
        if self._config.autostart:
            self._autostart = self.create_timer(0.0, self._start, transitions, clock=steady)

    def close(self, timeout_s: float) -> bool:
        """
        End what runs and free everything, before the node is destroyed.

        :returns: False where a load or the engine did not end in time: then only the end of the
            process ends it.
        """
        self._leaving = True
        with self._sole_transition(timeout_s) as sole:
            if not sole:
                return False
            if self._state_machine.current_state[1] != 'finalized':
                self.trigger_shutdown()
        return self._worker is None

    def destroy_node(self) -> None:
        """Leave ROS; others see it at once."""
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()   # which holds the node

    # Transitions. They run in one thread at a time, and `/diagnostics` in another.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model, warm it up and find the floor; a failure leaves nothing allocated."""
        begin_s = time.monotonic()
        self._failure, self._loading = '', 'begin'
        try:
            self._config = parameters.read(self)
            self._timer.timer_period_ns = int(self._config.diagnostics.period_s * 1e9)
            self._loaded = self._load(self._config, self._progress)
            footprint = self._loaded.engine.footprint
            self._telemetry = Telemetry(footprint)
            self._topics.model_info(messages.model_status(
                self._config.model.path, footprint, self._loaded.peak, self._hardware_id()))
        except Exception as error:
            known = isinstance(error, (ConfigError, EngineError, TextError, _Leaving))
            self._failure = str(error) if known else f'{type(error).__name__}: {error}'
            log = self.get_logger().info if self._leaving else self.get_logger().error
            log(f'configure failed: {self._failure}')
            self._unload()
            return TransitionCallbackReturn.FAILURE
        finally:
            self._loading = ''
        self.get_logger().info(
            f'loaded {self._config.model.path} in {time.monotonic() - begin_s:.1f} s: engine '
            f'{footprint.engine}, {footprint.dtype}, {footprint.device_name}')
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Take prompts from now on."""
        if not self._stop_worker(0.0):
            return TransitionCallbackReturn.FAILURE
        self._config = parameters.read(self)
        self._misses = 0
        with self._counting:
            worker = Worker(self._loaded.engine, self._loaded.text, self._config, self._topics,
                            peak=self._loaded.peak, requests_before=self._before['requests'])
            worker.start()
            self._worker = worker
        self._update()              # with what was set while it started
        self.get_logger().info(
            f'active: prompts are taken on {self.get_fully_qualified_name()}/prompt')
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Cancel what runs and take no more prompts, even where the engine hangs."""
        self._stop_worker(STOP_TIMEOUT_S)
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the device's memory."""
        if not self._stop_worker(0.0):
            return TransitionCallbackReturn.FAILURE
        self._unload()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of everything."""
        if self._stop_worker(EXIT_TIMEOUT_S if self._leaving else STOP_TIMEOUT_S):
            self._unload()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of everything after a transition that raised; the node is unconfigured then."""
        return self.on_shutdown(state)

    def _start(self):
        """Configure and activate, once, as soon as the executor runs."""
        self._autostart.cancel()
        with self._sole_transition() as sole:
            if sole and self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
                self.trigger_activate()

    def _guarded(self, change_state):
        """Wrap the change_state service: a transition during another is refused in plain words."""
        def answer(request, response):
            asked = request.transition.label or f'transition {request.transition.id}'
            with self._sole_transition() as sole:
                if not sole:
                    self.get_logger().error(
                        f'{asked} is refused: another transition is under way and the node is '
                        f'{self._state()}; wait for its end')
                    return response
                try:
                    return change_state(request, response)
                except RuntimeError as error:       # Humble lets rcl's error out
                    self.get_logger().error(f'{asked} is refused: {error}')
                    return response
        return answer

    @contextmanager
    def _sole_transition(self, timeout_s: float = 0.0) -> Iterator[bool]:
        """Give True inside ``with`` where no other transition runs."""
        sole = self._transition.acquire(timeout=timeout_s)
        try:
            yield sole
        finally:
            if sole:
                self._transition.release()

    def _progress(self, text: str) -> None:
        if self._leaving:
            raise _Leaving('the process ends')
        self._loading = text
        self.get_logger().info(text)

    def _stop_worker(self, timeout_s):
        """Cancel everything; False where the engine does not come back from its step."""
        worker = self._worker
        if worker is None:
            return True
        if not worker.stop(timeout_s):
            self.get_logger().error(
                'the engine has not come back from its last step: wait, or restart the process')
            return False
        with self._counting:
            self._worker = None
            for name in self._before:
                self._before[name] += getattr(worker, name)
        return True

    def _unload(self):
        loaded, telemetry = self._loaded, self._telemetry
        self._loaded = self._telemetry = None
        if telemetry is not None:
            telemetry.close()
        if loaded is not None:
            loaded.engine.close()
        self._topics.model_info(messages.status(
            'decode: model', messages.MODEL_KEYS, {}, message='nothing is loaded',
            hardware_id=messages.NOT_KNOWN))

    # What others ask; only measure_gap waits for the model

    def _on_prompt(self, message):
        received_s = time.monotonic()
        with self._counting:
            if self._worker is not None:
                self._worker.submit(message.data, received_s)
                return
            for name in ('requests', 'refusals'):
                self._before[name] += 1
            number = self._before['requests']
        self._topics.finished(RequestReport(number, 'rejected', self._why_not()), '')

    def _why_not(self):
        """Say why no prompt is taken where there is no worker, and what to do."""
        if self._loading:
            return f'the node is loading ({self._loading}): send it again when it is active'
        if self._failure:
            return f'no model is loaded: {self._failure}; mend that, then configure and activate'
        if self._state_machine.current_state[1] == 'finalized':
            return 'the node is shut down: restart its process'
        return f'the node is inactive: {"" if self._loaded else "configure and "}activate it first'

    def _on_cancel(self, request, response):
        worker = self._worker
        response.success = True
        response.message = worker.cancel() if worker is not None else 'nothing running'
        return response

    def _on_reset(self, request, response):
        worker = self._worker
        response.success = True
        response.message = worker.reset() if worker is not None else 'nothing to forget'
        return response

    def _on_measure_gap(self, request, response):
        loaded, worker = self._loaded, self._worker
        try:
            if worker is None or worker.occupied:
                raise Busy(self._why_not() if worker is None else worker.occupied)
            with gap.rival(loaded.engine, self._config, self.get_logger().info) as other:
                response.message = str(worker.run(
                    lambda engine, go_on: gap.measure(engine, other, loaded.peak, go_on),
                    GAP_TIMEOUT_S))
            response.success = True
        except (Busy, EngineError) as error:
            response.message = f'not measured: {error}'
        except Exception as error:      # the device's memory is full, for one
            response.message = f'not measured: {type(error).__name__}: {first_line(error)}'
        self.get_logger().info(f'the gap: {response.message}')
        return response

    def set_parameters(self, parameter_list: list[Parameter]) -> list[SetParametersResult]:
        """Set parameters one by one; see `set_parameters_atomically`."""
        return [self.set_parameters_atomically([parameter]) for parameter in parameter_list]

    def set_parameters_atomically(self, parameter_list: list[Parameter]) -> SetParametersResult:
        """Check all parameters, then set and apply them all, or none and say why."""
        parameter_list = parameters.typed(parameter_list)
        try:
            for parameter in parameter_list:
                if not self.has_parameter(parameter.name):
                    raise ConfigError(parameters.unknown_text(parameter.name))
            parameters.merge(self._config, parameter_list)
            self._refuse_fixed(parameter_list)
        except ConfigError as error:
            self.get_logger().warning(f'parameter refused: {error}')
            return SetParametersResult(successful=False, reason=str(error))
        result = super().set_parameters_atomically(parameter_list)
        if result.successful:
            self._update()
        return result

    def _update(self):
        """Give what runs the parameters that may change meanwhile."""
        worker = self._worker
        if worker is not None:
            config = parameters.read(self)
            self._config = replace(
                self._config, sampling=config.sampling, deadline=config.deadline)
            worker.update(config.sampling, config.deadline)

    def _refuse_fixed(self, parameter_list):
        if self._loaded is None and not self._loading:
            return
        fixed = parameters.fixed(parameter_list)
        for parameter in parameter_list:
            value = parameter.value
            if parameter.name in fixed and value != self.get_parameter(parameter.name).value:
                raise ConfigError(
                    f'{parameter.name} can not be set to {value!r} now: it {parameters.FIXED} '
                    f'(now: {self._state()}); deactivate and clean up first')

    # What the node says of itself

    def _log_end(self, report):
        if report.finish_reason == 'rejected':
            self.get_logger().warning(f'a prompt is refused: {report.message}')
        elif report.finish_reason == 'error':
            self.get_logger().error(f'a request failed: {report.message}')

    def _state(self):
        worker = self._worker
        if self._loading:
            return 'loading'
        if worker is not None:
            return worker.state
        return 'failed' if self._failure else 'inactive'

    def _hardware_id(self):
        loaded = self._loaded
        if loaded is None:
            return messages.NOT_KNOWN
        footprint = loaded.engine.footprint
        return f'{footprint.device_name} {footprint.device_uuid}'.strip()

    def _publish_diagnostics(self):
        settings, hardware_id = self._config.diagnostics, self._hardware_id()
        loaded, worker = self._loaded, self._worker
        window = worker.window() if worker is not None else None
        late = window is not None and window.deadline_misses > self._misses
        self._misses = window.deadline_misses if window is not None else 0
        self._topics.diagnostics([
            messages.latency_status(window, settings, late, hardware_id),
            messages.bandwidth_status(
                window, loaded and loaded.engine.footprint, loaded.peak if loaded else NO_PEAK,
                settings, hardware_id),
            self._engine_status(worker, hardware_id)])

    def _engine_status(self, worker, hardware_id) -> DiagnosticStatus:
        loaded, telemetry, state = self._loaded, self._telemetry, self._state()
        values = {
            'state': state, 'engine': self._config.engine.name, 'model': self._config.model.path,
            'queue_depth': worker.queue_depth if worker is not None else 0,
            'queue_capacity': self._config.queue.size,
            'unknown_parameters': ' '.join(self._unknown)}
        for name, before in self._before.items():
            values[name] = before + (getattr(worker, name) if worker is not None else 0)
        if loaded is not None:
            values.update({
                name: getattr(loaded.engine.footprint, name)
                for name in ('engine', 'dtype', 'quantization', 'device', 'cuda_graph')})
        if telemetry is not None:
            values.update(telemetry.read())
        level, message = messages.OK, self._loading or state
        if self._unknown:
            level, message = messages.WARN, f'unknown parameters: {" ".join(self._unknown)}'
        if state == 'stalled':
            level = messages.ERROR
            message = f'no token for more than {self._config.diagnostics.stall_timeout_s:g} s'
        if state == 'failed':
            level = messages.ERROR
            message = worker.last_error if worker is not None else self._failure
        return messages.status('decode: engine', messages.ENGINE_KEYS, values, message=message,
                               level=level, hardware_id=hardware_id)


def spin(executor: MultiThreadedExecutor, stop: threading.Event) -> None:
    """Serve callbacks until the executor is shut down; an error in one ends the process."""
    try:
        executor.spin()
    finally:
        stop.set()


def main(args: list[str] | None = None, load=load) -> int:
    """Run the node until SIGINT or SIGTERM, then end the process; returns where it can't start."""
    stop = threading.Event()
    signals = signal.SIGINT, signal.SIGTERM
    # Blocked here, and so in every thread to come, and waited for below: a handler may be replaced
    # by a library's. This handler is for threads that are older, as numpy's.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for number in signals:
        signal.signal(number, lambda *_: stop.set())
    # Fast DDS sends in a thread of its own then: a slow network does not hold up decoding.
    os.environ.setdefault('RMW_FASTRTPS_PUBLICATION_MODE', 'ASYNCHRONOUS')
    try:
        # rclpy's own handlers would end the context before the last messages are out.
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        others = remove_ros_args(args)[1:]
    except (RuntimeError, ValueError) as error:     # a params file that is not there, a slip
        print(f'decode_node: {type(error).__name__}: {error}', file=sys.stderr)
        return 1
    if others:
        print(f'decode_node: it takes no {others[0]}; usage: decode_node [--ros-args '
              '[--params-file FILE] [-p NAME:=VALUE] [-r OLD:=NEW] ...]', file=sys.stderr)
        rclpy.shutdown()
        return 2
    try:
        node = DecodeNode(load)
    except Exception as error:          # rclpy's own parameters raise whatever is behind them
        kind = '' if isinstance(error, ConfigError) else f'{type(error).__name__}: '
        rclpy.logging.get_logger('decode').fatal(f'{kind}{error}')
        rclpy.shutdown()
        return 1
    executor = MultiThreadedExecutor(num_threads=3)
    executor.add_node(node)
    thread = threading.Thread(target=spin, args=(executor, stop), name='executor')
    thread.start()
    while not stop.is_set() and signal.sigtimedwait(signals, POLL_S) is None:
        pass
    # Whatever a driver does while its memory is freed, the process ends when it was told to.
    last = threading.Timer(EXIT_LIMIT_S, os._exit, (0,))
    last.daemon = True
    last.start()
    if node.close(EXIT_TIMEOUT_S):
        executor.shutdown()
        thread.join()
        node.destroy_node()
        rclpy.shutdown()
    # Else a thread hangs in a load or a kernel, which nothing but this can end. And where all has
    # ended well, Python would take up to two seconds to take torch apart, for nothing.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == '__main__':
    sys.exit(main())
