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

"""A node with a fake engine, and a probe that uses all its topics and services."""

from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
from contextlib import ExitStack
import faulthandler
import threading
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from fake_engine import byte_tokenizer
from fake_engine import FakeEngine
from lifecycle_msgs.srv import ChangeState
from lifecycle_msgs.srv import GetState
from physai_decode.constraint import Vocabulary
from physai_decode.decode_loop import Step
from physai_decode.host import Loaded
from physai_decode.roofline import Peak
from physai_decode.ros import responses
from physai_decode.ros.executor import Executor
from physai_decode.ros.executor import WAITING
from physai_decode.ros.node import DecodeNode
from physai_decode.ros.topics import latched_qos
from physai_decode.ros.topics import stream_qos
from physai_decode.speech import Manner
from physai_decode.worker import Cancelled
import pytest
from rcl_interfaces.srv import SetParameters
from rcl_interfaces.srv import SetParametersAtomically
import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from std_msgs.msg import Float64
from std_msgs.msg import String
from std_srvs.srv import Trigger

responses.release_lock()        # as decode_node does
PATIENCE_S = 120.0              # against hangs only
CONTEXT = 256
END = 0x110000                  # the id that ends an answer


class Letters:
    """A tokenizer with one token per character, in place of Text and its detokenizer."""

    manner = Manner()
    stopped = False
    held = False

    def encode(self, messages, chat_template_kwargs=None, heartbeat=None, tools=()):
        """Return the code points of the conversation."""
        return [ord(letter) for message in messages for letter in message.content]

    def detokenizer(self, stop=(), seen=()):
        """Return a detokenizer that holds nothing back."""
        return self

    def tail(self, prompt_ids):
        """Return the last characters."""
        return ''.join(map(chr, prompt_ids[-20:]))

    def vocabulary(self, size, end_ids):
        """Return a vocabulary that compiles constraints for characters below 128."""
        return Vocabulary(byte_tokenizer(), size, end_ids)

    def close(self):
        """Do nothing."""

    def push(self, token_id):
        """Return the character of a token."""
        return chr(token_id)

    def flush(self):
        """Return an empty string."""
        return ''


class EchoEngine(FakeEngine):
    """
    Answers with the prompt in upper case.

    At a ``!`` of the prompt it raises, at a ``?`` it waits until the test sets `answer`, and for
    U+0001 it answers NUL.
    """

    def __init__(self, step_s: float = 0.0, end: int = END) -> None:
        super().__init__(
            self._echo_upper, engine='echo', model_type='echo', device_name='Echo 1',
            cuda_graph='unavailable', max_context=CONTEXT, vocab_size=end + 1,
            eos_token_ids=(end,), read_weight_bytes=10**6, checkpoint_weight_bytes=10**6,
            layers=1, head_dim=64)
        self.step_s = step_s
        self.answer = threading.Event()

    @staticmethod
    def answer_to(letter):
        """Return the answer to a character of the prompt."""
        return letter.upper()

    def _echo_upper(self, prompt_ids):
        for token_id in prompt_ids:
            letter = chr(token_id)
            time.sleep(self.step_s)
            if letter == '!':
                raise RuntimeError('the engine broke')
            if letter == '?':
                assert self.answer.wait(PATIENCE_S)
            yield Step((ord(self.answer_to(letter)) if letter > '\x01' else 0,), device_s=1e-6)
        yield Step(self.footprint.eos_token_ids)


class Loader:
    """Loads a model; a test can make it wait or fail, and choose the engine."""

    def __init__(self) -> None:
        self.engines: list[EchoEngine] = []
        self.kind: type[EchoEngine] = EchoEngine
        self.step_s = 0.0
        self.go = threading.Event()
        self.go.set()

    def __call__(self, config, progress) -> Loaded:
        """Return a loaded model; the path ``bad`` raises."""
        progress('reading')
        assert self.go.wait(PATIENCE_S)
        progress('done')
        if config.model.path == 'bad':
            raise ValueError('bad is no model')
        self.engines.append(self.kind(self.step_s))
        return Loaded(self.engines[-1], Letters(), Peak(1e9, 'parameter'))


