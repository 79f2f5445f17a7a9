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

"""`make demo` runs tools/demo.py: its output, and its end by a signal."""

import os
from pathlib import Path
import re
import signal
import subprocess
import sys

from node_rig import active_rig
import psutil
import pytest
from test_ask import split

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not Path(sys.executable).with_name('decode_node').exists(),
    reason='the commands are not installed beside this Python')


@pytest.mark.slow
def test_prints_figures_of_the_answer_and_of_the_diagnostics():
    result = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'demo.py')], capture_output=True, text=True,
        timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert split(result.stderr)[1] == ''
    assert int(re.search(r'^output_tokens +(\d+)$', result.stdout, re.MULTILINE)[1]) > 1
    assert float(re.search(r'^first_item_ms +([\d.]+)$', result.stdout, re.MULTILINE)[1]) > 0
    assert float(re.search(r'^itl_p50_ms +([\d.]+)$', result.stdout, re.MULTILINE)[1]) > 0
    r_floor = re.search(r' r_floor=(\S+) ', result.stdout)[1]
    assert r_floor == 'n/a' or float(r_floor) > 0     # n/a if the weights fit into the cache
    assert result.stdout.endswith('The node ended with code 0.\n')


def test_refuses_a_domain_that_has_a_node():
    """It would show that node as its own, and the prompt would have two receivers."""
    with active_rig() as rig:
        result = subprocess.run(
            [sys.executable, str(ROOT / 'tools' / 'demo.py')], capture_output=True, text=True,
            timeout=60)
        assert rig.diagnostics('decode: engine')['requests'] == '0'
    assert (result.returncode, result.stdout) == (1, '')
    assert result.stderr == (
        f'demo: a node /decode already runs in domain {os.environ["ROS_DOMAIN_ID"]}: end it, or '
        'set another ROS_DOMAIN_ID\n')


@pytest.mark.slow
@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_demo_and_its_node(signum):
    """Ctrl-C, `kill` and a closing terminal leave no process and print no traceback."""
    demo = subprocess.Popen(
        [sys.executable, str(ROOT / 'tools' / 'demo.py')], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    children = []
    try:
        for line in demo.stdout:
            if 'active after' in line:
                children = psutil.Process(demo.pid).children()  # the node; maybe decode_ask too
                break
        demo.send_signal(signum)
        demo.send_signal(signum)
        output, errors = demo.communicate(timeout=120)
        assert children and not any(child.is_running() for child in children)
        assert (demo.returncode, errors) == (130, ''), output
    finally:
        for child in children:
            if child.is_running():
                child.kill()
