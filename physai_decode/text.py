"""
Text to token ids and back: chat template, encode, incremental decode.

It works on a tokenizer that is passed in and knows nothing of engines.
"""

from collections.abc import Sequence
from typing import Any

from physai_decode.config import ChatConfig


class TextError(ValueError):
    """A prompt can't be encoded; the message says why."""


def load_tokenizer(folder: str) -> Any:
    """Load a tokenizer from a folder in Hugging Face layout; no code from it is run."""
    raise NotImplementedError


class Text:
    """What turns prompts into ids, and ids into text, for one tokenizer."""

    def __init__(self, tokenizer: Any, chat: ChatConfig) -> None:
        raise NotImplementedError

    def encode(self, prompt: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Give the ids of a prompt after the turns (prompt, answer) of the conversation."""
        raise NotImplementedError

    def decoder(self, stop: Sequence[str] = ()) -> 'Decoder':
        """Give a decoder for one answer."""
        raise NotImplementedError


class Decoder:
    """One answer's ids to text pieces, never splitting a character, stopping at stop texts."""

    stopped: bool                     # a stop text was met; what push gave so far is the answer
    held: bool                        # some text is held back: push or flush will give it

    def push(self, token_id: int) -> str:
        """Take one token id, give the text that it completed, perhaps none."""
        raise NotImplementedError

    def flush(self) -> str:
        """Give what is still held back, at the end of the answer."""
        raise NotImplementedError
