"""
A controller that acts on a plan of the language model, and holds still where the plan is late.

It asks the node once. Three things end the wait: the whole plan; a request that ended otherwise;
or a deadline, be it some late tokens in a row or the time for the plan as a whole. It takes the
node to be its own: a std_msgs/String does not say whose prompt an answer belongs to.
"""

import json
import sys

from diagnostic_msgs.msg import DiagnosticArray
from diagnostic_msgs.msg import KeyValue
from physai_decode.ros.messages import NOT_KNOWN
from physai_decode.ros.topics import latched_qos
from rcl_interfaces.msg import ParameterDescriptor
import rclpy
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.utilities import remove_ros_args
from std_msgs.msg import Float64
from std_msgs.msg import String
from std_srvs.srv import Trigger

LATE_IN_A_ROW = 3


class Controller(Node):
    """The plan's actions go out on ~/action, one message each, or else a single `hold`."""

    def __init__(self, command: str) -> None:
        super().__init__('controller')
        self.command, self.late, self.text, self.reason, self.outcome = command, 0, None, '', ''
        self.token_ms = self.number('token_ms', 100.0)
        self.create_timer(self.number('plan_s', 10.0), lambda: self.end('hold: no plan in time'))
        self.action = self.create_publisher(String, '~/action', 100)
        self.prompt = self.create_publisher(String, '/decode/prompt', 10)
        self.cancel = self.create_client(Trigger, '/decode/cancel')
        self.create_subscription(Float64, '/decode/itl_ms', self.on_token, 10)
        self.create_subscription(String, '/decode/response', self.on_response, 10)
        self.create_subscription(DiagnosticArray, '/decode/request_stats', self.on_stats, 10)
        # The last to be made: when this one hears, the node knows of all the others.
        self.create_subscription(
            DiagnosticArray, '/decode/model_info', self.on_model, latched_qos())

    def number(self, name, default):
        # Without dynamic typing, 50 would be refused where 50.0 is taken.
        either = ParameterDescriptor(dynamic_typing=True)
        return float(self.declare_parameter(name, default, either).value)

    def on_model(self, info):
        if info.status[0].values[0].value != NOT_KNOWN and self.command is not None:
            self.prompt.publish(String(data=self.command))
            self.command = None

    def on_token(self, itl_ms):
        self.late = self.late + 1 if itl_ms.data > self.token_ms else 0
        if self.late == LATE_IN_A_ROW:
            self.end(f'hold: {self.late} tokens in a row were late')

    def on_response(self, text):
        self.text = text.data
        self.act()

    def on_stats(self, stats):
        status = stats.status[0]
        stopped = KeyValue(key='finish_reason', value='stop') in status.values
        self.reason = 'stop' if stopped else status.message
        self.act()

    def act(self):
        if self.reason == 'stop' and self.text is not None:
            try:
                self.end('done', [json.dumps(action) for action in json.loads(self.text)])
            except (TypeError, ValueError):
                self.end(f'hold: no plan: {self.text}')
        elif self.reason not in ('', 'stop'):
            self.end(f'hold: {self.reason}')

    def end(self, outcome, actions=('hold',)):
        if not self.outcome:
            self.outcome = outcome
            for action in actions:
                self.action.publish(String(data=action))
            if outcome != 'done':
                self.cancel.call_async(Trigger.Request())


def main() -> int:
    """Run until the plan is out or the robot holds; gives 0 for a plan, else 1."""
    rclpy.init()
    controller = Controller(' '.join(remove_ros_args(sys.argv)[1:]))
    while not controller.outcome:
        rclpy.spin_once(controller)
    controller.get_logger().info(controller.outcome)
    controller.action.wait_for_all_acked(Duration(seconds=1))
    controller.destroy_node()
    rclpy.shutdown()
    return 0 if controller.outcome == 'done' else 1


if __name__ == '__main__':
    sys.exit(main())
