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

"""
A controller that acts on a plan of the language model while it is being written.

It asks the node once, under an id of its own, for a JSON array of actions, and takes nothing that
does not bear this id. Each action goes out as soon as it is complete. Whether there is a next one
is never known: an error, a cancel or a limit can end the plan after each, and late tokens or an
action that does not come in time end the wait for it. Then the robot holds.
"""

import json
from pathlib import Path
import sys
import uuid

from diagnostic_msgs.msg import DiagnosticArray
from physai_decode.ros.messages import NOT_KNOWN
from physai_decode.ros.topics import latched_qos
from physai_decode.ros.topics import stream_qos
from rcl_interfaces.msg import ParameterDescriptor
import rclpy
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.utilities import remove_ros_args
from std_msgs.msg import String

LATE_IN_A_ROW = 3
ROUND_S, PATIENCE_S = 0.02, 1.0         # to look for a subscriber of ~/action
SCHEMA = Path(__file__).resolve().parent.parent / 'config' / 'plan.schema.json'


class Controller(Node):
    """The plan's actions go out on ~/action, one message each; `hold` where no more will come."""

    def __init__(self, command: str) -> None:
        super().__init__('controller')
        self.id, self.command, self.late, self.outcome = str(uuid.uuid4()), command, 0, ''
        self.acted, self.planned = 0, None      # actions so far, and in all once that is known
        self.has_model, self.rounds = False, 0
        self.token_ms = self.number('token_ms', 100.0)
        self.create_timer(self.number('plan_s', 10.0), lambda: self.end('hold: no plan in time'))
        self.next = self.create_timer(
            self.number('item_s', 5.0), lambda: self.end('hold: no next action in time'))
        self.next.cancel()                      # until the request is sent
        self.action = self.create_publisher(String, '~/action', 100)
        self.create_timer(ROUND_S, self.ask)
        self.request = self.create_publisher(String, '/decode/request', 10)
        self.create_subscription(
            DiagnosticArray, '/decode/token_stats', self.on_token, stream_qos())
        self.create_subscription(String, '/decode/item', self.on_item, stream_qos())
        self.create_subscription(String, '/decode/result', self.on_result, stream_qos())
        # The last to be made: when this one hears, the node knows of all the others.
        self.create_subscription(
            DiagnosticArray, '/decode/model_info', self.on_model, latched_qos())

    def number(self, name, default):
        # Without dynamic typing, 50 would be refused where 50.0 is taken.
        either = ParameterDescriptor(dynamic_typing=True)
        return float(self.declare_parameter(name, default, either).value)

    def on_model(self, info):
        self.has_model = info.status[0].values[0].value != NOT_KNOWN

    def ask(self):
        # An action that is sent before its subscriber was found would be lost.
        self.rounds += 1
        heard = self.action.get_subscription_count() or self.rounds > PATIENCE_S / ROUND_S
        if self.has_model and heard and self.command is not None:
            self.send(prompt=self.command, response_format={
                'type': 'json_schema', 'json_schema': {'schema': json.loads(SCHEMA.read_text())}})
            self.command = None
            self.next.reset()

    def on_token(self, stats):
        values = {pair.key: pair.value for pair in stats.status[0].values}
        if values['client_id'] == self.id and values['itl_ms'] != NOT_KNOWN:
            self.late = self.late + 1 if float(values['itl_ms']) > self.token_ms else 0
            if self.late == LATE_IN_A_ROW:
                self.end(f'hold: {self.late} tokens in a row were late')

    def on_item(self, message):
        item = json.loads(message.data)
        if item['id'] != self.id or self.outcome:
            return
        if item['index'] != self.acted:
            self.end(f'hold: action {self.acted} was lost')
            return
        self.action.publish(String(data=json.dumps(item['value'])))
        self.acted += 1
        self.next.reset()
        self.end_if_complete()

    def on_result(self, message):
        result = json.loads(message.data)
        if result['id'] == self.id:
            physai = result['physai']
            if physai['finish_reason'] == 'stop':
                self.planned = physai['items']
                self.end_if_complete()          # or the last actions are still on their way
            else:
                self.end(f'hold: {physai["finish_reason"]}: {physai["message"]}')

    def end_if_complete(self):
        if self.acted == self.planned:
            self.end('done')

    def end(self, outcome):
        if not self.outcome:
            self.outcome = outcome
            if outcome != 'done':
                self.action.publish(String(data='hold'))
                self.send(cancel=True)

    def send(self, **fields):
        self.request.publish(String(data=json.dumps({'id': self.id, **fields})))


def main() -> int:
    """Run until the plan is out or the robot holds; gives 0 for a whole plan, else 1."""
    rclpy.init()
    controller = Controller(' '.join(remove_ros_args(sys.argv)[1:]))
    while not controller.outcome:
        rclpy.spin_once(controller)
    controller.get_logger().info(controller.outcome)
    for publisher in controller.action, controller.request:
        publisher.wait_for_all_acked(Duration(seconds=1))
    controller.destroy_node()
    rclpy.shutdown()
    return 0 if controller.outcome == 'done' else 1


if __name__ == '__main__':
    sys.exit(main())
