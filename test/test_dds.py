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


def test_clients_find_the_node_after_one_was_killed(monkeypatch):
    """Fast DDS waits 20 s for the acknowledgements of a killed client."""
    with active_rig():
        for name in dds.CHOICES:        # as a client that another package installed
            monkeypatch.delenv(name, raising=False)
        victim = start_client()
        assert victim.stdout.readline() == '1\n'
        victim.kill()
        found = []
        for _ in range(0, CLIENTS, LANES):
            clients = [start_client() for _ in range(LANES)]
            found += [client.communicate()[0] for client in clients]
    victim.communicate()
    assert found == CLIENTS * ['1\n']


@pytest.mark.parametrize('name', dds.CHOICES)
def test_keeps_the_profiles_of_the_user(monkeypatch, name):
    for each in dds.CHOICES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, 'mine.xml')
    dds.configure()
    assert [os.environ.get(each) for each in dds.CHOICES if each != name] == [None]
    assert os.environ[name] == 'mine.xml'


def test_keeps_profiles_in_the_working_directory(monkeypatch, tmp_path):
    for each in dds.CHOICES:
        monkeypatch.delenv(each, raising=False)
    (tmp_path / dds.OWN_PROFILES).touch()
    monkeypatch.chdir(tmp_path)
    dds.configure()
    assert not any(name in os.environ for name in dds.CHOICES)
