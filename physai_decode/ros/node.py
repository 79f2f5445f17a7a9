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
The lifecycle node, whose transitions load, start, stop and unload the model.

Three executor threads run its callbacks. While one is in a transition that loads a model and
another waits for measure_gap, the third still handles requests, services, parameters and
`/diagnostics`. Tokens do not need the executor: the decode thread publishes them.
"""

from array import array
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from functools import wraps
import threading
import time
from typing import Any
from typing import TYPE_CHECKING

from lifecycle_msgs.srv import ChangeState
from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from physai_decode.config import shown
from physai_decode.engine import described
from physai_decode.host import Host
from physai_decode.host import Load
from physai_decode.host import load
from physai_decode.http import HttpError
from physai_decode.http import KEY_VARIABLE
from physai_decode.http import start_server
from physai_decode.ros import parameters
from physai_decode.ros import params_files as files
from physai_decode.ros.bond import Bond
from physai_decode.ros.clocked_node import ClockedNode
from physai_decode.ros.duplicates import Duplicates
from physai_decode.ros.endpoints import Endpoints
from physai_decode.ros.flush import Flush
from physai_decode.ros.generate import GenerateServer
from physai_decode.ros.interfaces import unavailable
from physai_decode.ros.status import Status
from physai_decode.ros.topics import check_qos_overrides
from physai_decode.ros.topics import Topics
from physai_decode.timing import RequestReport
from rcl_interfaces.msg import Parameter as ParameterMessage
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

if TYPE_CHECKING:
    from physai_decode.http.server import HttpServer

STOP_TIMEOUT_S = 5.0            # an engine whose decode step takes longer is considered hung
EXIT_TIMEOUT_S = 0.8            # the same when the process ends
GOALS_TIMEOUT_S = 0.2           # to send the results of goals


class _Exiting(BaseException):
    """The process ends while a model loads."""


def _logged(transition: Callable[[Any, LifecycleState], TransitionCallbackReturn],
            ) -> Callable[[Any, LifecycleState], TransitionCallbackReturn]:
    """Wrap a transition so that its exception is logged; rclpy itself ignores exceptions."""
    @wraps(transition)
    def run(node: 'DecodeNode', state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(node, state)
        except Exception as error:
            node._host.failure = described(error)
            node.faults.note(transition.__name__, error)
            return TransitionCallbackReturn.ERROR
    return run


class DecodeNode(LifecycleNodeMixin, ClockedNode):
    """One language model on ROS topics; docs/interface.md lists names and types."""

    _host: Host

    def __init__(self, load: Load = load, name: str = 'decode', params_files: Sequence[str] = (),
                 **arguments: Any) -> None:
        """
        Declare the parameters and create the topics and services; load nothing yet.

        :param load: loads the model; replaceable for tests.
        :param params_files: the params files on the command line. If there are any, one of them
            has to name the model, so that a file for another node does not start a default model.
        :param arguments: passed to rclpy's Node.
        :raises ConfigError: a parameter given at start is wrong.
        """
        self._ready = False                         # whether there is a host
        self._generate: GenerateServer | None = None    # rclpy also destroys incomplete nodes
        self._http: HttpServer | None = None        # while the node is configured
        self._transition = threading.Lock()         # held during a transition
        self._exiting = False                       # the process is about to end
        transitions = ReentrantCallbackGroup()
        ClockedNode.__init__(self, name, **arguments)
        LifecycleNodeMixin.__init__(self, callback_group=transitions)
        parameters.declare(self, {'model.path': ''} if params_files else {})
        config = parameters.read(self)
        check_qos_overrides(self._parameter_overrides.values())
        for service in self.services:
            if service.srv_type is ChangeState:
                service.callback = self._guarded(service.callback)
            elif service.srv_type is SetParameters:
                service.callback = self._on_set_parameters
            elif service.srv_type is SetParametersAtomically:
                service.callback = self._on_set_parameters_atomically
        self._topics = Topics(self, lambda: self._host.config.model_name, self._log_end)
        self._host = host = Host(self._topics, load, self.get_logger().warning)
        host.config = config
        self._ready = True
        self._endpoints = Endpoints(self, host)
        self._generate = None if unavailable else GenerateServer(self, host)
        if unavailable:
            self.get_logger().info(f'~/generate is not available: {unavailable}')
        unknown = parameters.unknown(self)
        for each in unknown:
            self.get_logger().warning(parameters.unknown_message(each))
        full_name = self.get_fully_qualified_name()
        host.params_problems = [
            f'the params file {file} has no section for {full_name}: begin one with {full_name}: '
            'or /**:' for file in files.without_section(params_files, full_name)]
        for each in host.params_problems:
            self.get_logger().error(each)
        self._bond = Bond(self)
        self._status = Status(
            host, self._topics, unknown, Duplicates(self, self._topics.tokens), self.faults,
            self.get_logger().warning)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = self.create_timer(
            config.diagnostics.period_s, self._status.publish, clock=steady)
        if config.autostart:
            self._autostart = self.create_timer(0.0, self._start, transitions, clock=steady)

    def close(self, timeout_s: float) -> bool:
        """
        Shut down: end the requests and free the model, before the node is flushed and destroyed.

        :returns: False if a load or the engine did not stop in time. Only the end of the process
            stops it then.
        """
        self._exiting = True
        with self._try_transition(timeout_s) as acquired:
            if not acquired:
                return False
            if self._state_machine.current_state[1] != 'finalized':
                self.trigger_shutdown()
        if self._generate is not None:
            self._generate.finish(GOALS_TIMEOUT_S)
        return self._host.worker is None

    def flush(self, timeout_s: float) -> bool:
        """
        Wait until the last messages have been sent and acknowledged.

        :returns: False after the timeout.
        """
        return Flush(self, self._topics.all).wait(timeout_s)

    def destroy_node(self) -> None:
        """Destroy the node, its action server and its state machine."""
        if self._generate is not None:
            self._generate.close()
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()   # it holds a reference to the node

    # Transitions. One runs at a time, while `/diagnostics` runs in another thread.

    @_logged
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model, warm it up and find the peak bandwidth; a failure frees everything."""
        begin_s, host, config = time.monotonic(), self._host, parameters.read(self)
        self._timer.timer_period_ns = int(config.diagnostics.period_s * 1e9)
        try:
            self._open_http(config)
            loaded = host.load(config, self._progress)
        except (Exception, _Exiting):
            message = f'configure failed: {host.failure}'
            if self._exiting:
                self.get_logger().info(message)
            else:
                self.get_logger().error(message)
            self._unload()
            return TransitionCallbackReturn.FAILURE
        footprint = loaded.footprint
        self._status.model_info()
        duration = f'in {time.monotonic() - begin_s:.1f} s'
        self.get_logger().info(
            f'loaded {config.model_name} {duration}: engine {footprint.engine}, '
            f'{footprint.dtype}, {footprint.device_name}' if loaded.ready else
            f'configured {duration}, but {footprint.device_name} is not ready to run '
            f'{config.model_name}')
        return TransitionCallbackReturn.SUCCESS

    @_logged
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start to accept requests."""
        if not self._stop(0.0):
            return TransitionCallbackReturn.FAILURE
        self._host.start(parameters.read(self))
        self._host.update(parameters.read(self))        # apply what was set in the meantime
        worker = self._host.worker
        in_force = worker.in_force if worker is not None else None
        if in_force is not None and in_force.realtime_refused:
            self.get_logger().warning(in_force.realtime_refused)
        self._bond.form(self._host.config.bond.heartbeat_period_s)
        interfaces = [self._endpoints.prompt.topic_name, self._endpoints.request.topic_name]
        if self._generate is not None:
            interfaces.append(self._generate.name)
        if self._http is not None:
            interfaces.append(self._http.address)
        self.get_logger().info(f'active: accepts requests on {", ".join(interfaces)}')
        return TransitionCallbackReturn.SUCCESS

    @_logged
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Cancel all requests and refuse new ones, even if the engine hangs."""
        self._bond.end()
        self._stop(STOP_TIMEOUT_S)
        return TransitionCallbackReturn.SUCCESS

    @_logged
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unload the model."""
        if not self._stop(0.0):
            return TransitionCallbackReturn.FAILURE
        self._unload()
        return TransitionCallbackReturn.SUCCESS

    @_logged
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unload the model for good."""
        self._host.closed = True
        self._release()
        return TransitionCallbackReturn.SUCCESS

    @_logged
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unload the model after a transition raised; the node is unconfigured then."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def _start(self) -> None:
        """Configure and activate once, as soon as the executor runs."""
        self._autostart.cancel()
        with self._try_transition() as acquired:
            if not acquired:
                return
            host = self._host
            host.next_step = 'activating'       # clients wait while the node is loading
            try:
                if self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
                    self.trigger_activate()
            finally:
                host.next_step = host.loading = ''

    def _guarded(self, change_state: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Wrap the change_state service so that it refuses a transition during another."""
        def handle(request: ChangeState.Request,
                   response: ChangeState.Response) -> ChangeState.Response:
            name = request.transition.label or f'transition {request.transition.id}'
            with self._try_transition() as acquired:
                if not acquired:
                    self.get_logger().error(
                        f'{name} is refused: another transition is in progress and the node is '
                        f'{self._host.state}; wait until it ends')
                    return response
                try:
                    return change_state(request, response)
                except RuntimeError as error:       # raised by rclpy of Humble
                    self.get_logger().error(f'{name} is refused: {error}')
                    return response
        return handle

    @contextmanager
    def _try_transition(self, timeout_s: float = 0.0) -> Iterator[bool]:
        """Hold the transition lock inside ``with``; yields False if another transition runs."""
        acquired = self._transition.acquire(timeout=timeout_s)
        try:
            yield acquired
        finally:
            if acquired:
                self._transition.release()

    def _progress(self, text: str) -> None:
        if self._exiting:
            raise _Exiting('the process ends')
        self.get_logger().info(text)

    def _release(self) -> None:
        self._bond.end()
        if self._stop(EXIT_TIMEOUT_S if self._exiting else STOP_TIMEOUT_S):
            self._unload()
        self._close_http()

    def _stop(self, timeout_s: float) -> bool:
        """Cancel all requests; return False if the engine does not return from its step."""
        stopped = self._host.stop(timeout_s)
        if not stopped:
            self.get_logger().error(
                'the engine has not returned from its last step: wait, or restart the process')
        return stopped

    def _unload(self) -> None:
        self._close_http()
        self._host.unload()
        self._status.model_info()

    def _open_http(self, config: DecodeConfig) -> None:
        """Start the HTTP server; it answers 503 until a model is active."""
        self._close_http()              # left open by an activation that failed
        if not config.http.port:
            return
        try:
            server = start_server(self._host, config.http, self.faults.note,
                                  lambda: self.faults.count)
        except HttpError as error:
            self._host.failure = str(error)
            raise
        self._http = server
        self.get_logger().info(f'HTTP: {server.address}')
        if server.is_open_to_all:
            self.get_logger().warning(
                f'{server.address} accepts requests from everyone in the network: set '
                f'{KEY_VARIABLE} in the environment, or http.host to 127.0.0.1')

    def _close_http(self) -> None:
        server, self._http = self._http, None
        if server is not None:
            server.close()

    # Parameters

    def _on_set_parameters(self, request: SetParameters.Request,
                           response: SetParameters.Response) -> SetParameters.Response:
        response.results = [self._set(message) for message in request.parameters]
        return response

    def _on_set_parameters_atomically(
            self, request: SetParametersAtomically.Request,
            response: SetParametersAtomically.Response) -> SetParametersAtomically.Response:
        response.result = self._set(*request.parameters)
        return response

    def _set(self, *messages: ParameterMessage) -> SetParametersResult:
        """Set the parameters of a service call; rclpy itself raises for an unknown type."""
        try:
            return self.set_parameters_atomically(parameters.from_messages(messages))
        except ConfigError as error:
            return self._refused(error)

    def set_parameters(self, parameter_list: list[Parameter]) -> list[SetParametersResult]:
        """Set parameters one by one; see `set_parameters_atomically`."""
        return [self.set_parameters_atomically([parameter]) for parameter in parameter_list]

    def set_parameters_atomically(self, parameter_list: list[Parameter]) -> SetParametersResult:
        """Check all parameters, then set and apply all of them, or none with a reason."""
        parameter_list = parameters.typed(parameter_list)
        try:
            for parameter in parameter_list:
                if not self.has_parameter(parameter.name):
                    raise ConfigError(parameters.unknown_message(parameter.name))
            parameters.merge(self._host.config if self._ready else DecodeConfig(), parameter_list)
            self._refuse_fixed(parameter_list)
        except ConfigError as error:
            return self._refused(error)
        result = super().set_parameters_atomically(parameter_list)
        if not result.successful:       # by rclpy, whose reason does not always have the name
            names = ', '.join(parameter.name for parameter in parameter_list)
            return self._refused(ConfigError(f'{names}: {result.reason}'))
        if self._ready and self._host.worker is not None:
            self._host.update(parameters.read(self))
        return result

    def _refused(self, error: ConfigError) -> SetParametersResult:
        self.get_logger().warning(f'parameter refused: {error}')
        return SetParametersResult(successful=False, reason=str(error))

    def _refuse_fixed(self, parameter_list: list[Parameter]) -> None:
        """
        Refuse to change what is fixed in the current state.

        :raises ConfigError: a parameter can't change now.
        """
        if not self._ready:             # these are the values given at start
            return
        host = self._host
        locked = self.get_parameter('model.locked').value
        configured = host.loaded is not None or bool(host.loading)
        fixed = parameters.fixed(parameter_list)
        for parameter in parameter_list:
            name, value = parameter.name, parameter.value
            if name not in fixed or value == self.get_parameter(name).value:
                continue
            if locked and parameters.affects_load(name):
                raise ConfigError(
                    f'{name} cannot be set to {shown(value)} while the node runs: model.locked '
                    'is true; change it in the params file and restart the node')
            if configured:
                plain = list(value) if isinstance(value, array) else value
                remedy = {'loading': 'wait until the load ends, then clean up',
                          'inactive': 'clean up first'}.get(
                              host.state, 'deactivate and clean up first')
                raise ConfigError(
                    f'{name} cannot be set to {shown(plain)} now: it {parameters.FIXED} '
                    f'(now: {host.state}); {remedy}')

    def _log_end(self, report: RequestReport) -> None:
        who = f' {report.client_id!r}' if report.client_id else ''
        if report.finish_reason == 'rejected':
            self.get_logger().warning(f'a request{who} is refused: {report.message}',
                                      throttle_duration_sec=1.0)
        elif report.finish_reason == 'error':
            self.get_logger().error(f'a request{who} failed: {report.message}')
        elif report.fallback:
            self.get_logger().warning(f'the local model answered: {report.fallback}',
                                      throttle_duration_sec=1.0)
