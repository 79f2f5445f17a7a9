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
The node's publishers, which are the sink of the worker's reports.

The decode thread publishes tokens directly. A slow subscriber never blocks it, because the queues
are bounded and drop the oldest message. rclpy cuts a string at a NUL, so a NUL in a text is sent
as U+FFFD.
"""

from collections.abc import Callable
from collections.abc import Iterable
import json
import threading
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from diagnostic_msgs.msg import DiagnosticStatus
from physai_decode.config import ConfigError
from physai_decode.config import shown
from physai_decode.request import Request
from physai_decode.result import chat_completion
from physai_decode.ros import cdr
from physai_decode.ros import messages
from physai_decode.ros.clocked_node import ClockedNode
from physai_decode.ros.interfaces import Token
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
from rclpy.action.server import RCLError
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.qos import QoSDurabilityPolicy
from rclpy.qos import QoSHistoryPolicy
from rclpy.qos import QoSPolicyKind
from rclpy.qos import QoSProfile
from rclpy.qos import QoSReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.time import Time
from std_msgs.msg import Float64
from std_msgs.msg import String

STREAM_DEPTH = 4096
SUBSCRIBER_CHECK_TOKENS = 16    # between two checks for subscribers of the figures
MAX_DEPTH = 2**31 - 1           # of a queue in DDS
POLICIES = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY,
            QoSPolicyKind.DURABILITY)


def check_qos_overrides(parameters: Iterable[Parameter]) -> None:
    """
    Check the ``qos_overrides`` that were given at start; rclpy would not name the parameter.

    :raises ConfigError: a value is wrong; the message has its name, value and allowed values.
    """
    choices = {kind.__name__.removeprefix('QoS').removesuffix('Policy').lower(): [
        each.name.lower() for each in kind if each.name != 'UNKNOWN'] for kind in (
            QoSDurabilityPolicy, QoSHistoryPolicy, QoSReliabilityPolicy)}
    for parameter in parameters:
        name, value = parameter.name, parameter.value
        policy = name.rpartition('.')[2] if name.startswith('qos_overrides.') else ''
        if policy == 'depth' and (type(value) is not int or not 0 <= value <= MAX_DEPTH):
            raise ConfigError(f'{name} is {shown(value)}: expected 0 to {MAX_DEPTH}')
        if policy in choices and (
                type(value) is not str or value.lower() not in choices[policy]):
            raise ConfigError(
                f'{name} is {shown(value)}: expected one of {", ".join(choices[policy])}')


def stream_qos() -> QoSProfile:
    """Return the QoS with which a subscriber gets every token and every result."""
    return QoSProfile(depth=STREAM_DEPTH)


def latched_qos() -> QoSProfile:
    """Return the QoS with which a late subscriber gets the last message on ~/model_info."""
    return QoSProfile(depth=1, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)


def decode_nodes(node: Node) -> list[str]:
    """List the decode nodes in the ROS graph, found by their topics."""
    return sorted(
        topic.removesuffix('/token_stats') for topic, kinds in node.get_topic_names_and_types()
        if topic.endswith('/token_stats') and 'diagnostic_msgs/msg/DiagnosticArray' in kinds
        and node.count_publishers(topic))


def start_advice(node: Node) -> str:
    """Say what to do if there is no decode node in the ROS graph."""
    return (f': start decode_node, or set ROS_DOMAIN_ID (here {node.context.get_domain_id()}) as '
            'in its terminal')


class Topics:
    """
    All topics that the node publishes.

    The frame_id of each header is the node's fully qualified name, which a message on
    `/diagnostics` does not contain otherwise.
    """

    def __init__(self, node: ClockedNode, model: Callable[[], str],
                 finished: Callable[[RequestReport], None]) -> None:
        """
        Create the publishers.

        :param model: returns the name of the model, for results.
        :param finished: called with the report of each request after it was published, in the
            thread that ended the request.
        """
        def publisher(kind: Any, topic: str, qos: QoSProfile) -> Publisher:
            self.all.append(node.create_publisher(
                kind, topic, qos, qos_overriding_options=QoSOverridingOptions(POLICIES)))
            return self.all[-1]

        self.all: list[Publisher] = []
        self._model, self._finished = model, finished
        self._now_ns, self._note = node.now_ns, node.faults.note
        self.tokens = publisher(String, '~/tokens', stream_qos())
        self._token_stats = publisher(DiagnosticArray, '~/token_stats', stream_qos())
        self._itl_ms = publisher(Float64, '~/itl_ms', stream_qos())
        self._r_floor = publisher(Float64, '~/r_floor', stream_qos())
        self._stamped_tokens = Token and publisher(Token, '~/stamped_tokens', stream_qos())
        self._response = publisher(String, '~/response', stream_qos())
        self._item = publisher(String, '~/item', stream_qos())
        self._result = publisher(String, '~/result', stream_qos())
        self._accepted = publisher(String, '~/accepted', stream_qos())
        self._request_stats = publisher(DiagnosticArray, '~/request_stats', stream_qos())
        self._model_info = publisher(DiagnosticArray, '~/model_info', latched_qos())
        self._diagnostics = publisher(DiagnosticArray, '/diagnostics', QoSProfile(depth=10))
        self.node_name = node.get_fully_qualified_name()
        self._figures = cdr.TokenStats(self.node_name)
        self._stamped = cdr.StampedToken(self.node_name)
        # Whether token_stats, itl_ms, r_floor and stamped_tokens have subscribers; decode thread.
        self._subscribed: list[bool] = []
        self._finish_lock = threading.Lock()        # requests end in several threads

    def token(self, report: TokenReport) -> None:
        """
        Publish one token: first its text, then its figures.

        Figures without a subscriber are not serialised. A check for subscribers costs as much as
        publishing, so it runs every `SUBSCRIBER_CHECK_TOKENS` tokens. A subscriber that joins in
        mid-answer can miss the figures of that many tokens.
        """
        text = messages.sendable(report.text)
        if report.index % SUBSCRIBER_CHECK_TOKENS == 0:
            self._subscribed = [
                publisher is not None and _has_subscribers(publisher) for publisher in (
                    self._token_stats, self._itl_ms, self._r_floor, self._stamped_tokens)]
        token_stats, itl_ms, r_floor, stamped = self._subscribed
        # Serialise everything before sending anything: waking a subscriber's process costs most,
        # and this wakes it once instead of once per message.
        ready = [(self.tokens, cdr.string(text))]
        if token_stats:
            ready.append((self._token_stats, self._figures.write(report, text, self._now_ns())))
        if itl_ms and report.itl_ms is not None:
            ready.append((self._itl_ms, cdr.float64(report.itl_ms)))
        if r_floor and report.r_floor is not None:
            ready.append((self._r_floor, cdr.float64(report.r_floor)))
        if stamped:
            ready.append((self._stamped_tokens,
                          self._stamped.write(report, text, self._now_ns())))
        for publisher, data in ready:
            self._publish(publisher, data)

    def item(self, report: ItemReport) -> None:
        """Publish one element of a JSON answer."""
        self._publish(self._item, String(data=report.to_json()))

    def accepted(self, number: int, request: Request) -> None:
        """Publish a request that was queued, so that a bag can record every request."""
        self._publish(self._accepted, _json({
            'request_id': number, 'id': request.client_id or None,
            'stamp': self._now_ns() / 1e9, 'request': request.to_json()}))

    def finished(self, report: RequestReport, text: str) -> None:
        """Publish the end of a request: its text unless refused, its figures, its result."""
        status = messages.request_status(self.node_name, report)
        result = _json(chat_completion(report, text, self._model()))
        with self._finish_lock:
            if report.finish_reason != 'rejected':
                self._publish(self._response, String(data=messages.sendable(text)))
            self._publish(self._request_stats, self._array([status]))
            self._publish(self._result, result)
        self._finished(report)

    def model_info(self, status: DiagnosticStatus) -> None:
        """Publish the loaded model; the topic is latched."""
        self._publish(self._model_info, self._array([status]))

    def diagnostics(self, statuses: list[DiagnosticStatus]) -> None:
        """Publish on /diagnostics."""
        self._publish(self._diagnostics, self._array(statuses))

    def _publish(self, publisher: Publisher, message: Any) -> None:
        """Publish a message. If the middleware can't, note that, and let the request go on."""
        try:
            publisher.publish(message)
        except RCLError as error:
            self._note(publisher.topic_name, error)

    def _array(self, statuses: list[DiagnosticStatus]) -> DiagnosticArray:
        array = DiagnosticArray(status=statuses)
        array.header.stamp = Time(nanoseconds=self._now_ns()).to_msg()
        array.header.frame_id = self.node_name
        return array


def _json(value: dict[str, Any]) -> String:
    """Build the message of a JSON object; JSON escapes NUL and lone surrogates."""
    return String(data=json.dumps(value))


def _has_subscribers(publisher: Publisher) -> bool:
    """Return whether a message has a subscriber now, or may have one later."""
    return (publisher.get_subscription_count() > 0
            or publisher.qos_profile.durability == QoSDurabilityPolicy.TRANSIENT_LOCAL)
