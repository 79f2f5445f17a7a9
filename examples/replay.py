r"""
Send the requests of a recorded session again, at the times of its bag.

It turns each message of `~/accepted`, played back under the name `/recorded/accepted`, into the
request that it holds:

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
    """What was accepted then is requested now; for another node, remap `/decode/request`."""

    def __init__(self) -> None:
        super().__init__('replay')
        self.request = self.create_publisher(String, '/decode/request', stream_qos())
        self.create_subscription(String, '/recorded/accepted', self.on_accepted, stream_qos())

    def on_accepted(self, message):
        self.request.publish(String(data=json.dumps(json.loads(message.data)['request'])))


def main():
    rclpy.init()
    try:
        rclpy.spin(Replay())
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()


if __name__ == '__main__':
    main()
