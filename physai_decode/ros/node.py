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
The lifecycle node: its transitions load, start, stop and unload the host's model.

Three threads serve its callbacks: one may be in a transition that loads a model, one may wait for
a measurement, and the third then goes on with requests, services, parameters and `/diagnostics`.
Tokens pass by them all: the worker's thread publishes them.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
import threading
import time

from lifecycle_msgs.srv import ChangeState
from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from physai_decode.config import shown
from physai_decode.host import Host
from physai_decode.host import Load
from physai_decode.host import load
from physai_decode.http import HttpError
from physai_decode.http import KEY_VARIABLE
from physai_decode.http import open_door
from physai_decode.ros import parameters
from physai_decode.ros import params_files as files
from physai_decode.ros.bond import Bond
from physai_decode.ros.clocked_node import ClockedNode
from physai_decode.ros.doors import Doors
from physai_decode.ros.flush import Flush
from physai_decode.ros.generate import GenerateServer
from physai_decode.ros.status import Status
from physai_decode.ros.topics import Topics
from physai_decode.ros.twins import Twins
from physai_decode.ros.typed import unavailable
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock
from rclpy.clock import ClockType
from rclpy.lifecycle import LifecycleNodeMixin
from rclpy.lifecycle import LifecycleState
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

STOP_TIMEOUT_S = 5.0            # a decode step that takes longer is a hung engine
EXIT_TIMEOUT_S = 0.8            # the same at the end of the process
GOALS_TIMEOUT_S = 0.2           # for the results of goals to go out


class _Leaving(Exception):
    """The process ends while a model loads."""


