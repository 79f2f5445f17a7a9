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

"""The source of a network's tensors: a checkpoint's files, or a random generator."""

from collections.abc import Mapping
from typing import Any
from typing import Protocol

from physai_decode.checkpoint import Checkpoint
from physai_decode.checkpoint import TensorEntry
from physai_decode.engine import EngineError
from physai_decode.engines import leftover
from physai_decode.engines import stored
import torch
from torch import Tensor

# Standard deviation of random values by stored dtype: I32 has uniform nibbles, U8 E2M1 floats.
_DEVIATION = {'I32': 4.61, 'U8': 2.93, 'I8': 73.6, 'F8_E4M3': 1.0}


class Source(Protocol):
    """A source of tensors, by their names in the checkpoint."""

    def entry(self, name: str) -> TensorEntry | None:
        """Return the dtype and shape of a tensor; None if there is none of this name."""
        ...

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor on the device, in the stored dtype."""
        ...


class Files:
    """Tensors from a checkpoint's safetensors files."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._entries = checkpoint.tensors
        self._device = device
        self.used: set[str] = set()

    def entry(self, name: str) -> TensorEntry | None:
        """Return the dtype and shape of a tensor; None if there is none of this name."""
        return self._entries.get(name)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """
        Return a tensor on the device.

        :raises EngineError: it is missing, its shape differs from what config.json implies, or its
            file can't be read.
        """
        self.used.add(name)
        return stored.read(_checked(self._checkpoint, self._entries, name, shape)).to(self._device)


class Random:
    """Random tensors of the same names and shapes, to time a model without its weights."""

    def __init__(self, checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: torch.dtype,
                 device: torch.device) -> None:
        self._checkpoint = checkpoint
        # Without g_idx, groups are contiguous.
        self._entries = {name: entry for name, entry in checkpoint.tensors.items()
                         if not name.endswith('g_idx')}
        self._generator = torch.Generator(device).manual_seed(settings.get('seed', 0))
        self._zero = 0x77777777 if settings.get('quantization') == 'gptq' else 0x88888888 - 2**32
        self._dtype = dtype
        self._device = device

    def entry(self, name: str) -> TensorEntry | None:
        """Return the dtype and shape of a tensor; None if none is described."""
        return self._entries.get(name)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """
        Return a tensor: gains are 1, other weights normal with standard deviation 0.02.

        :raises EngineError: it is not described, or its shape differs from what config.json
            implies.
        """
        entry = _checked(self._checkpoint, self._entries, name, shape)
        kind = name.rsplit('.', 1)[-1]
        if kind == 'qzeros':
            return torch.full(shape, self._zero, dtype=torch.int32, device=self._device)
        if entry.dtype == 'I32':
            words = self._integers(-2**31, 2**31, shape, torch.int32)
            # A nibble of 0 becomes 8, the zero point, so that the mean is 0.
            empty = ~(words | words >> 1 | words >> 2 | words >> 3) & 0x11111111
            return words | empty << 3
        if entry.dtype == 'I8':
            return self._integers(-127, 128, shape, torch.int8)
        if entry.dtype == 'U8':
            return self._integers(0, 256, shape, torch.uint8)
        if kind == 'weight_global_scale':       # for E2M1 floats with scales about 1
            return torch.full(shape, _DEVIATION['U8'] / 0.02, device=self._device)
        if kind == 'weight_scale' and entry.dtype == 'F8_E4M3':
            noise = torch.rand(shape, device=self._device, generator=self._generator)
            return (0.9 + 0.2 * noise).to(torch.float8_e4m3fn)
        if entry.dtype == 'F8_E4M3':
            return torch.empty(shape, dtype=torch.float16, device=self._device).normal_(
                generator=self._generator).to(torch.float8_e4m3fn)
        if kind == 'weight_shape':
            rows, row_words = self._entries[f'{name.removesuffix("shape")}packed'].shape
            return torch.tensor([rows, 8 * row_words])
        if kind in ('scales', 'weight_scale', 'weight_scale_inv'):
            noise = torch.rand(shape, device=self._device, generator=self._generator)
            weight = self._entries.get(f'{name.removesuffix(kind)}weight')
            return (0.9 + 0.2 * noise) * 0.02 / _DEVIATION[weight.dtype if weight else 'I32']
        if name.endswith('norm.weight'):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        values = torch.empty(shape, dtype=self._dtype, device=self._device)
        return values.normal_(0.0, 0.02, generator=self._generator)

    def _integers(self, least: int, end: int, shape: tuple[int, ...],
                  dtype: torch.dtype) -> Tensor:
        return torch.randint(least, end, shape, dtype=dtype, device=self._device,
                             generator=self._generator)


def _checked(checkpoint: Checkpoint, entries: Mapping[str, TensorEntry], name: str,
             shape: tuple[int, ...]) -> TensorEntry:
    """Return the entry of a tensor, whose shape must be as given."""
    entry = entries.get(name)
    if entry is None:
        leftover.check_layers(checkpoint, name)
        raise EngineError(
            f'{checkpoint.folder} has no tensor {name}, which its config.json implies: copy or '
            'download the model again, with the config.json of these weights')
    if entry.shape != shape:
        raise stored.wrong_shape(checkpoint, name, entry.shape, shape)
    return entry
