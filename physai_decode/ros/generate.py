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
The action ``~/generate``: goals become requests, tokens become feedback.

A goal does not occupy an executor thread while the model works. The decode thread appends tokens
to a deque, a thread of this module sends them in batches, and the executor only sets the result.
The interface package is optional; `unavailable` is the reason if it is missing.
"""

from collections import deque
from collections.abc import Callable
from ctypes import CDLL
from functools import partial
import json
import math
import threading
import time
from typing import Any
from typing import cast
from typing import TypeVar

from physai_decode.host import Host
from physai_decode.request import is_client_id
from physai_decode.request import parse_value
from physai_decode.request import Request
from physai_decode.request import RequestError
from physai_decode.request import TEXTS
from physai_decode.result import chat_completion
from physai_decode.result import COMPLETE
from physai_decode.ros.interfaces import Generate
from physai_decode.ros.interfaces import Token
from physai_decode.ros.interfaces import unavailable
from physai_decode.ros.messages import sendable
from physai_decode.ros.messages import token_id
from physai_decode.ros.topics import stream_qos
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
from rclpy.action import ActionServer
from rclpy.action import CancelResponse
from rclpy.action import get_action_server_names_and_types_by_node
from rclpy.action.server import RCLError
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock
from rclpy.clock import ClockType
from rclpy.clock import ROSClock
from rclpy.node import Node
from rclpy.qos import QoSDurabilityPolicy
from rclpy.qos import QoSProfile

KIND = 'physai_decode_msgs/action/Generate'
FEEDBACK_PERIOD_S = 0.02        # a message costs as much as several tokens, so they are batched
POLL_S = 0.001
ACCEPTED = 1                    # of action_msgs/GoalStatus
STATUS_DEPTH = 128              # more than can be pending while the sending thread has no CPU
_T = TypeVar('_T')


class GenerateServer:
    """The action server of one node."""

    def __init__(self, node: Node, host: Host, feedback_period_s: float = FEEDBACK_PERIOD_S,
                 **arguments: Any) -> None:
        """
        Start to accept goals.

        :param feedback_period_s: the shortest time between two feedback messages of a goal.
        :param arguments: passed to rclpy's ActionServer. The default ``result_timeout`` is fine:
            900 s up to Jazzy, later 10 s, from the end of a goal, in Humble from its acceptance.
        :raises RuntimeError: physai_decode_msgs is not built.
        """
        if unavailable:
            raise RuntimeError(unavailable)
        self._host, self._node = host, node
        self._clock = cast(ROSClock, node.get_clock())
        self._logger = node.get_logger()
        self._source = node.get_fully_qualified_name()
        self._period_s = feedback_period_s
        self._lock = threading.Lock()
        self._goals: dict[bytes, _Goal] = {}        # goals without a result; guarded by _lock
        self._work = threading.Event()              # set if there is something to send
        self._urgent = threading.Event()            # set if it can't wait for the next period
        self._closed = False
        # rclpy's default depth of 10 would lose simultaneous goals, and feedback. For the status,
        # asynchronous Fast DDS was seen to reject messages in quick succession with rclpy's
        # default depth of 1, and with 10 on a busy machine; rclpy then raises RCLError.
        self._server = _Server(
            node, Generate, '~/generate', self._never,
            callback_group=MutuallyExclusiveCallbackGroup(),
            handle_accepted_callback=self._accept, cancel_callback=self._cancel,
            goal_service_qos_profile=stream_qos(), result_service_qos_profile=stream_qos(),
            cancel_service_qos_profile=stream_qos(), feedback_pub_qos_profile=stream_qos(),
            status_pub_qos_profile=QoSProfile(
                depth=STATUS_DEPTH, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL),
            **arguments)
        self._thread = threading.Thread(target=self._send, name='generate', daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The name of the action, which a remapping can change from Kilted on."""
        found = [name for name, kinds in get_action_server_names_and_types_by_node(
            self._node, self._node.get_name(), self._node.get_namespace())
            if KIND in kinds]
        return found[0] if found else f'{self._source}/generate'

    def finish(self, timeout_s: float) -> None:
        """
        Wait until each goal has its result, or until the timeout.

        Call this after all requests have ended and while the executor runs.
        """
        end_s = time.monotonic() + timeout_s
        while self._goals and time.monotonic() < end_s:
            time.sleep(POLL_S)

    def close(self) -> None:
        """Destroy the action server, before its node is destroyed."""
        if self._closed:
            return
        self._closed = True
        self._wake(True)
        self._thread.join()
        self._server.destroy()

    # In the executor. The callback group is mutually exclusive, so a goal can be cancelled only
    # after _accept has returned.

    def _accept(self, handle: ServerGoalHandle) -> None:
        """Submit the request of a goal. The result of an invalid goal contains the error."""
        received_s = time.monotonic()
        goal = _Goal(handle, self._wake)
        with self._lock:
            self._goals[goal.key] = goal
        self._set_state(handle, handle.execute)     # changes only the state: see _Server
        try:
            request = read(handle.request, self._host.config.queue.max_request_bytes)
        except RequestError as error:
            goal.number = self._host.refuse(str(error), error.client_id, goal)
            return
        goal.number = self._host.submit(request, received_s, goal)

    def _cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        """Accept a cancel. The request is cancelled once rclpy has changed the goal's state."""
        with self._lock:
            goal = self._goals.get(bytes(handle.goal_id.uuid))
        if goal is not None:
            goal.cancel_pending = True
            self._wake(True)
        return CancelResponse.ACCEPT

    def _conclude(self, goal: '_Goal', report: RequestReport, text: str,
                  handle: ServerGoalHandle) -> Any:
        """Set the final state of a goal and return its result."""
        with self._lock:
            del self._goals[goal.key]
        message = result(report, text, self._host.config.model_name)
        if report.finish_reason in COMPLETE:
            self._set_state(handle, handle.succeed)
        elif report.finish_reason == 'cancelled' and handle.is_cancel_requested:
            self._set_state(handle, handle.canceled)
        else:
            self._set_state(handle, handle.abort)
        return message

    def _set_state(self, handle: ServerGoalHandle, change: Callable[[], None]) -> None:
        """Change the state of a goal. If its status can't be published, the goal continues."""
        try:
            change()
        except RCLError as error:
            self._logger.warning(f'the status of a goal was not sent: {error}')
            if not handle.is_active:
                self._server.notify_goal_done()     # which the exception made rclpy skip

    def _never(self, handle: ServerGoalHandle) -> None:
        raise AssertionError('goals are executed by _conclude')

    # In the thread of this object

    def _wake(self, urgent: bool) -> None:
        """Wake the sending thread; from any thread."""
        if not self._work.is_set():
            self._work.set()
        if urgent:
            self._urgent.set()

    def _send(self) -> None:
        """Send the news of all goals, then wait for a period or until something is urgent."""
        while self._work.wait() and not self._closed:
            self._work.clear()
            self._urgent.clear()
            with self._lock:
                goals = [goal for goal in self._goals.values() if not goal.concluding]
            # A list instead of a generator, so that any() does not skip goals.
            if any([self._send_goal(goal) for goal in goals]):
                self._work.set()
                time.sleep(POLL_S)
            else:
                self._urgent.wait(self._period_s)

    def _send_goal(self, goal: '_Goal') -> bool:
        """Send the news of a goal; return True if its cancel is still pending."""
        # In reverse order of arrival: tokens arrive before their items, and both before the end.
        end = goal.end
        items = goal.take_items()
        tokens = goal.take()
        try:
            if tokens or items:
                goal.handle.publish_feedback(self._feedback(tokens, items))
        except RCLError as error:
            self._logger.warning(f'feedback of a goal was not sent: {error}')
        if end is not None:
            goal.concluding = True
            self._server.notify_execute(goal.handle, partial(self._conclude, goal, *end))
            return False
        if goal.cancel_pending and goal.handle.is_cancel_requested and goal.number is not None:
            goal.cancel_pending = False
            self._host.cancel(goal.number)
        return goal.cancel_pending

    def _feedback(self, tokens: list[tuple[int, TokenReport]], items: list[str]) -> Any:
        simulated = self._clock.ros_time_is_active
        now_ns = self._clock.now().nanoseconds if simulated else 0
        calls = [json.dumps(call.to_json()) for _, report in tokens for call in report.tool_calls]
        return Generate.Feedback(items_json=items, tool_calls_json=calls, tokens=[
            token(report, now_ns if simulated else queued_ns, self._source)
            for queued_ns, report in tokens])


