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
Compare this package with its peers on one machine, model and context.

The engines of this package run in `decode_bench`. A peer runs with the command that its project
documents for decoding at batch 1: vLLM by its Python API in its own environment (`--vllm`),
llama.cpp by `llama-bench` on its own file of the model (`--llama-bench`, `--gguf`), gpt-fast by
`generate.py --compile` (`--gpt-fast`, `--gpt-fast-model`). A peer that was not given is left out;
one that fails is a row with the reason. The result is a Markdown table, on the terminal and in
`--out`, with the samples and commands as JSON and a plot.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
import json
from pathlib import Path
import re
import shlex
from statistics import median
import subprocess
import sys
from tempfile import TemporaryDirectory

from physai_decode.benchmark.table import Table

PATIENCE_S = 3600.0             # limit for one peer, including compilation
VLLM = """
import json, sys, time
import vllm
model, context, tokens, repeats = sys.argv[1], *map(int, sys.argv[2:5])
llm = vllm.LLM(model=model, max_model_len=context + tokens + 8, max_num_seqs=1,
               enable_prefix_caching=False, generation_config='vllm')
prompt = [{'prompt_token_ids': [5 + i % 200 for i in range(context)]}]

def seconds(count):
    settings = vllm.SamplingParams(
        temperature=0, ignore_eos=True, min_tokens=count, max_tokens=count)
    started = time.perf_counter()
    answer, = llm.generate(prompt, settings, use_tqdm=False)
    assert len(answer.outputs[0].token_ids) == count
    return time.perf_counter() - started

seconds(tokens)
print('PEER', json.dumps({'version': vllm.__version__, 'token_ms': [
    (seconds(tokens + 1) - seconds(1)) / tokens * 1e3 for _ in range(repeats)]}))
"""


@dataclass
class Row:
    """The result of one decoder; ``token_ms`` is empty if it failed."""

    name: str
    version: str
    command: str
    token_ms: list[float]
    error: str = ''


def main() -> int:
    """Time all decoders; return 0 if each has a result."""
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = ours(options)
    for given, peer in ((options.vllm, vllm), (options.llama_bench, llama_cpp),
                        (options.gpt_fast, gpt_fast)):
        if given:
            rows.append(peer(options))
    table = tabulate(rows, options.context)
    print(table.markdown())
    (options.out / 'peers.md').write_text(table.markdown())
    (options.out / 'peers.json').write_text(json.dumps([asdict(row) for row in rows], indent=1))
    draw(rows, options)
    return 0 if all(row.token_ms for row in rows) else 1


def ours(options: argparse.Namespace) -> list[Row]:
    """Time the engines of this package with `decode_bench`."""
    command = [sys.executable, '-m', 'physai_decode.bench', '--model', options.model,
               '--engines', *options.engines, '--contexts', str(options.context),
               '--steps', str(options.tokens)]
    with TemporaryDirectory() as out:       # decode_bench skips existing results
        subprocess.run([*command, '--out', out], check=True,
                       timeout=PATIENCE_S * len(options.engines))
        results = json.loads((Path(out) / 'results.json').read_text())['results']
    rows = []
    for result in results:
        case, machine = result['case'], result.get('machine', {})
        cell = next(iter(result.get('contexts', [])), {})
        error = result.get('error') or cell.get('error') or ''
        version = {'native': machine.get('physai_decode')}.get(
            case['engine']['name'], machine.get('packages', {}).get(case['engine']['name']))
        rows.append(Row(case['label'], version or '', shlex.join(command),
                        [] if error else [each * 1e3 for each in cell['itl_s']], error))
    return rows


def vllm(options: argparse.Namespace) -> Row:
    """Time vLLM by the difference of a long and a short answer, which excludes prefill."""
    command = [options.vllm, '-c', VLLM, options.model, str(options.context),
               str(options.tokens), str(options.repeats)]
    return _run('vLLM', command, _of_python)


def llama_cpp(options: argparse.Namespace) -> Row:
    """Time llama.cpp at a depth of ``context`` tokens, with a GGUF file of the same model."""
    command = [options.llama_bench, '-m', options.gguf, '-p', '0', '-n', str(options.tokens),
               '-d', str(options.context), '-r', str(options.repeats), '-o', 'json']
    return _run('llama.cpp', command, _of_llama_bench)


