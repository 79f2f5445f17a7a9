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

"""An engine and a text coder whose output and timing the test controls."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import threading
from types import MappingProxyType
from typing import Any

from physai_decode.config import SamplingConfig
from physai_decode.constraint import Vocabulary
from physai_decode.decode_loop import Step
from physai_decode.engine import Choice
from physai_decode.engine import Constraint
from physai_decode.engine import Elapsed
from physai_decode.engine import EngineError
from physai_decode.engine import Footprint
from physai_decode.request import Message
from physai_decode.speech import Manner
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

EOS = 0


def footprint(**changes) -> Footprint:
    """Return the shapes of a small model: 1000 bytes of weights, 32 bytes of keys per token."""
    known = {
        'engine': 'fake', 'model_type': 'fake', 'dtype': 'float32', 'quantization': 'none',
        'device': 'cpu', 'device_name': 'fake device', 'device_uuid': '', 'cuda_graph': 'off',
        'max_context': 64, 'vocab_size': 0x110000, 'eos_token_ids': (EOS,),
        'read_weight_bytes': 1000, 'checkpoint_weight_bytes': 1500,
        'layers': 2, 'kv_heads': 1, 'head_dim': 2, 'kv_element_bytes': 4}
    return Footprint(**{**known, **changes})


class FakeEngine:
    """
    Answers with the steps of a script.

    ``steps`` returns the steps of the answer to a prompt. By default the answer is the last word
    of the prompt, character by character, and an end token. If ``steps`` raises or waits, so does
    the engine. After the last step, there are only end tokens.
    """

    def __init__(self, steps: Callable[[list[int]], Iterator[Step]] | None = None,
                 chunk_tokens: tuple[int, int] = (1, 1000), **changes) -> None:
        self.footprint = footprint(**changes)
        self.chunk_tokens = chunk_tokens
        self.prompts: list[list[int]] = []
        self.samplings: list[SamplingConfig] = []
        self.fed: list[int] = []    # the ids in the cache
        self.asked: list[int] = []      # by each step, how many follow
        self.closed = False
        self._steps = steps or self._echo
        self._script: Iterator[Choice] = iter(())

    def rewind(self, length: int) -> int:
        """Cut the cache."""
        del self.fed[length:]
        return length

    def feed(self, token_ids: Sequence[int]) -> Elapsed:
        """Append a chunk to the cache."""
        self.fed += token_ids
        return lambda: 0.0

    def first(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constraint: Constraint | None = None) -> Choice:
        """Begin the script; the next allowed id replaces one that the constraint forbids."""
        assert self.fed == list(prompt_ids)
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        self._script = self._choices(list(prompt_ids))
        self._constraint = constraint
        return self._choose()

    def step(self, remaining: int) -> Choice:
        """Take the next step of the script."""
        self.asked.append(remaining)
        self.fed.append(self._last)
        return self._choose()

    def close(self) -> None:
        """Record the call."""
        self.closed = True

    def _choose(self):
        choice = next(self._script, Choice(EOS, None))
        if self._constraint is not None:
            choice = choice._replace(token_id=_allowed(self._constraint.mask(), choice.token_id))
        self._last = choice.token_id
        return choice

    def _choices(self, prompt_ids):
        for step in self._steps(prompt_ids):
            for token_id in step.token_ids:
                yield Choice(token_id, step.device_s)

    @staticmethod
    def _echo(prompt_ids: list[int]) -> Iterator[Step]:
        words = ''.join(map(chr, prompt_ids)).split()
        yield from say(words[-1] if words else '')


def _allowed(mask: bytearray, token_id: int) -> int:
    """Return the first allowed id from this one on, wrapping around."""
    ids = [id_ for id_ in range(8 * len(mask)) if mask[id_ // 8] >> id_ % 8 & 1]
    return min(ids, key=lambda id_: (id_ - token_id) % (8 * len(mask)))


def say(text: str, end: bool = True) -> Iterator[Step]:
    """Yield a step for each character of a text, and one for the end."""
    for character in text:
        yield Step((ord(character),), device_s=0.001)
    if end:
        yield Step((EOS,), device_s=0.001)


def forever(character: str = 'x') -> Iterator[Step]:
    """Yield steps with the same character without end."""
    while True:
        yield Step((ord(character),))


class Gate:
    """Makes an engine wait before each step until the test permits it."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self.waiting = threading.Event()    # the engine waits, or waited

    def open(self, count: int = 1) -> None:
        """Permit this number of steps."""
        for _ in range(count):
            self._permits.release()

    def steps(self, source: Iterator[Step]) -> Iterator[Step]:
        """Yield each step of a source when it is permitted."""
        for step in source:
            self.waiting.set()
            if not self._permits.acquire(timeout=60):
                raise EngineError('no test opened the gate')
            yield step


class CharacterText:
    """
    A text coder with one token per character; turns end with a line break.

    By default, the model has no thoughts and no tools; tests can set another ``manner``.
    """

    manner = Manner()
    tools: Sequence[Mapping[str, Any]] = ()     # that the last prompt was encoded with

    def encode(self, messages: Sequence[Message],
               chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
               heartbeat: Callable[[], None] = lambda: None,
               tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the characters of the whole conversation."""
        self.tools = tools
        return [ord(character) for character in '\n'.join(each.content for each in messages)]

    def count(self, text: str) -> int:
        """Count the characters."""
        return len(text)

    def detokenizer(self, stop: Sequence[str] = (),
                    seen: Sequence[str] = ()) -> 'CharacterDetokenizer':
        """Return a detokenizer for one answer."""
        return CharacterDetokenizer(stop)

    def tail(self, prompt_ids: Sequence[int]) -> str:
        """Return the last characters."""
        return ''.join(map(chr, prompt_ids[-20:]))

    def vocabulary(self, size: int, end_ids: Sequence[int]) -> Vocabulary:
        """Return a vocabulary that compiles constraints for characters below 128."""
        return Vocabulary(byte_tokenizer(), size, end_ids)

    def close(self) -> None:
        """Do nothing."""


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of 256 tokens, each the byte of its id."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))          # the characters of unprintable bytes
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


class CharacterDetokenizer:
    """Holds back a ``^`` until the next character, like an incomplete character."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = stop
        self._held = ''

    @property
    def held(self) -> bool:
        """Return whether a character is held back."""
        return bool(self._held)

    def push(self, token_id: int) -> str:
        """Return the character, with the one held back before it."""
        text, self._held = self._held + chr(token_id), ''
        if text[-1] in self._stop:
            self.stopped = True
            return text[:-1]
        if text[-1] == '^':
            self._held = '^'
            return text[:-1]
        return text

    def flush(self) -> str:
        """Return the character that is held back."""
        text, self._held = self._held, ''
        return text
