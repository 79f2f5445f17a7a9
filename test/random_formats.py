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
Random quantised tensors in each format, with their dequantised weights.

The weights are computed in float64 from the definition of the format. Tests compare the engine's
results with them.
"""

from collections.abc import Callable
from collections.abc import Mapping
import json
import math
from pathlib import Path
from typing import Any

from json_file import editing
from physai_decode.checkpoint import TensorEntry
from physai_decode.engines.native import formats
from physai_decode.model_config import quantization
import random_model
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)      # columns in a word, lowest bits first
# Draws a projection with a generator and the shape [n, k]. Returns the stored tensors, by the ends
# of their names, and the float64 weight.
Draw = Callable[[torch.Generator, int, int], tuple[dict[str, Tensor], Tensor]]


class Stored:
    """The tensors of one module, as a source of weights."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | None):
        """Take tensors by the ends of their names."""
        self._tensors, self._device = tensors, device

    def entry(self, name: str) -> TensorEntry | None:
        """See `Source`."""
        tensor = self._tensors.get(name.removeprefix('module.'))
        kinds = {torch.int8: 'I8', torch.float8_e4m3fn: 'F8_E4M3', torch.uint8: 'U8'}
        return None if tensor is None else TensorEntry(
            kinds.get(tensor.dtype, 'other'), tuple(tensor.shape), Path(), 0, 0)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `Source`."""
        tensor = self._tensors[name.removeprefix('module.')]
        assert tuple(tensor.shape) == shape
        return tensor.to(self._device)


def read(config: Mapping[str, Any], stored: Mapping[str, Tensor], n: int, k: int,
         device: torch.device | None = None) -> Any:
    """Return the engine's weight for the stored tensors of a module."""
    quantized = quantization({'quantization_config': config})
    assert quantized is not None
    return formats.parse(quantized).read(Stored(stored, device), 'module', n, k)


