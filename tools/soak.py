"""
Run the node for long, and count what could get lost.

A node of its own process goes through lifecycle rounds, then answers requests in bursts, with
cancels, refusals and, in the second half, preemptions among them. Every prompt must have exactly
one ~/request_stats, every accepted one exactly one ~/response, ~/tokens joined must be ~/response,
and the node's resident memory must stay flat. Prints what it saw; exit code 1 where any of it does
not hold.
"""

import argparse
from collections import Counter
import os
from pathlib import Path
import random
import re
import subprocess
import sys
import time

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from physai_decode.ros.topics import stream_qos
from rcl_interfaces.srv import SetParameters
import rclpy
from rclpy.parameter import Parameter
from std_msgs.msg import String
from std_srvs.srv import Trigger

BURST = 64              # prompts at once
QUEUE = 4               # of which this many may wait
PATIENCE_S = 120.0      # against hangs
FLAT = 0.03             # resident memory may grow by this fraction after the first tenth
VERBS = ('bring', 'fetch', 'take', 'put')
THINGS = ('cup', 'box', 'bottle', 'book')


class Probe:
    """Talks to the node and keeps what it says until it is counted."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._node = rclpy.create_node('soak')
        self.tokens: list[str] = []
        self.responses: list[str] = []
        self.pieces: dict[str, str] = {}
        self.ends: list[dict[str, str]] = []
        self._node.create_subscription(
            String, '/decode/tokens', lambda message: self.tokens.append(message.data),
            stream_qos())
        self._node.create_subscription(
            DiagnosticArray, '/decode/token_stats', self._on_token, stream_qos())
        self._node.create_subscription(
            String, '/decode/response', lambda message: self.responses.append(message.data),
            stream_qos())
        self._node.create_subscription(
            DiagnosticArray, '/decode/request_stats', self._on_request, stream_qos())
        self._prompt = self._node.create_publisher(String, '/decode/prompt', stream_qos())
        self._clients = {
            name: self._node.create_client(kind, f'/decode/{name}') for name, kind in (
                ('change_state', ChangeState), ('cancel', Trigger),
                ('set_parameters', SetParameters))}
        for client in self._clients.values():
            if not client.wait_for_service(PATIENCE_S):
                sys.exit('the node did not come up')
        self.wait(self._prompt.get_subscription_count)

    def wait(self, done) -> None:
        """Serve callbacks until something is so."""
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > end_s:
                sys.exit(f'no answer from the node within {PATIENCE_S:g} s; so far: {self.ends}')
            rclpy.spin_once(self._node, timeout_sec=0.1)

    def serve(self, seconds: float) -> None:
        """Serve callbacks for a while."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            rclpy.spin_once(self._node, timeout_sec=left_s)

    def call(self, name, request):
        """Call a service of the node."""
        future = self._clients[name].call_async(request)
        self.wait(future.done)
        return future.result()

    def change(self, *labels: str) -> None:
        """Go through transitions."""
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

    def send(self, text: str) -> None:
        """Send a prompt."""
        self._prompt.publish(String(data=text))

    def cancel(self) -> None:
        """Cancel what runs and waits."""
        self.call('cancel', Trigger.Request())

    def resident_mb(self) -> float:
        """Give the node's resident memory."""
        text = Path(f'/proc/{self._pid}/status').read_text()
        return int(re.search(r'VmRSS:\s*(\d+) kB', text)[1]) / 1e3

    def close(self) -> None:
        """Leave ROS."""
        self._node.destroy_node()

    def _on_token(self, message):
        status = message.status[0]
        self.pieces[status.values[0].value] = self.pieces.get(
            status.values[0].value, '') + status.message

    def _on_request(self, message):
        self.ends.append({pair.key: pair.value for pair in message.status[0].values})


def burst(probe: Probe, chance: random.Random, count: int, cancels: bool) -> list[str]:
    """Send prompts at once, perhaps cancel, wait for all to end; give what was wrong."""
    for _ in range(count):
        probe.send('' if chance.random() < 0.03 else
                   f'{chance.choice(VERBS)} the {chance.choice(THINGS)} {chance.randrange(1000)}')
    if cancels and chance.random() < 0.3:
        probe.serve(chance.random() * 0.05)
        probe.cancel()
    probe.wait(lambda: len(probe.ends) >= count)
    accepted = [end for end in probe.ends if end['finish_reason'] != 'rejected']
    probe.wait(lambda: len(probe.responses) >= len(accepted)
               and len(probe.tokens) >= sum(int(end['output_tokens']) for end in accepted)
               and sum(map(len, probe.pieces.values())) >= sum(map(len, probe.responses)))
    wrong = []
    if len({end['request_id'] for end in probe.ends}) != count:
        wrong.append(f'{count} prompts, ends of {[end["request_id"] for end in probe.ends]}')
    if len(probe.responses) != len(accepted):
        wrong.append(f'{len(accepted)} accepted, {len(probe.responses)} responses')
    if ''.join(probe.tokens) != ''.join(probe.responses):
        wrong.append(f'tokens {probe.tokens} are not responses {probe.responses}')
    for end, response in zip(accepted, probe.responses):
        if probe.pieces.get(end['request_id'], '') != response:
            wrong.append(f'pieces of request {end["request_id"]} are not {response!r}')
    return wrong


