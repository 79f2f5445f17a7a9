"""
ExLlamaV2: that library's kernels for GPTQ and EXL2 weights, on an NVIDIA GPU in float16.

One step is the library's forward pass over its own cache. The likeliest token is chosen on the
device and fed back there, one step ahead of the host; any other choice is made by the library's
own sampler, on the host. Written against ExLlamaV2 0.3.2, the last version there is. Its extension
is compiled at first use. Its kernels add with atomics: the same step need not give the same last
bits twice, so the same prompt and seed need not give the same answer where two tokens are almost
equally likely. Where flash-attn is missing, a step attends by PyTorch's kernels in the engine's
own way. The engine knows no text and reads no tokenizer.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
import gc
from importlib import import_module
from importlib.util import find_spec
import os
from pathlib import Path
import random
import shutil
import sysconfig
import threading
import time
import traceback
from types import SimpleNamespace
from typing import Any

from physai_decode import checkpoint
from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import checked_prompt
from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.engine import Footprint
from physai_decode.engine import shared_prefix
from physai_decode.engine import Step
from physai_decode.engines import device as devices
from safetensors import safe_open
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import cpp_extension

if find_spec('exllamav2') is None:
    raise ModuleNotFoundError("No module named 'exllamav2'", name='exllamav2')

_FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3')
_PIECE_TOKENS = 2048      # of a prompt, read at a time; the library's own default
_GRAPH_CALLS = 205        # of a layer, before the library captures it (its MIN_GRAPH_INSTANCES)
_AHEAD = 1                # steps that are launched before an id is read
_TICK_S = 5.0


class ExLlamaV2Engine:
    """See `physai_decode.engine.Engine`."""

    footprint: Footprint

    def __init__(self, folder: Path, config: EngineConfig,
                 progress: Callable[[str], None] = lambda text: None):
        """
        Compile the library's extension where that was not done yet, load, and warm up.

        :param progress: while the extension is compiled it is called from another thread.
        :raises EngineError: the library or the model can't be had on this device; nothing stays
            allocated.
        """
        self._model = self._cache = None
        self._device = _device(config)
        model = checkpoint.inspect(folder)
        limit = min(config.max_context, model.context_limit or config.max_context)
        with checkpoint.parsing(folder / 'config.json'):
            _check(model, limit)
        begun_s = time.perf_counter()
        library = _library(progress)
        imported_s = time.perf_counter()
        self._seen: list[int] = []      # the ids whose keys and values the cache holds
        try:
            settings = _settings(library, model, config, limit)
            kv_bytes = 4 * settings.num_hidden_layers * settings.num_key_value_heads \
                * settings.head_dim * limit
            with devices.enough_memory(self._device, model.weight_bytes + kv_bytes):
                self._load(library, settings, model, progress)
                loaded_s = time.perf_counter()
                progress('warming up')
                self._warm_up(limit, _GRAPH_CALLS + 3 if config.cuda_graph else 8)
            name, uuid = devices.describe(self._device)
            attention = import_module('exllamav2.attn')
            self.footprint = Footprint(
                engine='exllamav2', model_type=model.model_type, dtype='float16',
                quantization=model.quantization, device=str(self._device), device_name=name,
                device_uuid=uuid, cuda_graph='captured' if config.cuda_graph else 'off',
                max_context=limit, vocab_size=settings.vocab_size,
                eos_token_ids=model.eos_token_ids, read_weight_bytes=self._read_weight_bytes(),
                checkpoint_weight_bytes=model.weight_bytes, layers=settings.num_hidden_layers,
                kv_heads=settings.num_key_value_heads, head_dim=settings.head_dim,
                kv_element_bytes=2, details={
                    'exllamav2': library.__version__, 'torch': torch.__version__,
                    'attention': 'flash-attn' if attention.has_flash_attn else
                    'sdpa over query groups, without cuDNN',
                    'graphs': "the library's own, around attention and of the feed-forward",
                    'import_s': f'{imported_s - begun_s:.3f}',
                    'load_s': f'{loaded_s - imported_s:.3f}',
                    'warm_up_s': f'{time.perf_counter() - loaded_s:.3f}'})
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self.close()
            raise

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Iterator[Step]:
        """See `physai_decode.engine.Engine.stream`."""
        return self._steps(checked_prompt(prompt_ids, self.footprint), sampling)

    def close(self) -> None:
        """See `physai_decode.engine.Engine.close`."""
        if self._model is not None:
            self._model.unload()
        self._model = self._cache = None
        gc.collect()
        torch.cuda.empty_cache()

    # From here on the thread is the one that iterates. The library computes in a stream of its
    # own, which it makes each thread's current one.

    def _steps(self, prompt, sampling):
        self._enter()
        cached = shared_prefix(self._seen, prompt[:-1])
        self._rewind(cached)
        watch, start, prefill_s = devices.Stopwatch(self._device), cached, 0.0
        while len(prompt) - start > self._piece:
            watch.start()
            self._feed(prompt[start:start + self._piece], want=False)
            watch.stop()
            prefill_s += watch.read_s()
            self._seen += prompt[start:start + self._piece]
            start += self._piece
            yield Step((), None, cached)
        choose = None if sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0 \
            else _Chooser(sampling, prompt, self.footprint.max_context, self.footprint.vocab_size)
        watch.start()
        logits = self._feed(prompt[start:])
        watch.stop()
        prefill_s += watch.read_s()
        self._seen += prompt[start:]
        token = logits.argmax(-1)                   # [1, 1]
        number = int(token) if choose is None else choose(logits)
        yield Step((number,), prefill_s, cached)
        count = min(sampling.max_new_tokens, self.footprint.max_context - len(prompt)) - 1
        for following, device_s in (self._greedy(token, count) if choose is None else
                                    self._chosen(number, count, choose)):
            self._seen.append(number)
            number = following
            yield Step((number,), device_s, cached)

    def _greedy(self, token, count):
        """Launch each step before the host has the id that the step before it gave."""
        flying: deque = deque()
        for index in range(count):
            watch, landing = self._slots[index % len(self._slots)]
            watch.start()
            token = self._forward(token).argmax(-1)
            landing.copy_(token, non_blocking=True)
            watch.stop()
            flying.append((watch, landing))
            if len(flying) > _AHEAD:
                yield _land(*flying.popleft())
        for each in flying:
            yield _land(*each)

    def _chosen(self, number, count, choose):
        watch = devices.Stopwatch(self._device)
        for _ in range(count):
            watch.start()
            logits = self._feed([number])
            watch.stop()
            number = choose(logits)
            yield number, watch.read_s()

    def _feed(self, ids, want=True):
        return self._forward(torch.tensor([ids], device=self._device), want)

    @torch.inference_mode()
    def _forward(self, ids, want=True):
        """
        Run ids [1, tokens] after what the cache holds.

        :returns: the logits after the last one, float16 [1, 1, padded vocab]; None without `want`.
        """
        tokens, past = ids.shape[1], self._cache.current_seq_len
        form = self._params(1, tokens, past)
        if tokens > 1:
            # Without flash-attn the library lets a prompt's tokens see those after them, but for
            # a mask that it has for another purpose.
            form.block_diag_mask = torch.full(
                (tokens, past + tokens), float('-inf'), dtype=torch.float16,
                device=self._device).triu_(past + 1)
        with devices.attention_backends(self._device):
            return self._model.forward_chunk(
                ids, self._cache, preprocess_only=not want, last_id_only=True, attn_params=form
            ).get('logits')

    def _enter(self):
        # The current CUDA device and stream are each thread's own.
        torch.cuda.set_device(self._device)
        import_module('exllamav2.device').set_device_streams()

    def _rewind(self, length):
        del self._seen[length:]
        self._cache.current_seq_len = length

    def _load(self, library, settings, model, progress):
        torch.cuda.set_device(self._device)
        try:
            network = library.ExLlamaV2(settings)
            self._model = network
            index = self._device.index
            # Nothing fits in the devices before this one, everything in this one.
            with torch.inference_mode():
                network.load([0.0] * index + [1e6], lazy=True)
                # Beside the rest, so that ids need not leave the device.
                network.modules[0].set_device_idx(index)
                for number, module in enumerate(network.modules):
                    if number % 8 == 0:
                        progress(f'weights, part {number + 1} of {len(network.modules)}')
                    module.load()
                attend_by_groups(network)
                self._cache = library.ExLlamaV2Cache(network)
            torch.cuda.synchronize(self._device)
        # The library raises whatever its many parts raise, and asserts.
        except Exception as error:
            if devices.is_out_of_memory(error):
                raise
            raise EngineError(
                f'{model.folder} can not be loaded by ExLlamaV2 {library.__version__}: '
                f'{first_line(error)}') from None
        self._params = import_module('exllamav2.attn').ExLlamaV2Attention.Params
        self._piece = settings.max_input_len
        self._slots = [
            (devices.Stopwatch(self._device),
             torch.empty((1, 1), dtype=torch.long, pin_memory=self._device.type == 'cuda'))
            for _ in range(_AHEAD + 1)]

    def _warm_up(self, limit, calls):
        self._enter()
        self._feed([0] * min(64, self._piece, limit - 1))
        token = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        for _ in range(calls):
            self._rewind(1)
            self._forward(token)
        self._rewind(0)
        torch.cuda.synchronize(self._device)

    def _read_weight_bytes(self):
        embedding, *others = self._model.modules_dict.values()
        row = embedding.embedding.weight[0]
        total = row.numel() * row.element_size()
        for module in others:
            # g_idx and q_invperm only serve to make q_perm.
            packed = getattr(module, 'q_tensors', None) or {}
            tensors = [tensor for name, tensor in packed.items()
                       if name not in ('g_idx', 'q_invperm')]
            if not packed:
                plain = getattr(module, 'linear', None) or module
                tensors = [getattr(plain, 'weight', None), getattr(plain, 'bias', None)]
            total += sum(tensor.numel() * tensor.element_size()
                         for tensor in tensors if tensor is not None)
        return total


class _Chooser:
    """The library's sampler, one random generator and the ids so far, for one request."""

    def __init__(self, sampling, prompt, limit, vocab_size):
        sampler = import_module('exllamav2.generator').ExLlamaV2Sampler
        # To the library a top_p of 0, a min_p of 1 and a temperature of 0 mean that they are off.
        one = sampling.temperature == 0.0 or sampling.top_p == 0.0 or sampling.min_p == 1.0
        self._sample = sampler.sample
        self._settings = sampler.Settings(
            temperature=sampling.temperature or 1.0, top_k=1 if one else sampling.top_k,
            top_p=sampling.top_p, min_p=sampling.min_p,
            token_repetition_penalty=sampling.repetition_penalty)
        self._random = random.Random(sampling.seed)
        # All that the sampler asks a tokenizer.
        self._tokenizer = SimpleNamespace(get_vocab_size=lambda: vocab_size)
        self._ids = torch.empty((1, limit), dtype=torch.long)
        self._ids[0, :len(prompt)] = torch.tensor(prompt)
        self._count = len(prompt)

    def __call__(self, logits):
        """Choose a token's id from float16 logits [1, 1, padded vocab] on the device."""
        token = self._sample(
            logits.float().cpu(), self._settings, self._ids[:, :self._count],
            self._random.random(), self._tokenizer)[0]
        self._ids[0, self._count] = number = int(token)
        self._count += 1
        return number


