"""
Text to token ids and back: chat template, encoding, incremental decoding.

What a user writes is text and nothing else: no prompt can yield a special token, so none can close
its own turn. For that the encoder is a twin of the model's tokenizer in which all special tokens
have secret names; the chat template's own are renamed before the user's text is put into it, and
all is encoded in one go, so that the ids are those that the model was trained on.

It works on a tokenizer that is passed in and knows nothing of engines.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
from pathlib import Path
import re
import secrets
from typing import Any

from physai_decode.config import ChatConfig

_UNKNOWN = '\ufffd'     # what a decoder gives for bytes that are no character, or not yet
_WINDOW_TOKENS = 16     # a character, or what a tokenizer makes of bytes that are none, is shorter


class TextError(ValueError):
    """A prompt can't be encoded, or a tokenizer can't be had; the message says why."""


def load_tokenizer(folder: str) -> Any:
    """
    Load the tokenizer of a model.

    :param folder: a folder in Hugging Face layout. No code from it is run, and nothing is fetched.
    :raises TextError: naming the folder and what is wrong with it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The library raises whatever its parts raise: OSError, ValueError, bare Exception.
        if 'trust_remote_code' in str(error):
            reason = 'it is code in that folder, which is never run: choose another model'
        elif not Path(folder, 'tokenizer.json').is_file():
            reason = ('it has no tokenizer.json: copy or download the model again, or save it '
                      'with its fast tokenizer')
        else:
            told = ' '.join(str(error).split('\n', 2)[:2])
            reason = (f'{type(error).__name__}: {told}; copy or download config.json, '
                      'tokenizer.json and tokenizer_config.json again')
        raise TextError(f'no tokenizer can be loaded from {folder}: {reason}') from error


