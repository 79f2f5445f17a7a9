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
A transformers network with one of the library's KV caches, eager or captured.

Eager: on a CPU, or on a GPU with ``cuda_graph`` off, the cache is dynamic and the host launches
every kernel. This is the eager step of arXiv 2605.30571. Captured: the cache is static and the
forward pass is one CUDA graph. Attention is PyTorch's scaled_dot_product_attention if the model
supports it. Eager steps exclude the cuDNN backend, which builds a plan for each new length; a
captured step has a fixed length and uses the backend that PyTorch prefers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
import inspect
from typing import Any

from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.engines import device as devices
from physai_decode.engines import logits
import torch
import transformers
from transformers.cache_utils import Cache
from transformers.cache_utils import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.cache_utils import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.cache_utils import StaticSlidingWindowLayer

_WARMUP_TOKENS = 8


class CachedNetwork:
    """
    A network with the library's dynamic cache; the host launches every kernel.

    `feed` and `step` return the float32 logits [vocab] after their last token.
    """

    captured = False
    advice = 'choose another model, or another engine.name'
    _graph: torch.cuda.CUDAGraph | None = None

    def __init__(self, network: transformers.PreTrainedModel, device: torch.device,
                 limit: int) -> None:
        """
        Create the cache and warm up.

        :param limit: capacity of the cache in tokens.
        :raises EngineError: transformers cannot decode the model token by token.
        """
        self.network = network
        self.length = 0                     # tokens in the cache
        self.device = device
        self._limit = limit
        parameters = inspect.signature(network.forward).parameters
        self._cache_name = next(
            (name for name in ('past_key_values', 'cache_params') if name in parameters), '')
        if not self._cache_name:
            raise EngineError(
                f'{network.config.model_type}: its forward pass in transformers '
                f'{transformers.__version__} takes no cache, so it cannot be decoded token by '
                'token: choose another model')
        self._options: dict[str, int] = {'use_cache': True}
        if 'logits_to_keep' in parameters:
            self._options['logits_to_keep'] = 1
        self._takes_positions = 'position_ids' in parameters
        # The library's models raise exceptions of any type.
        with self._explaining(Exception, f'transformers {transformers.__version__} cannot '
                              'decode it token by token with this cache'):
            self.cache: Any = self._new_cache()     # the types of its layers vary by version
            self.attends = all(
                type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
                for layer in self.cache.layers)
            last = self._warm_up()
        logits.check(last, network.dtype)
        self.rewind(0)

    @contextmanager
    def _explaining(self, kind: type[Exception], problem: str) -> Iterator[None]:
        """Convert exceptions, except out of memory, to an EngineError with the model's name."""
        try:
            yield
        except kind as error:
            if isinstance(error, EngineError) or devices.is_out_of_memory(error):
                raise
            raise EngineError(f'{self.network.config.model_type}: {problem} '
                              f'({first_line(error)}): {self.advice}') from None

    def _warm_up(self) -> torch.Tensor:
        size = self.network.config.get_text_config(decoder=True).vocab_size
        last = self.feed(logits.warm_up_ids(size, self._limit))
        self.vocab_size = len(last)
        for _ in range(2):
            last = self.step(last.argmax(0, keepdim=True))
        kept = [getattr(layer, 'keys', None) is not None for layer in self.cache.layers]
        # A layer without keys keeps its state elsewhere.
        self.attends = self.attends and all(kept)
        # For each layer with keys and values: heads, key width, value width, bytes per element.
        self.kv_shapes = [
            (layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1],
             layer.keys.element_size())
            for layer, has in zip(self.cache.layers, kept) if has]
        self.windows = [
            window for layer, has in zip(DynamicCache(config=self.network.config).layers, kept)
            if has and (window := getattr(layer, 'sliding_window', 0))]
        return last

    def rewind(self, length: int) -> int:
        """Keep at most the first ``length`` tokens; return how many are kept."""
        self.length = self._crop(self.length, length)
        return self.length

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Prefill one chunk of a prompt."""
        last = self._forward(torch.tensor([ids], device=self.device), self.length)
        self.length += len(ids)
        return last

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Run one decode step; ``token`` [1] is on the device."""
        last = self._step(token)
        self.length += 1
        return last

    @contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Run steps without the CUDA graph inside ``with``."""
        graph, self._graph = self._graph, None
        try:
            yield
        finally:
            self._graph = graph

    def _step(self, token: torch.Tensor) -> torch.Tensor:
        return self._forward(token.view(1, 1), self.length)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        cache: dict[str, Cache | torch.Tensor] = {self._cache_name: self.cache}
        if self._takes_positions and not self.attends:
            # Some models with a recurrent state do not derive positions from the cache.
            cache['position_ids'] = torch.arange(
                start, start + ids.shape[1], device=self.device)[None]
        one_length = self.captured and ids.shape[1] == 1
        with nullcontext() if one_length else devices.attention_backends(self.device):
            all_logits: torch.Tensor = self.network(
                input_ids=ids, **cache, **self._options).logits
        return all_logits[0, -1].float()

    def _new_cache(self) -> Cache:
        return DynamicCache(config=self.network.config)

    def _crop(self, length: int, keep: int) -> int:
        removed = length - keep
        # A full sliding window has dropped tokens that an earlier position would read.
        slid = any(isinstance(layer, DynamicSlidingWindowLayer) and length >= layer.sliding_window
                   for layer in self.cache.layers)
        if not keep or not self.attends or (removed and slid):
            self.cache = self._new_cache()
            return 0
        if removed:
            self.cache.crop(-removed)
        return keep


class CapturedNetwork(CachedNetwork):
    """
    A network with the library's static cache and a decode step captured in a CUDA graph.

    Every layer holds the whole context, including layers with a sliding window, because the
    library's static cache for those branches on the host. The library's attention mask limits such
    a layer to its window. The position is in the cache, on the device, and the graph advances it.
    """

    captured = True
    advice = 'set engine.cuda_graph to false'

    def __init__(self, network: transformers.PreTrainedModel, device: torch.device,
                 limit: int) -> None:
        """
        Create the cache, warm up, capture the step, and compare it with the uncaptured one.

        :raises EngineError: the step cannot be captured, or the captured one gives other logits.
        """
        super().__init__(network, device, limit)
        with self._explaining(
                RuntimeError, "transformers' decode step cannot be captured in a CUDA graph"):
            self._compare()
            self._capture()
        self.rewind(0)

    def _step(self, token: torch.Tensor) -> torch.Tensor:
        """See `CachedNetwork.step`; the next step overwrites the returned tensor."""
        return super()._step(token) if self._graph is None else self._replay(token)

    def _compare(self) -> None:
        """Check that the static and the dynamic cache give the same logits."""
        if not self.attends:
            raise RuntimeError('it keeps state outside the cache')
        ids, results = list(range(1, min(_WARMUP_TOKENS, self._limit // 2) + 1)), []
        static = self.cache
        for cache in (static, DynamicCache(config=self.network.config)):
            self.cache, self.length = cache, 0
            self.feed(ids)
            token = torch.tensor(ids[:1], device=self.device)
            results.append(CachedNetwork.step(self, token).clone())
        self.cache = static
        actual, expected = results
        # The kernels differ in summation order; a wrong mask exceeds this tolerance.
        if not _is_close(actual, expected, 0.1):
            raise RuntimeError('it gives other logits with a static cache')

    @torch.inference_mode()
    def _capture(self) -> None:
        self._input = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self._set_length(1)
        self._graph = devices.capture(self._captured_step, self.device)
        # Replay at other positions than the captured one, to detect a host value that the graph
        # recorded as a constant.
        for position in (2, 6):
            token = torch.full((1,), position, device=self.device)
            self._set_length(position)
            replayed = self._replay(token).clone()
            self._set_length(position)
            launched = self._forward(token.view(1, 1))
            if not _is_close(replayed, launched, 0.02):
                raise RuntimeError(
                    f'replayed at position {position}, it gives other logits than uncaptured')

    def _captured_step(self) -> None:
        self._logits = self._forward(self._input)

    @torch.inference_mode()
    def _replay(self, token: torch.Tensor) -> torch.Tensor:
        assert self._graph is not None
        self._input.copy_(token.view(1, 1))
        self._graph.replay()
        return self._logits

    def _new_cache(self) -> Cache:
        return whole_cache(self.network.config, self._limit)

    @torch.inference_mode()
    def _set_length(self, length: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def _crop(self, length: int, keep: int) -> int:
        self._set_length(keep)
        return keep


def _is_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Compare logits; ``tolerance`` is a fraction of the largest expected one."""
    return torch.allclose(actual, expected, rtol=0,
                          atol=tolerance * expected.abs().max().item())


def whole_cache(config: transformers.PretrainedConfig, limit: int) -> Cache:
    """
    Create a static cache in which every layer holds the whole context.

    :param limit: capacity in tokens.
    :raises EngineError: the model keeps a state other than keys and values.
    """
    layers = StaticCache(config=config, max_cache_len=limit).layers
    unsupported = next((type(layer).__name__ for layer in layers
                        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer)), None)
    if unsupported:
        raise EngineError(
            f'{config.model_type}: its cache ({unsupported}) cannot be captured in a CUDA graph: '
            'set engine.cuda_graph to false')
    return Cache(layers=[StaticLayer(limit) for _ in layers])
