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

"""The node reports another node with its name, and another publisher on its tokens."""

from contextlib import contextmanager
from types import SimpleNamespace

from node_rig import Rig
from node_rig import ros  # noqa: F401
from physai_decode.ros import messages
from physai_decode.ros.duplicates import GHOST_S
import pytest
from rclpy.node import Node
from std_msgs.msg import String


@pytest.fixture
def rig(monkeypatch):
    """Return a node that polls the graph for every message on /diagnostics."""
    monkeypatch.setattr('physai_decode.ros.duplicates.PERIOD_S', 0.0)
    monkeypatch.setattr('physai_decode.ros.duplicates.DISCOVERY_S', 0.0)
    rig = Rig()
    yield rig
    rig.close()


@contextmanager
def second_node(name):
    """Run another node inside ``with``."""
    node = Node(name)
    try:
        yield node
    finally:
        node.destroy_node()


def engine(rig, level):
    """Wait for an engine status with this level; return its message."""
    status = {}

    def found():
        status.update(rig.diagnostics('decode: engine'))
        return status['level'] == level

    rig.wait(found)
    return status['message']


def test_a_second_node_of_the_name(rig, capfd):
    """The status is an ERROR while the other node exists, and the log reports it once."""
    assert engine(rig, messages.OK) == 'unconfigured'
    with second_node('decode'):
        assert engine(rig, messages.ERROR).startswith('2 nodes are called /decode: ')
    assert engine(rig, messages.OK) == 'unconfigured'
    log = capfd.readouterr().err
    assert log.count('2 nodes are called /decode: ') == 1
    assert log.count('the duplicate is gone') == 1


def test_a_node_that_was_there_before_may_be_a_ghost(monkeypatch):
    """The killed predecessor of a restarted node is not reported, unless it stays."""
    now_s = [100.0]
    monkeypatch.setattr('physai_decode.ros.duplicates.time',
                        SimpleNamespace(monotonic=lambda: now_s[0]))
    with second_node('decode'):
        rig = Rig()
        try:
            assert rig.diagnostics('decode: engine')['message'] == 'unconfigured'
            now_s[0] += GHOST_S - 1.0
            assert rig.diagnostics('decode: engine')['message'] == 'unconfigured'
            now_s[0] += 1.0
            assert engine(rig, messages.ERROR).startswith('2 nodes are called /decode: ')
        finally:
            rig.close()


def test_a_second_publisher_of_tokens(rig):
    """The status names the node of the other publisher."""
    with second_node('impostor') as node:
        node.create_publisher(String, '/decode/tokens', 10)
        assert engine(rig, messages.ERROR) == (
            '/decode/tokens has 2 publishers, /decode, /impostor: their streams mix')
