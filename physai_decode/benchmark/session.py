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
Measure one case in a separate process and write the result as JSON.

Run as ``python -m physai_decode.benchmark.session CASE.json RESULT.json``. A fresh process has no
kernels loaded, no memory in use and nothing tuned. Cases can therefore not influence each other,
and the start-up time is that of a node.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
from dataclasses import replace
import gc
import importlib
import json
from pathlib import Path
import random
import statistics
import sys
import time
from typing import Any
from typing import NamedTuple

from physai_decode import checkpoint
from physai_decode.benchmark import machine
from physai_decode.benchmark import neighbour
from physai_decode.benchmark import profiler
from physai_decode.benchmark.case import Case
from physai_decode.benchmark.case import GREEDY
from physai_decode.benchmark.case import parse_sampling
from physai_decode.benchmark.runner import keep
from physai_decode.config import ChatConfig
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import ModelConfig
from physai_decode.config import RooflineConfig
from physai_decode.config import SamplingConfig
from physai_decode.constraint import Constraint
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.engine import Footprint
from physai_decode.histogram import percentile
from physai_decode.pace import Pace
from physai_decode.realtime import short_slice
from physai_decode.request import Form
from physai_decode.roofline import Peak
from physai_decode.roofline import r_floor
from physai_decode.roofline import Roofline
from physai_decode.telemetry import find_engine_peak
from physai_decode.telemetry import spent_j
from physai_decode.telemetry import Telemetry
from physai_decode.text_process import TextProcess
from physai_decode.tokenizer_files import TextError

KERNEL_STEPS = 20
SAMPLING_ROUNDS = 5
MASKED_ROUNDS, MASKED_ANSWERS = 10, 100     # steps to time, in units of --steps; limit on answers
MATRIX_CPU, MATRIX_CUDA, MATRIX_TRIES = 1024, 8192, 10
PROMPT_ROUNDS = 5               # timed prompts of each length
BESIDE_ROUNDS, BESIDE_STEPS, BESIDE_TOKENS = 4, 250, 64
BESIDE_S = 5.0                  # minimum time beside the neighbour; it runs alone for as long
ENERGY_S = 2.0                  # devices update their energy counters a few times per second


def run(case: Case, started_s: float, progress: Callable[[str], None] = print,
        keep: Callable[[dict[str, Any]], None] = lambda result: None) -> dict[str, Any]:
    """
    Build the engine of a case, measure every context, and close the engine.

    :param started_s: start of the process, by ``time.monotonic``.
    :param keep: receives the result before the kernels are timed, because a profiler can crash the
        process.
    :return: the result; ``status`` is ``done``, or ``unavailable`` with ``error``.
    """
    notes: list[tuple[float, str]] = []
    load = machine.load_average()

    def note(message: str) -> None:
        notes.append((time.monotonic() - started_s, str(message)))
        progress(message)

    cells: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        'case': case.to_dict(), 'status': 'done', 'contexts': cells,
        'date': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}
    engine = None
    try:
        engine, startup = _build(case, cells, note, started_s)
        if case.captured and engine.footprint.cuda_graph != 'captured':
            raise EngineError(f'{engine.footprint.device_name} has no CUDA graphs')
        compiled = compile_schema(case, engine.footprint) if case.schema else None
    except (EngineError, TextError) as error:
        if engine is not None:
            engine.close()
        return {**result, 'status': 'unavailable', 'error': str(error)}
    gc.collect()
    gc.freeze()         # until the engine closes: collections before each measurement are short
    try:
        footprint = engine.footprint
        peak = find_engine_peak(footprint, _settings(case, max(case.contexts)))
        result['footprint'] = {**vars(footprint), 'details': dict(footprint.details)}
        result['peak'] = vars(peak)
        for context in case.contexts[:len(case.contexts) - len(cells)]:
            note(f'context {context}')
            cells.append(_cell(engine, case, context, peak, compiled))
            startup.setdefault('first_tokens_s', time.monotonic() - started_s)
        if case.prompts:
            note('prompts')
            result['prompts'] = time_prompts(engine, case.prompts, peak)
        cells.sort(key=lambda cell: cell['context'])
        result['memory'] = machine.memory(footprint)
        result['startup'] = {**startup, 'progress': notes}
        result['machine'] = {**machine.describe(footprint), 'load_average_before': load}
    finally:
        engine.close()
        gc.unfreeze()
    if case.kernels and footprint.device.startswith('cuda'):
        keep(result)
        note('kernel by kernel')
        _profile(case, [cell for cell in cells if 'error' not in cell], note)
    return result


