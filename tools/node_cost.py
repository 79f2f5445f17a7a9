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
Measure the overhead of the node per token.

A model, by default the embedded one, answers the same prompts three times: the engine alone; the
node with a subscriber of ~/tokens in another process; and the node with a subscriber of all four
topics of a token. The output has the latency from the engine to the subscriber, the time that the
decode thread takes to publish a token, and the token rates of engine and subscriber. The clock is
monotonic and common to all processes of a machine.
"""

import argparse
from itertools import accumulate
import json
import os
from pathlib import Path
import platform
import subprocess
import sys
import tempfile
import time

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))

from diagnostic_msgs.msg import DiagnosticArray
from physai_decode import host
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import ModelConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.histogram import percentile
from physai_decode.request import Message
from physai_decode.ros import process
from physai_decode.ros.messages import NOT_KNOWN
from physai_decode.ros.topics import stream_qos
import rclpy
from std_msgs.msg import Float64
from std_msgs.msg import String

PATIENCE_S = 120.0
THREADS = 1             # of the engine; the subscriber needs a core too
PROMPTS = [f'please {verb} the {colour} {thing} to the {place}'
           for verb in ('bring', 'take') for colour in ('red', 'blue', 'green')
           for thing in ('cup', 'box', 'book') for place in ('kitchen', 'office')]


class Timed:
    """An engine that records the time of each token and writes the times after each answer."""

    def __init__(self, engine, path: Path) -> None:
        self._engine = engine
        self._path = path
        self.footprint = engine.footprint
        self.known_s: list[float] = []

    def __getattr__(self, name):
        """Return an attribute of the engine."""
        return getattr(self._engine, name)

    def first(self, sampling, prompt_ids, constraint=None):
        """Sample the first token and record its time."""
        self._end = len(self.known_s) + sampling.max_new_tokens
        return self._noted(self._engine.first(sampling, prompt_ids, constraint))

    def step(self, remaining):
        """Sample the next token and record its time."""
        return self._noted(self._engine.step(remaining))

    def _noted(self, choice):
        ended = choice.token_id in self.footprint.eos_token_ids
        if not ended:
            self.known_s.append(time.monotonic())
        if ended or len(self.known_s) == self._end:
            self._path.write_text(json.dumps(self.known_s))
        return choice

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def config_of(arguments) -> DecodeConfig:
    """Return the settings of the engine, alone and in the node."""
    return DecodeConfig(model=ModelConfig(path=arguments.model),
                        engine=EngineConfig(cpu_threads=THREADS),
                        sampling=SamplingConfig(max_new_tokens=arguments.tokens))


def serve(path: Path, config: DecodeConfig) -> int:
    """Run the node until a signal; its engine writes the times of tokens."""
    def load(config, progress):
        loaded = host.load(config, progress)
        return loaded._replace(engine=Timed(loaded.engine, path))

    return process.main(['decode_node', '--ros-args', '--log-level', 'warn',
                      '-p', f'model.path:={config.model.path}',
                      '-p', f'engine.cpu_threads:={config.engine.cpu_threads}',
                      '-p', f'sampling.max_new_tokens:={config.sampling.max_new_tokens}'], load)


def alone(path: Path, config: DecodeConfig) -> int:
    """Answer the prompts without the node; write the inter-token latencies."""
    engine, text, _ = host.load(config, lambda line: None)
    itl_s = []
    for prompt in PROMPTS:
        timed = Timed(engine, path)
        asked = [Message('user', prompt)]
        for step in DecodeLoop(timed).stream(text.encode(asked), config.sampling):
            if set(step.token_ids) & set(engine.footprint.eos_token_ids):
                break
        itl_s += differences(timed.known_s)
    path.write_text(json.dumps(itl_s))
    return 0


class Probe:
    """Sends prompts and records the time of each token."""

    def __init__(self, with_figures: bool) -> None:
        self.node = rclpy.create_node('node_cost')
        self.heard_s: list[float] = []
        self.publish_s: list[float] = []
        self.output_tokens: list[int] = []      # of each request
        self.state = ''
        self._sent = 0
        self.node.create_subscription(
            String, '/decode/tokens', lambda message: self.heard_s.append(time.monotonic()),
            stream_qos())
        if with_figures:
            self.node.create_subscription(
                DiagnosticArray, '/decode/token_stats', self._on_token_stats, stream_qos())
            for topic in ('itl_ms', 'r_floor'):
                self.node.create_subscription(
                    Float64, f'/decode/{topic}', lambda message: None, stream_qos())
        self.node.create_subscription(
            DiagnosticArray, '/decode/request_stats', self._on_request_stats, 100)
        self.node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, 10)
        self.prompt = self.node.create_publisher(String, '/decode/prompt', 10)

    def ask_all(self) -> None:
        """Send each prompt after the previous answer has arrived."""
        self.wait(lambda: self.state == 'idle' and self.prompt.get_subscription_count())
        for text in PROMPTS:
            self._sent += 1
            self.prompt.publish(String(data=text))
            self.wait(lambda: len(self.output_tokens) == self._sent
                      and len(self.heard_s) == sum(self.output_tokens))

    def wait(self, done) -> None:
        """Spin until a condition holds."""
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > end_s:
                sys.exit(f'no answer from the node ({self.state}) within {PATIENCE_S:g} s; tokens '
                         f'of the answers so far {self.output_tokens}, heard {len(self.heard_s)}')
            rclpy.spin_once(self.node, timeout_sec=0.1)

    def _on_token_stats(self, message):
        value = values(message)['publish_ms']
        if value != NOT_KNOWN:
            self.publish_s.append(float(value) / 1e3)

    def _on_request_stats(self, message):
        self.output_tokens.append(int(values(message)['output_tokens']))

    def _on_diagnostics(self, message):
        self.state = values(message, 2)['state']


def values(message: DiagnosticArray, index: int = 0) -> dict[str, str]:
    """Return the values of one status."""
    return {pair.key: pair.value for pair in message.status[index].values}


def through(folder: Path, with_figures: bool, own: list[str]) -> dict[str, list[float]]:
    """Answer the prompts through a node; return latencies, inter-token and publishing times."""
    path = folder / 'known.json'
    process = subprocess.Popen([sys.executable, __file__, '--serve', str(path), *own])
    rclpy.init()
    probe = Probe(with_figures)
    try:
        probe.ask_all()
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            print('the node has not ended 30 s after SIGTERM')
            process.kill()
            process.wait()
        probe.node.destroy_node()
        rclpy.shutdown()
    known_s = json.loads(path.read_text())
    ends = list(accumulate(probe.output_tokens))
    return {
        'latency_s': [heard - known for heard, known in zip(probe.heard_s, known_s, strict=True)],
        'publish_s': probe.publish_s,
        'itl_s': [gap for begin, end in zip([0, *ends], ends)
                  for gap in differences(probe.heard_s[begin:end])]}


def differences(times_s: list[float]) -> list[float]:
    """Return the differences of successive times."""
    return [later - earlier for earlier, later in zip(times_s, times_s[1:])]


def summary(samples_s: list[float]) -> str:
    """Format median and 99th percentile in microseconds."""
    ordered = sorted(samples_s)
    return (f'median {1e6 * percentile(ordered, 50):6.0f} us, p99 '
            f'{1e6 * percentile(ordered, 99):6.0f} us  ({len(ordered)} tokens)')


def cpu() -> str:
    """Return the name of the CPU."""
    for line in Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.partition(':')[2].strip()
    return platform.machine()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--serve', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--alone', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--model', default=ModelConfig.path, help='as the parameter model.path')
    parser.add_argument('--tokens', type=int, default=SamplingConfig.max_new_tokens,
                        help='tokens of an answer at most')
    arguments = parser.parse_args()
    config = config_of(arguments)
    if arguments.serve:
        return serve(arguments.serve, config)
    if arguments.alone:
        return alone(arguments.alone, config)
    own = ['--model', arguments.model, '--tokens', str(arguments.tokens)]
    print(f'{cpu()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, '--alone', str(folder / 'alone.json'), *own],
                       check=True)
        alone_s = json.loads((folder / 'alone.json').read_text())
        rate = 1 / (sum(alone_s) / len(alone_s))
        print(f'engine alone               {rate:6.0f} tokens/s; between tokens '
              f'{summary(alone_s)}')
        for label, with_figures in (('~/tokens', False), ('all four', True)):
            found = through(folder, with_figures, own)
            mean_s = sum(found['itl_s']) / len(found['itl_s'])
            print(f'\nthrough the node, subscriber of {label}')
            print(f'  rate                     {1 / mean_s:6.0f} tokens/s, '
                  f'{100 / mean_s / rate:.1f} % of the engine alone')
            print(f'  between tokens heard     {summary(found["itl_s"])}')
            print(f'  engine to subscriber     {summary(found["latency_s"])}')
            if found['publish_s']:
                print(f'  publishing with figures  {summary(found["publish_s"])}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
