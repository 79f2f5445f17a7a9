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

"""
Run the node for a long time, and check that nothing is lost or leaks.

A node with the embedded model goes through lifecycle rounds. Then four client processes send
requests at once through ``~/prompt``, ``~/request``, ``~/generate`` if it is built, and, from one
client, HTTP. Requests are valid, duplicates of an id, invalid or oversized. There are cancels by
id, goal, service and closed connection, lifecycle transitions, stops of the whole process
(SIGSTOP) and, in the second half, preemptions. Every request must have exactly one result, with
its own id and the next number, and every accepted one exactly one ~/accepted. The joined tokens
must equal the text. HTTP answers and goal results must match the topics. Memory, threads and file
descriptors of the node must stay flat. The output is a table; the exit code is 1 after a failure.
"""

import argparse
from collections import Counter
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
import json
import multiprocessing
from multiprocessing.connection import Connection
import os
from pathlib import Path
import random
import re
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from physai_decode.ros.interfaces import Generate
from physai_decode.ros.topics import stream_qos
from rcl_interfaces.srv import SetParameters
import rclpy
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from std_msgs.msg import String
from std_srvs.srv import Trigger

CLIENTS = 4
BURST = 16              # requests of a client at once, at most
QUEUE = 8               # requests that may wait
MAX_BYTES = 20_000      # of a request
PATIENCE_S = 120.0      # against hangs
FLAT = 0.03             # resident memory may grow by this fraction after the first tenth
SPARE = 3               # threads that the node's executor may start later
VERBS = ('bring', 'fetch', 'take', 'put')
THINGS = ('cup', 'box', 'bottle', 'book')
STATUS = {'stop': 4, 'cancelled': 5}       # of a goal; any other end: 6
DOORS = ('~/prompt', '~/request', '~/generate', 'HTTP')
BY_HTTP = 'a'           # the only client that sends HTTP requests
MODEL = 'builtin:tiny_planner'
# Weights of `DOORS`. Goals are few: each status message of the action lists all goals of the last
# seconds, and the time to read these messages grows with the square of the goal rate.
SHARES = (2, 2, 1, 3)
ANSWERED = {'stop', 'length'}           # these ends have an HTTP answer; others have an error code


class Sent(NamedTuple):
    """A request that a client sent, and the result of its goal."""

    door: str
    id: str | None              # that the result must have
    wrong: bool                 # it must be refused
    goal: tuple[int, int, str, str] | None = None   # status, request_id, finish reason, text
    http: 'HttpAnswer | None' = None


class HttpAnswer(NamedTuple):
    """The response over HTTP."""

    status: int
    end: str                    # finish reason, or code of the error; empty: the client left
    text: str


