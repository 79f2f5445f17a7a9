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

"""After any malformed or extreme message to any of its interfaces, the node answers a prompt."""

from functools import reduce
from importlib import import_module
import math
import struct

from builtin_interfaces.msg import Time
from node_rig import PATIENCE_S
from node_rig import Rig
from node_rig import ros  # noqa: F401
from physai_decode.ros.interfaces import Generate
from physai_decode.ros.interfaces import unavailable
from physai_decode.ros.topics import stream_qos
import pytest
from rcl_interfaces.msg import Parameter
from rcl_interfaces.msg import ParameterValue
from rcl_interfaces.srv import GetParameters
from rosgraph_msgs.msg import Clock
from rosidl_parser import definition
from std_msgs.msg import String

VARIANTS = 4
TEXTS = ('\0', 'x' * 100_000, 'a\0b\uffff\u2028', '')
NUMBERS = (math.nan, math.inf, -1e308, 5e-324)
LENGTHS = (30, 1, 3, 0)      # of lists; short, because lists can contain long texts or lists
ACTION = {'send_goal': 'SendGoalService', 'get_result': 'GetResultService',
          'cancel_goal': 'CancelGoalService'}


def extreme(kind, variant):
    """Return a message or request with an extreme value in each field."""
    message = kind()
    for name, slot in zip(message.get_fields_and_field_types(), message.SLOT_TYPES, strict=True):
        setattr(message, name, value(slot, variant))
    return message


def value(slot, variant):
    """Return an extreme value of a field's type."""
    if isinstance(slot, definition.NamespacedType):
        module = import_module('.'.join(slot.namespaces))
        return extreme(reduce(getattr, slot.name.split('_'), module), variant)  # Generate_Goal
    if isinstance(slot, definition.AbstractNestedType):
        length = slot.size if isinstance(slot, definition.Array) else LENGTHS[variant]
        return [value(slot.value_type, variant)] * length
    if isinstance(slot, definition.AbstractString):
        return TEXTS[variant]
    if slot.typename == 'boolean':
        return variant % 2 == 0
    if slot.typename == 'octet':
        return b'\xff'
    if slot.typename in ('double', 'float'):
        return NUMBERS[variant]
    bits = int(slot.typename.lstrip('uint'))
    if slot.typename.startswith('u'):
        return 0 if variant % 2 else 2**bits - 1
    return -2**(bits - 1) if variant % 2 else 2**(bits - 1) - 1


def serialized(data, *, length=None):
    """Return a serialised std_msgs/String of these bytes."""
    return b'\0\1\0\0' + struct.pack('<I', len(data) if length is None else length) + data


RAW = [
    b'', b'\0', b'\0\1\0\0', b'\0\7\0\0' + b'\xff' * 40, serialized(b'\xff\xfe\0'),
    serialized(b''), serialized(b'no end'), serialized(b'a\0b\0'), serialized(b'\xed\xa0\x80\0'),
    serialized(b'a', length=2**32 - 1), serialized(b'{"id": "\xff"}\0'),
    serialized(b'{' * 10_000 + b'\0')]


@pytest.fixture(scope='module')
def rig(ros):  # noqa: F811
    """Start an active node in simulated time."""
    rig = Rig(use_sim_time=True)
    assert rig.change('configure', 'activate')
    yield rig
    rig.close()


def call(rig, kind, name, request):
    """Call a service, assert that the node then answers a prompt, and return the response."""
    client = rig.probe.create_client(kind, name)
    assert client.wait_for_service(PATIENCE_S)
    ended = len(rig.requests())
    response = rig.result(client.call_async(request))
    rig.probe.destroy_client(client)
    if getattr(response, 'accepted', False):        # a goal, which ends a moment later
        rig.wait(lambda: len(rig.requests()) > ended)
    assert rig.ask('hi')['finish_reason'] == 'stop', name
    return response


@pytest.mark.parametrize('variant', range(VARIANTS))
def test_services_respond_to_extreme_requests(rig, variant):
    """Each field of the request has an extreme value; the node stays active."""
    services = [(each.srv_type, each.handle.name) for each in rig.node.services]
    assert len(services) >= 14
    for kind, name in services:
        call(rig, kind, name, extreme(kind.Request, variant))
    assert rig.state() == 'active'


