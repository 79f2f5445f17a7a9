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
Loads a checkpoint's tensors onto the device, in the layouts that the step reads.

Query, key and value are fused, gate and up are fused, and quantised weights are repacked.
"""

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import TYPE_CHECKING

from physai_decode.engine import EngineError
from physai_decode.engines import stored
from physai_decode.engines.native import formats
from physai_decode.engines.native import fusion
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.architecture import Routing
from physai_decode.engines.native.experts import Experts
from physai_decode.engines.native.families.refusal import unsupported
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import LOADED_COLUMNS
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.linear import Stored
from physai_decode.engines.native.mlp import Mlp
from physai_decode.engines.native.source import Source
from physai_decode.model_config import Quantization
import torch
from torch import Tensor

if TYPE_CHECKING:
    from physai_decode.engines.native.torch_forms import TorchForms

_WEIGHTS = ('weight', 'qweight', 'weight_packed')     # of a projection, by format


@dataclass(frozen=True)
class Layer:
    """
    One transformer layer; norms' gains are [hidden] and [head_dim].

    Gains are in the engine's dtype, or in float32 if they differ from the stored ones.
    """

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    out_norm: Tensor | None
    mlp_norm: Tensor
    mlp: Mlp | Experts
    down_norm: Tensor | None

    @property
    def linears(self) -> tuple[Linear | Stack, ...]:
        """All projections."""
        return self.qkv, self.out, *(weight for _, weight, *_ in self.mlp.products())

    @property
    def norms(self) -> tuple[Tensor, ...]:
        """The gains of all norms."""
        gains = (self.input_norm, self.q_norm, self.k_norm, self.out_norm, self.mlp_norm,
                 self.down_norm)
        return tuple(gain for gain in gains if gain is not None)


@dataclass(frozen=True)
class Weights:
    """All of a model's weights; ``embedding`` is [vocab, hidden]."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Linear
    dense_fallbacks: int      # fused projections that were dequantised, see `fusion`
    unused: tuple[str, ...] = ()    # names of tensors that the network does not use

    @property
    def read_bytes(self) -> int:
        """Bytes that one decode step reads; of an untied embedding, that is one row."""
        tied = isinstance(self.head, Dense) and self.head.weight is self.embedding
        row = 0 if tied else self.embedding.shape[1] * self.embedding.element_size()
        norms = [self.norm]
        linears: list[Linear | Stack] = [self.head]
        for layer in self.layers:
            norms += layer.norms
            linears += layer.linears
        return (row + sum(gain.numel() * gain.element_size() for gain in norms)
                + sum(linear.read_bytes for linear in linears))

    @property
    def slow_format(self) -> bool:
        """Whether most of the layers' bytes are in formats with slower kernels than int4."""
        read_bytes = {True: 0, False: 0}
        for layer in self.layers:
            for linear in layer.linears:
                stored = linear.stacked if isinstance(linear, Stack) else linear
                read_bytes[isinstance(stored, Scaled)] += linear.read_bytes
        return read_bytes[True] > read_bytes[False]

    @property
    def layer_parameters(self) -> int:
        """Number of the layers' weights that multiply one token; of experts, the selected."""
        return sum(math.prod(linear.shape) * (linear.top_k if isinstance(linear, Stack) else 1)
                   for layer in self.layers for linear in layer.linears)


def load(architecture: Architecture, source: Source, quantized: Quantization | None,
         dtype: torch.dtype, progress: Callable[[str], None],
         forms: 'TorchForms | None' = None) -> Weights:
    """
    Load and fuse all weights.

    :param quantized: the checkpoint's quantisation.
    :param forms: converts projections to PyTorch's layouts; None leaves them unchanged.
    :raises EngineError: a tensor is missing or has another shape, or its format is not supported.
    """
    return _Loader(architecture, source, quantized, dtype, progress, forms).load()


def prefixes(architecture: Architecture, entry: Callable[[str], object]) -> tuple[str, str]:
    """
    Return the prefix of the names of a network's tensors, and the name of its head.

    :param entry: returns a tensor's entry, or None; see `Source`.
    """
    trunks = architecture.names.trunks
    return next((each for each in trunks if entry(f'{each[0]}embed_tokens.weight')), trunks[0])


