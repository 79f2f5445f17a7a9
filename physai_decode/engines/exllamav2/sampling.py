"""How the library's own sampler chooses a token, on the host."""

from importlib import import_module
import random
from types import SimpleNamespace

from physai_decode.engine import NO_TOKEN
import torch


class Chooser:
    """The library's sampler, one random generator and the ids so far, for one request."""

    def __init__(self, sampling, prompt, limit, vocab_size):
        sampler = import_module('exllamav2.generator').ExLlamaV2Sampler
        # To the library a top_p of 0, a min_p of 1 and a temperature of 0 mean that they are off.
        one = sampling.temperature == 0.0 or sampling.top_p == 0.0 or sampling.min_p == 1.0
        self._sample = sampler.sample
        self._settings = sampler.Settings(
            temperature=sampling.temperature or 1.0, top_k=1 if one else sampling.top_k,
            top_p=sampling.top_p, min_p=sampling.min_p,
            token_repetition_penalty=sampling.repetition_penalty)
        self._random = random.Random(sampling.seed)
        # All that the sampler asks a tokenizer.
        self._tokenizer = SimpleNamespace(get_vocab_size=lambda: vocab_size)
        self._ids = torch.empty((1, limit), dtype=torch.long)
        self._ids[0, :len(prompt)] = torch.tensor(prompt)
        self._count = len(prompt)

    def __call__(self, logits):
        """Choose a token's id from float16 logits [1, 1, padded vocab] on the device."""
        logits = logits.float().cpu()
        if not logits.max().isfinite():             # NaN is the largest of all
            return NO_TOKEN
        token = self._sample(
            logits, self._settings, self._ids[:, :self._count],
            self._random.random(), self._tokenizer)[0]
        self._ids[0, self._count] = number = int(token)
        self._count += 1
        return number
