"""The ROS side: the lifecycle node, its topics and parameters, and the commands that listen."""

from physai_decode.ros import room

room.check_shared_memory()
