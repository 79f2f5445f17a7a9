"""The native engine: one transformer on one device, whose steps run ahead of the host on a GPU."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager

from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import Choice
from physai_decode.engines import device as devices
from physai_decode.engines.native import architecture
from physai_decode.engines.native import start
from physai_decode.engines.native import weights
from physai_decode.engines.native.graph import Pipeline
from physai_decode.engines.native.transformer import Transformer
from physai_decode.engines.sampling import Plan
import torch


class NativeEngine:
    """The transformer of this package on one device; see `physai_decode.engine.Engine`."""

    chunk_tokens = (1, 2048)

    def __init__(self, model: Checkpoint, config: EngineConfig,
                 progress: Callable[[str], None] = lambda message: None):
        """
        Load, tune, warm up and capture.

        :raises EngineError: the model is damaged, of an architecture or format that is not run,
            or does not fit in memory.
        """
        clock = start.PartTimes()
        self._device, dtype = start.select(model, config)
        shape = architecture.parse(model.config)
        limit = min(config.max_context, model.context_limit or config.max_context)
        needed_bytes = start.check_memory(model, shape, limit, dtype, self._device)
        devices.use(self._device)
        with devices.enough_memory(self._device, needed_bytes), torch.inference_mode():
            loaded = weights.load(shape, start.source(model, dtype, self._device),
                                  model.quantized, dtype, progress)
            clock.end('load_s')
            ops = start.operations(self._device, progress)
            # To capture a step is to run it a few times, behind whatever the cache holds.
            places = limit + devices.WARM_UP_STEPS
            self._transformer = Transformer(shape, loaded, places, dtype, self._device, ops)
            self._sampler = ops.sampler(shape.vocab_size, self._device)
            self._history = torch.zeros(places + 1, dtype=torch.int64, device=self._device)
            self._watch = devices.Stopwatch(self._device)
            self._length = 0                    # tokens in the cache
            self._pipeline = None
            if self._device.type == 'cuda':
                ops.tune(self._transformer, progress)
                clock.end('tune_s')
                self._pipeline = Pipeline(self._run_step, self._history, config.cuda_graph)
            self._prefill = start.prefill(self._transformer, config.cuda_graph, progress)
            clock.end('prefill_s')
            progress('warming up' + (' and capturing the step' if self._pipeline else ''))
            start.warm_up(self)
            clock.end('warm_up_s')
        self.footprint = start.footprint(
            model, shape, loaded, limit, dtype, self._device, config.cuda_graph,
            {'kernels': ops.name, **self._prefill.details, **clock.parts})

    def rewind(self, length: int) -> int:
        """See `physai_decode.engine.Engine.rewind`."""
        devices.use(self._device)
        if self._pipeline:
            self._pipeline.drain()
        self._length = length
        return length

    @torch.inference_mode()
    def feed(self, token_ids: Sequence[int]) -> float:
        """See `physai_decode.engine.Engine.feed`."""
        self._watch.start()
        self._prefill.feed(token_ids, self._length)
        self._watch.stop()
        self._length += len(token_ids)
        return self._watch.read_s()

    @torch.inference_mode()
    def first(self, sampling: SamplingConfig, prompt_ids: Sequence[int]) -> Choice:
        """See `physai_decode.engine.Engine.first`."""
        t = self._transformer
        self._watch.start()
        logits = self._prefill.logits()
        if self._pipeline:
            t.position.fill_(self._length)
            self._pipeline.prepare(Plan.of(sampling))
        t.position.fill_(self._length - 1)
        prompt = torch.tensor(prompt_ids, device=self._device)
        self._plan = self._sampler.begin(sampling, prompt)
        return self._drawn(logits)

    @torch.inference_mode()
    def step(self, remaining: int) -> Choice:
        """See `physai_decode.engine.Engine.step`."""
        pipeline, self._length = self._pipeline, self._length + 1
        if pipeline is None:
            self._watch.start()
            self._transformer.step()
            return self._drawn(self._transformer.logits)
        while pipeline.flying <= remaining and not pipeline.full:
            pipeline.launch(self._plan, self._length + pipeline.flying)
        return Choice(*pipeline.collect())

    def close(self) -> None:
        """See `physai_decode.engine.Engine.close`."""
        self._pipeline = self._prefill = self._transformer = self._sampler = self._history = None
        devices.give_back(self._device)

    @contextmanager
    def trial(self, captured: bool | None = None) -> Iterator[None]:
        """See `physai_decode.gap.Measurable.trial`; a trial's steps are greedy."""
        own = self._pipeline
        if captured not in (None, self.footprint.cuda_graph == 'captured'):
            devices.use(self._device)
            with torch.inference_mode():
                self._pipeline = Pipeline(self._run_step, self._history, captured)
        try:
            yield
        finally:
            self._pipeline = own
            devices.give_back(self._device)     # what a graph took

    @torch.inference_mode()
    def prefill_logits(self, prompt_ids: Sequence[int]) -> torch.Tensor:
        """Give logits for each place of a prompt, float32 [tokens, vocab]; empties the cache."""
        self.rewind(0)
        ids = torch.tensor(prompt_ids, device=self._device)
        return self._transformer.prefill(ids, 0, every=True)

    def reads(self, context: int) -> list[tuple[str, str, int]]:
        """See `Transformer.reads`."""
        return self._transformer.reads(context)

    def _run_step(self, plan):
        t = self._transformer
        t.step()
        self._sampler.draw(plan, t.logits, t.position, t.token, self._history)

    def _drawn(self, logits):
        t = self._transformer
        self._sampler.draw(self._plan, logits, t.position, t.token, self._history)
        token_id = int(self._history[self._length])
        self._watch.stop()
        return Choice(token_id, self._watch.read_s())
