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

"""What the library would not run, or would run wrongly, refused by name; and its settings."""

from dataclasses import replace
from typing import Any

from physai_decode.checkpoint import Checkpoint
from physai_decode.checkpoint import parsing
from physai_decode.config import EngineConfig
from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.engines import device as devices
from physai_decode.engines import stored
from physai_decode.model_config import number
from physai_decode.model_config import Rope
from physai_decode.model_config import windows
import torch

CHUNK_TOKENS = 2048       # of a prompt, read at a time; the library's own default
_FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3')


def device(config: EngineConfig) -> torch.device:
    """
    Give the GPU that the settings ask for.

    :raises EngineError: they ask for a CPU, or for another number format than float16.
    """
    if config.dtype not in ('auto', 'float16'):
        raise EngineError(f'engine.dtype is {config.dtype}, but ExLlamaV2 computes in float16: '
                          'set it to float16 or auto')
    found, _ = devices.select(replace(config, dtype='auto'))
    if found.type != 'cuda':
        raise EngineError('ExLlamaV2 needs an NVIDIA GPU: set engine.name to native or '
                          'transformers to run on a CPU')
    return found


def check(model: Checkpoint, limit: int) -> None:
    """Refuse by name what the library would not run, or run wrongly."""
    config, quantized = model.text_config, model.quantized
    method = quantized and quantized.method
    if model.model_type not in _FAMILIES:
        raise EngineError(
            f'{model.folder}: the exllamav2 engine does not run {model.model_type!r} (it runs '
            f'{", ".join(_FAMILIES)}): set engine.name to transformers')
    if method not in ('gptq', 'exl2'):
        raise EngineError(
            f'{model.folder}: the exllamav2 engine runs weights quantised to gptq or exl2, these '
            f'are quantised to {method or "nothing"}: set engine.name to auto')
    if model.random_weights is not None:
        raise EngineError(
            f'{model.folder} only describes its weights, which ExLlamaV2 can not make at random: '
            'write them with decode_bench --write-checkpoint')
    kind = Rope(config).kind
    if kind not in ('default', 'linear', 'llama3'):
        raise EngineError(
            f'{model.folder}: ExLlamaV2 does not scale rotary positions as its config.json asks '
            f'({kind}): set engine.name to native or transformers')
    window = max(windows(config, number(config, 'num_hidden_layers')))
    if 0 < window < limit:
        raise EngineError(
            f'{model.folder}: ExLlamaV2 does not slide the window of {window} tokens that its '
            f'config.json asks for: set engine.max_context to {window} or less, or engine.name to '
            'native')
    if method == 'gptq':
        _check_gptq(model, quantized)


def _check_gptq(model, quantized):
    """Hold the tensors against what the library takes for granted."""
    bits, size, layout = quantized.bits, quantized.group_size, quantized.layout
    if bits != 4 or layout not in ('gptq', 'gptq_v2'):
        raise EngineError(
            f'{model.folder}: ExLlamaV2 runs 4-bit GPTQ of the formats gptq and gptq_v2, this is '
            f'{bits}-bit {layout}: set engine.name to transformers')
    if size != -1 and (size < 32 or size & (size - 1)):
        raise EngineError(f'{model.folder}: ExLlamaV2 runs GPTQ groups of a power of two from 32 '
                          f'on, or -1, not of {size}: set engine.name to transformers')
    no_zero = 0 if layout == 'gptq_v2' else 15      # how a zero point of 0 is stored
    shifts = torch.arange(0, 32, 4)
    for name, entry in model.tensors.items():
        module, _, end = name.rpartition('.')
        if end not in ('g_idx', 'qzeros'):
            continue
        tensor = stored.read(entry)
        if end == 'g_idx':
            width = len(tensor) if size == -1 else size
            plain = torch.arange(len(tensor)) // width
            if not torch.equal(tensor.sort().values.long(), plain):
                raise EngineError(f'{model.folder}: {name} does not give groups of {width} '
                                  'columns: the GPTQ checkpoint is inconsistent')
        elif (((tensor.unsqueeze(-1) >> shifts) & 15) == no_zero).any():
            raise EngineError(
                f'{model.folder}: {module} has zero points of 0, which ExLlamaV2 takes for 16: '
                'set engine.name to native')


def settings(library: Any, model: Checkpoint, config: EngineConfig, limit: int) -> Any:
    """Give the library's own config for a folder."""
    try:
        made = library.ExLlamaV2Config(str(model.folder))
    except Exception as error:
        raise EngineError(
            f'{model.folder} can not be read by ExLlamaV2 {library.__version__}: '
            f'{first_line(error)}') from None
    made.max_seq_len = limit
    made.max_input_len = min(CHUNK_TOKENS, limit)
    made.no_graphs = not config.cuda_graph
    made.no_xformers = True     # see attend_by_groups
    # The library does not know of quantizers that write "format" alone.
    made.checkpoint_offset_qzeros = model.quantized.layout == 'gptq_v2'
    # Nor does it know where newer versions of transformers write this.
    rope = Rope(model.text_config)
    with parsing(model.folder / 'config.json'):
        made.rotary_embedding_base = float(rope.theta)
        if rope.kind == 'linear':
            made.scale_pos_emb = float(rope.factor)
        elif rope.kind == 'llama3':
            made.alt_rope_method = rope.kind
            made.l3_rope_factor = rope.factor
            made.l3_rope_low_freq_factor = rope.low_freq_factor
            made.l3_rope_high_freq_factor = rope.high_freq_factor
            made.l3_rope_original_max_position_embeddings = rope.original_context
    return made
