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

"""The bond to nav2's lifecycle manager, with a fake of bondpy."""

from node_rig import Rig
from node_rig import ros  # noqa: F401
import pytest


class Heartbeat:
    """Replaces the Bond of bondpy, and records its calls."""

    made = []

    def __init__(self, node, topic, bond_id, on_broken=None, on_formed=None):
        self.said = [topic, bond_id]
        self.made.append(self)

    def set_heartbeat_period(self, seconds):
        """Keep it."""
        self.said.append(seconds)

    def set_heartbeat_timeout(self, seconds):
        """Keep it."""
        self.said.append(seconds)

    def start(self):
        """Keep that."""
        self.said.append('start')

    def shutdown(self):
        """Keep that."""
        self.said.append('shutdown')


@pytest.fixture
def make(monkeypatch):
    """Make rigs on a machine that has bondpy."""
    monkeypatch.setattr('physai_decode.ros.bond.Heartbeat', Heartbeat)
    monkeypatch.setattr(Heartbeat, 'made', [])
    rigs = []

    def build(**overrides):
        rigs.append(Rig(**overrides))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.close()


def test_a_bond_from_activation_to_deactivation(make):
    """It has the topic and the id that nav2 expects; each activation has a new one."""
    rig = make(**{'bond.heartbeat_period_s': 0.5})
    assert rig.change('configure')
    assert Heartbeat.made == []
    assert rig.change('activate')
    assert [each.said for each in Heartbeat.made] == [['bond', 'decode', 0.5, 4.0, 'start']]
    assert rig.change('deactivate')
    assert Heartbeat.made[0].said[-1] == 'shutdown'
    assert rig.change('activate', 'shutdown')
    assert [each.said[-1] for each in Heartbeat.made] == 2 * ['shutdown']


def test_no_bond_if_it_is_off(make):
    """A period of 0 turns it off."""
    assert make(**{'bond.heartbeat_period_s': 0.0}).change('configure', 'activate', 'deactivate')
    assert Heartbeat.made == []


def test_no_bond_without_bondpy(make, monkeypatch, capfd):
    """The node becomes active nevertheless, and says what nav2 needs."""
    monkeypatch.setattr('physai_decode.ros.bond.Heartbeat', None)
    assert make().change('configure', 'activate', 'deactivate')
    assert 'needs bond_timeout: 0.0' in capfd.readouterr().err