class _Loader:

    def __init__(self, architecture: Architecture, source: Source, quantized: Quantization | None,
                 dtype: torch.dtype, progress: Callable[[str], None],
                 forms: 'TorchForms | None') -> None:
        self._a = architecture
        self._source = source
        self._format = formats.parse(quantized) if quantized else None
        self._dtype = dtype
        self._progress = progress
        self._forms = forms
        self._fallbacks = 0

    def load(self) -> Weights:
        a = self._a
        trunk, head_name = prefixes(a, self._source.entry)
        embedding = self._float(f'{trunk}embed_tokens.weight', (a.vocab_size, a.hidden_size))
        self._device = embedding.device
        tied = a.tied_head
        if tied is None:
            tied = not any(self._source.entry(f'{head_name}.{end}') for end in _WEIGHTS)
        layers = []
        for index in range(a.layers):
            self._progress(f'weights of layer {index + 1} of {a.layers}')
            layer = self._layer(f'{trunk}layers.{index}', index)
            layers.append(self._forms.layer(layer) if self._forms else layer)
        head: Linear = Dense(embedding)
        if not tied:
            head = self._fused('', [(head_name, a.vocab_size)], a.hidden_size, False)
        if self._forms:
            head = self._forms(head, tied=tied)
            if tied and isinstance(head, Dense):
                embedding = head.weight     # shared, whatever its memory layout
        norm = self._gain(f'{trunk}norm', a.hidden_size)
        if a.logit_scale != 1.0:
            norm = norm.float() * a.logit_scale
        return Weights(embedding, tuple(layers), norm, head, self._fallbacks)

    def _layer(self, prefix: str, index: int) -> Layer:
        a = self._a
        attention, mlp = f'{prefix}.self_attn.', f'{prefix}.mlp.'
        q_norm, k_norm = ('q_norm', 'k_norm') if a.qk_norm else ('', '')

        def norm(name, size=a.hidden_size, prefix=f'{prefix}.'):
            return self._gain(prefix + name, size) if name else None

        return Layer(
            input_norm=norm('input_layernorm'),
            qkv=self._qkv(attention),
            q_norm=norm(q_norm, a.head_dim, attention),
            k_norm=norm(k_norm, a.head_dim, attention),
            out=self._fused(attention, [('o_proj', a.hidden_size)], a.q_size, a.out_bias),
            out_norm=norm(a.names.out_norm),
            mlp_norm=norm(a.names.mlp_norm),
            mlp=self._experts(mlp, a.routing) if a.routing and index in a.routing.layers
            else Mlp(self._gate_up(mlp, a.intermediate_size),
                     self._fused(mlp, [('down_proj', a.hidden_size)], a.intermediate_size,
                                 a.mlp_bias), a.activation),
            down_norm=norm(a.names.down_norm))

    def _experts(self, prefix: str, routing: Routing) -> Experts:
        a, count, size = self._a, routing.count, routing.size
        router = self._fused(prefix, [('gate', count)], a.hidden_size, False)
        prefix += 'experts.'
        if self._source.entry(f'{prefix}gate_up_proj') is not None:
            def stored(name: str, *shape: int) -> Stack:
                whole = self._float(prefix + name, (count, *shape))
                return Stack(Dense(whole), count, routing.top_k)

            gate_up = stored('gate_up_proj', 2 * size, a.hidden_size)
            down = stored('down_proj', a.hidden_size, size)
        else:
            experts = [f'{prefix}{number}.' for number in range(count)]
            gate_up = self._stack(prefix, routing, (self._gate_up(each, size) for each in experts))
            down = self._stack(prefix, routing, (self._fused(
                each, [('down_proj', a.hidden_size)], size, False) for each in experts))
        return Experts(router, gate_up, down, routing.normalised, a.activation)

    def _stack(self, prefix: str, routing: Routing, parts: Iterable[Stored]) -> Stack:
        try:
            stack = Stack.from_parts(parts, routing.count, routing.top_k)
        except ValueError as error:
            raise unsupported(f'{prefix[:-1]} as stored: {error}') from None
        one = stack[0]
        if isinstance(one, Scaled):
            size = one.group_size if one.scales.shape[1] > 1 else LOADED_COLUMNS
            if one.in_features % size:
                raise unsupported(f'{prefix[:-1]} as stored: {one.in_features} columns, not a '
                                  f'multiple of {size}')
        bias = stack.stacked.bias
        if bias is not None and bias.any():
            raise unsupported(f'{prefix[:-1]} with biases')
        return replace(stack, stacked=replace(stack.stacked, bias=None))

    def _qkv(self, prefix: str) -> Stored:
        a = self._a
        parts = list(zip(a.names.qkv, (a.q_size, a.kv_size, a.kv_size)))
        if len(parts) == 1:
            parts = [(a.names.qkv[0], a.q_size + 2 * a.kv_size)]
        fused = self._fused(prefix, parts, a.hidden_size, a.qkv_bias)
        if a.rotary_dim == a.head_dim:
            return fused
        # Kernels rotate the first half of a head with the second. So each half gets half of the
        # rotated dimensions, and half of the others.
        half, still = a.rotary_dim // 2, (a.head_dim - a.rotary_dim) // 2
        first, second, rest, more = torch.arange(a.head_dim, device=self._device).split(
            (half, half, still, still))
        head = torch.cat((first, rest, second, more))
        heads = torch.arange(0, a.q_size + a.kv_size, a.head_dim, device=self._device)
        index = torch.cat(((heads.unsqueeze(1) + head).flatten(), torch.arange(
            a.q_size + a.kv_size, a.q_size + 2 * a.kv_size, device=self._device)))
        return fused.rows(index)

    def _gate_up(self, prefix: str, size: int) -> Stored:
        a = self._a
        if len(a.names.gate_up) == 2:
            return self._fused(prefix, [(name, size) for name in a.names.gate_up],
                               a.hidden_size, a.mlp_bias)
        fused = self._fused(prefix, [(a.names.gate_up[0], 2 * size)], a.hidden_size, a.mlp_bias)
        if isinstance(fused, Dense):
            return fused
        index = fusion.interleaved(size, self._device)
        if index is not None:
            return fused.rows(index)
        self._fallbacks += 1
        return Dense(fusion.dense_weight(fused, self._dtype), fused.bias)

    def _gain(self, module: str, size: int) -> Tensor:
        """Read a norm's gains; with an offset, they stay in float32 to avoid rounding."""
        stored = self._float(f'{module}.weight', (size,))
        return stored.float() + self._a.gain_offset if self._a.gain_offset else stored

    def _fused(self, prefix: str, parts: list[tuple[str, int]], columns: int,
               bias: bool) -> Stored:
        """Read and fuse projections, each (name, rows), of the same input."""
        if not any(self._is_quantised(prefix + name) for name, _ in parts):
            return self._dense(prefix, parts, columns, bias)
        linears = [self._module(prefix + name, rows, columns, bias) for name, rows in parts]
        if any(each.bias is not None for each in linears):
            linears = [each if each.bias is not None else replace(each, bias=torch.zeros(
                each.shape[0], dtype=self._dtype, device=self._device)) for each in linears]
        fused = fusion.fuse(linears, paired=parts[0][0] == 'gate_proj')
        if fused is not None:
            return fused
        self._fallbacks += 1
        biases = [each.bias for each in linears if each.bias is not None]
        return Dense(
            torch.cat([fusion.dense_weight(each, self._dtype) for each in linears]),
            torch.cat(biases) if biases else None)

    def _dense(self, prefix: str, parts: list[tuple[str, int]], columns: int,
               bias: bool) -> Dense:
        if len(parts) == 1:
            weight = self._float(f'{prefix}{parts[0][0]}.weight', (parts[0][1], columns))
        else:
            weight = torch.empty(sum(rows for _, rows in parts), columns, dtype=self._dtype,
                                 device=self._device)
            start = 0
            for name, rows in parts:
                weight[start:start + rows] = self._float(f'{prefix}{name}.weight', (rows, columns))
                start += rows
        biases = [self._float(f'{prefix}{name}.bias', (rows,)) for name, rows in parts] \
            if bias else []
        return Dense(weight, torch.cat(biases) if biases else None)

    def _module(self, module: str, rows: int, columns: int, bias: bool) -> Stored:
        """Read one projection, quantised or not."""
        # Some writers of quantised checkpoints add an all-zero bias.
        format_ = self._format if self._is_quantised(module) else None
        bias = bias or format_ is not None and self._source.entry(f'{module}.bias') is not None
        numbers = self._float(f'{module}.bias', (rows,)) if bias else None
        if format_ is None:
            return Dense(self._float(f'{module}.weight', (rows, columns)), numbers)
        try:
            return replace(format_.read(self._source, module, rows, columns), bias=numbers)
        except EngineError as error:
            text = str(error)
            raise EngineError(text if module in text else f'{module}: {text}') from None

    def _is_quantised(self, module: str) -> bool:
        if self._format is not None:
            return self._format.holds(self._source, module)
        if self._source.entry(f'{module}.qweight') is not None:
            raise EngineError(
                f'{module} is quantised, but config.json has no quantization_config: put the '
                'content of quantize_config.json there, with its "quant_method" (gptq or awq), or '
                'download a newer version of the model')
        return False

    def _float(self, name: str, shape: tuple[int, ...]) -> Tensor:
        entry = self._source.entry(name)
        if entry is not None:           # before its shape, which depends on how it is stored
            stored.check_float(name, entry)
        return self._source.get(name, shape).to(self._dtype)
