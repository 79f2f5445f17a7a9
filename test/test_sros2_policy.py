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

"""config/sros2_policy.xml grants each node exactly the topics and services that it uses."""

from importlib.util import module_from_spec
from importlib.util import spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

from physai_decode.ros.ask import Asker
from physai_decode.ros.bond import Heartbeat
from physai_decode.ros.interfaces import unavailable
from physai_decode.ros.node import DecodeNode
from physai_decode.ros.watch import Watcher
import pytest
import rclpy
from rclpy.parameter import Parameter

ROOT = Path(__file__).resolve().parent.parent
POLICY = ElementTree.parse(ROOT / 'config' / 'sros2_policy.xml').getroot()
PROFILES = {enclave.get('path'): enclave.findall('profiles/profile')
            for enclave in POLICY.findall('enclaves/enclave')}
# From the schema: the elements of each list, and the rights on them.
LISTS = {'topics': ('topic', 'publish', 'subscribe'), 'services': ('service', 'request', 'reply'),
         'actions': ('action', 'call', 'execute')}
# The topics and services of an action's server.
ACTION = {'publish': ('feedback', 'status'), 'reply': ('send_goal', 'cancel_goal', 'get_result')}


@pytest.fixture(scope='module', autouse=True)
def ros():
    """Initialise ROS in simulated time."""
    rclpy.init(args=['--ros-args', '-p', 'use_sim_time:=true'])
    yield
    rclpy.shutdown()


@pytest.fixture
def node(enclave):
    """Create the node of an enclave."""
    if enclave == '/decode':
        node = DecodeNode(parameter_overrides=[Parameter('autostart', value=False)])
    elif enclave == '/controller':
        spec = spec_from_file_location('controller', ROOT / 'examples' / 'controller.py')
        example = module_from_spec(spec)
        spec.loader.exec_module(example)
        node = example.Controller('go')
    else:
        node = {'/decode_ask': Asker, '/decode_watch': Watcher}[enclave]('decode')
    yield node
    if enclave == '/decode':
        assert node.close(30.0)
    node.destroy_node()


def granted(profile) -> set[tuple[str, str]]:
    """Return pairs of right and name; an action becomes its topics and services."""
    found = set()
    for group in profile:
        for right in group.keys():
            names = [each.text for each in group]
            if right == 'execute':
                found |= {(part_right, f'{name}/_action/{part}') for name in names
                          for part_right, parts in ACTION.items() for part in parts}
            else:
                found |= {(right, name) for name in names}
    return found


def used(node) -> set[tuple[str, str]]:
    """Return the rights that a node uses, from the ROS graph; its own names begin with ~."""
    own, found = node.get_fully_qualified_name() + '/', set()
    for right, ask in (('publish', node.get_publisher_names_and_types_by_node),
                       ('subscribe', node.get_subscriber_names_and_types_by_node),
                       ('reply', node.get_service_names_and_types_by_node),
                       ('request', node.get_client_names_and_types_by_node)):
        names = [name for name, _ in ask(node.get_name(), node.get_namespace())]
        found |= {(right, name.replace(own, '~/')) for name in names}
    return found


def optional(name: str) -> bool:
    """Return whether a name exists only with another package or in a later distribution."""
    return (name == '/bond' and Heartbeat is None
            or bool(unavailable) and name.startswith(('~/generate/', '~/stamped_tokens'))
            or name == '~/get_type_description')


@pytest.mark.parametrize('enclave', PROFILES)
def test_grants_exactly_the_rights_that_a_node_uses(node, enclave):
    profile, = PROFILES[enclave]
    name = profile.get('node')
    assert profile.get('ns') == node.get_namespace()
    assert node.get_name() == name or (
        name.endswith('_*') and node.get_name().removeprefix(name[:-1]).isdecimal())
    uses, grants = used(node), granted(profile)
    assert uses - grants == set()
    assert {right for right in grants - uses if not optional(right[1])} == set()


def test_conforms_to_the_schema_of_sros2():
    """It has only the elements and attributes of version 0.2.0."""
    assert (POLICY.tag, POLICY.attrib) == ('policy', {'version': '0.2.0'})
    assert [each.tag for each in POLICY] == ['enclaves']
    for enclave in POLICY[0]:
        assert (enclave.tag, *enclave.attrib) == ('enclave', 'path')
        assert enclave.get('path').startswith('/')
        assert [(each.tag, each.attrib) for each in enclave] == [('profiles', {})]
        for profile in enclave[0]:
            assert (profile.tag, set(profile.attrib)) == ('profile', {'ns', 'node'})
            for group in profile:
                item, *known = LISTS[group.tag]
                assert set(group.attrib) <= set(known)
                assert set(group.attrib.values()) == {'ALLOW'}
                assert {(each.tag, *each.attrib) for each in group} == {(item,)}
                names = [each.text for each in group]
                assert len(set(names)) == len(names)
                assert all(name.startswith(('/', '~/')) for name in names)


def test_grants_no_wildcards():
    """Only the name of a node has one, for the number of its process."""
    text = ''.join(name.text for profiles in PROFILES.values() for profile in profiles
                   for group in profile for name in group)
    assert '*' not in text