class Text:
    """What turns prompts into ids, and ids into text, for one tokenizer."""

    def __init__(self, tokenizer: Any, chat: ChatConfig) -> None:
        """
        Prepare the tokenizer.

        :param tokenizer: of the transformers library, a fast one (made of tokenizers' parts).
        :param chat: which template to use, and the system prompt.
        :raises TextError: the tokenizer is not a fast one, or its template refuses the
            conversation that ``chat`` makes.
        """
        backend = getattr(tokenizer, 'backend_tokenizer', None)
        if backend is None:
            raise TextError(
                f'the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json: '
                'save the model with its fast tokenizer')
        added = backend.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._chat = chat
        self._backend = backend
        self._special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._nonce = secrets.token_hex(8)
        # Runs of blanks keep their names: they are in many vocabularies, and are what they say.
        self._names = {token.content: f'\ue001{self._nonce}:{id_}\ue001'
                       for id_, token in added.items() if token.content.strip(' \t\n\r\u2581')}
        # The longest name first, as the tokenizer itself matches.
        self._any_name = re.compile('|'.join(
            re.escape(name) for name in sorted(self._names, key=len, reverse=True)) or r'(?!)')
        self._encoder = _renamed(backend, self._names)
        self.has_template = chat.template == 'auto' and bool(tokenizer.chat_template)
        self.encode('')                 # a template that refuses its first message does so here

    def encode(self, prompt: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """
        Give the ids of a prompt in its conversation.

        Without a template, the system prompt, the turns and the prompt follow one another as they
        are, after what the tokenizer puts before every text. A template sees place-holders for
        all texts: it can trim them, but not look into them (some drop what a model thought in
        earlier turns; that stays).

        :param prompt: any text; special tokens in it are text.
        :param history: turns (prompt, answer) before it, the oldest first.
        :raises TextError: half a surrogate pair in it, or a template that refuses it.
        """
        system = self._chat.system_prompt
        said = [*([('system', system)] if system else []),
                *(one for turn in history for one in zip(('user', 'assistant'), turn)),
                ('user', prompt)]
        for role, content in said:
            _check(role, content)
        if not self.has_template:
            whole = ''.join(content for _, content in said)
            return self._ids(whole, add_special_tokens=True)
        # Each content is a place-holder in the template, and takes its place after the template's
        # own special tokens have been renamed. Blanks around it, of a kind that no template
        # writes, tell whether the template trims its contents.
        places = [f'\ue000{self._nonce}:{index}\ue000' for index in range(len(said))]
        whole = self._any_name.sub(lambda match: self._names[match[0]], self._render([
            {'role': role, 'content': f'\u2003{place}\u2003'}
            for (role, _), place in zip(said, places)]))
        if places[-1] not in whole:
            raise TextError("the model's chat template leaves out the prompt: "
                            'set chat.template to off')

        def put(place: re.Match[str]) -> str:
            text = said[int(place[2])][1]
            text = text if place[1] else text.lstrip()
            return text if place[3] else text.rstrip()

        whole = re.sub(f'(\u2003?)\ue000{self._nonce}:(\\d+)\ue000(\u2003?)', put, whole)
        return self._ids(whole, add_special_tokens=False)

    def decoder(self, stop: Sequence[str] = ()) -> 'Decoder':
        """Give a decoder for one answer, which ends at any of the texts in ``stop``."""
        return Decoder(self._backend, self._special_ids, stop)

    def _ids(self, text, add_special_tokens):
        # As a batch: encoding one text keeps every other thread waiting, a megabyte for a second.
        batch = self._encoder.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            # A template is a program of the model's maker, and may raise anything.
            roles = ', '.join(message['role'] for message in messages)
            raise TextError(
                f"the model's chat template refuses a conversation of {roles}: {error}; leave "
                'chat.system_prompt empty if that is why, or set chat.template to off') from error


class Decoder:
    """
    One answer's ids to pieces of text, never splitting a character.

    The pieces joined are what the tokenizer makes of all ids at once without special tokens, up to
    the first stop text. (Of bytes that are no UTF-8 at all, a tokenizer that falls back to bytes
    makes unknown characters by the run; there the number of these can differ.) The work for a
    token does not grow with the answer.
    """

    def __init__(self, backend: Any, special_ids: frozenset[int], stop: Sequence[str]) -> None:
        """
        Begin an answer.

        :param backend: what decodes, a ``tokenizers.Tokenizer``.
        :param special_ids: ids that are no text.
        :param stop: texts that end the answer and are not part of it; empty ones do nothing.
        """
        self.stopped = False            # a stop text was met; the pieces so far are the answer
        self._backend = backend
        self._special_ids = special_ids
        self._stop = tuple(text for text in stop if text)
        self._window: list[int] = []    # the last complete group of ids, then the open one
        self._open = 0                  # where in the window the open group begins
        self._done = ''                 # the part of the window's text that has been given out
        self._held = ''                 # text that may be the beginning of a stop text

    @property
    def held(self) -> bool:
        """Tell whether there is text that ``push`` or ``flush`` has yet to give."""
        return bool(self._held) or len(self._window) > self._open

    def push(self, token_id: int) -> str:
        """Take one token id and give the text that it completed, perhaps none."""
        if self.stopped or token_id in self._special_ids:
            return ''
        if self._backend.id_to_token(token_id) is None:     # a model can have more ids than texts
            return ''
        self._window.append(token_id)
        text = self._decode(self._window)
        complete = not text.endswith(_UNKNOWN)
        if complete or len(self._window) > _WINDOW_TOKENS:
            ready = text if complete else text[:-1]
        else:
            ready = text.rstrip(_UNKNOWN)
        # A tokenizer that falls back to bytes makes a whole run of them unknown while its last
        # character is not complete; what was given out is then longer than what is ready.
        piece = ready[len(self._done):]
        if complete and piece:
            self._window, self._open = self._window[self._open:], 0
            self._done = self._decode(self._window)
            self._open = len(self._window)
        elif len(self._window) > _WINDOW_TOKENS:
            rest = len(text) - len(ready)
            self._window, self._open = self._window[-_WINDOW_TOKENS // 2:], 0
            tail = self._decode(self._window)
            self._done = tail[:len(tail) - rest]
        else:
            self._done += piece
        return self._until_stop(piece)

    def flush(self) -> str:
        """Give what is still held back, at the end of the answer."""
        if self.stopped:
            return ''
        piece = self._until_stop(self._decode(self._window)[len(self._done):])
        piece += '' if self.stopped else self._held
        self._window, self._open, self._done, self._held = [], 0, '', ''
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _until_stop(self, piece: str) -> str:
        """Give the text up to a stop text, but for an end that may be the beginning of one."""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ''
            return text[:min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]


def _check(role: str, content: str) -> None:
    """Refuse what is no text."""
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise TextError(f'the {role} text holds half a surrogate pair at character {error.start}, '
                        'which is no text: send valid UTF-8') from None


def _overlap(text: str, stop: str) -> int:
    """Give the length of the longest end of text that is a beginning of stop, but not all."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _renamed(backend: Any, names: Mapping[str, str]) -> Any:
    """
    Copy a tokenizer with other names for its added tokens, and the same ids.

    :raises TextError: an id could not be kept.
    """
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state['truncation'] = state['padding'] = None
    for token in state['added_tokens']:
        token['content'] = names.get(token['content'], token['content'])
    model = state['model']
    if isinstance(model['vocab'], dict):
        model['vocab'] = {names.get(word, word): id_ for word, id_ in model['vocab'].items()}
    else:
        model['vocab'] = [[names.get(word, word), score] for word, score in model['vocab']]
    if model.get('unk_token') in names:
        model['unk_token'] = names[model['unk_token']]
    try:
        copy = Tokenizer.from_str(json.dumps(state))
    except Exception as error:          # the library raises nothing narrower
        raise TextError(f'the tokenizer builds its special tokens from others: {error}') from error
    for name, secret in names.items():
        if copy.token_to_id(secret) != backend.token_to_id(name):
            raise TextError(f'the tokenizer gives the id of {name!r} to another token: '
                            'its tokenizer.json does not agree with itself')
    return copy
