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
The host: it loads, starts, stops and unloads one model, and accepts all requests.

ROS and HTTP submit requests in any state. If no model is active, the host refuses them with the
reason. It depends on neither ROS nor torch.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import closing
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
import os
import threading
from types import MappingProxyType
from typing import Any
from typing import NamedTuple

from physai_decode import checkpoint
from physai_decode import engines
from physai_decode import gap
from physai_decode.checkpoint import Checkpoint
from physai_decode.collector import give_back
from physai_decode.config import ChatConfig
from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import SERVER
from physai_decode.config import SpeculationConfig
from physai_decode.constraint import configured
from physai_decode.engine import described
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.engine import Footprint
from physai_decode.engine import Verifier
from physai_decode.engines import openai
from physai_decode.request import Form
from physai_decode.request import Request
from physai_decode.request_queue import Listener
from physai_decode.request_queue import notify_end
from physai_decode.roofline import at_clock
from physai_decode.roofline import observed_peak
from physai_decode.roofline import Peak
from physai_decode.roofline import TOLERANCE
from physai_decode.speculation import pays
from physai_decode.telemetry import find_engine_peak
from physai_decode.telemetry import Telemetry
from physai_decode.text_process import TextProcess
from physai_decode.timing import BEST_COUNT
from physai_decode.timing import RequestReport
from physai_decode.timing import WindowReport
from physai_decode.tokenizer_files import TextError
from physai_decode.worker import Busy
from physai_decode.worker import Cancelled
from physai_decode.worker import Sink
from physai_decode.worker import Worker

GAP_TIMEOUT_S = 60.0            # limit on a measurement
GPU_FILES = '/dev/nvidia0', '/dev/nvhost-gpu'      # the latter of an Orin
COUNTS = ('requests', 'tokens', 'refusals', 'fallbacks')


class Loaded(NamedTuple):
    """A loaded model: an engine with its tokenizer, a server, or both."""

    engine: Engine | None
    text: TextProcess | None
    peak: Peak
    facts: Mapping[str, str] = MappingProxyType({})     # for ~/model_info
    sampling: Mapping[str, Any] = MappingProxyType({})  # from generation_config.json
    form: Form | None = None        # constraint on every answer
    server: openai.Server | None = None
    warnings: tuple[str, ...] = ()
    ready: bool = True              # False: the server does not have the model, or not yet

    @property
    def footprint(self) -> Footprint:
        """The footprint of the server, or else of the engine."""
        model = self.server or self.engine
        assert model is not None
        return model.footprint

    @property
    def device_footprint(self) -> Footprint:
        """The footprint of the engine, or else of the server."""
        return self.footprint if self.engine is None else self.engine.footprint


Load = Callable[[DecodeConfig, Callable[[str], None]], Loaded]


def load(config: DecodeConfig, progress: Callable[[str], None]) -> Loaded:
    """
    Load the model that the settings name; after an error, nothing stays loaded.

    :param progress: called with a line of text at each step.
    :raises EngineError: the model cannot be loaded; the message says why and what to do.
    :raises TextError: the tokenizer cannot be loaded, or the constraint cannot be compiled.
    :raises ConfigError: the server's address or key is invalid.
    """
    if config.engine.name == SERVER:
        return _load_server(config, progress)
    return _load_local(config, progress)


def _load_local(config: DecodeConfig, progress: Callable[[str], None],
                parameter: str = checkpoint.MODEL_PATH) -> Loaded:
    """
    Load the model at ``model.path``.

    :param parameter: the setting that names it, for errors.
    """
    progress(f'looking for {config.model.path}')
    model = checkpoint.open(config.model.path, config.model.revision, parameter)
    with ExitStack() as undo:
        text = TextProcess(
            str(model.folder), config.chat, model.vocab_size, model.eos_token_ids)
        undo.callback(text.close)
        plain = [str(id_) for id_ in model.eos_token_ids if id_ not in text.end_ids]
        if plain:
            progress(f'ignoring {", ".join(plain)} in eos_token_id: not in the added_tokens of '
                     'tokenizer.json')
        model = replace(model, eos_token_ids=text.end_ids)
        facts = _facts(model, text, config)
        progress('; '.join(f'{name}: {fact}' for name, fact in facts.items()
                           if name != 'engine_reason'))     # the engine logs it
        form = configured(config.constraint)
        draft = _open_draft(config, text, progress) if config.speculation.name == 'model' else None
        engine = engines.build(
            model, _engine_config(config), progress, config.speculation.name != 'off', draft)
        undo.callback(engine.close)
        progress('finding the peak memory bandwidth')
        peak = find_engine_peak(engine.footprint, config)
        if form is not None:
            progress(f'compiling {form.name}')
            shape = engine.footprint
            text.vocabulary(shape.vocab_size, shape.eos_token_ids).constraint(form)
        loaded = Loaded(engine, text, peak, facts, model.sampling, form,
                        warnings=(*_idle_draft(engine, config.speculation.draft_model),
                                  *_unapplied(model.unapplied)))
        undo.pop_all()
        return loaded


