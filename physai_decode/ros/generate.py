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
The action ``~/generate``: a goal becomes a request, its tokens feedback, its end the result.

A goal takes no thread of the executor while the model works: the decode thread leaves tokens in a
deque, a thread of this module sends them in batches, and the executor is asked for a moment only
when the end is known. The package of the action is optional; `unavailable` says why it is not
there.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
import json
import math
import threading
import time
from typing import Any
from typing import TypeVar

from physai_decode.host import Host
from physai_decode.request import is_client_id
from physai_decode.request import parse_value
from physai_decode.request import Request
from physai_decode.request import RequestError
from physai_decode.result import ANSWERED
from physai_decode.result import chat_completion
from physai_decode.ros.messages import id_of
from physai_decode.ros.messages import sendable
from physai_decode.ros.topics import stream_qos
from physai_decode.ros.typed import Generate
from physai_decode.ros.typed import Token
from physai_decode.ros.typed import unavailable
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
from rclpy.action import ActionServer
from rclpy.action import CancelResponse
from rclpy.action.server import RCLError
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSDurabilityPolicy
from rclpy.qos import QoSProfile

FEEDBACK_PERIOD_S = 0.02        # a message costs as much as some tokens, so they are sent together
POLL_S = 0.001
STATUS_DEPTH = 128              # more than what may wait for a sender that has no processor
_T = TypeVar('_T')


