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

"""Load a transformers network from a model folder to one device."""

from collections.abc import Iterable
from collections.abc import Mapping
import math
from typing import Any
from urllib.error import URLError

from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.engines import device as devices
from physai_decode.engines import leftover
from physai_decode.engines import libraries
from physai_decode.engines import stored
from physai_decode.pip_command import install
import torch
import transformers
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import is_accelerate_available

# The ends of the names of scales, without which quantised weights are wrong.
_SCALES = ('.weight_scale', '.weight_scale_inv', '.weight_scale_2', '.weight_global_scale')


def number_format(model: Checkpoint, config: EngineConfig, device: torch.device,
                  dtype: torch.dtype) -> torch.dtype:
    """
    Return the dtype for a model.

    :param dtype: the default of the device.
    :raises EngineError: transformers does not support `engine.dtype` with these weights.
    """
    method = model.quantized and model.quantized.method
    if device.type == 'cpu' or method not in ('awq', 'gptq'):
        return dtype
    if config.dtype == 'auto':
        return torch.float16
    if method == 'awq' and dtype != torch.float16:
        raise EngineError(
            f'engine.dtype is {config.dtype}, but transformers computes in float16 with AWQ '
            'weights on a GPU: set it to float16 or auto')
    return dtype


def needed_bytes(model: Checkpoint, dtype: torch.dtype) -> int:
    """Return the size of the weights on the device."""
    if model.quantized:
        return model.weight_bytes
    return sum(
        entry.bytes if entry.dtype not in stored.FLOATS
        else entry.bytes * dtype.itemsize // {'F64': 8, 'F32': 4}.get(entry.dtype, 2)
        for entry in model.tensors.values())