def _build(case: Case, cells: list[dict[str, Any]], note: Callable[[str], None],
           started_s: float) -> tuple[Engine, dict[str, Any]]:
    """Build for the largest context that fits; add a cell with an error for each that does not."""
    if case.engine.name != 'auto':
        with contextlib.suppress(ImportError):      # `build` reports it
            importlib.import_module(f'physai_decode.engines.{case.engine.name}')
    import_s = time.monotonic() - started_s
    for count in range(len(case.contexts), 0, -1):
        largest = case.contexts[count - 1]
        begun_s = time.monotonic()
        try:
            engine = _engine(case, largest, note)
        except EngineError as error:
            if count == 1 or not _out_of_memory(error):
                raise
            cells.append({'context': largest, 'error': str(error)})
            note(f'context {largest} does not fit; trying the next smaller one')
            gc.collect()
            continue
        parts = {key: float(value) for key, value in engine.footprint.details.items()
                 if key.endswith('_s') and _is_number(value)}
        return engine, {'import_s': import_s, 'build_s': time.monotonic() - begun_s,
                        'parts': parts}
    raise EngineError('no context to measure: set --contexts')


def _engine(case: Case, context: int, note: Callable[[str], None]) -> Engine:
    from physai_decode import engines
    note(f'looking for {case.source.path}')
    model = checkpoint.open(case.source.path, parameter='--model')
    return engines.build(model, _settings(case, context).engine, note)


def _settings(case: Case, context: int) -> DecodeConfig:
    return DecodeConfig(
        model=ModelConfig(path=case.source.path),
        engine=EngineConfig(**{**vars(case.engine),
                               'max_context': max(16, context, *(n + 1 for n in case.prompts))}),
        roofline=RooflineConfig(peak_bandwidth_gb_s=case.peak_gb_s))


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether an error was caused by a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or any(
                words in str(error).lower() for words in ('out of memory', 'not enough memory')):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _cell(engine: Engine, case: Case, context: int, peak: Peak,
          compiled: 'Compiled | None') -> dict[str, Any]:
    """Measure one context; a failure becomes the ``error`` of the cell."""
    limit = engine.footprint.max_context
    if context > limit:
        return {'context': context, 'error': f'the model takes at most {limit} tokens: set '
                                             f'--contexts to {limit} or less'}
    try:
        cell = measure(engine, context, case.warmup, case.steps, peak)
        if case.samplings:
            cell['samplings'] = compare_samplings(
                engine, context, case.warmup, case.steps, case.samplings)
        if compiled is not None:
            cell['masked'] = masked(engine, context, case.warmup, case.steps, compiled)
        cell.update(_energy(engine, case, context))
        if case.beside:
            cell['beside'] = [beside(engine, context, case.warmup, text, case.pace)
                              for text in case.beside]
        return cell
    except (EngineError, RuntimeError, MemoryError, ValueError) as error:
        return {'context': context, 'error': f'{type(error).__name__}: {error}'}


def _profile(case: Case, cells: list[dict[str, Any]], note: Callable[[str], None]) -> None:
    """Add the kernels to each cell, with a new engine: a profiler would distort the step times."""
    if not cells:
        return
    gc.collect()
    try:
        profiler.prepare()
        engine = _engine(case, cells[-1]['context'], note)
        try:
            for cell in cells:
                prompt = random_prompt(engine, cell['context'] - KERNEL_STEPS - 8, seed=0)
                cell['kernels'] = profiler.profile(engine, prompt, KERNEL_STEPS)
        finally:
            engine.close()
    except Exception as error:          # no CUPTI, no permission, a truncated trace, ...
        cells[0]['kernels_error'] = f'{type(error).__name__}: {error}'


