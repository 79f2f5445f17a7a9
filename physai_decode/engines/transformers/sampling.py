"""How the library's own logits processors choose a token."""

from collections.abc import Sequence

from physai_decode.config import SamplingConfig
import torch
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.logits_process import MinPLogitsWarper
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper
from transformers.generation.logits_process import TopKLogitsWarper
from transformers.generation.logits_process import TopPLogitsWarper


class Chooser:
    """
    The library's logits processors in its own order, and one random generator, for one request.

    The repetition penalty covers the prompt and the answer; it also acts on the likeliest token.
    """

    def __init__(self, sampling: SamplingConfig, prompt: Sequence[int], limit: int,
                 device: torch.device):
        """
        Set up the processors.

        :param limit: tokens of prompt and answer at most.
        """
        self._processors = LogitsProcessorList()
        self._generator = None
        self._ids = None
        if sampling.repetition_penalty != 1.0:
            self._processors.append(
                RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
            self._ids = torch.empty((1, limit), dtype=torch.long, device=device)
            self._ids[0, :len(prompt)] = torch.tensor(prompt, device=device)
            self._count = len(prompt)
        if sampling.temperature == 0.0:
            return
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._processors.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p:
            self._processors.append(MinPLogitsWarper(float(sampling.min_p)))

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, likeliest: torch.Tensor) -> torch.Tensor:
        """
        Choose a token.

        :param logits: float32 [1, vocab]; they are left as they are.
        :param likeliest: the token [1] that has the highest of them.
        :returns: the token's id [1], on the device.
        """
        if not self._processors:
            return likeliest
        ids = None if self._ids is None else self._ids[:, :self._count]
        scores = self._processors(ids, logits)
        if self._generator is None:
            token = scores.argmax(-1)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator).view(1)
        if self._ids is not None:
            self._ids[0, self._count:self._count + 1] = token
            self._count += 1
        return token
