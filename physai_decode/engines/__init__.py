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

"""Choose and build an engine by name; its module is imported only then."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
import time
from types import ModuleType
from typing import Any
from typing import NamedTuple

from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import described
from physai_decode.engine import Drafter
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.pip_command import install

TIMED_STEPS, TIMED_S = 8, 0.5       # of each model, to find the cost of a draft

_CLASSES = {
    'native': 'NativeEngine', 'transformers': 'TransformersEngine', 'exllamav2': 'ExLlamaV2Engine'}
_INSTALL = {
    'torch': f'PyTorch ({install("torch")}; on a Jetson the wheel for its JetPack)',
    'transformers': f'transformers ({install("-U", "transformers")})',
    'safetensors': f'safetensors ({install("safetensors")})',
    'triton': f'Triton ({install("triton")})',
    'exllamav2': f'ExLlamaV2 ({install("exllamav2")}; it also needs a CUDA toolkit)'}


class DraftError(EngineError):
    """A draft model cannot be used; without it, the model may be."""


@contextmanager
def naming_draft(path: str) -> Iterator[None]:
    """
    Convert errors inside ``with`` into one that names the draft model.

    :raises DraftError: for any error.
    """
    try:
        yield
    except Exception as error:
        reason = error if isinstance(error, EngineError) else described(error)
        raise DraftError(
            f'the draft model {path} cannot be used: {reason}; or set speculation.draft_model to '
            'another model, or speculation.name to lookup') from error


class Chosen(NamedTuple):
    """The name of an engine, and why it was chosen."""

    name: str
    reason: str


def choose(model: Checkpoint, config: EngineConfig) -> Chosen:
    """
    Choose the engine for a model, without loading it.

    ``auto`` selects native if it supports the model. Otherwise it selects exllamav2 for EXL2
    weights, and transformers for all others.

    :raises EngineError: the engine does not exist, or PyTorch is not installed.
    """
    name = config.name
    if name == 'auto':
        return _choose(model)
    if name not in _CLASSES:
        raise EngineError(
            f'engine.name is {name!r}: expected one of auto, {", ".join(_CLASSES)}')
    return Chosen(name, 'engine.name is set to it')


def build(model: Checkpoint, config: EngineConfig,
          progress: Callable[[str], None] = lambda text: None, passes: bool = False,
          draft: Checkpoint | None = None) -> Engine:
    """
    Load a model into the engine that `choose` returns.

    :param progress: called with a line of text at each step of the load.
    :param passes: prepare to verify drafts, if the engine is a `physai_decode.engine.Verifier`;
        the details of its footprint say whether it can.
    :param draft: a smaller model to make drafts, if the engine can verify them.
    :raises EngineError: the engine is not installed, or cannot run the model; all memory is
        freed.
    :raises DraftError: the draft model cannot be used, or the model does not fit beside it.
    """
    name, reason = choose(model, config)
    progress(f'engine {name}, because {reason}')
    kind = getattr(_load(name), _CLASSES[name])
    engine: Engine
    details = {}
    if passes and draft is not None and hasattr(kind, 'verify'):
        engine = _with_draft(kind, model, draft, config, progress)
    elif passes and hasattr(kind, 'verify'):
        engine = kind(model, config, progress, passes=True)
    else:
        engine = kind(model, config, progress)
        if passes:
            reason = f'off: the engine {name} does not support drafts; native does'
            progress(f'speculation is {reason}')
            details['speculation'] = reason
    from physai_decode.engines import device
    details.update(device.in_force(config, engine.footprint.device))
    engine.footprint = replace(
        engine.footprint, details={**engine.footprint.details, **details})
    return engine


def _with_draft(kind: Any, model: Checkpoint, draft: Checkpoint, config: EngineConfig,
                progress: Callable[[str], None]) -> Engine:
    """Load a model and its draft model; drop the latter if the engine can't verify drafts."""
    with ExitStack() as undo:
        with naming_draft(str(draft.folder)):
            small = kind(draft, config, lambda text: progress(f'draft model: {text}'))
        undo.callback(small.close)
        size = f'{small.footprint.checkpoint_weight_bytes / 1e9:.3g} GB'
        try:
            engine = kind(model, config, progress, passes=True)
        except EngineError as error:
            raise DraftError(f'beside a draft model of {size}: {error}') from None
        if len(engine.pass_costs) == 1:
            return engine
        undo.callback(engine.close)
        step_s = _step_s(engine)
        with naming_draft(str(draft.folder)):
            engine.drafter = Drafter(small, _step_s(small) / step_s, step_s)
        report = (f'{draft.folder}: {size}, {small.footprint.dtype}, context '
                  f'{small.footprint.max_context}, a token costs {engine.drafter.cost:.2f} steps')
        progress(f'the draft model is {report}')
        undo.pop_all()
    engine.footprint = replace(
        engine.footprint, details={**engine.footprint.details, 'draft_model': report})
    return engine


def _step_s(engine: Engine) -> float:
    """Return the minimum time of a decode step on the host, in seconds."""
    prompt, times_s = [0], list[float]()
    engine.rewind(0)
    engine.feed(prompt)
    engine.first(SamplingConfig(), prompt)
    while len(times_s) < TIMED_STEPS and sum(times_s) < TIMED_S:
        begin_s = time.perf_counter()
        engine.step(0)
        times_s.append(time.perf_counter() - begin_s)
    engine.rewind(0)
    return min(times_s)


def _choose(model: Checkpoint) -> Chosen:
    _load('native')
    from physai_decode.engines.native import families
    from physai_decode.engines.native import formats
    quantized = model.quantized
    try:
        families.parse(model.config)
        if quantized:
            formats.parse(quantized)
    except EngineError as reason:
        exl2 = quantized and quantized.method == 'exl2'
        return Chosen('exllamav2' if exl2 else 'transformers', str(reason))
    kind = model.quantization if quantized else 'unquantised'
    return Chosen('native', f'it supports {model.model_type} with {kind} weights')


def _load(name: str) -> ModuleType:
    try:
        return import_module(f'physai_decode.engines.{name}')
    except ImportError as error:
        missing = (error.name or '').partition('.')[0].replace('physai_decode', name)
        raise EngineError(
            f'the engine {name} is not installed ({error}): install '
            f'{_INSTALL.get(missing or name, missing)} or choose another engine.name') from None
