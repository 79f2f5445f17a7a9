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

"""The native engine: one transformer on one device; on a GPU, its steps run ahead of the host."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat

from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import Choice
from physai_decode.engine import Choices
from physai_decode.engine import Constraint
from physai_decode.engine import Drafter
from physai_decode.engine import Elapsed
from physai_decode.engines import device as devices
from physai_decode.engines import logits
from physai_decode.engines.native import families
from physai_decode.engines.native import self_check
from physai_decode.engines.native import start
from physai_decode.engines.native.graph import Pipeline
from physai_decode.engines.sampling import GREEDY
from physai_decode.engines.sampling import Plan
from physai_decode.engines.sampling import Row
from physai_decode.engines.sampling import ROWS
from physai_decode.engines.sampling import SINGLE_ROW
import torch


class NativeEngine:
    """The transformer of this package on one device; see `physai_decode.engine.Engine`."""

    chunk_tokens = (1, 2048)
    pipeline: Pipeline | None = None        # runs the steps; None on a CPU
    pass_costs: Mapping[int, float] = {1: 1.0}
    drafter: Drafter | None = None

    def __init__(self, model: Checkpoint, config: EngineConfig,
                 progress: Callable[[str], None] = lambda message: None, passes: bool = False):
        """
        Load, tune, warm up and capture.

        :param passes: prepare to verify drafts, if the model and kernels can.
        :raises EngineError: the model is damaged, has an unsupported architecture or format, or
            does not fit in memory.
        """
        clock, drafts = start.PartTimes(), dict[str, str]()
        self._device, dtype = start.select(model, config)
        limit = min(config.max_context, model.context_limit or config.max_context)
        shape = families.parse(model.config).within(limit)
        needed_bytes = start.check_memory(model, shape, limit, dtype, self._device)
        self._ahead, self._priority = config.steps_ahead, config.stream_priority
        self._blocking = config.blocking_wait
        self._stream = devices.stream(self._device, self._priority)
        devices.use(self._device, self._stream)
        with devices.enough_memory(self._device, needed_bytes), torch.inference_mode():
            # Capturing a step runs it a few times, behind the tokens in the cache.
            places = limit + devices.WARM_UP_STEPS * (ROWS if passes else 1)
            self.transformer, no_passes = start.transformer(
                model, shape, places, dtype, self._device, progress, clock, needed_bytes, passes)
            t = self.transformer
            self._sampler = t.ops.sampler(shape.vocab_size, self._device)
            self._history = torch.zeros(t.max_context + 1, dtype=torch.int64, device=self._device)
            self._watch, self._fed = (devices.Stopwatch(self._device) for _ in range(2))
            self._length = 0                    # tokens in the cache
            if self._device.type == 'cuda':
                self.pipeline = self.piped(config.cuda_graph)
            self._prefill = start.prefill(t, config.cuda_graph, progress)
            clock.end('prefill_s')
            progress('warming up' + (' and capturing the step' if self.pipeline else ''))
            prompt = logits.warm_up_ids(shape.vocab_size, limit)
            start.warm_up(self, prompt)
            logits.check(t.logits, dtype)
            self_check.check(self, t, self._prefill.dequantiser, prompt)
            clock.end('warm_up_s')
            if passes:
                drafts = {'speculation': f'off: {no_passes}' if no_passes else
                          self._prepare_passes(progress)}
                progress(f'speculation is {drafts["speculation"]}')
                clock.end('passes_s')
        stream = {'stream_priority': str(self._priority)} if self.pipeline else {}
        self.footprint = start.footprint(
            model, t, limit, config,
            {**stream, **self._prefill.details, **drafts, **clock.parts})

    def rewind(self, length: int) -> int:
        """See `physai_decode.engine.Engine.rewind`."""
        devices.use(self._device, self._stream)
        if self.pipeline:
            self.pipeline.drain()
        self._length = length
        return length

    @torch.inference_mode()
    def feed(self, token_ids: Sequence[int]) -> Elapsed:
        """See `physai_decode.engine.Engine.feed`."""
        self._fed.start()
        self._prefill.feed(token_ids, self._length)
        self._fed.stop()
        self._length += len(token_ids)
        return self._fed.read_s

    @torch.inference_mode()
    def first(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constraint: Constraint | None = None) -> Choice:
        """See `physai_decode.engine.Engine.first`."""
        t = self.transformer
        self._watch.start()
        last = self._prefill.logits()
        if self.pipeline:
            self._capture(self.pipeline, Plan.of(sampling, constraint is not None))
        t.position.fill_(self._length - 1)
        self._plan = self._sampler.begin(sampling, prompt_ids, constraint is not None)
        self._constraint = constraint
        return self._sampled(last)

    @torch.inference_mode()
    def step(self, remaining: int) -> Choice:
        """See `physai_decode.engine.Engine.step`."""
        pipeline, self._length = self.pipeline, self._length + 1
        if pipeline is None:
            self._watch.start()
            self.transformer.step()
            return self._sampled(self.transformer.logits)
        ahead = remaining if self._constraint is None else 0
        while pipeline.flying <= ahead and not pipeline.full:
            pipeline.launch(self._plan, self._length + pipeline.flying, self._restrict)
        if self._constraint is not None and remaining and len(self.pass_costs) == 1:
            pipeline.begin(self._plan)
        tokens, device_s = pipeline.collect()
        return Choice(int(tokens[0]), device_s)

    @property
    def is_idle(self) -> bool:
        """See `physai_decode.engine.Verifier.is_idle`."""
        return not self.pipeline or not self.pipeline.flying

    @torch.inference_mode()
    def verify(self, draft: Sequence[int]) -> Choices:
        """See `physai_decode.engine.Verifier.verify`."""
        pipeline = self.pipeline
        if pipeline is None:
            return self._verify_on_host(draft)
        # Padded to a captured size, with rows that are never accepted.
        size = next(each for each in start.PASS_ROWS if each > len(draft))
        draft_tokens = self.transformer.tokens[1:size]
        draft_tokens.copy_(torch.tensor([*draft, *[-1] * (size - 1 - len(draft))]))
        masked = len(draft)                 # draft tokens with a mask after them

        def restrict():
            nonlocal masked
            assert self._constraint is not None
            for masked, mask in enumerate(self._constraint.walk(draft)):
                self._sampler.restrict(mask, masked)
            draft_tokens[masked:].fill_(-1)

        pipeline.launch(self._plan, self._length + 1, restrict, size)
        tokens, device_s = pipeline.collect()
        chosen = accepted(draft[:masked], tokens.tolist())
        self._length += len(chosen)
        return Choices(chosen, device_s)

    def _verify_on_host(self, draft):
        """Sample row by row, until a draft token is rejected."""
        t, rows = self.transformer, 1 + len(draft)
        self._watch.start()
        t.tokens[1:rows] = torch.tensor(draft)
        t.step(rows)
        masks = repeat(None) if self._constraint is None else self._constraint.walk(draft)

        def tokens():
            for mask, last in zip(masks, t.row_logits):
                if mask is not None:
                    self._sampler.restrict(mask)
                self._length += 1
                self._sampler.draw(self._plan, last, t.position, t.token, self._history)
                yield int(self._history[self._length])

        chosen = accepted(draft, tokens())
        self._watch.stop()
        return Choices(chosen, self._watch.read_s())

    def close(self) -> None:
        """See `physai_decode.engine.Engine.close`."""
        if self.drafter is not None:
            self.drafter.engine.close()
        for name in ('pipeline', '_prefill', 'transformer', '_sampler', '_history'):
            vars(self).pop(name, None)
        devices.give_back(self._device)

    @contextmanager
    def trial(self, captured: bool) -> Iterator[None]:
        """See `physai_decode.gap.Measurable.trial`."""
        own = self.pipeline
        if captured != (self.footprint.cuda_graph == 'captured'):
            self.pipeline = self.piped(captured)
        try:
            yield
        finally:
            self.pipeline = own
            devices.give_back(self._device)     # of the graph

    @torch.inference_mode()
    def piped(self, captured: bool) -> Pipeline:
        """Return a pipeline of this engine's step."""
        devices.use(self._device, self._stream)
        return Pipeline(self.transformer.step, self._draw, self._history, captured, self._ahead,
                        self._priority, self._blocking)

    @torch.inference_mode()
    def prefill_logits(self, prompt_ids: Sequence[int]) -> torch.Tensor:
        """See `physai_decode.engine.Comparable.prefill_logits`."""
        self.rewind(0)
        ids = torch.tensor(prompt_ids, device=self._device)
        return self.transformer.prefill(ids, 0, every=True)

    def reads(self, context: int) -> list[tuple[str, str, int]]:
        """See `physai_decode.benchmark.profiler.Itemized.reads`."""
        return self.transformer.reads(context)

    def _prepare_passes(self, progress):
        """Time passes of several rows and capture them; return a report of their costs."""
        progress('timing passes of several tokens')
        pipeline, run = self.pipeline, self.transformer.step
        if pipeline:                    # a captured pass includes sampling
            run = partial(self._run, GREEDY)
        self.rewind(0)
        costs = start.pass_costs(self.transformer, run)
        report = ', '.join(f'{rows} tokens {cost:.2f}' for rows, cost in costs.items() if rows > 1)
        if all(cost >= rows for rows, cost in costs.items()):
            return f'off: a pass costs as much as separate steps (of {report} steps)'
        self.pass_costs = costs
        if pipeline:
            pipeline.sizes = tuple(costs)
            for sampling in start.WARM_UP:
                self._capture(pipeline, Plan.of(sampling))
        return f'on: a pass of {report} steps'

    def _capture(self, pipeline, plan):
        """Capture the passes of a plan, behind the tokens in the cache."""
        pipeline.prepare(plan, lambda: self.transformer.position.fill_(self._length))

    def _run(self, plan, rows):
        self.transformer.step(rows)
        self._draw(plan, rows)

    def _draw(self, plan, rows):
        t = self.transformer
        for number in range(rows):
            row = SINGLE_ROW
            if rows > 1:
                last = number == rows - 1
                row = Row(number, None if last else t.tokens[number + 1:number + 2])
            self._sampler.draw(plan, t.row_logits[number], t.position, t.token, self._history, row)

    def _restrict(self):
        """Write the mask of the constraint, while the device computes."""
        if self._constraint is not None:
            self._sampler.restrict(self._constraint.mask())

    def _sampled(self, last):
        t = self.transformer
        self._restrict()
        self._sampler.draw(self._plan, last, t.position, t.token, self._history)
        token_id = int(self._history[self._length])
        self._watch.stop()
        return Choice(token_id, self._watch.read_s())


def accepted(draft: Sequence[int], tokens: Iterable[int]) -> tuple[int, ...]:
    """
    Return the tokens of a pass up to the first that differs from the draft, inclusive.

    :param tokens: the sampled token of each row; only those returned are consumed.
    """
    chosen: list[int] = []
    for draft_id, token_id in zip((*draft, None), tokens):
        chosen.append(token_id)
        if token_id != draft_id:
            break
    return tuple(chosen)
