"""The ROS side: the lifecycle node, its topics and parameters, and the commands that listen."""

import signal

from physai_decode.ros import room

room.check_shared_memory()
# numpy starts threads when it is imported, as rclpy does. With the signals open there, the kernel
# would bring a signal that the main thread blocks to one of them, where it is lost.
_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
try:
    import numpy as numpy
finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before)
