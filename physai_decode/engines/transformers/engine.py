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
The transformers engine: the baseline, and the fallback for architectures that native lacks.

A decode step is the library's forward pass over its own KV cache; sampling is the same as in all
engines. The engine never runs code from a model folder.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import nullcontext
import gc
import traceback

from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import Choice
from physai_decode.engine import Constraint
from physai_decode.engine import Elapsed
from physai_decode.engine import EngineError
from physai_decode.engine import Footprint
from physai_decode.engines import device as devices
from physai_decode.engines.sampling import Drawer
from physai_decode.engines.transformers import network
from physai_decode.engines.transformers.caches import CachedNetwork
from physai_decode.engines.transformers.caches import CapturedNetwork
from physai_decode.engines.transformers.footprint import footprint
import torch

CHUNK_TOKENS = 2048


class TransformersEngine:
    """See `physai_decode.engine.Engine`."""

    cached: CachedNetwork
    footprint: Footprint

    def __init__(self, model: Checkpoint, config: EngineConfig,
                 progress: Callable[[str], None] = lambda text: None) -> None:
        """
        Load, warm up and, with ``cuda_graph`` on a GPU, capture the decode step.

        :raises EngineError: the model cannot be loaded on this device; all memory is freed.
        """
        self._device, dtype = devices.select(config)
        devices.use(self._device)
        dtype = network.number_format(model, config, self._device, dtype)
        limit = min(config.max_context, model.context_limit or config.max_context)
        captured = config.cuda_graph and self._device.type == 'cuda'
        try:
            with devices.enough_memory(self._device, network.needed_bytes(model, dtype)):
                progress(f'loading {model.weight_bytes / 1e9:.2f} GB of weights to {self._device}')
                loaded = network.load(model, self._device, dtype)
                progress('warming up' + (' and capturing the step' if captured else ''))
                self.cached = (CapturedNetwork if captured else CachedNetwork)(
                    loaded, self._device, limit)
                self.footprint = footprint(model, self.cached, limit)
                self._drawer = Drawer(self.cached.vocab_size, limit, self._device)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self.close()
            raise
        self._watch, self._fed = (devices.Stopwatch(self._device) for _ in range(2))
        # A recurrent state needs the whole prompt in one chunk.
        self.chunk_tokens = (1, CHUNK_TOKENS) if self.cached.attends else (limit, limit)

    def rewind(self, length: int) -> int:
        """See `physai_decode.engine.Engine.rewind`."""
        devices.use(self._device)
        return self.cached.rewind(length)

    def feed(self, token_ids: Sequence[int]) -> Elapsed:
        """See `physai_decode.engine.Engine.feed`."""
        self._fed.start()
        self._logits = self.cached.feed(list(token_ids))
        self._fed.stop()
        return self._fed.read_s

    def first(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constraint: Constraint | None = None) -> Choice:
        """See `physai_decode.engine.Engine.first`."""
        self._drawer.begin(sampling, prompt_ids, constraint)
        self._watch.start()
        return self._sample()

    def step(self, remaining: int) -> Choice:
        """See `physai_decode.engine.Engine.step`."""
        self._watch.start()
        self._logits = self.cached.step(self._drawer.token)
        return self._sample()

    def close(self) -> None:
        """See `physai_decode.engine.Engine.close`."""
        for name in ('cached', '_drawer', '_logits'):
            vars(self).pop(name, None)
        gc.collect()
        devices.give_back(self._device)

    @contextmanager
    def trial(self, captured: bool) -> Iterator[None]:
        """See `physai_decode.gap.Measurable.trial`."""
        if not self.cached.captured:
            raise EngineError(
                'transformers was loaded without a CUDA graph, which needs a static cache: '
                'clean up, set engine.cuda_graph to true, and configure again')
        with nullcontext() if captured else self.cached.uncaptured():
            yield

    @torch.inference_mode()
    def prefill_logits(self, prompt_ids: Sequence[int]) -> torch.Tensor:
        """See `physai_decode.engine.Comparable.prefill_logits`; the cache stays unchanged."""
        ids = torch.tensor([prompt_ids], device=self._device)
        logits: torch.Tensor = self.cached.network(ids, use_cache=False).logits
        return logits[0].float()

    def _sample(self) -> Choice:
        token_id = self._drawer.draw(self._logits, self.cached.length)
        self._watch.stop()
        return Choice(int(token_id), self._watch.read_s())
