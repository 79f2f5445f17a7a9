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
Compare the speed of the native engine on a CPU in two checkouts of this repository.

The weights are random, in a named shape. Each engine has its own process. The engines take turns,
round by round, so that other load on the machine affects all alike. For each engine, the table has
the minimum and median time per token and to the first token, the bytes that a step reads, the
memory of the process, and the speed-up:

    python3 tools/before_after.py ../before
    python3 tools/before_after.py ../before --shape qwen2.5-0.5b --engines none:bfloat16 gptq:auto
"""

import argparse
from contextlib import ExitStack
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ('none:float32', 'none:bfloat16', 'gptq:auto', 'awq:auto', 'w8a16:bfloat16')
PAUSE_S = 0.3       # lets the threads of the previous engine stop spinning


def main() -> int:
    """Run the rounds and print the table; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('before', type=Path, help='the other checkout')
    parser.add_argument('--shape', default='smollm2-135m')
    parser.add_argument('--engines', nargs='+', default=ENGINES, metavar='QUANTIZATION:DTYPE')
    parser.add_argument('--threads', type=int, default=0, help="0: torch's own choice")
    parser.add_argument('--prompt', type=int, default=128, metavar='TOKENS')
    parser.add_argument('--steps', type=int, default=20, help='of a round')
    parser.add_argument('--rounds', type=int, default=5)
    options = parser.parse_args()
    print(f'{options.shape}, {options.prompt} tokens before, {options.rounds} rounds of '
          f'{options.steps} steps; least and median ms')
    for each in options.engines:
        _compare(options, *each.split(':'))
    return 0


def _compare(options, quantization, dtype):
    sys.path.insert(0, str(ROOT))
    from physai_decode.benchmark import synthetic
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ended:
        synthetic.describe(Path(folder), options.shape, quantization)
        engines = [ended.enter_context(_Process(tree, folder, dtype, options))
                   for tree in (options.before, ROOT)]
        for _ in range(options.rounds):
            for engine in engines:
                time.sleep(PAUSE_S)
                engine.run()
        before, after = engines
        for name, engine in (('before', before), ('after', after)):
            print(f'{quantization:>6} {engine.facts["dtype"]:>8} {name:>6}: a token '
                  f'{_times(engine.steps)}, the first {_times(engine.firsts)}, '
                  f'{engine.facts["read"] / 1e6:.0f} MB read, '
                  f'{engine.facts["held"] / 1e6:.0f} MB held')
        print(f'{"":15} ratio: {min(before.steps) / min(after.steps):.2f} by the least, '
              f'{statistics.median(before.steps) / statistics.median(after.steps):.2f} by the '
              'median', flush=True)


def _times(found):
    return f'{min(found):.2f} {statistics.median(found):.2f}'


class _Process:
    """An engine of one checkout in its own process."""

    def __init__(self, tree, folder, dtype, options):
        self._process = subprocess.Popen(
            [sys.executable, __file__, '--engine', folder, dtype, str(options.threads),
             str(options.prompt), str(options.steps)],
            env={**os.environ, 'PYTHONPATH': str(tree.resolve())}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.firsts, self.steps = [], []
        self.facts = self._answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def run(self):
        """Run one round."""
        self._process.stdin.write('\n')
        self._process.stdin.flush()
        first, *steps = self._answer()
        self.firsts.append(first)
        self.steps += steps

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit('an engine ended early')
        return json.loads(line)


def _serve(folder, dtype, threads, prompt, steps):
    """Load an engine, then time one round per line of input."""
    from physai_decode import checkpoint
    from physai_decode.config import EngineConfig
    from physai_decode.config import SamplingConfig
    from physai_decode.engines.native import NativeEngine
    prompt, steps = int(prompt), int(steps)
    engine = NativeEngine(checkpoint.inspect(Path(folder)), EngineConfig(
        device='cpu', dtype=dtype, cpu_threads=int(threads), max_context=prompt + steps + 1))
    lines = Path('/proc/self/status').read_text().splitlines()
    status = dict(line.split(':', 1) for line in lines)
    print(json.dumps({'dtype': engine.footprint.dtype,
                      'read': engine.footprint.read_weight_bytes,
                      'held': 1024 * int(status['VmRSS'].split()[0])}), flush=True)
    ids = list(range(1, prompt + 1))
    for _ in sys.stdin:
        engine.rewind(0)
        times = [time.perf_counter()]
        engine.feed(ids)
        engine.first(SamplingConfig(), ids)
        times.append(time.perf_counter())
        for remaining in reversed(range(steps)):
            engine.step(remaining)
            times.append(time.perf_counter())
        print(json.dumps([1000 * (end - begin) for begin, end in zip(times, times[1:])]),
              flush=True)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--engine']:
        _serve(*sys.argv[2:])
    else:
        sys.exit(main())
