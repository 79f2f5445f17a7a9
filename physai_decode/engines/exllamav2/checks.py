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

"""The settings of ExLlamaV2, and the checks for models that it cannot run correctly."""

from dataclasses import replace
from typing import Any

from physai_decode.checkpoint import Checkpoint
from physai_decode.checkpoint import parsing
from physai_decode.config import EngineConfig
from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.engines import device as devices
from physai_decode.engines import stored
from physai_decode.model_config import number
from physai_decode.model_config import Quantization
from physai_decode.model_config import Rope
from physai_decode.model_config import windows
import torch

CHUNK_TOKENS = 2048       # prefill chunk; the default of the library
_FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3')


def device(config: EngineConfig) -> torch.device:
    """
    Return the GPU that the settings select.

    :raises EngineError: the settings select a CPU, or a dtype other than float16.
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
    """
    Check that the library can run a model correctly.

    :param limit: the context in tokens.
    :raises EngineError: it cannot; the message says why and what to do.
    """
    config, quantized = model.text_config, model.quantized
    method = quantized and quantized.method
    if model.model_type not in _FAMILIES:
        raise EngineError(
            f'{model.folder}: the exllamav2 engine does not support {shown(model.model_type)} (it '
            f'supports {", ".join(_FAMILIES)}): set engine.name to transformers')
    if quantized is None or method not in ('gptq', 'exl2'):
        raise EngineError(
            f'{model.folder}: the exllamav2 engine supports gptq and exl2 weights, not '
            f'{method or "unquantised ones"}: set engine.name to auto')
    if model.random_weights is not None:
        raise EngineError(
            f'{model.folder} only describes its weights, which ExLlamaV2 cannot create at '
            'random: write them with decode_bench --write-checkpoint')
    stored.check_quantised(model)
    kind = Rope(config).kind
    if kind not in ('default', 'linear', 'llama3'):
        raise EngineError(
            f'{model.folder}: ExLlamaV2 does not support the RoPE scaling {shown(kind)}, which '
            'config.json selects: set engine.name to native or transformers')
    window = max(windows(config, number(config, 'num_hidden_layers')))
    if 0 < window < limit:
        raise EngineError(
            f'{model.folder}: ExLlamaV2 does not support the sliding window of {window} '
            f'tokens in config.json: set engine.max_context to {window} or less, or engine.name '
            'to native')
    if method == 'gptq':
        _check_gptq(model, quantized)


def _check_gptq(model: Checkpoint, quantized: Quantization) -> None:
    """Check that the tensors have the layout that the library assumes."""
    bits, size, layout = quantized.bits, quantized.group_size, quantized.layout
    if bits != 4 or layout not in ('gptq', 'gptq_v2'):
        raise EngineError(
            f'{model.folder}: ExLlamaV2 supports 4-bit GPTQ in the formats gptq and gptq_v2, '
            f'not {shown(bits)}-bit {layout}: set engine.name to transformers')
    if size != -1 and (size < 32 or size & (size - 1)):
        raise EngineError(f'{model.folder}: ExLlamaV2 supports a GPTQ group_size of -1 or a power '
                          f'of two from 32 on, not {size}: set engine.name to transformers')
    stored_zero = 0 if layout == 'gptq_v2' else 15      # the code of a zero point of 0
    shifts = torch.arange(0, 32, 4)
    for name, entry in model.tensors.items():
        module, _, end = name.rpartition('.')
        if end not in ('g_idx', 'qzeros'):
            continue
        tensor = stored.read(entry)
        if end == 'g_idx':
            width = len(tensor) if size == -1 else size
            expected = torch.arange(len(tensor)) // width
            if not torch.equal(tensor.sort().values.long(), expected):
                raise EngineError(f'{model.folder}: {name} does not have groups of {width} '
                                  'columns, so the GPTQ checkpoint is inconsistent: copy or '
                                  'download the model again')
        elif (((tensor.unsqueeze(-1) >> shifts) & 15) == stored_zero).any():
            raise EngineError(
                f'{model.folder}: {module} has zero points of 0, which ExLlamaV2 reads as 16: '
                'set engine.name to native')


def settings(library: Any, model: Checkpoint, config: EngineConfig, limit: int) -> Any:
    """
    Return the library's config for a folder.

    :raises EngineError: the library cannot read the folder.
    """
    quantized = model.quantized
    assert quantized is not None        # as `check` ensures
    try:
        made = library.ExLlamaV2Config(str(model.folder))
    except Exception as error:
        raise EngineError(
            f'{model.folder} cannot be read by ExLlamaV2 {library.__version__}: '
            f'{first_line(error)}') from None
    made.max_seq_len = limit
    made.max_input_len = min(CHUNK_TOKENS, limit)
    made.no_graphs = not config.cuda_graph
    made.no_xformers = True     # see attend_by_groups
    # The library ignores the key "format", which some quantisers write instead of
    # "checkpoint_format".
    made.checkpoint_offset_qzeros = quantized.layout == 'gptq_v2'
    # It also ignores "rope_parameters", where transformers 5 writes the RoPE settings.
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
