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
A fake of the parts of the ExLlamaV2 library that the engine uses; it runs on a CPU.

Each forward pass runs a transformers network over all cached ids, so wrong positions, masks or
cache contents change the logits. It can add noise to them, because the real library sums in any
order. It ignores quantised weights.
"""

from importlib.machinery import ModuleSpec
import json
from pathlib import Path
import sys
from types import ModuleType
from types import SimpleNamespace

import torch


class Library:
    """The modules, with attributes that tests read and set."""

    def __init__(self, network):
        """Make the modules for a transformers network with the dequantised weights of a folder."""
        self.network = network
        self.calls = []             # (tokens, position) of each forward pass
        self.copies = 0             # of keys or values for each head of a group
        self.fail = None            # raised when a module loads
        self.unloaded = 0
        self.noise = 0.0            # deviation of a logit, relative to the largest magnitude
        self.choose_device = None   # the engine's function, which tests replace
        generator = torch.Generator().manual_seed(0)
        library = self

        class Config:
            def __init__(self, folder):
                read = json.loads(Path(folder, 'config.json').read_text())
                self.model_dir = folder
                for name in ('num_hidden_layers', 'num_key_value_heads', 'vocab_size'):
                    setattr(self, name, read[name])
                self.head_dim = read.get('head_dim') or \
                    read['hidden_size'] // read['num_attention_heads']
                self.rotary_embedding_base = 10000.0
                self.checkpoint_offset_qzeros = \
                    read['quantization_config'].get('checkpoint_format') == 'gptq_v2'
                self.scale_pos_emb, self.alt_rope_method = 1.0, None

        class Module:
            def __init__(self, key, **tensors):
                self.key, self.device_idx = key, -1
                vars(self).update(tensors)

            def set_device_idx(self, index):
                self.device_idx = index

            def load(self):
                if library.fail:
                    raise library.fail

        class Attention(Module):
            scaling = 0.2

            def _attn_torch(self, batch_size, q_len, q, k, v, attn_params, cfg, causal=True):
                """Copy keys and values for each head, like the library without flash-attn."""
                assert causal
                library.copies += 2
                k, v = (each.repeat_interleave(q.shape[2] // each.shape[2], 2).transpose(1, 2)
                        for each in (k, v))
                out = torch.nn.functional.scaled_dot_product_attention(
                    q.transpose(1, 2), k, v, attn_params.block_diag_mask, scale=self.scaling)
                return out.transpose(1, 2).reshape(batch_size, q_len, -1)

        class Model:
            def __init__(self, config):
                half = {'dtype': torch.float16}
                self.config = config
                self.modules = [
                    Module('model.embed_tokens', embedding=SimpleNamespace(
                        weight=torch.zeros(config.vocab_size, 8, **half))),
                    Attention('attention'),
                    Module('packed', q_tensors={
                        'qweight': torch.zeros(4, 8, dtype=torch.int32),
                        'scales': torch.zeros(2, 8, **half),
                        'g_idx': torch.zeros(32, dtype=torch.int32),
                        'q_perm': torch.zeros(32, dtype=torch.short),
                        'q_invperm': torch.zeros(32, dtype=torch.short)}),
                    Module('model.norm', weight=torch.zeros(8, **half), bias=None),
                    Module('lm_head', q_tensors=None, linear=torch.nn.Linear(
                        8, 16, bias=False, **half))]
                self.modules_dict = {module.key: module for module in self.modules}

            def load(self, gpu_split, lazy):
                assert lazy and gpu_split[-1] > 1000
                for module in self.modules[1:]:
                    module.set_device_idx(len(gpu_split) - 1)

            def unload(self):
                library.unloaded += 1

            def forward_chunk(self, ids, cache, preprocess_only, last_id_only, attn_params):
                assert last_id_only and self.modules[0].device_idx == 0
                start, tokens = cache.current_seq_len, ids.shape[1]
                assert tokens <= self.config.max_input_len
                assert start + tokens <= self.config.max_seq_len
                assert (attn_params.seq_len, attn_params.past_len) == (tokens, start)
                library.calls.append((tokens, start))
                assert not torch.backends.cuda.cudnn_sdp_enabled()
                mask = attn_params.block_diag_mask
                if tokens > 1:
                    causal = torch.ones(tokens, start + tokens).tril(start).bool()
                    assert torch.equal(mask == 0, causal) and (mask[~causal] < -60000).all()
                else:
                    assert mask is None
                cache.ids[start:start + tokens] = ids[0]
                cache.current_seq_len += tokens
                if preprocess_only:
                    return {}
                logits = library.network(cache.ids[None, :start + tokens]).logits[:, -1:]
                logits = logits + library.noise * logits.abs().max() * torch.randn(
                    logits.shape, generator=generator)
                padding = -logits.shape[-1] % 32
                return {'logits': torch.nn.functional.pad(logits, (0, padding), value=-65504.)}

        class Cache:
            def __init__(self, model):
                self.current_seq_len = 0
                self.ids = torch.zeros(model.config.max_seq_len, dtype=torch.long)

        class Params:
            def __init__(self, batch_size, seq_len, past_len):
                assert batch_size == 1
                self.seq_len, self.past_len, self.block_diag_mask = seq_len, past_len, None

        self.modules = {
            'exllamav2': {'__version__': '0.3.2', 'ExLlamaV2Config': Config, 'ExLlamaV2': Model,
                          'ExLlamaV2Cache': Cache},
            'exllamav2_ext': {},
            'exllamav2.attn': {'has_flash_attn': False,
                               'ExLlamaV2Attention': SimpleNamespace(Params=Params)},
            'exllamav2.device': {'set_device_streams': lambda: None},
            'exllamav2.generator': {}}

    def install(self, monkeypatch) -> None:
        """Make the modules importable."""
        for name, content in self.modules.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
