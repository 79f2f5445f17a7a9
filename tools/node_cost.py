"""
Measure what the node adds to each token.

The embedded model answers the same prompts three times: the engine alone; through the node with a
subscriber of ~/tokens in another process; and with a subscriber of all four topics of a token.
Printed are the time from a token known to the engine until the subscriber has it, the time that
publishing a token takes the decode thread, and the rates. Clocks are monotonic and shared by the
processes of one machine.
"""

import argparse
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

from diagnostic_msgs.msg import DiagnosticArray         # noqa: E402
from physai_decode import node                          # noqa: E402
from physai_decode.config import DecodeConfig           # noqa: E402
from physai_decode.config import EngineConfig           # noqa: E402
from physai_decode.timing import percentile             # noqa: E402
from physai_decode.topics import stream_qos             # noqa: E402
import rclpy                                            # noqa: E402
from std_msgs.msg import Float64                        # noqa: E402
from std_msgs.msg import String                         # noqa: E402

PATIENCE_S = 120.0
THREADS = 1             # of the engine: the subscriber needs a core too
PROMPTS = [f'please {verb} the {colour} {thing} to the {place}'
           for verb in ('bring', 'take') for colour in ('red', 'blue', 'green')
           for thing in ('cup', 'box', 'book') for place in ('kitchen', 'office')]


class Timed:
    """An engine that notes when it knew each token."""

    def __init__(self, engine) -> None:
        self._engine = engine
        self.footprint = engine.footprint
        self.known_s: list[float] = []

    def stream(self, prompt_ids, sampling):
        """Yield the engine's steps, each token's time noted."""
        for step in self._engine.stream(prompt_ids, sampling):
            now_s = time.monotonic()
            self.known_s += [now_s for token_id in step.token_ids
                             if token_id not in self.footprint.eos_token_ids]
            yield step

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def serve(path: Path) -> int:
    """Run the node until a signal, then write when its engine knew the tokens."""
    engines = []

    def load(config, progress):
        loaded = node.load(config, progress)
        engines.append(Timed(loaded.engine))
        return loaded._replace(engine=engines[0])

    code = node.main(['decode_node', '--ros-args', '--log-level', 'warn',
                      '-p', f'engine.cpu_threads:={THREADS}'], load)
    path.write_text(json.dumps(engines[0].known_s))
    return code


def alone(path: Path) -> int:
    """Answer the prompts without the node; write the times between tokens."""
    config = DecodeConfig(engine=EngineConfig(cpu_threads=THREADS))
    engine, text, _ = node.load(config, lambda line: None)
    itl_s = []
    for prompt in PROMPTS:
        timed = Timed(engine)
        for step in timed.stream(text.encode(prompt), config.sampling):
            if set(step.token_ids) & set(engine.footprint.eos_token_ids):
                break
        itl_s += differences(timed.known_s)
    path.write_text(json.dumps(itl_s))
    return 0


def through(folder: Path, topics: list[str]) -> dict[str, list[float]]:
    """Answer the prompts through a node; give latency, publishing times and times between tokens."""
    path = folder / 'known.json'
    process = subprocess.Popen([sys.executable, __file__, '--serve', str(path)])
    rclpy.init()
    probe = rclpy.create_node('node_cost')
    heard_s: list[float] = []
    ends: list[DiagnosticArray] = []
    publish_s: list[float] = []
    answers = [0]

    def on_token(message):
        heard_s.append(time.monotonic())

    def on_token_stats(message):
        value = message.status[0].values[7].value
        if value != 'n/a':
            publish_s.append(float(value) / 1e3)

    def wait(done):
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > end_s:
                sys.exit('no answer from the node')
            rclpy.spin_once(probe, timeout_sec=0.1)

    try:
        probe.create_subscription(String, '/decode/tokens', on_token, stream_qos())
        if 'token_stats' in topics:
            probe.create_subscription(
                DiagnosticArray, '/decode/token_stats', on_token_stats, stream_qos())
            for topic in ('itl_ms', 'r_floor'):
                probe.create_subscription(
                    Float64, f'/decode/{topic}', lambda message: None, stream_qos())
        probe.create_subscription(DiagnosticArray, '/decode/request_stats', ends.append, 100)
        states: list[str] = []
        probe.create_subscription(
            DiagnosticArray, '/diagnostics',
            lambda message: states.append(message.status[2].values[0].value), 10)
        prompt = probe.create_publisher(String, '/decode/prompt', 10)
        wait(lambda: states and states[-1] == 'idle' and prompt.get_subscription_count())
        for text in PROMPTS:
            prompt.publish(String(data=text))
            answers[0] += 1
            wait(lambda: len(ends) == answers[0])
            values = {pair.key: pair.value for pair in ends[-1].status[0].values}
            answers.append(answers[-1] + int(values['output_tokens'])
                           if len(answers) > 1 else int(values['output_tokens']))
            wait(lambda: len(heard_s) == answers[-1])
    finally:
        process.terminate()
        process.wait(30)
        probe.destroy_node()
        rclpy.shutdown()
    known_s = json.loads(path.read_text())
    starts = [0, *answers[1:]]
    itl_s = [gap for begin, end in zip(starts, starts[1:])
             for gap in differences(known_s[begin:end])]
    return {'latency_s': [heard - known for heard, known in zip(heard_s, known_s, strict=True)],
            'publish_s': publish_s, 'itl_s': itl_s}


def differences(times_s: list[float]) -> list[float]:
    """Give the times between neighbours."""
    return [later - earlier for earlier, later in zip(times_s, times_s[1:])]


def told(samples_s: list[float]) -> str:
    """Write median and 99th percentile in microseconds."""
    ordered = sorted(samples_s)
    return (f'median {1e6 * percentile(ordered, 50):6.0f} us, p99 '
            f'{1e6 * percentile(ordered, 99):6.0f} us  ({len(ordered)} tokens)')


def cpu() -> str:
    """Name the processor."""
    for line in Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.partition(':')[2].strip()
    return platform.machine()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--serve', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--alone', type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    if arguments.alone:
        return alone(arguments.alone)
    print(f'{cpu()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, '--alone', str(folder / 'alone.json')],
                       check=True)
        alone_s = json.loads((folder / 'alone.json').read_text())
        rate = 1 / (sum(alone_s) / len(alone_s))
        print(f'engine alone               {rate:6.0f} tokens/s; between tokens {told(alone_s)}')
        for label, topics in (('~/tokens', []), ('all four', ['token_stats'])):
            found = through(folder, topics)
            mean_s = sum(found['itl_s']) / len(found['itl_s'])
            print(f'\nthrough the node, subscriber of {label}')
            print(f'  rate                     {1 / mean_s:6.0f} tokens/s, '
                  f'{100 / mean_s / rate:.1f} % of the engine alone')
            print(f'  between tokens           {told(found["itl_s"])}')
            print(f'  engine to subscriber     {told(found["latency_s"])}')
            if found['publish_s']:
                print(f'  publishing with figures  {told(found["publish_s"])}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