class Rig:
    """The node and a probe that subscribes to all its topics, each with its own threads."""

    def __init__(self, load=None, **overrides) -> None:
        self.loader = Loader()
        # Limits that even a busy machine does not reach.
        overrides = {'autostart': False, 'diagnostics.period_s': 0.05,
                     'diagnostics.stall_timeout_s': 3600.0, 'diagnostics.window_s': 3600.0,
                     **overrides}
        self.node = DecodeNode(load or self.loader, parameter_overrides=[
            Parameter(name, value=value) for name, value in overrides.items()])
        self._counting = threading.Lock()
        self.in_flight: Counter[str] = Counter()        # messages by topic
        self.cancels: list[Cancelled] = []      # results of the calls of host.cancel
        self.errors: list[Exception] = []       # of the probe's callbacks
        self._cancel, self.node._host.cancel = self.node._host.cancel, self._note_cancel
        self.probe = Node('probe')
        self.received: dict[str, list] = {}
        for topic, kind, qos in (
                ('/decode/tokens', String, stream_qos()),
                ('/decode/token_stats', DiagnosticArray, stream_qos()),
                ('/decode/itl_ms', Float64, stream_qos()),
                ('/decode/r_floor', Float64, stream_qos()),
                ('/decode/response', String, stream_qos()),
                ('/decode/result', String, stream_qos()),
                ('/decode/accepted', String, stream_qos()),
                ('/decode/item', String, stream_qos()),
                ('/decode/request_stats', DiagnosticArray, stream_qos()),
                ('/decode/model_info', DiagnosticArray, latched_qos()),
                ('/diagnostics', DiagnosticArray, QoSProfile(depth=100))):
            self.received[topic.rpartition('/')[2]] = messages = []
            self.probe.create_subscription(
                kind, topic, self._counted(topic, -1, messages.append), qos)
        for publisher in self.node.publishers:
            publisher.publish = self._counted(publisher.topic_name, 1, publisher.publish)
        self.prompt = self.probe.create_publisher(String, '/decode/prompt', stream_qos())
        self.clients = {
            name: self.probe.create_client(kind, f'/decode/{name}') for name, kind in (
                ('change_state', ChangeState), ('get_state', GetState), ('cancel', Trigger),
                ('reset', Trigger), ('measure_gap', Trigger), ('set_parameters', SetParameters),
                ('set_parameters_atomically', SetParametersAtomically))}
        # rclpy's own executors end if an entity is created or destroyed while they wait.
        self.executors = [Executor(3, self.node.faults.note), Executor(1, self._note_of_probe)]
        self.threads = []
        for executor, node in zip(self.executors, (self.node, self.probe), strict=True):
            executor.add_node(node)
            self.threads.append(threading.Thread(target=executor.spin))
            self.threads[-1].start()
        for client in self.clients.values():
            assert client.wait_for_service(PATIENCE_S)
        self.wait(lambda: self.received['diagnostics'] and self.prompt.get_subscription_count())

    def _note_of_probe(self, source, error) -> None:
        if source != WAITING:
            self.errors.append(error)

    def _counted(self, topic, count, do):
        def counted(message):
            with self._counting:
                self.in_flight[topic] += count
            do(message)

        return counted

    def settle(self) -> None:
        """Wait until the probe has received all messages of the stream topics."""
        streams = [f'/decode/{name}' for name in self.received if name not in (
            'diagnostics', 'model_info')]
        self.wait(lambda: not any(self.in_flight[topic] for topic in streams))

    def _note_cancel(self, *arguments, **named) -> Cancelled:
        self.cancels.append(self._cancel(*arguments, **named))
        return self.cancels[-1]

    def close(self) -> None:
        """End all threads, then the nodes."""
        for engine in self.loader.engines:
            engine.answer.set()
        self.loader.go.set()
        assert self.node.close(PATIENCE_S)
        for executor, thread in zip(self.executors, self.threads, strict=True):
            executor.shutdown()
            thread.join()
        self.node.destroy_node()
        self.probe.destroy_node()
        assert not self.errors

    def wait(self, done) -> None:
        """Wait until ``done`` returns true."""
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > end_s:
                faulthandler.dump_traceback()       # where each thread hangs
                raise AssertionError('waited too long')
            time.sleep(0.005)

    def call(self, name, request):
        """Call a service and return its response."""
        return self.result(self.clients[name].call_async(request))

    def result(self, future):
        """Wait for the response of a service."""
        self.wait(future.done)
        return future.result()

    def begin(self, label):
        """Request a transition; returns a future of the response."""
        request = ChangeState.Request()
        request.transition.label = label
        return self.clients['change_state'].call_async(request)

    def change(self, *labels) -> bool:
        """Run transitions; returns whether all succeeded."""
        return all([self.result(self.begin(label)).success for label in labels])

    def state(self) -> str:
        """Return the label of the lifecycle state."""
        return self.call('get_state', GetState.Request()).current_state.label

    def trigger(self, name):
        """Call cancel, reset or measure_gap."""
        return self.call(name, Trigger.Request())

    def set(self, service='set_parameters', **values):
        """Set parameters, with ``__`` for the dot of a name; returns (successful, reason)."""
        kind = {'set_parameters': SetParameters,
                'set_parameters_atomically': SetParametersAtomically}[service]
        answer = self.call(service, kind.Request(parameters=[
            Parameter(name.replace('__', '.'), value=value).to_parameter_msg()
            for name, value in values.items()]))
        result = answer.results[0] if service == 'set_parameters' else answer.result
        return result.successful, result.reason

    def ask_later(self, text) -> None:
        """Send a prompt without waiting for the answer."""
        self.prompt.publish(String(data=text))

    def ask(self, text) -> dict[str, str]:
        """Send a prompt and return the figures of the next request that ends."""
        count = len(self.received['request_stats'])
        self.ask_later(text)
        self.wait(lambda: len(self.received['request_stats']) > count)
        return self.requests()[count]

    def requests(self) -> list[dict[str, str]]:
        """Return the figures of all requests so far, with the message of the status."""
        return [self.values(array.status[0]) for array in self.received['request_stats']]

    def diagnostics(self, name) -> dict[str, str]:
        """Return the status of this name that is published on /diagnostics after this call."""
        count = len(self.received['diagnostics']) + 1
        self.wait(lambda: len(self.received['diagnostics']) > count)
        return next(self.values(status) for status in self.received['diagnostics'][-1].status
                    if status.name == name)

    def values(self, status) -> dict[str, str]:
        """Return the values of a status, with its message and level."""
        return {**{pair.key: pair.value for pair in status.values},
                'message': status.message, 'level': status.level}


