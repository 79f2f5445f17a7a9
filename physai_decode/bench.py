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
``decode_bench``: times engines on a model or on random weights of a named shape, without ROS.

It measures each engine in a separate process, prints tables, and writes JSON, Markdown, plots and
one HTML page. It measures only speed; the tests check correctness.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
import json
from pathlib import Path
import shlex
import signal
import sys
import time

from physai_decode.benchmark import compare
from physai_decode.benchmark import neighbour
from physai_decode.benchmark import report
from physai_decode.benchmark import suites
from physai_decode.benchmark import synthetic
from physai_decode.benchmark.case import Case
from physai_decode.benchmark.case import ModelSource
from physai_decode.benchmark.case import parse_engine
from physai_decode.benchmark.case import parse_sampling
from physai_decode.benchmark.runner import Result
from physai_decode.benchmark.runner import Runner
from physai_decode.benchmark.table import Table
from physai_decode.config import check
from physai_decode.config import ConfigError
from physai_decode.config import EngineConfig
from physai_decode.config import PaceConfig
from physai_decode.constraint import check_schema
from physai_decode.constraint import ConstraintError
from physai_decode.pip_command import install

PROMPTS = (16, 128, 512, 2048)
CONTEXTS = (2048, 4096, 8192, 16384)
_EPILOG = """\
An engine is NAME or NAME:setting=value,... with the settings of the parameter group engine, such
as native:cuda_graph=false. `transformers` without settings runs eager steps, without a CUDA graph.

examples:
  decode_bench --model builtin:tiny_planner --engines native transformers --contexts 128 512
  decode_bench --synthetic qwen2.5-7b --engines native transformers --kernels
  decode_bench --sampling temperature=0.8 temperature=0.8,top_p=0.9,top_k=40
  decode_bench --constraint plan --contexts 512
  decode_bench --synthetic llama-3.2-1b --prefill
  decode_bench --synthetic qwen2.5-7b --ab native:cuda_graph=false native --sessions 10
  decode_bench --paper --out paper
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 if nothing was measured, or 2 for an invalid argument."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.write_checkpoint:
            return _write_checkpoint(options)
        cases = _cases(options)
        runner = _runner(options)
    except (ConfigError, ConstraintError, ValueError, OSError) as error:
        print(f'decode_bench: {error}', file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):      # so that no session outlives its runner
        if signal.getsignal(number) is not signal.SIG_IGN:              # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    out = options.out
    try:
        results = runner.run(cases)
    except KeyboardInterrupt:
        print(f'interrupted; to resume, run the same command with --out {out}'
              f'{" and without --again" * options.again}', file=sys.stderr)
        return 130
    finally:
        if not options.keep_checkpoints:
            runner.forget_checkpoints()
    report.same_peak(results)
    report.same_operations(results)
    tables = _tables(options, results)
    print('\n' + '\n'.join(table.text() for table in tables))
    argv = sys.argv[1:] if arguments is None else arguments
    head = {'command': shlex.join(['decode_bench', *argv]),
            'model': '; '.join(dict.fromkeys(str(case.source) for case in cases)),
            'date': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}
    report.write(out, head, tables, results, _plots(results, out))
    print(f'written to {out}: results.json, report.md, report.html')
    for warning in report.unsteady(results):
        print(f'decode_bench: {warning}', file=sys.stderr)
    if report.cells(results):
        return 0
    reasons = dict.fromkeys(
        str(each['error']) for result in results for each in (result, *result['contexts'])
        if 'error' in each)
    print(f'decode_bench: nothing was measured: {"; ".join(reasons)}', file=sys.stderr)
    return 1


def _folder(text: str) -> Path:
    """Parse a folder; a shell does not expand ``~`` in ``--out=~/results``."""
    return Path(text).expanduser()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='decode_bench', description='Times engines on a model or on random weights of a '
        'named shape, without ROS.', epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group('model')
    model.add_argument('--model', default='', help='builtin:NAME, a folder or a hub id '
                       '(default: builtin:tiny_planner)')
    model.add_argument('--synthetic', default='', choices=synthetic.SHAPES, metavar='SHAPE',
                       help=f'random weights of a shape: {", ".join(synthetic.SHAPES)} '
                       f'(default of --paper and --targets: {suites.SHAPE})')
    model.add_argument('--quantization', nargs='+', default=['none'], metavar='FORMAT',
                       choices=synthetic.QUANTIZATIONS,
                       help='quantisation of the random weights: '
                       f'{", ".join(synthetic.QUANTIZATIONS)}')
    model.add_argument('--seed', type=int, default=0, help='seed of the random weights')
    model.add_argument('--write-checkpoint', type=_folder, metavar='DIR',
                       help='write a folder with the random weights in safetensors, and exit')
    model.add_argument('--shapes-only', action='store_true',
                       help='with --write-checkpoint: write no weights; the engine creates them')
    what = parser.add_argument_group('measurement')
    mode = what.add_mutually_exclusive_group()
    mode.add_argument('--engines', nargs='+', default=['native', 'transformers'],
                      metavar='ENGINE', help='engines to measure (default: native transformers)')
    mode.add_argument('--ab', nargs=2, metavar=('A', 'B'),
                      help='compare two engines in alternating fresh processes')
    mode.add_argument('--paper', action='store_true',
                      help=f'run the protocol of {suites.PAPER} and compare with its figures')
    mode.add_argument('--targets', action='store_true',
                      help='check the targets of the native engine on a fast GPU')
    what.add_argument('--sessions', type=int, default=10, metavar='N',
                      help='sessions per side of --ab (%(default)s)')
    what.add_argument('--contexts', nargs='+', type=int, default=None, metavar='TOKENS',
                      help=f'contexts to measure (default: {" ".join(map(str, CONTEXTS))})')
    what.add_argument('--steps', type=int, default=30, metavar='N',
                      help='measured steps per context (%(default)s)')
    what.add_argument('--warmup', type=int, default=5, metavar='N',
                      help='warm-up steps before them (%(default)s)')
    what.add_argument('--sampling', nargs='+', action='extend', default=[], metavar='SETTINGS',
                      help='also compare the step with these settings to the greedy step: greedy, '
                      'or setting=value,... of the parameter group sampling')
    what.add_argument('--constraint', default='', metavar='SCHEMA',
                      help='also compare the step under a JSON Schema to the free step: a file, '
                      'or plan for 32 actions of the embedded model')
    what.add_argument('--prefill', nargs='*', type=int, default=None, metavar='TOKENS',
                      help='also measure the time to the first token after prompts of these '
                      f'lengths (default: {" ".join(map(str, PROMPTS))})')
    what.add_argument('--beside', nargs='+', default=[], metavar='NEIGHBOUR',
                      help='also time the step beside a neighbour: cpu for a busy loop on each '
                      'core, or gpu[:hz,batch] for a convolutional network in another process')
    what.add_argument('--pace', type=float, default=0.0, metavar='TOKENS_PER_S',
                      help='with --beside: also time the step beside the neighbour at this pace, '
                      'as pace.tokens_per_s sets it')
    what.add_argument('--kernels', action='store_true',
                      help='also time each kernel; only on a GPU (CUDA)')
    how = parser.add_argument_group('execution')
    base = EngineConfig()
    how.add_argument('--device', default=base.device, help='auto, cpu, cuda or cuda:N')
    how.add_argument('--dtype', default=base.dtype, help='auto, bfloat16, float16 or float32')
    how.add_argument('--cpu-threads', type=int, default=base.cpu_threads, metavar='N',
                     help='threads of torch on a CPU; 0 leaves the choice to torch')
    how.add_argument('--blocking-wait', action='store_true',
                     help='let native sleep until a token of a GPU is ready, as '
                     'engine.blocking_wait does')
    how.add_argument('--peak-gb-s', type=float, default=0.0, metavar='GB_S',
                     help='peak memory bandwidth; 0 detects it')
    how.add_argument('--out', type=_folder, default=Path('decode_bench_out'), metavar='DIR',
                     help='folder of the results; existing results are not measured again unless '
                          'the model, the code, the packages or the machine have changed')
    how.add_argument('--again', action='store_true', help='measure existing results again')
    how.add_argument('--models', type=_folder, metavar='DIR',
                     help='folder for random weights (default: OUT/models)')
    how.add_argument('--keep-checkpoints', action='store_true',
                     help='keep the folders with random weights')
    how.add_argument('--session-timeout-s', type=float, default=3600.0, metavar='S',
                     help='time limit of a session (%(default)g)')
    how.add_argument('--budget-s', type=float, default=0.0, metavar='S',
                     help='time limit of the run, which then reports what it has; 0 sets none')
    return parser


def _write_checkpoint(options: argparse.Namespace) -> int:
    if not options.synthetic:
        raise ValueError('--write-checkpoint needs --synthetic SHAPE')
    if len(options.quantization) > 1:
        raise ValueError('--write-checkpoint takes one --quantization')
    folder, shape = options.write_checkpoint, options.synthetic
    if options.shapes_only:
        synthetic.describe(folder, shape, options.quantization[0], options.seed)
    else:
        synthetic.write(folder, shape, options.quantization[0], options.seed,
                        lambda message: print(message, flush=True))
    print(f'random weights of {shape} in {folder}')
    return 0


def _runner(options: argparse.Namespace) -> Runner:
    out = options.out
    try:
        return Runner(out, options.models or out / 'models', options.session_timeout_s,
                      options.budget_s, lambda message: print(message, flush=True),
                      options.again)
    except OSError as error:
        raise ValueError(f'--out {out}: cannot create the folder: {error}') from None


def _cases(options: argparse.Namespace) -> list[Case]:
    """
    Convert the command line to cases.

    :raises ConfigError: a setting of an engine or a sampling is invalid.
    :raises ConstraintError: the schema is not supported.
    :raises ValueError: another argument is invalid.
    """
    base = replace(EngineConfig(), device=options.device, dtype=options.dtype,
                   cpu_threads=options.cpu_threads, blocking_wait=options.blocking_wait)
    check('engine', base)
    for name, least in (('peak_gb_s', 0), ('session_timeout_s', 1), ('budget_s', 0)):
        value = getattr(options, name)
        if not least <= value <= 1e6:
            raise ValueError(f'--{name.replace("_", "-")} {value:g}: expected {least} to 1e6')
    contexts = tuple(sorted(set(options.contexts or CONTEXTS)))
    least = options.warmup + options.steps + 2
    if options.steps < 1 or options.warmup < 0 or options.sessions < 1:
        raise ValueError('--steps and --sessions are at least 1, --warmup at least 0')
    if contexts[0] < least:
        raise ValueError(f'--contexts {contexts[0]}: {options.warmup} warm-up and '
                         f'{options.steps} measured steps need at least {least}')
    if options.model and options.synthetic:
        raise ValueError('--model and --synthetic exclude each other')
    if options.quantization != ['none'] and (options.paper or options.targets):
        raise ValueError('--paper and --targets choose the quantisation: remove --quantization')
    if options.quantization != ['none'] and not options.synthetic:
        raise ValueError('--quantization needs --synthetic: a model folder has a fixed one')
    for text in options.sampling:
        parse_sampling(text)
    for text in options.beside:
        neighbour.parse(text)
    check('pace', PaceConfig(options.pace))
    if options.pace and not options.beside:
        raise ValueError('--pace needs --beside NEIGHBOUR')
    prompts = () if options.prefill is None else tuple(sorted(set(options.prefill or PROMPTS)))
    if prompts and prompts[0] < 1:
        raise ValueError(f'--prefill {prompts[0]}: a prompt has at least 1 token')
    common = {'warmup': options.warmup, 'prompts': prompts, 'peak_gb_s': options.peak_gb_s,
              'samplings': tuple(options.sampling), 'beside': tuple(options.beside),
              'pace': options.pace,
              'schema': _schema(options.constraint) if options.constraint else ''}
    if options.paper or options.targets:
        if options.model:
            raise ValueError('--paper and --targets need --synthetic SHAPE instead of --model')
        suite = suites.paper if options.paper else suites.targets
        return suite(options.synthetic or suites.SHAPE, contexts, base, seed=options.seed,
                     steps=options.steps, **common)
    names = options.ab or options.engines
    engines = [_engine(name, base) for name in names]
    common.update(steps=options.steps, kernels=options.kernels)
    cases = []
    for quantization in options.quantization:
        source = _source(options, quantization, engines)
        for name, engine in zip(names, engines, strict=True):
            label = name if len(options.quantization) == 1 else f'{name} ({quantization})'
            cases += suites.split_static(Case(label, engine, source, contexts, **common))
    if not options.ab:
        return cases
    sides = {side: [case for case in cases if case.label == name]
             for side, name in zip('AB', names, strict=True)}
    if names[0] == names[1] or len(options.quantization) > 1:
        raise ValueError('--ab compares two different engines on one quantisation')
    return [replace(case, session=f'{number:02d} {side}')
            for number, side in enumerate(compare.order(options.sessions), 1)
            for case in sides[side]]


def _schema(name: str) -> str:
    """Return the text of a JSON Schema."""
    path = Path(name)
    if name == 'plan':
        places = [root / where / 'plan.schema.json' for root in Path(__file__).resolve().parents
                  for where in ('config', 'share/physai_decode/config')]
        path = next((place for place in places if place.is_file()), places[0])
    try:
        schema = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f'--constraint {name}: {path} cannot be read ({error})') from None
    except ValueError as error:
        raise ValueError(f'--constraint {name}: {path} is not valid JSON: {error}') from None
    check_schema(schema, f'--constraint {name}')
    if name == 'plan':          # after a random prompt, the model would choose an empty plan
        schema['minItems'] = schema['maxItems']
    return json.dumps(schema)


def _engine(text: str, base: EngineConfig) -> EngineConfig:
    eager = text.partition(':')[0] == 'transformers'
    return parse_engine(text, replace(base, cuda_graph=False) if eager else base)


def _source(options: argparse.Namespace, quantization: str,
            engines: Sequence[EngineConfig]) -> ModelSource:
    if not options.synthetic:
        return ModelSource(path=options.model or 'builtin:tiny_planner')
    # Only the native engine creates quantised weights on the device.
    written = quantization != 'none' and any(engine.name != 'native' for engine in engines)
    written = written or any(engine.name == 'exllamav2' for engine in engines)
    return ModelSource(synthetic=options.synthetic, quantization=quantization, seed=options.seed,
                       written=written or quantization in ('awq', 'nf4'))


def _tables(options: argparse.Namespace, results: Sequence[Result]) -> list[Table]:
    contexts = sorted(set(options.contexts or CONTEXTS))
    done = [report.label(result) for result, _ in report.cells(results)]
    tables = []
    if options.ab:
        tables.append(report.comparisons(results, *options.ab))
    if options.targets:
        tables.append(suites.target_table(results, contexts))
    if options.paper:
        tables += [suites.paper_table(results, contexts[0]),
                   suites.quantized_table(results, contexts[0])]
    reference = suites.EAGER if suites.EAGER in done else done[-1] if done else ''
    tables += [report.steps(results, '' if options.ab else reference), report.samplings(results),
               report.masked(results), report.prompts(results), report.beside(results),
               report.parts(results), report.verdicts(results), report.energy(results),
               report.floors(results), report.startup(results)]
    for result, cell in report.cells(results):
        if cell.get('kernels') and (options.kernels or options.targets):
            tables.append(report.kernels(result, cell))
    tables += [report.sessions(results), report.machine(results)]
    tables = [table for table in tables if table.rows or table is tables[0]]
    if any(result['case']['source']['synthetic'] for result in results):
        tables[0].notes.append(report.RANDOM)
    devices = {result['footprint']['device'] for result, _ in report.cells(results)}
    for name, why in (('kernels', 'it times the kernels of a GPU'),
                      ('blocking_wait', 'only the wait for a GPU can sleep')):
        if getattr(options, name) and devices == {'cpu'}:
            tables[0].notes.append(
                f'--{name.replace("_", "-")} has no effect on a CPU: {why}.')
    tables[0].notes[:0] = [*report.unsteady(results), *report.reused(results)]
    return tables


def _plots(results: Sequence[Result], out: Path) -> list[Path]:
    try:
        from physai_decode.benchmark import plots
        return plots.draw(results, out)
    except ImportError as error:
        print(f'no plots: {error} ({install("matplotlib")})', file=sys.stderr)
        return []


if __name__ == '__main__':
    sys.exit(main())
