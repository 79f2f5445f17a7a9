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

"""The bond with which nav2's lifecycle manager monitors that an active node is alive."""

from rclpy.node import Node

try:
    from bondpy.bondpy import Bond as Heartbeat
except ImportError:         # bondpy comes with a ROS distribution, not from PyPI
    Heartbeat = None

TOPIC = 'bond'              # relative to the namespace, as nav2 expects
BREAK_AFTER_S = 4.0         # without a heartbeat


class Bond:
    """Sends heartbeats while the node is active, if bondpy is installed."""

    def __init__(self, node: Node) -> None:
        """Keep the node; `form` starts the heartbeats."""
        self._node = node
        self._heartbeat: Heartbeat | None = None

    def form(self, period_s: float) -> None:
        """
        Start to send heartbeats.

        :param period_s: seconds between two heartbeats; 0 sends none.
        """
        self.end()
        if period_s <= 0:
            return
        if Heartbeat is None:
            if not self._node.get_parameter('autostart').value:     # perhaps nav2 activates it
                self._node.get_logger().info(
                    "no bond, because bondpy is not installed: nav2's lifecycle manager needs "
                    'bond_timeout: 0.0, see docs/howto/nav2.md')
            return
        heartbeat = Heartbeat(self._node, TOPIC, self._node.get_name())
        heartbeat.set_heartbeat_period(period_s)
        heartbeat.set_heartbeat_timeout(BREAK_AFTER_S)
        heartbeat.start()
        self._heartbeat = heartbeat

    def end(self) -> None:
        """Break the bond; the manager is notified at once."""
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            heartbeat.shutdown()