def _open_draft(config: DecodeConfig, text: TextProcess,
                progress: Callable[[str], None]) -> Checkpoint:
    """
    Find the draft model, and check that its token ids mean the same as those of the model.

    :raises ConfigError: no draft model is set.
    :raises DraftError: it does not exist, is damaged, or has another tokenizer.
    """
    path = config.speculation.draft_model
    if not path:
        raise ConfigError('speculation.name is model, but speculation.draft_model is empty: set '
                          'it to a smaller model with the same tokenizer')
    progress(f'looking for the draft model {path}')
    with engines.naming_draft(path):
        draft = checkpoint.open(path, parameter='speculation.draft_model')
        with closing(TextProcess(str(draft.folder), ChatConfig('off'), draft.vocab_size)) as other:
            difference = text.difference(other)
        if difference:
            raise EngineError(f'it has another tokenizer than the model: {difference}; take a '
                              'smaller model of the same family')
    if draft.notes:
        progress(f'draft model: config_notes: {"; ".join(draft.notes)}')
    return draft


def _idle_draft(engine: Engine, path: str) -> Iterator[str]:
    """Yield a warning if the engine has a draft model that is too slow to be used."""
    if isinstance(engine, Verifier) and (drafter := engine.drafter) is not None \
            and not pays(engine.pass_costs, drafter.cost):
        yield (f'the draft model {path} is never used, because a token of it costs '
               f'{drafter.cost:.2f} decode steps: set speculation.draft_model to a smaller model, '
               'or speculation.name to lookup')


def _unused_gpu(config: DecodeConfig, footprint: Footprint) -> str:
    """Return a warning if an engine found no GPU, although the machine has one of NVIDIA."""
    if footprint.device != 'cpu' or config.engine.device != 'auto' \
            or 'CUDA_VISIBLE_DEVICES' in os.environ or not any(map(os.path.exists, GPU_FILES)):
        return ''
    return ('the model runs on the CPU, because PyTorch cannot use the NVIDIA GPU of this '
            'machine: install a PyTorch for its driver (on a Jetson, that for its JetPack), or '
            'set engine.device to cpu')


def _endless(engine: Engine | None) -> str:
    """Return a warning if no token ends an answer of an engine."""
    if engine is None or engine.footprint.eos_token_ids:
        return ''
    return ('no token ends an answer, so each runs until sampling.max_new_tokens or a stop '
            'string: the model folder names no end token; copy or download its JSON files again')


def _unapplied(names: Sequence[str]) -> Iterator[str]:
    """Yield a warning if a model has settings that change its text, but are not applied."""
    if names:
        yield (f'the generation_config.json of the model sets {", ".join(names)}, which no engine '
               'applies, so the text can differ from that of the transformers library: take a '
               'model that does not need them, or delete them from the file to end this warning')


def _untemplated(template: str) -> str:
    """Return a warning if the model has no chat template, as in a folder without its file."""
    if template != 'none':
        return ''
    return ('the model has no chat template, so it continues prompts as they are: copy or '
            'download its JSON files and chat_template.jinja again, or, if it was not trained for '
            'chat, set chat.template to off')