def measure(engine: Engine, context: int, warmup: int, steps: int, peak: Peak) -> dict[str, Any]:
    """
    Time the decode steps that end at ``context`` tokens, as a reader of the decode loop.

    The prompts are random and differ between calls, so that no prefix is cached.

    :raises ValueError: the context is too short for the steps.
    """
    prompt_tokens = context - warmup - steps - 1
    if prompt_tokens < 1:
        raise ValueError(
            f'a context of {context} tokens is too short for {warmup} + {steps} steps')
    loop = DecodeLoop(engine)
    first_s = _stream(loop, random_prompt(engine, prompt_tokens, seed=context), 2)[0]
    prompt = random_prompt(engine, prompt_tokens, seed=context + 1)
    begin_s, waited_s = time.perf_counter(), machine.waited_s()
    prefill_s, itl_s, device_s, cached = _stream(loop, prompt, warmup + steps + 1)
    spent_s, end_s = time.perf_counter() - begin_s, machine.waited_s()
    if len(itl_s) < warmup + steps:
        raise EngineError(f'the engine ended after {len(itl_s)} of {warmup + steps} steps')
    itl_s, device_s = itl_s[warmup:], device_s[warmup:]
    line = Roofline(engine.footprint, peak)
    middle = context - len(itl_s) // 2
    cell: dict[str, Any] = {
        'context': context, 'middle_context': middle, 'prompt_tokens': prompt_tokens,
        'cached_tokens': cached, 'first_prefill_s': first_s, 'prefill_s': prefill_s,
        'itl_s': itl_s, 'device_s': device_s,
        'kv_bytes': line.kv_bytes(middle)}
    cell.update({f'itl_p{q}_s': percentile(sorted(itl_s), q) for q in (50, 95, 99)})
    cell['itl_max_s'] = max(itl_s)
    cell['waited'] = None if waited_s is None or end_s is None else \
        max(0.0, end_s - waited_s) / spent_s
    known = [(wall, device) for wall, device in zip(itl_s, device_s, strict=True)
             if device is not None]
    cell['device_p50_s'] = statistics.median(d for _, d in known) if known else None
    cell['host_gap_p50_s'] = statistics.median(w - d for w, d in known) if known else None
    for convention in ('read', 'checkpoint'):
        floor = line.floor_s(middle, convention)
        cell[f'floor_{convention}_s'] = floor
        cell[f'r_{convention}'] = r_floor(floor, cell['itl_p50_s'])
    return cell


def _energy(engine: Engine, case: Case, context: int) -> dict[str, float]:
    """Measure energy per token and mean power; empty if the device does not report them."""
    telemetry = Telemetry(engine.footprint)
    try:
        return energy(engine, context, case.warmup + case.steps + 1, telemetry.energy_j)
    finally:
        telemetry.close()


def energy(engine: Engine, context: int, tokens: int, energy_j: Callable[[], float | None],
           clock: Callable[[], float] = time.monotonic) -> dict[str, float]:
    """
    Measure the energy of decode steps for `ENERGY_S` seconds.

    :param tokens: tokens of each answer; the last one is at ``context``.
    :param energy_j: returns the energy that the device has used so far, in joules, or None.
    :param clock: monotonic, in seconds.
    :return: ``j_per_token`` and ``power_w``; empty if the device does not report its energy.
    """
    if energy_j() is None:
        return {}
    loop, count = DecodeLoop(engine), 0
    prompt = random_prompt(engine, context - tokens, seed=context + 3)
    _stream(loop, prompt, 2)                    # caches the prompt
    begin_s, begin_j = clock(), energy_j()
    while (spent_s := clock() - begin_s) < ENERGY_S:
        count += len(_stream(loop, prompt, tokens)[1])
    used_j = spent_j(begin_j, energy_j())
    return {'j_per_token': used_j / count, 'power_w': used_j / spent_s} if used_j else {}


def compare_samplings(engine: Engine, context: int, warmup: int, steps: int,
                      samplings: Sequence[str]) -> list[dict[str, Any]]:
    """
    Time the same steps with several samplings in turn, so that drift affects all alike.

    :param samplings: see `parse_sampling`; `GREEDY` is added in front.
    :return: for each sampling, its text, the step times in seconds and their median.
    """
    texts = list(dict.fromkeys([GREEDY, *samplings]))
    loop = DecodeLoop(engine)
    prompt = random_prompt(engine, context - warmup - steps - 1, seed=context + 2)
    itl_s: dict[str, list[float]] = {text: [] for text in texts}
    for _ in range(SAMPLING_ROUNDS):
        for text in texts:
            itl_s[text] += _stream(
                loop, prompt, warmup + steps + 1, parse_sampling(text))[1][warmup:]
    return [{'sampling': text, 'itl_s': times, 'itl_p50_s': statistics.median(times)}
            for text, times in itl_s.items()]


class Compiled(NamedTuple):
    """A compiled constraint, and the time that it took."""

    fresh: Callable[[], Constraint]     # returns it in its initial state
    vocabulary_s: float                 # to read the vocabulary, once for all constraints
    compile_s: float


