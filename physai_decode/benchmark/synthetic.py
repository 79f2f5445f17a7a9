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
Create model folders with random weights in the shapes of known models, for timing.

The time of a step does not depend on the values of the weights, so a shape is enough. A folder
either describes the weights or contains them. In the first case, ``config.json`` has
``physai_decode_random_weights``, the safetensors file is sparse after its header, and the engine
creates the weights on the device. In the second case, there are safetensors shards in half
precision or in the layout of GPTQ, AWQ or bitsandbytes nf4, which other libraries can read. The
output of such a model has no meaning.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
import json
import math
from pathlib import Path
import random
import shutil
import struct
from typing import Any
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BUILTIN = Path(__file__).parents[1] / 'models' / 'tiny_planner'
MARK = 'random_weights.txt'         # written first into each folder; marks it as created here
SHARD_BYTES = 4_500_000_000
GROUP = 128                         # input rows per scale; fewer if a width is no multiple
NVFP4_GROUP = 16                    # input rows per scale
NF4_BLOCK = 64                      # weights per absolute maximum
STD = 0.02                          # standard deviation of all matrices; norms are stored as 1
DESCRIBED = ('none', 'gptq', 'awq', 'w4a16', 'w8a16', 'fp8', 'nvfp4')   # engines can create these
QUANTIZATIONS = (*DESCRIBED, 'nf4')

_LLAMA3_ROPE = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
                'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}
_COMMON = {'hidden_act': 'silu', 'initializer_range': STD, 'attention_dropout': 0.0,
           'tie_word_embeddings': False, 'use_cache': True}

# Common values of the smaller Qwen2.5 models, and of the Qwen3 models.
_QWEN2 = {
    'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'num_key_value_heads': 2,
    'vocab_size': 151936, 'max_position_embeddings': 32768, 'rms_norm_eps': 1e-6,
    'rope_theta': 1e6, 'use_sliding_window': False, 'tie_word_embeddings': True,
    'bos_token_id': 151643, 'eos_token_id': 151645}
_QWEN3 = {
    'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'num_hidden_layers': 36,
    'num_attention_heads': 32, 'num_key_value_heads': 8, 'head_dim': 128, 'vocab_size': 151936,
    'max_position_embeddings': 40960, 'rms_norm_eps': 1e-6, 'rope_theta': 1e6,
    'attention_bias': False, 'use_sliding_window': False, 'tie_word_embeddings': False,
    'bos_token_id': 151643, 'eos_token_id': 151645}