def _load_server(config: DecodeConfig, progress: Callable[[str], None]) -> Loaded:
    """Set up a server, which need not answer yet, and load the fallback engine."""
    server = openai.Server(config.remote, os.environ.get(openai.KEY_VARIABLE, ''))
    path, facts = config.remote.fallback, {'engine_reason': 'engine.name is set to it'}
    if config.speculation.name != 'off' and not path:
        facts['speculation'] = 'off: a server decides that itself'
        progress(f'speculation is {facts["speculation"]}')
    progress(f'asking {server.address} for its models')
    warnings: tuple[str, ...] = ()
    if problem := server.probe():
        warnings = f'the server is not ready: {problem}; until it is, ' + (
            f'{path} answers' if path else 'requests end with an error'),
    else:
        progress(f'{server.address} has {server.model}')
    if not path:
        return Loaded(None, None, Peak(None, 'unknown'), facts, server=server,
                      form=configured(config.constraint), warnings=warnings,
                      ready=not problem)
    loaded = _load_fallback(config, progress)       # last: nothing may fail while it is loaded
    shape = loaded.device_footprint
    facts['fallback'] = f'{path}: {shape.engine}, {shape.dtype}, {shape.device}'
    facts.update((key, f'of the fallback: {value}') for key, value in shape.details.items()
                 if key in ('speculation', 'draft_model'))
    if loaded.warnings:
        facts['draft_model'] = loaded.warnings[0]
    return loaded._replace(server=server, facts=facts, warnings=(*warnings, *loaded.warnings),
                           ready=not problem)


def _load_fallback(config: DecodeConfig, progress: Callable[[str], None]) -> Loaded:
    """Load the fallback engine; without its draft model if that cannot be used."""
    config = replace(config, model=replace(config.model, path=config.remote.fallback),
                     engine=replace(config.engine, name='auto'))
    try:
        return _load_local(config, progress, 'remote.fallback')
    except engines.DraftError as error:
        warning = f'the fallback uses prompt lookup alone: {error}'
    progress('loading the fallback without its draft model')
    loaded = _load_local(replace(config, speculation=SpeculationConfig('lookup')), progress,
                         'remote.fallback')
    return loaded._replace(warnings=(warning,))


def _engine_config(config: DecodeConfig) -> EngineConfig:
    """Return the engine's settings, with one compute thread per core of the decode thread."""
    cores = len(config.realtime.cpu_affinity)
    engine = config.engine
    return replace(engine, cpu_threads=cores) if cores and not engine.cpu_threads else engine


def _facts(model: Checkpoint, text: TextProcess, config: DecodeConfig) -> dict[str, str]:
    """Describe the choices that follow from the model folder."""
    ends = text.named(model.eos_token_ids)
    settings = ' '.join(f'{name}={value}' for name, value in model.sampling.items())
    return {'engine_reason': engines.choose(model, config.engine).reason,
            'chat_template': text.template,
            'tool_form': f'{text.manner.form or "none"}: {text.manner.reason}',
            'thought_markers': f'{text.manner.opens} {text.manner.closes}'.strip() or 'none',
            'end_tokens': ' '.join(ends) or 'none: only a length or a stop string ends an answer',
            'checkpoint_sampling': settings or 'none',
            'config_notes': '; '.join(model.notes) or 'none'}


