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

"""Waits until the middleware has sent the last messages and subscribers have received them."""

from collections.abc import Callable
from collections.abc import Iterable
import time
from typing import Any

from physai_decode.ros.clocked_node import PolledGroup
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from std_msgs.msg import Empty

TOPIC = '~/_last'               # the underscore hides it; it exists only while the node ends
POLL_S = 0.001
ACKNOWLEDGE_S = 0.3             # longest wait for subscribers to acknowledge


class Flush:
    """
    Waits for the middleware before the publishers are destroyed.

    When Fast DDS publishes asynchronously, a destroyed publisher loses its unsent messages. Fast
    DDS sends in the order of publishing, across all publishers and services. The node therefore
    publishes a last message to itself: when it arrives, all earlier messages have been sent.

    A subscriber that learns first that a publisher is gone drops its pending messages, so
    subscribers also get time to acknowledge. That wait is short, because Fast DDS requests
    acknowledgements only every 3 s.
    """

    def __init__(self, node: Node, publishers: Iterable[Publisher]) -> None:
        """
        Create the publisher and the subscription of the last message.

        :param publishers: the publishers whose subscribers have to acknowledge.
        """
        self._publishers = publishers
        self._subscription = node.create_subscription(
            Empty, TOPIC, lambda message: None, 1, callback_group=PolledGroup())
        self._publisher = node.create_publisher(Empty, TOPIC, 1)

    def wait(self, timeout_s: float) -> bool:
        """Return True once all messages were sent and acknowledged, False after the timeout."""
        end_s = time.monotonic() + timeout_s
        if not self._wait_until(end_s, self._publisher.get_subscription_count):
            return False
        self._publisher.publish(Empty())
        if not self._wait_until(end_s, self._take):
            return False
        try:
            return self._wait_until(
                min(end_s, time.monotonic() + ACKNOWLEDGE_S), self._acknowledged)
        except RuntimeError:            # this middleware does not report acknowledgements
            return False

    def _acknowledged(self) -> bool:
        # Polled, because rclpy holds the interpreter's lock while it waits.
        return all(each.wait_for_all_acked(Duration()) for each in self._publishers)

    def _take(self) -> Any:
        with self._subscription.handle:
            return self._subscription.handle.take_message(Empty, False)

    @staticmethod
    def _wait_until(end_s: float, done: Callable[[], Any]) -> bool:
        while not done():
            if time.monotonic() > end_s:
                return False
            time.sleep(POLL_S)
        return True