# Shapes from the published config.json of each model.
SHAPES = {
    'qwen2.5-7b': {
        'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'hidden_size': 3584,
        'num_hidden_layers': 28, 'num_attention_heads': 28, 'num_key_value_heads': 4,
        'intermediate_size': 18944, 'vocab_size': 152064, 'max_position_embeddings': 32768,
        'rms_norm_eps': 1e-6, 'rope_theta': 1e6, 'use_sliding_window': False,
        'bos_token_id': 151643, 'eos_token_id': 151645},
    'llama-3.1-8b': {
        'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'hidden_size': 4096,
        'num_hidden_layers': 32, 'num_attention_heads': 32, 'num_key_value_heads': 8,
        'intermediate_size': 14336, 'vocab_size': 128256, 'max_position_embeddings': 131072,
        'rms_norm_eps': 1e-5, 'rope_theta': 5e5, 'rope_scaling': _LLAMA3_ROPE,
        'attention_bias': False, 'mlp_bias': False,
        'bos_token_id': 128000, 'eos_token_id': 128009},
    'llama-3.2-1b': {
        'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'hidden_size': 2048,
        'num_hidden_layers': 16, 'num_attention_heads': 32, 'num_key_value_heads': 8,
        'head_dim': 64, 'intermediate_size': 8192, 'vocab_size': 128256,
        'max_position_embeddings': 131072, 'rms_norm_eps': 1e-5, 'rope_theta': 5e5,
        'rope_scaling': {**_LLAMA3_ROPE, 'factor': 32.0}, 'attention_bias': False,
        'mlp_bias': False, 'tie_word_embeddings': True,
        'bos_token_id': 128000, 'eos_token_id': 128001},
    'qwen2.5-0.5b': {**_QWEN2, 'hidden_size': 896, 'num_hidden_layers': 24,
                     'num_attention_heads': 14, 'intermediate_size': 4864},
    'qwen2.5-1.5b': {**_QWEN2, 'hidden_size': 1536, 'num_hidden_layers': 28,
                     'num_attention_heads': 12, 'intermediate_size': 8960},
    'qwen2.5-3b': {**_QWEN2, 'hidden_size': 2048, 'num_hidden_layers': 36,
                   'num_attention_heads': 16, 'intermediate_size': 11008},
    'qwen3-4b': {**_QWEN3, 'hidden_size': 2560, 'intermediate_size': 9728,
                 'tie_word_embeddings': True},
    'qwen3-8b': {**_QWEN3, 'hidden_size': 4096, 'intermediate_size': 12288},
    'gemma-3-1b': {
        'architectures': ['Gemma3ForCausalLM'], 'model_type': 'gemma3_text',
        'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': 1152, 'num_hidden_layers': 26,
        'num_attention_heads': 4, 'num_key_value_heads': 1, 'head_dim': 256,
        'intermediate_size': 6912, 'vocab_size': 262144, 'max_position_embeddings': 32768,
        'rms_norm_eps': 1e-6, 'rope_theta': 1e6, 'rope_local_base_freq': 1e4,
        'query_pre_attn_scalar': 256, 'sliding_window': 512, 'sliding_window_pattern': 6,
        'attention_bias': False, 'tie_word_embeddings': True,
        'bos_token_id': 2, 'eos_token_id': [1, 106]},
    'smollm2-135m': {
        'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'hidden_size': 576,
        'num_hidden_layers': 30, 'num_attention_heads': 9, 'num_key_value_heads': 3,
        'intermediate_size': 1536, 'vocab_size': 49152, 'max_position_embeddings': 8192,
        'rms_norm_eps': 1e-5, 'rope_theta': 1e5, 'attention_bias': False, 'mlp_bias': False,
        'tie_word_embeddings': True, 'bos_token_id': 0, 'eos_token_id': 0},
    'qwen3-30b-a3b': {
        **_QWEN3, 'architectures': ['Qwen3MoeForCausalLM'], 'model_type': 'qwen3_moe',
        'hidden_size': 2048, 'intermediate_size': 6144, 'num_hidden_layers': 48,
        'num_key_value_heads': 4, 'num_experts': 128, 'num_experts_per_tok': 8,
        'moe_intermediate_size': 768, 'norm_topk_prob': True, 'decoder_sparse_step': 1,
        'mlp_only_layers': []},
    'mistral-7b': {
        'architectures': ['MistralForCausalLM'], 'model_type': 'mistral', 'hidden_size': 4096,
        'num_hidden_layers': 32, 'num_attention_heads': 32, 'num_key_value_heads': 8,
        'intermediate_size': 14336, 'vocab_size': 32768, 'max_position_embeddings': 32768,
        'rms_norm_eps': 1e-5, 'rope_theta': 1e6, 'sliding_window': None,
        'bos_token_id': 1, 'eos_token_id': 2},
    'tiny': {
        'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'hidden_size': 256,
        'num_hidden_layers': 4, 'num_attention_heads': 4, 'num_key_value_heads': 2,
        'intermediate_size': 768, 'vocab_size': 1024, 'max_position_embeddings': 32768,
        'rms_norm_eps': 1e-6, 'rope_theta': 1e6, 'use_sliding_window': False,
        'bos_token_id': 0, 'eos_token_id': 1},
}


def _compressed(layout: str, bits: int, group_size: int | None, kind: str = 'int',
                strategy: str = '') -> dict[str, Any]:
    """Return the quantization_config of symmetric compressed-tensors."""
    weights = {'num_bits': bits, 'type': kind, 'symmetric': True, 'group_size': group_size,
               'strategy': strategy or ('group' if group_size else 'channel')}
    return {'quant_method': 'compressed-tensors', 'format': layout, 'ignore': ['lm_head'],
            'quantization_status': 'compressed',
            'config_groups': {'group_0': {'targets': ['Linear'], 'weights': weights}}}


