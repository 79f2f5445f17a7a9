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

"""An ExLlamaV2 network and its KV cache on one GPU."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from physai_decode.checkpoint import Checkpoint
from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.engine import Footprint
from physai_decode.engines import device as devices
from physai_decode.engines import logits
from physai_decode.engines.exllamav2.attention import attend_by_groups
import torch

_GRAPH_CALLS = 205        # calls of a layer before the library captures it (MIN_GRAPH_INSTANCES)


class Network:
    """Runs token ids after those in the cache."""

    loaded: Any                 # the library's network

    def __init__(self, library: Any, settings: Any, model: Checkpoint, device: torch.device,
                 progress: Callable[[str], None]) -> None:
        """
        Load all weights to one device.

        :raises EngineError: the library cannot load the model.
        """
        self._library, self._settings, self._device = library, settings, device
        torch.cuda.set_device(device)
        try:
            self.loaded = network = library.ExLlamaV2(settings)
            index = device.index
            # A limit of 0 for each earlier device places everything on this one.
            with torch.inference_mode():
                network.load([0.0] * index + [1e6], lazy=True)
                # By default, the embedding is on the CPU, and each id would have to go there.
                network.modules[0].set_device_idx(index)
                for number, module in enumerate(network.modules):
                    if number % 8 == 0:
                        progress(f'loading weights, part {number + 1} of '
                                 f'{len(network.modules)}')
                    module.load()
                attend_by_groups(network)
                self._cache = library.ExLlamaV2Cache(network)
            torch.cuda.synchronize(device)
        except BaseException as error:
            self.close()
            # The library raises exceptions of any type, also AssertionError.
            if not isinstance(error, Exception) or devices.is_out_of_memory(error):
                raise
            raise EngineError(
                f'{model.folder} cannot be loaded by ExLlamaV2 {library.__version__}: '
                f'{first_line(error)}') from None
        self._params = import_module('exllamav2.attn').ExLlamaV2Attention.Params

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens of the cache."""
        self._cache.current_seq_len = length

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Prefill one chunk of a prompt; see `forward`."""
        return self.forward(torch.tensor([ids], device=self._device))

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """
        Run ids [1, tokens].

        :returns: the logits after the last id, float16 [1, 1, padded vocab].
        """
        tokens, past = ids.shape[1], self._cache.current_seq_len
        form = self._params(1, tokens, past)
        if tokens > 1:
            # Without flash-attn, the library does not mask later tokens in prefill. The
            # mask that it has for block-diagonal attention does.
            form.block_diag_mask = torch.full(
                (tokens, past + tokens), float('-inf'), dtype=torch.float16,
                device=self._device).triu_(past + 1)
        with devices.attention_backends(self._device):
            last: torch.Tensor = self.loaded.forward_chunk(
                ids, self._cache, preprocess_only=False, last_id_only=True, attn_params=form
            ).get('logits')
            return last

    def warm_up(self, limit: int, captured: bool) -> None:
        """Run decode steps; if ``captured``, until the library has captured its CUDA graphs."""
        import_module('exllamav2.device').set_device_streams()
        vocab_size = self._settings.vocab_size
        last = self.feed(logits.warm_up_ids(vocab_size, limit))[0, 0, :vocab_size]
        logits.check(last.float(), torch.float16)
        self.rewind(0)
        self.feed([0] * min(64, self._settings.max_input_len, limit - 1))
        token = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        for _ in range(_GRAPH_CALLS + 3 if captured else 8):
            self.rewind(1)
            self.forward(token)
        self.rewind(0)
        torch.cuda.synchronize(self._device)

    def footprint(self, model: Checkpoint, limit: int, captured: bool,
                  details: dict[str, str]) -> Footprint:
        """Describe the loaded model and the bytes that one decode step reads."""
        settings, attention = self._settings, import_module('exllamav2.attn')
        name, uuid = devices.describe(self._device)
        return Footprint(
            engine='exllamav2', model_type=model.model_type, dtype='float16',
            quantization=model.quantization, device=str(self._device), device_name=name,
            device_uuid=uuid, cuda_graph='captured' if captured else 'off',
            max_context=limit, vocab_size=settings.vocab_size,
            eos_token_ids=model.eos_token_ids, read_weight_bytes=self._read_weight_bytes(),
            checkpoint_weight_bytes=model.weight_bytes, layers=settings.num_hidden_layers,
            kv_heads=settings.num_key_value_heads, head_dim=settings.head_dim,
            kv_element_bytes=2, details={
                'exllamav2': self._library.__version__, 'torch': torch.__version__,
                'attention': 'flash-attn' if attention.has_flash_attn else
                'sdpa over query groups, without cuDNN',
                'graphs': "the library's own, around attention and of the feed-forward",
                **details})

    def close(self) -> None:
        """Unload the network and free its memory."""
        if 'loaded' in vars(self):
            self.loaded.unload()
        for name in ('loaded', '_cache'):
            vars(self).pop(name, None)

    def _read_weight_bytes(self) -> int:
        embedding, *layers = self.loaded.modules_dict.values()
        row = embedding.embedding.weight[0]
        total: int = row.numel() * row.element_size()
        for module in layers:
            # g_idx and q_invperm only serve to build q_perm at load.
            packed = getattr(module, 'q_tensors', None) or {}
            tensors = [tensor for name, tensor in packed.items()
                       if name not in ('g_idx', 'q_invperm')]
            if not packed:
                plain = getattr(module, 'linear', None) or module
                tensors = [getattr(plain, 'weight', None), getattr(plain, 'bias', None)]
            total += sum(tensor.numel() * tensor.element_size()
                         for tensor in tensors if tensor is not None)
        return total