def attend_by_groups(network: Any) -> None:
    """
    Let a loaded ExLlamaV2's decode steps read keys and values where they lie in the cache.

    Where flash-attn is missing the library first copies them for each query head: 5.9 instead of
    4.4 ms a step at 2048 tokens of Qwen-2.5-7B's shape on an H200. With flash-attn this changes
    nothing.
    """
    for module in network.modules:
        if hasattr(module, '_attn_torch'):
            module._attn_torch = partial(_attend, module._attn_torch, module.scaling)


def _attend(whole, scaling, batch, tokens, queries, keys, values, *others):
    """
    Attend from queries [batch, tokens, heads, dim].

    :param whole: the library's way, for a prompt with its mask.
    :param keys: and values: [batch, places, key and value heads, dim].
    :returns: [batch, tokens, heads * dim].
    """
    if tokens > 1:
        return whole(batch, tokens, queries, keys, values, *others)
    # To the kernel the heads that share keys are tokens of one head; each sees the whole context.
    groups = queries.reshape(batch, keys.shape[2], -1, keys.shape[3])
    return scaled_dot_product_attention(
        groups, keys.transpose(1, 2), values.transpose(1, 2), scale=scaling
    ).reshape(batch, 1, -1)


def _land(watch, landing):
    device_s = watch.read_s()       # waits for the copy
    return int(landing), device_s


