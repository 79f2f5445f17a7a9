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

"""Other nodes that pass for this one: of the same name, or with a publisher on its tokens."""

from collections import Counter
import time

from rclpy.node import Node
from rclpy.publisher import Publisher

LOOK_EVERY_S = 1.0
DISCOVERY_S = 3.0       # after this, who was there before this node has been seen
GHOST_S = 30.0          # a node that was killed is still in the graph for 20 s, under Fast DDS


class Twins:
    """
    Looks at the ROS graph now and then.

    Two nodes of one name answer each prompt twice and each other's services; two publishers on
    one topic mix their streams. Neither can be prevented in ROS, so it is told. Who comes later
    than this node is told at once; who was there before could be the ghost of this node's killed
    predecessor, and is told where it stays.
    """

    def __init__(self, node: Node, tokens: Publisher) -> None:
        """Look at nothing yet."""
        self._node, self._tokens = node, tokens
        self._begun_s = time.monotonic()
        self._looked_s = float('-inf')
        self._since_s: float | None = None      # when others were there first
        self._was_alone = False                 # once discovery was through
        self._told = ''

    def look(self) -> str:
        """Say what is wrong, empty where nothing is; a change is logged."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            told, before = self._sure(self._find(), now_s), self._told
            self._told = told
            if told and told != before:
                self._node.get_logger().error(told)
            elif before and not told:
                self._node.get_logger().info('no other node passes for this one any more')
        return self._told

    def _sure(self, found, now_s):
        """Give what was found unless it may be a ghost."""
        if not found:
            self._since_s = None
            self._was_alone = self._was_alone or now_s - self._begun_s >= DISCOVERY_S
        elif self._since_s is None:
            self._since_s = now_s
        sure = found and (self._was_alone or now_s - self._since_s >= GHOST_S)
        return found if sure else ''

    def _find(self):
        node, found = self._node, []
        name, topic = node.get_fully_qualified_name(), self._tokens.topic_name
        nodes = Counter(_joined(*each) for each in node.get_node_names_and_namespaces())
        if nodes[name] > 1:
            found.append(f'{nodes[name]} nodes are called {name}: end the others, or name them by '
                         '-r __node:=NAME')
        if node.count_publishers(topic) > 1:
            writers = sorted(_joined(info.node_name, info.node_namespace)
                             for info in node.get_publishers_info_by_topic(topic))
            found.append(f'{len(writers)} publishers are on {topic}, of {", ".join(writers)}: '
                         'streams mix there')
        return '; '.join(found)


def _joined(name, namespace):
    """Give a node's full name."""
    return f'{namespace.rstrip("/")}/{name}'
