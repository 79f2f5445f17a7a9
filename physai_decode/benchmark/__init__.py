"""
What ``decode_bench`` is made of: cases, the process that measures one, statistics, the report.

It knows engines only by the protocol in ``physai_decode.engine`` and nothing of ROS.
"""
