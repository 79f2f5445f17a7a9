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

"""The package that colcon builds and installs, its metadata, and the Makefile."""

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
    """Build the package with colcon, and return the folder of the workspace."""
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
    """Return the folder in which the package is installed."""
    return workspace / 'install' / 'physai_decode'


def test_colcon_builds_a_ros_package(prefix):
    """With an invalid package.xml, colcon builds a plain Python package without this hook."""
    assert (prefix / 'share/physai_decode/hook/ament_prefix_path.dsv').is_file()
    assert (prefix / 'share/ament_index/resource_index/packages/physai_decode').is_file()


def test_colcon_builds_no_nested_package(workspace):
    """physai_decode_msgs is built only if --base-paths names it."""
    assert [path.name for path in (workspace / 'install').iterdir() if path.is_dir()] == [
        'physai_decode']


def test_installs_data_files(prefix):
    """Configs, examples and launch files are in share; the embedded model is beside the code."""
    for name in ('config', 'examples', 'launch', 'systemd'):
        files = {path.name for path in (ROOT / name).iterdir() if path.is_file()}
        assert files == {path.name for path in (prefix / 'share/physai_decode' / name).iterdir()}
        assert files
    assert (prefix / 'share/physai_decode/package.xml').is_file()
    models, = prefix.glob('lib/python*/site-packages/physai_decode/models')
    source = ROOT / 'physai_decode' / 'models'
    files = {path.relative_to(source) for path in source.rglob('*') if path.is_file()}
    assert files == {path.relative_to(models) for path in models.rglob('*') if path.is_file()}
    assert Path('tiny_planner/model.safetensors') in files
    assert set(COMMANDS) == {path.name for path in (prefix / 'lib/physai_decode').iterdir()}


def test_installs_all_modules(prefix):
    installed, = prefix.glob('lib/python*/site-packages/physai_decode')
    source = ROOT / 'physai_decode'
    assert ({path.relative_to(source) for path in source.rglob('*.py')}
            == {path.relative_to(installed) for path in installed.rglob('*.py')})
    assert (installed / 'py.typed').is_file()       # type checkers need it
    assert (installed / 'ros/fastdds.xml').is_file()


def test_installed_node_runs(workspace, prefix):
    """decode_node becomes active with the installed config, and SIGINT ends it."""
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
    probe = rclpy.create_node('probe', context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(probe)
    client = probe.create_client(GetState, '/installed/decode/get_state')
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
        probe.destroy_node()
        rclpy.shutdown(context=context)


def test_versions_agree():
    """Five files contain the version as text, because the release tools of ROS need that."""
    changelog = (ROOT / 'CHANGELOG.rst').read_text()
    setup = (ROOT / 'setup.py').read_text()
    for folder in (ROOT, ROOT / 'physai_decode_msgs'):
        manifest = ElementTree.parse(folder / 'package.xml').getroot()
        assert manifest.findtext('version') == physai_decode.__version__, folder
    assert re.search(r"version='([\d.]+)'", setup)[1] == physai_decode.__version__
    assert re.search(r'^(\d+\.\d+\.\d+) ', changelog, re.MULTILINE)[1] == physai_decode.__version__


def test_changelog_is_readable_by_the_release_tools():
    """It has a Forthcoming section, and the current version."""
    changelogs = pytest.importorskip('catkin_pkg.changelog')
    package_version = pytest.importorskip('catkin_pkg.package_version')
    text = (ROOT / 'CHANGELOG.rst').read_text()
    assert package_version.get_forthcoming_label(text) == 'Forthcoming'
    read = changelogs.get_changelog_from_path(str(ROOT), 'physai_decode')
    versions = [version for version, _, _ in read.foreach_version()]
    assert versions[-1] == physai_decode.__version__


def test_systemd_unit_grants_real_time_limits():
    """It sets the limits that the node's messages recommend, and starts an installed command."""
    unit = RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(ROOT / 'systemd' / 'physai_decode.service')
    limits = {f'{key}={value}' for key, value in unit['Service'].items()}
    for text in (realtime.PERMIT_PRIORITY, realtime.PERMIT_MEMORY):
        assert re.search(r'(\w+=\w+) in a systemd unit', text)[1] in limits
    assert 'jtop.service' in unit['Unit']['After'].split()      # is looked for only once
    command = re.search(r'/lib/physai_decode/(\w+)', unit['Service']['ExecStart'])[1]
    assert command in COMMANDS


def test_messages_name_the_pip_of_the_running_python():
    """A plain ``pip`` may belong to another Python."""
    plain = [str(path.relative_to(ROOT)) for path in (ROOT / 'physai_decode').rglob('*.py')
             if path.name != 'pip_command.py' and 'pip install' in path.read_text()]
    assert not plain, 'use pip_command.install in these files'


def test_files_have_the_licence_header():
    """Each file has the first lines of setup.py near its top, as ament_copyright expects."""
    header = (ROOT / 'setup.py').read_text().partition('\n\n')[0]
    assert header.startswith('# Copyright') and 'Apache License, Version 2.0' in header
    folders = ('examples', 'launch', 'physai_decode', 'physai_decode_msgs', 'test', 'tools')
    missing = [str(path.relative_to(ROOT)) for folder in folders
               for path in sorted((ROOT / folder).rglob('*'))
               if path.suffix in ('.py', '.cmake') and path.stat().st_size
               and header not in path.read_text()[:1000]]
    assert not missing, 'put the first lines of setup.py above the code of these files'


def test_commands_have_modules():
    assert {'decode_node', 'decode_ask', 'decode_bench'} <= set(COMMANDS)
    for module in COMMANDS.values():
        assert importlib.util.find_spec(module)


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_make_stops_on_a_machine_without_wheels(tmp_path):
    """One line says that rclpy has no wheels and what to do; nothing is installed."""
    for path in ROOT.glob('*'):
        if path.is_file():
            shutil.copy(path, tmp_path)
    before = set(tmp_path.iterdir())
    environment = {key: value for key, value in os.environ.items() if 'MAKE' not in key}
    result = subprocess.run(
        ['make', 'demo', 'MACHINE=aarch64'], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=120)
    assert result.returncode != 0
    assert re.match(r'physai_decode: .*rclpy.*aarch64.*colcon.*\nmake: ', result.stderr)
    assert result.stdout == ''
    assert set(tmp_path.iterdir()) == before