class GenerateServer:
    """The action server of one node."""

    def __init__(self, node: Node, host: Host, feedback_period_s: float = FEEDBACK_PERIOD_S,
                 **arguments: Any) -> None:
        """
        Take goals from now on.

        :param host: takes requests, refuses and cancels; `Host` says how.
        :param feedback_period_s: least time between two feedback messages of a goal.
        :param arguments: for rclpy's ActionServer. Its own ``result_timeout`` fits: Humble counts
            it from the goal's acceptance and has 900 s, later ones have 10 s from its end.
        :raises RuntimeError: physai_decode_msgs is not built.
        """
        if unavailable:
            raise RuntimeError(unavailable)
        self._host = host
        self._clock = node.get_clock()
        self._logger = node.get_logger()
        self._source = node.get_fully_qualified_name()
        self._period_s = feedback_period_s
        self._lock = threading.Lock()
        self._goals: dict[bytes, _Goal] = {}        # those without a result; guarded by _lock
        self._work = threading.Event()              # there is something to send, or to close
        self._hurry = threading.Event()             # and it can't wait for the period's end
        self._closed = False
        # rclpy's own depth of 10 would lose goals that come at once, and feedback. With its depth
        # of 1 for the status, and with 10 on a busy machine, Fast DDS that sends in a thread of
        # its own was seen to refuse one that comes right after others; rclpy raises then.
        self._server = _Server(
            node, Generate, '~/generate', self._never,
            callback_group=MutuallyExclusiveCallbackGroup(),
            handle_accepted_callback=self._begin, cancel_callback=self._cancel,
            goal_service_qos_profile=stream_qos(), result_service_qos_profile=stream_qos(),
            cancel_service_qos_profile=stream_qos(), feedback_pub_qos_profile=stream_qos(),
            status_pub_qos_profile=QoSProfile(
                depth=STATUS_DEPTH, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL),
            **arguments)
        self._thread = threading.Thread(target=self._send, name='generate', daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float) -> None:
        """
        Wait until each goal has its result, at most so long.

        Their requests must have ended, and the executor must run.
        """
        until_s = time.monotonic() + timeout_s
        while self._goals and time.monotonic() < until_s:
            time.sleep(POLL_S)

    def close(self) -> None:
        """Take no goals any more; before the node is destroyed."""
        if self._closed:
            return
        self._closed = True
        self._wake(True)
        self._thread.join()
        self._server.destroy()

    # In the executor. Its callback group lets in one at a time, so a goal is cancelled only when
    # it has begun.

    def _begin(self, handle: ServerGoalHandle) -> None:
        """Submit an accepted goal. One that can't be served is refused, which its result tells."""
        received_s = time.monotonic()
        goal = _Goal(handle, self._wake)
        with self._lock:
            self._goals[goal.key] = goal
        self._set(handle, handle.execute)           # its state only: see _Server
        try:
            request = read(handle.request, self._host.config.queue.max_request_bytes)
        except RequestError as error:
            goal.number = self._host.refuse(str(error), error.client_id, goal)
            return
        goal.number = self._host.submit(request, received_s, goal)

    def _cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        """Allow a cancel. It is passed on as soon as rclpy has noted it in the goal's state."""
        with self._lock:
            goal = self._goals.get(bytes(handle.goal_id.uuid))
        if goal is not None:
            goal.cancel = True
            self._wake(True)
        return CancelResponse.ACCEPT

    def _conclude(self, goal: '_Goal', handle: ServerGoalHandle) -> Any:
        """Set the goal's last state and give its result."""
        with self._lock:
            del self._goals[goal.key]
        report, text = goal.end
        message = result(report, text, self._host.config.model_name)
        if report.finish_reason in ANSWERED:
            self._set(handle, handle.succeed)
        elif report.finish_reason == 'cancelled' and handle.is_cancel_requested:
            self._set(handle, handle.canceled)
        else:
            self._set(handle, handle.abort)
        return message

    def _set(self, handle: ServerGoalHandle, change: Callable[[], None]) -> None:
        """Change a goal's state. That others can't be told of it costs the goal nothing."""
        try:
            change()
        except RCLError as error:
            self._logger.warning(f'the status of a goal was not sent: {error}')
            if not handle.is_active:
                self._server.notify_goal_done()     # rclpy has not come to that

    def _never(self, handle: ServerGoalHandle) -> None:
        raise AssertionError('goals are executed by _conclude')

    # In the thread of this object

    def _wake(self, hurry: bool = False) -> None:
        """Make the thread look; from any thread."""
        if not self._work.is_set():
            self._work.set()
        if hurry:
            self._hurry.set()

    def _send(self) -> None:
        """Send what is new of all goals, then wait for a period, or until there is a hurry."""
        while self._work.wait() and not self._closed:
            self._work.clear()
            self._hurry.clear()
            with self._lock:
                goals = [goal for goal in self._goals.values() if not goal.concluding]
            # A list, for each goal must have its turn.
            if any([self._serve(goal) for goal in goals]):
                self._work.set()
                time.sleep(POLL_S)
            else:
                self._hurry.wait(self._period_s)

    def _serve(self, goal: '_Goal') -> bool:
        """Send what is new of a goal; True where it needs another look at once."""
        end = goal.end              # before the tokens: all of them are there, then
        items = goal.take_items()   # likewise: the tokens that they are made of are there
        tokens = goal.take()
        try:
            if tokens or items:
                goal.handle.publish_feedback(self._feedback(tokens, items))
        except RCLError as error:
            self._logger.warning(f'a goal has lost feedback: {error}')
        if end is not None:
            goal.concluding = True
            self._server.notify_execute(goal.handle, partial(self._conclude, goal))
            return False
        if goal.cancel and goal.handle.is_cancel_requested and goal.number is not None:
            goal.cancel = False
            self._host.cancel(goal.number)
        return goal.cancel

    def _feedback(self, tokens: list[tuple[int, TokenReport]], items: list[str]) -> Any:
        simulated = self._clock.ros_time_is_active
        now_ns = self._clock.now().nanoseconds if simulated else 0
        calls = [json.dumps(call.to_json()) for _, report in tokens for call in report.tool_calls]
        return Generate.Feedback(items_json=items, tool_calls_json=calls, tokens=[
            token(report, now_ns if simulated else known_ns, self._source)
            for known_ns, report in tokens])


class _Server(ActionServer):
    """
    An action server whose goals are executed when their end is known.

    rclpy executes a goal in a thread of the executor, which would be held for as long as the model
    works. Here ``goal.execute()`` sets the goal's state to EXECUTING and no more; at the end,
    ``notify_execute`` has a function called in the executor that sets the last state and gives the
    result.
    """

    def notify_execute(self, goal_handle, execute_callback):
        """Execute only what is given."""
        if execute_callback is not None:
            super().notify_execute(goal_handle, execute_callback)


