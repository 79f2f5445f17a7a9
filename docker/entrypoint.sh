#!/bin/bash
# Starts the launch file with the arguments that follow the image's name.
set -e
. /ws/install/setup.bash
exec ros2 launch physai_decode decode.launch.py "$@"