class Client:
    """Sends bursts from its own process."""

    def __init__(self, name: str, pipe: Connection, seed: int, port: int) -> None:
        self._name, self._pipe, self._count, self._port = name, pipe, 0, port
        self._shares = [share * door for share, door in zip(
            SHARES, (1, 1, bool(Generate), name == BY_HTTP), strict=True)]
        self._threads = ThreadPoolExecutor(BURST)
        self._random = random.Random(f'{seed} {name}')
        rclpy.init()
        self._node = rclpy.create_node(f'client_{name}')
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._prompt = self._node.create_publisher(String, '/decode/prompt', stream_qos())
        self._request = self._node.create_publisher(String, '/decode/request', stream_qos())
        self._action = Generate and ActionClient(
            self._node, Generate, '/decode/generate', goal_service_qos_profile=stream_qos(),
            result_service_qos_profile=stream_qos(), cancel_service_qos_profile=stream_qos())
        self._wait(lambda: self._prompt.get_subscription_count()
                   and self._request.get_subscription_count()
                   and (not Generate or self._action.server_is_ready()))
        pipe.send(None)

    def serve(self) -> None:
        """Send bursts of the requested sizes and report them, until the size is 0."""
        while size := self._pipe.recv():
            sent = [self._send_one() for _ in range(size)]
            self._pipe.send([each._replace(**self._answer(each, future)) for each, future in sent])
        self._threads.shutdown()
        rclpy.shutdown()

    def _answer(self, sent, future):
        """Wait for the response to the client."""
        if future is None:
            return {}
        return {'http': future.result()} if sent.door == 'HTTP' else {'goal': self._result(future)}

    def _wait(self, done) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > end_s:
                sys.exit(f'client {self._name}: no answer within {PATIENCE_S:g} s')
            self._executor.spin_once(0.1)

    def _result(self, future):
        """Wait for the result of a goal."""
        self._wait(future.done)
        later = future.result().get_result_async()
        self._wait(later.done)
        answer = later.result()
        result = answer.result
        return answer.status, result.request_id, result.finish_reason, result.text

    def _send_one(self):
        """Send one request; return it, and the future of its goal handle."""
        chance = self._random
        door, = chance.choices(DOORS, self._shares)
        text = f'{chance.choice(VERBS)} the {chance.choice(THINGS)} {chance.randrange(1000)}'
        if chance.random() < 0.5:
            time.sleep(0.01 * chance.random())
        if door == '~/prompt':
            text = chance.choice(('', 'x' * (MAX_BYTES + 1))) if chance.random() < 0.05 else text
            self._prompt.publish(String(data=text))
            return Sent(door, None, len(text) > MAX_BYTES or not text), None
        if chance.random() > 0.05:              # otherwise a duplicate of the previous one
            self._count += 1
        id_ = f'{self._name}-{self._count}'
        if door == 'HTTP':                      # an answer is found by its id
            self._count += 1
            id_ = f'{self._name}-http-{self._count}'
        fields = {'id': id_, 'prompt': text} if door != 'HTTP' and chance.random() < 0.7 else {
            'id': id_, 'messages': [{'role': 'user', 'content': text}]}
        fields.update(chance.choice((
            {}, {}, {'temperature': 0.8, 'seed': -1}, {'max_tokens': 3}, {'stop': ['"', 'x']},
            {'deadline': {'request_ms': 5.0, 'action': 'truncate'}})))
        wrong = chance.random() < 0.1
        if wrong:
            fields.update(chance.choice((
                {'temperature': 10**400}, {'top': 1}, {'deadline': {'\ud800': 1}}, {'seed': 1.5},
                {'prompt': '', 'messages': None}, {'messages': []}, {'id': '\n'},
                {'chat_template_kwargs': {'a': [1]}}, {'stop': ['x' * MAX_BYTES]})))
        elif chance.random() < 0.02:            # too long for the model, if it has its turn
            fields.update(messages=[{'role': 'user', 'content': 'x' * (MAX_BYTES - 1000)}])
            fields.pop('prompt', None)
        known = None if fields['id'] == '\n' or len(json.dumps(fields)) > MAX_BYTES else id_
        if door == '~/request':
            data = json.dumps(fields)
            if chance.random() < 0.03:
                data, known, wrong = data[:-1], None, True
            self._request.publish(String(data=data))
            if chance.random() < 0.15:
                back = chance.randrange(3)
                self._request.publish(String(data=json.dumps({
                    'id': f'{self._name}-{max(self._count - back, 1)}', 'cancel': True})))
            return Sent(door, known, wrong), None
        if door == 'HTTP':
            fields.update(model=MODEL, stream=chance.random() < 0.7)
            if chance.random() < 0.03:
                fields['model'], wrong = 'another', True
            data = json.dumps(fields)
            known = known if len(data) <= MAX_BYTES else None
            leaves = fields['stream'] and chance.random() < 0.2
            return Sent(door, known, wrong), self._threads.submit(self._post, data, leaves)
        typed = {'id': fields.pop('id'), 'prompt': fields.pop('prompt', '')}
        if 'messages' in fields:
            typed['messages_json'] = json.dumps(fields.pop('messages'))
        future = self._action.send_goal_async(
            Generate.Goal(**typed, options_json=json.dumps(fields) if fields else ''))
        if chance.random() < 0.15:
            future.add_done_callback(lambda done: done.result().cancel_goal_async())
        known = None if typed['id'] == '\n' else id_
        return Sent(door, known, wrong), future


    def _post(self, data: str, leaves: bool) -> HttpAnswer:
        """Send a request over HTTP."""
        connection = HTTPConnection('127.0.0.1', self._port, timeout=PATIENCE_S)
        try:
            connection.request('POST', '/v1/chat/completions', data)
            answer = connection.getresponse()
            if not answer.headers['content-type'].startswith('text/event-stream'):
                whole = json.loads(answer.read())
                if 'error' in whole:
                    return HttpAnswer(answer.status, whole['error']['code'],
                                 whole.get('physai', {}).get('text', ''))
                choice, = whole['choices']
                return HttpAnswer(
                    answer.status, choice['finish_reason'], choice['message']['content'])
            text, end = '', ''
            for line in answer:
                if not line.startswith(b'data: {'):
                    continue
                event = json.loads(line[len(b'data: '):])
                if 'error' in event:
                    return HttpAnswer(answer.status, event['error']['code'], text)
                choice, = event['choices']
                text += choice['delta'].get('content', '')
                end = choice['finish_reason'] or end
                if leaves and text:
                    return HttpAnswer(answer.status, '', text)
            return HttpAnswer(answer.status, end or 'nothing', text)
        finally:
            connection.close()


