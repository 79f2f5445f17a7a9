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
A controller that executes a plan while the language model is still writing it.

It requests a JSON array of actions under its own id, and ignores messages with other ids. It sends
each action as soon as the action is complete. The plan can end after any action: by an error, a
cancel or a limit, by late tokens, or by an action that does not arrive in time. The robot then
holds.
"""

import argparse
import json
from pathlib import Path
import sys
import time
from typing import Any
import uuid

from diagnostic_msgs.msg import DiagnosticArray
from physai_decode.ros.messages import NOT_KNOWN
from physai_decode.ros.topics import decode_nodes
from physai_decode.ros.topics import latched_qos
from physai_decode.ros.topics import start_advice
from physai_decode.ros.topics import stream_qos
from rcl_interfaces.msg import ParameterDescriptor
import rclpy
from rclpy.duration import Duration
from rclpy.exceptions import NameValidationException
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.utilities import remove_ros_args
from std_msgs.msg import String

LATE_LIMIT = 3                          # late tokens in a row
POLL_S, PATIENCE_S = 0.02, 1.0          # to wait for a subscriber of ~/action
ACKNOWLEDGE_S = 0.3                     # Fast DDS asks for acknowledgements only every 3 s
SCHEMA = Path(__file__).resolve().parent.parent / 'config' / 'plan.schema.json'


class Controller(Node):
    """Publishes each action of a plan on ~/action, and `hold` if the plan is incomplete."""

    def __init__(self, command: str, node: str = '/decode') -> None:
        super().__init__('controller')
        self.id, self.outcome, self.late = str(uuid.uuid4()), '', 0
        self.command: str | None = command      # None once it was sent
        self.sent = 0                           # actions so far
        self.planned: int | None = None         # actions of the plan, once that is known
        self.has_model: bool | None = None      # None until the node says which model it has
        self.polls = 0
        self.token_ms = self.number('token_ms', 100.0)
        self.plan_s = self.number('plan_s', 10.0)
        self.create_timer(self.plan_s, lambda: self.end(f'hold: {self.delay()}'))
        self.item_timer = self.create_timer(
            self.number('item_s', 5.0), lambda: self.end('hold: no next action in time'))
        self.item_timer.cancel()                # until the request is sent
        self.action = self.create_publisher(String, '~/action', 100)
        self.create_timer(POLL_S, self.ask)
        self.request = self.create_publisher(String, f'{node}/request', 10)
        self.target = self.request.topic_name.removesuffix('/request')
        self.create_subscription(
            DiagnosticArray, f'{node}/token_stats', self.on_token, stream_qos())
        self.create_subscription(String, f'{node}/item', self.on_item, stream_qos())
        self.create_subscription(String, f'{node}/result', self.on_result, stream_qos())
        # Created last: when its first message arrives, the node has discovered the others.
        self.create_subscription(
            DiagnosticArray, f'{node}/model_info', self.on_model, latched_qos())

    def number(self, name: str, default: float) -> float:
        # Without dynamic typing, ROS accepts 50.0 but refuses 50.
        descriptor = ParameterDescriptor(dynamic_typing=True)
        return float(self.declare_parameter(name, default, descriptor).value)

    def on_model(self, info: DiagnosticArray) -> None:
        self.has_model = info.status[0].values[0].value != NOT_KNOWN

    def delay(self) -> str:
        """Say why there is no complete plan after `plan_s`."""
        if self.command is None:
            return 'no plan in time'
        if self.has_model is False:
            return f'{self.target} has no model: configure and activate it'
        names = [name for name in decode_nodes(self) if name != self.target]
        return (f'no node {self.target} was found within {self.plan_s:g} s'
                + (f'; found {" ".join(names)}: choose one with --node' if names
                   else start_advice(self)))

    def ask(self) -> None:
        # An action that is sent before its subscriber is discovered would be lost.
        self.polls += 1
        ready = self.action.get_subscription_count() or self.polls > PATIENCE_S / POLL_S
        if self.has_model and ready and self.command is not None:
            self.send(prompt=self.command, response_format={
                'type': 'json_schema', 'json_schema': {'schema': json.loads(SCHEMA.read_text())}})
            self.command = None
            self.item_timer.reset()

    def on_token(self, stats: DiagnosticArray) -> None:
        values = {pair.key: pair.value for pair in stats.status[0].values}
        if values['client_id'] == self.id and values['itl_ms'] != NOT_KNOWN:
            self.late = self.late + 1 if float(values['itl_ms']) > self.token_ms else 0
            if self.late == LATE_LIMIT:
                self.end(f'hold: {self.late} tokens in a row were late')

    def on_item(self, message: String) -> None:
        item = json.loads(message.data)
        if item['id'] != self.id or self.outcome:
            return
        if item['index'] != self.sent:
            self.end(f'hold: action {self.sent} was lost')
            return
        action = json.dumps(item['value'])
        self.action.publish(String(data=action))
        self.sent += 1
        self.get_logger().info(f'action {self.sent}: {action}')
        self.item_timer.reset()
        self.end_if_complete()

    def on_result(self, message: String) -> None:
        result = json.loads(message.data)
        if result['id'] == self.id:
            physai = result['physai']
            if physai['finish_reason'] == 'stop':
                self.planned = physai['items']
                self.end_if_complete()          # otherwise, the last actions are yet to arrive
            else:
                self.end(f'hold: {physai["finish_reason"]}: {physai["message"]}')

    def end_if_complete(self) -> None:
        if self.sent == self.planned:
            self.end('done')

    def end(self, outcome: str) -> None:
        if not self.outcome:
            self.outcome = outcome
            if outcome != 'done':
                self.action.publish(String(data='hold'))
                self.send(cancel=True)

    def send(self, **fields: Any) -> None:
        self.request.publish(String(data=json.dumps({'id': self.id, **fields})))


def flush(*publishers: Publisher) -> None:
    """Give subscribers `ACKNOWLEDGE_S` to receive the last messages of all publishers."""
    end_s = time.monotonic() + ACKNOWLEDGE_S
    for publisher in publishers:
        try:
            publisher.wait_for_all_acked(Duration(seconds=max(0.0, end_s - time.monotonic())))
        except RuntimeError:            # this middleware does not report acknowledgements
            return


def main() -> int:
    """Run until the plan is done or the robot holds; return 0 for a complete plan, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('command', nargs='+', help='what the robot should do')
    parser.add_argument('--node', default='/decode', help="the decode node's name (%(default)s)")
    arguments = parser.parse_args(remove_ros_args(sys.argv)[1:])
    rclpy.init()
    try:
        controller = Controller(' '.join(arguments.command), arguments.node)
    except NameValidationException:
        parser.error(f'{arguments.node!r} is not a valid node name')
    while not controller.outcome:
        rclpy.spin_once(controller)
    controller.get_logger().info(
        f'{controller.outcome}; sent {controller.sent} actions to {controller.action.topic_name}')
    flush(controller.action, controller.request)
    controller.destroy_node()
    rclpy.shutdown()
    return 0 if controller.outcome == 'done' else 1


if __name__ == '__main__':
    sys.exit(main())
