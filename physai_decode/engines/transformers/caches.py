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
A network of the transformers library with one of the library's caches, eager or captured.

Eager, on a CPU and on a GPU with ``cuda_graph`` off, the cache grows and the host launches every
kernel: the eager step of arXiv 2605.30571. Captured, the cache is the library's static one, and
the forward pass is one CUDA graph. Attention is PyTorch's
scaled_dot_product_attention where the model has it, without cuDNN's, which would plan anew for
each length; a captured step has one length for ever and takes what PyTorch prefers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
import inspect

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
    A network and the library's dynamic cache; the host launches every kernel.

    What runs the network returns the float32 logits [vocab] after its last token.
    """

    captured = False
    advice = 'choose another model, or another engine.name'
    _graph: torch.cuda.CUDAGraph | None = None

    def __init__(self, network: torch.nn.Module, device: torch.device, limit: int):
        """
        Make the cache and warm up.

        :param limit: tokens that the cache must hold.
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
                f'{transformers.__version__} takes no cache, so it can not be decoded token by '
                'token: choose another model')
        self._options = {'use_cache': True}
        if 'logits_to_keep' in parameters:
            self._options['logits_to_keep'] = 1
        self._takes_positions = 'position_ids' in parameters
        # The library raises whatever its many models raise.
        with self._explaining(Exception, f'transformers {transformers.__version__} does not '
                              'decode it token by token over this cache'):
            self.cache = self._new_cache()
            self.attends = all(
                type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
                for layer in self.cache.layers)
            last = self._warm_up()
        logits.check(last, network.dtype)
        self.rewind(0)

    @contextmanager
    def _explaining(self, kind, problem):
        """Turn errors of a kind, but a lack of memory, into one that names model and way out."""
        try:
            yield
        except kind as error:
            if isinstance(error, EngineError) or devices.is_out_of_memory(error):
                raise
            raise EngineError(f'{self.network.config.model_type}: {problem} '
                              f'({first_line(error)}): {self.advice}') from None

    def _warm_up(self):
        size = self.network.config.get_text_config(decoder=True).vocab_size
        last = self.feed(logits.warm_up_ids(size, self._limit))
        self.vocab_size = len(last)
        for _ in range(2):
            last = self.step(last.argmax(0, keepdim=True))
        kept = [getattr(layer, 'keys', None) is not None for layer in self.cache.layers]
        # A layer without keys has its state elsewhere.
        self.attends = self.attends and all(kept)
        # Of each layer that has keys and values: heads, widths of a key and a value, bytes.
        self.kv_shapes = [
            (layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1],
             layer.keys.element_size())
            for layer, has in zip(self.cache.layers, kept) if has]
        self.windows = [
            window for layer, has in zip(DynamicCache(config=self.network.config).layers, kept)
            if has and (window := getattr(layer, 'sliding_window', 0))]
        return last

    def rewind(self, length: int) -> int:
        """Keep at most the first ``length`` tokens; give how many are kept."""
        self.length = self._crop(self.length, length)
        return self.length

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Run a chunk of a prompt."""
        last = self._forward(torch.tensor([ids], device=self.device), self.length)
        self.length += len(ids)
        return last

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Run one token [1], which is on the device."""
        last = self._step(token)
        self.length += 1
        return last

    @contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Launch each kernel inside ``with``."""
        graph, self._graph = self._graph, None
        try:
            yield
        finally:
            self._graph = graph

    def _step(self, token):
        return self._forward(token.view(1, 1), self.length)

    @torch.inference_mode()
    def _forward(self, ids, start=0):
        cache = {self._cache_name: self.cache}
        if self._takes_positions and not self.attends:
            # Where it keeps another state, some a model does not tell its place from the cache.
            cache['position_ids'] = torch.arange(
                start, start + ids.shape[1], device=self.device)[None]
        one_length = self.captured and ids.shape[1] == 1
        with nullcontext() if one_length else devices.attention_backends(self.device):
            found = self.network(input_ids=ids, **cache, **self._options)
        return found.logits[0, -1].float()

    def _new_cache(self):
        return DynamicCache(config=self.network.config)

    def _crop(self, length, keep):
        removed = length - keep
        # A full sliding window has dropped what an earlier position would read.
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
    A network and the library's static cache, one decode step captured in a CUDA graph.

    All its layers hold the whole context, also those with a sliding window, whose own static cache
    branches on the host; the library's mask keeps what such a layer reads to its window. The
    position is on the device, in the cache; the graph advances it.
    """

    captured = True
    advice = 'set engine.cuda_graph to false'

    def __init__(self, network: torch.nn.Module, device: torch.device, limit: int):
        """Make the cache, warm up, capture, and hold the captured step against the uncaptured."""
        super().__init__(network, device, limit)
        with self._explaining(
                RuntimeError, "transformers' decode step can not be captured in a CUDA graph"):
            self._compare()
            self._capture()
        self.rewind(0)

    def _step(self, token):
        """See `CachedNetwork.step`; what it returns is overwritten by the next step."""
        return super()._step(token) if self._graph is None else self._replay(token)

    def _compare(self):
        """Hold the static cache against the dynamic one."""
        if not self.attends:
            raise RuntimeError('it keeps a state outside of the cache')
        ids, answers = list(range(1, min(_WARMUP_TOKENS, self._limit // 2) + 1)), []
        static = self.cache
        for cache in (static, DynamicCache(config=self.network.config)):
            self.cache, self.length = cache, 0
            self.feed(ids)
            token = torch.tensor(ids[:1], device=self.device)
            answers.append(CachedNetwork.step(self, token).clone())
        self.cache = static
        whole, plain = answers
        # Other kernels add in another order: a wrong mask shows all the same.
        if not torch.allclose(whole, plain, rtol=0, atol=0.1 * plain.abs().max()):
            raise RuntimeError('over a cache of one length it gives other logits')

    @torch.inference_mode()
    def _capture(self):
        self._input = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self._set_length(1)
        self._graph = devices.capture(self._captured_step, self.device)
        # A host value baked into the graph would show at another position than the captured one.
        for position in (2, 6):
            token = torch.full((1,), position, device=self.device)
            self._set_length(position)
            replayed = self._replay(token).clone()
            self._set_length(position)
            launched = self._forward(token.view(1, 1))
            if not torch.allclose(replayed, launched, rtol=0, atol=0.02 * launched.abs().max()):
                raise RuntimeError(
                    f'replayed at position {position} it gives other logits than uncaptured')

    def _captured_step(self):
        self._logits = self._forward(self._input)

    @torch.inference_mode()
    def _replay(self, token):
        self._input.copy_(token.view(1, 1))
        self._graph.replay()
        return self._logits

    def _new_cache(self):
        return whole_cache(self.network.config, self._limit)

    @torch.inference_mode()
    def _set_length(self, length):
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def _crop(self, length, keep):
        self._set_length(keep)
        return keep


def whole_cache(config: transformers.PretrainedConfig, limit: int) -> Cache:
    """
    Make a static cache whose every layer holds the whole context.

    :param limit: tokens that it holds.
    :raises EngineError: the model keeps a state that is not keys and values of the context.
    """
    layers = StaticCache(config=config, max_cache_len=limit).layers
    other = next((type(layer).__name__ for layer in layers
                  if type(layer) not in (StaticLayer, StaticSlidingWindowLayer)), None)
    if other:
        raise EngineError(
            f'{config.model_type}: its cache ({other}) can not be captured in a CUDA graph: set '
            'engine.cuda_graph to false')
    return Cache(layers=[StaticLayer(limit) for _ in layers])