class Probe:
    """Controls the node and collects its messages until they are checked."""

    def __init__(self, pid: int, clients: list[Connection]) -> None:
        self.pid, self._process, self._clients = pid, Path(f'/proc/{pid}'), clients
        self._node = rclpy.create_node('soak')
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self.last = 0                           # number of the last request
        self.sent, self.reasons = Counter(), Counter()      # by door; by finish reason
        self.done = Counter()                   # actions on the node, by kind
        self.tokens: list[str] = []
        self.responses: list[str] = []
        self.pieces: dict[int, list[str]] = defaultdict(list)
        self.stats: list[dict[str, str]] = []
        self.accepted: list[dict] = []
        self.results: list[dict] = []

        def subscribe(kind, topic, callback):
            self._node.create_subscription(kind, f'/decode/{topic}', callback, stream_qos())

        subscribe(String, 'tokens', lambda message: self.tokens.append(message.data))
        subscribe(DiagnosticArray, 'token_stats', self._on_token)
        subscribe(String, 'response', lambda message: self.responses.append(message.data))
        subscribe(DiagnosticArray, 'request_stats',
                  lambda message: self.stats.append(_values(message)))
        subscribe(String, 'accepted', lambda message: self.accepted.append(_read(message)))
        subscribe(String, 'result', lambda message: self.results.append(_read(message)))
        self._services = {
            name: self._node.create_client(kind, f'/decode/{name}') for name, kind in (
                ('change_state', ChangeState), ('cancel', Trigger),
                ('set_parameters', SetParameters))}
        for service in self._services.values():
            if not service.wait_for_service(PATIENCE_S):
                sys.exit('the node did not come up')
        self.wait(lambda: all(self._node.count_publishers(f'/decode/{topic}') for topic in (
            'tokens', 'token_stats', 'response', 'request_stats', 'accepted', 'result')))
        for client in clients:
            self.hear(client)

    def wait(self, done) -> None:
        """Spin until a condition holds."""
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > end_s:
                sys.exit(f'no answer from the node within {PATIENCE_S:g} s; since the last burst '
                         f'{len(self.results)} results, {len(self.accepted)} accepted')
            self._executor.spin_once(0.02)

    def hear(self, client: Connection):
        """Wait for the report of a client."""
        self.wait(client.poll)
        return client.recv()

    def serve(self, seconds: float) -> None:
        """Spin for a while."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            self._executor.spin_once(left_s)

    def call(self, name, request):
        """Call a service of the node."""
        future = self._services[name].call_async(request)
        self.wait(future.done)
        return future.result()

    def change(self, *labels: str) -> None:
        """Run lifecycle transitions."""
        for label in labels:
            request = ChangeState.Request()
            request.transition.label = label
            if not self.call('change_state', request).success:
                sys.exit(f'{label} failed')

    def set(self, **values) -> None:
        """Set parameters."""
        answer = self.call('set_parameters', SetParameters.Request(parameters=[
            Parameter(name.replace('__', '.'), value=value).to_parameter_msg()
            for name, value in values.items()]))
        for result in answer.results:
            if not result.successful:
                sys.exit(result.reason)

    def cancel(self) -> None:
        """Cancel all requests."""
        self.call('cancel', Trigger.Request())

    def stop(self, seconds: float) -> None:
        """Stop the process of the node and continue it later."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            self.serve(seconds)
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def burst(self, sizes: list[int], meanwhile=lambda: None) -> list[str]:
        """Let each client send a burst; return the failures."""
        asked = [client for client, size in zip(self._clients, sizes, strict=True) if size]
        for client, size in zip(self._clients, sizes, strict=True):
            if size:
                client.send(size)
        meanwhile()
        sent = [each for client in asked for each in self.hear(client)]
        self.wait(lambda: len(self.results) >= len(sent))
        texts = [result['choices'][0]['message']['content'] for result in self.results]
        heard = [result for result in self.results if result['physai']['total_ms'] is not None]
        output = sum(result['usage']['completion_tokens'] for result in self.results)
        self.wait(lambda: len(self.stats) >= len(sent) and len(self.accepted) >= len(heard)
                  and len(self.tokens) >= output
                  and sum(map(len, self.pieces.values())) >= output
                  and sum(map(len, self.responses)) >= sum(map(len, texts)))
        self.serve(0.0)
        wrong = self._check(sent)
        self.last += len(sent)
        self.sent.update(each.door for each in sent)
        self.reasons.update(result['physai']['finish_reason'] for result in self.results)
        for kept in (self.tokens, self.responses, self.pieces, self.stats, self.accepted,
                     self.results):
            kept.clear()
        return wrong

    def _check(self, sent: list[Sent]) -> list[str]:
        wrong = []

        def equal(what, one, other):
            if one != other:
                wrong.append(f'{what}: {one} and {other}')

        results = {result['physai']['request_id']: result for result in self.results}
        reasons = {number: result['physai']['finish_reason'] for number, result in results.items()}
        texts = {number: result['choices'][0]['message']['content']
                 for number, result in results.items()}
        equal('numbers', sorted(result['physai']['request_id'] for result in self.results),
              [*range(self.last + 1, self.last + 1 + len(sent))])
        equal('ids', Counter(result['id'] for result in self.results),
              Counter(each.id for each in sent))
        equal('request_stats', sorted(
            (int(each['request_id']), each['client_id'], each['finish_reason'])
            for each in self.stats), sorted(
                (number, result['id'] or 'n/a', reasons[number])
                for number, result in results.items()))
        equal('accepted', sorted((each['request_id'], each['id'] or '') for each in self.accepted),
              sorted((number, result['id'] or '') for number, result in results.items()
                     if result['physai']['total_ms'] is not None))
        equal('tokens', ''.join(self.tokens), ''.join(self.responses))
        equal('responses', sorted(self.responses), sorted(
            text for number, text in texts.items() if reasons[number] != 'rejected'))
        for number, text in texts.items():
            pieces = self.pieces.get(number, [])
            equal(f'pieces of {number}', (len(pieces), ''.join(pieces)),
                  (results[number]['usage']['completion_tokens'], text))
        refused = Counter(result['id'] for number, result in results.items()
                          if reasons[number] == 'rejected')
        for id_, count in Counter(each.id for each in sent if each.wrong).items():
            if refused[id_] < count:
                wrong.append(f'{count} wrong requests of id {id_}, {refused[id_]} refused')
        for each in sent:
            if each.goal is not None:
                status, number, reason, text = each.goal
                equal(f'goal {each.id}', each.goal, (
                    # A goal that another client cancelled is ABORTED, not CANCELED.
                    status if (status, reason) == (6, 'cancelled') else STATUS.get(reason, 6),
                    number, reasons.get(number), texts.get(number)))
                equal(f'id of goal {number}', results.get(number, {}).get('id'), each.id)
            elif each.http is not None and each.id is not None:
                wrong += self._check_http(each.id, each.http)
        return wrong

    def _check_http(self, id_: str, heard: HttpAnswer) -> list[str]:
        """Compare an HTTP answer with the result; a client that left has only its beginning."""
        found = [result for result in self.results if result['id'] == id_]
        if len(found) != 1:
            return [f'{len(found)} results of {id_}, which came by HTTP']
        reason, text = (found[0]['physai']['finish_reason'],
                        found[0]['choices'][0]['message']['content'])
        if heard.status != 200 and reason == 'rejected':
            right = heard.status in (400, 404, 413, 429, 503)
        elif heard.end == '':
            right = text.startswith(heard.text)
        else:
            right = (heard.end, heard.text) == (reason, text)
            right = right and (heard.status == 200 or reason not in ANSWERED)
        return [] if right else [f'{id_} by HTTP: {heard} and {reason}, {text!r}']

    def figures(self) -> tuple[float, int, int]:
        """Return the resident memory of the node in MB, its threads and its file descriptors."""
        text = (self._process / 'status').read_text()
        return (int(re.search(r'VmRSS:\s*(\d+) kB', text)[1]) / 1e3,
                int(re.search(r'Threads:\s*(\d+)', text)[1]),
                len(os.listdir(self._process / 'fd')))

    def close(self) -> None:
        """End the clients and leave ROS."""
        for client in self._clients:
            client.send(0)
        self._node.destroy_node()

    def _on_token(self, message):
        values = _values(message)
        self.pieces[int(values['request_id'])].append(message.status[0].message)