def compile_schema(case: Case, footprint: Footprint) -> Compiled:
    """
    Compile the JSON Schema of a case for the vocabulary of its model.

    :raises TextError: the schema is not supported, or the tokenizer cannot be loaded.
    """
    model = checkpoint.open(case.source.path, parameter='--model')
    form = Form('json_schema', json.loads(case.schema), '--constraint')
    with contextlib.closing(TextProcess(
            str(model.folder), ChatConfig(), model.vocab_size, model.eos_token_ids)) as text:
        begin_s = time.perf_counter()
        vocabulary = text.vocabulary(footprint.vocab_size, footprint.eos_token_ids)
        read_s = time.perf_counter()
        vocabulary.constraint(form)
        return Compiled(lambda: vocabulary.constraint(form), read_s - begin_s,
                        time.perf_counter() - read_s)


def masked(engine: Engine, context: int, warmup: int, steps: int,
           compiled: Compiled) -> dict[str, Any]:
    """
    Time the steps of constrained and free answers in turn, after the same prompt.

    Answers are sampled at temperature 1, so that they differ. A free answer is as long as the
    constrained one before it. The first answer of each kind is not counted.

    :return: the times of constrained steps, free steps and masks in seconds, their percentiles,
        and the times in `Compiled`.
    :raises EngineError: the constrained answers are too short to time.
    """
    loop = DecodeLoop(engine)
    prompt = random_prompt(engine, context - warmup - steps - 1, seed=context + 5)
    times: dict[str, list[float]] = {'free': [], 'masked': [], 'mask': []}
    for number in range(MASKED_ANSWERS):
        sampling, mask_s = SamplingConfig(temperature=1.0, seed=number), list[float]()
        masked_s = _stream(loop, prompt, warmup + steps + 1, sampling, compiled.fresh(), mask_s)[1]
        free_s = _stream(loop, prompt, len(masked_s) + 1, sampling)[1]
        if number:
            times['masked'] += masked_s[warmup:]
            times['free'] += free_s[warmup:]
            times['mask'] += mask_s[warmup:]
        if len(times['masked']) >= MASKED_ROUNDS * steps:
            break
    else:
        raise EngineError(
            f'{MASKED_ANSWERS} answers under --constraint had {len(times["masked"])} steps after '
            f'{warmup} of warm-up, but {MASKED_ROUNDS * steps} are needed: use a schema with '
            'longer answers, or fewer --steps and --warmup')
    figures: dict[str, Any] = {f'{name}_s': found for name, found in times.items()}
    for name, found in times.items():
        figures.update({f'{name}_p{q}_s': percentile(sorted(found), q) for q in (50, 99)})
    return {**figures, 'ratio': figures['masked_p50_s'] / figures['free_p50_s'],
            'vocabulary_s': compiled.vocabulary_s, 'compile_s': compiled.compile_s}


def time_prompts(engine: Engine, lengths: Sequence[int], peak: Peak) -> list[dict[str, Any]]:
    """
    Time the first token after prompts of several lengths, none of which is in the cache.

    :return: for each length ``ttft_s``, the times in seconds, their median, and the two floors:
        to read the weights once, and to multiply by them at the rate of a large matrix product.
    """
    loop, found = DecodeLoop(engine, chunk_ms=0.0), []
    line, parameters = Roofline(engine.footprint, peak), engine.footprint.layer_parameters
    rate = matrix_rate(engine.footprint.device, engine.footprint.dtype) if parameters else 0.0
    for tokens in lengths:
        ttft_s = [_stream(loop, random_prompt(engine, tokens, seed=number), 1)[0]
                  for number in range(1 + PROMPT_ROUNDS)][1:]
        found.append({
            'tokens': tokens, 'ttft_s': ttft_s, 'ttft_p50_s': statistics.median(ttft_s),
            'floor_bytes_s': line.floor_s(0),
            'floor_operations_s': 2 * parameters * tokens / rate if rate else None})
    return found


def matrix_rate(device: str, dtype: str) -> float:
    """Time large matrix products, and return the best rate in operations per second."""
    import torch
    size = MATRIX_CUDA if device.startswith('cuda') else MATRIX_CPU
    matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best_s = float('inf')
    for _ in range(MATRIX_TRIES):
        begin_s = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()                    # waits for the device
        best_s = min(best_s, time.perf_counter() - begin_s)
    return 2 * size**3 / best_s


