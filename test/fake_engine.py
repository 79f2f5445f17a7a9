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

"""Engines and a text coder for tests: what comes, and when, is in the test's hands."""

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
    Says what it is told to.

    ``steps`` gives the steps of the answer to a prompt's ids; by default it says the prompt's last
    word, character by character, and the end. What is raised in there comes from the engine, and
    what waits in there hangs it. Where the script is over, only the end comes.
    """

    def __init__(self, steps: Callable[[list[int]], Iterator[Step]] | None = None,
                 chunk_tokens: tuple[int, int] = (1, 1000), **changes) -> None:
        self.footprint = footprint(**changes)
        self.chunk_tokens = chunk_tokens
        self.prompts: list[list[int]] = []
        self.samplings: list[SamplingConfig] = []
        self.fed: list[int] = []    # what stands for the cache
        self.closed = False
        self._steps = steps or self._echo
        self._script: Iterator[Choice] = iter(())

    def rewind(self, length: int) -> int:
        """Keep that much."""
        del self.fed[length:]
        return length

    def feed(self, token_ids: Sequence[int]) -> float:
        """Take a chunk."""
        self.fed += token_ids
        return 0.0

    def first(self, sampling: SamplingConfig, prompt_ids: Sequence[int],
              constraint: Constraint | None = None) -> Choice:
        """Begin the script; what a constraint does not allow gives way to the next id allowed."""
        assert self.fed == list(prompt_ids)
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        self._script = self._choices(list(prompt_ids))
        self._constraint = constraint
        return self._choose()

    def step(self, remaining: int) -> Choice:
        """Go on with it."""
        self.fed.append(self._last)
        return self._choose()

    def close(self) -> None:
        """Remember it."""
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
    """Return the first id from this one on that a mask allows, going round."""
    ids = [id_ for id_ in range(8 * len(mask)) if mask[id_ // 8] >> id_ % 8 & 1]
    return min(ids, key=lambda id_: (id_ - token_id) % (8 * len(mask)))


def say(text: str, end: bool = True) -> Iterator[Step]:
    """Return one step for each character of a text, and one for the end."""
    for character in text:
        yield Step((ord(character),), device_s=0.001)
    if end:
        yield Step((EOS,), device_s=0.001)


def forever(character: str = 'x') -> Iterator[Step]:
    """Return a character until closed."""
    while True:
        yield Step((ord(character),))


class Gate:
    """Lets an engine's steps through one by one: the engine waits until the test opens."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self.waiting = threading.Event()    # the engine has come to the gate

    def open(self, count: int = 1) -> None:
        """Let so many steps through."""
        for _ in range(count):
            self._permits.release()

    def steps(self, source: Iterator[Step]) -> Iterator[Step]:
        """Hold each step of a source back until the gate is opened for it."""
        for step in source:
            self.waiting.set()
            if not self._permits.acquire(timeout=60):
                raise EngineError('no test opened the gate')
            yield step


class CharacterText:
    """
    Text in which each character is a token; turns end with a line break.

    A ``manner`` other than that of a model without thoughts and tools is the test's.
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


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of 256 tokens, each the byte of its id."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))          # what stands for a byte that is no character
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


class CharacterDetokenizer:
    """Holds a ``^`` back until the next character is known, as a half character would be."""

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
