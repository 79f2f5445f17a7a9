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

"""From a model folder to a network of the transformers library on one device."""

import math
from urllib.error import URLError

from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.engines import device as devices
from physai_decode.engines import leftover
from physai_decode.engines import libraries
from physai_decode.engines import stored
import torch
import transformers
from transformers.utils import is_accelerate_available

_FLOATS = ('F64', 'F32', 'F16', 'BF16')


def number_format(model: Checkpoint, config: EngineConfig, device: torch.device,
                  dtype: torch.dtype) -> torch.dtype:
    """Give the dtype for a model's weights, where ``dtype`` is the device's."""
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
    """Give what the weights take on the device."""
    if model.quantized:
        return model.weight_bytes
    return sum(
        entry.bytes if entry.dtype not in _FLOATS
        else entry.bytes * dtype.itemsize // {'F64': 8, 'F32': 4}.get(entry.dtype, 2)
        for entry in model.tensors.values())


def load(model: Checkpoint, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """
    Load a network; no code from the model's folder is run.

    :raises EngineError: it can't be had; the message says why and what to do.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if model.model_type not in transformers.CONFIG_MAPPING:
        folder_code = ' (the folder brings its own code, which is never run)' \
            if 'auto_map' in model.config else ''
        raise EngineError(
            f'{model.folder}: the architecture {model.model_type!r} is not in transformers '
            f'{transformers.__version__}{folder_code}: choose another model, or a version of '
            'transformers that has it')
    missing = libraries.missing(model.quantized.method) if model.quantized else ()
    if missing:
        raise EngineError(
            f'{model.folder}: transformers needs more libraries for {model.quantization} weights: '
            f'pip install {" ".join(missing)}')
    placed = bool(model.quantized) or (
        device.type == 'cuda' and is_accelerate_available())
    try:
        config = transformers.AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
        known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if config.is_encoder_decoder or type(config) not in known:
            raise EngineError(
                f'{model.folder}: {model.model_type!r} is not a model that continues text: choose '
                'a causal language model')
        kind = known[type(config)]
        attention = 'sdpa' if kind._supports_sdpa else 'eager'
        if model.random_weights is not None:
            return _random(model, config, attention, device, dtype)
        # What reads quantised weights wants the folder.
        folder, weights = (model.folder, None) if model.quantized else (None, {
            name: stored.Lazy(entry) for name, entry in model.tensors.items()})
        network, found = kind.from_pretrained(
            folder, config=config, state_dict=weights, dtype=dtype, use_safetensors=True,
            attn_implementation=attention,
            device_map={'': device} if placed else None, output_loading_info=True)
    except EngineError:
        raise
    except ImportError as error:
        raise EngineError(
            f'{model.folder}: {model.quantization} weights need a library that is not here: '
            f'{first_line(error)}') from None
    # The library raises whatever its many parts raise.
    except Exception as error:
        if devices.is_out_of_memory(error):
            raise
        told = first_line(error)
        if isinstance(error, URLError):
            told += (' (a library wanted to download something: connect this machine for one '
                     'start, or choose another engine.name)')
        raise EngineError(
            f'{model.folder} can not be loaded by transformers {transformers.__version__}: '
            f'{told}') from None
    lost = sorted(found['missing_keys'])
    if lost:
        raise EngineError(
            f'{model.folder} lacks {len(lost)} of the weights that its config.json asks for, '
            f'{lost[0]} for one: copy or download the model again')
    if not model.quantized:
        _check_floats(model, network)
        _check_all_used(model, network, found['unexpected_keys'])
    if not placed:
        network.to(device)
    return network.eval()


def _check_floats(model, network):
    """Refuse whole numbers where the network has others: a quantisation that nobody names."""
    for name, weight in network.named_parameters():
        entry = model.tensors.get(name)
        if entry and weight.is_floating_point() and entry.dtype not in _FLOATS:
            raise EngineError(
                f'tensor {name} holds whole numbers ({entry.dtype}) where config.json implies '
                'others: they are quantised in a way that it does not name; download a newer '
                'version of the model')


def _check_all_used(model, network, left):
    """Refuse weights that the network has no place for, or one place where they are two."""
    leftover.check(model, model.tensors.keys() & left,
                   (*leftover.PREFIXES, f'{network.base_model_prefix}.'))
    head = network.get_output_embeddings()
    if head is None or not network.config.get_text_config(decoder=True).tie_word_embeddings:
        return
    # Newer versions of the library leave them apart where the files have two.
    ends = [id(each.weight) for each in (network.get_input_embeddings(), head)]
    leftover.check_same(model, [
        name for name, weight in network.named_parameters(remove_duplicate=False)
        if id(weight) in ends])


def _random(model, config, attention, device, dtype):
    """Make weights at random on the device, for a folder that only describes their shapes."""
    if model.quantized:
        raise EngineError(
            f'{model.folder} only describes {model.quantization} weights, which transformers can '
            'not make at random: write them with decode_bench --write-checkpoint')
    def made():
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention)

    with torch.device('meta'):
        numbers = sum(weight.numel() for weight in made().parameters())
    described = sum(math.prod(entry.shape) for entry in model.tensors.values())
    if numbers > described:
        raise EngineError(
            f'{model.folder} describes weights of {described} numbers, config.json implies '
            f'{numbers}: they do not belong together')
    # By default it would open every GPU of the machine.
    used = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices=used), torch.device(device):
        torch.manual_seed(model.random_weights.get('seed', 0))
        return made().eval()