class _Server(ActionServer):
    """
    An action server that uses the executor only at the end of a goal.

    rclpy executes a goal in an executor thread, which would be occupied for as long as the model
    works. Here, ``goal.execute()`` only sets the state of the goal to EXECUTING. At the end,
    ``notify_execute`` makes the executor call a function that sets the final state and returns the
    result.
    """

    def __init__(self, node: Node, *arguments: Any, **options: Any) -> None:
        """Create the server; the parameters are those of rclpy's ActionServer."""
        # Otherwise results expire by the stamp of the goal, which is the node's time.
        self._expiry = _SteadyNode(node) if expires_by_end() else node
        super().__init__(cast(Node, self._expiry), *arguments, **options)
        self._node = node               # stamps the goals; rcl refers to the clock of _expiry

    async def _execute_goal_request(self, request_header_and_message: Any) -> None:
        """
        Accept a goal.

        If rclpy can't send the response or the status of a goal, it keeps the goal for ever, but
        does not report it as accepted. This method does, so the goal gets a result.
        """
        try:
            await super()._execute_goal_request(request_header_and_message)
        except RCLError as error:
            self._logger.warning(f'the status of a goal was not sent: {error}')
        goal_id = request_header_and_message[1].goal_id
        handle = self._goal_handles.get(bytes(goal_id.uuid))
        if handle is not None and handle.status == ACCEPTED:
            self._handle_accepted_callback(handle)

    def notify_execute(self, goal_handle: ServerGoalHandle,
                       execute_callback: Callable[[ServerGoalHandle], Any] | None) -> None:
        """Execute a goal only if a callback is given."""
        if execute_callback is not None:
            super().notify_execute(goal_handle, execute_callback)


