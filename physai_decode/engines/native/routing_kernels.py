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

"""The choice of experts for the tokens of a prefill, as Triton kernels."""

from physai_decode.engines.compiler import gdc_launch_dependents
from physai_decode.engines.compiler import gdc_wait
import triton
import triton.language as tl


@triton.jit
def _route(parts, count, ids, routing, tokens, stride, EXPERTS: tl.constexpr, WIDE: tl.constexpr,
           BLOCK: tl.constexpr, TOP_K: tl.constexpr, NORMALISED: tl.constexpr,
           PARTS: tl.constexpr, PDL: tl.constexpr):
    """
    Select a token's experts by its logits ``parts`` [PARTS, tokens, EXPERTS]; see `ops.top_k`.

    ``ids`` and ``routing`` are [TOP_K, tokens]. Tokens that pad the chunk get no experts. If all
    logits are NaN, so are the weights.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    every = tl.arange(0, WIDE)
    own = _logits(parts + token * EXPERTS, every, stride, EXPERTS, PARTS)
    ranked = tl.where(own == own, own, float('-inf'))
    rank = tl.zeros((WIDE,), tl.int32)
    for first in tl.static_range(0, WIDE, BLOCK):
        other = first + tl.arange(0, BLOCK)
        others = _logits(parts + token * EXPERTS, other, stride, EXPERTS, PARTS)
        others = tl.where(others == others, others, float('-inf'))
        before = (others[None, :] > ranked[:, None]) | (
            (others[None, :] == ranked[:, None]) & (other[None, :] < every[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    weight = tl.exp(own - tl.max(ranked, 0))
    taken = (rank < TOP_K) & (every < EXPERTS)
    total = tl.sum(tl.where(taken, weight, 0.0) if NORMALISED else weight, 0)
    place = rank * tokens + token
    real = token < tl.load(count)
    tl.store(ids + place, tl.where(real, every, -1), mask=taken)
    tl.store(routing + place, weight / total, mask=taken)


@triton.jit
def _logits(parts, every, stride, EXPERTS: tl.constexpr, PARTS: tl.constexpr):
    """Add the parts of the logits of experts; of others, -inf."""
    logits = tl.zeros(every.shape, tl.float32)
    for part in tl.static_range(PARTS):
        logits += tl.load(parts + part * stride + every, mask=every < EXPERTS,
                          other=float('-inf')).to(tl.float32)
    return logits


@triton.jit
def _count(ids, counts, total, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Count how often each expert is among ``ids`` [total]; a program for each expert."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    found = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, total, BLOCK):
        place = first + tl.arange(0, BLOCK)
        chosen = tl.load(ids + place, mask=place < total, other=-1)
        found += (chosen == tl.program_id(0)).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(found, 0))


@triton.jit
def _arrange(ids, counts, slots, owners, total, blocks, EXPERTS: tl.constexpr, WIDE: tl.constexpr,
             TOKENS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr):
    """
    Assign the places of ``ids`` [total] to blocks of TOKENS; a program for each expert.

    An expert has whole blocks, in which ``slots`` are its places in order, and -1 behind them.
    ``owners`` is the expert of each of the ``blocks``, and -1 of those that are left; MOST is
    their number rounded up.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    every = tl.arange(0, WIDE)
    need = tl.cdiv(tl.load(counts + every, mask=every < EXPERTS, other=0), TOKENS)
    begin = tl.sum(tl.where(every < expert, need, 0), 0)
    own = tl.sum(tl.where(every == expert, need, 0), 0)
    each = tl.arange(0, MOST)
    tl.store(owners + begin + each, tl.zeros((MOST,), tl.int32) + expert, mask=each < own)
    free = tl.sum(need, 0) + each
    tl.store(owners + free, tl.full((MOST,), -1, tl.int32), mask=(free < blocks) & (expert == 0))
    slots += begin * TOKENS
    seen = 0
    for first in tl.range(0, total, BLOCK):
        place = first + tl.arange(0, BLOCK)
        mine = tl.load(ids + place, mask=place < total, other=-1) == expert
        number = seen + tl.cumsum(mine.to(tl.int32), 0)
        tl.store(slots + number - 1, place, mask=mine)
        seen += tl.sum(mine.to(tl.int32), 0)
    last = (own - 1) * TOKENS + tl.arange(0, TOKENS)
    tl.store(slots + last, tl.full((TOKENS,), -1, tl.int32), mask=(last >= seen) & (own > 0))
