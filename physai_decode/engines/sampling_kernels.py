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
Sampling as Triton kernels; the reference is `Sampler`.

Without top-k, top-p and min-p, one kernel is enough. It reads the logits once: greedy sampling is
an argmax, and a draw is an argmax of scores plus random numbers. Top-k and top-p first need a
threshold, which is found without a sort: the scores are counted and their probabilities summed in
bins of similar scores, and only the scores in the bin of the threshold are compared one by one.

Probabilities are summed as integers, because that sum does not depend on the order, so the same
logits always give the same token. Their unit is 2**-44 of the highest probability.

For ``PDL``, see ``kernels``. A row of a pass changes no state if ``active`` points to 0.
"""

from dataclasses import fields

from physai_decode.engines import sampling as twin
from physai_decode.engines.compiler import gdc_launch_dependents
from physai_decode.engines.compiler import gdc_wait
from physai_decode.engines.sampling import Plan
from physai_decode.engines.sampling import Row
from physai_decode.engines.sampling import Sampler
from physai_decode.engines.sampling import SINGLE_ROW
import torch
from torch import Tensor
import triton
import triton.language as tl

BLOCK = 1024            # ids per iteration of a program
SIDE = tl.constexpr(64)
BINS = tl.constexpr(64 * 64)        # 256 per doubling of the distance from the greatest score
NEAREST = tl.constexpr(119 << 8)    # leading bits of 2**-8; smaller distances share a bin
FEW = tl.constexpr(2048)            # scores in the bins of the threshold that stay in registers
LEAST = tl.constexpr(-2**63)
UNIT = tl.constexpr(2.0**44)        # the highest probability, as an integer
# Indices of the floats of `Sampler`.
TEMPERATURE, REST, MIN_P, PENALTY_AT = (tl.constexpr(place) for place in range(4))
# Indices of ``state``, which `_bin` and `_border` write.
FIRST, SECOND, LAST, COUNT, MASS, WHOLE, EQUALS, BORDER = (
    tl.constexpr(place) for place in range(8))
GOLDEN = tl.constexpr(twin.GOLDEN % 2**64)
MIX_1, MIX_2 = (tl.constexpr(number % 2**64) for number in twin.MIX)
MULTIPLY_1, MULTIPLY_2 = (tl.constexpr(number) for number in twin.MULTIPLIERS)


@triton.jit
def _logits(logits, seen, floats, ids, inside, PENALTY: tl.constexpr):
    """Load logits, and apply the repetition penalty; return both."""
    raw = tl.load(logits + ids, mask=inside, other=float('-inf'))
    scores = raw
    if PENALTY:
        penalty = tl.load(floats + PENALTY_AT)
        old = tl.load(seen + ids, mask=inside, other=0) != 0
        less = tl.where(raw < 0, raw * penalty, tl.div_rn(raw, penalty))
        scores = tl.where(old, less, raw)
    return raw, scores


@triton.jit
def _coldness(floats):
    return tl.div_rn(1.0, tl.load(floats + TEMPERATURE))


@triton.jit
def _ordered(scores, ids):
    """Return int64 keys that sort by score, then by id."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7fffffff
    return (bits.to(tl.int64) << 32) | ids.to(tl.int64)


@triton.jit
def _bin_of(distances):
    bits = distances.to(tl.int32, bitcast=True) >> 15
    return tl.minimum(tl.maximum(bits - NEAREST, 0), BINS - 1)


@triton.jit
def _greatest(tops, PROGRAMS: tl.constexpr, PADDED: tl.constexpr):
    programs = tl.arange(0, PADDED)
    return tl.max(tl.load(tops + programs, mask=programs < PROGRAMS, other=float('-inf')), 0)


