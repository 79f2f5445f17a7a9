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

"""The executor: what a callback raises is noted, and all others are served on."""

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
    """A node on the executor, and one that sends to it."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, str]] = []
        self.heard: list[str] = []
        self.executor = Executor(2, lambda where, error: self.noted.append((where, str(error))))
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
        self.heard.append(message.data)

    def _spin(self):
        try:
            self.executor.spin()
        except Exception as error:
            self.raised.append(error)

    def start(self):
        """Serve."""
        self.thread.start()
        self.wait(lambda: self.text.get_subscription_count() and self.call.service_is_ready())

    def wait(self, done):
        """Serve the probe until something is so."""
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < end_s, 'waited too long'
            self._probing.spin_once(0.01)

    def check(self):
        """See that topic and service, which are in one callback group, are served."""
        self.heard.clear()
        self.text.publish(String(data='hi'))
        future = self.call.call_async(Trigger.Request())
        self.wait(lambda: self.heard == ['hi'] and future.done())


@pytest.fixture
def rig():
    """Give a rig."""
    rclpy.init()
    rig = Rig()
    yield rig
    rig.executor.shutdown()
    if rig.thread.ident:
        rig.thread.join()
    rig.node.destroy_node()
    rig.probe.destroy_node()
    rclpy.shutdown()


def test_a_callback_that_raises(rig):
    """It is noted under its topic."""
    rig.start()
    for count in range(1, 4):
        rig.text.publish(String(data='raise'))
        rig.wait(lambda count=count: len(rig.noted) == count)
        rig.check()
    assert rig.noted == 3 * [('/text', 'a slip')]
    assert rig.thread.is_alive()


@pytest.mark.parametrize('taking', ['_take_subscription', '_take_service'])
def test_a_message_that_can_not_be_taken(rig, monkeypatch, taking):
    """Neither its topic nor the callback group is lost."""
    take, bad = getattr(rig.executor, taking), ['once', 'twice']

    def fail_first(entity):
        taken = take(entity)
        if bad:
            raise UnicodeError(bad.pop())
        return taken

    monkeypatch.setattr(rig.executor, taking, fail_first)
    rig.start()
    for count in (1, 2):
        rig.text.publish(String(data='lost'))
        rig.call.call_async(Trigger.Request())
        rig.wait(lambda count=count: len(rig.noted) == count)
    rig.wait(lambda: not bad)
    rig.check()
    name = '/text' if taking == '_take_subscription' else 'call'
    assert rig.noted == [(name, 'twice'), (name, 'once')]


def test_a_task_that_raises(rig):
    """As those in which rclpy's action server answers."""
    rig.start()
    rig.executor.create_task(lambda: 1 / 0)
    rig.wait(lambda: rig.noted)
    assert rig.noted == [('a task', 'division by zero')]
    rig.check()


@pytest.mark.parametrize('count', [MAX_FAILURES - 1, MAX_FAILURES])
def test_waiting_that_fails(rig, monkeypatch, count):
    """Once is no end; always is one."""
    wait, failures = rig.executor.wait_for_ready_callbacks, iter(range(count))

    def fail_first(**options):
        if next(failures, None) is not None:
            raise RuntimeError('no wait set')
        return wait(**options)

    monkeypatch.setattr(rig.executor, 'wait_for_ready_callbacks', fail_first)
    if count < MAX_FAILURES:
        rig.start()
        rig.check()
        assert rig.noted == count * [('waiting for callbacks', 'no wait set')]
    else:
        rig.thread.start()
        rig.thread.join(PATIENCE_S)
        assert [str(error) for error in rig.raised] == ['no wait set']


def test_callbacks_run_side_by_side(rig):
    """As many as it has threads, whoever waits."""
    meeting = threading.Barrier(2)
    tasks = [rig.executor.create_task(meeting.wait, PATIENCE_S) for _ in range(2)]
    rig.start()
    rig.wait(lambda: all(task.done() for task in tasks))
    assert not rig.noted
    rig.check()
