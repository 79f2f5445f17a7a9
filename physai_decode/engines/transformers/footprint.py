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

"""The footprint of a transformers network."""

import re

from physai_decode.checkpoint import Checkpoint
from physai_decode.engine import Footprint
from physai_decode.engines import device as devices
from physai_decode.engines.transformers.caches import CachedNetwork
import torch
import transformers


def footprint(model: Checkpoint, cached: CachedNetwork, limit: int) -> Footprint:
    """Describe the loaded model and the bytes that one decode step reads."""
    network, device = cached.network, cached.device
    config = network.config.get_text_config(decoder=True)
    # Keys and values differ in width if a layer caches a compressed form.
    heads, key_width, value_width, element_bytes = \
        cached.kv_shapes[0] if cached.kv_shapes else (0, 0, 0, network.dtype.itemsize)
    windows = cached.windows
    name, uuid = devices.describe(device)
    graph = 'captured' if cached.captured else 'off' if device.type == 'cuda' else 'unavailable'
    return Footprint(
        engine='transformers', model_type=model.model_type,
        dtype=str(network.dtype).partition('.')[2], quantization=model.quantization,
        device=str(device), device_name=name, device_uuid=uuid, cuda_graph=graph,
        max_context=limit, vocab_size=config.vocab_size, eos_token_ids=model.eos_token_ids,
        read_weight_bytes=_read_weight_bytes(network, config),
        checkpoint_weight_bytes=model.weight_bytes, layers=len(cached.kv_shapes),
        kv_heads=heads, head_dim=(key_width + value_width) // 2,
        kv_element_bytes=element_bytes,
        sliding_window=max(windows, default=0), windowed_layers=len(windows) or None,
        details={'attention': str(config._attn_implementation), 'torch': torch.__version__,
                 'transformers': transformers.__version__})


def _read_weight_bytes(network: transformers.PreTrainedModel,
                       config: transformers.PretrainedConfig) -> int:
    """Count the weight bytes of one step: one row per embedding, and only the routed experts."""
    head = getattr(network.get_output_embeddings(), 'weight', None)
    read_whole = None if head is None else head.data_ptr()
    embeddings = {
        module.weight.data_ptr() for module in network.modules()
        if isinstance(module, torch.nn.Embedding)} - {read_whole}
    experts = next((getattr(config, name) for name in (
        'num_local_experts', 'num_experts', 'n_routed_experts') if getattr(config, name, 0)), 0)
    routed = next((getattr(config, name) for name in (
        'num_experts_per_tok', 'top_k_experts') if getattr(config, name, 0)), experts)
    # Text decoding does not read vision and audio towers. Tied tensors share one address and count
    # once.
    weights = {tensor.data_ptr(): (name, tensor)
               for part in (network.get_decoder() or network, network.get_output_embeddings())
               if part is not None for name, tensor in part.state_dict().items()
               if isinstance(tensor, torch.Tensor)}
    total = 0
    for address, (name, tensor) in weights.items():
        size = tensor.numel() * tensor.element_size()
        if address in embeddings:
            size //= tensor.shape[0]
        elif experts and _is_of_experts(name, tensor, experts):
            size = size * routed // experts
        total += size
    return total


def _is_of_experts(name: str, tensor: torch.Tensor, experts: int) -> bool:
    """Whether a tensor belongs to one expert, or stacks all experts."""
    return bool(re.search(r'\.experts\.\d+\.', name)) or tensor.shape[:1] == (experts,) and (
        tensor.dim() == 3 or (tensor.dim() == 2 and name.endswith('bias')))
