"""
How the next token is drawn from logits, on the device, with every setting in a tensor.

The settings can change without a new capture. The order is that of the transformers library:
repetition penalty, temperature, top-k, top-p, min-p. The random number is a hash of the seed and
the token's position, so the same seed gives the same text on every device.
"""

from physai_decode.config import SamplingConfig
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131      # 2**64 / golden ratio, odd, as a signed 64-bit integer
_MIX = (-4658895280553007687, -7723592293110705685)    # the multipliers of splitmix64
COLDEST = 1e-30                     # a temperature; float32 can divide by it


def is_plain_greedy(sampling: SamplingConfig) -> bool:
    """Tell whether the likeliest token is all that is asked for."""
    return sampling.temperature == 0 and sampling.repetition_penalty == 1


class Sampler:
    """Draws tokens from logits float32 [vocab]; its state lies at fixed addresses."""

    def __init__(self, vocab_size: int, device: torch.device):
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        # temperature, top_p, min_p, repetition_penalty
        self._floats = torch.ones(4, dtype=torch.float32, device=device)
        # top_k (vocab_size: all), seed
        self._integers = torch.tensor([vocab_size, 0], device=device)
        self._ranks = torch.arange(vocab_size, device=device)

    def begin(self, sampling: SamplingConfig, prompt_ids: Tensor) -> None:
        """
        Take the settings of a request; ``prompt_ids`` int64 [tokens] count as seen.

        A temperature of 0 becomes a top-p of 0, which leaves the likeliest token alone.
        """
        greedy = sampling.temperature == 0
        self._floats.copy_(torch.tensor([
            1.0 if greedy else max(sampling.temperature, COLDEST),
            0.0 if greedy else sampling.top_p, sampling.min_p, sampling.repetition_penalty]))
        vocab = self._seen.shape[0]
        self._integers.copy_(torch.tensor([min(sampling.top_k or vocab, vocab), sampling.seed]))
        self._seen.zero_()
        self._seen[prompt_ids] = True

    def draw(self, logits: Tensor, position: Tensor, token: Tensor) -> None:
        """Write the next id to ``token`` int64 [1]; ``position`` int64 [1] is its place."""
        kept, ids = self.probabilities(logits)
        cumulative = kept.cumsum(0)
        target = _uniform(self._integers[1:2], position) * cumulative[-1:]
        # The greatest float below 1 can still round up to the sum: the last kept one then.
        place = torch.minimum((cumulative <= target).sum(0, keepdim=True), (kept > 0).sum() - 1)
        place.clamp_(min=0)     # where logits are not numbers, none was kept
        torch.index_select(ids, 0, place, out=token)
        self._seen.index_fill_(0, token, True)

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Give (weights, ids), likeliest first, both [vocab]; dropped tokens have weight 0."""
        temperature, top_p, min_p, penalty = self._floats.unbind()
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        scores = torch.where(self._seen, penalised, logits)
        scores, ids = scores.sort(descending=True, stable=True)
        # Equals of the k-th stay, as in transformers.
        least = scores.index_select(0, self._integers[:1] - 1)
        weights = torch.where(
            scores >= least, ((scores - scores[:1]) / temperature).exp(), 0.0)
        weights = weights / weights.sum()
        before = weights.cumsum(0) - weights
        keep = ((before < top_p) & (weights >= min_p * weights[:1])) | (self._ranks == 0)
        return torch.where(keep, weights, 0.0), ids


def _uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Hash two int64 [1] to a float32 [1] in [0, 1) (splitmix64, Steele et al. 2014)."""
    bits = (seed << 32) + position * _GOLDEN
    bits = (bits ^ _shift(bits, 30)) * _MIX[0]
    bits = (bits ^ _shift(bits, 27)) * _MIX[1]
    bits = bits ^ _shift(bits, 31)
    return _shift(bits, 40).float() * 2.0**-24


def _shift(bits: Tensor, count: int) -> Tensor:
    """Shift right without the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
