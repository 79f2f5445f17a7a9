"""Engines and a text coder for tests: what comes, and when, is in the test's hands."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import threading

from physai_decode.config import SamplingConfig
from physai_decode.engine import EngineError
from physai_decode.engine import Footprint
from physai_decode.engine import Step

EOS = 0


def footprint(**changes) -> Footprint:
    """Give the shapes of a small model: 1000 bytes of weights, 32 bytes of keys per token."""
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
    what waits in there hangs it.
    """

    def __init__(self, steps: Callable[[list[int]], Iterator[Step]] | None = None,
                 **changes) -> None:
        self.footprint = footprint(**changes)
        self.prompts: list[list[int]] = []
        self.samplings: list[SamplingConfig] = []
        self.open = 0               # generators that began and have not ended
        self.closed = False
        self._steps = steps or self._echo

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Iterator[Step]:
        """Decode after the prompt, as long as its script and its context allow."""
        if not 0 < len(prompt_ids) < self.footprint.max_context:
            raise ValueError(f'{len(prompt_ids)} prompt ids')
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        self.open += 1
        room = self.footprint.max_context - len(prompt_ids)
        try:
            for step in self._steps(list(prompt_ids)):
                yield step
                room -= len(step.token_ids)
                if room <= 0:
                    return
        finally:
            self.open -= 1

    def close(self) -> None:
        """Remember it."""
        self.closed = True

    @staticmethod
    def _echo(prompt_ids: list[int]) -> Iterator[Step]:
        words = ''.join(map(chr, prompt_ids)).split()
        yield from say(words[-1] if words else '')


def say(text: str, end: bool = True) -> Iterator[Step]:
    """Give one step for each character of a text, and one for the end."""
    for character in text:
        yield Step((ord(character),), device_s=0.001)
    if end:
        yield Step((EOS,), device_s=0.001)


def forever(character: str = 'x') -> Iterator[Step]:
    """Give a character until closed."""
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
    """Text in which each character is a token; turns end with a line break."""

    def encode(self, prompt: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Give the characters of the whole conversation."""
        turns = ''.join(f'{asked}\n{answer}\n' for asked, answer in history)
        return [ord(character) for character in turns + prompt]

    def decoder(self, stop: Sequence[str] = ()) -> 'CharacterDecoder':
        """Give a decoder for one answer."""
        return CharacterDecoder(stop)


class CharacterDecoder:
    """Holds a ``^`` back until the next character is known, as a half character would be."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = stop
        self._held = ''

    @property
    def held(self) -> bool:
        """Tell whether a character is held back."""
        return bool(self._held)

    def push(self, token_id: int) -> str:
        """Give the character, with the one held back before it."""
        text, self._held = self._held + chr(token_id), ''
        if text[-1] in self._stop:
            self.stopped = True
            return text[:-1]
        if text[-1] == '^':
            self._held = '^'
            return text[:-1]
        return text

    def flush(self) -> str:
        """Give the character that is held back."""
        text, self._held = self._held, ''
        return text