def load(model: Checkpoint, device: torch.device, dtype: torch.dtype
         ) -> transformers.PreTrainedModel:
    """
    Load a network without running code from the model folder.

    :raises EngineError: the model cannot be loaded; the message says why and what to do.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if not transformers.is_torch_available():
        raise EngineError(
            f'transformers {transformers.__version__} considers PyTorch {torch.__version__} too '
            'old: install a newer PyTorch, or choose another engine.name, or, for PyTorch 2.5 '
            f'and its pre-releases, {install("transformers<5.15")}')
    if model.model_type not in transformers.CONFIG_MAPPING:
        folder_code = ' (the folder brings its own code, which is never run)' \
            if 'auto_map' in model.config else ''
        raise EngineError(
            f'{model.folder}: the architecture {shown(model.model_type)} is not in transformers '
            f'{transformers.__version__}{folder_code}: choose another model, or a version of '
            'transformers that has it')
    if model.quantized and not _supports(model.quantized.settings):
        stored.check_quantised(model)
        raise EngineError(
            f'{model.folder}: transformers {transformers.__version__} does not read '
            f'{model.quantization} weights: set engine.name to native if it runs this '
            'architecture, or choose another format of the model')
    missing = libraries.missing(model.quantized.method) if model.quantized else ()
    if missing:
        raise EngineError(
            f'{model.folder}: transformers needs more libraries for {model.quantization} weights: '
            f'{install(*missing)}')
    stored.check_quantised(model)
    placed = bool(model.quantized) or (
        device.type == 'cuda' and is_accelerate_available())
    try:
        config = transformers.AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
        known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if config.is_encoder_decoder or type(config) not in known:
            raise EngineError(
                f'{model.folder}: {shown(model.model_type)} is not a causal language model: '
                'choose another model')
        kind: Any = known[type(config)]
        attention = 'sdpa' if kind._supports_sdpa else 'eager'
        if model.random_weights is not None:
            return _random(model, config, attention, device, dtype)
        # Loaders of quantised weights need the folder.
        folder, weights = (model.folder, None) if model.quantized else (None, {
            name: stored.Lazy(entry) for name, entry in model.tensors.items()})
        network, info = kind.from_pretrained(
            folder, config=config, state_dict=weights, dtype=dtype, use_safetensors=True,
            attn_implementation=attention, ignore_mismatched_sizes=True,
            device_map={'': device} if placed else None, output_loading_info=True)
    except EngineError:
        raise
    except ImportError as error:
        raise EngineError(
            f'{model.folder}: {model.quantization} weights need a library that cannot be '
            f'imported: {first_line(error)}') from None
    # The library and its dependencies raise exceptions of any type.
    except Exception as error:
        if devices.is_out_of_memory(error):
            raise
        reason = first_line(error)
        if isinstance(error, URLError):
            reason += (' (a library wanted to download something: connect this machine to '
                     'the network for one start, or choose another engine.name)')
        raise EngineError(
            f'{model.folder} cannot be loaded by transformers {transformers.__version__}: '
            f'{reason}') from None
    if info['mismatched_keys']:
        raise stored.wrong_shape(model, *min(info['mismatched_keys']))
    absent = sorted(info['missing_keys'])
    if absent:
        leftover.check_layers(model, absent[0])
        raise EngineError(
            f'{model.folder} lacks {len(absent)} of the weights that its config.json requires, '
            f'such as {absent[0]}: copy or download the model again')
    if model.quantized:
        _check_scales(model, info['unexpected_keys'])
    else:
        _check_floats(model, network, info['unexpected_keys'])
        _check_unused(model, network, info['unexpected_keys'])
    if not placed:
        network.to(device)
    loaded: transformers.PreTrainedModel = network.eval()
    return loaded


def _supports(settings: Mapping[str, Any]) -> bool:
    """Return whether the library reads a format; it loads any other without its scales."""
    if 'quant_method' not in settings:
        return True         # the library reads the oldest formats, or says what it lacks
    return bool(AutoHfQuantizer.supports_quant_method(dict(settings)))


def _check_scales(model: Checkpoint, left: Iterable[str]) -> None:
    """Refuse quantised weights whose scales the library did not read."""
    for name in sorted(left):
        if name.endswith(_SCALES):
            raise EngineError(
                f'{model.folder}: transformers {transformers.__version__} does not read the '
                f'tensor {name}, so its {model.quantization} weights would be wrong: set '
                'engine.name to native if it runs this architecture, or choose another format '
                'of the model')


def _check_floats(model: Checkpoint, network: transformers.PreTrainedModel,
                  left: Iterable[str]) -> None:
    """Refuse integers and 8-bit floats for float parameters: config.json has no quantisation."""
    floats = {name for name, weight in network.named_parameters() if weight.is_floating_point()}
    # The library stacks experts under other names; other integers are buffers.
    for name in sorted(model.tensors.keys() - set(left)):
        entry = model.tensors[name]
        if name in floats or entry.dtype.startswith('F') or name.endswith(('weight', '_proj')):
            stored.check_float(name, entry)


def _check_unused(model: Checkpoint, network: transformers.PreTrainedModel,
                  left: Iterable[str]) -> None:
    """Refuse weights that the network does not use, and tied weights that differ."""
    leftover.check(model, model.tensors.keys() & set(left),
                   (*leftover.PREFIXES, f'{network.base_model_prefix}.'))
    head: Any = network.get_output_embeddings()
    if head is None or not network.config.get_text_config(decoder=True).tie_word_embeddings:
        return
    # Newer versions of the library do not tie them if the files hold both.
    embedding: Any = network.get_input_embeddings()
    ends = [id(each.weight) for each in (embedding, head)]
    leftover.check_same(model, [
        name for name, weight in network.named_parameters(remove_duplicate=False)
        if id(weight) in ends])


def _random(model: Checkpoint, config: transformers.PretrainedConfig, attention: str,
            device: torch.device, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Create random weights on the device for a folder that only describes their shapes."""
    if model.quantized:
        raise EngineError(
            f'{model.folder} only describes {model.quantization} weights, which transformers '
            'cannot create at random: write them with decode_bench --write-checkpoint')
    assert model.random_weights is not None

    def create() -> transformers.PreTrainedModel:
        network: transformers.PreTrainedModel = \
            transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention)
        network.eval()
        return network

    with torch.device('meta'):
        implied = sum(weight.numel() for weight in create().parameters())
    described = sum(math.prod(entry.shape) for entry in model.tensors.values())
    if implied > described:
        raise EngineError(
            f'{model.folder} describes {described} weights, but its config.json implies '
            f'{implied}: write the folder again')
    # By default, fork_rng initialises every GPU of the machine.
    used = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices=used), torch.device(device):
        torch.manual_seed(model.random_weights.get('seed', 0))
        return create()