class Begun:
    """The start of a part; as text, the time since then."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._begin = self._now()

    def __str__(self) -> str:
        took_s, node_s, soak_s = (
            now - before for now, before in zip(self._now(), self._begin, strict=True))
        return (f'{took_s:.0f} s; of the processor, the node took {node_s:.0f} s and the soak '
                f'{soak_s:.0f} s')

    def _now(self) -> tuple[float, float, float]:
        others = [os.getpid(), *(each.pid for each in multiprocessing.active_children())]
        return time.monotonic(), processor_s(self._probe.pid), sum(map(processor_s, others))


def processor_s(pid: int) -> float:
    """Return the CPU time of a process in seconds."""
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def _values(message) -> dict[str, str]:
    return {pair.key: pair.value for pair in message.status[0].values}


def _read(message) -> dict:
    def refuse(text):
        raise ValueError(f'{text} is not valid JSON')
    return json.loads(message.data, parse_constant=refuse)


def client(name: str, pipe: Connection, seed: int, port: int) -> None:
    """Run a client."""
    Client(name, pipe, seed, port).serve()


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(('127.0.0.1', 0)) as found:
        return found.getsockname()[1]


def grown(history: list[float]) -> float:
    """Return the growth since the first tenth as a fraction, with medians."""
    tenth = max(len(history) // 10, 1)
    before = sorted(history[tenth:2 * tenth] or history[:1])
    after = sorted(history[-tenth:])
    return after[len(after) // 2] / before[len(before) // 2] - 1


def main() -> int:
    """Run both parts and print the results; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--rounds', type=int, default=100, help='lifecycle rounds (%(default)s)')
    parser.add_argument('--requests', type=int, default=10000, help='requests (%(default)s)')
    parser.add_argument('--tokens', type=int, default=16, help='tokens an answer (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of what is sent (%(default)s)')
    arguments = parser.parse_args()
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    port = free_port()
    node = subprocess.Popen(
        [sys.executable, '-m', 'physai_decode.ros.process', '--ros-args', '--log-level', 'fatal',
         '-p', 'autostart:=false', '-p', f'http.port:={port}', '-p', f'queue.size:={QUEUE}',
         '-p', f'queue.max_request_bytes:={MAX_BYTES}',
         '-p', f'sampling.max_new_tokens:={arguments.tokens}'])
    processes, pipes = [], []
    spawn = multiprocessing.get_context('spawn')
    for name in 'abcdefgh'[:CLIENTS]:
        mine, its = spawn.Pipe()
        pipes.append(mine)
        processes.append(spawn.Process(target=client, args=(name, its, arguments.seed, port)))
        processes[-1].daemon = True
        processes[-1].start()
    rclpy.init()
    failures = []
    try:
        probe = Probe(node.pid, pipes)
        failures += rounds(probe, arguments.rounds)
        failures += requests(probe, arguments.requests, random.Random(arguments.seed))
        probe.close()
    finally:
        node.terminate()
        code = node.wait(30)
        rclpy.shutdown()
    if code:
        failures.append(f'the node ended with {code}')
    for failure in failures[:20]:
        print('FAILED:', failure[:2000])
    print('all well' if not failures else f'{len(failures)} failures')
    return 1 if failures else 0


