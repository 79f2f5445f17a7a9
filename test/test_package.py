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

"""The package as colcon builds and installs it, and the rules of the Makefile."""

from configparser import RawConfigParser
import importlib.util
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import physai_decode
from physai_decode import realtime
import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    '.*', 'build', 'install', 'log', '*.egg-info', '__pycache__')
COMMANDS = dict(re.findall(
    r"'(\w+) = (physai_decode[.\w]+):main'", (ROOT / 'setup.py').read_text()))


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """Build the package with colcon; gives the workspace's folder."""
    pytest.importorskip('colcon_ros')
    folder = tmp_path_factory.mktemp('workspace')
    shutil.copytree(ROOT, folder / 'src' / 'physai_decode', ignore=LEFT_OUT)
    result = subprocess.run(
        [sys.executable, '-m', 'colcon', 'build'], cwd=folder, capture_output=True, text=True,
        timeout=600)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope='module')
def prefix(workspace):
    """Give the folder that the package is installed in."""
    return workspace / 'install' / 'physai_decode'


def test_colcon_takes_it_for_a_ros_package(prefix):
    """Only ros.ament_python writes this hook; a broken package.xml makes colcon fall back."""
    assert (prefix / 'share/physai_decode/hook/ament_prefix_path.dsv').is_file()
    assert (prefix / 'share/ament_index/resource_index/packages/physai_decode').is_file()


def test_colcon_does_not_look_for_packages_in_it(workspace):
    """The interface package in it is built only where --base-paths names it."""
    assert [path.name for path in (workspace / 'install').iterdir() if path.is_dir()] == [
        'physai_decode']


def test_installed_files(prefix):
    """The configs, the launch file and the manifest are in share, the model with the code."""
    for name in ('config', 'examples', 'launch', 'systemd'):
        want = {path.name for path in (ROOT / name).iterdir() if path.is_file()}
        assert want == {path.name for path in (prefix / 'share/physai_decode' / name).iterdir()}
        assert want
    assert (prefix / 'share/physai_decode/package.xml').is_file()
    models, = prefix.glob('lib/python*/site-packages/physai_decode/models')
    source = ROOT / 'physai_decode' / 'models'
    want = {path.relative_to(source) for path in source.rglob('*') if path.is_file()}
    assert want == {path.relative_to(models) for path in models.rglob('*') if path.is_file()}
    assert Path('tiny_planner/model.safetensors') in want
    assert set(COMMANDS) == {path.name for path in (prefix / 'lib/physai_decode').iterdir()}


def test_installed_code_is_complete(prefix):
    """Each module of the source is installed."""
    installed, = prefix.glob('lib/python*/site-packages/physai_decode')
    source = ROOT / 'physai_decode'
    assert ({path.relative_to(source) for path in source.rglob('*.py')}
            == {path.relative_to(installed) for path in installed.rglob('*.py')})
    assert (installed / 'py.typed').is_file()       # by which type checkers read its types