def beside(engine: Engine, context: int, warmup: int, text: str,
           tokens_per_s: float = 0.0) -> dict[str, Any]:
    """
    Time the steps and a neighbour, each alone and both together, in turn.

    :param text: the neighbour; see `neighbour.parse`.
    :param tokens_per_s: if above 0, the steps are also timed beside the neighbour at this pace.
    :return: the text, the pace, and the times of the steps and of the neighbour, alone and
        together, in seconds.
    """
    kind = neighbour.parse(text)
    loop, tokens = DecodeLoop(engine), min(BESIDE_TOKENS, context - 2)
    prompt = random_prompt(engine, context - tokens, seed=context + 4)

    def steps(count: int, seconds: float = 0.0, pace: float = 0.0) -> list[float]:
        times: list[float] = []
        length = min(tokens, 2 + warmup + int(pace * seconds)) if pace else tokens
        end_s = time.perf_counter() + seconds
        while len(times) < count or time.perf_counter() < end_s:
            times += _stream(loop, prompt, length, tokens_per_s=pace)[1][min(warmup, length // 2):]
        return times

    steps(1)
    hows = ['beside', *(['paced'] if tokens_per_s else [])]
    times: dict[str, Any] = {'neighbour': text, 'pace': tokens_per_s, **{
        f'{whose}{how}': [] for whose in ('', 'neighbour_') for how in ('alone', *hows)}}
    for _ in range(BESIDE_ROUNDS):
        times['alone'] += steps(BESIDE_STEPS)
        with neighbour.running(kind) as running:
            times['neighbour_alone'] += running.collect(BESIDE_S)
            for how in hows:
                times[how] += (steps(1, BESIDE_S, tokens_per_s) if how == 'paced' else
                               steps(BESIDE_STEPS, BESIDE_S))
                times[f'neighbour_{how}'] += running.collect(0.0)
    return times


def random_prompt(engine: Engine, tokens: int, seed: int) -> list[int]:
    """Return ``tokens`` random ids of the engine's vocabulary."""
    draw = random.Random(seed)
    return [draw.randrange(engine.footprint.vocab_size) for _ in range(max(1, tokens))]


def _stream(loop: DecodeLoop, prompt: list[int], tokens: int,
            sampling: SamplingConfig | None = None, constraint: Constraint | None = None,
            mask_s: list[float] | None = None,
            tokens_per_s: float = 0.0) -> tuple[Any, list[float], list[float | None], Any]:
    """
    Return (prefill, [time of each later token], [its device time], cached tokens), in seconds.

    :param mask_s: receives the time of the mask of each later token.
    :param tokens_per_s: the pace of the steps, whose times exclude the wait; 0 for full speed.
    """
    sampling = replace(sampling or SamplingConfig(), max_new_tokens=tokens)
    itl_s, device_s = list[float](), list[float | None]()
    prefill_s = cached = pace = None
    with _undisturbed(loop.engine):
        last_s = time.perf_counter()
        for step in loop.stream(prompt, sampling, constraint, ahead=not tokens_per_s):
            now_s = time.perf_counter()
            if not step.token_ids:
                continue
            if prefill_s is None:
                prefill_s, cached = now_s - last_s, step.cached_tokens
            else:
                share = len(step.token_ids)
                itl_s += [(now_s - last_s) / share] * share
                device_s += [None if step.device_s is None else step.device_s / share] * share
                if mask_s is not None and step.mask_s is not None:
                    mask_s.append(step.mask_s)
            last_s = now_s
            if tokens_per_s:
                pace = pace or Pace(tokens_per_s, now_s)
                time.sleep(max(0.0, pace.due_s(now_s, len(step.token_ids)) - time.perf_counter()))
                last_s = time.perf_counter()
    return prefill_s, itl_s, device_s, cached


@contextlib.contextmanager
def _undisturbed(engine: Engine) -> Iterator[None]:
    """
    Run steps without garbage collections, and with the time slice of a decode thread.

    A neighbour starts outside ``with``, because it would inherit the slice.
    """
    gc.collect()
    gc.disable()
    try:
        with short_slice(engine.footprint.sleeps):
            yield
    finally:
        gc.enable()


def main() -> int:
    """Measure the case in a file and write its result atomically."""
    case_path, result_path = map(Path, sys.argv[1:3])
    started_s = time.monotonic()
    case = Case.from_dict(json.loads(case_path.read_text()))
    result = run(case, started_s, lambda message: print(message, flush=True),
                 lambda result: keep(result, result_path))
    keep(result, result_path)
    return 0


if __name__ == '__main__':
    sys.exit(main())
