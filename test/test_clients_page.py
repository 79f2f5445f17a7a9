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

"""The code in docs/clients.md runs beside a node and prints its answer."""

from pathlib import Path
import re
import subprocess
import sys

from node_rig import active_rig
from node_rig import PATIENCE_S
from physai_decode.ros.interfaces import unavailable
import pytest

PAGE = (Path(__file__).resolve().parent.parent / 'docs' / 'clients.md').read_text()
SETUP, *CLIENTS = re.findall(r'```python\n(.+?)```', PAGE, re.DOTALL)
ANSWERS = ['stop BRING ME THE RED CUP.\n', 'stop BRING ME THE RED CUP.\n',
           'BRING ME THE RED CUP.\n']


@pytest.fixture(scope='module')
def rig():
    """Start an active node that echoes each prompt in upper case."""
    with active_rig() as rig:
        yield rig


@pytest.mark.parametrize(('client', 'answer'), zip(CLIENTS, ANSWERS, strict=True),
                         ids=['request', 'generate', 'prompt'])
def test_each_client_prints_the_answer(rig, client, answer):
    if 'physai_decode_msgs' in client and unavailable:
        pytest.skip(unavailable)
    result = subprocess.run(
        [sys.executable, '-c', f'{SETUP}\n{client}'], capture_output=True, text=True,
        timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(answer)
