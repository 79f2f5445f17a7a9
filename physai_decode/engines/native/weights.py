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
A checkpoint's tensors, placed on the device in the form that the step reads.

Query, key and value are fused, gate and up are fused, quantised weights are repacked. Knows no
format of these, and nothing of positions or caches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace

from physai_decode.engine import EngineError
from physai_decode.engines.native import formats
from physai_decode.engines.native import fusion
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.source import Source
from physai_decode.model_config import Quantization
import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One transformer layer; norms' gains are [hidden] and [head_dim], in the engine's dtype."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """All of a model's weights; ``embedding`` is [vocab, hidden]."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Linear
    dense_fallbacks: int      # fused projections kept dense: see `fusion`
    unused: tuple[str, ...] = ()    # names of tensors that the network does not have

    @property
    def read_bytes(self) -> int:
        """Bytes that one decode step reads: all, but of an embedding that is no head one row."""
        tied = isinstance(self.head, Dense) and self.head.weight is self.embedding
        row = 0 if tied else self.embedding.shape[1] * self.embedding.element_size()
        norms = [self.norm]
        linears = [self.head]
        for layer in self.layers:
            norms += [layer.input_norm, layer.mlp_norm]
            norms += [gain for gain in (layer.q_norm, layer.k_norm) if gain is not None]
            linears += [layer.qkv, layer.out, layer.gate_up, layer.down]
        return (row + sum(gain.numel() * gain.element_size() for gain in norms)
                + sum(linear.read_bytes for linear in linears))


def load(architecture: Architecture, source: Source, quantized: Quantization | None,
         dtype: torch.dtype, progress: Callable[[str], None]) -> Weights:
    """
    Read and fuse all weights.

    :param quantized: as the checkpoint says it.
    :raises EngineError: a tensor is missing, has another shape, or a format that is not run.
    """
    return _Loader(architecture, source, quantized, dtype, progress).load()


class _Loader:

    def __init__(self, architecture, source, quantized, dtype, progress):
        self._a = architecture
        self._source = source
        self._format = formats.parse(quantized) if quantized else None
        self._dtype = dtype
        self._progress = progress
        self._fallbacks = 0

    def load(self):
        a = self._a
        embedding = self._float('model.embed_tokens.weight', (a.vocab_size, a.hidden_size))
        self._device = embedding.device
        layers = []
        for index in range(a.layers):
            self._progress(f'weights of layer {index + 1} of {a.layers}')
            layers.append(self._layer(f'model.layers.{index}'))
        if a.tied_head:
            embedding = _laid_out(embedding)
        head: Linear = Dense(embedding)
        if not a.tied_head:
            head = self._fused('', [('lm_head', a.vocab_size)], a.hidden_size, False)
        norm = self._float('model.norm.weight', (a.hidden_size,))
        return Weights(embedding, tuple(layers), norm, head, self._fallbacks)

    def _layer(self, prefix):
        a = self._a
        attention, mlp = f'{prefix}.self_attn.', f'{prefix}.mlp.'
        qk_norm = [self._float(f'{attention}{name}.weight', (a.head_dim,)) if a.qk_norm else None
                   for name in ('q_norm', 'k_norm')]
        return Layer(
            input_norm=self._float(f'{prefix}.input_layernorm.weight', (a.hidden_size,)),
            qkv=self._fused(attention, [('q_proj', a.q_size), ('k_proj', a.kv_size),
                                        ('v_proj', a.kv_size)], a.hidden_size, a.qkv_bias),
            q_norm=qk_norm[0],
            k_norm=qk_norm[1],
            out=self._fused(attention, [('o_proj', a.hidden_size)], a.q_size, a.out_bias),
            mlp_norm=self._float(
                f'{prefix}.post_attention_layernorm.weight', (a.hidden_size,)),
            gate_up=self._fused(mlp, [('gate_proj', a.intermediate_size),
                                      ('up_proj', a.intermediate_size)],
                                a.hidden_size, a.mlp_bias),
            down=self._fused(mlp, [('down_proj', a.hidden_size)], a.intermediate_size,
                             a.mlp_bias))

    def _fused(self, prefix, parts, columns, bias):
        """Stack the named projections, each (name, rows), of one input."""
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
            _laid_out(torch.cat([fusion.densified(each, self._dtype) for each in linears])),
            torch.cat(biases) if biases else None)

    def _dense(self, prefix, parts, columns, bias):
        if len(parts) == 1:
            weight = self._float(f'{prefix}{parts[0][0]}.weight', (parts[0][1], columns))
        else:
            weight = None
            start = 0
            for name, rows in parts:
                piece = self._float(f'{prefix}{name}.weight', (rows, columns))
                if weight is None:
                    total = sum(rows for _, rows in parts)
                    weight = piece.new_empty(total, columns)
                weight[start:start + rows] = piece
                start += rows
        biases = [self._float(f'{prefix}{name}.bias', (rows,)) for name, rows in parts] \
            if bias else []
        return Dense(_laid_out(weight), torch.cat(biases) if biases else None)

    def _module(self, module, rows, columns, bias):
        """Read one projection, quantised or not."""
        # Some writers of quantised weights add a bias that is all zero.
        form = self._format if self._is_quantised(module) else None
        bias = bias or form is not None and self._source.entry(f'{module}.bias') is not None
        numbers = self._float(f'{module}.bias', (rows,)) if bias else None
        if form is None:
            return Dense(self._float(f'{module}.weight', (rows, columns)), numbers)
        try:
            return replace(form.read(self._source, module, rows, columns), bias=numbers)
        except EngineError as error:
            text = str(error)
            raise EngineError(text if module in text else f'{module}: {text}') from None

    def _is_quantised(self, module):
        if self._format is not None:
            return self._format.holds(self._source, module)
        if self._source.entry(f'{module}.qweight') is not None:
            raise EngineError(
                f'{module} is quantised, but config.json has no quantization_config: put the '
                'content of quantize_config.json there, with its "quant_method" (gptq or awq), or '
                'download a newer version of the model')
        return False

    def _float(self, name, shape):
        tensor = self._source.get(name, shape)
        if not tensor.is_floating_point():
            raise EngineError(
                f'tensor {name} holds whole numbers ({tensor.dtype}) where config.json implies '
                'others: they are quantised in a way that it does not name; download a newer '
                'version of the model')
        return tensor.to(self._dtype)


def _laid_out(weight: Tensor) -> Tensor:
    """
    Give ``weight`` [N, K] as this device's matrix-vector product reads it fastest.

    On a CPU column by column: the library's product with a vector takes half the time then.
    """
    return weight.t().contiguous().t() if weight.device.type == 'cpu' else weight
