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
The node's publishers, and the sink of its worker: each report becomes its messages at once.

Tokens are published straight from the decode thread; a slow subscriber never holds it up, because
the queues are bounded and drop the oldest. rclpy ends a string at a NUL, so one in a text is sent
as U+FFFD. It knows nothing of lifecycle states.
"""

from collections.abc import Callable
import json
import threading

from diagnostic_msgs.msg import DiagnosticArray
from diagnostic_msgs.msg import DiagnosticStatus
from physai_decode.request import Request
from physai_decode.result import chat_completion
from physai_decode.ros import cdr
from physai_decode.ros import messages
from physai_decode.ros.clocked_node import ClockedNode
from physai_decode.ros.typed import Token
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
from rclpy.publisher import Publisher
from rclpy.qos import QoSDurabilityPolicy
from rclpy.qos import QoSPolicyKind
from rclpy.qos import QoSProfile
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.time import Time
from std_msgs.msg import Float64
from std_msgs.msg import String

STREAM_DEPTH = 4096
ASK_EVERY = 16                  # tokens
POLICIES = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY,
            QoSPolicyKind.DURABILITY)


def stream_qos() -> QoSProfile:
    """Give what a subscriber asks for to get every token, and every request's end."""
    return QoSProfile(depth=STREAM_DEPTH)


def latched_qos() -> QoSProfile:
    """Give what a subscriber of ~/model_info asks for to get the last message."""
    return QoSProfile(depth=1, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)


class Topics:
    """
    All topics that the node writes.

    The frame_id of each header is the node's name, which `/diagnostics` does not tell otherwise.
    """

    def __init__(self, node: ClockedNode, model: Callable[[], str],
                 finished: Callable[[RequestReport], None]) -> None:
        """
        Create the publishers.

        :param model: gives the name of the model, for results.
        :param finished: called with each request's report after it was published, from the
            thread that ended the request.
        """
        def publisher(kind, topic, qos):
            self.all.append(node.create_publisher(
                kind, topic, qos, qos_overriding_options=QoSOverridingOptions(POLICIES)))
            return self.all[-1]

        self.all: list[Publisher] = []
        self._model, self._finished = model, finished
        self._now_ns = node.now_ns
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
        self._heard: list[bool] = []                # of those beside ~/tokens; decode thread
        self._ending = threading.Lock()             # requests end in several threads

    def token(self, report: TokenReport) -> None:
        """
        Publish one token: the text first, then its figures.

        Figures that nobody hears are not even written. Who hears is asked now and then, as it
        takes as long as publishing: one who comes in mid-answer may miss that many tokens.
        """
        text = messages.sendable(report.text)
        if report.index % ASK_EVERY == 0:
            self._heard = [publisher is not None and _is_heard(publisher) for publisher in (
                self._token_stats, self._itl_ms, self._r_floor, self._stamped_tokens)]
        token_stats, itl_ms, r_floor, stamped = self._heard
        # All is written before any is sent: a subscriber's process is then woken once, not after
        # each, and waking it is what costs most.
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
            publisher.publish(data)

    def item(self, report: ItemReport) -> None:
        """Publish one element of an answer that is JSON."""
        self._item.publish(String(data=report.to_json()))

    def accepted(self, number: int, request: Request) -> None:
        """Echo a request that was queued, so that a bag has every one of them."""
        self._accepted.publish(_json({
            'request_id': number, 'id': request.client_id or None,
            'stamp': self._now_ns() * 1e-9, 'request': request.to_json()}))

    def finished(self, report: RequestReport, text: str) -> None:
        """Publish the end of a request: its text unless it was refused, figures and result."""
        status = messages.request_status(self.node_name, report)
        result = _json(chat_completion(report, text, self._model()))
        with self._ending:
            if report.finish_reason != 'rejected':
                self._response.publish(String(data=messages.sendable(text)))
            self._request_stats.publish(self._array([status]))
            self._result.publish(result)
        self._finished(report)

    def model_info(self, status: DiagnosticStatus) -> None:
        """Publish what is loaded; a later subscriber gets it too."""
        self._model_info.publish(self._array([status]))

    def diagnostics(self, statuses: list[DiagnosticStatus]) -> None:
        """Publish on /diagnostics."""
        self._diagnostics.publish(self._array(statuses))

    def _array(self, statuses):
        array = DiagnosticArray(status=statuses)
        array.header.stamp = Time(nanoseconds=self._now_ns()).to_msg()
        array.header.frame_id = self.node_name
        return array


def _json(value: dict) -> String:
    """Give a JSON object as a message; JSON itself escapes NUL and half surrogate pairs."""
    return String(data=json.dumps(value))


def _is_heard(publisher: Publisher) -> bool:
    """Tell whether anybody gets what is published, or may get it later."""
    return (publisher.get_subscription_count() > 0
            or publisher.qos_profile.durability == QoSDurabilityPolicy.TRANSIENT_LOCAL)
