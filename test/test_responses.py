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

"""Responses of services: they arrive, and no client's discovery holds up other threads."""

import threading
import time
from unittest.mock import MagicMock

from physai_decode.ros import responses
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.qos import QoSDurabilityPolicy
from rclpy.qos import QoSProfile
from std_srvs.srv import SetBool

PATIENCE_S = 120.0
SERVICE = rclpy_implementation.Service


@pytest.fixture
def node(monkeypatch):
    """Return a node with a service, whose executor spins until the test ends."""
    monkeypatch.setattr(SERVICE, 'service_send_response', SERVICE.service_send_response)
    responses.release_lock()
    rclpy.init()
    node = rclpy.create_node('server')
    node.create_service(SetBool, 'call', lambda request, response: SetBool.Response(
        success=request.data, message='ü' * 3000))
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin)
    thread.start()
    yield node
    executor.shutdown()
    thread.join()
    rclpy.shutdown()


@pytest.fixture
def client_node():
    """Return a node whose executor the test spins."""
    node = rclpy.create_node('client')
    yield node
    node.destroy_node()


def test_responses_arrive(node, client_node):
    client = client_node.create_client(SetBool, 'call')
    assert client.wait_for_service(PATIENCE_S)
    for value in (True, False) * 20:
        future = client.call_async(SetBool.Request(data=value))
        rclpy.spin_until_future_complete(client_node, future, timeout_sec=PATIENCE_S)
        assert (future.result().success, future.result().message) == (value, 'ü' * 3000)


def test_response_that_can_not_be_converted(node, client_node, monkeypatch):
    """It raises, as rclpy's own method does, and the next response arrives."""
    errors, send = [], SERVICE.service_send_response

    def send_wrong_first(handle, response, header):
        if not errors:
            with pytest.raises(UnicodeEncodeError) as error:
                send(handle, SetBool.Response(message='\ud800'), header)
            errors.append(error)
        send(handle, response, header)

    monkeypatch.setattr(SERVICE, 'service_send_response', send_wrong_first)
    client = client_node.create_client(SetBool, 'call')
    assert client.wait_for_service(PATIENCE_S)
    future = client.call_async(SetBool.Request(data=True))
    rclpy.spin_until_future_complete(client_node, future, timeout_sec=PATIENCE_S)
    assert errors and future.result().success


def test_destroyed_service_sends_no_response(node, monkeypatch):
    service = node.create_service(SetBool, 'other', lambda request, response: response)
    header = MagicMock()
    monkeypatch.setattr(responses, '_address', lambda request_id: id(header))
    service.handle.destroy_when_not_in_use()
    with pytest.raises(rclpy_implementation.InvalidHandle):
        SERVICE.service_send_response(service.handle, SetBool.Response(), header)


def test_keeps_the_methods_of_a_version_that_it_does_not_know(monkeypatch):
    own = MagicMock(is_replaced=False)
    monkeypatch.setattr(SERVICE, 'service_send_response', own)
    monkeypatch.setattr(responses._rclpy, 'rmw_request_id_t', object)
    responses.release_lock()
    assert SERVICE.service_send_response is own


@pytest.mark.filterwarnings('ignore:a client will not receive')
def test_other_threads_run_while_a_response_waits_for_its_client(node, client_node, monkeypatch):
    """The client's durability does not fit, so the middleware waits for 100 ms and gives up."""
    ticks, during, ended = [0], [], threading.Event()
    send = SERVICE.service_send_response

    def counted(*arguments):
        before = ticks[0]
        send(*arguments)
        during.append(ticks[0] - before)

    def tick():
        while not ended.wait(0.001):
            ticks[0] += 1

    monkeypatch.setattr(SERVICE, 'service_send_response', counted)
    thread = threading.Thread(target=tick)
    thread.start()
    client = client_node.create_client(SetBool, 'call', qos_profile=QoSProfile(
        depth=10, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL))
    end_s = time.monotonic() + PATIENCE_S
    while len(during) < 5 and time.monotonic() < end_s:
        client.call_async(SetBool.Request())
        time.sleep(0.2)
    ended.set()
    thread.join()
    assert len(during) >= 5
    assert sum(during) > 3 * len(during)        # one each while the lock is held
