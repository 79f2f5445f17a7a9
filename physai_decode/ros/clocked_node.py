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

"""A node whose time costs nothing until it is asked for, also where it is simulated."""

import threading
import time
from typing import Any

from physai_decode.ros.faults import Faults
from rclpy.callback_groups import CallbackGroup
from rclpy.exceptions import InvalidHandle
from rclpy.node import Node
from rclpy.subscription import Subscription
from rclpy.time_source import CLOCK_TOPIC


class Unserved(CallbackGroup):
    """Keeps what is in it from every executor."""

    def can_execute(self, entity: Any) -> bool:
        """Refuse."""
        return False

    def beginning_execution(self, entity: Any) -> bool:
        """Refuse."""
        return False

    def ending_execution(self, entity: Any) -> None:
        """Do nothing."""


class ClockedNode(Node):
    """
    Reads the newest message of `/clock` when it needs a time, not each when it comes.

    rclpy's executor needs about 0.6 ms of a core for a message, which at 1000 Hz is more than
    half a core, and the decode thread waits for the interpreter meanwhile. Nothing in here waits
    for simulated time (timers are on the steady clock), so a time is needed for stamps alone.
    """

    _clock_ticks: Subscription | None = None
    _taking = threading.Lock()

    def __init__(self, name: str, **arguments: Any) -> None:
        """
        Make the node; its faults are counted from here on.

        :param arguments: for rclpy's Node.
        """
        super().__init__(name, **arguments)
        self.faults = Faults(self.get_logger())

    def create_subscription(self, msg_type, topic, callback, qos_profile,
                            **options) -> Subscription:
        """Subscribe, as rclpy's time source does to `/clock` where use_sim_time is set."""
        if topic != CLOCK_TOPIC:
            return super().create_subscription(msg_type, topic, callback, qos_profile, **options)
        self._clock_ticks = super().create_subscription(
            msg_type, topic, callback, qos_profile, **{**options, 'callback_group': Unserved()})
        return self._clock_ticks

    def destroy_subscription(self, subscription) -> bool:
        """Let go of it; without simulated time there is none to `/clock`."""
        if subscription is self._clock_ticks:
            self._clock_ticks = None
        return super().destroy_subscription(subscription)

    def now_ns(self) -> int:
        """
        Give the time by the node's clock, in nanoseconds, in any thread.

        A message of `/clock` that no stamp can hold is left out.
        """
        ticks = self._clock_ticks
        if ticks is None:
            return time.time_ns()       # the same; rclpy's takes a tenth of a token's time
        with self._taking:
            try:
                with ticks.handle:
                    taken = ticks.handle.take_message(ticks.msg_type, False)
                if taken is not None:
                    ticks.callback(_checked(taken[0]))
            except InvalidHandle:       # destroyed: use_sim_time was just set to false
                pass
            except Exception as error:
                self.faults.note(CLOCK_TOPIC, error)
        return self.get_clock().now().nanoseconds


def _checked(message: Any) -> Any:
    """
    Give a message of `/clock` that a stamp can hold.

    rclpy refuses negative times when they come, but those after the year 2038 only in each stamp.

    :raises ValueError: it is no time; the message says why.
    """
    if message.clock.sec < 0 or message.clock.nanosec >= 10**9:
        raise ValueError(f'{message.clock.sec} s and {message.clock.nanosec} ns: expected 0 s or '
                         'more and less than 10^9 ns')
    return message
