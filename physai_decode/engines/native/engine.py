"""
The native engine: a prompt in pieces, then one step after the other, ahead of the host on a GPU.

It knows token ids and its cache: which ids' keys and values it holds, and so which of a new prompt
need not be read again.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
import math
from pathlib import Path
import time

from physai_decode.checkpoint import Checkpoint
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import checked_prompt
from physai_decode.engine import EngineError
from physai_decode.engine import Footprint
from physai_decode.engine import shared_prefix
from physai_decode.engine import Step
from physai_decode.engines import device as devices
from physai_decode.engines.native import architecture
from physai_decode.engines.native import weights
from physai_decode.engines.native.graph import Pipeline
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.sampling import is_plain_greedy
from physai_decode.engines.native.sampling import Sampler
from physai_decode.engines.native.transformer import Transformer
import torch

PIECE_TOKENS = 2048            # of a prompt, read at a time
WORK_BYTES = 2**30             # beside weights and cache, on a GPU


class NativeEngine:
    """The transformer of this package on one device; see `physai_decode.engine.Engine`."""

    def __init__(self, folder: Path, config: EngineConfig,
                 progress: Callable[[str], None] = lambda message: None):
        """
        Load, tune, warm up and capture.

        :param folder: a model in Hugging Face layout.
        :raises EngineError: the model is damaged, of an architecture or format that is not run,
            or does not fit in memory.
        """
        clock = _Parts()
        self._device, self._dtype = devices.select(config)
        checkpoint = inspect(folder)
        if (checkpoint.quantization_config and config.dtype == 'auto'
                and self._device.type == 'cuda'):
            # GPTQ's scales are float16, and its kernel has less to do in float16.
            self._dtype = torch.float16
        self._shape = architecture.parse(checkpoint.config)
        self._max_context = min(config.max_context,
                                checkpoint.context_limit or config.max_context)
        needed_bytes = self._check_memory(checkpoint)
        devices.use(self._device)
        with devices.enough_memory(self._device, needed_bytes), torch.inference_mode():
            loaded = weights.load(
                self._shape, self._source(checkpoint), checkpoint.quantization_config,
                self._dtype, progress)
            clock.end('load_s')
            ops, kernels = self._ops(progress)
            self._transformer = Transformer(
                self._shape, loaded, self._max_context, self._dtype, self._device, ops)
            self._sampler = Sampler(self._shape.vocab_size, self._device)
            self._history = torch.zeros(
                self._max_context + 1, dtype=torch.int64, device=self._device)
            self._cached: list[int] = []
            self._pipeline = None
            if self._device.type == 'cuda':
                ops.tune(self._transformer, progress)
                clock.end('tune_s')
                progress('capturing the step' if config.cuda_graph else 'warming up')
                self._pipeline = Pipeline(
                    {'greedy': self._greedy_step, 'sampled': self._sampled_step},
                    self._history, config.cuda_graph)
                clock.end('capture_s')
            progress('warming up')
            self._warm_up()
            clock.end('warm_up_s')
        graph = 'unavailable' if self._device.type == 'cpu' else \
            'captured' if config.cuda_graph else 'off'
        name, uuid = devices.describe(self._device)
        details = {'kernels': kernels, **clock.parts}
        if loaded.dense_fallbacks:
            details['dense_fallbacks'] = str(loaded.dense_fallbacks)
        self.footprint = Footprint(
            engine='native', model_type=self._shape.model_type,
            dtype=str(self._dtype).removeprefix('torch.'),
            quantization=checkpoint.quantization, device=str(self._device), device_name=name,
            device_uuid=uuid, cuda_graph=graph, max_context=self._max_context,
            vocab_size=self._shape.vocab_size, eos_token_ids=checkpoint.eos_token_ids,
            read_weight_bytes=loaded.read_bytes,
            checkpoint_weight_bytes=checkpoint.weight_bytes,
            layers=self._shape.layers, kv_heads=self._shape.kv_heads,
            head_dim=self._shape.head_dim, kv_element_bytes=self._transformer.keys.element_size(),
            sliding_window=max(self._shape.windows),
            windowed_layers=sum(map(bool, self._shape.windows)) or None, details=details)

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Iterator[Step]:
        """Decode after ``prompt_ids``; see `physai_decode.engine.Engine.stream`."""
        return self._stream(checked_prompt(prompt_ids, self.footprint), sampling)

    def close(self) -> None:
        """Free everything on the device."""
        self._pipeline = self._transformer = self._sampler = self._history = None
        if self._device.type == 'cuda':
            torch.cuda.empty_cache()

    @property
    def cached_ids(self) -> list[int]:
        """Give the ids whose keys and values are in the cache."""
        return list(self._cached)

    @contextmanager
    def trial(self, captured: bool | None = None) -> Iterator[None]:
        """
        Let `stream` be tried inside ``with``, greedily; the cache then forgets what it brought.

        :param captured: whether the step runs in a CUDA graph, on CUDA; None as it was loaded.
        """
        before, own = self.cached_ids, self._pipeline
        other = captured not in (None, self.footprint.cuda_graph == 'captured')
        if other:
            devices.use(self._device)
            with torch.inference_mode():
                # Before it is captured the step is run a few times, behind what the cache holds.
                del self._cached[self._max_context - devices.WARM_UP_STEPS:]
                self._transformer.position.fill_(len(self._cached))
                self._pipeline = Pipeline({'greedy': self._greedy_step}, self._history, captured)
        try:
            yield
        finally:
            self._pipeline = own
            del self._cached[shared_prefix(self._cached, before):]
            if other and captured:
                torch.cuda.empty_cache()    # of the graph

    def prefill_logits(self, prompt_ids: Sequence[int]) -> torch.Tensor:
        """Give logits for each place of a prompt, float32 [tokens, vocab]; empties the cache."""
        self._cached = []
        with torch.inference_mode():
            return self._transformer.prefill(self._tensor(prompt_ids), 0, every=True)

    def reads(self, context: int) -> list[tuple[str, str, int]]:
        """
        Give what one step reads, in the order of its kernels.

        :returns: (start of the kernel's name, operation, bytes) for every kernel that reads
            weights or the cache; kernels that read next to nothing are left out.
        """
        t = self._transformer
        w = t.weights

        def product(operation, weight):
            return '_dense' if isinstance(weight, Dense) else '_int4', operation, weight.read_bytes

        found = []
        for layer, attention in zip(w.layers, t.attention, strict=True):
            tokens = min(context, attention.window or context)
            cache = 2 * self._shape.kv_size * tokens * t.keys.element_size()
            found += [product('qkv', layer.qkv), ('_attend', 'attention', cache),
                      product('out', layer.out), product('gate and up', layer.gate_up),
                      product('down', layer.down)]
        return [*found, product('head', w.head)]

    # From here on, ids[:start] and self._cached are what the cache holds; the thread is the one
    # that iterates.

    def _stream(self, ids, sampling):
        devices.use(self._device)
        start = shared_prefix(self._cached, ids[:-1])
        cached_tokens = start
        del self._cached[start:]
        watch = devices.Stopwatch(self._device)
        watch.start()
        while len(ids) - start > PIECE_TOKENS:
            self._prefill(ids[start:start + PIECE_TOKENS], start)
            start += PIECE_TOKENS
            self._cached = ids[:start]
            yield Step((), None, cached_tokens)
        token = self._first(ids, start, sampling)
        self._cached = list(ids)
        watch.stop()
        yield Step((token,), watch.read_s(), cached_tokens)
        limit = min(sampling.max_new_tokens - 1, self._max_context - len(ids) - 1)
        steps = self._step_ahead if self._pipeline else self._step_now
        name = 'greedy' if is_plain_greedy(sampling) else 'sampled'
        for token_id, device_s in steps(name, len(ids), limit):
            self._cached.append(token)
            token = token_id
            yield Step((token,), device_s)

    def _step_now(self, name, place, count):
        step = self._greedy_step if name == 'greedy' else self._sampled_step
        for _ in range(count):
            begun = time.perf_counter()
            with torch.inference_mode():
                step()
                token = int(self._transformer.token)
            yield token, time.perf_counter() - begun

    def _step_ahead(self, name, place, count):
        pipeline = self._pipeline
        launched = 0
        try:
            for _ in range(count):
                with torch.inference_mode():
                    while launched < count and not pipeline.full:
                        launched += 1
                        pipeline.launch(name, place + launched)
                    result = pipeline.collect()
                yield result
        finally:
            pipeline.drain()

    def _greedy_step(self):
        t = self._transformer
        t.step()
        t.ops.advance(t.logits, t.token, t.position, self._history)

    def _sampled_step(self):
        t = self._transformer
        t.step()
        t.position.add_(1)
        self._sampler.draw(t.logits, t.position, t.token)
        self._history.index_copy_(0, t.position, t.token)

    @torch.inference_mode()
    def _prefill(self, ids, start):
        return self._transformer.prefill(self._tensor(ids), start)

    @torch.inference_mode()
    def _first(self, ids, start, sampling):
        """Read the rest of the prompt and draw the first token of the answer."""
        t = self._transformer
        logits = self._prefill(ids[start:], start)
        t.position.fill_(len(ids))
        if is_plain_greedy(sampling):
            t.token.copy_(logits.argmax(0, keepdim=True))
        else:
            self._sampler.begin(sampling, self._tensor(ids))
            self._sampler.draw(logits, t.position, t.token)
        return int(t.token)

    def _warm_up(self):
        for sampling in (SamplingConfig(max_new_tokens=4),
                         SamplingConfig(max_new_tokens=4, temperature=1.0)):
            for _ in self._stream([0, 0], sampling):
                pass
        self._cached = []

    def _ops(self, progress):
        """Give the operations for this device, and what to call them."""
        if self._device.type == 'cpu':
            return TorchOps(on_host=True), 'torch'
        try:
            from physai_decode.engines.native.kernels import TritonOps
        except ImportError as error:
            progress(f"Triton is not there ({error}), so the step runs by PyTorch's operations, "
                     'several times more slowly: pip install triton')
            return TorchOps(on_host=False), 'torch'
        ops = TritonOps(self._device)
        return ops, ops.name

    def _source(self, checkpoint):
        settings = checkpoint.config.get('physai_decode_random_weights')
        if settings is not None:
            return weights.Random(settings, self._dtype, self._device)
        return weights.Files(checkpoint, self._device)

    def _check_memory(self, checkpoint: Checkpoint) -> int:
        """Give the bytes needed; raise EngineError where they are not free."""
        a = self._shape
        element = torch.empty((), dtype=self._dtype).element_size()
        weight_bytes = sum(
            entry.bytes if entry.dtype.startswith('I') else
            element * math.prod(entry.shape) for entry in checkpoint.tensors.values())
        per_token = 2 * a.layers * a.kv_size * element
        work = WORK_BYTES if self._device.type == 'cuda' else 0
        needed = weight_bytes + work + per_token * self._max_context
        free = devices.free_bytes(self._device)
        if free is None or needed <= free:
            return needed
        fits = (free - weight_bytes - work) // per_token
        advice = f'engine.max_context {fits} would fit' if fits >= 16 else \
            'not even a short context would fit: take a smaller or a quantised model'
        raise EngineError(
            f'not enough memory on {self._device}: {needed / 1e9:.2f} GB are needed (weights '
            f'{weight_bytes / 1e9:.2f}, cache {per_token * self._max_context / 1e9:.2f}, work '
            f'{work / 1e9:.2f}), {free / 1e9:.2f} GB are free; {advice}')

    def _tensor(self, ids):
        return torch.tensor(ids, dtype=torch.int64).to(self._device)


class _Parts:
    """How long each part of the start took, in seconds."""

    def __init__(self):
        self._last = time.perf_counter()
        self.parts: dict[str, str] = {}

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = f'{now - self._last:.3f}'
        self._last = now

