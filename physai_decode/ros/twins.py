"""Other nodes that pass for this one: of the same name, or with a publisher on its tokens."""

from collections import Counter
import time

from rclpy.node import Node
from rclpy.publisher import Publisher

LOOK_EVERY_S = 1.0


class Twins:
    """
    Looks at the ROS graph now and then.

    Two nodes of one name answer each prompt twice and each other's services; two publishers on
    one topic mix their streams. Neither can be prevented in ROS, so it is told.
    """

    def __init__(self, node: Node, tokens: Publisher) -> None:
        """Look at nothing yet."""
        self._node, self._tokens = node, tokens
        self._looked_s = float('-inf')
        self._told = ''

    def look(self) -> str:
        """Say what is wrong, empty where nothing is; a change is logged."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            told, before = self._find(), self._told
            self._told = told
            if told and told != before:
                self._node.get_logger().error(told)
            elif before and not told:
                self._node.get_logger().info('no other node passes for this one any more')
        return self._told

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
