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

"""The settings as ROS parameters: names, descriptors, values from files."""

from pathlib import Path

from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from physai_decode.ros import parameters
import pytest
import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter

CONFIGS = sorted(path for path in (Path(__file__).parents[1] / 'config').glob('*.yaml')
                 if '/**:' in path.read_text().splitlines())


@pytest.fixture(scope='module', autouse=True)
def ros():
    """Initialise rclpy once for all tests."""
    rclpy.init()
    yield
    rclpy.shutdown()


@pytest.fixture
def make(tmp_path):
    """Make nodes whose parameters come from a file."""
    nodes = []

    def build(yaml='', path=None):
        path = path or tmp_path / 'parameters.yaml'
        if yaml:
            path.write_text('/**:\n  ros__parameters:\n    ' + yaml.replace('\n', '\n    ') + '\n')
        arguments = ['--ros-args', '--params-file', str(path)] if path.exists() else []
        nodes.append(Node('decode', cli_args=arguments))
        return nodes[-1]

    yield build
    for node in nodes:
        node.destroy_node()


def test_defaults_are_those_of_the_settings(make):
    """Without a file, the parameters read back as the dataclass stands."""
    node = make()
    parameters.declare(node)
    assert parameters.read(node) == DecodeConfig()
    assert parameters.unknown(node) == []


def test_off_is_no_truth_value(make):
    """As it is written in the documents, without quotation marks."""
    node = make('chat.template: off')
    parameters.declare(node)
    assert parameters.read(node).chat.template == 'off'


def test_every_parameter_is_described(make):
    """Each has words, its type, and its range or choices; fixed ones say so."""
    node = make()
    parameters.declare(node)
    for name, field in parameters.specs().items():
        descriptor = node.describe_parameter(name)
        assert descriptor.description
        assert descriptor.type == parameters.kind(field).value
        if field.metadata['high'] is not None:
            limits = [*descriptor.floating_point_range, *descriptor.integer_range]
            if type(field.default) is tuple:        # ROS has no range for the numbers of a list
                bounds = f'{field.metadata["low"]} to {field.metadata["high"]}'
                assert bounds in descriptor.additional_constraints
                continue
            assert limits[0].from_value == field.metadata['low']
            assert limits[0].to_value == field.metadata['high']
        for choice in field.metadata['choices']:
            assert choice in descriptor.additional_constraints
        assert ('unconfigured' in descriptor.additional_constraints) != field.metadata['dynamic']


def test_values_come_from_a_file(make):
    """Of every type; a whole number will do for one with a fraction."""
    node = make('sampling:\n  temperature: 1\n  top_k: 40\n  stop: ["\\n", "user:"]\n'
                'engine:\n  cuda_graph: false\nmodel.path: /models/a\nautostart: false\n'
                'realtime.cpu_affinity: [2, 3]')
    parameters.declare(node)
    config = parameters.read(node)
    assert config.sampling.temperature == 1.0
    assert type(config.sampling.temperature) is float
    assert node.get_parameter('sampling.temperature').type_ == Parameter.Type.DOUBLE
    assert config.sampling.top_k == 40
    assert config.sampling.stop == ('\n', 'user:')
    assert config.realtime.cpu_affinity == (2, 3)
    assert config.engine.cuda_graph is False
    assert config.model.path == '/models/a'
    assert config.autostart is False


@pytest.mark.parametrize('given', [
    Parameter('sampling.stop'), Parameter('sampling.stop', Parameter.Type.BOOL_ARRAY, []),
    Parameter('sampling.stop', Parameter.Type.STRING_ARRAY, [])])
def test_an_empty_list_has_no_type_of_its_own(make, given):
    """ROS's tools send it as one thing or another."""
    assert parameters.merge(DecodeConfig(), [given]).sampling.stop == ()
    node = make('sampling.stop: []')
    parameters.declare(node)
    assert parameters.read(node).sampling.stop == ()
    assert node.set_parameters(parameters.typed([given]))[0].successful


@pytest.mark.parametrize(('yaml', 'message'), [
    ('sampling.top_p: 1.5', r'sampling\.top_p is 1\.5: allowed are 0\.0 to 1\.0'),
    ('sampling.top_k: -1', r'sampling\.top_k is -1: allowed are 0 to 1000000'),
    ('sampling.top_k: 2.5', r'sampling\.top_k is 2\.5: expected an integer'),
    ('sampling.top_p: high', r"sampling\.top_p is 'high': expected a number"),
    ('sampling.top_p: .nan', r'sampling\.top_p is nan: allowed are 0\.0 to 1\.0'),
    ('sampling.stop: "a"', r"sampling\.stop is 'a': expected a list of strings"),
    ('sampling.stop: [1, 2]', r'sampling\.stop is .*: expected a list of strings'),
    (f'sampling.stop: [{", ".join(["a"] * 65)}]', r'sampling\.stop has 65 texts: allowed are 64'),
    (f'sampling.stop: [{"a" * 257}]', r'sampling\.stop is .* 257 characters: allowed are 256'),
    (f'model.path: {"a" * 4097}', r'model\.path is .* 4097 characters: allowed are 4096'),
    ('realtime.cpu_affinity: [a]', r'realtime\.cpu_affinity is .*: expected a list of integers'),
    ('realtime.cpu_affinity: [1, -1]', r'realtime\.cpu_affinity is .*: allowed are 0 to 4095'),
    (f'realtime.cpu_affinity: {[1] * 65}', r'cpu_affinity has 65 numbers: allowed are 64'),
    ('queue.size: 1000000000', r'queue\.size is 1000000000: allowed are 1 to 10000'),
    ('deadline.request_ms: 1.0e+308', r'deadline\.request_ms is 1e\+308: allowed are 0\.0 to'),
    ('engine.name: fast', r"engine\.name is 'fast': allowed are auto, native"),
    ('engine.cuda_graph: 1', r'engine\.cuda_graph is 1: expected true or false'),
    ('autostart: 1', r'autostart is 1: expected true or false')])
def test_a_wrong_value_is_named(make, yaml, message):
    """The message has the name, the value and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        parameters.declare(make(yaml))


def test_an_unknown_name_is_found_and_the_nearest_named(make):
    """A slip of the pen is told, not ignored; ROS's own parameters are known."""
    node = make('sampling.temprature: 0.5\nuse_sim_time: false\nxyz: 1')
    parameters.declare(node)
    assert parameters.unknown(node) == ['sampling.temprature', 'xyz']
    assert parameters.unknown_message('sampling.temprature').endswith(
        'did you mean sampling.temperature?')
    assert parameters.unknown_message('xyz') == 'xyz is not a parameter of this node'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_configs_fit_the_settings(make, path):
    """Every name in a config is known and every value allowed."""
    node = make(path=path)
    parameters.declare(node)
    assert parameters.unknown(node) == []
    assert parameters.read(node) != DecodeConfig() or path.stem == 'decode'


def test_there_are_configs():
    """Those that docs/tuning.md names are among them."""
    assert {'decode', 'l4', 'jetson_orin'} <= {path.stem for path in CONFIGS}