def expires_by_end() -> bool:
    """Whether rcl counts the time of a result from the end of its goal; in Humble it does not."""
    try:
        return hasattr(CDLL('librcl_action.so'),
                       'rcl_action_goal_handle_get_goal_terminal_timestamp')
    except OSError:             # not the name of this platform
        return False


class _SteadyNode:
    """
    A node with a steady clock, by which the results of goals expire.

    Simulated time can stop or jump back. The results would then stay in memory, and each status
    message would list all goals.
    """

    def __init__(self, node: Node) -> None:
        self._node, self._clock = node, Clock(clock_type=ClockType.STEADY_TIME)

    def get_clock(self) -> Clock:
        return self._clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


class _Goal:
    """One goal, from acceptance to result; it listens to its request."""

    def __init__(self, handle: ServerGoalHandle, wake: Callable[..., None]) -> None:
        self.handle = handle
        self.key = bytes(handle.goal_id.uuid)
        self.number: int | None = None      # the request_id, once it is known
        self.cancel_pending = False         # a cancel was accepted but not passed to the host yet
        self.end: tuple[RequestReport, str] | None = None
        self.concluding = False             # the executor is about to send the result
        self._tokens: deque[tuple[int, TokenReport]] = deque()
        self._items: deque[str] = deque()
        self._wake = wake

    def token(self, report: TokenReport) -> None:
        """Queue a token for the next batch; called in the decode thread."""
        self._tokens.append((time.time_ns(), report))
        self._wake(bool(report.tool_calls))

    def item(self, report: ItemReport) -> None:
        """Queue an element; it is sent without waiting for the period."""
        self._items.append(report.to_json())
        self._wake(True)

    def finished(self, report: RequestReport, text: str) -> None:
        """Record the end; called from any thread."""
        self.end = report, text
        self._wake(True)

    def take(self) -> list[tuple[int, TokenReport]]:
        """Return the tokens since the last call, each with its time in ns since the epoch."""
        return _drain(self._tokens)

    def take_items(self) -> list[str]:
        """Return the elements since the last call."""
        return _drain(self._items)