@triton.jit
def _is_last(arrived, PROGRAMS: tl.constexpr):
    """Return whether this program is the last to arrive; all others have written."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem='acq_rel') == PROGRAMS - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def _allow(logits, mask, out, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Write the logits of the ids whose bit in ``mask`` is set, and -inf for the others."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    bits = tl.load(mask + ids // 8, mask=inside, other=0).to(tl.int32)
    bias = tl.where((bits >> ids % 8) & 1 != 0, 0.0, float('-inf'))
    tl.store(out + ids, tl.load(logits + ids, mask=inside) + bias, mask=inside)  # NaN stays NaN


@triton.jit
def _top(logits, seen, floats, tops, vocab, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
         PENALTY: tl.constexpr, PDL: tl.constexpr, active=None):
    """Write the greatest logit of each program."""
    program = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if active is not None:
        if tl.load(active) == 0:
            return
    best = tl.full((BLOCK,), float('-inf'), tl.float32)
    for start in tl.range(program * BLOCK, vocab, PROGRAMS * BLOCK):
        ids = start + tl.arange(0, BLOCK)
        _, scores = _logits(logits, seen, floats, ids, ids < vocab, PENALTY)
        best = tl.maximum(best, scores)
    tl.store(tops + program, tl.max(best, 0))


@triton.jit
def _mass(scores, top, coldness):
    """Return probabilities relative to the greatest, as integers."""
    return (tl.exp(scores * coldness - top * coldness) * UNIT).to(tl.int64)


@triton.jit
def _limit(mass, rest):
    """Return the limit of top-p: it keeps a token if more likely ones sum to less."""
    return tl.maximum(mass - (rest.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _least(tops, k, PROGRAMS: tl.constexpr, PADDED: tl.constexpr):
    """Return a lower bound of the k greatest logits, from the greatest of each program."""
    programs = tl.arange(0, PADDED)
    best = tl.load(tops + programs, mask=programs < PROGRAMS, other=float('-inf'))
    high = tl.max(best, 0)
    low = tl.min(tl.where(programs < PROGRAMS, best, high), 0)
    for _ in tl.static_range(8):
        middle = 0.5 * low + 0.5 * high
        enough = tl.sum((best >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return tl.where(k > PROGRAMS, float('-inf'), low)


@triton.jit
def _emptied(bins):
    """Load all bins in order, and reset them to zero."""
    places = bins + tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    values = tl.load(places, cache_modifier='.cg')
    tl.store(places, tl.zeros_like(values))
    return tl.reshape(tl.trans(values), (BINS,))


@triton.jit
def _bin(logits, seen, floats, integers, tops, counts, masses, state, number, arrived, vocab,
         BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr,
         PENALTY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, PDL: tl.constexpr,
         active=None):
    """
    Count scores and sum probabilities in bins; find the bins of the thresholds.

    The k-th greatest score is in bin LAST, and the threshold of top-p in bins FIRST to SECOND. The
    exact bin depends on which scores of bin LAST top-k keeps.
    """
    program = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if active is not None:
        if tl.load(active) == 0:
            return
    top = _greatest(tops, PROGRAMS, PADDED)
    coldness = _coldness(floats)
    if TOP_K:
        least = _least(tops, tl.load(integers), PROGRAMS, PADDED)
    for start in tl.range(program * BLOCK, vocab, PROGRAMS * BLOCK):
        ids = start + tl.arange(0, BLOCK)
        _, scores = _logits(logits, seen, floats, ids, ids < vocab, PENALTY)
        live = scores > float('-inf')
        bins = _bin_of(top - scores)
        # Adjacent bins are far apart, because atomics on one memory partition are serialised.
        places = ((bins & (SIDE - 1)) * SIDE) + bins // SIDE
        if TOP_K:
            live &= scores >= least
            tl.atomic_add(counts + places, 1, mask=live, sem='relaxed')
        if TOP_P:
            mass = _mass(scores, top, coldness)
            tl.atomic_add(masses + places, mass, mask=live & (mass > 0), sem='relaxed')
    if _is_last(arrived, PROGRAMS):
        tl.store(number, 0)
        bins = tl.arange(0, BINS)
        last = BINS
        if TOP_K:
            count = _emptied(counts)
            last = tl.sum((tl.cumsum(count, 0) < tl.load(integers)).to(tl.int32), 0)
            tl.store(state + COUNT, tl.sum(tl.where(bins < last, count, 0), 0).to(tl.int64))
        tl.store(state + LAST, last)
        if TOP_P:
            mass = _emptied(masses)
            cumulative = tl.cumsum(mass, 0)
            rest = tl.load(floats + REST)
            surely = tl.sum(tl.where(bins < last, mass, 0), 0)
            at_most = tl.sum(tl.where(bins <= last, mass, 0), 0)
            first = tl.sum((cumulative < _limit(surely, rest)).to(tl.int32), 0)
            second = tl.sum((cumulative < _limit(at_most, rest)).to(tl.int32), 0)
            tl.store(state + FIRST, first)
            tl.store(state + SECOND, second)
            tl.store(state + MASS, tl.sum(tl.where(bins < first, mass, 0), 0))
            tl.store(state + WHOLE, surely)
            tl.store(state + EQUALS, at_most - surely)


@triton.jit
def _found(logits, seen, floats, found, top, coldness, start, n, PENALTY: tl.constexpr):
    """Load FEW of the collected scores: sort keys, integer probabilities and bins."""
    places = start + tl.arange(0, FEW)
    inside = places < n
    ids = tl.load(found + places, mask=inside, other=0, cache_modifier='.cg')
    _, scores = _logits(logits, seen, floats, ids, inside, PENALTY)
    bins = tl.where(inside, _bin_of(top - scores), -1)
    return _ordered(scores * coldness, ids), _mass(scores, top, coldness), bins


@triton.jit
def _beyond(order, mass, bins, logits, seen, floats, found, top, coldness, n, first, last, least,
            than, PENALTY: tl.constexpr):
    """
    Count and sum scores above ``than`` and not below ``least``, in bins ``first`` to ``last``.

    ``order``, ``mass`` and ``bins`` are those of the first FEW scores; others are loaded.
    """
    inside = (bins >= first) & (bins <= last) & (order >= least) & (order > than)
    count = tl.sum(inside.to(tl.int32), 0)
    total = tl.sum(tl.where(inside, mass, 0), 0)
    for start in tl.range(FEW, n, FEW):
        order, mass, bins = _found(logits, seen, floats, found, top, coldness, start, n, PENALTY)
        inside = (bins >= first) & (bins <= last) & (order >= least) & (order > than)
        count += tl.sum(inside.to(tl.int32), 0)
        total += tl.sum(tl.where(inside, mass, 0), 0)
    return count, total


@triton.jit
def _range(order, bins, logits, seen, floats, found, top, coldness, n, first, last, least,
           PENALTY: tl.constexpr):
    """Return the minimum minus one, the maximum and the number of keys in some bins."""
    inside = (bins >= first) & (bins <= last) & (order >= least)
    low = tl.min(tl.where(inside, order, -LEAST - 1), 0)
    high = tl.max(tl.where(inside, order, LEAST), 0)
    count = tl.sum(inside.to(tl.int32), 0)
    for start in tl.range(FEW, n, FEW):
        order, _, bins = _found(logits, seen, floats, found, top, coldness, start, n, PENALTY)
        inside = (bins >= first) & (bins <= last) & (order >= least)
        low = tl.minimum(low, tl.min(tl.where(inside, order, -LEAST - 1), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, order, LEAST), 0))
        count += tl.sum(inside.to(tl.int32), 0)
    return low - 1, high, count


@triton.jit
def _middle(low, high):
    """Return the mean of two int64, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _border(logits, seen, floats, integers, tops, state, found, number, arrived, vocab,
            BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr,
            PENALTY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
            PDL: tl.constexpr, active=None):
    """
    Collect the scores in the bins of the thresholds; the last program finds the thresholds.

    It bisects until one score is left.
    """
    program = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if active is not None:
        if tl.load(active) == 0:
            return
    top = _greatest(tops, PROGRAMS, PADDED)
    last = tl.load(state + LAST).to(tl.int32)
    for start in tl.range(program * BLOCK, vocab, PROGRAMS * BLOCK):
        ids = start + tl.arange(0, BLOCK)
        _, scores = _logits(logits, seen, floats, ids, ids < vocab, PENALTY)
        bins = _bin_of(top - scores)
        wanted = bins == last
        if TOP_P:
            wanted |= (bins >= tl.load(state + FIRST)) & (bins <= tl.load(state + SECOND))
        wanted &= scores > float('-inf')
        ones = wanted.to(tl.int32)
        slot = tl.atomic_add(number, tl.sum(ones, 0), sem='relaxed')
        tl.store(found + slot + tl.cumsum(ones, 0) - 1, ids, mask=wanted)
    if _is_last(arrived, PROGRAMS):
        coldness = _coldness(floats)
        n = tl.load(number, cache_modifier='.cg')
        order, mass, bins = _found(logits, seen, floats, found, top, coldness, 0, n, PENALTY)
        border = tl.full((), LEAST, tl.int64)
        if TOP_P:
            whole = tl.load(state + WHOLE)
        if TOP_K:
            # The greatest `low` with at least k scores above it; ties with the k-th are all kept.
            k = tl.load(integers)
            above = tl.load(state + COUNT)
            low, high, some = _range(order, bins, logits, seen, floats, found, top, coldness, n,
                                     last, last, border, PENALTY)
            low = ((low + 1) >> 32) - 1
            high >>= 32
            few = some * 0      # `some` scores are above `low`, `few` above `high`
            equals = tl.load(state + EQUALS)    # the sum above `low`
            while (high - low > 1) & (some - few > 1):
                middle = _middle(low, high)
                count, total = _beyond(order, mass, bins, logits, seen, floats, found, top,
                                       coldness, n, last, last, border,
                                       (middle << 32) | 0xffffffff, PENALTY)
                enough = above + count >= k
                low = tl.where(enough, middle, low)
                some = tl.where(enough, count, some)
                equals = tl.where(enough, total, equals)
                high = tl.where(enough, high, middle)
                few = tl.where(enough, few, count)
            if last < BINS:
                border = (low + 1) << 32
                if TOP_P:
                    whole += equals
        if TOP_P:
            # The greatest `low_p` above which the sum reaches the limit.
            first = tl.load(state + FIRST).to(tl.int32)
            second = tl.load(state + SECOND).to(tl.int32)
            above_p = tl.load(state + MASS)
            limit = _limit(whole, tl.load(floats + REST))
            low_p, high_p, some_p = _range(order, bins, logits, seen, floats, found, top,
                                           coldness, n, first, second, border, PENALTY)
            few_p = some_p * 0
            while (high_p - low_p > 1) & (some_p - few_p > 1):
                middle = _middle(low_p, high_p)
                count, total = _beyond(order, mass, bins, logits, seen, floats, found, top,
                                       coldness, n, first, second, border, middle, PENALTY)
                full = above_p + total >= limit
                low_p = tl.where(full, middle, low_p)
                some_p = tl.where(full, count, some_p)
                high_p = tl.where(full, high_p, middle)
                few_p = tl.where(full, few_p, count)
            border = tl.maximum(border, low_p + 1)
        tl.store(state + BORDER, border)


