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

"""launch/decode.launch.py: its arguments, and the nodes that it starts. Needs launch_pytest."""

import importlib.util
import os
from pathlib import Path
import re
import subprocess
import sys
import time

import pytest

launch_pytest = pytest.importorskip('launch_pytest')

from ament_index_python.packages import get_package_prefix
from ament_index_python.packages import PackageNotFoundError
from diagnostic_msgs.msg import DiagnosticArray
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.actions import GroupAction
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_ros.actions import PushROSNamespace
from node_rig import PATIENCE_S
from node_rig import spin
from rcl_interfaces.srv import GetParameters
import rclpy
from std_msgs.msg import String

ROOT = Path(__file__).parents[1]
FILE = ROOT / 'launch' / 'decode.launch.py'


@pytest.fixture(scope='module')
def prefix(tmp_path_factory):
    """Make an install space of the package, unless it is installed."""
    try:
        return get_package_prefix('physai_decode')
    except (PackageNotFoundError, OSError):
        pass
    prefix = tmp_path_factory.mktemp('prefix')
    for folder in ('share/ament_index/resource_index/packages', 'lib/physai_decode'):
        (prefix / folder).mkdir(parents=True)
    (prefix / 'share/ament_index/resource_index/packages/physai_decode').touch()
    (prefix / 'share/physai_decode').symlink_to(ROOT)
    script = prefix / 'lib/physai_decode/decode_node'
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m physai_decode.ros.process "$@"\n')
    script.chmod(0o755)
    paths = [str(prefix), *filter(None, [os.environ.get('AMENT_PREFIX_PATH')])]
    os.environ['AMENT_PREFIX_PATH'] = os.pathsep.join(paths)
    return prefix


@launch_pytest.fixture
def decode(prefix):
    """Launch a node with a name, a namespace, an engine and a model."""
    return LaunchDescription([
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(FILE)),
            launch_arguments={'namespace': 'robot', 'name': 'brain', 'engine': 'native',
                              'model': 'builtin:tiny_planner'}.items()),
        launch_pytest.actions.ReadyToTest()])


@pytest.mark.launch(fixture=decode)
def test_launched_node_answers():
    """It becomes active by itself, uses the arguments, and answers a prompt."""
    rclpy.init()
    probe = rclpy.create_node('probe')
    values, answers = {}, []

    def on_diagnostics(message):
        if message.header.frame_id == '/robot/brain':
            values.update({pair.key: pair.value for pair in message.status[-1].values})

    try:
        probe.create_subscription(DiagnosticArray, '/diagnostics', on_diagnostics, 10)
        probe.create_subscription(String, '/robot/brain/response', answers.append, 10)
        prompt = probe.create_publisher(String, '/robot/brain/prompt', 10)
        spin(probe, lambda: values.get('state') == 'idle' and prompt.get_subscription_count())
        assert (values['engine'], values['model']) == ('native', 'builtin:tiny_planner')
        prompt.publish(String(data='bring the red cup to the kitchen'))
        spin(probe, lambda: answers)
        assert answers[0].data
    finally:
        probe.destroy_node()
        rclpy.shutdown()


@launch_pytest.fixture
def autostarts(prefix, tmp_path):
    """Launch three nodes with `autostart: false` in the params file, two with an argument too."""
    file = tmp_path / 'params.yaml'
    file.write_text('/**: {ros__parameters: {autostart: false}}')
    return LaunchDescription([
        *(IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(FILE)),
            launch_arguments={'params_file': str(file), 'name': name, **given}.items())
          for name, given in (('default', {}), ('on', {'autostart': 'on'}),
                              ('off', {'autostart': 'False'}))),
        launch_pytest.actions.ReadyToTest()])