def _device(config):
    if config.dtype not in ('auto', 'float16'):
        raise EngineError(f'engine.dtype is {config.dtype}, but ExLlamaV2 computes in float16: '
                          'set it to float16 or auto')
    device, _ = devices.select(replace(config, dtype='auto'))
    if device.type != 'cuda':
        raise EngineError('ExLlamaV2 needs an NVIDIA GPU: set engine.name to native or '
                          'transformers to run on a CPU')
    return device


def _check(model: Checkpoint, limit: int) -> None:
    """Refuse by name what the library would not run, or run wrongly."""
    config, quantization = model.text_config, model.quantization_config
    method = quantization.get('quant_method')
    if model.model_type not in _FAMILIES:
        raise EngineError(
            f'{model.folder}: the exllamav2 engine does not run {model.model_type!r} (it runs '
            f'{", ".join(_FAMILIES)}): set engine.name to transformers')
    if method not in ('gptq', 'exl2'):
        raise EngineError(
            f'{model.folder}: the exllamav2 engine runs weights quantised to gptq or exl2, these '
            f'are quantised to {method or "nothing"}: set engine.name to auto')
    if 'physai_decode_random_weights' in model.config:
        raise EngineError(
            f'{model.folder} only describes its weights, which ExLlamaV2 can not make at random: '
            'write them with decode_bench --write-checkpoint')
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ('default', 'linear', 'llama3'):
        raise EngineError(
            f'{model.folder}: ExLlamaV2 does not scale rotary positions as its config.json asks '
            f'({kind}): set engine.name to native or transformers')
    slides = model.model_type == 'mistral' or config.get('use_sliding_window')
    window = config.get('sliding_window', checkpoint.SLIDING_WINDOW) if slides else None
    if window and window < limit:
        raise EngineError(
            f'{model.folder}: ExLlamaV2 does not slide the window of {window} tokens that its '
            f'config.json asks for: set engine.max_context to {window} or less, or engine.name to '
            'native')
    if method == 'gptq':
        _check_gptq(model, quantization)


