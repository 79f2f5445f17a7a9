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
Sample the next token from logits, with the stages that a request needs.

The mask of a constraint comes first, if there is one. The stages after it and their order are
those of the transformers library: repetition penalty, temperature, top-k, top-p, min-p; then one
token is drawn from those that are kept. They keep the same tokens, with two exceptions: of equal
scores, top-p keeps those with the highest ids (the library leaves this to an unstable sort), and
if a sum of probabilities equals top-p within the rounding of float32, one token more or less may
be kept.

Exponential races draw the token: each kept token has an exponential waiting time with its
probability as the rate, and the shortest time wins. The waiting times are a hash of the seed, the
position and the id, so a position gets the same token on every device, and however the step is
run.

If the logits have a NaN or positive infinity, or only negative infinity, the history, which the
host reads, gets `NO_TOKEN`. The next step still gets an id of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import astuple
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from functools import cached_property
import math
from typing import Any
from typing import NamedTuple

import numpy as np
from physai_decode.config import SamplingConfig
from physai_decode.engine import Constraint
from physai_decode.engine import NO_TOKEN
import torch
from torch import Tensor

ROWS = 8                            # maximum of a pass
COLDEST = 1e-20                     # minimum temperature; logits divided by it fit float32
# The odd multipliers of splitmix64, as signed integers; the first is 2**64 / golden ratio.
GOLDEN, *MIX = (number - 2**64 for number in (
    0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb))
MULTIPLIERS = (0x7feb352d, 0x846ca68b)                  # of lowbias32 (hash-prospector, Wellons)
FEW = 4096                          # scores up to which sorting is faster on a CPU
SPARSE = 16                         # if fewer than 1 in SPARSE ids is allowed, gathering is faster