def rounds(probe: Probe, count: int) -> list[str]:
    """Go through the lifecycle, with one request per client and round."""
    history, wrong, begun = [], [], Begun(probe)
    for _ in range(count):
        probe.change('configure', 'activate')
        wrong += probe.burst([1] * CLIENTS)
        probe.change('deactivate', 'cleanup')
        history.append(probe.figures())
    return wrong + resources(f'{count} lifecycle rounds', history, begun)


def requests(probe: Probe, count: int, chance: random.Random) -> list[str]:
    """Send bursts with both queue policies."""
    history, wrong, begun, first = [], [], Begun(probe), probe.last

    def meanwhile():
        """Disturb the node while it answers."""
        what = chance.random()
        probe.serve(0.1 * chance.random())
        if what < 0.1:
            probe.cancel()
            probe.done['cancels'] += 1
        elif what < 0.13:
            probe.done['transitions'] += 2
            probe.change('deactivate')
            probe.serve(0.05 * chance.random())
            probe.change('activate')
        elif what < 0.2:
            probe.set(sampling__temperature=chance.choice((0.0, 0.7)),
                      deadline__token_ms=chance.choice((0.0, 1.0)))
        elif what < 0.22:
            probe.stop(chance.uniform(0.3, 2.0))
            probe.done['stops'] += 1

    for policy, share in (('reject', count // 2), ('preempt', count)):
        probe.set(queue__policy=policy)
        probe.change('configure', 'activate')
        while (left := share - (probe.last - first)) > 0:
            sizes = [min(chance.randint(1, BURST), left // CLIENTS) for _ in range(CLIENTS)]
            wrong += probe.burst(sizes if any(sizes) else [left, *[0] * (CLIENTS - 1)], meanwhile)
            history.append(probe.figures())
        probe.change('deactivate', 'cleanup')
    for counts in (probe.sent, probe.reasons, probe.done):
        print(', '.join(f'{number} {name}' for name, number in counts.most_common()))
    return wrong + resources(f'{count} requests', history, begun)


def resources(what: str, history: list[tuple[float, int, int]], begun: Begun) -> list[str]:
    """Print the resources of a part; return those that grew."""
    if not history:
        return []
    print(f'{what} in {begun}')
    print(f'  {"of the node":<24} {"first":>8} {"a tenth":>8} {"last":>8}')
    tenth, wrong = max(len(history) // 10, 1), []
    for index, name in enumerate(('resident memory, MB', 'threads', 'file descriptors')):
        values = [each[index] for each in history]
        print(f'  {name:<24} {values[0]:8.0f} {values[tenth - 1]:8.0f} {values[-1]:8.0f}')
        if index == 0 and grown(values) > FLAT:
            wrong.append(f'{what}: {name} grew by {100 * grown(values):.1f} % after a tenth')
        if index > 0 and max(values[-tenth:]) > max(values[:2 * tenth]) + SPARE:
            wrong.append(f'{what}: {name} grew to {values[-1]}')
    sys.stdout.flush()
    return wrong


if __name__ == '__main__':
    sys.exit(main())
