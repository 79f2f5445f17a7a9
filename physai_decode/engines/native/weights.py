"""
A checkpoint's tensors, placed on the device in the form that the step reads.

Query, key and value are fused, gate and up are fused, GPTQ is repacked. Tensors come one by one
from safetensors files, or at random for a folder that only describes a shape. Knows nothing of
positions or caches.
"""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import Protocol

from physai_decode.checkpoint import Checkpoint
from physai_decode.engine import EngineError
from physai_decode.engines import stored
from physai_decode.engines.native import gptq
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Int4
from physai_decode.model_config import Quantization
import torch
from torch import Tensor

Linear = Dense | Int4


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
    dense_fallbacks: int      # fused projections kept dense: see `gptq.fuse`
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


class Source(Protocol):
    """Where tensors come from."""

    def has(self, name: str) -> bool:
        """Tell whether there is a tensor of this name."""
        ...

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Give a tensor on the device; integers as they are, floats in the stored dtype."""
        ...


class Files:
    """Tensors from a checkpoint's safetensors files."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self._entries = checkpoint.tensors
        self._device = device
        self.used: set[str] = set()

    def has(self, name: str) -> bool:
        """Tell whether there is a tensor of this name."""
        return name in self._entries

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """
        Give a tensor on the device.

        :raises EngineError: it is not there, has another shape than config.json implies, or its
            file can't be read.
        """
        self.used.add(name)
        return stored.read(_entry(self._entries, name, shape)).to(self._device)


class Random:
    """Random tensors of the same names and shapes: to time a shape without its weights."""

    def __init__(self, checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: torch.dtype,
                 device: torch.device):
        self._entries = checkpoint.tensors
        self._generator = torch.Generator(device).manual_seed(settings.get('seed', 0))
        self._packed = settings.get('quantization') == 'gptq'
        self._dtype = dtype
        self._device = device

    def has(self, name: str) -> bool:
        """Tell whether the described checkpoint would have a tensor of this name."""
        head = name.startswith(('lm_head', 'model.embed'))
        return name.endswith('.qweight') and self._packed and not head

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """
        Give a tensor: gains 1, other floats normal with deviation 0.02.

        :raises EngineError: it is not described, or with another shape than config.json implies.
        """
        _entry(self._entries, name, shape)
        kind = name.rsplit('.', 1)[-1]
        if kind in ('qweight', 'qzeros'):
            if kind == 'qzeros':
                return torch.full(shape, 0x77777777, dtype=torch.int32, device=self._device)
            words = torch.randint(-2**31, 2**31, shape, dtype=torch.int32,
                                  device=self._device, generator=self._generator)
            # A nibble of 0 becomes 8, the zero point: a mean other than 0 would add up.
            empty = ~(words | words >> 1 | words >> 2 | words >> 3) & 0x11111111
            return words | empty << 3
        if kind == 'scales':
            noise = torch.rand(shape, device=self._device, generator=self._generator)
            return ((0.9 + 0.2 * noise) * 0.02 / 4.61).half()   # uniform 4 bits deviate by 4.61
        if name.endswith('norm.weight'):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        values = torch.empty(shape, dtype=self._dtype, device=self._device)
        return values.normal_(0.0, 0.02, generator=self._generator)


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
        self._form = gptq.parse(quantized) if quantized else None
        self._dtype = dtype
        self._progress = progress
        self._fallbacks = 0

    def load(self):
        a = self._a
        embedding = self._float('model.embed_tokens.weight', (a.vocab_size, a.hidden_size))
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
        quantised = [name for name, _ in parts if self._source.has(f'{prefix}{name}.qweight')]
        if not quantised:
            return self._dense(prefix, parts, columns, bias)
        if self._form is None:
            raise EngineError(
                f'{prefix}{quantised[0]} is GPTQ, but config.json has no quantization_config: put '
                'the content of quantize_config.json there, with "quant_method": "gptq", or '
                'download a newer version of the model')
        if len(quantised) < len(parts):
            raise EngineError(
                f'{prefix}{quantised[0]} is GPTQ, and others of '
                f'{", ".join(name for name, _ in parts)} are not: the native engine runs these as '
                'one; set engine.name to transformers')
        packed = [self._int4(self._form, prefix + name, rows, columns, bias)
                  for name, rows in parts]
        if any(p.bias is not None for p in packed):
            packed = [p if p.bias is not None else replace(p, bias=torch.zeros(
                p.out_features, dtype=self._dtype, device=p.packed.device)) for p in packed]
        fused = packed[0] if len(packed) == 1 else gptq.fuse(
            packed, paired=parts[0][0] == 'gate_proj')
        if fused is not None:
            return fused
        self._fallbacks += 1
        dense = []
        for part in packed:
            weight = part.dequantise(slice(None), self._dtype)
            if part.order is not None:
                weight = torch.empty_like(weight).index_copy_(1, part.order.long(), weight)
            dense.append(weight)
        biases = torch.cat([p.bias for p in packed]) if packed[0].bias is not None else None
        return Dense(_laid_out(torch.cat(dense)), biases)

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

    def _int4(self, form, name, rows, columns, bias):
        size = columns if form.group_size == -1 else form.group_size
        groups = -(-columns // size)
        get = self._source.get
        # Some writers leave g_idx out where it is plain, and some write a bias that is all zero.
        order = get(f'{name}.g_idx', (columns,)) if self._source.has(f'{name}.g_idx') else None
        with_bias = bias or self._source.has(f'{name}.bias')
        parts = (get(f'{name}.qweight', (columns // 8, rows)),
                 get(f'{name}.qzeros', (groups, rows // 8)),
                 get(f'{name}.scales', (groups, rows)), order,
                 self._float(f'{name}.bias', (rows,)) if with_bias else None)
        try:
            return gptq.repack(*parts, form)
        except EngineError as error:
            raise EngineError(f'{name}: {error}') from None

    def _float(self, name, shape):
        tensor = self._source.get(name, shape)
        if not tensor.is_floating_point():
            raise EngineError(
                f'tensor {name} holds whole numbers ({tensor.dtype}) where config.json implies '
                'others: they are quantised in a way that it does not name; download a newer '
                'version of the model')
        return tensor.to(self._dtype)


def _entry(entries, name, shape):
    """Find a tensor among those of the folder."""
    entry = entries.get(name)
    if entry is None:
        raise EngineError(f'the checkpoint has no tensor {name}: it is incomplete or of '
                          'another architecture than its config.json says')
    if entry.shape != shape:
        raise EngineError(f'tensor {name} has shape {list(entry.shape)}, config.json implies '
                          f'{list(shape)}: they do not belong together')
    return entry


def _laid_out(weight: Tensor) -> Tensor:
    """
    Give ``weight`` [N, K] as this device's matrix-vector product reads it fastest.

    On a CPU column by column: the library's product with a vector takes half the time then.
    """
    return weight.t().contiguous().t() if weight.device.type == 'cpu' else weight
