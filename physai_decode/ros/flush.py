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

"""The end of what was published: whether it has left the process, and has come."""

from collections.abc import Iterable
import time

from physai_decode.ros.clocked_node import Unserved
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from std_msgs.msg import Empty

TOPIC = '~/_last'               # hidden by its underscore; only there while a node ends
POLL_S = 0.001
ACKNOWLEDGED_S = 0.3            # at most, from sent to destroyed


class Flush:
    """
    Waits for the middleware, before the publishers are destroyed.

    Fast DDS that sends in a thread of its own drops with a publisher what it has not sent yet. It
    sends in the order of publishing, over all publishers and services, so a last message that the
    node itself hears tells that all before it are sent. A subscriber may still hear first that a
    publisher is gone, and then drops what came from it, so each gets time to acknowledge; Fast
    DDS asks for that only every 3 s, which is too long to wait for.
    """

    def __init__(self, node: Node, publishers: Iterable[Publisher]) -> None:
        """
        Send the last message.

        :param publishers: those whose subscribers are waited for.
        """
        self._publishers = publishers
        self._heard = node.create_subscription(
            Empty, TOPIC, lambda message: None, 1, callback_group=Unserved())
        self._last = node.create_publisher(Empty, TOPIC, 1)

    def wait(self, timeout_s: float) -> bool:
        """Wait for all of it; False where it did not come in time."""
        end_s = time.monotonic() + timeout_s
        if not self._until(end_s, self._last.get_subscription_count):
            return False
        self._last.publish(Empty())
        if not self._until(end_s, self._take):
            return False
        try:
            return self._until(min(end_s, time.monotonic() + ACKNOWLEDGED_S), self._acknowledged)
        except RuntimeError:            # a middleware that can't tell
            return False

    def _acknowledged(self):
        # Asked again and again: rclpy would hold the interpreter's lock while it waits.
        return all(each.wait_for_all_acked(Duration()) for each in self._publishers)

    def _take(self):
        with self._heard.handle:
            return self._heard.handle.take_message(Empty, False)

    @staticmethod
    def _until(end_s, done):
        while not done():
            if time.monotonic() > end_s:
                return False
            time.sleep(POLL_S)
        return True
