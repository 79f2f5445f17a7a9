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

"""Random GPTQ tensors as quantisers write them, with their dequantised weights."""

from collections.abc import Mapping
from pathlib import Path

from json_file import editing
from physai_decode.engines.native.linear import Int4
import random_formats
import random_model
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

SHIFTS = torch.arange(0, 32, 4)


def tensors(seed: int, n: int, k: int, group_size: int, act_order: bool = False,
            symmetric: bool = True, layout: str = 'gptq') -> tuple[dict[str, Tensor], Tensor]:
    """
    Draw one projection with ``k`` inputs and ``n`` outputs.

    :param group_size: inputs that share a scale; -1 for all.
    :param layout: ``gptq`` stores zero points minus one, ``gptq_v2`` unchanged.
    :returns: the stored tensors by the end of their names, and the dense float32 weight [n, k].
    """
    generator = torch.Generator().manual_seed(seed)
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    q = torch.randint(0, 16, (k, n), generator=generator)
    zeros = torch.full((groups, n), 8) if symmetric else torch.randint(
        0, 16, (groups, n), generator=generator)
    # 4.61 is the standard deviation of uniform 4-bit values.
    scales = random_formats.draw_scales(generator, (groups, n), k, 4.61).half()
    g_idx = torch.arange(k) // size
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    stored = (zeros - int(layout == 'gptq')) & 15
    dense = ((q - zeros[g_idx]).float() * scales.float()[g_idx]).t().contiguous()
    return {
        'qweight': random_formats.as_int32((q.view(k // 8, 8, n) << SHIFTS.view(1, 8, 1)).sum(1)),
        'qzeros': random_formats.as_int32((stored.view(groups, n // 8, 8) << SHIFTS).sum(2)),
        'scales': scales, 'g_idx': g_idx.int()}, dense


def read(stored: Mapping[str, Tensor], n: int, k: int, group_size: int,
         device: torch.device | None = None) -> Int4:
    """Return the engine's weight for stored tensors [n, k]."""
    return random_formats.read({
        'quant_method': 'gptq', 'bits': 4, 'group_size': group_size}, stored, n, k, device)


def dense(stored: dict[str, Tensor], layout: str) -> Tensor:
    """Dequantise stored tensors to float32 [n, k]."""
    qweight, qzeros, scales, g_idx = (
        stored[part] for part in ('qweight', 'qzeros', 'scales', 'g_idx'))
    columns = torch.arange(len(g_idx)).unsqueeze(1)
    q = (qweight[columns // 8].squeeze(1) >> 4 * (columns % 8)) & 15
    zeros = ((qzeros.unsqueeze(2) >> SHIFTS) + int(layout == 'gptq')) & 15
    return (scales.float()[g_idx] * (q - zeros.flatten(1)[g_idx])).t().contiguous()


def save(folder: Path, family: str, seed: int, group_size: int, act_order: bool = False,
         symmetric: bool = True, layout: str = 'gptq', one_order: bool = True, head: bool = False,
         **overrides) -> dict[str, Tensor]:
    """
    Write a small random model with GPTQ projections.

    :param one_order: projections of the same input have the same order, as quantisers write them.
    :param head: quantise the head too.
    :returns: the dequantised state dict, for the library's own model.
    """
    random_model.save(folder, family, seed, **overrides)
    plain = load_file(folder / 'model.safetensors')
    stored, state = {}, {}
    for number, (name, weight) in enumerate(plain.items()):
        state[name] = weight
        if weight.dim() < 2 or 'embed' in name or ('lm_head' in name and not head):
            stored[name] = weight
            continue
        parts, state[name] = tensors(
            1000 * seed + number, *weight.shape, group_size, act_order, symmetric, layout)
        if act_order and one_order:
            same, _ = tensors(seed, 8, weight.shape[1], group_size, True)
            parts['g_idx'] = same['g_idx']
            state[name] = dense(parts, layout)
        stored.update({f'{name[:-len("weight")]}{end}': part for end, part in parts.items()})
    save_file(stored, folder / 'model.safetensors', metadata={'format': 'pt'})
    with editing(folder / 'config.json') as config:
        config['quantization_config'] = {
            'quant_method': 'gptq', 'bits': 4, 'group_size': group_size, 'desc_act': act_order,
            'sym': symmetric, 'checkpoint_format': layout, 'lm_head': head}
    return state