def _check_gptq(model, quantization):
    """Hold the tensors against what the library takes for granted."""
    bits, size = quantization.get('bits'), quantization.get('group_size', 128)
    layout = checkpoint.gptq_layout(quantization)
    if bits != 4 or layout not in ('gptq', 'gptq_v2'):
        raise EngineError(
            f'{model.folder}: ExLlamaV2 runs 4-bit GPTQ of the formats gptq and gptq_v2, this is '
            f'{bits}-bit {layout}: set engine.name to transformers')
    if size != -1 and (size < 32 or size & (size - 1)):
        raise EngineError(f'{model.folder}: ExLlamaV2 runs GPTQ groups of a power of two from 32 '
                          f'on, or -1, not of {size}: set engine.name to transformers')
    no_zero = 0 if layout == 'gptq_v2' else 15      # how a zero point of 0 is stored
    shifts = torch.arange(0, 32, 4)
    for name, entry in model.tensors.items():
        module, _, end = name.rpartition('.')
        if end not in ('g_idx', 'qzeros'):
            continue
        with safe_open(entry.path, 'pt') as file:
            tensor = file.get_tensor(name)
        if end == 'g_idx':
            width = len(tensor) if size == -1 else size
            plain = torch.arange(len(tensor)) // width
            if not torch.equal(tensor.sort().values.long(), plain):
                raise EngineError(f'{model.folder}: {name} does not give groups of {width} '
                                  'columns: the GPTQ checkpoint is inconsistent')
        elif (((tensor.unsqueeze(-1) >> shifts) & 15) == no_zero).any():
            raise EngineError(
                f'{model.folder}: {module} has zero points of 0, which ExLlamaV2 takes for 16: '
                'set engine.name to native')


