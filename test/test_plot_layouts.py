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

"""A recorded bag has the fields that the layouts in config/ plot, and can be replayed."""

import importlib.util
import json
from pathlib import Path
import re
import subprocess
import sys
import time
from xml.etree import ElementTree

from diagnostic_msgs.msg import DiagnosticArray
from physai_decode.request import parse
from physai_decode.request import Request
from physai_decode.ros.topics import latched_qos
from physai_decode.ros.topics import stream_qos
import pytest
import rclpy
from std_msgs.msg import Float64
from std_msgs.msg import String
import yaml

pytest.importorskip('rosbags')
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer
from rosbags.typesys import get_typestore
from rosbags.typesys import Stores

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'config'
PATIENCE_S = 120.0
TOPICS = {
    '/decode/prompt': (String, 10),
    '/decode/accepted': (String, stream_qos()),
    '/decode/tokens': (String, stream_qos()),
    '/decode/token_stats': (DiagnosticArray, stream_qos()),
    '/decode/itl_ms': (Float64, stream_qos()),
    '/decode/r_floor': (Float64, stream_qos()),
    '/decode/response': (String, 10),
    '/decode/request_stats': (DiagnosticArray, 10),
    '/decode/model_info': (DiagnosticArray, latched_qos()),
    '/diagnostics': (DiagnosticArray, 10)}


class Session:
    """Records all topics of a node that runs the embedded model."""

    def __init__(self) -> None:
        self.recorded: list[tuple[str, int, bytes]] = []
        self.node = rclpy.create_node('recorder')
        self.prompt = self.node.create_publisher(String, '/decode/prompt', 10)
        for topic, (kind, qos) in TOPICS.items():
            self.node.create_subscription(
                kind, topic,
                lambda data, topic=topic: self.recorded.append((topic, time.time_ns(), data)),
                qos, raw=True)

    def count(self, topic) -> int:
        """Count the messages of one topic."""
        return sum(record[0] == topic for record in self.recorded)

    def wait(self, done, process) -> None:
        """Record until `done` returns true."""
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            assert process.poll() is None, 'the node ended'
            assert time.monotonic() < end_s, 'waited too long'
            rclpy.spin_once(self.node, timeout_sec=0.1)

    def run(self) -> None:
        """Record one answer whose tokens all miss their deadline, and the diagnostics after it."""
        process = subprocess.Popen(
            [sys.executable, '-m', 'physai_decode.ros.process', '--ros-args', '--params-file',
             str(CONFIG / 'decode.yaml'), '-p', 'deadline.token_ms:=0.001',
             '-p', 'diagnostics.period_s:=0.2', '-p', 'roofline.peak_bandwidth_gb_s:=20.0'],
            stdout=subprocess.DEVNULL)
        try:
            self.wait(lambda: self.recorded and b'\0idle\0' in self.recorded[-1][2], process)
            self.prompt.publish(String(data='Bring me the red cup from the kitchen table.'))
            self.wait(lambda: self.count('/decode/request_stats'), process)
            count = self.count('/diagnostics')
            self.wait(lambda: self.count('/diagnostics') > count + 1, process)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)

    def write(self, path) -> None:
        """Write the recorded messages as a bag."""
        types = get_typestore(Stores.ROS2_HUMBLE)
        with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            connections = {
                topic: writer.add_connection(
                    topic, f'{kind.__module__.split(".")[0]}/msg/{kind.__name__}', typestore=types)
                for topic, (kind, _) in TOPICS.items()}
            for topic, stamp_ns, data in self.recorded:
                writer.write(connections[topic], stamp_ns, data)


@pytest.fixture(scope='module')
def bag(tmp_path_factory):
    """Record a session, and return the messages of its bag by topic."""
    path = tmp_path_factory.mktemp('bag') / 'session'
    rclpy.init()
    try:
        session = Session()
        session.run()
        session.write(path)
        session.node.destroy_node()
    finally:
        rclpy.shutdown()
    messages = {topic: [] for topic in TOPICS}
    with AnyReader([path]) as reader:
        for connection, _, data in reader.messages():
            messages[connection.topic].append(reader.deserialize(data, connection.msgtype))
    for topic in TOPICS:
        assert messages[topic], f'no message on {topic}'
    return messages


