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

"""The settings as ROS parameters: names, descriptors, and values from files."""

from pathlib import Path

from node_rig import ros  # noqa: F401
from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from physai_decode.ros import parameters
import pytest
from rclpy.node import Node
from rclpy.parameter import Parameter

CONFIGS = sorted(path for path in (Path(__file__).parents[1] / 'config').glob('*.yaml')
                 if '/**:' in path.read_text().splitlines())


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a node with the parameters of a file."""
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


def test_defaults_equal_those_of_decode_config(make):
    node = make()
    parameters.declare(node)
    assert parameters.read(node) == DecodeConfig()
    assert parameters.unknown(node) == []


def test_off_without_quotation_marks_is_a_string(make):
    """YAML reads it as false."""
    node = make('chat.template: off')
    parameters.declare(node)
    assert parameters.read(node).chat.template == 'off'


def test_each_parameter_has_a_descriptor(make):
    """It has a description, the type, the range or choices, and when it can be set."""
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


def test_reads_values_of_all_types_from_a_file(make):
    """An integer is accepted where a float is expected."""
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


@pytest.mark.parametrize('parameter', [
    Parameter('sampling.stop'), Parameter('sampling.stop', Parameter.Type.BOOL_ARRAY, []),
    Parameter('sampling.stop', Parameter.Type.STRING_ARRAY, [])])
def test_accepts_an_empty_list_of_any_type(make, parameter):
    """The tools of ROS do not agree on its type."""
    assert parameters.merge(DecodeConfig(), [parameter]).sampling.stop == ()
    node = make('sampling.stop: []')
    parameters.declare(node)
    assert parameters.read(node).sampling.stop == ()
    assert node.set_parameters(parameters.typed([parameter]))[0].successful


@pytest.mark.parametrize(('yaml', 'message'), [
    ('sampling.top_p: 1.5', r'sampling\.top_p is 1\.5: expected 0\.0 to 1\.0'),
    ('sampling.top_k: -1', r'sampling\.top_k is -1: expected 0 to 1000000'),
    ('sampling.top_k: 2.5', r'sampling\.top_k is 2\.5: expected an integer'),
    ('sampling.top_p: high', r"sampling\.top_p is 'high': expected a number"),
    ('sampling.top_p: .nan', r'sampling\.top_p is nan: expected 0\.0 to 1\.0'),
    ('sampling.stop: "a"', r"sampling\.stop is 'a': expected a list of strings"),
    ('sampling.stop: [1, 2]', r'sampling\.stop is \[1, 2\]: expected a list of strings'),
    ('sampling.top_k: true', r'sampling\.top_k is true: expected an integer'),
    (f'sampling.stop: [{", ".join(["a"] * 65)}]', r'stop has 65 strings: at most 64 are allowed'),
    (f'sampling.stop: [{"a" * 257}]', r'stop is .* 257 characters: at most 256 are allowed'),
    (f'model.path: {"a" * 4097}', r'model\.path is .* 4097 characters: at most 4096 are allowed'),
    ('realtime.cpu_affinity: [a]', r"realtime\.cpu_affinity is \['a'\]: expected a list of in"),
    ('realtime.cpu_affinity: [1, -1]', r'realtime\.cpu_affinity is .*: expected 0 to 4095'),
    (f'realtime.cpu_affinity: {[1] * 65}', r'cpu_affinity has 65 numbers: at most 64 are allowed'),
    ('queue.size: 1000000000', r'queue\.size is 1000000000: expected 1 to 10000'),
    ('deadline.request_ms: 1.0e+308', r'deadline\.request_ms is 1e\+308: expected 0\.0 to'),
    ('engine.name: fast', r"engine\.name is 'fast': expected one of auto, native"),
    ('engine.cuda_graph: 1', r'engine\.cuda_graph is 1: expected true or false'),
    ('autostart: 1', r'autostart is 1: expected true or false')])
def test_error_has_the_name_the_value_and_what_is_allowed(make, yaml, message):
    with pytest.raises(ConfigError, match=message):
        parameters.declare(make(yaml))


def test_reports_unknown_names_and_suggests_a_similar_one(make):
    """The parameters of ROS itself are known."""
    node = make('sampling.temprature: 0.5\nuse_sim_time: false\nxyz: 1')
    parameters.declare(node)
    assert parameters.unknown(node) == ['sampling.temprature', 'xyz']
    assert parameters.unknown_message('sampling.temprature').endswith(
        'did you mean sampling.temperature?')
    assert parameters.unknown_message('xyz') == 'xyz is not a parameter of this node'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_files_in_config_are_valid(make, path):
    """Each name is known and each value is allowed."""
    node = make(path=path)
    parameters.declare(node)
    assert parameters.unknown(node) == []
    assert parameters.read(node) != DecodeConfig() or path.stem == 'decode'


def test_files_that_docs_tuning_names_are_in_config():
    assert {'decode', 'l4', 'jetson_orin'} <= {path.stem for path in CONFIGS}
