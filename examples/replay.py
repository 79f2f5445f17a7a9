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

r"""
Replay the requests of a recorded session at their original times.

It sends the request in each message of `~/accepted`, which the bag plays back on the topic
`/recorded/accepted`:

    ros2 bag play session --topics /decode/accepted \
      --remap /decode/accepted:=/recorded/accepted
"""

import json

from physai_decode.ros.topics import stream_qos
import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from std_msgs.msg import String


class Replay(Node):
    """Sends each accepted request again; for another node, remap `/decode/request`."""

    def __init__(self) -> None:
        super().__init__('replay')
        self.request = self.create_publisher(String, '/decode/request', stream_qos())
        self.create_subscription(String, '/recorded/accepted', self.on_accepted, stream_qos())

    def on_accepted(self, message: String) -> None:
        self.request.publish(String(data=json.dumps(json.loads(message.data)['request'])))


def main() -> None:
    rclpy.init()
    try:
        replay = Replay()
        while rclpy.ok():       # a wait without a timeout can miss a signal in an idle graph
            rclpy.spin_once(replay, timeout_sec=0.5)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()


if __name__ == '__main__':
    main()