def _quantization_config(quantization: str, group: int) -> dict[str, Any]:
    """Return the quantization_config with ``group`` columns per scale."""
    configs: dict[str, dict[str, Any]] = {
        'gptq': {'quant_method': 'gptq', 'bits': 4, 'group_size': group, 'desc_act': False,
                 'sym': True, 'checkpoint_format': 'gptq', 'lm_head': False},
        'awq': {'quant_method': 'awq', 'bits': 4, 'group_size': group, 'zero_point': True,
                'version': 'gemm', 'modules_to_not_convert': None},
        'w4a16': _compressed('pack-quantized', 4, group),
        'w8a16': _compressed('int-quantized', 8, None),
        'fp8': {'quant_method': 'fp8', 'activation_scheme': 'dynamic', 'fmt': 'e4m3',
                'weight_block_size': [GROUP, GROUP]},
        'nvfp4': _compressed('nvfp4-pack-quantized', 4, NVFP4_GROUP, 'float', 'tensor_group'),
        'nf4': {'quant_method': 'bitsandbytes', 'load_in_4bit': True, 'load_in_8bit': False,
                'bnb_4bit_quant_type': 'nf4', 'bnb_4bit_use_double_quant': False,
                'bnb_4bit_compute_dtype': 'bfloat16', 'bnb_4bit_quant_storage': 'uint8'},
    }
    return configs[quantization]


def _group(made: dict[str, Any]) -> int:
    """Return the number of columns per scale."""
    return math.gcd(GROUP, made['hidden_size'], made['intermediate_size'])


def config(shape: str, quantization: str = 'none') -> dict[str, Any]:
    """
    Return the ``config.json`` of a shape.

    :raises ValueError: the shape or the quantisation is unknown; the message lists the known ones.
    """
    for what, value, known in (('shape', shape, SHAPES),
                               ('quantisation', quantization, QUANTIZATIONS)):
        if value not in known:
            raise ValueError(f'unknown {what} {value!r}: expected one of {", ".join(known)}')
    half = 'float16' if quantization in ('gptq', 'awq', 'w4a16') else 'bfloat16'
    made: dict[str, Any] = {**_COMMON, **SHAPES[shape], 'torch_dtype': half}
    if quantization != 'none':
        made['quantization_config'] = _quantization_config(quantization, _group(made))
    return made


_ITEM_BYTES = {'U8': 1, 'I8': 1, 'F8_E4M3': 1, 'F16': 2, 'BF16': 2, 'I64': 8}