def gpt_fast(options: argparse.Namespace) -> Row:
    """Time gpt-fast by the difference of a long and a short answer: its rate counts the prompt."""
    def answer(count: int) -> Row:
        return _run('gpt-fast', [
            sys.executable, str(Path(options.gpt_fast) / 'generate.py'), '--compile',
            '--checkpoint_path', options.gpt_fast_model, '--prompt', str(options.context),
            '--max_new_tokens', str(count), '--num_samples', str(options.repeats)], _of_gpt_fast)

    least = 2       # with one token, it fails
    short, row = answer(least), answer(least + options.tokens)
    if short.token_ms and row.token_ms:
        start_ms = least * min(short.token_ms)      # the first may compile more
        row.token_ms = [((least + options.tokens) * each - start_ms) / options.tokens
                        for each in row.token_ms]
        row.version = _commit(options.gpt_fast)
    return row if short.token_ms else short


def _run(name: str, command: list[str], read: Callable[[str], tuple[str, list[float]]]) -> Row:
    shown = shlex.join(['...' if '\n' in part else part for part in command])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            return Row(name, '', shown, [], f'code {done.returncode}: {"".join(last)}')
        version, token_ms = read(done.stdout)
        return Row(name, version, shown, token_ms)
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError) as error:
        return Row(name, '', shown, [], f'{type(error).__name__}: {error}')


def _commit(clone: str) -> str:
    try:
        return subprocess.run(
            ['git', '--git-dir', str(Path(clone) / '.git'), 'rev-parse', '--short', 'HEAD'],
            capture_output=True, text=True).stdout.strip()
    except OSError:     # there is no git
        return ''


def _of_python(text: str) -> tuple[str, list[float]]:
    found = json.loads(text.rpartition('PEER ')[2].partition('\n')[0])
    return found['version'], found['token_ms']


def _of_llama_bench(text: str) -> tuple[str, list[float]]:
    test, = (each for each in json.loads(text) if each['n_gen'])
    return test['build_commit'], [1e3 / each for each in test['samples_ts']]


def _of_gpt_fast(text: str) -> tuple[str, list[float]]:
    rates = [float(each) for each in re.findall(r'([\d.]+) tokens/sec', text)]
    if not rates:
        raise ValueError('it printed no tokens/sec')
    return '', [1e3 / rate for rate in rates]      # it prints no version


def tabulate(rows: list[Row], context: int) -> Table:
    """Create the table, with ratios to the fastest engine of this package."""
    known = [median(row.token_ms) for row in rows if row.token_ms]
    table = Table(f'Batch 1 behind {context:,} tokens',
                  ['decoder', 'version', 'ms per token', 'to the first row'])
    for row in rows:
        if not row.token_ms:
            table.rows.append((row.name, row.version, 'n/a', 'n/a'))
            table.notes.append(f'{row.name}: {row.error}')
            continue
        value = median(row.token_ms)
        ratio = f'{value / median(rows[0].token_ms):.2f}' if rows[0].token_ms else 'n/a'
        table.rows.append((row.name, row.version, f'{value:.3f}', ratio))
    if known:
        table.notes.append('Medians; each command is in peers.json.')
    return table


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    """Write peers.png: a bar for each decoder, the shortest first."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    shown = sorted((row for row in rows if row.token_ms), key=lambda row: median(row.token_ms))
    if not shown:
        return
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(shown) + 1))
    bars = axes.barh([row.name for row in shown], [median(row.token_ms) for row in shown],
                     color='#0072B2')
    axes.bar_label(bars, fmt='%.2f', padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(f'ms per token, batch 1, behind {options.context:,} tokens')
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    figure.savefig(options.out / 'peers.png', dpi=130, bbox_inches='tight')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or '').strip().splitlines()[0])
    parser.add_argument('--model', required=True, help='builtin:NAME or a folder')
    parser.add_argument('--context', type=int, default=2048, help='tokens before (%(default)s)')
    parser.add_argument('--tokens', type=int, default=128, help='timed tokens (%(default)s)')
    parser.add_argument('--repeats', type=int, default=5, help='of each peer (%(default)s)')
    parser.add_argument('--engines', nargs='+', metavar='ENGINE',
                        default=['native', 'transformers', 'transformers:cuda_graph=true'],
                        help='as decode_bench names them; the ratio is to the first')
    parser.add_argument('--vllm', metavar='PYTHON', help='of an environment that has vLLM')
    parser.add_argument('--llama-bench', metavar='FILE', help="llama.cpp's llama-bench")
    parser.add_argument('--gguf', metavar='FILE', help='the model for llama-bench')
    parser.add_argument('--gpt-fast', metavar='FOLDER', help='a clone of gpt-fast')
    parser.add_argument('--gpt-fast-model', metavar='FILE', help='its converted checkpoint')
    parser.add_argument('--out', type=Path, default=Path('peers_out'), metavar='FOLDER')
    return parser


if __name__ == '__main__':
    sys.exit(main())