def grown(history: list[float]) -> float:
    """Give the growth since the first tenth, as a fraction; medians against the noise."""
    tenth = max(len(history) // 10, 1)
    before = sorted(history[tenth:2 * tenth] or history[:1])
    after = sorted(history[-tenth:])
    return after[len(after) // 2] / before[len(before) // 2] - 1


def main() -> int:
    """Run both parts and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--rounds', type=int, default=300, help='lifecycle rounds (%(default)s)')
    parser.add_argument('--requests', type=int, default=5000, help='requests (%(default)s)')
    parser.add_argument('--tokens', type=int, default=16, help='tokens an answer (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of what is sent (%(default)s)')
    arguments = parser.parse_args()
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    node = subprocess.Popen(
        [sys.executable, '-m', 'physai_decode.ros.process', '--ros-args', '--log-level', 'fatal',
         '-p', 'autostart:=false', '-p', f'queue.size:={QUEUE}',
         '-p', f'sampling.max_new_tokens:={arguments.tokens}'])
    rclpy.init()
    failures = []
    try:
        probe = Probe(node.pid)
        failures += rounds(probe, arguments.rounds)
        failures += requests(probe, arguments.requests, random.Random(arguments.seed))
        probe.close()
    finally:
        node.terminate()
        code = node.wait(30)
        rclpy.shutdown()
    if code:
        failures.append(f'the node ended with {code}')
    for failure in failures:
        print('FAILED:', failure)
    print('all well' if not failures else f'{len(failures)} failures')
    return 1 if failures else 0


def rounds(probe: Probe, count: int) -> list[str]:
    """Go through the lifecycle, with one request a round."""
    memory, wrong, begin_s = [], [], time.monotonic()
    for index in range(count):
        probe.change('configure', 'activate')
        wrong += burst(probe, random.Random(index), 1, cancels=False)
        forget(probe)
        probe.change('deactivate', 'cleanup')
        memory.append(probe.resident_mb())
    if count:
        wrong += told(f'{count} lifecycle rounds', memory, begin_s)
    return wrong


def requests(probe: Probe, count: int, chance: random.Random) -> list[str]:
    """Send bursts under both policies."""
    memory, wrong, begin_s, reasons, sent = [], [], time.monotonic(), Counter(), 0
    for policy, share in (('reject', count // 2), ('preempt', count)):
        probe.set(queue__policy=policy)
        probe.change('configure', 'activate')
        while sent < share:
            size = min(chance.randint(1, BURST), share - sent)
            wrong += burst(probe, chance, size, cancels=True)
            reasons.update(end['finish_reason'] for end in probe.ends)
            sent += size
            forget(probe)
            memory.append(probe.resident_mb())
        probe.change('deactivate', 'cleanup')
    if count:
        print(f'{sent} requests: ' + ', '.join(f'{n} {reason}' for reason, n in
                                               reasons.most_common()))
        wrong += told(f'{count} requests', memory, begin_s)
    return wrong


def told(what: str, memory: list[float], begin_s: float) -> list[str]:
    """Print a part's time and memory; give what is wrong with the memory."""
    growth = grown(memory)
    print(f'{what} in {time.monotonic() - begin_s:.0f} s; resident memory of the node '
          f'{memory[0]:.0f} MB at first, {memory[len(memory) // 10]:.0f} MB after a tenth, '
          f'{memory[-1]:.0f} MB at the end ({100 * growth:+.1f} % since)', flush=True)
    return [f'{what}: memory grew by {100 * growth:.1f} %'] if growth > FLAT else []


def forget(probe: Probe) -> None:
    """Begin to count anew."""
    for kept in (probe.tokens, probe.responses, probe.pieces, probe.ends):
        kept.clear()


if __name__ == '__main__':
    sys.exit(main())