def awq(group_size: int) -> tuple[dict[str, Any], Draw]:
    """Return the config and the draw function of AWQ, layout gemm."""
    def draw(generator, n, k):
        groups = 1 if group_size == -1 else k // group_size
        q = torch.randint(0, 16, (k, n), generator=generator)
        zeros = torch.randint(0, 16, (groups, n), generator=generator)
        scales = draw_scales(generator, (groups, n), k, 4.61).half()

        def packed(numbers):
            words = torch.zeros(len(numbers), n // 8, dtype=torch.int64)
            for place, column in enumerate(AWQ_ORDER):
                words |= numbers[:, column::8] << 4 * place
            return as_int32(words)

        by_row = torch.arange(k) // (k // groups)
        return ({'qweight': packed(q), 'qzeros': packed(zeros), 'scales': scales},
                ((q - zeros[by_row]) * scales.double()[by_row]).t())

    return {'quant_method': 'awq', 'bits': 4, 'group_size': group_size, 'zero_point': True,
            'version': 'gemm', 'modules_to_not_convert': None}, draw


def packed(bits: int, group_size: int, symmetric: bool = True, act_order: bool = False,
           dtype: torch.dtype = torch.bfloat16, strategy: str = '') -> tuple[dict[str, Any], Draw]:
    """
    Return the config and the draw function of compressed-tensors, layout pack-quantized.

    :param group_size: -1 for one scale per row, or per tensor if that is the strategy.
    """
    strategy = strategy or ('channel' if group_size == -1 else 'group')
    least, each = -2 ** (bits - 1), 32 // bits

    def draw(generator, n, k):
        groups = 1 if group_size == -1 else k // group_size
        q = torch.randint(least, -least, (n, k), generator=generator)
        high = 1 if strategy == 'tensor' else n
        zeros = torch.zeros(high, groups, dtype=torch.int64)
        if not symmetric:
            zeros = torch.randint(least, -least, (high, groups), generator=generator)
        scales = draw_scales(generator, (high, groups), k, 2 ** bits / 12**0.5).to(dtype)
        g_idx = torch.arange(k) // (k // groups)
        if act_order:
            # Modules of the same width have the same order, as if they shared their input.
            g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]

        def in_words(numbers):
            words = torch.zeros(len(numbers), -(-numbers.shape[1] // each), dtype=torch.int64)
            for column in range(numbers.shape[1]):
                words[:, column // each] |= (numbers[:, column] - least) << bits * (column % each)
            return as_int32(words)

        stored = {'weight_packed': in_words(q), 'weight_scale': scales,
                  'weight_shape': torch.tensor([n, k])}
        if strategy == 'tensor':
            stored['weight_scale'] = scales[0]
        if not symmetric:
            stored['weight_zero_point'] = zeros[0].to(torch.int8) if strategy == 'tensor' else \
                in_words(zeros.t()).t().contiguous()
        if act_order:
            stored['weight_g_idx'] = g_idx.int()
        return stored, (q - zeros[:, g_idx]) * scales.double()[:, g_idx]

    return compressed('pack-quantized', num_bits=bits, type='int', symmetric=symmetric,
                      strategy=strategy,
                      group_size=None if group_size == -1 else group_size,
                      actorder='group' if act_order else None), draw


def int8(group_size: int, symmetric: bool = True, act: dict[str, Any] | None = None,
         strategy: str = '') -> tuple[dict[str, Any], Draw]:
    """Return the config and the draw function of compressed-tensors, layout int-quantized."""
    strategy = strategy or ('channel' if group_size == -1 else 'group')

    def draw(generator, n, k):
        groups = 1 if group_size == -1 else k // group_size
        high = 1 if strategy == 'tensor' else n
        q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        scales = draw_scales(generator, (high, groups), k, 74).bfloat16()
        zeros = torch.randint(-99, 99, (high, groups), generator=generator, dtype=torch.int8)
        if symmetric:
            zeros.zero_()
        by_column = torch.arange(k) // (k // groups)
        exact = (q.double() - zeros.double()[:, by_column]) * scales.double()[:, by_column]
        stored = {'weight': q, 'weight_scale': scales[0] if strategy == 'tensor' else scales}
        return stored if symmetric else {**stored, 'weight_zero_point': zeros}, exact

    return compressed('int-quantized', act, num_bits=8, type='int', symmetric=symmetric,
                      strategy=strategy,
                      group_size=None if group_size == -1 else group_size), draw


def float8(strategy: str, method: str = 'compressed-tensors',
           names: tuple[str, str] | None = None) -> tuple[dict[str, Any], Draw]:
    """
    Return the config and the draw function of 8-bit floats.

    :param strategy: tensor, channel or block (of 128 x 128).
    :param method: compressed-tensors, fp8 or modelopt.
    :param names: ends of the names of the scales of weights and activations; by default those of
        the method.
    """
    def draw(generator, n, k):
        values = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
        shape = {'tensor': (), 'channel': (n, 1), 'block': (-(-n // 128), -(-k // 128))}[strategy]
        scales = draw_scales(generator, shape, k, 1)
        scales = scales.bfloat16() if method == 'compressed-tensors' else scales
        wide = scales.double()
        if strategy == 'block':
            wide = wide.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        end = 'weight_scale_inv' if (method, strategy) == ('fp8', 'block') else 'weight_scale'
        end, other = names or (end, 'input_scale')
        stored = {'weight': values, other: torch.ones(())}
        return {**stored, end: scales}, values.double() * wide

    if method == 'modelopt':
        return {'quant_method': 'modelopt', 'quant_algo': 'FP8', 'ignore': ['lm_head']}, draw
    if method == 'fp8':
        return {'quant_method': 'fp8', 'activation_scheme': 'dynamic', **(
            {'weight_block_size': [128, 128], 'fmt': 'e4m3'} if strategy == 'block' else {})}, draw
    return compressed('float-quantized', {'num_bits': 8, 'type': 'float'}, num_bits=8,
                      type='float', strategy=strategy, **(
                          {'block_structure': [128, 128]} if strategy == 'block' else {})), draw


def gptq8(group_size: int, symmetric: bool = True,
          act_order: bool = False) -> tuple[dict[str, Any], Draw]:
    """Return the config and the draw function of 8-bit GPTQ; it stores zero points minus one."""
    def draw(generator, n, k):
        groups = 1 if group_size == -1 else k // group_size
        q = torch.randint(0, 256, (k, n), generator=generator)
        zeros = torch.full((groups, n), 128)
        if not symmetric:
            zeros = torch.randint(1, 256, (groups, n), generator=generator)
        scales = draw_scales(generator, (groups, n), k, 74).half()
        g_idx = torch.arange(k) // (k // groups)
        if act_order:
            g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        shifts = torch.arange(0, 32, 8)
        return {'qweight': as_int32((q.unflatten(0, (-1, 4)) << shifts[:, None]).sum(1)),
                'qzeros': as_int32(((zeros - 1).unflatten(1, (-1, 4)) << shifts).sum(2)),
                'scales': scales, 'g_idx': g_idx.int()}, (
                    (q - zeros[g_idx]) * scales.double()[g_idx]).t()

    return {'quant_method': 'gptq', 'bits': 8, 'group_size': group_size, 'sym': symmetric,
            'desc_act': act_order, 'checkpoint_format': 'gptq'}, draw


# The value of each 4-bit code.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
FP4 = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]).double()
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0]).double()
TABLES = {'nf4': NF4, 'fp4': torch.cat((FP4, -FP4))}


def bitsandbytes(kind: str, block: int = 64, double: bool = False,
                 storage: torch.dtype = torch.uint8) -> tuple[dict[str, Any], Draw]:
    """
    Return the config and the draw function of bitsandbytes.

    :param kind: nf4, fp4 or int8.
    :param block: 4-bit weights per scale.
    :param double: whether the scales are quantised too.
    :param storage: the dtype of the stored codes.
    """
    def draw_int8(generator, n, k):
        q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        scales = draw_scales(generator, (n,), k, 74 / 127)
        return ({'weight': q, 'SCB': scales, 'weight_format': torch.zeros((), dtype=torch.uint8)},
                q.double() * scales.double()[:, None] / 127)

    def draw_4bit(generator, n, k):
        codes = torch.randint(0, 16, (n * k,), generator=generator, dtype=torch.uint8)
        blocks = -(-n * k // block)
        scales = draw_scales(generator, (blocks,), k, 0.5)
        state = {'quant_type': kind, 'blocksize': block, 'dtype': 'bfloat16', 'shape': [n, k]}
        stored = {'weight.absmax': scales}
        wide = scales.double()
        if double:
            indices = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
            table = torch.linspace(-1, 1, 256)
            nested = draw_scales(generator, (-(-blocks // 256),), k, 2)
            state.update(nested_blocksize=256, nested_dtype='float32',
                         nested_offset=scales.mean().item())
            wide = (table.double()[indices.long()]
                    * nested.double()[torch.arange(blocks) // 256] + state['nested_offset'])
            stored = {'weight.absmax': indices, 'weight.nested_absmax': nested,
                      'weight.nested_quant_map': table}
        packed = codes[::2] << 4 | codes[1::2]
        exact = TABLES[kind][codes.long()] * wide[torch.arange(n * k) // block]
        return {'weight': packed.view(storage)[:, None], 'weight.quant_map': TABLES[kind].float(),
                f'weight.quant_state.bitsandbytes__{kind}': torch.tensor(
                    list(json.dumps(state).encode()), dtype=torch.uint8),
                **stored}, exact.view(n, k)

    config = {'quant_method': 'bitsandbytes', 'load_in_8bit': kind == 'int8',
              'load_in_4bit': kind != 'int8', 'llm_int8_skip_modules': ['lm_head']}
    if kind == 'int8':
        return config, draw_int8
    return {**config, 'bnb_4bit_quant_type': kind, 'bnb_4bit_use_double_quant': double}, draw_4bit


def float4(layout: str) -> tuple[dict[str, Any], Draw]:
    """
    Return the config and the draw function of 4-bit floats.

    :param layout: nvfp4 or mxfp4 (compressed-tensors), or modelopt (NVFP4).
    """
    size = 32 if layout == 'mxfp4' else 16

    def draw(generator, n, k):
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        stored = {'weight' if layout == 'modelopt' else 'weight_packed':
                  codes[:, ::2] | codes[:, 1::2] << 4}
        shape = n, -(-k // size)
        if layout == 'mxfp4':
            # Products have about the magnitude of their input.
            middle = 126 - round(math.log2(k) / 2)
            scales = torch.randint(middle - 2, middle + 1, shape, generator=generator,
                                   dtype=torch.uint8)
            wide = 2.0 ** (scales.double() - 127)
        else:
            scales = (torch.rand(shape, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
            common = (torch.rand((), generator=generator) + 0.5) * 1.5 / 3 / 200 / k**0.5
            if layout == 'modelopt':
                stored.update(weight_scale_2=common, input_scale=torch.ones(()))
            else:
                common = (1 / common).reshape(1)
                stored.update(weight_global_scale=common, input_global_scale=torch.ones(1))
            wide = scales.double() * (common.double() if layout == 'modelopt' else
                                      1 / common.double())
        stored['weight_scale'] = scales
        return stored, E2M1[codes.long()] * wide.repeat_interleave(size, 1)[:, :k]

    if layout == 'modelopt':
        return {'quant_method': 'modelopt', 'quant_algo': 'NVFP4', 'ignore': ['lm_head']}, draw
    return compressed(f'{layout}-pack-quantized', num_bits=4, type='float', symmetric=True,
                      strategy='group' if layout == 'mxfp4' else 'tensor_group',
                      group_size=size), draw


def compressed(layout: str, activations: dict[str, Any] | None = None,
               **weights: Any) -> dict[str, Any]:
    """Return a config of compressed-tensors, with one group for all modules but the head."""
    group = {'targets': ['Linear'], 'weights': weights, 'input_activations': activations,
             'output_activations': None}
    return {'quant_method': 'compressed-tensors', 'format': layout, 'ignore': ['lm_head'],
            'config_groups': {'group_0': group}, 'kv_cache_scheme': None,
            'quantization_status': 'compressed'}


def save(folder: Path, family: str, form: tuple[dict[str, Any], Draw], seed: int = 1,
         dense: tuple[str, ...] = ('lm_head',), other: Mapping[str, Draw] | None = None,
         **overrides: Any) -> dict[str, Tensor]:
    """
    Write a small random model whose projections are quantised.

    :param dense: parts of the names of projections that stay unquantised.
    :param other: draw functions of other projections, by a part of their names.
    :returns: the dequantised float32 state dict, for the library's own model.
    """
    random_model.save(folder, family, seed, **overrides)
    generator = torch.Generator().manual_seed(seed)
    stored, state = {}, {}
    for name, weight in load_file(folder / 'model.safetensors').items():
        if weight.dim() < 2 or any(part in name for part in ('embed', *dense)):
            stored[name] = state[name] = weight
            continue
        draw = next((each for part, each in (other or {}).items() if part in name), form[1])
        tensors, exact = draw(generator, *weight.shape)
        stored.update({f'{name.removesuffix("weight")}{end}': tensor
                       for end, tensor in tensors.items()})
        state[name] = exact.float()
    save_file(stored, folder / 'model.safetensors', metadata={'format': 'pt'})
    settings = dict(form[0])
    if 'ignore' in settings:
        settings['ignore'] = [f're:.*{part}' for part in dense]
    with editing(folder / 'config.json') as config:
        config['quantization_config'] = settings
    return state


def draw_scales(generator, shape, k, deviation):
    """Draw scales for values of this deviation; products keep the magnitude of their input."""
    return (torch.rand(shape, generator=generator) + 0.5) * 1.5 / deviation / k**0.5


def as_int32(values: Tensor) -> Tensor:
    """Reinterpret unsigned 32-bit numbers as int32."""
    return torch.where(values >= 2**31, values - 2**32, values).int()
