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
A node in another process, and a client for each of its endpoints.

A client exists only while it is measured, as publishing without subscribers costs nothing.
"""

from collections.abc import Callable
from http.client import HTTPConnection
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))

from physai_decode.config import DecodeConfig
from physai_decode.ros.interfaces import Generate
from physai_decode.ros.topics import stream_qos
from plan_times import Plan
import rclpy
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from std_msgs.msg import String

PATIENCE_S = 120.0


class Node:
    """The node, from its start until `close`."""

    def __init__(self, config: DecodeConfig) -> None:
        """Start the node and wait until it accepts requests."""
        with socket.create_server(('127.0.0.1', 0)) as found:
            self.port = found.getsockname()[1]
        self.model = config.model.path
        self._process = subprocess.Popen([
            sys.executable, '-m', 'physai_decode.ros.process',
            '--ros-args', '--log-level', 'error', '-p', f'model.path:={self.model}',
            '-p', f'engine.cpu_threads:={config.engine.cpu_threads}',
            '-p', f'engine.max_context:={config.engine.max_context}',
            '-p', f'http.port:={self.port}'])
        try:
            waited(self._is_healthy, 'the node', lambda: time.sleep(0.1))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the node."""
        self._process.terminate()
        self._process.wait()

    def _is_healthy(self) -> bool:
        if self._process.poll() is not None:
            sys.exit(f'the node ended with {self._process.returncode}')
        connection = HTTPConnection('127.0.0.1', self.port, timeout=PATIENCE_S)
        try:
            connection.request('GET', '/health')
            return connection.getresponse().status == 200
        except OSError:                         # the port is not open yet
            return False
        finally:
            connection.close()


class RosDoor:
    """A ROS client, between `open` and `close`."""

    name = ''

    def __init__(self, node: Node) -> None:
        self.plan = Plan()

    def open(self) -> None:
        """Create the client and wait until the node discovers it."""
        rclpy.init()
        self.node = rclpy.create_node('plan_times')
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self.begin()

    def begin(self) -> None:
        """Create the endpoints."""

    def send(self, prompt: str, form: dict[str, Any], limit: int) -> None:
        """Send the request."""

    def ask(self, prompt: str, kind: str, form: dict[str, Any], limit: int) -> Plan:
        """Send a prompt and wait for the answer."""
        self.plan = Plan(kind)
        self.send(prompt, form, limit)
        self.wait(lambda: 'whole plan' in self.plan.marks)
        return self.plan

    def wait(self, done: Callable[[], bool]) -> None:
        """Spin until a condition holds."""
        waited(done, self.name, lambda: self._executor.spin_once(0.05))

    def close(self) -> None:
        """Destroy the client."""
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown()


class Topic(RosDoor):
    """~/request, ~/tokens, ~/item and ~/result."""

    name = 'topics'

    def begin(self) -> None:
        """Subscribe."""
        topics = {
            'tokens': lambda message: self.plan.token(message.data),
            'item': lambda message: self.plan.mark('first action'),
            'result': lambda message: self.plan.mark('whole plan')}
        heard = [self.node.create_subscription(String, f'/decode/{topic}', callback, stream_qos())
                 for topic, callback in topics.items()]
        self._request = self.node.create_publisher(String, '/decode/request', stream_qos())
        self.wait(lambda: self._request.get_subscription_count() and all(
            self.node.count_publishers(each.topic_name) for each in heard))

    def send(self, prompt: str, form: dict[str, Any], limit: int) -> None:
        """Publish the request."""
        self._request.publish(String(data=json.dumps(
            {'prompt': prompt, 'max_tokens': limit, **form})))


class Action(RosDoor):
    """~/generate."""

    name = 'action'

    def begin(self) -> None:
        """Create an action client."""
        self._client = ActionClient(
            self.node, Generate, '/decode/generate', feedback_sub_qos_profile=stream_qos())
        self.wait(self._client.server_is_ready)

    def send(self, prompt: str, form: dict[str, Any], limit: int) -> None:
        """Send the goal."""
        goal = Generate.Goal(prompt=prompt, options_json=json.dumps(form) if form else '')
        goal.sampling.max_tokens = limit
        self._client.send_goal_async(goal, self._hear).add_done_callback(
            lambda sent: sent.result().get_result_async().add_done_callback(
                lambda ended: self.plan.mark('whole plan')))

    def _hear(self, message):
        for token in message.feedback.tokens:
            self.plan.token(token.text)
        if message.feedback.items_json:
            self.plan.mark('first action')


class Http:
    """A stream of /v1/chat/completions; the client finds the actions in its text."""

    name = 'HTTP'

    def __init__(self, node: Node) -> None:
        self._model = node.model
        self._connection = HTTPConnection('127.0.0.1', node.port, timeout=PATIENCE_S)

    def open(self) -> None:
        """Open a connection for several requests."""
        self._connection.connect()

    def ask(self, prompt: str, kind: str, form: dict[str, Any], limit: int) -> Plan:
        """Send a prompt and wait for the answer."""
        plan = Plan('free')
        self._connection.request('POST', '/v1/chat/completions', json.dumps({
            'model': self._model, 'messages': [{'role': 'user', 'content': prompt}],
            'max_tokens': limit, 'stream': True, **form}))
        answer = self._connection.getresponse()
        if answer.status != 200:
            sys.exit(f'{self.name}: {answer.read().decode()}')
        for line in answer:
            if line.startswith(b'data: {'):
                choice, = json.loads(line[len(b'data: '):])['choices']
                if piece := choice['delta'].get('content'):
                    plan.token(piece)
        plan.mark('whole plan')
        return plan

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()


DOORS = [Topic, *([Action] if Generate else []), Http]


def waited(done: Callable[[], bool], what: str, meanwhile: Callable[[], None]) -> None:
    """Wait until a condition holds, or raise an error that names it."""
    end_s = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > end_s:
            sys.exit(f'{what}: no answer within {PATIENCE_S:g} s')
        meanwhile()