@pytest.fixture
def example():
    """Return the module examples/replay.py."""
    spec = importlib.util.spec_from_file_location('replay', ROOT / 'examples' / 'replay.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_replay_limits_each_wait(example, monkeypatch):
    """A signal that arrives as rclpy begins to wait can be missed, and the wait never ends."""
    limits = []

    def wait(node, timeout_sec=None):
        limits.append(timeout_sec)
        node.destroy_node()
        raise KeyboardInterrupt

    for name in ('spin', 'spin_once'):
        monkeypatch.setattr(rclpy, name, wait)
    example.main()
    assert limits == [0.5]


def test_replay_sends_the_recorded_request(bag, example):
    """examples/replay.py turns a message on `~/accepted` into the same request."""
    rclpy.init()
    replay = example.Replay()
    try:
        sent = []
        replay.request.publish = sent.append
        replay.on_accepted(bag['/decode/accepted'][0])
    finally:
        replay.destroy_node()
        rclpy.shutdown()
    assert [parse(message.data) for message in sent] == [Request(bag['/decode/prompt'][0].data)]


def numbers(values) -> list[float]:
    """Return the values that are numbers, or strings that parse as one."""
    found = []
    for value in values:
        try:
            found.append(float(value))
        except ValueError:
            pass
    return found


def plotjuggler_series(bag) -> dict[str, list]:
    """Return the series of the bag by the names that PlotJuggler gives them."""
    series = {}
    for topic, messages in bag.items():
        for message in messages:
            for status in getattr(message, 'status', ()):
                parts = [topic, status.hardware_id, status.name]
                for pair in status.values:
                    name = '/'.join([part for part in parts if part] + [pair.key])
                    series.setdefault(name, []).append(pair.value)
            if hasattr(message, 'data'):
                series.setdefault(f'{topic}/data', []).append(message.data)
    return series


STEP = re.compile(r'\.(\w+)|\[(:|\d+)\]|\{(\w+)==("[^"]*"|\d+)\}')


def foxglove_values(bag, path) -> list:
    """Evaluate a Foxglove message path on all messages of the bag."""
    topic = re.match(r'/[\w/]+', path)[0]
    values, at = bag[topic], len(topic)
    while at < len(path):
        step = STEP.match(path, at)
        assert step, f'{path} is not a message path at {path[at:]!r}'
        field, index, key, wanted = step.groups()
        if field:
            values = [getattr(value, field) for value in values]
        elif index == ':':
            values = [inner for value in values for inner in value]
        elif index:
            values = [value[int(index)] for value in values]
        else:
            values = [value for value in values if getattr(value, key) == json.loads(wanted)]
        at = step.end()
    return values


def test_plotjuggler_layout(bag):
    """Each curve has numbers in the bag, and the layout subscribes to its topic."""
    layout = ElementTree.parse(CONFIG / 'plotjuggler_layout.xml').getroot()
    curves = [curve.get('name') for curve in layout.iter('curve')]
    series = plotjuggler_series(bag)
    assert len(curves) > 10
    for curve in curves:
        assert numbers(series.get(curve, ())), curve
    topics = {topic.get('name') for topic in layout.iter('topic')}
    assert topics == {'/'.join(curve.split('/')[:3]) for curve in curves}


def test_foxglove_layout(bag):
    """Each plot has numbers in the bag, other panels have messages, and all panels are shown."""
    layout = json.loads((CONFIG / 'foxglove_layout.json').read_text())
    panels = layout['configById']
    plotted = [path['value'] for panel in panels.values() for path in panel.get('paths', ())]
    assert len(plotted) > 10
    for path in plotted:
        assert numbers(foxglove_values(bag, path)), path
    for name, panel in panels.items():
        if name.startswith('RawMessages!'):
            assert foxglove_values(bag, panel['topicPath']), name
    summary = panels['DiagnosticSummary!nodes']
    assert foxglove_values(bag, summary['topicToRender'] + '.status[:].hardware_id')
    publish = panels['Publish!prompt']
    assert TOPICS[publish['topicName']][0] is String
    assert publish['datatype'] == 'std_msgs/msg/String'
    assert list(json.loads(publish['value'])) == ['data']

    def shown(part):
        return [part] if isinstance(part, str) else shown(part['first']) + shown(part['second'])

    assert sorted(shown(layout['layout'])) == sorted(panels)


def test_diagnostic_aggregator_config(bag):
    """The analyzer matches each status, expects no other, and its timeout is long enough."""
    settings = yaml.safe_load((CONFIG / 'diagnostic_aggregator.yaml').read_text())
    analyzer = settings['analyzers']['ros__parameters']['decode']
    names = {status.name for message in bag['/diagnostics'] for status in message.status}
    assert names == set(analyzer['expected'])
    assert all(name.startswith(tuple(analyzer['startswith'])) for name in names)
    assert analyzer['timeout'] >= 2.0               # at a period of 1 s


def test_documented_record_command_matches_all_topics():
    """docs/howto/bags.md gives a pattern to `ros2 bag record`."""
    line = re.search(r"ros2 bag record .*-e '([^']+)'", (ROOT / 'docs/howto/bags.md').read_text())
    for topic in TOPICS:
        assert re.fullmatch(line[1], topic), topic