def _settings(library, model, config, limit):
    """Give the library's own config for a folder."""
    try:
        settings = library.ExLlamaV2Config(str(model.folder))
    except Exception as error:
        raise EngineError(
            f'{model.folder} can not be read by ExLlamaV2 {library.__version__}: '
            f'{first_line(error)}') from None
    settings.max_seq_len = limit
    settings.max_input_len = min(_PIECE_TOKENS, limit)
    settings.no_graphs = not config.cuda_graph
    settings.no_xformers = True     # see attend_by_groups
    # The library does not know of quantizers that write "format" alone.
    settings.checkpoint_offset_qzeros = \
        checkpoint.gptq_layout(model.quantization_config) == 'gptq_v2'
    # Nor does it know where newer versions of transformers write this.
    rope = model.text_config.get('rope_parameters')
    if rope:
        settings.rotary_embedding_base = float(rope.get('rope_theta', 10000.0))
        kind = rope.get('rope_type', 'default')
        if kind == 'linear':
            settings.scale_pos_emb = float(rope['factor'])
        elif kind == 'llama3':
            settings.alt_rope_method = kind
            settings.l3_rope_factor = rope['factor']
            settings.l3_rope_low_freq_factor = rope['low_freq_factor']
            settings.l3_rope_high_freq_factor = rope['high_freq_factor']
            settings.l3_rope_original_max_position_embeddings = \
                rope['original_max_position_embeddings']
    return settings


def _library(progress):
    """Import the library, which compiles its extension where that was not done yet."""
    doing = "loading ExLlamaV2's kernels"
    if find_spec('exllamav2_ext') is None:
        _check_tools()
        doing = "compiling ExLlamaV2's kernels"
        lock = Path(cpp_extension._get_build_directory('exllamav2_ext', False), 'lock')
        if lock.exists():
            doing = ("waiting for another process that compiles ExLlamaV2's kernels (if there is "
                     f'none, one was killed: delete {lock})')
    with _ticking(progress, doing):
        try:
            import_module('exllamav2.generator')
            return import_module('exllamav2')
        except ImportError as error:
            raise EngineError(
                f'ExLlamaV2 can not be imported ({first_line(error)}): install '
                f'{error.name or "it"} (pip install {error.name or "-U exllamav2"}), or choose '
                'another engine.name') from None
        except (OSError, RuntimeError) as error:
            raise EngineError(
                f"ExLlamaV2's extension could not be compiled for PyTorch {torch.__version__} "
                f'with CUDA {torch.version.cuda}: {_compiler_s_word(error)}; choose another '
                'engine.name, or install a build of ExLlamaV2 for them') from None


def _check_tools():
    """Raise EngineError naming what compiling an extension of PyTorch needs and is not there."""
    home = cpp_extension.CUDA_HOME
    compiler = os.environ.get('CXX', 'c++')
    missing = []
    if not home or not Path(home, 'bin', 'nvcc').exists():
        missing.append(f"nvcc (NVIDIA's CUDA toolkit {torch.version.cuda}; set CUDA_HOME where it "
                       'is not in the usual place)')
    if not shutil.which(compiler):
        missing.append(f'{compiler} (apt install g++)')
    if not cpp_extension.is_ninja_available():
        missing.append('ninja (pip install ninja)')
    if not Path(sysconfig.get_path('include'), 'Python.h').exists():
        missing.append('Python.h (apt install python3-dev)')
    if missing:
        raise EngineError(
            "ExLlamaV2's extension is compiled at first use, and what that needs is missing: "
            f'{"; ".join(missing)}; or choose another engine.name')


@contextmanager
def _ticking(progress, doing):
    """Say now and then that it goes on; what `progress` raises ends the load."""
    done, raised, begun_s = threading.Event(), [], time.monotonic()

    def tick():
        while not done.wait(_TICK_S):
            try:
                progress(f'{doing}, {time.monotonic() - begun_s:.0f} s so far')
            except Exception as error:
                raised.append(error)
                return

    thread = threading.Thread(target=tick, name='exllamav2 progress', daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if raised:
        raise raised[0]


def _compiler_s_word(error):
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if 'error:' in line or 'fatal' in line),
                first_line(error))
