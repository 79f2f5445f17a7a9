"""A node whose time costs nothing until it is asked for, also where it is simulated."""

import threading
import time
from typing import Any

from rclpy.callback_groups import CallbackGroup
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

    def create_subscription(self, msg_type, topic, callback, qos_profile, **options):
        """Subscribe, as rclpy's time source does to `/clock` where use_sim_time is set."""
        if topic != CLOCK_TOPIC:
            return super().create_subscription(msg_type, topic, callback, qos_profile, **options)
        self._clock_ticks = super().create_subscription(
            msg_type, topic, callback, qos_profile, **{**options, 'callback_group': Unserved()})
        return self._clock_ticks

    def destroy_subscription(self, subscription):
        """Let go of it; without simulated time there is none to `/clock`."""
        if subscription is self._clock_ticks:
            self._clock_ticks = None
        return super().destroy_subscription(subscription)

    def now_ns(self) -> int:
        """Give the time by the node's clock, in nanoseconds, in any thread."""
        ticks = self._clock_ticks
        if ticks is None:
            return time.time_ns()       # the same; rclpy's takes a tenth of a token's time
        with self._taking:
            try:
                with ticks.handle:
                    taken = ticks.handle.take_message(ticks.msg_type, False)
            except RuntimeError:        # destroyed: use_sim_time was just set to false
                taken = None
            if taken is not None:
                ticks.callback(taken[0])
        return self.get_clock().now().nanoseconds
