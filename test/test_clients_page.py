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
import time

from node_rig import active_rig
from node_rig import EchoEngine
from node_rig import PATIENCE_S
from physai_decode.ros.interfaces import unavailable
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / 'docs' / 'clients.md').read_text()
SETUP, *CLIENTS = re.findall(r'```python\n(.+?)```', PAGE, re.DOTALL)
PLAN = '[{"action": "go", "to": "table"}, {"action": "stop"}]'
ANSWERS = {'request': 'stop BRING ME THE RED CUP.\n', 'generate': 'stop BRING ME THE RED CUP.\n',
           'prompt': 'BRING ME THE RED CUP.\n',
           'item': "{'action': 'go', 'to': 'table'}\n{'action': 'stop'}\nstop\n",
           'services': 'active\n'}
FIGURES = r'\nstate=\w+  itl_p50_ms=\S+  verdict=.*\n'
NAMED = dict(zip([*list(ANSWERS)[:4], 'figures', 'services'], CLIENTS, strict=True))


class Planner(EchoEngine):
    """Echoes each prompt in upper case, and answers a constrained request with a plan."""

    def __init__(self, step_s=0.0) -> None:
        super().__init__(step_s, end=127)

    def first(self, sampling, prompt_ids, constraint=None):
        """Choose the script."""
        self._constrained = constraint is not None
        return super().first(sampling, prompt_ids, constraint)

    def answer_to(self, letter):
        """Leave the plan as it is."""
        return letter if self._constrained else letter.upper()

    def _echo_upper(self, prompt_ids):
        return super()._echo_upper(map(ord, PLAN) if self._constrained else prompt_ids)


@pytest.fixture(scope='module')
def rig():
    """Start an active node."""
    with active_rig(engine=Planner) as rig:
        yield rig


def start(name):
    """Start the code of one section; skip the test if it needs a package that is not built."""
    if 'physai_decode_msgs' in NAMED[name] and unavailable:
        pytest.skip(unavailable)
    return subprocess.Popen(
        [sys.executable, '-uc', f'{SETUP}\n{NAMED[name]}'], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize('name', ANSWERS)
def test_each_client_prints_the_answer(rig, name):
    with start(name) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    assert stdout.endswith(ANSWERS[name])
    if name == 'services':
        assert len(rig.loader.engines) == 2         # it loaded a model
        assert rig.node.get_parameter('sampling.max_new_tokens').value == 200


def test_prints_the_text_and_the_figures(rig):
    """Figures may come between two tokens, and the first ones show that tokens arrive too."""
    with start('figures') as process:
        try:
            output = process.stdout.readline() + process.stdout.readline()
            assert re.fullmatch(FIGURES, output)
            assert rig.ask('Bring me the red cup.')['finish_reason'] == 'stop'
            end_s = time.monotonic() + PATIENCE_S
            while 'BRING ME THE RED CUP.' not in re.sub(FIGURES, '', output):
                assert time.monotonic() < end_s and process.poll() is None, output
                output += process.stdout.readline()
        finally:
            process.kill()


@pytest.mark.slow
def test_the_action_client_waits_for_the_model(rig):
    """It sends its goal again after a refusal."""
    assert rig.change('deactivate')
    refusals = rig.node._host.counts['refusals']
    with start('generate') as process:
        try:
            rig.wait(lambda: rig.node._host.counts['refusals'] > refusals)
        finally:
            assert rig.change('activate')
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    assert stdout.endswith(ANSWERS['generate'])


def test_a_client_without_a_node_says_so():
    """The waits end with a message; the test does not wait as long as they do."""
    code = f'{SETUP}\n{NAMED["services"]}'.replace('/decode/', '/nobody/').replace('30.0', '0.1')
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert done.stderr == 'no service /nobody/get_state: does the node run?\n'
