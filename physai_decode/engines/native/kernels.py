"""
The operations of a decode step as Triton kernels; each one's twin is in ``ops``.

At batch 1 a step is bound by the reading of weights, so every kernel is made to keep the memory
busy: each program owns a few output rows and streams them once; what stands around the product
(norm, bias, SiLU, residual) happens in registers. Where the chip has it (compute capability 9.0),
each kernel is launched while the one before still runs, and fetches weights, which depend on
nobody, before it waits for its input: "programmatic dependent launch", here ``EARLY``.
"""

from dataclasses import dataclass
import math

from physai_decode.engines.native.linear import Dense
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.ops import Attention
from physai_decode.engines.native.ops import TorchOps
import torch
from torch import Tensor
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents
from triton.language.extra.cuda import gdc_wait


@triton.jit
def _fetch(addresses):
    """Bring the cache lines at ``addresses`` to the second-level cache, without waiting."""
    tl.inline_asm_elementwise('prefetch.global.L2 [$1]; mov.u32 $0, 0;', '=r,l',
                              [addresses.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _embed(table, token, x, hidden, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token).to(tl.int64)
    values = tl.load(table + row * hidden + columns, mask=columns < hidden)
    tl.store(x + columns, values.to(tl.float32), mask=columns < hidden)


@triton.jit
def _finish(sums, squares, rows, n, K: tl.constexpr, eps, bias, NORM: tl.constexpr,
            BIAS: tl.constexpr):
    """Turn the sums of a row's products into the projection: norm, then bias."""
    if NORM:
        sums *= tl.rsqrt(squares / K + eps)
    if BIAS:
        sums += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
    return sums


@triton.jit
def _store(out, rows, n, values, ADD: tl.constexpr):
    if ADD:
        values += tl.load(out + rows, mask=rows < n, other=0.0)
    tl.store(out + rows, values.to(out.dtype.element_ty), mask=rows < n)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _dense(x, weight, bias, gain, out, n, eps, K: tl.constexpr, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, NORM: tl.constexpr,
           GATED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr):
    """Multiply ``weight`` [n, K] (gated: [2 n, K]) by ``x`` [K]; ROWS rows a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    # Rows past the end read the last row again: no mask in the loop.
    near = tl.minimum(rows, n - 1).to(tl.int64)[:, None] * K
    row = weight + near + columns[None, :]
    if EARLY:
        if EARLY == 1:
            gdc_launch_dependents()
        if AHEAD > 0:
            lines = weight + near + (tl.arange(0, AHEAD // 64) * 64)[None, :]
            _fetch(lines)
            if GATED:
                _fetch(lines + n.to(tl.int64) * K)
        gdc_wait()
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    more = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.range(0, K, COLUMNS, num_stages=STAGES):
        if K % COLUMNS == 0:
            w = tl.load(row + k, eviction_policy='evict_first')
            if GATED:
                u = tl.load(row + n.to(tl.int64) * K + k, eviction_policy='evict_first')
            v = tl.load(x + k + columns).to(tl.float32)
            if NORM:
                g = tl.load(gain + k + columns).to(tl.float32)
        else:
            inside = k + columns < K
            w = tl.load(row + k, mask=inside[None, :], other=0.0, eviction_policy='evict_first')
            if GATED:
                u = tl.load(row + n.to(tl.int64) * K + k, mask=inside[None, :], other=0.0,
                            eviction_policy='evict_first')
            v = tl.load(x + k + columns, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                g = tl.load(gain + k + columns, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v *= g
        sums += w.to(tl.float32) * v[None, :]
        if GATED:
            more += u.to(tl.float32) * v[None, :]
    if EARLY == 2:
        gdc_launch_dependents()
    square = tl.sum(squares)
    result = _finish(tl.sum(sums, 1), square, rows, n, K, eps, bias, NORM, BIAS)
    if GATED:
        up = _finish(tl.sum(more, 1), square, rows, n, K, eps, bias + n, NORM, BIAS)
        result = _silu(result) * up
    _store(out, rows, n, result, ADD)


@triton.jit
def _nibble(words, NUMBER: tl.constexpr):
    """
    Give nibble NUMBER of each word as a float, plus 128 or 2048.

    Laid over the mantissa of such a float the nibble needs no conversion: one shift, one logic
    operation. Even places end at bits 16 to 19 (over 128), odd ones too or at 12 to 15 (over 2048).
    """
    if NUMBER == 0:
        bits = ((words << 16) & 0xF0000) | 0x43000000
    elif NUMBER == 1:
        bits = ((words << 8) & 0xF000) | 0x45000000
    elif NUMBER == 2:
        bits = ((words << 8) & 0xF0000) | 0x43000000
    elif NUMBER == 3:
        bits = (words & 0xF000) | 0x45000000
    elif NUMBER == 4:
        bits = (words & 0xF0000) | 0x43000000
    elif NUMBER == 5:
        bits = ((words >> 8) & 0xF000) | 0x45000000
    elif NUMBER == 6:
        bits = ((words >> 8) & 0xF0000) | 0x43000000
    else:
        bits = ((words >> 12) & 0xF0000) | 0x43000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _offset(NUMBER: tl.constexpr):
    """What `_nibble` adds."""
    return 2048.0 if NUMBER == 1 or NUMBER == 3 or NUMBER == 5 else 128.0


@triton.jit
def _input(x, gain, order, column, K: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr,
           ORDERED: tl.constexpr):
    """Load ``WIDTH`` inputs; gives them (times their gains), and their squares."""
    columns = column + tl.arange(0, WIDTH)
    inside = columns < K
    if ORDERED:
        columns = tl.load(order + columns, mask=inside, other=0)
    v = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    squares = v * v
    if NORM:
        v *= tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    return v, squares


@triton.jit
def _int4(x, packed, scales, zeros, order, bias, gain, out, n, eps, K: tl.constexpr,
          BLOCKS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
          STAGES: tl.constexpr, AHEAD: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
          ADD: tl.constexpr, BIAS: tl.constexpr, ZEROS: tl.constexpr, ORDERED: tl.constexpr, EARLY: tl.constexpr):
    """Multiply an `Int4` [n, K] (gated: [2 n, K]) by ``x`` [K]; ROWS rows a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    near = tl.minimum(rows, n - 1).to(tl.int64)
    words = tl.arange(0, WIDTH)
    groups: tl.constexpr = BLOCKS * 8 * WIDTH // GROUP
    per_group: tl.constexpr = GROUP // WIDTH          # nibbles that share a scale
    row = packed + near[:, None] * (BLOCKS * WIDTH) + words[None, :]
    if EARLY:
        if EARLY == 1:
            gdc_launch_dependents()
        if AHEAD > 0:
            lines = packed + near[:, None] * (BLOCKS * WIDTH) + (
                tl.arange(0, AHEAD // 32) * 32)[None, :]
            _fetch(lines)
            if GATED:
                _fetch(lines + n.to(tl.int64) * (BLOCKS * WIDTH))
        gdc_wait()
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    more = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((WIDTH,), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        w = tl.load(row + block * WIDTH, eviction_policy='evict_first')
        if GATED:
            u = tl.load(row + n.to(tl.int64) * (BLOCKS * WIDTH) + block * WIDTH,
                        eviction_policy='evict_first')
        for part in tl.static_range(8 // per_group):
            group = near * groups + block * (8 // per_group) + part
            inner = tl.zeros((ROWS, WIDTH), tl.float32)
            inner_more = tl.zeros((ROWS, WIDTH), tl.float32)
            plain = tl.zeros((WIDTH,), tl.float32)
            shifted = tl.zeros((WIDTH,), tl.float32)
            for i in tl.static_range(per_group):
                column = (block * 8 + part * per_group + i) * WIDTH
                v, v_squares = _input(x, gain, order, column, K, WIDTH, NORM, ORDERED)
                if NORM:
                    squares += v_squares
                plain += v
                shifted += v * _offset(part * per_group + i)
                inner += _nibble(w, part * per_group + i) * v[None, :]
                if GATED:
                    inner_more += _nibble(u, part * per_group + i) * v[None, :]
            if ZEROS:
                zero = tl.load(zeros + group).to(tl.float32)[:, None]
                correction = shifted[None, :] + zero * plain[None, :]
            else:
                correction = (shifted + 8.0 * plain)[None, :]
            scale = tl.load(scales + group).to(tl.float32)[:, None]
            sums += (inner - correction) * scale
            if GATED:
                second = group + n.to(tl.int64) * groups
                if ZEROS:
                    zero = tl.load(zeros + second).to(tl.float32)[:, None]
                    correction = shifted[None, :] + zero * plain[None, :]
                scale = tl.load(scales + second).to(tl.float32)[:, None]
                more += (inner_more - correction) * scale
    if EARLY == 2:
        gdc_launch_dependents()
    square = tl.sum(squares)
    result = _finish(tl.sum(sums, 1), square, rows, n, K, eps, bias, NORM, BIAS)
    if GATED:
        up = _finish(tl.sum(more, 1), square, rows, n, K, eps, bias + n, NORM, BIAS)
        result = _silu(result) * up
    _store(out, rows, n, result, ADD)


@triton.jit
def _turned(head, gain, cos, sin, dims, D: tl.constexpr, eps, inside, NORM: tl.constexpr):
    """
    Load heads at ``head`` [rows, 1] or scalar, normalise and rotate them.

    ``dims`` is the index over the head's dimensions in ``inside``'s shape; each element is turned
    together with its partner half a head away.
    """
    half: tl.constexpr = D // 2
    other = tl.where(dims < half, dims + half, dims - half)
    a = tl.load(head + dims, mask=inside, other=0.0)
    b = tl.load(head + other, mask=inside, other=0.0)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a, -1, keep_dims=True) / D + eps)
        a *= scale * tl.load(gain + dims, mask=dims < D, other=0.0).to(tl.float32)
        b *= scale * tl.load(gain + other, mask=dims < D, other=0.0).to(tl.float32)
    angle = tl.where(dims < half, dims, dims - half)
    c = tl.load(cos + angle, mask=dims < D, other=0.0)
    s = tl.load(sin + angle, mask=dims < D, other=0.0)
    return a * c + tl.where(dims < half, -b, b) * s


@triton.jit
def _attend(qkv, keys, values, position, cos, sin, q_gain, k_gain, part_sums, part_maxima,
            part_totals, max_context, scale, eps, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
            PADDED: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr,
            TOKENS: tl.constexpr, WINDOW: tl.constexpr, NORM: tl.constexpr,
            EARLY: tl.constexpr):
    """
    Attend over one share of the context for the queries of one key-value head.

    The first share also takes the new token, and writes its key and value to the cache. PADDED and
    DIMS are GROUP and D rounded up to what the matrix units take.
    """
    kv_head = tl.program_id(0)
    share = tl.program_id(1)
    place = tl.load(position).to(tl.int32)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(0, place + 1 - WINDOW)
    length = tl.cdiv(tl.cdiv(place - start, SPLITS), TOKENS) * TOKENS
    begin = start + share * length
    end = tl.minimum(place, begin + length)
    cache = kv_head.to(tl.int64) * max_context * D
    queries = tl.arange(0, PADDED)
    dims = tl.arange(0, DIMS)
    if EARLY:
        # The share's keys and values are older than this step.
        first = tl.minimum(begin + tl.arange(0, TOKENS), max_context - 1)
        lines = cache + first.to(tl.int64)[:, None] * D + (tl.arange(0, DIMS // 64) * 64)[None, :]
        _fetch(keys + lines)
        _fetch(values + lines)
        if EARLY == 1:
            gdc_launch_dependents()
        gdc_wait()

    angles = place * (D // 2)
    q_head = qkv + (kv_head * GROUP + queries)[:, None] * D
    q_inside = (queries < GROUP)[:, None] & (dims < D)[None, :]
    q = _turned(q_head, q_gain, cos + angles, sin + angles, dims[None, :], D, eps, q_inside, NORM)
    kind = keys.dtype.element_ty
    q = q.to(kind)

    maxima = tl.full((PADDED,), float('-inf'), tl.float32)
    totals = tl.zeros((PADDED,), tl.float32)
    sums = tl.zeros((PADDED, DIMS), tl.float32)
    if share == 0:
        k_head = qkv + (KV_HEADS * GROUP + kv_head) * D
        k = _turned(k_head, k_gain, cos + angles, sin + angles, dims[None, :], D, eps,
                    (dims < D)[None, :], NORM).to(kind)
        v = tl.load(qkv + (KV_HEADS * GROUP + KV_HEADS + kv_head) * D + dims[None, :],
                    mask=(dims < D)[None, :], other=0.0).to(kind)
        new = cache + place * D + dims[None, :]
        tl.store(keys + new, k, mask=(dims < D)[None, :])
        tl.store(values + new, v, mask=(dims < D)[None, :])
        maxima = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        totals += 1.0
        sums += v.to(tl.float32)
    for token in tl.range(begin, end, TOKENS):
        tokens = token + tl.arange(0, TOKENS)
        live = (tokens < end)[:, None] & (dims < D)[None, :]
        at = cache + tokens.to(tl.int64)[:, None] * D + dims[None, :]
        k = tl.load(keys + at, mask=live, other=0.0)
        v = tl.load(values + at, mask=live, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
        scores = tl.where((tokens < end)[None, :], scores, float('-inf'))
        highest = tl.maximum(maxima, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        fade = tl.exp(maxima - highest)
        totals = totals * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(kind), v, input_precision='ieee')
        maxima = highest
    if EARLY == 2:
        gdc_launch_dependents()

    # Laid out by query, so that each one's shares lie together.
    slot = (kv_head * GROUP + queries) * SPLITS + share
    tl.store(part_maxima + slot, maxima, mask=queries < GROUP)
    tl.store(part_totals + slot, totals, mask=queries < GROUP)
    tl.store(part_sums + slot[:, None] * DIMS + dims[None, :], sums,
             mask=(queries < GROUP)[:, None])


@triton.jit
def _join(part_sums, part_maxima, part_totals, out, D: tl.constexpr, DIMS: tl.constexpr,
          SPLITS: tl.constexpr, EARLY: tl.constexpr):
    """Join the shares of one query head."""
    if EARLY:
        if EARLY == 1:
            gdc_launch_dependents()
        gdc_wait()
    dims = tl.arange(0, DIMS)
    slots = tl.program_id(0) * SPLITS + tl.arange(0, SPLITS)
    maxima = tl.load(part_maxima + slots)
    totals = tl.load(part_totals + slots)
    sums = tl.load(part_sums + slots[:, None] * DIMS + dims[None, :])
    fades = tl.exp(maxima - tl.max(maxima, 0))
    result = tl.sum(sums * fades[:, None], 0) / tl.sum(totals * fades, 0)
    if EARLY == 2:
        gdc_launch_dependents()
    tl.store(out + tl.program_id(0) * D + dims, result.to(out.dtype.element_ty), mask=dims < D)


@triton.jit
def _advance(logits, token, position, history, tops, places, arrived, vocab,
             BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, EARLY: tl.constexpr):
    """Find the greatest logit; the last program to arrive writes the token and moves on."""
    program = tl.program_id(0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    best = tl.full((BLOCK,), float('-inf'), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(program * BLOCK, vocab, PROGRAMS * BLOCK):
        ids = start + tl.arange(0, BLOCK)
        values = tl.load(logits + ids, mask=ids < vocab, other=float('-inf'))
        where = tl.where(values > best, ids, where)
        best = tl.maximum(best, values)
    top = tl.max(best, 0)
    tl.store(tops + program, top)
    tl.store(places + program, tl.min(tl.where(best == top, where, vocab), 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem='acq_rel') == PROGRAMS - 1:
        tl.store(arrived, 0)
        programs = tl.arange(0, PROGRAMS)
        all_tops = tl.load(tops + programs, cache_modifier='.cg')
        all_places = tl.load(places + programs, cache_modifier='.cg')
        winner = tl.min(tl.where(all_tops == tl.max(all_tops, 0), all_places, vocab), 0)
        next_position = tl.load(position) + 1
        tl.store(token, winner.to(tl.int64))
        tl.store(position, next_position)
        tl.store(history + next_position, winner.to(tl.int64))


@dataclass(frozen=True)
class Shape:
    """What a product's kernel is chosen by."""

    n: int
    k: int
    kind: str          # the weight's dtype, or int4-gGROUP
    gated: bool
    normed: bool


@dataclass(frozen=True)
class Choice:
    """How a product's kernel is laid out; ``columns`` is for dense weights alone."""

    rows: int
    columns: int
    warps: int
    stages: int
    ahead: int         # columns (int4: words) of each row fetched before the input is there


class TritonOps(TorchOps):
    """The step's operations as kernels; same names, arguments and results as `TorchOps`."""

    name = f'triton {triton.__version__}'

    def __init__(self, device: torch.device, splits: int | None = None):
        """Take scratch memory; ``splits`` is how many programs share a head's context."""
        self._device = device
        self._early = 0
        self._programs = 4
        if device.type == 'cuda':
            properties = torch.cuda.get_device_properties(device)
            self._early = 2 if properties.major >= 9 else 0
            self._programs = triton.next_power_of_2(properties.multi_processor_count)
        self._splits = splits
        self._tokens = 64
        self._choices: dict[Shape, Choice] = {}
        self._attention: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
        self._tops = torch.empty(self._programs, dtype=torch.float32, device=device)
        self._places = torch.empty(self._programs, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def embed(self, table, token, x):
        """See `TorchOps.embed`."""
        hidden = x.shape[0]
        _embed[(triton.cdiv(hidden, 1024),)](
            table, token, x, hidden, BLOCK=1024, EARLY=self._early, **self._launch(4))

    def linear(self, x, weight, out, *, gain=None, eps=0.0, add=False):
        """See `TorchOps.linear`."""
        self._product(x, weight, out, gain, eps, add, gated=False)

    def gated(self, x, weight, out, gain, eps):
        """See `TorchOps.gated`."""
        self._product(x, weight, out, gain, eps, False, gated=True)

    def attend(self, qkv, keys, values, position, cos, sin, layer, out):
        """See `TorchOps.attend`."""
        kv_heads, max_context, dim = keys.shape
        group = layer.heads // layer.kv_heads
        padded = max(16, triton.next_power_of_2(group))
        dims = triton.next_power_of_2(dim)
        splits = self._splits or max(1, triton.next_power_of_2(self._programs // kv_heads))
        parts = self._parts(layer.heads, splits, dims)
        _attend[(kv_heads, splits)](
            qkv, keys, values, position, cos, sin,
            layer.q_norm if layer.q_norm is not None else qkv,
            layer.k_norm if layer.k_norm is not None else qkv,
            *parts, max_context, 1 / math.sqrt(dim), layer.norm_eps, KV_HEADS=kv_heads,
            GROUP=group, PADDED=padded, D=dim, DIMS=dims, SPLITS=splits, TOKENS=self._tokens,
            WINDOW=layer.window, NORM=layer.q_norm is not None, EARLY=self._early,
            **self._launch(4))
        _join[(layer.heads,)](*parts, out, D=dim, DIMS=dims, SPLITS=splits, EARLY=self._early,
                              **self._launch(4))

    def advance(self, logits, token, position, history):
        """See `TorchOps.advance`."""
        _advance[(self._programs,)](
            logits, token, position, history, self._tops, self._places, self._arrived,
            logits.shape[0], BLOCK=1024, PROGRAMS=self._programs, EARLY=self._early,
            **self._launch(4))

    def tune(self, transformer):
        """Find the fastest layout for each shape of product, or take it from the cache."""

    def _product(self, x, weight, out, gain, eps, add, gated):
        n = out.shape[0]
        shape = self._shape(weight, gain, gated)
        choice = self._choices.get(shape) or _default(shape)
        bias = weight.bias
        common = {
            'ROWS': choice.rows, 'STAGES': choice.stages, 'AHEAD': choice.ahead,
            'NORM': gain is not None, 'GATED': gated, 'ADD': add, 'BIAS': bias is not None, 'EARLY': self._early,
            **self._launch(choice.warps)}
        grid = (triton.cdiv(n, choice.rows),)
        # A pointer that is not used still has to be one.
        bias, gain = x if bias is None else bias, x if gain is None else gain
        if isinstance(weight, Dense):
            _dense[grid](x, weight.weight, bias, gain, out, n, eps, K=shape.k,
                         COLUMNS=choice.columns, **common)
            return
        _int4[grid](
            x, weight.packed, weight.scales,
            x if weight.zeros is None else weight.zeros,
            x if weight.order is None else weight.order, bias, gain, out, n, eps, K=shape.k,
            BLOCKS=weight.packed.shape[1] // weight.width, WIDTH=weight.width,
            GROUP=weight.group_size, ZEROS=weight.zeros is not None,
            ORDERED=weight.order is not None, **common)

    def _parts(self, heads, splits, dims):
        """Give scratch for the shares of attention; all layers use the same."""
        shape = heads, splits, dims
        if shape not in self._attention:
            self._attention[shape] = tuple(
                torch.empty(heads * splits * width, dtype=torch.float32, device=self._device)
                for width in (dims, 1, 1))
        return self._attention[shape]

    def _launch(self, warps):
        options = {'num_warps': warps}
        if self._early:
            options['launch_pdl'] = True
        return options

    @staticmethod
    def _shape(weight, gain, gated):
        n, k = weight.shape
        kind = f'int4-g{weight.group_size}' if isinstance(weight, Int4) else str(
            weight.weight.dtype).removeprefix('torch.')
        return Shape(n, k, kind, gated, gain is not None)


def _default(shape):
    columns = min(512, triton.next_power_of_2(shape.k))
    return Choice(rows=4 if shape.gated else 8, columns=columns, warps=4, stages=1, ahead=0)