class _Goal:
    """One goal, from its acceptance to its end; the listener of its request."""

    def __init__(self, handle: ServerGoalHandle, wake: Callable[..., None]) -> None:
        self.handle = handle
        self.key = bytes(handle.goal_id.uuid)
        self.number: int | None = None      # the request_id, once it is known
        self.cancel = False                 # a cancel came and was not passed on yet
        self.end: tuple[RequestReport, str] | None = None
        self.concluding = False             # the executor was asked to send the result
        self._tokens: deque[tuple[int, TokenReport]] = deque()
        self._items: deque[str] = deque()
        self._wake = wake

    def token(self, report: TokenReport) -> None:
        """Keep a token for the next batch; in the decode thread, so no more than that."""
        self._tokens.append((time.time_ns(), report))
        self._wake(bool(report.tool_calls))

    def item(self, report: ItemReport) -> None:
        """Keep an element's JSON form; it waits for no further token."""
        self._items.append(report.to_json())
        self._wake(True)

    def finished(self, report: RequestReport, text: str) -> None:
        """Take the end; from any thread."""
        self.end = report, text
        self._wake(True)

    def take(self) -> list[tuple[int, TokenReport]]:
        """Give the tokens since the last call, with the time of each in ns since the epoch."""
        return _drained(self._tokens)

    def take_items(self) -> list[str]:
        """Give the elements since the last call."""
        return _drained(self._items)


def _drained(queue: deque[_T]) -> list[_T]:
    """Empty a queue to which other threads may append meanwhile."""
    return [queue.popleft() for _ in range(len(queue))]


def read(goal: Any, max_bytes: int) -> Request:
    """
    Read a goal.

    :param goal: a Generate.Goal.
    :param max_bytes: what its texts may have in all.
    :raises RequestError: naming the field that is wrong, its value and what is allowed.
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
    """Give the JSON form of a goal's request."""
    fields = {name: value for name, value in (
        ('id', goal.id), ('prompt', goal.prompt), ('deadline', _set(goal.deadline)),
        ('pace', _set(goal.pace))) if value}
    fields.update(_set(goal.sampling))
    if goal.messages_json:
        fields['messages'] = parse_value(goal.messages_json, 'messages_json')
    options = parse_value(goal.options_json, 'options_json') if goal.options_json else {}
    if not isinstance(options, dict):
        raise RequestError('options_json is no JSON object: expected one such as '
                           '{"response_format": {"type": "json_object"}}')
    for name in options:
        if name in fields:
            raise RequestError(f'{name} is given in a field of the goal and in options_json: '
                               'give it once')
    return {**fields, **options}


def _set(message: Any) -> dict[str, Any]:
    """Give the fields that are not at their default; their names are those of the JSON form."""
    unset = type(message)()
    fields = {name: getattr(message, name) for name in message.get_fields_and_field_types()}
    return {name: value for name, value in fields.items() if value != getattr(unset, name)}


def token(report: TokenReport, known_ns: int, source: str) -> Any:
    """
    Give the message of a token.

    :param known_ns: when it was known, in nanoseconds by the node's clock.
    :param source: the node's full name.
    """
    message = Token(
        request_id=report.request_id, client_id=report.client_id, index=report.index,
        token_id=id_of(report), text=sendable(report.text),
        reasoning=sendable(report.reasoning), itl_ms=_number(report.itl_ms),
        device_ms=_number(report.device_ms), r_floor=_number(report.r_floor),
        deadline_missed=report.deadline_missed)
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(known_ns, 10**9)
    message.header.frame_id = source
    return message


def result(report: RequestReport, text: str, model: str) -> Any:
    """Give the result of a goal; each of its fields bears the name of the report's."""
    message = Generate.Result(
        text=sendable(text), result_json=json.dumps(chat_completion(report, text, model)))
    for name, kind in message.get_fields_and_field_types().items():
        value = getattr(report, name, None)
        if kind == 'double':
            setattr(message, name, _number(value))
        elif value is not None:             # else the message's default: -1, not known
            setattr(message, name, sendable(value) if kind == 'string' else value)
    return message


def _number(value: float | None) -> float:
    return math.nan if value is None else value
