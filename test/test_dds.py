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

"""Fast DDS: its settings, and that a killed client does not hide the node from later ones."""

import os
from pathlib import Path
import subprocess
import sys

from node_rig import active_rig
from node_rig import PATIENCE_S
from physai_decode.ros import dds
import pytest

CLIENT = f"""
import sys, time
import rclpy
rclpy.init()
node = rclpy.create_node('client')
end_s = time.monotonic() + {PATIENCE_S}
while not node.count_publishers('/decode/tokens') and time.monotonic() < end_s:
    time.sleep(0.01)
print(node.count_publishers('/decode/tokens'), flush=True)
sys.stdin.read()
rclpy.shutdown()
"""
CLIENTS = 18                    # without the setting, about the twelfth no longer finds the node
LANES = 2


def start_client():
    """Start another process that prints how many publishers it found, and then waits."""
    return subprocess.Popen([sys.executable, '-c', CLIENT], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_clients_find_the_node_after_one_was_killed(monkeypatch):
    """Fast DDS waits 20 s for the acknowledgements of a killed client."""
    with active_rig():
        monkeypatch.delenv(dds.VARIABLE)        # as for a client of another package
        victim = start_client()
        assert victim.stdout.readline() == '1\n'
        victim.kill()
        found = []
        for _ in range(0, CLIENTS, LANES):
            clients = [start_client() for _ in range(LANES)]
            found += [client.communicate()[0] for client in clients]
    victim.communicate()
    assert found == CLIENTS * ['1\n']


def test_keeps_the_profiles_of_the_user(monkeypatch, tmp_path):
    """They come from the environment, or from a file in the working directory."""
    monkeypatch.setenv(dds.VARIABLE, 'mine.xml')
    dds.configure()
    assert os.environ[dds.VARIABLE] == 'mine.xml'
    monkeypatch.delenv(dds.VARIABLE)
    monkeypatch.chdir(tmp_path)
    Path(dds.OWN_PROFILES).touch()
    dds.configure()
    assert dds.VARIABLE not in os.environ
    Path(dds.OWN_PROFILES).unlink()
    dds.configure()
    assert os.environ[dds.VARIABLE] == str(dds.PROFILES)