def _drain(queue: deque[_T]) -> list[_T]:
    """Empty a queue while other threads may append to it."""
    return [queue.popleft() for _ in range(len(queue))]


def read(goal: Any, max_bytes: int) -> Request:
    """
    Convert a goal to a request.

    :param goal: a Generate.Goal.
    :param max_bytes: limit of the total length of its texts.
    :raises RequestError: a field is wrong; the message has its name, value and allowed values.
    """
    client_id = goal.id if is_client_id(goal.id) else ''
    texts = goal.id, goal.prompt, goal.messages_json, goal.options_json, *goal.sampling.stop
    if sum(map(len, texts)) > max_bytes:
        raise RequestError(f'the goal has more than {max_bytes} bytes: shorten it, or raise '
                           'queue.max_request_bytes', client_id)
    try:
        fields = _fields(goal)
    except RequestError as error:
        raise RequestError(str(error), client_id) from None
    return Request.from_json(fields)


def _fields(goal: Any) -> dict[str, Any]:
    """Return the fields of a goal's request in their JSON form."""
    fields = {name: value for name, value in (
        ('id', goal.id), ('prompt', goal.prompt), ('deadline', _set_fields(goal.deadline)),
        ('pace', _set_fields(goal.pace))) if value}
    fields.update(_set_fields(goal.sampling))
    if goal.messages_json:
        fields['messages'] = parse_value(goal.messages_json, 'messages_json')
    options = parse_value(goal.options_json, 'options_json') if goal.options_json else {}
    if not isinstance(options, dict):
        raise RequestError('options_json is not a JSON object: expected one such as '
                           '{"response_format": {"type": "json_object"}}')
    if not any(name in fields or name in options for name in TEXTS):
        raise RequestError('the goal has no prompt: set prompt, messages_json, or raw_prompt in '
                           'options_json')
    for name in options:
        if name in fields:
            raise RequestError(f'{name} is set in a field of the goal and in options_json: '
                               'set it once')
    return {**fields, **options}


def _set_fields(message: Any) -> dict[str, Any]:
    """Return the fields of a message that differ from their default."""
    default = type(message)()
    fields = {name: getattr(message, name) for name in message.get_fields_and_field_types()}
    return {name: value for name, value in fields.items() if value != getattr(default, name)}


def token(report: TokenReport, stamp_ns: int, source: str) -> Any:
    """
    Build the message of a token.

    :param stamp_ns: the stamp of the header, in nanoseconds.
    :param source: the node's fully qualified name.
    """
    message = Token(
        request_id=report.request_id, client_id=report.client_id, index=report.index,
        token_id=token_id(report), text=sendable(report.text),
        reasoning=sendable(report.reasoning), itl_ms=_number(report.itl_ms),
        device_ms=_number(report.device_ms), r_floor=_number(report.r_floor),
        deadline_missed=report.deadline_missed)
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    message.header.frame_id = source
    return message


def result(report: RequestReport, text: str, model: str) -> Any:
    """Build the result of a goal; its fields have the names of those of the report."""
    message = Generate.Result(
        text=sendable(text), result_json=json.dumps(chat_completion(report, text, model)))
    for name, kind in message.get_fields_and_field_types().items():
        value = getattr(report, name, None)
        if kind == 'double':
            setattr(message, name, _number(value))
        elif value is not None:             # otherwise the default of the message, -1: unknown
            setattr(message, name, sendable(value) if kind == 'string' else value)
    return message


def _number(value: float | None) -> float:
    return math.nan if value is None else value