@triton.jit
def _mixed(words, first, second):
    """See `sampling.mix`; uint32."""
    words ^= first
    words ^= words >> 16
    words *= MULTIPLY_1
    words ^= words >> 15
    words += second
    words *= MULTIPLY_2
    return words ^ (words >> 16)


@triton.jit
def _keys(seed, position):
    """See `sampling.keys`; int64 scalars to two uint32."""
    bits = (seed.to(tl.uint64) << 32) + position.to(tl.uint64) * GOLDEN
    bits = (bits ^ (bits >> 30)) * MIX_1
    bits = (bits ^ (bits >> 27)) * MIX_2
    bits ^= bits >> 31
    return bits.to(tl.uint32), (bits >> 32).to(tl.uint32)


@triton.jit
def _gumbel(ids, first, second):
    """Return Gumbel noise: the negative logarithms of `sampling.waiting_times`."""
    words = _mixed(_mixed(ids.to(tl.uint32), 0, 0), first, second)
    uniform = ((words & 0x7fffffff).to(tl.int32).to(tl.float32) + 0.5) * (2.0**-31)
    uniform = tl.minimum(uniform, 1 - 2.0**-24)
    # log(1 - u) of a small u would lose precision.
    near = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    return -tl.log(tl.where(uniform < 0.0078125, near, -tl.log(1.0 - uniform)))


