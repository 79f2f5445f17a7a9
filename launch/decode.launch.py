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

"""Launch the decode node, which configures and activates itself by default."""

import os
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.actions import OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue

PACKAGE = 'physai_decode'
ARGUMENTS = {
    'params_file': ('', 'YAML file with parameters; empty uses config/decode.yaml'),
    'namespace': ('', 'namespace of the node'),
    'name': ('decode', 'name of the node'),
    'model': ('', 'model.path: builtin:NAME, a folder or a hub id; empty uses the value in the '
              'file'),
    'engine': ('', 'engine.name: auto, native, transformers, exllamav2 or openai; empty uses the '
               'value in the file'),
    'autostart': ('', 'configure and activate at start; false waits for lifecycle calls; empty '
                  'uses the value in the file'),
    'log_level': ('info', 'least severe messages that are logged: debug, info, warn, error'),
}


def start(context: LaunchContext) -> list[LifecycleNode]:
    """Create the node from the values of the launch arguments."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    file = Path(given['params_file'] or
                f'{get_package_share_directory(PACKAGE)}/config/decode.yaml').expanduser()
    if not file.is_file():              # launch_ros would only warn, and start the node
        raise FileNotFoundError(f'params_file: there is no file {file}')
    overrides = {}
    if given['autostart']:              # parsed as YAML; the node refuses other types than bool
        overrides['autostart'] = ParameterValue(LaunchConfiguration('autostart'))
    for argument, parameter in (('model', 'model.path'), ('engine', 'engine.name')):
        if given[argument]:
            overrides[parameter] = given[argument]
    # The node activates itself: launch_ros of Humble and Jazzy does not support autostart.
    return [LifecycleNode(
        package=PACKAGE, executable='decode_node', name=given['name'],
        namespace=given['namespace'], output='screen',
        parameters=[str(file), overrides] if overrides else [str(file)],
        # With this process id, the node can end with the launcher.
        additional_env={'PHYSAI_DECODE_LAUNCHER': str(os.getpid())},
        arguments=['--ros-args', '--log-level', given['log_level']])]


def generate_launch_description() -> LaunchDescription:
    """Declare the launch arguments and the node."""
    return LaunchDescription([
        *(DeclareLaunchArgument(name, default_value=default, description=description)
          for name, (default, description) in ARGUMENTS.items()),
        OpaqueFunction(function=start)])