@dataclass(frozen=True)
class Plan:
    """
    The stages of one request; hashable, and independent of the values of the settings.

    A captured step belongs to one plan, and reads the values from tensors.
    """

    repetition_penalty: bool = False
    temperature: bool = False       # draw at random; otherwise greedy
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    mask: bool = False              # before all others: apply a constraint

    @classmethod
    def of(cls, sampling: SamplingConfig, constrained: bool = False) -> 'Plan':
        """Return the plan for these settings."""
        penalty = sampling.repetition_penalty != 1
        if sampling.temperature == 0:       # no other stage drops the most likely token
            return cls(penalty, mask=constrained)
        return cls(penalty, True, sampling.top_k > 0, sampling.top_p < 1, sampling.min_p > 0,
                   constrained)

    @property
    def key(self) -> str:
        """The names of the stages, such as ``temperature+top_p``; ``greedy`` if there are none."""
        return '+'.join(spec.name for spec, needed in zip(fields(self), astuple(self))
                        if needed) or 'greedy'

    @cached_property
    def unmasked(self) -> 'Plan':
        """The stages after the mask."""
        return replace(self, mask=False)

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p is used."""
        return self.top_k or self.top_p


GREEDY = Plan()


class Row(NamedTuple):
    """
    One row of a pass.

    A row is active only if all draft tokens before it were accepted; an inactive row changes no
    state. ``draft_token`` int64 [1] is the token that the next row reads, None for the last row.
    """

    number: int = 0
    draft_token: Tensor | None = None


SINGLE_ROW = Row()


class Sampler:
    """
    Samples tokens with operations of fixed shapes, as a captured step requires.

    It is also the reference for the kernels and for `HostSampler`.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        # temperature, 1 - top_p, min_p, repetition_penalty
        self._floats = torch.ones(4, dtype=torch.float32, device=device)
        # top_k, seed
        self._integers = torch.tensor([vocab_size, 0], device=device)
        self._ids = torch.arange(vocab_size, device=device)
        self._mixed = mix(self._ids.int(), 0, 0)
        # The masks, one bit per id, and what each byte value adds to the logits of its eight ids.
        self._masks = torch.full(
            (ROWS, (vocab_size + 7) // 8), 255, dtype=torch.uint8, device=device)
        self._staged = torch.zeros_like(
            self._masks, device='cpu', pin_memory=device.type == 'cuda')
        bits = torch.arange(256).view(-1, 1) >> torch.arange(8) & 1
        self._biases = torch.where(bits.bool(), 0.0, -math.inf).to(device)
        self._active = torch.ones(1, dtype=torch.int32, device=device)    # whether a `Row` is

    def begin(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constrained: bool = False) -> Plan:
        """
        Write the settings of a request to the tensors that the step reads.

        :param prompt_ids: for the repetition penalty.
        :param constrained: whether `restrict` is called before each draw.
        """
        plan = Plan.of(sampling, constrained)
        if plan.temperature:
            self._floats.copy_(self._sent([
                max(sampling.temperature, COLDEST), 1 - sampling.top_p, sampling.min_p,
                sampling.repetition_penalty]))
            self._integers.copy_(self._sent([
                min(sampling.top_k, len(self._ids)), sampling.seed]))
        elif plan.repetition_penalty:
            self._floats[3] = sampling.repetition_penalty
        if plan.repetition_penalty:
            self._seen.zero_()
            self._seen[self._sent(prompt_ids)] = True
        return plan

    def _sent(self, numbers: Sequence[float]) -> Tensor:
        """Return numbers on the device, without waiting for its work."""
        sent = torch.tensor(numbers)
        if self._seen.is_cuda:
            return sent.pin_memory().to(self._seen.device, non_blocking=True)
        return sent

    def restrict(self, mask: bytearray, row: int = 0) -> None:
        """
        Write the mask for the next draw; the previous draw must have ended.

        :param mask: see `physai_decode.engine.Constraint.mask`.
        :param row: of the next pass.
        """
        staged = self._staged[row]
        staged.copy_(torch.frombuffer(mask, dtype=torch.uint8))
        self._masks[row].copy_(staged, non_blocking=True)

    def masked(self, plan: Plan, logits: Tensor, row: int = 0) -> tuple[Plan, Tensor]:
        """Apply the mask, if there is one; return the other stages and the logits."""
        if not plan.mask:
            return plan, logits
        bias = self._biases.index_select(0, self._masks[row].int()).view(-1)[:len(logits)]
        return plan.unmasked, logits + bias     # NaN stays NaN

    def draw(self, plan: Plan, logits: Tensor, position: Tensor, token: Tensor,
             history: Tensor, row: Row = SINGLE_ROW) -> None:
        """
        Sample the token of the next position.

        :param plan: the result of `begin`.
        :param logits: float32 [vocab]; not modified.
        :param position: int64 [1], the previous position; incremented.
        :param token: int64 [1]; receives an id of the vocabulary.
        :param history: int64 [max_context + 1]; receives the id at the new position, or `NO_TOKEN`
            if the logits are not finite.
        :param row: the row of a pass; rows are drawn in order.
        """
        place = position.add_(1) if row is SINGLE_ROW else position + 1
        plan, logits = self.masked(plan, logits, row.number)
        if plan == GREEDY:
            chosen = logits.argmax(0, keepdim=True)
            best = logits.index_select(0, chosen)   # a NaN counts as the greatest
        else:
            best = logits.max().view(1)
            _, scores = self.kept(plan, logits)
            if plan.temperature:
                # The greatest quotient has the shortest waiting time.
                scores = scores.softmax(0) / waiting_times(
                    self._mixed, *keys(self._integers[1:], place))
            chosen = scores.argmax(0, keepdim=True)
        shown = torch.where(best.isfinite(), chosen, NO_TOKEN)
        if row is not SINGLE_ROW:
            if row.number:
                active = self._active > 0
                place = torch.where(active, place, position)
                chosen = torch.where(active, chosen, token)
                shown = torch.where(active, shown, history.index_select(0, place))
            if row.draft_token is not None:
                accepted = (best.isfinite() & (chosen == row.draft_token)).int()
                self._active.copy_(accepted * self._active if row.number else accepted)
            position.copy_(place)
        token.copy_(chosen)
        if plan.repetition_penalty:
            self._seen.index_fill_(0, token, True)
        history.index_copy_(0, place, shown)

    def kept(self, plan: Plan, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """
        Run the stages before the draw.

        :returns: ids in ascending order, None for the whole vocabulary, and their scores; a
            dropped token is missing, or its score is -inf.
        """
        temperature, rest, min_p, penalty = self._floats.unbind()
        scores = logits
        if plan.repetition_penalty:
            scores = torch.where(self._seen, _penalised(scores, penalty), scores)
        if plan.temperature:
            scores = scores / temperature
        if plan.truncates:
            ranked, ids = scores.sort(stable=True)
            if plan.top_k:
                least = ranked.index_select(0, len(ranked) - self._integers[:1])
                ranked = torch.where(ranked < least, -math.inf, ranked)
            if plan.top_p:
                cumulative = ranked.softmax(0).cumsum(0)
                keep = (cumulative > rest) | (self._ids == len(ranked) - 1)
                ranked = torch.where(keep, ranked, -math.inf)
            scores = torch.empty_like(ranked).index_copy_(0, ids, ranked)
        if plan.min_p:
            scores = torch.where(_too_unlikely(scores, min_p), -math.inf, scores)
        return None, scores


class HostSampler(Sampler):
    """
    Samples tokens on a CPU, where shapes may depend on values.

    It never sorts the vocabulary: top-k selects, and top-p sums probabilities in bins of similar
    scores, and sorts only the bin with the threshold.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        super().__init__(vocab_size, device)
        self._sampling = SamplingConfig()
        self._seen_ids = torch.empty(vocab_size, dtype=torch.int64)
        self._seen_count = 0
        self._bits = self._masks[0].numpy()
        self._by_byte = self._biases.numpy()
        self._bias = np.zeros((len(self._bits), 8), np.float32)
        self._flat = torch.from_numpy(self._bias).view(-1)[:vocab_size]
        self._allowed = torch.empty(vocab_size)
        self._mixed_ids = self._mixed.numpy()

    def begin(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constrained: bool = False) -> Plan:
        """See `Sampler.begin`."""
        self._sampling = sampling
        plan = super().begin(sampling, prompt_ids, constrained)
        if plan.repetition_penalty:
            ids = self._seen.nonzero().view(-1)
            self._seen_count = len(ids)
            self._seen_ids[:len(ids)] = ids
        return plan

    def restrict(self, mask: bytearray, row: int = 0) -> None:
        """See `Sampler.restrict`."""
        self._bits = np.frombuffer(mask, np.uint8)

    def masked(self, plan: Plan, logits: Tensor, row: int = 0) -> tuple[Plan, Tensor]:
        """See `Sampler.masked`; if few ids are allowed, `kept` drops the others instead."""
        if not plan.mask or plan.temperature and self._is_sparse():
            return plan, logits
        np.take(self._by_byte, self._bits, 0, self._bias, 'clip')
        return plan.unmasked, torch.add(logits, self._flat, out=self._allowed)

    def draw(self, plan: Plan, logits: Tensor, position: Tensor, token: Tensor,
             history: Tensor, row: Row = SINGLE_ROW) -> None:
        """See `Sampler.draw`; the host calls it for active rows only."""
        place = int(position) + 1
        plan, logits = self.masked(plan, logits)
        known = logits.numpy()
        chosen = int(known.argmax())                # a NaN counts as the greatest
        if not math.isfinite(known[chosen]):
            chosen = NO_TOKEN
        elif plan != GREEDY:
            chosen = self._chosen(plan, logits, place)
        position.fill_(place)
        history[place] = chosen
        chosen = max(chosen, 0)
        token.fill_(chosen)
        if plan.repetition_penalty and not self._seen[chosen]:
            self._seen[chosen] = True
            self._seen_ids[self._seen_count] = chosen
            self._seen_count += 1

    def _is_sparse(self):
        count = int.from_bytes(self._bits, 'little').bit_count()
        return 0 < SPARSE * count < len(self._allowed)

    def _chosen(self, plan, logits, place):
        ids, scores = self.kept(plan, logits)
        drawn = scores
        if plan.temperature and len(scores) > 1:
            mixed = self._mixed_ids if ids is None else self._mixed_ids[ids.numpy()]
            drawn = scores.softmax(0).div_(
                host_waiting_times(mixed, *host_keys(self._sampling.seed, place)))
        chosen = int(drawn.numpy().argmax())
        if plan.mask and scores.numpy()[chosen] == -math.inf:   # then all allowed scores are
            return NO_TOKEN
        return chosen if ids is None else int(ids.numpy()[chosen])

    def kept(self, plan: Plan, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """See `Sampler.kept`."""
        sampling, scores, ids = self._sampling, logits, None
        if plan.repetition_penalty:
            seen = self._seen_ids[:self._seen_count]
            scores = scores.index_copy(
                0, seen, _penalised(scores[seen], sampling.repetition_penalty))
        if plan.mask:                               # `masked` did not apply it
            allowed = np.unpackbits(self._bits, bitorder='little').view(bool).nonzero()[0]
            ids, scores = torch.from_numpy(allowed), torch.from_numpy(scores.numpy()[allowed])
        if plan.temperature and sampling.temperature != 1:
            scores = scores / max(sampling.temperature, COLDEST)
        if plan.top_k and sampling.top_k < len(scores):
            chosen = most_likely(scores, sampling.top_k)
            ids, scores = chosen if ids is None else ids[chosen], scores[chosen]
        if plan.top_p:
            chosen = nucleus(scores, 1 - sampling.top_p)
            ids, scores = chosen if ids is None else ids[chosen], scores[chosen]
        if plan.min_p:
            chosen = (~_too_unlikely(scores, sampling.min_p)).nonzero().view(-1)
            ids, scores = chosen if ids is None else ids[chosen], scores[chosen]
        return ids, scores


class Drawer:
    """Samples the tokens of a request, for engines that do not capture sampling with the step."""

    def __init__(self, vocab_size: int, max_context: int, device: torch.device):
        """Select the fastest sampler for the device."""
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._history = torch.zeros(max_context + 1, dtype=torch.int64, device=device)
        self._sampler = _fastest(vocab_size, device)
        self._plan = GREEDY
        self._constraint: Constraint | None = None

    @torch.inference_mode()
    def begin(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constraint: Constraint | None = None) -> None:
        """Start a request with its settings, prompt and constraint."""
        self._position.fill_(len(prompt_ids) - 1)
        self._constraint = constraint
        self._plan = self._sampler.begin(sampling, prompt_ids, constraint is not None)

    @torch.inference_mode()
    def draw(self, logits: Tensor, place: int) -> Tensor:
        """
        Sample a token, and write it to ``token``.

        :param logits: float [vocab].
        :param place: the position of the token.
        :returns: int64 [1] on the device: the id, or `NO_TOKEN`.
        """
        if self._constraint is not None:
            self._sampler.restrict(self._constraint.mask())
        self._sampler.draw(self._plan, logits.float(), self._position, self.token, self._history)
        return self._history[place:place + 1]


def _fastest(vocab_size: int, device: torch.device) -> Sampler:
    if device.type == 'cpu':
        return HostSampler(vocab_size, device)
    try:
        from physai_decode.engines.sampling_kernels import TritonSampler
    except ImportError:
        return Sampler(vocab_size, device)
    return TritonSampler(
        vocab_size, device, torch.cuda.get_device_properties(device).multi_processor_count)


def most_likely(scores: Tensor, count: int) -> Tensor:
    """Return the ids, ascending, of the ``count`` highest scores and of ties with the last."""
    if count > FEW:             # unlike topk, this takes the same time for any count
        least = scores.kthvalue(len(scores) - count + 1).values
        return (scores >= least).nonzero().view(-1)
    highest, ids = scores.topk(count + 1)
    if highest[-1] < highest[-2]:
        return ids[:-1].sort().values
    return (scores >= highest[-2]).nonzero().view(-1)


def nucleus(scores: Tensor, rest: float) -> Tensor:
    """
    Return the indices, ascending, of the scores that top-p keeps, at least one.

    :param scores: float32 [n].
    :param rest: 1 - top_p; the least likely scores whose probabilities sum to at most this are
        dropped.
    """
    probabilities = scores.softmax(0)
    border, below = None, 0.0
    if len(scores) > FEW:
        # By the leading bits of the distance from the greatest score; less likely is higher.
        bins = (scores.max() - scores).view(torch.int32) >> 15
        sums = torch.bincount(bins, probabilities.double(), 2**16).flip(0).cumsum(0)
        last = len(sums) - 1
        # The first bin, from the least likely, with which the sum exceeds `rest`.
        place = min(int((sums.float() <= rest).sum()), last)
        below = float(sums[place - 1]) if place else 0.0
        border = (bins == last - place).nonzero().view(-1)
        keep = bins < last - place
    else:
        keep = torch.zeros(len(scores), dtype=torch.bool)
    part = scores if border is None else scores[border]
    order = part.sort(stable=True).indices
    if border is not None:
        order = border[order]
    cumulative = probabilities[order].cumsum(0, dtype=torch.float64).add_(below).float()
    keep[order] = cumulative > rest
    keep[order[-1:]] = True
    return keep.nonzero().view(-1)


def _penalised(scores, penalty):
    return torch.where(scores < 0, scores * penalty, scores / penalty)


def _too_unlikely(scores, min_p):
    probabilities = scores.softmax(0)
    return probabilities < min_p * probabilities.max()


def keys(seed: Tensor, position: Tensor) -> Sequence[Tensor]:
    """Hash two int64 [1] to two int32 [1] (splitmix64, Steele et al. 2014)."""
    bits = (seed << 32) + position * GOLDEN
    bits = (bits ^ _shifted(bits, 30)) * MIX[0]
    bits = (bits ^ _shifted(bits, 27)) * MIX[1]
    return (bits ^ _shifted(bits, 31)).view(torch.int32).split(1)


def host_keys(seed: int, place: int) -> tuple[int, int]:
    """Compute `keys` with Python integers."""
    bits = (seed << 32) + place * GOLDEN & 2**64 - 1
    bits = (bits ^ bits >> 30) * MIX[0] & 2**64 - 1
    bits = (bits ^ bits >> 27) * MIX[1] & 2**64 - 1
    bits ^= bits >> 31
    first, second = bits & 2**32 - 1, bits >> 32
    return first - (first >> 31 << 32), second - (second >> 31 << 32)


def mix(words: Any, first: Tensor | int, second: Tensor | int) -> Any:
    """Hash int32 words of torch or NumPy with two keys."""
    words = words ^ first
    words ^= _shifted(words, 16)
    words *= MULTIPLIERS[0]
    words ^= _shifted(words, 15)
    words += second
    words *= MULTIPLIERS[1] - 2**32
    words ^= _shifted(words, 16)
    return words


def waiting_times(mixed: Tensor, first: Tensor | int, second: Tensor | int) -> Tensor:
    """
    Return exponential random numbers with mean 1, float32 [n].

    :param mixed: int32 [n], the ids, hashed once.
    :param first: the first key of the seed and position; ``second`` is the other.
    """
    uniform = (mix(mixed, first, second) & 0x7fffffff).float()
    uniform.add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


def host_waiting_times(mixed: np.ndarray, first: int, second: int) -> Tensor:
    """Compute `waiting_times`, bit for bit; calls of NumPy take less time than those of torch."""
    uniform = (mix(mixed, first, second) & 0x7fffffff).astype(np.float32)
    uniform += 0.5
    uniform *= 2.0**-31
    np.minimum(uniform, 1 - 2.0**-24, out=uniform)
    np.negative(uniform, out=uniform)
    return torch.from_numpy(uniform).log1p_().neg_()


def _shifted(words, count):
    """Shift right logically."""
    width = 8 * words.dtype.itemsize
    return (words >> count) & ((1 << (width - count)) - 1)
