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

"""The start of the native engine: memory check, weights, operations, timing of passes."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
import math
import time
from typing import TYPE_CHECKING

from physai_decode.checkpoint import Checkpoint
from physai_decode.checkpoint import TensorEntry
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import Engine
from physai_decode.engine import EngineError
from physai_decode.engine import Footprint
from physai_decode.engines import chip
from physai_decode.engines import device as devices
from physai_decode.engines import leftover
from physai_decode.engines import stored
from physai_decode.engines.native import families
from physai_decode.engines.native import formats
from physai_decode.engines.native import source
from physai_decode.engines.native import torch_forms
from physai_decode.engines.native import weight_size
from physai_decode.engines.native import weights
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.mlp import Mlp
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.torch_forms import TorchForms
from physai_decode.engines.native.transformer import EagerPrefill
from physai_decode.engines.native.transformer import Transformer
from physai_decode.engines.native.tuning import timed
from physai_decode.engines.sampling import ROWS
from physai_decode.pip_command import install
import torch

if TYPE_CHECKING:
    from physai_decode.engines.native.prefill import Prefill

PASS_ROWS = (1, 2, 4, ROWS)    # other sizes use the graph of the next larger one
PASS_CONTEXT = 4096            # tokens before a pass that is timed, if they fit
PASS_REPEATS = 20              # on a CPU; fewer if they take `PASS_S`
PASS_S = 0.5
SLOW_PASS_S = 0.1              # if a pass takes longer, larger ones may be skipped
USELESS_COST = 0.9             # a pass is useless if each of its rows costs more steps than this
NAMED = 8                      # maximum unused tensors to name
WORK_BYTES = 2**30             # in addition to weights and cache, on a GPU
SPARE_BYTES = 2**30            # what unpacked weights leave of memory that other programs use
# The settings whose steps are captured at the start; others are captured at first use.
WARM_UP = (SamplingConfig(), SamplingConfig(temperature=1.0),
           SamplingConfig(temperature=1.0, top_k=50, top_p=0.9))


class PartTimes:
    """The times of the parts of the start, in seconds."""

    def __init__(self) -> None:
        """Start the first part."""
        self._last = time.perf_counter()
        self.parts: dict[str, str] = {}

    def end(self, part: str) -> None:
        """End a part, and start the next."""
        now = time.perf_counter()
        self.parts[part] = f'{now - self._last:.3f}'
        self._last = now


def select(checkpoint: Checkpoint, config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    """Select the device and the dtype by the settings and the model."""
    device, dtype = devices.select(config)
    if not checkpoint.quantized or config.dtype != 'auto':
        return device, dtype
    fastest = formats.parse(checkpoint.quantized).dtype
    if fastest is None:
        return device, dtype
    if device.type == 'cpu' or _problem(device):
        return device, torch.bfloat16 if torch_forms.has_int4(device) else dtype
    wide = families.parse(checkpoint.config).wide_range
    return device, dtype if wide else fastest


def operations(device: torch.device, dtype: torch.dtype, progress: Callable[[str], None],
               quantized: bool = False) -> TorchOps:
    """Return the operations for a device, a dtype, and weights that may be quantised."""
    if device.type == 'cpu':
        return TorchOps(on_host=True, dtype=dtype)
    if held := chip.pretended(device):
        progress(f'{chip.VARIABLE} is set: {devices.describe(device)[0]} runs as if it had '
                 f'compute capability {held}')
    if problem := _problem(device, quantized and dtype == torch.float32):
        progress(f"{problem}. Until then, the step runs with PyTorch's operations, several times "
                 'more slowly')
        return TorchOps(on_host=False, dtype=dtype)
    # The last of a chain, each of which adds the kernels of a form to the one before: TritonOps
    # (Dense), Int4Ops, ScaledOps, Fp4Ops.
    from physai_decode.engines.native.fp4_kernels import Fp4Ops
    return Fp4Ops(device, dtype=dtype)


def _problem(device, float32=False):
    """Return why a GPU cannot run the kernels; None if it can; see `compiler.problem`."""
    try:
        from physai_decode.engines import compiler
        from physai_decode.engines.native import fp4_kernels  # noqa: F401
    except ImportError as error:
        return f'Triton cannot be used ({error}): {install("-U", "triton")}'
    return compiler.problem(device, float32)


def prefill(transformer: Transformer, capture: bool,
            progress: Callable[[str], None]) -> 'Prefill | EagerPrefill':
    """Return the prefill, with captured chunks if possible."""
    if capture and transformer.ops.name.startswith('triton'):
        from physai_decode.engines.native.prefill import Prefill
        if Prefill.runs(transformer):
            return Prefill(transformer, progress=progress)
    return EagerPrefill(transformer)


def tensors(checkpoint: Checkpoint, dtype: torch.dtype,
            device: torch.device) -> source.Random | source.Files:
    """Return the source of the weights: the files, or a description of random weights."""
    if checkpoint.random_weights is not None:
        return source.Random(checkpoint, checkpoint.random_weights, dtype, device)
    return source.Files(checkpoint, device)


def check_memory(checkpoint: Checkpoint, shape: Architecture, max_context: int,
                 dtype: torch.dtype, device: torch.device) -> int:
    """
    Return the bytes of memory that the engine needs.

    :param max_context: capacity of the cache in tokens.
    :raises EngineError: they are not free; the message says what would fit.
    """
    weight_bytes = weight_size.weight_bytes(_own(checkpoint, shape), checkpoint.quantized, dtype)
    per_token = 2 * shape.layers * shape.kv_size * dtype.itemsize
    work = WORK_BYTES if device.type == 'cuda' else 0
    needed = weight_bytes + work + per_token * max_context
    free = devices.free_bytes(device)
    if free is None or needed <= free:
        return needed
    fits = (free - weight_bytes - work) // per_token
    advice = f'engine.max_context {fits} would fit' if fits >= 16 else \
        'not even a short context would fit: take a smaller or a quantised model'
    raise EngineError(
        f'not enough memory on {device}: {needed / 1e9:.2f} GB are needed (weights '
        f'{weight_bytes / 1e9:.2f}, cache {per_token * max_context / 1e9:.2f}, work '
        f'{work / 1e9:.2f}), {free / 1e9:.2f} GB are free; {advice}')


def unpacked_limit(device: torch.device, needed_bytes: int) -> float:
    """Return the bytes of memory that unpacked weights may use, in addition to those needed."""
    free = devices.free_bytes(device)
    if free is None:
        return math.inf
    return free - needed_bytes - (SPARE_BYTES if devices.shares_memory(device) else 0)


def transformer(checkpoint: Checkpoint, shape: Architecture, places: int, dtype: torch.dtype,
                device: torch.device, progress: Callable[[str], None],
                clock: PartTimes, needed_bytes: int, passes: bool) -> tuple[Transformer, str]:
    """
    Load the weights, and on a GPU tune the step.

    :param places: capacity of the cache in tokens.
    :param needed_bytes: the size of the stored weights and the cache.
    :param passes: whether to prepare passes of several rows.
    :returns: the transformer, and why it cannot run such passes; empty if it can, or need not.
    """
    files = tensors(checkpoint, dtype, device)
    _check_quantised(checkpoint, files)
    ops = operations(device, dtype, progress, checkpoint.quantized is not None)
    forms = None
    if ops.name == 'torch':
        forms = TorchForms(dtype, device, unpacked_limit(device, needed_bytes))
    loaded = weights.load(shape, files, checkpoint.quantized, dtype, progress, forms)
    if forms and forms.report:
        progress(forms.report)
    unused = tuple(sorted(checkpoint.tensors.keys() - files.used)) \
        if isinstance(files, source.Files) else ()
    trunk, head = weights.prefixes(shape, checkpoint.tensors.get)
    leftover.check(checkpoint, unused, (trunk, f'{head}.'))
    clock.end('load_s')
    reason = _no_passes(loaded, ops) if passes else ''
    rows = ROWS if passes and not reason else 1
    if rows > 1 and ops.name != 'torch':
        from physai_decode.engines.native.pass_kernels import PassOps
        ops = PassOps(device, dtype=dtype)
    made = Transformer(shape, replace(loaded, unused=unused), places, dtype, device, ops, rows)
    if device.type == 'cuda':
        made.ops.tune(made, progress)
        clock.end('tune_s')
    return made, reason


def _check_quantised(checkpoint: Checkpoint, files: source.Source) -> None:
    """Refuse a checkpoint if no module is stored in the format that config.json names."""
    if checkpoint.quantized:
        format_ = formats.parse(checkpoint.quantized)
        modules = {name.rpartition('.')[0] for name in checkpoint.tensors}
        if not any(format_.holds(files, module) for module in modules):
            raise stored.not_quantised(checkpoint)


def _no_passes(loaded: weights.Weights, ops: TorchOps) -> str:
    """Return why passes of several rows are not supported; empty if they are."""
    if not all(isinstance(layer.mlp, Mlp) for layer in loaded.layers):
        return 'experts take their tokens one by one'
    kinds = {weight.kind for weight in _products(loaded)
             if not isinstance(weight, Dense | Int4 | Fp4)}
    if kinds and ops.name != 'torch':
        return f'the kernels of {", ".join(sorted(kinds))} weights take one row'
    return ''


def _products(loaded):
    for layer in loaded.layers:
        yield from (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down)
    yield loaded.head


def pass_costs(transformer: Transformer, run: Callable[[int], None]) -> dict[int, float]:
    """
    Time passes of several rows behind a context, whose content does not matter.

    :param run: runs a pass of a number of rows; it may change the position.
    :returns: the cost of a pass by its rows, relative to one row. Larger passes are left out if
        their rows cost about as much as separate steps.
    """
    place = min(transformer.max_context - 2 * ROWS, PASS_CONTEXT)

    def once(rows):
        transformer.position.fill_(place)
        run(rows)

    transformer.tokens[1:].fill_(-1)
    if transformer.position.device.type == 'cuda':
        times_s = {rows: timed(partial(once, rows)) for rows in PASS_ROWS}
    else:
        times_s = _host_times_s(once)
    transformer.position.zero_()
    return {rows: max(1.0, spent_s / times_s[1]) for rows, spent_s in times_s.items()}


def _host_times_s(once):
    """Return the minimum time of passes by rows; sizes alternate, as other programs may run."""
    times_s = dict.fromkeys(PASS_ROWS, math.inf)
    end_s = time.perf_counter() + PASS_S
    for number in range(PASS_REPEATS):
        for rows in tuple(times_s):
            begin_s = time.perf_counter()
            once(rows)
            times_s[rows] = min(times_s[rows], time.perf_counter() - begin_s)
            if times_s[rows] > SLOW_PASS_S and times_s[rows] > USELESS_COST * rows * times_s[1]:
                times_s = {each: spent_s for each, spent_s in times_s.items() if each <= rows}
                break
        if number and time.perf_counter() > end_s:
            break
    return times_s


def footprint(checkpoint: Checkpoint, transformer: Transformer, max_context: int,
              config: EngineConfig, details: Mapping[str, str]) -> Footprint:
    """Describe the loaded model, and what one of its steps reads."""
    shape, loaded = transformer.architecture, transformer.weights
    dtype, device = transformer.keys.dtype, transformer.keys.device
    name, uuid = devices.describe(device)
    details = {'kernels': transformer.ops.name, **details}
    if loaded.dense_fallbacks:
        details['dense_fallbacks'] = str(loaded.dense_fallbacks)
    if loaded.unused:
        more = f' and {len(loaded.unused) - NAMED} more' if len(loaded.unused) > NAMED else ''
        details['unused_tensors'] = ', '.join(loaded.unused[:NAMED]) + more
    return Footprint(
        engine='native', model_type=shape.model_type, dtype=str(dtype).removeprefix('torch.'),
        quantization=checkpoint.quantization, device=str(device), device_name=name,
        device_uuid=uuid, cuda_graph='unavailable' if device.type == 'cpu' else
        'captured' if config.cuda_graph else 'off', max_context=max_context,
        vocab_size=shape.vocab_size, eos_token_ids=checkpoint.eos_token_ids,
        read_weight_bytes=loaded.read_bytes,
        checkpoint_weight_bytes=sum(
            entry.bytes for entry in _own(checkpoint, shape).values()), layers=shape.layers,
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, kv_element_bytes=dtype.itemsize,
        sliding_window=max(shape.windows),
        windowed_layers=sum(map(bool, shape.windows)) or None,
        layer_parameters=loaded.layer_parameters, slow_format=loaded.slow_format,
        sleeps=config.blocking_wait and device.type == 'cuda', details=details)


def _own(checkpoint: Checkpoint, shape: Architecture) -> dict[str, TensorEntry]:
    """Return the tensors of the language model, without those of a vision tower."""
    trunk, head = weights.prefixes(shape, checkpoint.tensors.get)
    return {name: entry for name, entry in checkpoint.tensors.items()
            if name.startswith((trunk, f'{head}.'))}


def warm_up(engine: Engine, prompt: Sequence[int]) -> None:
    """Run a prompt and a few steps with each of `WARM_UP`."""
    for sampling in WARM_UP:
        engine.rewind(0)
        engine.feed(prompt)
        engine.first(sampling, prompt)
        for remaining in (2, 1, 0):
            engine.step(remaining)
    engine.rewind(0)