@dataclass(frozen=True)
class Spec:
    """A tensor: its name, safetensors dtype, shape and content."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: str                       # ones, normal, words, or a part of a quantised matrix

    @property
    def bytes(self) -> int:
        """The stored size in bytes."""
        return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 4)


def specs(made: dict[str, Any]) -> Iterator[Spec]:
    """Yield all tensors of a folder with this ``config.json``."""
    half = {'float16': 'F16', 'bfloat16': 'BF16'}[made['torch_dtype']]
    quantized = made.get('quantization_config', {})
    method = quantized.get('format') or quantized.get('quant_method', 'none')
    hidden, experts = made['hidden_size'], made.get('num_experts', 0)
    inner = made['moe_intermediate_size' if experts else 'intermediate_size']
    group = _group(made)
    head = made.get('head_dim') or hidden // made['num_attention_heads']
    norms = ['input_layernorm', 'post_attention_layernorm']
    if made['model_type'] == 'gemma3_text':
        norms += ['pre_feedforward_layernorm', 'post_feedforward_layernorm']
    q_width, kv_width = (head * made[f'num_{kind}_heads'] for kind in ('attention', 'key_value'))
    yield Spec('model.embed_tokens.weight', half, (made['vocab_size'], hidden), 'normal')
    for index in range(made['num_hidden_layers']):
        layer = f'model.layers.{index}'
        for name in norms:
            yield Spec(f'{layer}.{name}.weight', half, (hidden,), 'ones')
        for name, width in (('q_proj', q_width), ('k_proj', kv_width), ('v_proj', kv_width)):
            yield from _linear(f'{layer}.self_attn.{name}', width, hidden, half, method, group)
            if made['model_type'] == 'qwen2':
                yield Spec(f'{layer}.self_attn.{name}.bias', half, (width,), 'normal')
        if made['model_type'] in ('qwen3', 'qwen3_moe', 'gemma3_text'):
            for name in ('q_norm', 'k_norm'):
                yield Spec(f'{layer}.self_attn.{name}.weight', half, (head,), 'ones')
        yield from _linear(f'{layer}.self_attn.o_proj', hidden, q_width, half, method, group)
        mlps = [f'{layer}.mlp']
        if experts:
            yield Spec(f'{layer}.mlp.gate.weight', half, (experts, hidden), 'normal')
            mlps = [f'{layer}.mlp.experts.{number}' for number in range(experts)]
        for mlp in mlps:
            yield from _linear(f'{mlp}.gate_proj', inner, hidden, half, method, group)
            yield from _linear(f'{mlp}.up_proj', inner, hidden, half, method, group)
            yield from _linear(f'{mlp}.down_proj', hidden, inner, half, method, group)
    yield Spec('model.norm.weight', half, (hidden,), 'ones')
    if not made['tie_word_embeddings']:
        yield Spec('lm_head.weight', half, (made['vocab_size'], hidden), 'normal')


def describe(folder: Path, shape: str, quantization: str = 'none', seed: int = 0) -> None:
    """
    Write a folder that describes the weights; the engine creates them on the device.

    :param quantization: one of `DESCRIBED`.
    :raises ValueError: the shape is unknown, the quantisation needs stored weights, or the folder
        has a model that was not created here.
    """
    made = config(shape, quantization)
    if quantization not in DESCRIBED:
        raise ValueError(f'{quantization} needs stored weights: omit --shapes-only')
    made['physai_decode_random_weights'] = {'seed': seed, 'quantization': quantization}
    header: dict[str, object] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for spec in specs(made):
        header[spec.name] = {'dtype': spec.dtype, 'shape': spec.shape,
                             'data_offsets': (end, end + spec.bytes)}
        end += spec.bytes
    written = json.dumps(header).encode()
    _begin(folder, 0)       # a sparse file takes no space
    with (folder / 'model.safetensors').open('wb') as file:
        file.write(struct.pack('<Q', len(written)) + written)
        file.truncate(file.tell() + end)
    _finish(folder, made)


def write(folder: Path, shape: str, quantization: str = 'none', seed: int = 0,
          progress: Callable[[str], None] = lambda message: None) -> None:
    """
    Write a folder with random weights in safetensors shards.

    ``config.json`` is written last: a folder that has one is complete.

    :raises ValueError: the shape or the quantisation is unknown, or the folder has a model that
        was not created here.
    :raises OSError: there is too little space; the message has the needed and free bytes.
    """
    from safetensors.torch import save_file
    import torch

    made = config(shape, quantization)
    total = sum(spec.bytes for spec in specs(made))
    _begin(folder, total)
    generator = torch.Generator('cuda' if torch.cuda.is_available() else 'cpu').manual_seed(seed)
    files: dict[str, str] = {}
    for number, shard in enumerate(_shards(specs(made)), 1):
        name = f'model-{number:05d}.safetensors'
        progress(f'writing {name}, {sum(spec.bytes for spec in shard) / 1e9:.1f} GB of '
                 f'{total / 1e9:.1f}')
        save_file({spec.name: _make(spec, generator) for spec in shard}, folder / name,
                  metadata={'format': 'pt'})
        files.update({spec.name: name for spec in shard})
    index = {'metadata': {'total_size': total}, 'weight_map': files}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1))
    _finish(folder, made)


def forget(folder: Path) -> None:
    """Remove a folder that was created here, even if incomplete; leave any other folder."""
    if (folder / MARK).is_file():
        shutil.rmtree(folder, ignore_errors=True)


def _begin(folder: Path, needed_bytes: int) -> None:
    """Mark a folder and empty it of an older model, its config.json first."""
    older = [path for pattern in ('config.json', '*.safetensors', '*.safetensors.index.json')
             for path in folder.glob(pattern)]
    mark = folder / MARK
    if older and not mark.is_file():
        raise ValueError(f'{folder} has a model that was not created here ({older[0].name}, but '
                         f'no {MARK}): choose another folder, or empty it')
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free + sum(512 * path.stat().st_blocks for path in older)
    if needed_bytes > free:
        raise OSError(f'{folder} needs {needed_bytes / 1e9:.1f} GB for the random weights, but '
                      f'{free / 1e9:.1f} GB are free: free some space, or choose another folder')
    mark.write_text('Random weights for timing, made by decode_bench, which may overwrite them.\n')
    for path in older:
        path.unlink()


def _linear(name: str, out: int, rows: int, half: str, method: str,
            group: int) -> Iterator[Spec]:
    """Yield the tensors of a matrix [out, rows] in the layout of its quantisation."""
    groups = rows // group
    if method == 'gptq':
        yield Spec(f'{name}.qweight', 'I32', (rows // 8, out), 'words')
        yield Spec(f'{name}.qzeros', 'I32', (groups, out // 8), 'sevens')
        yield Spec(f'{name}.scales', 'F16', (groups, out), 'scales')
        yield Spec(f'{name}.g_idx', 'I32', (rows,), f'groups of {group}')
    elif method == 'awq':
        yield Spec(f'{name}.qweight', 'I32', (rows, out // 8), 'words')
        yield Spec(f'{name}.qzeros', 'I32', (groups, out // 8), 'eights')
        yield Spec(f'{name}.scales', 'F16', (groups, out), 'scales')
    elif method == 'pack-quantized':
        yield Spec(f'{name}.weight_packed', 'I32', (out, rows // 8), 'words')
        yield Spec(f'{name}.weight_scale', 'BF16', (out, groups), 'scales')
        yield Spec(f'{name}.weight_shape', 'I64', (2,), f'shape {out} {rows}')
    elif method == 'int-quantized':
        yield Spec(f'{name}.weight', 'I8', (out, rows), 'int8')
        yield Spec(f'{name}.weight_scale', 'BF16', (out, 1), 'scales of int8')
    elif method == 'nvfp4-pack-quantized':
        yield Spec(f'{name}.weight_packed', 'U8', (out, rows // 2), 'bytes')
        yield Spec(f'{name}.weight_scale', 'F8_E4M3', (out, rows // NVFP4_GROUP), 'scales of fp4')
        yield Spec(f'{name}.weight_global_scale', 'F32', (1,), 'scale of scales')
    elif method == 'fp8':
        blocks = -(-out // GROUP), -(-rows // GROUP)
        yield Spec(f'{name}.weight', 'F8_E4M3', (out, rows), 'float8')
        yield Spec(f'{name}.weight_scale_inv', 'F32', blocks, 'scales of float8')
    elif method == 'bitsandbytes':
        yield Spec(f'{name}.weight', 'U8', (out * rows // 2, 1), 'bytes')
        yield Spec(f'{name}.weight.absmax', 'F32', (out * rows // NF4_BLOCK,), 'absmax')
        yield Spec(f'{name}.weight.quant_map', 'F32', (16,), 'nf4')
        yield Spec(f'{name}.weight.quant_state.bitsandbytes__nf4', 'U8',
                   (len(_nf4_state(out, rows)),), _nf4_state(out, rows))
    else:
        yield Spec(f'{name}.weight', half, (out, rows), 'normal')


def _nf4_state(out: int, rows: int) -> str:
    return json.dumps({'quant_type': 'nf4', 'blocksize': NF4_BLOCK, 'dtype': 'bfloat16',
                       'shape': [out, rows]})


def _shards(all_specs: Iterable[Spec]) -> Iterator[list[Spec]]:
    shard: list[Spec] = []
    for spec in all_specs:
        if shard and sum(each.bytes for each in shard) + spec.bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(spec)
    yield shard


def _make(spec: Spec, generator: 'torch.Generator') -> 'torch.Tensor':
    """Create a tensor on the generator's device, and move it to the CPU."""
    from physai_decode.engines.native.formats.bitsandbytes import TABLES
    import torch

    dtype = {'U8': torch.uint8, 'I8': torch.int8, 'F8_E4M3': torch.float8_e4m3fn,
             'I64': torch.int64, 'I32': torch.int32, 'F32': torch.float32, 'F16': torch.float16,
             'BF16': torch.bfloat16}[spec.dtype]
    empty = torch.empty(spec.shape, dtype=dtype, device=generator.device)
    if spec.fill == 'ones':
        made = empty.fill_(1)
    elif spec.fill == 'normal':
        made = empty.normal_(0.0, STD, generator=generator)
    elif spec.fill == 'words':          # eight uniform 4-bit values each
        made = empty.random_(-2**31, None, generator=generator)
    elif spec.fill == 'bytes':
        made = empty.random_(0, 256, generator=generator)
    elif spec.fill == 'sevens':         # zero point 8: the format gptq stores zero - 1
        made = empty.fill_(0x77777777)
    elif spec.fill == 'eights':
        made = empty.fill_(0x88888888 - 2**32)
    elif spec.fill == 'scales':         # gives uniform 4-bit values about the deviation STD
        made = empty.uniform_(0.9, 1.1, generator=generator) * (STD / math.sqrt((16**2 - 1) / 12))
    elif spec.fill == 'int8':
        made = empty.random_(-127, 128, generator=generator)
    elif spec.fill == 'float8':
        made = torch.randn(spec.shape, device=generator.device, generator=generator).to(dtype)
    elif spec.fill == 'scales of int8':
        made = empty.uniform_(0.9, 1.1, generator=generator) * (STD / math.sqrt((255**2 - 1) / 12))
    elif spec.fill == 'scales of float8':
        made = empty.uniform_(0.9, 1.1, generator=generator) * STD
    elif spec.fill == 'scales of fp4':
        made = torch.empty(spec.shape, device=empty.device).uniform_(
            230, 282, generator=generator).to(dtype)
    elif spec.fill == 'scale of scales':    # 2.93: the deviation of E2M1 values
        made = empty.fill_(256 * 2.93 / STD)
    elif spec.fill.startswith('shape'):
        made = torch.tensor([int(number) for number in spec.fill.split()[1:]])
    elif spec.fill.startswith('groups of'):
        made = torch.arange(len(empty), dtype=dtype) // int(spec.fill.split()[-1])
    elif spec.fill == 'nf4':
        made = torch.tensor(TABLES['nf4'])
    elif spec.fill == 'absmax':         # as with scales
        spread = torch.tensor(TABLES['nf4']).square().mean().sqrt().item()
        made = empty.uniform_(0.9, 1.1, generator=generator) * (STD / spread)
    else:
        made = torch.tensor(list(spec.fill.encode()), dtype=dtype)
    return made.cpu()


def _finish(folder: Path, made: dict[str, Any]) -> None:
    """Write a tokenizer, with which the node can load the folder, and config.json."""
    shutil.copyfile(_BUILTIN / 'tokenizer_config.json', folder / 'tokenizer_config.json')
    (folder / 'tokenizer.json').write_text(_tokenizer(made['vocab_size']))
    (folder / 'config.json').write_text(json.dumps(made, indent=2) + '\n')


@cache
def _tokenizer(size: int) -> str:
    """
    Extend the embedded model's tokenizer to ``size`` tokens, by pairs of its own tokens.

    No merge creates the new tokens, so no prompt contains them. A constraint has to mask them all.
    """
    state = json.loads((_BUILTIN / 'tokenizer.json').read_text())
    vocabulary, draw = state['model']['vocab'], random.Random(0)
    special = {each['content'] for each in state['added_tokens']}
    parts = [token for token in vocabulary if token not in special]
    while len(vocabulary) < size:
        vocabulary.setdefault(draw.choice(parts) + draw.choice(parts), len(vocabulary))
    return json.dumps(state, ensure_ascii=False)
