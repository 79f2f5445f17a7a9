"""A ROS 2 node for batch-1 decoding that reports how near each token came to the memory floor."""

__version__ = '0.1.0'