def test_installed_node_runs(workspace, prefix):
    """The installed decode_node becomes active with its installed config, and ends by SIGINT."""
    rclpy = pytest.importorskip('rclpy')
    from lifecycle_msgs.msg import State
    from lifecycle_msgs.srv import GetState
    config = prefix / 'share/physai_decode/config/decode.yaml'
    node = prefix / 'lib/physai_decode/decode_node'
    sourced = ['sh', '-c', '. install/setup.sh; exec "$@"', 'sh']
    where = subprocess.run(
        [*sourced, sys.executable, '-c', 'import physai_decode; print(physai_decode.__file__)'],
        cwd=workspace, capture_output=True, text=True, timeout=120, check=True).stdout
    assert Path(where.strip()).is_relative_to(prefix)

    context = rclpy.Context()
    rclpy.init(context=context)
    asking = rclpy.create_node('asking', context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(asking)
    client = asking.create_client(GetState, '/installed/decode/get_state')
    process = subprocess.Popen(
        [*sourced, str(node), '--ros-args', '-r', '__ns:=/installed', '--params-file',
         str(config)], cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        state, until_s = None, time.monotonic() + 120
        while state != State.PRIMARY_STATE_ACTIVE and time.monotonic() < until_s:
            assert process.poll() is None, process.stdout.read()
            if client.wait_for_service(timeout_sec=1.0):
                future = client.call_async(GetState.Request())
                executor.spin_until_future_complete(future, timeout_sec=5.0)
                state = future.result().current_state.id if future.done() else None
        assert state == State.PRIMARY_STATE_ACTIVE
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    finally:
        process.kill()
        process.wait()
        executor.shutdown()
        asking.destroy_node()
        rclpy.shutdown(context=context)


def test_versions_agree():
    """It stands in five files, as text: so the tools that release a ROS package want it."""
    changelog = (ROOT / 'CHANGELOG.rst').read_text()
    setup = (ROOT / 'setup.py').read_text()
    for folder in (ROOT, ROOT / 'physai_decode_msgs'):
        manifest = ElementTree.parse(folder / 'package.xml').getroot()
        assert manifest.findtext('version') == physai_decode.__version__, folder
    assert re.search(r"version='([\d.]+)'", setup)[1] == physai_decode.__version__
    assert re.search(r'^(\d+\.\d+\.\d+) ', changelog, re.MULTILINE)[1] == physai_decode.__version__


def test_the_changelog_is_one():
    """With a place for what comes next, where the tools that release look for it."""
    changelogs = pytest.importorskip('catkin_pkg.changelog')
    package_version = pytest.importorskip('catkin_pkg.package_version')
    text = (ROOT / 'CHANGELOG.rst').read_text()
    assert package_version.get_forthcoming_label(text) == 'Forthcoming'
    read = changelogs.get_changelog_from_path(str(ROOT), 'physai_decode')
    versions = [version for version, _, _ in read.foreach_version()]
    assert versions[-1] == physai_decode.__version__


def test_the_unit_permits_what_the_parameters_ask_for():
    """Its limits are those that the node names where it lacks one; its command is installed."""
    unit = RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(ROOT / 'systemd' / 'physai_decode.service')
    limits = {f'{key}={value}' for key, value in unit['Service'].items()}
    for text in (realtime.PERMIT_PRIORITY, realtime.PERMIT_MEMORY):
        assert re.search(r'by (\w+=\w+) in a systemd unit', text)[1] in limits
    command = re.search(r'/lib/physai_decode/(\w+)', unit['Service']['ExecStart'])[1]
    assert command in COMMANDS


def test_each_file_has_its_licence():
    """As ament_copyright wants it, below a shebang; the first lines of setup.py are the model."""
    header = (ROOT / 'setup.py').read_text().partition('\n\n')[0]
    assert header.startswith('# Copyright') and 'Apache License, Version 2.0' in header
    folders = ('examples', 'launch', 'physai_decode', 'physai_decode_msgs', 'test', 'tools')
    lacking = [str(path.relative_to(ROOT)) for folder in folders
               for path in sorted((ROOT / folder).rglob('*'))
               if path.suffix in ('.py', '.cmake') and path.stat().st_size
               and header not in path.read_text()[:1000]]
    assert not lacking, 'put the first lines of setup.py above the code of these files'


def test_commands_exist():
    """Each command's module is there."""
    assert {'decode_node', 'decode_ask', 'decode_bench'} <= set(COMMANDS)
    for module in COMMANDS.values():
        assert importlib.util.find_spec(module)


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_a_machine_without_wheels_is_told(tmp_path):
    """Where rclpy has no wheels, make says in one line what to do and installs nothing."""
    for path in ROOT.glob('*'):
        if path.is_file():
            shutil.copy(path, tmp_path)
    before = set(tmp_path.iterdir())
    alone = {key: value for key, value in os.environ.items() if 'MAKE' not in key}
    result = subprocess.run(
        ['make', 'demo', 'MACHINE=aarch64'], cwd=tmp_path, env=alone, capture_output=True,
        text=True, timeout=120)
    assert result.returncode != 0
    assert re.match(r'physai_decode: .*rclpy.*aarch64.*colcon.*\nmake: ', result.stderr)
    assert result.stdout == ''
    assert set(tmp_path.iterdir()) == before
