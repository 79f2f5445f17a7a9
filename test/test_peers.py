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

"""tools/peers.py, on programs that print what vLLM, llama-bench and gpt-fast print."""

import importlib
import json
from pathlib import Path
import re
import subprocess
import sys

import pytest

TOOLS = Path(__file__).resolve().parent.parent / 'tools'
VLLM = """
import time

__version__ = '9.8'
now_s = 0.0
time.perf_counter = lambda: now_s           # a busy machine changes no figure


class SamplingParams:
    def __init__(self, **settings):
        self.count = settings['max_tokens']


class Answer:
    def __init__(self, count):
        self.outputs, self.token_ids = [self], [0] * count


class LLM:
    def __init__(self, **settings):
        print('it logs before')

    def generate(self, prompt, settings, use_tqdm):
        assert len(prompt[0]['prompt_token_ids']) == 16
        global now_s
        now_s += 0.05 + 0.001 * settings.count
        return [Answer(settings.count)]


import atexit
atexit.register(print, 'and after')
"""
LLAMA_BENCH = """#!/bin/sh
test "$*" = "-m a.gguf -p 0 -n 8 -d 16 -r 2 -o json" || exit 3
echo '[{"build_commit": "b1", "n_gen": 8, "n_depth": 16, "samples_ts": [250.0, 200.0]}]'
"""
GPT_FAST = """
import sys
count = int(sys.argv[sys.argv.index('--max_new_tokens') + 1])
for token_s in (0.01, 0.02):
    total_s = 0.1 + count * token_s
    print(f'Time for inference 1: {total_s:.02f} sec total, {count / total_s} tokens/sec')
print('Average tokens/sec: 1.00')
"""


@pytest.fixture(scope='module')
def peers():
    """Import the tool."""
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module('peers')
    sys.path.remove(str(TOOLS))


@pytest.fixture
def run(peers, tmp_path, monkeypatch, capsys):
    """Return a function that runs the tool, and returns its exit code, rows and output."""
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', [
            'peers.py', '--model', 'builtin:tiny_planner', '--context', '16', '--tokens', '8',
            '--repeats', '2', '--out', str(tmp_path / 'out'), *arguments])
        code = peers.main()
        return (code, json.loads((tmp_path / 'out' / 'peers.json').read_text()),
                capsys.readouterr().out)

    return run


def test_measures_each_peer_with_its_own_command(peers, run, tmp_path, monkeypatch):
    (tmp_path / 'vllm.py').write_text(VLLM)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    (tmp_path / 'llama-bench').write_text(LLAMA_BENCH)
    (tmp_path / 'llama-bench').chmod(0o755)
    (tmp_path / 'generate.py').write_text(GPT_FAST)
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@localhost']
    subprocess.run([*git, 'init', '-q'], check=True)
    subprocess.run([*git, 'commit', '-q', '--allow-empty', '-m', 'first'], check=True)
    monkeypatch.setattr(peers, 'ours', lambda options: [
        peers.Row('native', '1.0', 'decode_bench', [2.0, 4.0])])
    code, rows, printed = run(
        '--vllm', sys.executable, '--llama-bench', str(tmp_path / 'llama-bench'), '--gguf',
        'a.gguf', '--gpt-fast', str(tmp_path), '--gpt-fast-model', 'model.pth')
    assert code == 0, rows
    assert [(row['name'], row['version']) for row in rows[:3]] == [
        ('native', '1.0'), ('vLLM', '9.8'), ('llama.cpp', 'b1')]
    assert rows[3]['name'] == 'gpt-fast' and re.fullmatch('[0-9a-f]{7,}', rows[3]['version'])
    assert rows[1]['token_ms'] == pytest.approx([1.0, 1.0])
    assert rows[2]['token_ms'] == [4.0, 5.0]
    # The fastest short answer takes 0.12 s, the long ones 0.2 and 0.3.
    assert rows[3]['token_ms'] == pytest.approx([80 / 8, 180 / 8])
    assert '--max_new_tokens 10' in rows[3]['command']
    assert '| llama.cpp | b1 | 4.500 | 1.50 |' in printed
    assert (tmp_path / 'out' / 'peers.png').stat().st_size > 1000


def test_a_peer_that_fails_has_a_row_with_the_reason(peers, run, monkeypatch):
    monkeypatch.setattr(peers, 'ours', lambda options: [
        peers.Row('native', '1.0', 'decode_bench', [2.0])])
    code, rows, printed = run('--llama-bench', '/bin/false', '--gguf', 'a.gguf',
                              '--gpt-fast', '/nonexistent', '--gpt-fast-model', 'model.pth')
    assert code == 1
    assert [row['token_ms'] for row in rows] == [[2.0], [], []]
    assert rows[1]['error'] == 'code 1: ' and "can't open file" in rows[2]['error']
    assert '| llama.cpp |  | n/a | n/a |' in printed and 'llama.cpp: code 1' in printed


@pytest.mark.slow
def test_measures_its_own_engines(run):
    """It runs decode_bench."""
    code, rows, _ = run('--engines', 'native')
    assert code == 0
    row, = rows
    assert row['name'] == 'native' and row['version']
    assert len(row['token_ms']) == 8 and all(each > 0 for each in row['token_ms'])