@triton.jit
def _pick(logits, seen, floats, integers, tops, state, token, position, history, bests, places,
          arrived, vocab, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr,
          PENALTY: tl.constexpr, DRAW: tl.constexpr, TRUNCATED: tl.constexpr,
          MINIMUM: tl.constexpr, PDL: tl.constexpr, active=None, draft_token=None,
          next_active=None):
    """
    Find the greatest of the kept scores; the last program writes the token.

    A best of infinity marks logits that are not finite. ``next_active`` receives whether the next
    row of the pass is active: whether the token is ``draft_token``.
    """
    program = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if active is not None:
        if tl.load(active) == 0:
            return
    next_position = tl.load(position) + 1
    if DRAW:
        coldness = _coldness(floats)
        first, second = _keys(tl.load(integers + 1), next_position)
    if TRUNCATED:
        border = tl.load(state + BORDER)
    if MINIMUM:
        top = _greatest(tops, PROGRAMS, PADDED) * coldness
        min_p = tl.load(floats + MIN_P)
    best = tl.full((BLOCK,), float('-inf'), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(program * BLOCK, vocab, PROGRAMS * BLOCK):
        ids = start + tl.arange(0, BLOCK)
        raw, scores = _logits(logits, seen, floats, ids, ids < vocab, PENALTY)
        wrong |= tl.where(raw < float('inf'), 0, 1)     # true for NaN too
        if DRAW:
            scores *= coldness
            values = scores + _gumbel(ids, first, second)
            if TRUNCATED:
                values = tl.where(_ordered(scores, ids) >= border, values, float('-inf'))
            if MINIMUM:
                values = tl.where(tl.exp(scores - top) >= min_p, values, float('-inf'))
        else:
            values = scores
        where = tl.where(values > best, ids, where)
        best = tl.maximum(best, values)
    highest = tl.max(best, 0)
    place = tl.min(tl.where(best == highest, where, vocab), 0)
    tl.store(bests + program, tl.where(tl.max(wrong, 0) > 0, float('inf'), highest))
    tl.store(places + program, tl.minimum(place, vocab - 1))
    if _is_last(arrived, PROGRAMS):
        programs = tl.arange(0, PADDED)
        inside = programs < PROGRAMS
        all_bests = tl.load(bests + programs, mask=inside, other=float('-inf'),
                            cache_modifier='.cg')
        all_places = tl.load(places + programs, mask=inside, other=0, cache_modifier='.cg')
        highest = tl.max(all_bests, 0)
        candidates = tl.where((all_bests == highest) & inside, all_places, vocab)
        winner = tl.minimum(tl.min(candidates, 0), vocab - 1).to(tl.int64)
        number = (highest > float('-inf')) & (highest < float('inf'))
        tl.store(token, winner)
        tl.store(position, next_position)
        tl.store(history + next_position, tl.where(number, winner, -1))
        if PENALTY:
            tl.store(seen + winner, 1)
        if draft_token is not None:
            tl.store(next_active, (number & (winner == tl.load(draft_token))).to(tl.int32))


STAGES = ('repetition_penalty', 'temperature', 'top_k', 'top_p', 'min_p')     # with kernels


class TritonSampler(Sampler):
    """Samples tokens with kernels; same arguments and results as `Sampler`."""

    def __init__(self, vocab_size: int, device: torch.device, processors: int = 4,
                 pdl: bool = False):
        """
        Allocate scratch memory.

        :param processors: of the device; up to twice as many programs split the vocabulary.
        :param pdl: launch each kernel while the previous one ends.
        """
        super().__init__(vocab_size, device)
        programs = min(triton.cdiv(vocab_size, BLOCK), 2 * processors)
        self._layout = {'BLOCK': BLOCK, 'PROGRAMS': programs, 'PDL': pdl}
        self._padded = triton.next_power_of_2(programs)
        self._options = {'launch_pdl': True} if pdl else {}

        def scratch(count, dtype):
            return torch.zeros(count, dtype=dtype, device=device)

        self._allowed = scratch(vocab_size, torch.float32)
        self._tops = scratch(programs, torch.float32)
        self._bests = scratch(programs, torch.float32)
        self._places = scratch(programs, torch.int32)
        self._counts = scratch(BINS.value, torch.int32)
        self._masses = scratch(BINS.value, torch.int64)
        self._state = scratch(8, torch.int64)
        self._found = scratch(vocab_size, torch.int32)
        self._number = scratch(1, torch.int32)
        self._arrived = scratch(1, torch.int32)

    def masked(self, plan: Plan, logits: Tensor, row: int = 0) -> tuple[Plan, Tensor]:
        """See `Sampler.masked`."""
        if not plan.mask:
            return plan, logits
        vocab = logits.shape[0]
        _allow[(triton.cdiv(vocab, BLOCK),)](
            logits, self._masks[row], self._allowed, vocab, BLOCK=BLOCK,
            PDL=self._layout['PDL'], num_warps=4, **self._options)
        return plan.unmasked, self._allowed[:vocab]

    def draw(self, plan: Plan, logits: Tensor, position: Tensor, token: Tensor,
             history: Tensor, row: Row = SINGLE_ROW) -> None:
        """See `Sampler.draw`; a plan with a stage that has no kernel runs there, more slowly."""
        plan, logits = self.masked(plan, logits, row.number)
        if any(getattr(plan, spec.name) and spec.name not in STAGES for spec in fields(plan)):
            super().draw(plan, logits, position, token, history, row)
            return
        vocab = logits.shape[0]
        common = {**self._layout, **self._options, 'PENALTY': plan.repetition_penalty}
        if row.number:
            common['active'] = self._active
        after = {} if row.draft_token is None else {
            'draft_token': row.draft_token, 'next_active': self._active}
        given = logits, self._seen.view(torch.uint8), self._floats
        grid = (self._layout['PROGRAMS'],)
        if plan.truncates or plan.min_p:
            _top[grid](*given, self._tops, vocab, num_warps=4, **common)
        if plan.truncates:
            stages = {**common, 'PADDED': self._padded, 'TOP_K': plan.top_k, 'TOP_P': plan.top_p}
            _bin[grid](*given, self._integers, self._tops, self._counts, self._masses,
                       self._state, self._number, self._arrived, vocab, num_warps=8, **stages)
            _border[grid](*given, self._integers, self._tops, self._state, self._found,
                          self._number, self._arrived, vocab, num_warps=8, **stages)
        _pick[grid](
            *given, self._integers, self._tops, self._state, token, position, history,
            self._bests, self._places, self._arrived, vocab, PADDED=self._padded,
            DRAW=plan.temperature, TRUNCATED=plan.truncates, MINIMUM=plan.min_p, num_warps=4,
            **common, **after)
