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

"""Detects other nodes with the name of this one, and other publishers on its `~/tokens`."""

from collections import Counter
import time

from rclpy.node import Node
from rclpy.publisher import Publisher

PERIOD_S = 1.0          # between two looks at the graph
DISCOVERY_S = 3.0       # until this node has discovered the nodes that were there before
GHOST_S = 30.0          # under Fast DDS, a killed node stays in the graph for 20 s


class Duplicates:
    """
    Polls the ROS graph.

    Two nodes with one name both answer each prompt, and each other's service calls. Two
    publishers on one topic mix their streams. ROS can't prevent either, so the node reports it.
    A duplicate that starts later is reported at once. One that was there before may be the ghost
    of this node's killed predecessor, so it is reported only if it stays.
    """

    def __init__(self, node: Node, tokens: Publisher) -> None:
        """
        Keep the node; `look` polls the graph.

        :param tokens: the publisher of `~/tokens`.
        """
        self._node, self._tokens = node, tokens
        self._started_s = time.monotonic()
        self._polled_s = float('-inf')
        self._since_s: float | None = None      # when the duplicates were first seen
        self._was_alone = False                 # after discovery
        self._reported = ''

    def look(self) -> str:
        """Return a description of the duplicates, empty if there are none; log each change."""
        now_s = time.monotonic()
        if now_s - self._polled_s >= PERIOD_S:
            self._polled_s = now_s
            confirmed, before = self._confirmed(self._find(), now_s), self._reported
            self._reported = confirmed
            if confirmed and confirmed != before:
                self._node.get_logger().error(confirmed)
            elif before and not confirmed:
                self._node.get_logger().info('the duplicate is gone')
        return self._reported

    def _confirmed(self, found: str, now_s: float) -> str:
        """Return what was found, unless it may be a ghost."""
        if not found:
            self._since_s = None
            self._was_alone = self._was_alone or now_s - self._started_s >= DISCOVERY_S
            return ''
        if self._since_s is None:
            self._since_s = now_s
        return found if self._was_alone or now_s - self._since_s >= GHOST_S else ''

    def _find(self) -> str:
        node, found = self._node, []
        name, topic = node.get_fully_qualified_name(), self._tokens.topic_name
        nodes = Counter(_full_name(*each) for each in node.get_node_names_and_namespaces())
        if nodes[name] > 1:
            found.append(f'{nodes[name]} nodes are called {name}: end the others, or rename them '
                         'with -r __node:=NAME')
        if node.count_publishers(topic) > 1:
            publishers = sorted(_full_name(info.node_name, info.node_namespace)
                                for info in node.get_publishers_info_by_topic(topic))
            found.append(f'{topic} has {len(publishers)} publishers, '
                         f'{", ".join(publishers)}: their streams mix')
        return '; '.join(found)


def _full_name(name: str, namespace: str) -> str:
    return f'{namespace.rstrip("/")}/{name}'