class DecodeNode(LifecycleNodeMixin, ClockedNode):
    """One language model on ROS topics; docs/interface.md lists names and types."""

    def __init__(self, load: Load = load, name: str = 'decode', params_files: Sequence[str] = (),
                 **arguments) -> None:
        """
        Declare everything; load nothing yet.

        :param load: gives an engine, its text and its memory's peak; may raise.
        :param params_files: those of the command line. Where there are any, one of them has to
            name the model: who forgets it, or names another node in it, gets no other model.
        :param arguments: for rclpy's Node.
        :raises ConfigError: a parameter given at start is wrong.
        """
        self._host: Host | None = None
        self._generate: GenerateServer | None = None    # rclpy destroys half a node too
        self._http = None                           # the server, while the node is configured
        self._transition = threading.Lock()         # held during a transition
        self._leaving = False                       # the process ends
        transitions = ReentrantCallbackGroup()
        ClockedNode.__init__(self, name, **arguments)
        LifecycleNodeMixin.__init__(self, callback_group=transitions)
        parameters.declare(self, {'model.path': ''} if params_files else {})
        config = parameters.read(self)
        for service in self.services:
            if service.srv_type is ChangeState:
                service.callback = self._guarded(service.callback)
            elif service.srv_type is SetParameters:
                service.callback = self._on_set_parameters
            elif service.srv_type is SetParametersAtomically:
                service.callback = self._on_set_parameters_atomically
        self._topics = Topics(self, lambda: self._host.config.model_name, self._log_end)
        self._host = host = Host(self._topics, load)
        host.config = config
        self._doors = Doors(self, host)
        self._generate = None if unavailable else GenerateServer(self, host)
        if unavailable:
            self.get_logger().info(f'there is no ~/generate: {unavailable}')
        unknown = parameters.unknown(self)
        for each in unknown:
            self.get_logger().warning(parameters.unknown_text(each))
        unheard = [f'the params file {file} holds nothing for {self.get_fully_qualified_name()}'
                   for file in files.unheard(params_files, self.get_fully_qualified_name())]
        for each in unheard:
            self.get_logger().error(each)
        self._bond = Bond(self)
        self._status = Status(host, self._topics, unknown, unheard,
                              Twins(self, self._topics.tokens), self.faults,
                              self.get_logger().warning)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = self.create_timer(
            config.diagnostics.period_s, self._status.publish, clock=steady)
        if config.autostart:
            self._autostart = self.create_timer(0.0, self._start, transitions, clock=steady)

    def close(self, timeout_s: float) -> bool:
        """
        End what runs and free everything, before the node is flushed and destroyed.

        :returns: False where a load or the engine did not end in time: then only the end of the
            process ends it.
        """
        self._leaving = True
        with self._sole_transition(timeout_s) as sole:
            if not sole:
                return False
            if self._state_machine.current_state[1] != 'finalized':
                self.trigger_shutdown()
        if self._generate is not None:
            self._generate.finish(GOALS_TIMEOUT_S)
        return self._host.worker is None

    def flush(self, timeout_s: float) -> bool:
        """
        Wait until what was published has left the process, and has come.

        :returns: False where it did not in time.
        """
        return Flush(self, self._topics.all).wait(timeout_s)

    def destroy_node(self) -> None:
        """Leave ROS; others see it at once."""
        if self._generate is not None:
            self._generate.close()
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()   # which holds the node

    # Transitions. They run in one thread at a time, and `/diagnostics` in another.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model, warm it up and find the floor; a failure leaves nothing allocated."""
        begin_s, host, config = time.monotonic(), self._host, parameters.read(self)
        self._timer.timer_period_ns = int(config.diagnostics.period_s * 1e9)
        try:
            self._open_http(config)
            loaded = host.load(config, self._progress)
        except Exception:
            log = self.get_logger().info if self._leaving else self.get_logger().error
            log(f'configure failed: {host.failure}')
            self._unload()
            return TransitionCallbackReturn.FAILURE
        footprint = loaded.footprint
        self._status.model_info()
        self.get_logger().info(
            f'loaded {config.model_name} in {time.monotonic() - begin_s:.1f} s: engine '
            f'{footprint.engine}, {footprint.dtype}, {footprint.device_name}')
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Take requests from now on."""
        if not self._stop(0.0):
            return TransitionCallbackReturn.FAILURE
        self._host.start(parameters.read(self))
        self._host.update(parameters.read(self))        # with what was set while it started
        if refused := self._host.worker.in_force.realtime_refused:
            self.get_logger().warning(refused)
        self._bond.form(self._host.config.bond.heartbeat_period_s)
        self.get_logger().info(f'active: takes {self._doors.prompt.topic_name} and '
                               f'{self._doors.request.topic_name}')
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Cancel what runs and take no more requests, even where the engine hangs."""
        self._bond.end()
        self._stop(STOP_TIMEOUT_S)
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the device's memory."""
        if not self._stop(0.0):
            return TransitionCallbackReturn.FAILURE
        self._unload()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of everything, for good."""
        self._host.closed = True
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of everything after a transition that raised; the node is unconfigured then."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

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
                        f'{self._host.state}; wait for its end')
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
        self.get_logger().info(text)

    def _release(self):
        self._bond.end()
        if self._stop(EXIT_TIMEOUT_S if self._leaving else STOP_TIMEOUT_S):
            self._unload()
        self._close_http()

    def _stop(self, timeout_s):
        """Cancel everything; False where the engine does not come back from its step."""
        stopped = self._host.stop(timeout_s)
        if not stopped:
            self.get_logger().error(
                'the engine has not come back from its last step: wait, or restart the process')
        return stopped

    def _unload(self):
        self._close_http()
        self._host.unload()
        self._status.model_info()

    def _open_http(self, config):
        """Open the HTTP door; it answers 503 until a model is active."""
        self._close_http()              # of an activation that failed
        if not config.http.port:
            return
        try:
            self._http = open_door(self._host, config.http, self.faults.note,
                                   lambda: self.faults.count)
        except HttpError as error:
            self._host.failure = str(error)
            raise
        self.get_logger().info(f'HTTP: {self._http.address}')
        if self._http.is_open_to_all:
            self.get_logger().warning(
                f'{self._http.address} takes requests of everyone in the network: set '
                f'{KEY_VARIABLE} in the environment, or http.host to 127.0.0.1')

    def _close_http(self):
        door, self._http = self._http, None
        if door is not None:
            door.close()

    # Parameters

    def _on_set_parameters(self, request, response):
        response.results = [self._set(message) for message in request.parameters]
        return response

    def _on_set_parameters_atomically(self, request, response):
        response.result = self._set(*request.parameters)
        return response

    def _set(self, *messages):
        """Set parameters as a call has them; rclpy's own raises where a value has no type."""
        try:
            return self.set_parameters_atomically(parameters.from_messages(messages))
        except ConfigError as error:
            return self._refused(error)

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
            parameters.merge(self._host.config if self._host else DecodeConfig(),
                             parameter_list)
            self._refuse_fixed(parameter_list)
        except ConfigError as error:
            return self._refused(error)
        result = super().set_parameters_atomically(parameter_list)
        if result.successful and self._host is not None and self._host.worker is not None:
            self._host.update(parameters.read(self))
        return result

    def _refused(self, error):
        self.get_logger().warning(f'parameter refused: {error}')
        return SetParametersResult(successful=False, reason=str(error))

    def _refuse_fixed(self, parameter_list):
        host = self._host
        if host is None:                # these are the values of the start
            return
        locked = self.get_parameter('model.locked').value
        runs = host.loaded is not None or bool(host.loading)
        fixed = parameters.fixed(parameter_list)
        for parameter in parameter_list:
            name, value = parameter.name, parameter.value
            if name not in fixed or value == self.get_parameter(name).value:
                continue
            if locked and parameters.decides_load(name):
                raise ConfigError(
                    f'{name} can not be set to {shown(value)} while the node runs: model.locked '
                    'is true; change it in the params file and start the node again')
            if runs:
                raise ConfigError(
                    f'{name} can not be set to {value!r} now: it {parameters.FIXED} '
                    f'(now: {host.state}); deactivate and clean up first')

    def _log_end(self, report):
        if report.finish_reason == 'rejected':
            self.get_logger().warning(f'a request is refused: {report.message}',
                                      throttle_duration_sec=1.0)
        elif report.finish_reason == 'error':
            self.get_logger().error(f'a request failed: {report.message}')
        elif report.fallback:
            self.get_logger().warning(f'the local model answered: {report.fallback}',
                                      throttle_duration_sec=1.0)
