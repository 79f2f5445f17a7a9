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
Prefill in captured chunks, each padded to one of a few sizes with a CUDA graph.

The position and length of a chunk are read on the device, so a graph serves all positions. A graph
ends with the keys and values of the last layer. The rest of that layer and the head, which only
the last token needs, run the kernels of the decode step in a separate graph. `Transformer.prefill`
is the same in torch, without graphs: the alternative, and the reference for tests.
"""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
import math
from typing import Any

from physai_decode.engines import chip
from physai_decode.engines import compiler
from physai_decode.engines import device as devices
from physai_decode.engines.native import lookup
from physai_decode.engines.native import prefill_kernels as kernels
from physai_decode.engines.native import routing_kernels
from physai_decode.engines.native.architecture import Routing
from physai_decode.engines.native.experts import Experts
from physai_decode.engines.native.fp4_kernels import Fp4Ops
from physai_decode.engines.native.kernels import dequantised
from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Fp4
from physai_decode.engines.native.linear import FP4_GROUP
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.linear import Linear
from physai_decode.engines.native.linear import Scaled
from physai_decode.engines.native.linear import Stack
from physai_decode.engines.native.linear import TILE_ROWS
from physai_decode.engines.native.mlp import Mlp
from physai_decode.engines.native.prefill_tiling import expert_rule
from physai_decode.engines.native.prefill_tiling import has_table
from physai_decode.engines.native.prefill_tiling import is_packed
from physai_decode.engines.native.prefill_tiling import rule
from physai_decode.engines.native.prefill_tiling import runs_experts
from physai_decode.engines.native.scaled_kernels import pointers
from physai_decode.engines.native.transformer import Transformer
import torch
from torch import Tensor
import triton

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)     # tokens of a captured chunk
UPLOADS = 4                             # chunks whose ids may be in transfer to the device
UNPACKED_BYTES = 32 * 2**20             # of an int4 weight that are unpacked at a time
UNPACKED_ROWS = 1792                    # minimum; fewer leave processors idle
SLOTS = 2                               # buffers for unpacking while the library multiplies
TAIL = 0.5                              # share of the processors, see `_full_waves`
ROW_WARPS = 16                          # of a program that reads a row, if there are few rows
ROTATED_HEADS = 4                       # heads that a program rotates, if there are few tokens
SPLITS = 8                              # maximum splits of a context
SHORT_CONTEXT = 512                     # tokens up to which attention does not split it
UNPACKING = 4                           # tiles of 16 rows, and warps, per program that unpacks
CAPABILITY = (8, 0)                     # the lowest for which Triton uses tensor cores


class Prefill:
    """Prefills a transformer in chunks, captured if ``capture`` is set."""

    def __init__(self, transformer: Transformer, sizes: Sequence[int] = SIZES,
                 capture: bool = True,
                 progress: Callable[[str], None] = lambda message: None):
        """
        Allocate the buffers, which all sizes share, and capture.

        :param sizes: tokens of a chunk, powers of 2 from 16 on; of those above the context, only
            the smallest is used.
        :param capture: on CUDA, false only in tests: `_tail` begins with a kernel that starts
            early and relies on results from two kernels before.
        """
        t = self._t = transformer
        a = t.architecture
        device, dtype = t.keys.device, t.keys.dtype
        enough = next((size for size in sizes if size >= t.max_context), sizes[-1])
        self.sizes = tuple(size for size in sizes if size <= enough)
        self._cuda = device.type == 'cuda'
        self._pdl = compiler.supports_pdl(device)
        self._processors, self._shared, self._tensor_memory = 4, 2**30, False
        if self._cuda:
            self._tensor_memory = chip.has_tensor_memory(device)
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
            self._shared = chip.shared_bytes(device)
        largest = self.sizes[-1]
        self._inputs = torch.zeros(2 + largest, dtype=torch.int64, device=device)
        self._start, self._count, self._ids = self._inputs.split((1, 1, largest))
        self._inputs[1] = 1
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits = torch.zeros_like(t.logits)

        def rows(width, kind=dtype):
            return torch.zeros(largest * width, dtype=kind, device=device)

        layers, routing = t.weights.layers, a.routing
        self._x = rows(a.hidden_size, torch.float32)
        self._normed = rows(a.hidden_size)
        self._q, self._attended = rows(a.q_size), rows(a.q_size)
        self._hidden = rows(max(a.intermediate_size, routing.top_k * routing.size)
                            if routing else a.intermediate_size)
        ordered = max((weight.shape[1] for layer in layers for weight in layer.linears
                       if _is_ordered(weight) or isinstance(weight, Stack)), default=0)
        self._ordered = rows(ordered)
        self._assigned: Any = None
        if routing:
            self._assigned = _Assigned.allocate(routing, self.sizes, a.hidden_size, device)
        self._parts = torch.zeros(self._most_parts(), dtype=torch.float32, device=device)
        unpacked = self._most_unpacked()
        self._slots = [torch.zeros(unpacked, dtype=dtype, device=device)
                       for _ in range(SLOTS if unpacked else 0)]
        self._side = torch.cuda.Stream(device) if self._cuda and unpacked else None
        self._slot = 0
        self._begun: Any = None             # the event at the start of the chunk
        self._free: dict[int, Any] = {}     # for each slot, the event after which it is free
        split_rows = max((size * self._splits(size) for size in self.sizes
                          if self._splits(size) > 1), default=0) * a.heads
        self._partials = [torch.zeros(split_rows * width, dtype=torch.float32, device=device)
                        for width in (a.head_dim, 1, 1)]
        self.buffer_bytes = sum(
            tensor.numel() * tensor.element_size() for tensor in (
                self._inputs, self._logits, self._x, self._normed, self._q, self._attended,
                self._hidden, self._ordered, self._parts, *self._slots, *self._partials,
                *(vars(self._assigned).values() if self._assigned else ())))
        self.graph_bytes = 0
        self._uploads = [
            (torch.zeros(2 + largest, dtype=torch.int64).pin_memory(), torch.cuda.Event())
            for _ in range(UPLOADS)] if self._cuda else []
        # By size, and by whether the context is short, so that attention does not split it.
        self._run: dict[tuple[int, bool], Callable[[], None]] = {
            (size, short): partial(self._chunk, size, short) for size in self.sizes
            for short in (False, True) if not short or self._splits(size) > 1}
        self._finish = self._tail
        if capture:
            self._capture(progress)

    @staticmethod
    def runs(transformer: Transformer) -> bool:
        """Return whether chunks of this transformer can be captured."""
        keys = transformer.keys
        if keys.device.type != 'cuda' or keys.dtype == torch.float32:
            return False
        if chip.capability(keys.device) < CAPABILITY:
            return False
        if not transformer.ops.name.startswith('triton'):
            return False
        layers = transformer.weights.layers
        shared = chip.shared_bytes(keys.device)
        return all(runs_experts(layer.mlp, shared)
                   for layer in layers if isinstance(layer.mlp, Experts)) and all(
            weight.in_features % 32 == 0 and weight.out_features % TILE_ROWS == 0
            for layer in layers for weight in layer.linears if isinstance(weight, Int4))

    @property
    def details(self) -> dict[str, str]:
        """Entries for the details of the `Footprint`: chunk sizes and memory."""
        return {'prefill': 'captured', 'prefill_sizes': ' '.join(map(str, self.sizes)),
                'prefill_gb': f'{(self.buffer_bytes + self.graph_bytes) / 1e9:.3f}'}

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int] | Tensor, start: int) -> Tensor:
        """
        Prefill a chunk; see `Transformer.prefill`.

        :returns: float32 [vocab], the same tensor each time.
        """
        self.feed(ids, start)
        return self.logits()

    @torch.inference_mode()
    def feed(self, ids: Sequence[int] | Tensor, start: int) -> None:
        """
        Prefill any number of tokens, without waiting for the device.

        :param ids: at positions from ``start`` on, within the cache.
        :raises ValueError: there are no ids, or they do not fit into the cache.
        """
        if isinstance(ids, Tensor) and ids.device.type == 'cpu':
            ids = ids.tolist()
        count = len(ids)
        if not count or start + count > self._t.max_context:
            raise ValueError(f'{count} tokens do not fit behind {start} of '
                             f'{self._t.max_context}')
        done = 0
        while done < count:
            piece = ids[done:done + self.sizes[-1]]
            self._upload(piece, start + done)
            size = next(size for size in self.sizes if size >= len(piece))
            short = start + done + size <= SHORT_CONTEXT and (size, True) in self._run
            self._run[size, short]()
            done += len(piece)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Return the logits after the last token, float32 [vocab], always the same tensor."""
        self._finish()
        return self._logits

    @staticmethod
    def dequantiser(weight: Linear) -> Callable[..., Tensor] | None:
        """Return the function that long chunks dequantise with; see `TorchOps.dequantiser`."""
        return None if isinstance(weight, Dense) else partial(dequantised, _widener(weight))

    def _upload(self, ids, start):
        count = len(ids)
        if isinstance(ids, Tensor):
            self._inputs[0], self._inputs[1] = start, count
            self._ids[:count] = ids
            return
        if not self._uploads:
            self._inputs[:2 + count] = torch.tensor([start, count, *ids])
            return
        host, copied = upload = self._uploads.pop(0)
        self._uploads.append(upload)
        copied.synchronize()
        host[:2 + count] = torch.tensor([start, count, *ids])
        self._inputs[:2 + count].copy_(host[:2 + count], non_blocking=True)
        copied.record()

    def _capture(self, progress):
        device = self._inputs.device
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        progress('capturing prompts')
        head = devices.capture(self._tail, device)
        graphs = {name: devices.capture(step, device, head.pool())
                  for name, step in self._run.items()}
        self._finish = head.replay
        self._run = {name: graph.replay for name, graph in graphs.items()}
        self.graph_bytes = free - torch.cuda.mem_get_info(device)[0]

    # The methods below are captured: they only depend on padded sizes.

    def _chunk(self, tokens, short):
        """Run all layers, the last one up to its keys and values."""
        if self._side:
            self._begun, self._free = _now(), {}
        t, a = self._t, self._t.architecture
        eps, layers = a.norm_eps, t.weights.layers
        x, normed = self._x, self._normed
        width = {'K': a.hidden_size, 'BLOCK': triton.next_power_of_2(a.hidden_size)}
        launch = self._launch(self._row_warps(tokens))
        kernels._embed[(tokens,)](
            t.weights.embedding, self._ids, x, layers[0].input_norm, normed, eps,
            SCALE=t.embedding_scale, PLACED=self._is_placed(layers[0].qkv, tokens), **width,
            **launch)
        for index, layer in enumerate(layers):
            last = index == len(layers) - 1
            parts, count = self._product(normed, layer.qkv, tokens)
            self._rotated(index, parts, count, tokens, last)
            if last:
                break
            self._attend(index, tokens, short, self._is_placed(layer.out, tokens))
            parts, count = self._product(self._attended, layer.out, tokens)
            self._add(layer.out.bias, parts, count, tokens, layer.out_norm, layer.mlp_norm,
                      isinstance(layer.mlp, Mlp)
                      and self._is_placed(layer.mlp.gate_up, tokens, True))
            bias = None
            if isinstance(layer.mlp, Experts):
                parts, count = self._experts(normed, layer.mlp, tokens)
            else:
                self._gated(normed, layer.mlp, tokens)
                parts, count = self._product(self._hidden, layer.mlp.down, tokens)
                bias = layer.mlp.down.bias
            after = layers[index + 1]
            self._add(bias, parts, count, tokens, layer.down_norm, after.input_norm,
                      self._is_placed(after.qkv, tokens))
        size = max(a.hidden_size, layer.qkv.shape[0])
        bias = layer.qkv.bias
        kernels._last[(triton.cdiv(size, 512),)](
            x, parts, x if bias is None else bias, self._start, self._count, t.x, t.qkv,
            self._place, tokens * layer.qkv.shape[0], a.hidden_size, layer.qkv.shape[0],
            BLOCK=512, PARTS=count, BIAS=bias is not None, **self._launch(4))

    def _tail(self):
        """Run the last token through the rest of the last layer and the head."""
        t, eps, layer = self._t, self._t.architecture.norm_eps, self._t.weights.layers[-1]
        ops = t.ops
        ops.attend(t.qkv, t.keys[-1], t.values[-1], self._place, *t.angles[-1], t.attention[-1],
                   t.attended)
        t.after_attention(layer)
        ops.linear(t.x, t.weights.head, self._logits, gain=t.weights.norm, eps=eps)

    def _product(self, x, weight, tokens):
        """Multiply; return the partial sums [splits, tokens, n] without bias, and their number."""
        n, k = weight.shape
        x = self._in_order(x, weight, tokens)
        tiling = self._tiling(weight, tokens, False)
        if not tiling.rows:
            out = self._parts.view(x.dtype)[:tokens * n].view(tokens, n)
            for weights, rows in self._pieces(weight):
                torch.mm(x[:tokens * k].view(tokens, k), weights.t(), out=out[:, rows])
            return out, 1
        self._by_kernel(x, weight, tokens, tiling, self._parts)
        return self._parts, tiling.splits

    def _gated(self, x, mlp, tokens):
        """Write activation(gate) * up to ``_hidden``."""
        weight, placed = mlp.gate_up, self._is_placed(mlp.down, tokens)
        gelu = mlp.activation == 'gelu_tanh'
        x = self._in_order(x, weight, tokens, True)
        tiling = self._tiling(weight, tokens, True)
        n, k = weight.shape
        if tiling.rows:
            full, splits = self._full_waves(weight, tokens, tiling)
            self._by_kernel(x, weight, tokens, tiling, self._hidden, slice(0, full), placed=placed,
                            gated=True, gelu=gelu)
            if full < n:
                rest = replace(tiling, splits=splits)
                self._by_kernel(x, weight, tokens, rest, self._parts, slice(full, n), paired=True)
                self._gate_up(self._parts, splits, tokens, weight, slice(full, n), True, placed,
                              gelu)
            return
        for weights, rows in self._pieces(weight):
            count = rows.stop - rows.start
            out = self._parts.view(x.dtype)[:tokens * count].view(tokens, count)
            torch.mm(x[:tokens * k].view(tokens, k), weights.t(), out=out)
            self._gate_up(out, 1, tokens, weight, rows, not isinstance(weight, Dense), placed,
                          gelu)

    def _experts(self, x, mlp, tokens):
        """
        Run each token through its experts; the host does not know which.

        :returns: the results [top_k, tokens, n], each times its routing weight, and top_k.
        """
        parts, count = self._product(x, mlp.router, tokens)
        to, routing = self._assigned, mlp.down
        most, total = routing.count, routing.top_k * tokens
        size, blocks = _block_tokens(tokens, routing), _blocks(tokens, routing)
        common = {'EXPERTS': most, 'WIDE': triton.next_power_of_2(most), **self._launch(4)}
        routing_kernels._route[(tokens,)](
            parts, self._count, to.ids, to.weights, tokens, tokens * most, BLOCK=16,
            TOP_K=routing.top_k, NORMALISED=mlp.normalised, PARTS=count, **common)
        routing_kernels._count[(most,)](to.ids, to.counts, total, BLOCK=1024, **self._launch(4))
        routing_kernels._arrange[(most,)](
            to.ids, to.counts, to.slots, to.owners, total, blocks, TOKENS=size, BLOCK=1024,
            MOST=triton.next_power_of_2(blocks), **common)
        if is_packed(mlp.gate_up[0]):
            x = self._reordered(x, to.identity, tokens, True)
        for weight, held, out, gated in ((mlp.gate_up, tokens, self._hidden, True),
                                         (mlp.down, total, self._parts, False)):
            tiling = expert_rule(weight, size, gated, self._shared)
            self._by_kernel(x, weight, blocks * size, tiling, out, gated=gated,
                            placed=gated and is_packed(mlp.down[0]),
                            gelu=mlp.activation == 'gelu_tanh', held=held)
            x = out
        return self._parts, routing.top_k

    def _gate_up(self, parts, splits, tokens, weight, rows, paired, placed, gelu):
        width, bias = (rows.stop - rows.start) // 2, weight.bias
        kernels._gate_up[(tokens, triton.cdiv(width, 1024))](
            parts, parts if bias is None else bias, self._hidden, rows.start // 2, width,
            tokens * 2 * width, N=weight.shape[0] // 2, BLOCK=1024, PARTS=splits,
            BIAS=bias is not None, PAIRED=paired, GELU=gelu, PLACED=placed,
            **self._launch(4))

    def _full_waves(self, weight, tokens, tiling):
        """
        Return the rows of gate and up that fill whole waves of all processors.

        Also return the number of splits of the columns of the remaining rows: without splits, a
        few tiles would keep few processors busy for a whole wave.
        """
        n, k = weight.shape
        blocks = tokens // tiling.tokens
        tiles = triton.cdiv(n, tiling.rows)
        full = tiles * blocks // self._processors * self._processors // blocks
        rest = (tiles - full) * blocks
        steps = k // ((4 if is_packed(weight) else 1) * tiling.columns)
        if (tokens < 128 or not full or not rest or rest > TAIL * self._processors
                or (isinstance(weight, Dense) and weight.bias is not None)):
            return n, 1
        return full * tiling.rows, max(1, min(8, steps // 2, self._processors // rest))

    def _pieces(self, weight):
        """
        Yield dense pieces of a weight, each with the slice of its rows.

        Quantised weights are unpacked on a separate stream, as far ahead as slots allow, because
        the memory is idle while the kernels of the chunk compute.
        """
        if isinstance(weight, Dense):
            yield weight.weight, slice(0, weight.shape[0])
            return
        n, k = weight.shape
        most = self._unpacked_rows(weight)
        for first in range(0, n, most):
            rows = slice(first, min(n, first + most))
            self._slot = (self._slot + 1) % len(self._slots)
            count = rows.stop - first
            part = self._slots[self._slot][:count * k].view(count, k)
            if not self._side:
                _widener(weight)(weight, rows, part)
                yield part, rows
                continue
            self._side.wait_event(self._free.get(self._slot, self._begun))
            with torch.cuda.stream(self._side):
                _widener(weight)(weight, rows, part)
                ready = _now()
            torch.cuda.current_stream().wait_event(ready)
            yield part, rows
            self._free[self._slot] = _now()

    def _by_kernel(self, x, weight, tokens, tiling, out, rows=None, gated=False, paired=False,
                   placed=False, gelu=False, held=0):
        """
        Multiply by some rows of a weight, by default all.

        Of a `Stack`, multiply the experts that are assigned; ``held`` is the rows of ``x``.
        """
        n, k = weight.shape
        rows = rows or slice(0, n)
        to, one = (x, x, x), weight
        if experts := isinstance(weight, Stack):
            to = self._assigned.slots, self._assigned.owners, self._assigned.weights
            weight, one = weight.stacked, weight[0]
        bias = weight.bias if gated else None
        width = n // 2 if gated else rows.stop - rows.start
        common = {
            'EXPERTS': experts, 'TOKENS': tiling.tokens, 'STAGES': tiling.stages, 'GATED': gated,
            'GELU': gelu, 'BIAS': bias is not None, 'PLACED': placed, **self._launch(tiling.warps)}
        bias = x if bias is None else bias
        grid = (triton.cdiv(rows.stop - rows.start, tiling.rows) * (tokens // tiling.tokens),
                1 if gated else tiling.splits)
        if isinstance(weight, Dense):
            kernels._dense[grid](
                x, weight.weight, bias, out, *to, rows.start, n, k, tokens, held, width,
                ROWS=tiling.rows, COLUMNS=tiling.columns, PAIRED=gated or paired, **common)
            return
        if isinstance(weight, Scaled):
            kernels._scaled[grid](
                x, *pointers(weight), bias, out, *to, rows.start, n, k, tokens, held, width,
                GROUP=weight.group_size, ROWS=tiling.rows, COLUMNS=tiling.columns,
                FLOAT=weight.is_float, ZEROS=weight.zeros is not None, BY_ROW=one.by_row,
                ASSEMBLY=self._cuda, **common)
            return
        blocks = one.packed.shape[1]
        common |= {'TILES': tiling.rows // TILE_ROWS, 'EXACT': k == one.padded_features,
                   'ASSEMBLY': self._cuda}
        if isinstance(weight, Fp4):
            kernels._fp4[grid](
                x, weight.packed, weight.scales.view(torch.int32), weight.factors, bias, out, *to,
                rows.start, n, k, blocks, tokens, held, width, GROUP=FP4_GROUP, **common)
            return
        kernels._int4[grid](
            x, weight.packed, weight.scales,
            weight.scales if weight.zeros is None else weight.zeros,
            lookup.table(weight, x.dtype), bias, out, *to, rows.start, n, k, blocks, tokens, held,
            width, GROUP=one.group_size, WARPS=tiling.warps, ZEROS=weight.zeros is not None,
            TABLE=weight.table is not None, **common)

    def _is_placed(self, weight, tokens, gated=False):
        """Return whether the previous kernel writes the input in the layout of this product."""
        return (is_packed(weight) and weight.order is None
                and self._tiling(weight, tokens, gated).rows > 0)

    def _in_order(self, x, weight, tokens, gated=False):
        """Reorder the input for the columns of a weight, if they have an order."""
        if not _is_ordered(weight):
            return x
        return self._reordered(
            x, weight.order, tokens,
            is_packed(weight) and self._tiling(weight, tokens, gated).rows > 0)

    def _reordered(self, x, order, tokens, placed):
        k = order.shape[0]
        kernels._reorder[(tokens, triton.cdiv(k, 1024))](
            x, order, self._ordered, K=k, BLOCK=1024, PLACED=placed, **self._launch(4))
        return self._ordered

    def _add(self, bias, parts, count, tokens, own_gain, gain, placed):
        a = self._t.architecture
        kernels._add[(tokens,)](
            self._x, parts, parts if bias is None else bias,
            gain if own_gain is None else own_gain, gain, self._normed,
            tokens * a.hidden_size, a.norm_eps, K=a.hidden_size,
            BLOCK=triton.next_power_of_2(a.hidden_size), PARTS=count, BIAS=bias is not None,
            NORM=own_gain is not None, PLACED=placed, **self._launch(self._row_warps(tokens)))

    def _row_warps(self, tokens):
        """Return the warps of a program that reads a whole row: more if there are few rows."""
        width = triton.next_power_of_2(self._t.architecture.hidden_size)
        return max(1, min(ROW_WARPS if tokens <= 128 else 8, width // 256))

    def _rotated(self, index, parts, count, tokens, last):
        t, a = self._t, self._t.architecture
        bias, attention = t.weights.layers[index].qkv.bias, t.attention[index]
        normed = attention.q_norm is not None
        first = a.heads if last else 0
        rows = min(ROTATED_HEADS if tokens <= 128 else 8,
                   triton.next_power_of_2(a.heads + 2 * a.kv_heads - first))
        kernels._rotate[(tokens, triton.cdiv(a.heads + 2 * a.kv_heads - first, rows))](
            parts, parts if bias is None else bias, t.keys[index], t.values[index], self._q,
            self._start, self._count, *t.angles[index],
            attention.q_norm if normed else parts, attention.k_norm if normed else parts,
            tokens * (a.q_size + 2 * a.kv_size), t.max_context, a.norm_eps, HEADS=a.heads,
            KV_HEADS=a.kv_heads, FIRST=first, ROWS=rows, D=a.head_dim,
            DIMS=triton.next_power_of_2(a.head_dim // 2), PARTS=count,
            BIAS=bias is not None, NORM=normed, BETA=a.growth.beta, LENGTH=a.growth.context,
            **self._launch(2))

    def _attend(self, index, tokens, short, placed):
        t, a = self._t, self._t.architecture
        group, dims = a.heads // a.kv_heads, triton.next_power_of_2(a.head_dim)
        splits = 1 if short else self._splits(tokens)
        rows, columns, warps, stages = self._tile(tokens)
        kernels._attend[(triton.cdiv(tokens * group, rows), a.kv_heads, splits)](
            self._q, t.keys[index], t.values[index], self._start, self._count, self._attended,
            *self._partials, t.max_context, tokens, math.log2(math.e) * a.attention_scale,
            HEADS=a.heads, GROUP=group, D=a.head_dim, DIMS=dims, M=rows, N=columns,
            SPLITS=splits, WINDOW=a.windows[index], STAGES=stages, PLACED=placed,
            **self._launch(warps))
        if splits > 1:
            kernels._join[(tokens, triton.cdiv(a.heads, 4))](
                *self._partials, self._count, self._attended, tokens, HEADS=a.heads, ROWS=4,
                D=a.head_dim, DIMS=dims, SPLITS=splits, PLACED=placed, **self._launch(1))

    def _is_large(self, tokens):
        """Return whether attention uses tiles of 128 rows: enough rows and shared memory."""
        a = self._t.architecture
        programs = triton.cdiv(tokens * (a.heads // a.kv_heads), 128) * a.kv_heads
        return programs >= self._processors and self._shared >= 150_000

    def _tile(self, tokens):
        """Return the tile of attention in queries and keys, its warps and stages."""
        if self._t.architecture.head_dim > 128:
            return 64, 32, 4, 2
        return (128, 64, 8, 3) if self._is_large(tokens) else (64, 64, 4, 2)

    def _splits(self, tokens):
        """Return the number of splits of the context of a tile of queries."""
        a = self._t.architecture
        if self._is_large(tokens):
            return 1
        programs = triton.cdiv(tokens * (a.heads // a.kv_heads), 64) * a.kv_heads
        return max(1, min(SPLITS, 2 ** int(math.log2(max(1, 2 * self._processors // programs)))))

    def _launch(self, warps):
        options = {'num_warps': warps, 'PDL': self._pdl}
        if self._pdl:
            options['launch_pdl'] = True
        return options

    def _tiling(self, weight, tokens, gated):
        return rule(weight, tokens, gated, self._processors, self._shared, self._tensor_memory)

    def _most_parts(self):
        """Return the size of the largest product in float32 elements."""
        most = 0
        element = self._t.keys.element_size()
        for layer in self._t.weights.layers:
            for weight in layer.linears:
                if isinstance(weight, Stack):
                    rows = weight.top_k * weight.shape[0] if weight is layer.mlp.down else 0
                    most = max(most, self.sizes[-1] * rows)
                    continue
                gated = weight is layer.mlp.gate_up
                for tokens in self.sizes:
                    tiling = self._tiling(weight, tokens, gated)
                    rows = weight.shape[0]
                    if tiling.rows:
                        splits = tiling.splits
                        if gated:
                            full, splits = self._full_waves(weight, tokens, tiling)
                            rows -= full
                        most = max(most, tokens * rows * splits)
                        continue
                    if gated and not isinstance(weight, Dense):
                        rows = min(rows, self._unpacked_rows(weight))
                    most = max(most, triton.cdiv(tokens * rows * element, 4))
        return most

    def _most_unpacked(self):
        """Return the size of the largest unpacked piece in elements."""
        return max((self._unpacked_rows(weight) * weight.shape[1]
                    for layer in self._t.weights.layers for weight in layer.linears
                    if not isinstance(weight, (Dense, Stack)) and any(
                        not self._tiling(weight, tokens, weight is layer.mlp.gate_up).rows
                        for tokens in self.sizes)), default=0)

    def _unpacked_rows(self, weight):
        """Return the rows of a weight that are unpacked at a time: equal pieces of whole tiles."""
        n, k = weight.shape
        most = max(UNPACKED_ROWS, UNPACKED_BYTES // (k * self._t.keys.element_size()))
        pieces = triton.cdiv(n, most)
        return triton.cdiv(triton.cdiv(n, pieces), 128) * 128


def _now():
    """Record an event in the current stream."""
    event = torch.cuda.Event()
    event.record()
    return event


@dataclass(frozen=True)
class _Assigned:
    """
    The experts of the tokens of a chunk, and which of them a program multiplies.

    ``ids`` int32 and ``weights`` float32 [top_k, tokens]; for the others, see
    `routing_kernels._arrange`.
    """

    ids: Tensor
    weights: Tensor
    counts: Tensor
    slots: Tensor
    owners: Tensor
    identity: Tensor            # int32 [hidden_size], the order of columns of an input

    @classmethod
    def allocate(cls, routing: Routing, sizes: Sequence[int], hidden_size: int,
                 device: torch.device) -> '_Assigned':
        """Allocate for chunks of these sizes."""
        total = routing.top_k * sizes[-1]
        blocks = max(_blocks(size, routing) for size in sizes)
        slots = max(_blocks(size, routing) * _block_tokens(size, routing) for size in sizes)
        ids, counts, slots, owners = (
            torch.zeros(size, dtype=torch.int32, device=device)
            for size in (total, routing.count, slots, blocks))
        return cls(ids, torch.zeros(total, device=device), counts, slots, owners,
                   torch.arange(hidden_size, dtype=torch.int32, device=device))


def _block_tokens(tokens, routing):
    """Return the tokens of a block, about half of an expert's: larger blocks are emptier."""
    half = tokens * routing.top_k // (2 * routing.count)
    return min(64, max(16, triton.next_power_of_2(half)))


def _blocks(tokens, routing):
    """Return the largest number of blocks of the experts of a chunk."""
    total = tokens * routing.top_k
    return total // _block_tokens(tokens, routing) + min(routing.count, total)


def _widener(weight: Linear) -> Callable[[Any, slice, Tensor], None]:
    """Return the function that dequantises rows of a quantised weight."""
    if isinstance(weight, Int4) and not has_table(weight):
        return _unpack
    return Fp4Ops.wideners[type(weight)]


def _unpack(weight: Int4, rows: slice, out: Tensor) -> None:
    """Dequantise some rows of a weight without table, from a whole tile on, to ``out``."""
    blocks = weight.packed.shape[1]
    kernels._unpack[(triton.cdiv(out.shape[0], UNPACKING * TILE_ROWS), blocks)](
        weight.packed, weight.scales, weight.scales if weight.zeros is None else weight.zeros,
        out, rows.start // TILE_ROWS, *out.shape, blocks, GROUP=weight.group_size,
        TILES=UNPACKING, ZEROS=weight.zeros is not None, ASSEMBLY=out.device.type == 'cuda',
        num_warps=UNPACKING)


def _is_ordered(weight):
    return not isinstance(weight, (Dense, Stack)) and weight.order is not None

