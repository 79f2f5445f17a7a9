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

"""Each kernel compiles for compute capabilities 7.5 (the oldest supported), 8.0, 9.0 and 11.0."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

triton = pytest.importorskip('triton')
# This limit only catches hangs: a capability takes a minute of a core, and much longer on a busy
# machine. It is below pytest's limit in setup.cfg, which would end all tests.
LIMIT_S = 850
SCRIPT = Path(__file__).with_name('compile_kernels.py')
VERSION = tuple(int(number) for number in triton.__version__.split('.')[:2])


@pytest.mark.slow
@pytest.mark.parametrize('capability', [75, 80, 90, pytest.param(
    110, marks=pytest.mark.skipif(VERSION < (3, 7), reason='Triton 3.7 is the first to know it'))])
def test_kernels_compile(capability):
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run([sys.executable, str(SCRIPT), str(capability)], env=environment,
                          capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout.splitlines()[-1:] == ['compiled'], done.stderr[-3000:]
