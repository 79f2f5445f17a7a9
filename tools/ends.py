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
Stop the node during requests, repeatedly, and count the ends of requests that are not published.

Each run starts a node with a scripted engine, sends it 8 requests, including goals if
`~/generate` is built, and sends SIGTERM after some tokens. The end of each request must arrive on
`~/result`, `~/request_stats` and `~/response`, each goal must get its result, and the process must
end within ``--limit`` seconds with exit code 0. ``--busy`` processes load the cores meanwhile.
Each failed run prints a line; the exit code is then 1.
"""

import argparse
import json
import os
from pathlib import Path
import signal
import statistics
import subprocess
import sys
import time

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')

from diagnostic_msgs.msg import DiagnosticArray
from physai_decode.ros.interfaces import Generate
from physai_decode.ros.topics import stream_qos
import rclpy
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from std_msgs.msg import String

REQUESTS = 8
GOALS = 3 if Generate else 0    # of them
TOKENS = 3                      # before the signal
HEAR_S = 5.0                    # after that, for what is on its way
GOAL_S = 20.0                   # for a goal's answer
PATIENCE_S = 120.0              # against hangs
NODE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parent.parent / 'test')!r})
from node_rig import Loader
from physai_decode.ros.process import main
loader = Loader()
loader.step_s = 0.01
sys.exit(main(load=loader))
"""
PROMPT = 'Bring me the red cup, then close the box and put the book on the kitchen table.'


class Client:
    """Client of one node."""

    def __init__(self, name: str) -> None:
        self._node = rclpy.create_node(f'client_of_{name}')
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self.received: dict[str, list] = {'result': [], 'request_stats': [], 'response': [],
                                       'tokens': []}
        for topic, heard in self.received.items():
            kind = DiagnosticArray if topic == 'request_stats' else String
            self._node.create_subscription(kind, f'/{name}/{topic}', heard.append, stream_qos())
        self._info: list[DiagnosticArray] = []
        self._node.create_subscription(DiagnosticArray, '/diagnostics', self._info.append, 10)
        self._name = name
        self._request = self._node.create_publisher(String, f'/{name}/request', stream_qos())
        self._action = Generate and ActionClient(
            self._node, Generate, f'/{name}/generate', goal_service_qos_profile=stream_qos(),
            result_service_qos_profile=stream_qos())
        self.results: list = []

    def ready(self) -> bool:
        """Whether the node is idle and all its endpoints are connected."""
        return bool(
            self._request.get_subscription_count() and self._info
            and self._info[-1].status[2].values[0].value == 'idle'
            and all(self._node.count_publishers(f'/{self._name}/{topic}')
                    for topic in self.received)
            and (not Generate or self._action.server_is_ready()))

    def ask(self) -> bool:
        """
        Send all requests; return whether all goals were answered.

        DDS drops the answer if the node has not completely discovered the client.
        """
        for number in range(REQUESTS - GOALS):
            self._request.publish(String(data=json.dumps({'id': f'r{number}', 'prompt': PROMPT})))
        goals = [self._action.send_goal_async(Generate.Goal(prompt=PROMPT)) for _ in range(GOALS)]
        if not self.wait(lambda: all(goal.done() for goal in goals), GOAL_S):
            return False
        self.results = [goal.result().get_result_async() for goal in goals]
        return True

    def lost(self) -> str:
        """Return what has not arrived; empty if all has."""
        counts = {topic: len(heard) for topic, heard in self.received.items() if topic != 'tokens'}
        done = sum(result.done() for result in self.results)
        missing = [f'{REQUESTS - count} of {topic}' for topic, count in counts.items()
                   if count != REQUESTS]
        return ', '.join(missing + ([f'{GOALS - done} results of goals'] if done < GOALS else []))

    def wait(self, done, limit_s: float = PATIENCE_S) -> bool:
        """Spin until a condition holds or the time is over."""
        end_s = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > end_s:
                return False
            self._executor.spin_once(0.005)
        return True

    def close(self) -> None:
        """Destroy the node of the client."""
        self._node.destroy_node()


def run(name: str, limit_s: float) -> tuple[float, str] | None:
    """
    Return the time from the signal to the end of the process, and the failures.

    None if the requests could not be sent, so that the run is not valid.
    """
    client = Client(name)
    node = subprocess.Popen([
        sys.executable, '-c', NODE, '--ros-args', '-r', f'__node:={name}', '--log-level', 'fatal',
        '-p', 'diagnostics.period_s:=0.1'])
    try:
        if not client.wait(client.ready):
            return 0.0, 'it did not come up'
        if not client.ask():
            return None
        if not client.wait(lambda: len(client.received['tokens']) >= TOKENS):
            return 0.0, 'no tokens came'
        begin_s = time.monotonic()
        node.send_signal(signal.SIGTERM)
        client.wait(lambda: node.poll() is not None)
        took_s = time.monotonic() - begin_s
        client.wait(lambda: not client.lost(), HEAR_S)
        wrong = [f'lost: {lost}'] if (lost := client.lost()) else []
        if took_s > limit_s:
            wrong.append(f'it took {took_s:.2f} s')
        if node.returncode:
            wrong.append(f'exit code {node.returncode}')
        return took_s, '; '.join(wrong)
    finally:
        node.kill()
        node.wait()
        client.close()


def main() -> int:
    """Run all and print failures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n', 1)[0])
    parser.add_argument('--runs', type=int, default=200, help='nodes to end (%(default)s)')
    parser.add_argument('--busy', type=int, default=os.cpu_count(),
                        help='processes that take a core each (the number of cores)')
    parser.add_argument('--limit', type=float, default=2.0,
                        help='seconds from the signal to the end of the process (%(default)s)')
    arguments = parser.parse_args()
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass'])
            for _ in range(arguments.busy)]
    rclpy.init()
    times, failures, starts = [], 0, 0
    try:
        while len(times) < arguments.runs and starts < 2 * arguments.runs:
            outcome = run(f'ending_{starts}', arguments.limit)
            starts += 1
            if outcome is None:
                continue
            number, (took_s, wrong) = len(times), outcome
            times.append(took_s)
            if wrong:
                failures += 1
                print(f'run {number}: {wrong}', flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
        rclpy.shutdown()
    if starts > len(times):
        print(f'{starts - len(times)} more where the answer to a goal was lost before the signal')
    print(f'{len(times)} runs, {failures} with something wrong; from the signal to the end '
          f'{statistics.median(times):.2f} s (median), {max(times):.2f} s (most)')
    return 1 if failures or len(times) < arguments.runs else 0


if __name__ == '__main__':
    sys.exit(main())
