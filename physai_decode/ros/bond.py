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

"""The bond by which nav2's lifecycle manager knows that an active node lives."""

from rclpy.node import Node

try:
    from bondpy.bondpy import Bond as Heartbeat
except ImportError:         # it comes with nav2's ROS distribution, not from PyPI
    Heartbeat = None

TOPIC = 'bond'              # nav2's names: this topic, relative to the namespace, and the node's
BREAK_AFTER_S = 4.0         # without a heartbeat


class Bond:
    """Sends heartbeats from activation to deactivation, where bondpy is installed."""

    def __init__(self, node: Node) -> None:
        """Send nothing yet."""
        self._node = node
        self._heartbeat: Heartbeat | None = None

    def form(self, period_s: float) -> None:
        """
        Begin.

        :param period_s: between two heartbeats; 0 sends none.
        """
        self.end()
        if period_s <= 0:
            return
        if Heartbeat is None:
            self._node.get_logger().debug('no bond: bondpy is not installed')
            return
        heartbeat = Heartbeat(self._node, TOPIC, self._node.get_name())
        heartbeat.set_heartbeat_period(period_s)
        heartbeat.set_heartbeat_timeout(BREAK_AFTER_S)
        heartbeat.start()
        self._heartbeat = heartbeat

    def end(self) -> None:
        """Break the bond on purpose; the manager hears that at once."""
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            heartbeat.shutdown()