@pytest.mark.launch(fixture=autostarts)
def test_autostart_argument_overrides_the_params_file():
    """The argument takes YAML's spellings of a boolean; without it, the file's value holds."""
    rclpy.init()
    probe = rclpy.create_node('probe')
    values = {}
    try:
        for name in ('default', 'on', 'off'):
            client = probe.create_client(GetParameters, f'/{name}/get_parameters')
            assert client.wait_for_service(PATIENCE_S)
            response = client.call_async(GetParameters.Request(names=['autostart']))
            spin(probe, response.done)
            values[name] = response.result().values[0].bool_value
    finally:
        probe.destroy_node()
        rclpy.shutdown()
    assert values == {'default': False, 'on': True, 'off': False}


@launch_pytest.fixture
def nested(prefix, tmp_path):
    """Include the file as nav2's bringup would, which has arguments with the same names."""
    file = tmp_path / 'nav2_params.yaml'
    file.write_text('/amcl: {ros__parameters: {alpha1: 0.2}}')

    def decode(name):
        return IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(FILE)), launch_arguments={'name': name}.items())

    return LaunchDescription([
        PushROSNamespace('fleet'),
        DeclareLaunchArgument('params_file', default_value=str(file)),
        DeclareLaunchArgument('namespace', default_value='nav'),
        DeclareLaunchArgument('autostart', default_value='false'),
        decode('leaky'),
        GroupAction([PushROSNamespace('robot'), decode('scoped')], scoped=True, forwarding=False,
                    launch_configurations={'autostart': 'false'}),
        launch_pytest.actions.ReadyToTest()])


@pytest.mark.launch(fixture=nested)
def test_arguments_of_the_including_launch_file():
    """They and its namespace reach the included file, unless a scoped group keeps them out."""
    rclpy.init()
    probe = rclpy.create_node('probe')
    statuses = {}
    try:
        probe.create_subscription(
            DiagnosticArray, '/diagnostics',
            lambda message: statuses.update({message.header.frame_id: message.status[-1]}), 10)
        spin(probe, lambda: set(statuses) == {'/fleet/nav/leaky', '/robot/scoped'})
        models = {name: {pair.key: pair.value for pair in status.values}['model']
                  for name, status in statuses.items()}
        assert models == {'/fleet/nav/leaky': 'n/a', '/robot/scoped': 'builtin:tiny_planner'}
        assert ('nav2_params.yaml has no section for /fleet/nav/leaky: begin one with'
                in statuses['/fleet/nav/leaky'].message)
        assert statuses['/robot/scoped'].message == 'unconfigured'
    finally:
        probe.destroy_node()
        rclpy.shutdown()


LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

service = LaunchService()
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(
    PythonLaunchDescriptionSource(sys.argv[1]),
    launch_arguments=[each.split(':=') for each in sys.argv[2:]])]))
sys.exit(service.run())
"""


def launch(*arguments):
    """Launch the file in another process."""
    return subprocess.Popen([sys.executable, '-c', LAUNCH, str(FILE), *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_missing_params_file_ends_the_launch(prefix):
    """No node starts, because a robot must not run the default model by mistake."""
    process = launch('params_file:=/nope.yaml')
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert 'params_file: there is no file /nope.yaml' in output
    assert 'process started' not in output


def test_node_ends_if_launch_is_killed(prefix):
    process = launch('name:=orphan', 'autostart:=false')
    try:
        for line in process.stdout:
            if found := re.search(r'process started with pid \[(\d+)\]', line):
                break
        node = Path('/proc', found[1], 'stat')
        time.sleep(3.0)         # if the node starts more slowly, it ends at its start
        assert node.exists()
        process.kill()
        process.wait()
        end_s = time.monotonic() + PATIENCE_S
        while node.exists() and node.read_text().rpartition(')')[2].split()[0] != 'Z':
            assert time.monotonic() < end_s, 'the node still runs'
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()


def test_arguments_have_descriptions():
    """`ros2 launch --show-args` prints them."""
    spec = importlib.util.spec_from_file_location('decode_launch', FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = [entity for entity in module.generate_launch_description().describe_sub_entities()
                 if isinstance(entity, DeclareLaunchArgument)]
    assert [argument.name for argument in arguments] == list(module.ARGUMENTS)
    assert all(argument.description for argument in arguments)
