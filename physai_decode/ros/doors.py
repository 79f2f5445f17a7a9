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
What others send and call, handed to the host: prompts, requests, cancel, reset, measure_gap.

No door waits for the model but measure_gap, which has a callback group of its own.
"""

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
from std_msgs.msg import String
from std_srvs.srv import Trigger


class Doors:
    """The subscriptions and services of one node."""

    def __init__(self, node: Node, host: Host) -> None:
        """Create them all."""
        self._host = host
        self._logger = node.get_logger()
        self._max_bytes = lambda: host.config.queue.max_request_bytes

        def subscribe(topic, callback):
            return node.create_subscription(
                String, topic, callback, stream_qos(),
                qos_overriding_options=QoSOverridingOptions(POLICIES))

        self.prompt = subscribe('~/prompt', self._on_prompt)
        self.request = subscribe('~/request', self._on_request)
        # Of calls at once, rclpy's own depth keeps the last 10 alone.
        for name, callback, group in (
                ('~/cancel', self._on_cancel, None), ('~/reset', self._on_reset, None),
                ('~/measure_gap', self._on_measure_gap, MutuallyExclusiveCallbackGroup())):
            node.create_service(Trigger, name, callback, qos_profile=stream_qos(),
                                callback_group=group)

    def _on_prompt(self, message):
        self._host.submit(Request(message.data), time.monotonic())

    def _on_request(self, message):
        received_s, limit = time.monotonic(), self._max_bytes()
        if len(message.data) > limit:
            self._host.refuse(f'the request has more than {limit} bytes: shorten it, or raise '
                              'queue.max_request_bytes', kind='too_large')
            return
        try:
            asked = parse(message.data)
        except RequestError as error:
            self._host.refuse(str(error), error.client_id)
            return
        if isinstance(asked, Cancel):
            done = self._host.cancel(client_id=asked.client_id)
            self._logger.debug(f'cancel of {asked.client_id!r}: {done}')
        else:
            self._host.submit(asked, received_s)

    def _on_cancel(self, request, response):
        response.success, response.message = True, self._host.cancel()
        return response

    def _on_reset(self, request, response):
        response.success, response.message = True, self._host.reset()
        return response

    def _on_measure_gap(self, request, response):
        try:
            response.message = str(self._host.measure_gap(self._logger.info))
            response.success = True
        except (Busy, EngineError) as error:
            response.message = f'not measured: {error}'
        except Exception as error:      # the device's memory is full, for one
            response.message = f'not measured: {type(error).__name__}: {first_line(error)}'
        self._logger.info(f'the gap: {response.message}')
        return response