@pytest.mark.parametrize('service', ['set_parameters', 'set_parameters_atomically'])
@pytest.mark.parametrize('kind', [10, 42, 255])
def test_rejects_a_parameter_value_of_an_unknown_type(rig, service, kind):
    """The response names the parameter and the type."""
    client = rig.clients[service]
    response = call(rig, client.srv_type, f'/decode/{service}', client.srv_type.Request(
        parameters=[Parameter(name='sampling.top_k', value=ParameterValue(type=kind))]))
    result = response.results[0] if service == 'set_parameters' else response.result
    assert not result.successful
    assert f'sampling.top_k has a value of type {kind}' in result.reason


@pytest.mark.parametrize('variant', range(VARIANTS))
def test_sets_parameters_to_extreme_values_of_each_type(rig, variant):
    """The services respond, whether they accept or reject a value."""
    values = []
    for kind in range(10):
        values.append(extreme(ParameterValue, variant))
        values[-1].type = kind
    names = [name for name in rig.node._parameters if name != 'use_sim_time'
             and not name.startswith(('sampling', 'deadline'))]
    for service in ('set_parameters', 'set_parameters_atomically'):
        client = rig.clients[service]
        call(rig, client.srv_type, f'/decode/{service}', client.srv_type.Request(
            parameters=[Parameter(name=name, value=each) for name in names for each in values]))


def test_very_long_lists_and_texts(rig):
    """The node handles or rejects them, and answers the next prompt."""
    call(rig, GetParameters, '/decode/get_parameters', GetParameters.Request(names=['a'] * 50_000))
    client = rig.clients['set_parameters_atomically']
    response = call(rig, client.srv_type, '/decode/set_parameters_atomically',
                    client.srv_type.Request(parameters=[Parameter(name='sampling.stop')] * 5000))
    assert response.result.successful
    assert 'more than 1000000 bytes' in rig.ask('x' * 20_000_000)['message']
    assert rig.ask('hi')['finish_reason'] == 'stop'


@pytest.mark.parametrize('data', RAW, ids=range(len(RAW)))
def test_bytes_that_are_not_a_valid_message(rig, data):
    """They come on both topics that take requests."""
    for topic in ('prompt', 'request'):
        publisher = rig.probe.create_publisher(String, f'/decode/{topic}', stream_qos())
        rig.wait(publisher.get_subscription_count)
        publisher.publish(data)
        rig.probe.destroy_publisher(publisher)
        assert 'stop' in {rig.ask('hi')['finish_reason'], rig.ask('hi')['finish_reason']}


@pytest.mark.parametrize('time', [
    Time(sec=-1), Time(sec=-2**31, nanosec=2**32 - 1), Time(sec=2**31 - 1, nanosec=2**32 - 1),
    Time(nanosec=10**9)], ids=str)
def test_ignores_a_clock_out_of_range(rig, time):
    """The node counts it in `callback_errors`, and keeps the time before it for its stamps."""
    publisher = rig.probe.create_publisher(Clock, '/clock', 10)
    rig.wait(publisher.get_subscription_count)
    publisher.publish(Clock(clock=Time(sec=7)))
    rig.wait(lambda: rig.received['diagnostics'][-1].header.stamp.sec == 7)
    before = int(rig.diagnostics('decode: engine')['callback_errors'])
    publisher.publish(Clock(clock=time))
    rig.wait(lambda: int(rig.diagnostics('decode: engine')['callback_errors']) > before)
    assert rig.ask('hi')['finish_reason'] == 'stop'
    assert rig.received['diagnostics'][-1].header.stamp.sec == 7
    for data in (b'', b'\0\1\0\0', b'\0\1\0\0\1'):
        publisher.publish(data)
    assert rig.ask('hi')['finish_reason'] == 'stop'
    rig.probe.destroy_publisher(publisher)


@pytest.mark.skipif(bool(unavailable), reason=unavailable)
@pytest.mark.parametrize('variant', range(VARIANTS))
def test_action_services_respond_to_extreme_requests(rig, variant):
    """Action clients call these three services internally; here, goal ids are unknown too."""
    for name in ('get_result', 'cancel_goal', 'send_goal', 'send_goal', 'get_result'):
        kind = getattr(Generate.Impl, ACTION[name])
        call(rig, kind, f'/decode/generate/_action/{name}', extreme(kind.Request, variant))
