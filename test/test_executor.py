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

"""`Executor`: it reports the exceptions of callbacks and continues to serve the others."""

import threading
import time

from physai_decode.ros.executor import Executor
from physai_decode.ros.executor import MAX_FAILURES
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from std_msgs.msg import String
from std_srvs.srv import Trigger

PATIENCE_S = 30.0               # against hangs only


class Rig:
    """A node on the executor, and a probe that publishes to it and calls it."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, str]] = []
        self.received: list[str] = []
        self.executor = Executor(2, lambda where, error: self.errors.append((where, str(error))))
        self.node, self.probe = rclpy.create_node('served'), rclpy.create_node('probe')
        self.node.create_subscription(String, 'text', self._on_text, 10)
        self.node.create_service(Trigger, 'call', lambda request, response: response)
        self.text = self.probe.create_publisher(String, 'text', 10)
        self.call = self.probe.create_client(Trigger, 'call')
        self._probing = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self._probing.add_node(self.probe)
        self.thread = threading.Thread(target=self._spin)
        self.raised: list[Exception] = []

    def _on_text(self, message):
        if message.data == 'raise':
            raise ZeroDivisionError('a slip')
        self.received.append(message.data)

    def _spin(self):
        try:
            self.executor.spin()
        except Exception as error:
            self.raised.append(error)

    def start(self):
        """Spin the executor in a thread, and wait until the probe has discovered the node."""
        self.thread.start()
        self.wait(lambda: self.text.get_subscription_count() and self.call.service_is_ready())

    def wait(self, done):
        """Spin the probe until `done` returns true."""
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < end_s, 'waited too long'
            self._probing.spin_once(0.01)

    def check(self):
        """Assert that the topic and the service, of one callback group, are served."""
        self.received.clear()
        self.text.publish(String(data='hi'))
        future = self.call.call_async(Trigger.Request())
        self.wait(lambda: self.received == ['hi'] and future.done())


@pytest.fixture
def rig():
    """Start ROS, and end it after the test."""
    rclpy.init()
    rig = Rig()
    yield rig
    rig.executor.shutdown()
    if rig.thread.ident:
        rig.thread.join()
    rig.node.destroy_node()
    rig.probe.destroy_node()
    rclpy.shutdown()


def test_reports_the_exception_of_a_callback(rig):
    """The report names the topic, and the executor continues."""
    rig.start()
    for count in range(1, 4):
        rig.text.publish(String(data='raise'))
        rig.wait(lambda count=count: len(rig.errors) == count)
        rig.check()
    assert rig.errors == 3 * [('/text', 'a slip')]
    assert rig.thread.is_alive()


@pytest.mark.parametrize('method', ['_take_subscription', '_take_service'])
def test_reports_a_message_that_can_not_be_taken(rig, monkeypatch, method):
    """Its topic, or service, and the callback group are served afterwards."""
    take, failures = getattr(rig.executor, method), ['second', 'first']

    def fail_first(entity):
        taken = take(entity)
        if failures:
            raise UnicodeError(failures.pop())
        return taken

    monkeypatch.setattr(rig.executor, method, fail_first)
    rig.start()
    for count in (1, 2):
        rig.text.publish(String(data='lost'))
        rig.call.call_async(Trigger.Request())
        rig.wait(lambda count=count: len(rig.errors) == count)
    rig.wait(lambda: not failures)
    rig.check()
    name = '/text' if method == '_take_subscription' else 'call'
    assert rig.errors == [(name, 'first'), (name, 'second')]


def test_reports_the_exception_of_a_task(rig):
    """The action server of rclpy runs its callbacks in such tasks."""
    rig.start()
    rig.executor.create_task(lambda: 1 / 0)
    rig.wait(lambda: rig.errors)
    assert rig.errors == [('a task', 'division by zero')]
    rig.check()


@pytest.mark.parametrize('count', [MAX_FAILURES - 1, MAX_FAILURES])
def test_ends_only_if_waiting_keeps_failing(rig, monkeypatch, count):
    """Waiting for callbacks fails `count` times in a row; at `MAX_FAILURES`, `spin` raises."""
    wait, failures = rig.executor.wait_for_ready_callbacks, iter(range(count))

    def fail_first(**options):
        if next(failures, None) is not None:
            raise RuntimeError('no wait set')
        return wait(**options)

    monkeypatch.setattr(rig.executor, 'wait_for_ready_callbacks', fail_first)
    if count < MAX_FAILURES:
        rig.start()
        rig.check()
        assert rig.errors == count * [('waiting for callbacks', 'no wait set')]
    else:
        rig.thread.start()
        rig.thread.join(PATIENCE_S)
        assert [str(error) for error in rig.raised] == ['no wait set']


def test_runs_callbacks_concurrently(rig):
    """Each of its two threads runs one of two tasks that wait for each other."""
    barrier = threading.Barrier(2)
    tasks = [rig.executor.create_task(barrier.wait, PATIENCE_S) for _ in range(2)]
    rig.start()
    rig.wait(lambda: all(task.done() for task in tasks))
    assert not rig.errors
    rig.check()