class Host:
    """
    Loads, starts, stops and unloads one model.

    ``load``, ``start``, ``stop`` and ``unload`` must not run at the same time, but may run in any
    thread. Everything else is thread-safe.
    """

    def __init__(self, sink: Sink, load: Load = load,
                 warn: Callable[[str], object] = lambda message: None) -> None:
        """
        Create a host without a model.

        :param sink: receives the reports of all requests, including refused ones.
        :param warn: logs a warning; see `DecodeLoop`.
        """
        self._sink, self._load, self._warn = _CountingSink(sink), load, warn
        self.config = DecodeConfig()                # of the loaded model
        self.loaded: Loaded | None = None
        self.telemetry: Telemetry | None = None     # of the loaded model
        self.peak: Peak | None = None               # of the loaded model, the latest value
        self.worker: Worker | None = None           # from start until its thread has ended
        self.loading = ''                           # current step of a load; empty if none runs
        self.next_step = ''                         # what becomes of ``loading`` after the load
        self.params_problems: list[str] = []        # params files without a section for the node
        self.failure = ''                           # why the last load failed
        self.closed = False                         # no further model will be loaded
        self._numbers = count(1)                    # request numbers, including refused requests
        self._counting = threading.Lock()           # guards _earlier and changes of worker
        # Counts without those of the current worker.
        self._earlier = dict.fromkeys((*COUNTS, 'deadline_misses'), 0)

    def load(self, config: DecodeConfig, progress: Callable[[str], None]) -> Loaded:
        """
        Load the model that the settings name.

        :param progress: called with each step; its exceptions end the load.
        :raises Exception: the load failed; nothing is loaded then.
        """
        def report(text: str) -> None:
            self.loading = text
            progress(text)

        self.failure, self.loading = '', 'begin'
        try:
            self.config = config
            if not config.model.path and config.engine.name != SERVER:
                raise ConfigError(
                    'model.path is empty: with a params file there is no default. Set '
                    'model.path in the file, or with -p model.path:=...; builtin:tiny_planner is '
                    'the embedded model')
            self.loaded = self._load(config, report)
            self.peak = self.loaded.peak
            self.telemetry = Telemetry(self.loaded.device_footprint)
            unused = _unused_gpu(config, self.loaded.device_footprint)
            for each in (*self.loaded.warnings, self.telemetry.problem, unused,
                         _endless(self.loaded.engine),
                         _untemplated(self.loaded.facts.get('chat_template', ''))):
                if each:
                    self._warn(each)
            return self.loaded
        except BaseException as error:
            known = isinstance(error, (ConfigError, EngineError, TextError))
            self.failure = str(error) if known else described(error)
            self.unload()
            raise
        finally:
            self.loading = self.next_step

    def unload(self) -> None:
        """Unload the model and free its memory."""
        loaded, telemetry = self.loaded, self.telemetry
        self.loaded = self.telemetry = self.peak = None
        with ExitStack() as calls:                  # runs all, even if one raises
            for each in (telemetry, loaded and loaded.text, loaded and loaded.engine):
                if each is not None:
                    calls.callback(each.close)
        if loaded is not None:
            del loaded, each
            give_back()

    def start(self, config: DecodeConfig) -> None:
        """Start to answer requests."""
        assert self.loaded is not None
        self.config = config
        telemetry = self.telemetry
        worker = Worker(self.loaded.engine, self.loaded.text, config, self._sink,
                        peak=self.peak or self.loaded.peak, numbers=self._numbers,
                        checkpoint_sampling=self.loaded.sampling, form=self.loaded.form,
                        energy_j=telemetry.energy_j if telemetry else lambda: None,
                        server=self.loaded.server, warn=self._warn)
        worker.start()
        with self._counting:
            self.worker = worker

    def stop(self, timeout_s: float) -> bool:
        """Cancel all requests; return False if the engine does not return in time."""
        worker = self.worker
        if worker is None:
            return True
        if not worker.stop(timeout_s):
            return False
        with self._counting:
            self.worker = None
            for name in self._earlier:
                self._earlier[name] += getattr(worker, name)
        return True

    def update(self, config: DecodeConfig) -> None:
        """Apply the settings that may change while active; see `Worker.update`."""
        self.config = replace(self.config, sampling=config.sampling, deadline=config.deadline,
                              pace=config.pace, thinking=config.thinking)
        worker = self.worker
        if worker is not None:
            worker.update(config.sampling, config.deadline, config.pace, config.thinking)

    def follow_peak(self, window: WindowReport) -> str:
        """
        Update the peak if steps exceeded it, or if the memory clock of a Jetson changed.

        :return: a warning if steps exceeded the peak, otherwise empty.
        """
        worker, peak, telemetry = self.worker, self.peak, self.telemetry
        if worker is None or peak is None:
            return ''
        if telemetry is not None and (clocks := telemetry.memory_clocks_mhz) is not None:
            worker.peak = at_clock(peak, clocks)
        # A peak at a lower clock is not refuted: the clock may have risen since.
        found = observed_peak(peak, window.bandwidth_gb_s)
        if found is None or window.r_floor is None or window.r_floor <= TOLERANCE \
                or window.floor_count < BEST_COUNT:
            return ''
        self.peak = worker.peak = found
        return (f'the floor is updated: {window.floor_count} steps read at '
                f'{window.bandwidth_gb_s:.4g} GB/s, more than the peak of '
                f'{(peak.bytes_per_s or 0.0) / 1e9:.4g} GB/s ({peak.source}); if that is a '
                'parameter, correct roofline.peak_bandwidth_gb_s')

    def submit(self, request: Request, received_s: float | None = None,
               listener: Listener | None = None) -> int:
        """Queue a request, or refuse it, and return its number; see `Worker.submit`."""
        with self._counting:
            worker = self.worker
            if worker is not None:
                return worker.submit(request, received_s, listener)
        return self.refuse(self.inactive_reason(), request.client_id, listener, 'inactive')

    def refuse(self, message: str, client_id: str = '', listener: Listener | None = None,
               kind: str = 'invalid') -> int:
        """
        Refuse a request, such as one that cannot be parsed, and return its number.

        :param kind: see `Refusal`.
        """
        with self._counting:
            for name in ('requests', 'refusals'):
                self._earlier[name] += 1
            number = next(self._numbers)
        report = RequestReport(number, 'rejected', message, client_id=client_id, refusal=kind)
        notify_end((self._sink, listener), report, '')
        return number

    def cancel(self, number: int | None = None, client_id: str = '',
               message: str = '') -> Cancelled:
        """End requests and return which; see `Worker.cancel`."""
        worker = self.worker
        return Cancelled() if worker is None else worker.cancel(number, client_id, message)

    def reset(self) -> str:
        """Forget the conversation and return what was forgotten."""
        worker = self.worker
        return 'nothing to forget' if worker is None else worker.reset()

    def measure_gap(self, progress: Callable[[str], None]) -> gap.Gap:
        """
        Time the decode step in two ways, between two requests; see `gap`.

        :raises Busy: the engine is not free.
        :raises EngineError: the engine cannot run the step in two ways, or timed out.
        """
        loaded, worker = self.loaded, self.worker
        if loaded is None or worker is None:
            raise Busy(self.inactive_reason())
        if loaded.engine is None or loaded.server is not None:
            raise EngineError("a server's step cannot be timed from here: see itl_ms on "
                              '~/token_stats, which includes the network')
        if worker.busy_reason:
            raise Busy(worker.busy_reason)
        config = replace(self.config, engine=_engine_config(self.config))
        with gap.baseline(loaded.engine, config, progress) as baseline:
            return worker.run(
                lambda loop, heartbeat: gap.measure(loop, baseline, worker.peak, heartbeat),
                GAP_TIMEOUT_S)

    @property
    def counts(self) -> dict[str, int]:
        """Requests, tokens, refusals and fallbacks since the process began."""
        with self._counting:
            return {name: self._count(name) for name in COUNTS}

    @property
    def deadline_misses(self) -> int:
        """Deadline misses since the process began."""
        with self._counting:
            return self._count('deadline_misses')

    @property
    def ends(self) -> dict[str, int]:
        """Requests that ended since the process began, by finish reason."""
        return self._sink.ends()

    def _count(self, name: str) -> int:
        """Return one count; the caller holds _counting."""
        return self._earlier[name] + getattr(self.worker, name, 0)

    @property
    def state(self) -> str:
        """The state: loading, unconfigured, inactive, finalized, failed, or that of the worker."""
        worker = self.worker
        if self.loading:
            return 'loading'
        if worker is not None:
            return worker.state
        if self.closed:
            return 'finalized'
        if self.failure:
            return 'failed'
        return 'unconfigured' if self.loaded is None else 'inactive'

    @property
    def reason(self) -> str:
        """Why the last load failed, after what is wrong with the params files."""
        return '; '.join([*self.params_problems, self.failure])

    def inactive_reason(self) -> str:
        """Return why requests are refused while there is no worker, and what to do."""
        if self.loading:
            return f'the node is loading ({self.loading}): try again when it is active'
        if self.closed:
            return 'the node is shut down: restart its process'
        if self.failure:
            return (f'no model is loaded: {self.reason}; fix this and restart the node (or, for a '
                    'parameter, set it, then configure and activate)')
        if self.loaded is None:
            return 'the node is unconfigured: configure and activate it first'
        return 'the node is inactive: activate it first'


class _CountingSink:
    """Forwards reports to a sink and counts finish reasons."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.accepted, self.token, self.item = sink.accepted, sink.token, sink.item
        self._ends: Counter[str] = Counter()
        self._lock = threading.Lock()               # `finished` runs in several threads

    def finished(self, report: RequestReport, text: str) -> None:
        with self._lock:
            self._ends[report.finish_reason] += 1
        self._sink.finished(report, text)

    def ends(self) -> dict[str, int]:
        with self._lock:
            return dict(self._ends)