def spin(node, done) -> None:
    """Spin a node until ``done`` returns true."""
    end_s = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end_s, 'waited too long'
        rclpy.spin_once(node, timeout_sec=0.1)


@pytest.fixture(scope='module', autouse=True)
def ros():
    """Initialise rclpy once for all tests of a module that imports this fixture."""
    rclpy.init()
    yield
    rclpy.shutdown()


@contextmanager
def rigs(kind: type) -> Iterator[Callable[..., Any]]:
    """Yield a factory of rigs of this class; close them all, whatever fails in the test."""
    with ExitStack() as made:
        def make(**arguments):
            return made.enter_context(closing(kind(**arguments)))

        yield make


@contextmanager
def new_rig(**arguments) -> Iterator[Rig]:
    """Initialise rclpy and yield the rig of an unconfigured node; end both, whatever fails."""
    rclpy.init()
    try:
        rig = Rig(**arguments)
        try:
            yield rig
        finally:
            rig.close()
    finally:
        rclpy.shutdown()


@contextmanager
def active_rig(engine: type[EchoEngine] = EchoEngine, **arguments) -> Iterator[Rig]:
    """Yield the rig of an active node."""
    with new_rig(**arguments) as rig:
        rig.loader.kind = engine
        assert rig.change('configure', 'activate')
        yield rig
