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

"""GPU features by compute capability, and the variable that lowers it."""

import errno
from pathlib import Path
import re
from types import SimpleNamespace

from physai_decode.engine import EngineError
from physai_decode.engines import chip
import pytest
import torch

DEVICE = torch.device('cuda', 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(
        name='H', shared_memory_per_block_optin=227 * 1024))
    monkeypatch.delenv(chip.VARIABLE, raising=False)


@pytest.mark.parametrize('value, lowered, kib', [
    (None, None, 227), ('', None, 227), ('9.0', None, 227), ('12.0', None, 227),
    ('8.7', '8.7', 163), ('8.9', '8.9', 99), ('7.5', '7.5', 64)])
def test_variable_can_only_lower_the_capability(monkeypatch, value, lowered, kib):
    if value is not None:
        monkeypatch.setenv(chip.VARIABLE, value)
    assert chip.pretended(DEVICE) == lowered
    assert chip.capability(DEVICE) == tuple(map(int, (lowered or '9.0').split('.')))
    assert chip.shared_bytes(DEVICE) == kib * 1024


def test_shared_memory_comes_from_a_table_if_pytorch_does_not_report_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace())
    assert chip.shared_bytes(DEVICE) == 227 * 1024


@pytest.mark.parametrize('value', ['8', 'sm_87', '87', '8.7.1'])
def test_rejects_an_invalid_capability(monkeypatch, value):
    monkeypatch.setenv(chip.VARIABLE, value)
    with pytest.raises(EngineError, match=f"PHYSAI_DECODE_CAPABILITY is '{value}': set it to"):
        chip.capability(DEVICE)


@pytest.mark.parametrize('value, pdl', [('8.7', False), ('9.0', True)])
def test_uses_dependent_launch_only_from_capability_9(monkeypatch, value, pdl):
    compiler = pytest.importorskip('physai_decode.engines.compiler')
    monkeypatch.setattr(compiler, 'KNOWS_PDL', True)
    monkeypatch.setenv(chip.VARIABLE, value)
    assert compiler.supports_pdl(DEVICE) is pdl
    assert not compiler.supports_pdl(torch.device('cpu'))
    monkeypatch.setattr(compiler, 'KNOWS_PDL', False)
    assert not compiler.supports_pdl(DEVICE)


def test_reports_that_triton_can_not_compile_for_the_gpu(monkeypatch):
    compiler = pytest.importorskip('physai_decode.engines.compiler')
    start = pytest.importorskip('physai_decode.engines.native.start')
    monkeypatch.setattr(compiler, 'VERSION', (3, 3))
    monkeypatch.setenv(chip.VARIABLE, '7.5')
    messages = []
    assert start.operations(DEVICE, torch.float16, messages.append).name == 'torch'
    assert messages[0] == (
        'PHYSAI_DECODE_CAPABILITY is set: H runs as if it had compute capability 7.5')
    assert 'cannot compile attention for compute capability 7.5' in messages[1]


def test_old_triton_does_not_multiply_quantised_weights_in_float32(monkeypatch):
    compiler = pytest.importorskip('physai_decode.engines.compiler')
    start = pytest.importorskip('physai_decode.engines.native.start')
    monkeypatch.setattr(compiler, 'VERSION', (3, 2))
    messages = []
    assert start.operations(DEVICE, torch.float32, messages.append, True).name == 'torch'
    assert 'quantised weights in float32: set engine.dtype to auto, or install' in messages[0]


def test_only_compiler_py_depends_on_the_version_of_triton():
    package = Path(chip.__file__).parents[1]
    newer = re.compile(r'triton\.language\.extra|constexpr_function|\bgdc\b')
    found = {path.name for path in package.rglob('*.py') if newer.search(path.read_text())}
    assert found == {'compiler.py'}


PACKAGES = 'pip install -U triton, and apt install gcc python3-dev'


@pytest.mark.parametrize(('error', 'remedy'), [
    (RuntimeError('ptxas fatal: Value sm_110a is not defined'), PACKAGES),
    (FileNotFoundError('Failed to find C compiler'), PACKAGES),
    (OSError(errno.EROFS, 'Read-only file system'), 'set TRITON_CACHE_DIR to a folder that'),
    (OSError(errno.ENOSPC, 'No space left on device'), 'set TRITON_CACHE_DIR to a folder that')])
def test_tells_if_triton_can_not_compile_for_the_chip(monkeypatch, error, remedy):
    """The step then runs with PyTorch's operations."""
    compiler = pytest.importorskip('physai_decode.engines.compiler')

    class Kernel:
        def __getitem__(self, grid):
            return self.start

        def start(self, number):
            raise error

    monkeypatch.setattr(torch, 'empty', lambda *sizes, **options: None)
    monkeypatch.setattr(compiler, '_write', Kernel())
    problem = compiler.problem(DEVICE)
    assert 'cannot compile for compute capability 9.0' in problem
    assert str(error) in problem
    assert remedy in problem
