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
The subscriptions and services that pass requests to the host.

Only measure_gap waits for the model, so it has a callback group of its own.
"""

from collections.abc import Callable
import time

from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.host import Host
from physai_decode.request import Cancel
from physai_decode.request import parse
from physai_decode.request import Request
from physai_decode.request import RequestError
from physai_decode.ros.topics import POLICIES
from physai_decode.ros.topics import stream_qos
from physai_decode.worker import Busy
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.node import Node
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from std_msgs.msg import String
from std_srvs.srv import Trigger


class Endpoints:
    """The subscriptions and services of one node."""

    def __init__(self, node: Node, host: Host) -> None:
        """Create the subscriptions and services."""
        self._host = host
        self._logger = node.get_logger()

        def subscribe(topic: str, callback: Callable[[String], None]) -> Subscription:
            return node.create_subscription(
                String, topic, callback, stream_qos(),
                qos_overriding_options=QoSOverridingOptions(POLICIES))

        self.prompt = subscribe('~/prompt', self._on_prompt)
        self.request = subscribe('~/request', self._on_request)
        # With rclpy's default depth, all but the last 10 simultaneous calls would be lost.
        for name, callback, group in (
                ('~/cancel', self._on_cancel, None), ('~/reset', self._on_reset, None),
                ('~/measure_gap', self._on_measure_gap, MutuallyExclusiveCallbackGroup())):
            node.create_service(Trigger, name, callback, qos_profile=stream_qos(),
                                callback_group=group)

    def _on_prompt(self, message: String) -> None:
        self._host.submit(Request(message.data), time.monotonic())
        begin = message.data[:1000]
        if begin.startswith('{') and ('"prompt"' in begin or '"messages"' in begin):
            self._logger.warning(
                'a text on ~/prompt looks like a JSON request, but the model reads it as plain '
                'text: send requests to ~/request', throttle_duration_sec=1.0)

    def _on_request(self, message: String) -> None:
        received_s, limit = time.monotonic(), self._host.config.queue.max_request_bytes
        if len(message.data) > limit:
            self._host.refuse(f'the request has more than {limit} bytes: shorten it, or raise '
                              'queue.max_request_bytes', kind='too_large')
            return
        try:
            parsed = parse(message.data)
        except RequestError as error:
            hint = '' if message.data.lstrip().startswith('{') else '; plain text goes to ~/prompt'
            self._host.refuse(f'{error}{hint}', error.client_id)
            return
        if isinstance(parsed, Cancel):
            if parsed.surplus:
                self._logger.warning(
                    f'the cancel of {parsed.client_id!r} ignores {", ".join(parsed.surplus)}',
                    throttle_duration_sec=1.0)
            if not self._host.cancel(client_id=parsed.client_id):
                self._logger.info(
                    f'nothing to cancel: no request {parsed.client_id!r} is running or waiting',
                    throttle_duration_sec=1.0)
        else:
            self._host.submit(parsed, received_s)

    def _on_cancel(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success, response.message = True, str(self._host.cancel())
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success, response.message = True, self._host.reset()
        return response

    def _on_measure_gap(self, request: Trigger.Request,
                        response: Trigger.Response) -> Trigger.Response:
        def log(line: str) -> None:
            self._logger.info(line)

        try:
            response.message = str(self._host.measure_gap(log))
            response.success = True
        except (Busy, EngineError) as error:
            response.message = f'not measured: {error}'
        except Exception as error:      # such as out of device memory
            response.message = f'not measured: {type(error).__name__}: {first_line(error)}'
        self._logger.info(f'measure_gap: {response.message}')
        return response
