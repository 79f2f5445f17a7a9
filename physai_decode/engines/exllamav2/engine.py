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
The exllamav2 engine: GPTQ and EXL2 weights on an NVIDIA GPU in float16.

A decode step is the library's forward pass over its own KV cache. Tokens are sampled on the device
as in all engines and fed back there, one step ahead of the host. The engine is written for
ExLlamaV2 0.3.2, the last release. The library's extension is compiled at first use. Its kernels
use atomic additions, so a repeated step can differ in the last bits. The same prompt and seed can
therefore give another answer where two tokens are almost equally likely.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence
import gc
from importlib import import_module
import time
import traceback

from physai_decode import checkpoint
from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import Choice
from physai_decode.engine import Constraint
from physai_decode.engine import Elapsed
from physai_decode.engine import Footprint
from physai_decode.engines import device as devices
from physai_decode.engines.exllamav2 import checks
from physai_decode.engines.exllamav2.library import library
from physai_decode.engines.exllamav2.network import Network
from physai_decode.engines.sampling import Drawer
import torch

_AHEAD = 1                # decode steps launched before the host reads a token id


class ExLlamaV2Engine:
    """See `physai_decode.engine.Engine`."""

    footprint: Footprint
    network: Network
    chunk_tokens = (1, checks.CHUNK_TOKENS)

    def __init__(self, model: Checkpoint, config: EngineConfig,
                 progress: Callable[[str], None] = lambda text: None) -> None:
        """
        Compile the library's extension if necessary, load, and warm up.

        :param progress: called from another thread while the extension compiles.
        :raises EngineError: the library or the model cannot be loaded on this device; all memory
            is freed.
        """
        self._device = checks.device(config)
        limit = min(config.max_context, model.context_limit or config.max_context)
        with checkpoint.parsing(model.folder / 'config.json'):
            checks.check(model, limit)
        begun_s = time.perf_counter()
        exllamav2 = library(progress)
        imported_s = time.perf_counter()
        try:
            settings = checks.settings(exllamav2, model, config, limit)
            kv_bytes = 4 * settings.num_hidden_layers * settings.num_key_value_heads \
                * settings.head_dim * limit
            with devices.enough_memory(self._device, model.weight_bytes + kv_bytes):
                self.network = Network(exllamav2, settings, model, self._device, progress)
                loaded_s = time.perf_counter()
                progress('warming up')
                self.network.warm_up(limit, config.cuda_graph)
            self._slots = [
                (devices.Stopwatch(self._device),
                 torch.empty(1, dtype=torch.long, pin_memory=self._device.type == 'cuda'))
                for _ in range(_AHEAD + 1)]
            self._watch = devices.Stopwatch(self._device)
            self._flying: deque[tuple[devices.Stopwatch, torch.Tensor]] = deque()
            self._length = 0            # tokens in the cache, including steps in flight
            self._drawer = Drawer(settings.vocab_size, limit, self._device)
            self.footprint = self.network.footprint(model, limit, config.cuda_graph, {
                'import_s': f'{imported_s - begun_s:.3f}',
                'load_s': f'{loaded_s - imported_s:.3f}',
                'warm_up_s': f'{time.perf_counter() - loaded_s:.3f}'})
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self.close()
            raise

    def rewind(self, length: int) -> int:
        """See `physai_decode.engine.Engine.rewind`."""
        # The library has its own stream. CUDA's current device and stream are per thread.
        torch.cuda.set_device(self._device)
        import_module('exllamav2.device').set_device_streams()
        self._flying.clear()
        self.network.rewind(length)
        self._length = length
        return length

    def feed(self, token_ids: Sequence[int]) -> Elapsed:
        """See `physai_decode.engine.Engine.feed`."""
        self._watch.start()
        self._logits = self.network.feed(list(token_ids))
        self._watch.stop()
        self._length += len(token_ids)
        return self._watch.read_s

    def first(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constraint: Constraint | None = None) -> Choice:
        """See `physai_decode.engine.Engine.first`."""
        self._drawer.begin(sampling, prompt_ids, constraint)
        # A mask depends on the previous token, which the host has to read first.
        self._ahead = _AHEAD if constraint is None else 0
        return Choice(int(self._sample()), 0.0)

    def step(self, remaining: int) -> Choice:
        """See `physai_decode.engine.Engine.step`."""
        while len(self._flying) <= min(self._ahead, remaining):
            watch, landing = slot = self._slots[0]
            self._slots.append(self._slots.pop(0))
            watch.start()
            self._logits = self.network.forward(self._drawer.token.view(1, 1))
            self._length += 1
            landing.copy_(self._sample(), non_blocking=True)
            watch.stop()
            self._flying.append(slot)
        watch, landing = self._flying.popleft()
        device_s = watch.read_s()                   # waits for the copy
        return Choice(int(landing), device_s)

    def close(self) -> None:
        """See `physai_decode.engine.Engine.close`."""
        if 'network' in vars(self):
            self.network.close()
        for name in ('network', '_drawer', '_logits'):
            vars(self).pop(name, None)
        gc.collect()
        devices.give_back(self._device)

    def _sample(self) -> torch.Tensor:
        return self._drawer.draw(
            self._logits[0, 0, :self.footprint.vocab_size], self._length)
