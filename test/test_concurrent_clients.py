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

"""Four clients send requests concurrently; each request gets exactly one result, its own."""

import json
import random
import threading

from node_rig import active_rig
from node_rig import PATIENCE_S
from physai_decode.ros.topics import stream_qos
import pytest
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_msgs.msg import String

CLIENTS = 4
REQUESTS = 120
OUTSTANDING = 3                 # requests of each client at a time


@pytest.fixture(params=['reject', 'preempt'])
def rig(request):
    """Start an active node with each queue policy."""
    with active_rig(**{'queue.policy': request.param,
                       'queue.size': CLIENTS * OUTSTANDING}) as rig:
        yield rig


class Client:
    """Sends requests, cancels some of them, and keeps the results of its own."""

    def __init__(self, rig, name):
        self.name = name
        self.results = {}
        self.prompts = {}
        self._random = random.Random(name)
        self._free = threading.Semaphore(OUTSTANDING)
        self.node = Node(f'client_{name}')
        self._request = self.node.create_publisher(String, '/decode/request', stream_qos())
        self.node.create_subscription(String, '/decode/result', self._on_result, stream_qos())
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._spin = threading.Thread(target=self._executor.spin)
        self._spin.start()

    def is_connected(self):
        """Return whether the node has discovered its publisher."""
        return self._request.get_subscription_count() > 0

    def _on_result(self, message):
        result = json.loads(message.data)
        if result['id'] in self.prompts:
            self.results.setdefault(result['id'], []).append(result)
            self._free.release()

    def send_all(self):
        """Send all requests, `OUTSTANDING` at a time; cancel about one in ten."""
        for index in range(REQUESTS):
            assert self._free.acquire(timeout=PATIENCE_S)
            id_ = f'{self.name}-{index}'
            number = self._random.randrange(10**self._random.randrange(9))
            self.prompts[id_] = f'{self.name}{number}'
            self._send(id=id_, prompt=self.prompts[id_])
            if self._random.random() < 0.1:
                self._send(id=self._random.choice(list(self.prompts)[-3:]), cancel=True)

    def _send(self, **fields):
        self._request.publish(String(data=json.dumps(fields)))

    def close(self):
        """Stop the thread and destroy the node."""
        self._executor.shutdown()
        self._spin.join()
        self.node.destroy_node()


@pytest.mark.slow
def test_each_request_gets_one_result_of_its_own(rig):
    clients = [Client(rig, name) for name in 'abcd']
    try:
        rig.wait(lambda: all(client.is_connected() for client in clients)
                 and rig.node._topics._result.get_subscription_count() == CLIENTS + 1)
        threads = [threading.Thread(target=client.send_all) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rig.wait(lambda: all(len(client.results) == REQUESTS for client in clients))
    finally:
        for client in clients:
            client.close()
    ends = {'stop': 0, 'cancelled': 0, 'preempted': 0}
    for client in clients:
        for id_, text in client.prompts.items():
            (result,) = client.results[id_]
            reason = result['physai']['finish_reason']
            answer = result['choices'][0]['message']['content']
            ends[reason] += 1
            assert text.upper().startswith(answer)
            assert answer == text.upper() or reason != 'stop'
    assert ends['stop'] and ends['cancelled']
    preempts = rig.node.get_parameter('queue.policy').value == 'preempt'
    assert bool(ends['preempted']) == preempts
