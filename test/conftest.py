"""Each test process has a ROS domain of its own, on the loopback only."""

from glob import glob
import os

os.environ['ROS_DOMAIN_ID'] = str(1 + os.getpid() % 100)
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
os.environ.pop('ROS_LOCALHOST_ONLY', None)      # of which later distributions warn
if os.environ.get('ROS_DISTRO') == 'humble':    # the same there
    os.environ['ROS_LOCALHOST_ONLY'] = '1'
os.environ.setdefault('OMP_NUM_THREADS', '1')
if not glob('/dev/nvidia[0-9]*'):               # before anything imports Triton
    os.environ.setdefault('TRITON_INTERPRET', '1')
