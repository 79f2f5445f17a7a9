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

"""Which modules may import ROS or torch, and that all imports are declared as dependencies."""

import ast
from collections.abc import Iterable
from pathlib import Path
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'physai_decode'
CORE = ('answer', 'checkpoint', 'collector', 'config', 'constraint', 'conversation',
        'decode_loop', 'delivery', 'detokenizer', 'engine', 'engines', 'gap', 'histogram', 'host',
        'http', 'jetson', 'model_config', 'pace', 'realtime', 'request', 'request_queue',
        'result', 'roofline', 'server_answer', 'telemetry', 'text', 'text_process', 'timing',
        'verdict', 'worker')
ROS_LIBRARIES = {
    'builtin_interfaces', 'diagnostic_msgs', 'lifecycle_msgs', 'physai_decode_msgs',
    'rcl_interfaces', 'rclpy', 'std_msgs', 'std_srvs'}
HEAVY = ROS_LIBRARIES | {'torch', 'transformers', 'triton', 'tokenizers', 'safetensors'}
# Where the name in an import statement is not the name that pip, or rosdep, knows.
PIP_NAMES = {'pynvml': 'nvidia-ml-py', 'yaml': 'pyyaml'}
ROSDEP_NAMES = {
    'jinja2': 'python3-jinja2', 'matplotlib': 'python3-matplotlib', 'numpy': 'python3-numpy',
    'rich': 'python3-rich', 'torch': 'python3-pytorch-pip',
    'transformers': 'python3-transformers-pip', 'yaml': 'python3-yaml',
    # These come with one of the above.
    'huggingface_hub': 'python3-transformers-pip', 'safetensors': 'python3-transformers-pip',
    'tokenizers': 'python3-transformers-pip', 'triton': 'python3-pytorch-pip'}
# Without them the node names what to install, or publishes n/a.
OPTIONAL = {'bondpy', 'exllamav2', 'jtop', 'physai_decode_msgs'}
# rosdep has no key for them, or one that fails on a Jetson.
NO_ROSDEP = {'llguidance', 'prometheus_client', 'pynvml', 'uvicorn'}


def imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports, inside functions too."""
    names = set()
    for part in ast.walk(ast.parse(path.read_text())):
        if isinstance(part, ast.Import):
            names.update(alias.name for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, f'{path}: a relative import'
            names.add(part.module)
    return {name.partition('.')[0] for name in names}


def third_party() -> set[str]:
    """Return the libraries that the package imports, without Python's own."""
    names = set().union(*(imported(path) for path in PACKAGE.rglob('*.py')))
    return names - set(sys.stdlib_module_names) - {'physai_decode'} - OPTIONAL


def pip_names(requirements: Iterable[str]) -> set[str]:
    """Return the packages that requirements name, in pip's normalised spelling."""
    found = (re.match(r'[A-Za-z][\w.-]*', requirement) for requirement in requirements)
    return {re.sub(r'[-_.]+', '-', match[0]).lower() for match in found if match}


def assert_not_imported(names: set[str], module: str, use: str = ''):
    """Assert that a fresh interpreter that imports and uses a module loads none of these."""
    command = (f'import sys, physai_decode.{module}\n{use}\n'
               f'print(sorted({names!r} & set(sys.modules)))')
    result = subprocess.run(
        [sys.executable, '-c', command], capture_output=True, text=True, timeout=120)
    assert result.stdout == '[]\n', result.stderr


@pytest.mark.parametrize('module', CORE)
def test_core_imports_neither_ros_nor_torch(module):
    assert_not_imported(HEAVY, module)


def test_native_engine_on_a_cpu_does_not_import_the_compiler_of_torch():
    """It takes as long as the rest of torch, each time that a node starts."""
    pytest.importorskip('torch')
    assert_not_imported({'torch._dynamo'}, 'engines.native', """
import torch
from physai_decode import checkpoint
from physai_decode.config import EngineConfig
engine = physai_decode.engines.native.NativeEngine(
    checkpoint.open('builtin:tiny_planner'), EngineConfig(device='cpu'))
with torch.inference_mode():
    engine.transformer.prefill(torch.tensor([1, 2, 3]), 0)
    engine.transformer.prefill(torch.tensor([4, 5]), 3)
    engine.transformer.step()
engine.close()
""")


def test_only_files_in_ros_import_ros():
    for path in PACKAGE.rglob('*.py'):
        found = imported(path) & ROS_LIBRARIES
        assert not found or path.relative_to(PACKAGE).parts[0] == 'ros', f'{path}: {found}'


def test_imports_are_in_the_pip_requirements():
    """Each library is in setup.py or requirements.txt, and pinned in constraints.txt."""
    strings = {
        part.value for part in ast.walk(ast.parse((ROOT / 'setup.py').read_text()))
        if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    named = pip_names(strings) | pip_names((ROOT / 'requirements.txt').read_text().splitlines())
    pinned = pip_names((ROOT / 'constraints.txt').read_text().splitlines())
    for name in third_party():
        wanted = PIP_NAMES.get(name, name.replace('_', '-'))
        wanted = f'ros-{wanted}' if name in ROS_LIBRARIES else wanted
        assert wanted in pinned
        assert wanted in named | {'tokenizers', 'triton'}   # with transformers and torch


def test_imports_are_in_package_xml():
    """Each library has its rosdep key there."""
    manifest = ElementTree.parse(ROOT / 'package.xml').getroot()
    keys = {entry.text for entry in manifest.iter('exec_depend')}
    launch = imported(ROOT / 'launch' / 'decode.launch.py')
    wanted = {ROSDEP_NAMES.get(name, name)
              for name in (third_party() | launch) - set(sys.stdlib_module_names)}
    assert wanted - NO_ROSDEP <= keys, wanted - keys
