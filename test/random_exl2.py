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
Random EXL2 tensors as ExLlamaV2 writes them, with their dequantised weights.

Groups have 64 inputs. The first has 8 bits per weight and the others 4, so no weight spans two
words. A scale is the square of a number from 1 to 16, times the group's largest; zero points are
in the middle.
"""

from pathlib import Path

from json_file import editing
from random_formats import as_int32
import random_model
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

GROUP = 64
DEVIATIONS = {8: 73.9, 4: 4.61}     # standard deviations of uniform values, by bits


def tensors(seed: int, n: int, k: int, order: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """
    Draw one projection with ``k`` inputs and ``n`` outputs, multiples of 64 and 8.

    :param order: int64 [k], the input of each stored row.
    :returns: the stored tensors by the end of their names, and the dense float32 weight [n, k].
    """
    generator = torch.Generator().manual_seed(seed)
    bits = [8] + [4] * (k // GROUP - 1)
    roots = torch.randint(1, 17, (len(bits), n), generator=generator)
    # 123.5 is the root mean square of the squares of 1 to 16.
    largest = torch.tensor([256 * 1.5 / 123.5 / DEVIATIONS[each] / k**0.5 for each in bits]).half()
    scales = (roots * roots).half() * (largest / 256).unsqueeze(1)
    packed, rows, groups, first = [], [], [], 0
    for each, scale in zip(bits, scales):
        values = torch.randint(0, 2**each, (GROUP, n), generator=generator)
        packed.append(_pack(values.t().reshape(n, -1, 32 // each), each).t())
        rows.append((values - 2**(each - 1)).float() * scale.float())
        groups += [each, first]
        first += len(packed[-1])
    dense = torch.empty(n, k)
    dense[:, order] = torch.cat(rows).t()
    return {
        'q_weight': torch.cat(packed).contiguous(),
        'q_scale': _pack((roots - 1).reshape(len(bits), -1, 8), 4),
        'q_scale_max': largest, 'q_groups': torch.tensor(groups, dtype=torch.int16),
        'q_invperm': order.argsort().int()}, dense


def save(folder: Path, family: str, seed: int, **overrides) -> dict[str, Tensor]:
    """
    Write a small random model with EXL2 projections and a dense head.

    :returns: the dequantised state dict, for the library's own model.
    """
    random_model.save(folder, family, seed, **overrides)
    path = folder / 'model.safetensors'
    stored, state = {}, {}
    for number, (name, weight) in enumerate(load_file(path).items()):
        stored[name] = state[name] = weight
        if '_proj.weight' in name:
            del stored[name]
            n, k = weight.shape
            # Projections of the same input have the same order, as in the library.
            order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
            parts, state[name] = tensors(1000 * seed + number, n, k, order)
            stored.update({f'{name[:-len("weight")]}{end}': part for end, part in parts.items()})
    save_file(stored, path, metadata={'format': 'pt'})
    with editing(folder / 'config.json') as config:
        config['quantization_config'] = {
            'quant_method': 'exl2', 'version': '0.3.2', 'bits': 4.5, 'head_bits': 16}
    return state


def _pack(values, bits):
    """Pack the last dimension of small numbers into an int32, from the lowest bits up."""
    return as_int32((values << torch.arange(0, 32, bits)).sum(-1))
