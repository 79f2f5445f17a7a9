"""
Text to token ids: chat template and encoding.

What a user writes is text and nothing else: no prompt can yield a special token, so none can close
its own turn. For that the encoder is a twin of the model's tokenizer in which all special tokens
have secret names; the chat template's own are renamed before the user's text is put into it, and
all is encoded in one go, so that the ids are those that the model was trained on.

It works on a tokenizer that is passed in and knows nothing of engines. What a model's files make
it do has no limits here: `TextProcess` sets them.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from importlib.metadata import version
from inspect import signature
import json
from pathlib import Path
import re
import secrets
from types import MappingProxyType
from typing import Any

from physai_decode.config import ChatConfig
from physai_decode.conversation import Conversation
from physai_decode.detokenizer import Detokenizer
from physai_decode.request import Message

SANDBOX = (3, 1, 6)             # the first jinja2 from whose sandbox no way out is published


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
    except MemoryError:
        raise
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
        :raises TextError: the tokenizer is not a fast one, its template refuses the conversation
            that ``chat`` makes, or the installed jinja2 can't confine it.
        """
        backend = getattr(tokenizer, 'backend_tokenizer', None)
        if backend is None:
            raise TextError(
                f'the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json: '
                'save the model with its fast tokenizer')
        added = backend.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self.backend = backend
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._nonce = secrets.token_hex(8)
        # Runs of blanks keep their names: they are in many vocabularies, and are what they say.
        self._names = {token.content: f'\ue001{self._nonce}:{id_}\ue001'
                       for id_, token in added.items() if token.content.strip(' \t\n\r\u2581')}
        # The longest name first, as the tokenizer itself matches.
        self._any_name = re.compile('|'.join(
            re.escape(name) for name in sorted(self._names, key=len, reverse=True)) or r'(?!)')
        self._encoder = _renamed(backend, self._names)
        self.has_template = chat.template == 'auto' and bool(tokenizer.chat_template)
        if self.has_template:
            _check_sandbox()
        self._reserved = {'messages', *tokenizer.special_tokens_map,
                          *signature(type(tokenizer).apply_chat_template).parameters}
        # A template that refuses the conversation's beginning does so here.
        self.encode(Conversation(chat.system_prompt).messages([], ''))

    def encode(self, messages: Sequence[Message],
               chat_template_kwargs: Mapping[str, Any] = MappingProxyType({})) -> list[int]:
        """
        Give the ids of a conversation, up to where the answer begins.

        Without a template the messages follow one another as they are, after what the tokenizer
        puts before every text. A template sees place-holders for all texts: it can trim them, but
        not look into them (some drop what a model thought in earlier turns; that stays).

        :param messages: any texts; special tokens in them are text.
        :param chat_template_kwargs: further variables of the template.
        :raises TextError: half a surrogate pair in a text, or a template that refuses it.
        """
        for role, content in messages:
            _check(role, content)
        if not self.has_template:
            if chat_template_kwargs:
                raise TextError('chat_template_kwargs can not be used: there is no chat template')
            whole = ''.join(content for _, content in messages)
            return self._ids(whole, add_special_tokens=True)
        # Each content is a place-holder in the template, and takes its place after the template's
        # own special tokens have been renamed. Blanks around it, of a kind that no template
        # writes, tell whether the template trims its contents.
        places = [f'\ue000{self._nonce}:{index}\ue000' for index in range(len(messages))]
        whole = self._any_name.sub(lambda match: self._names[match[0]], self._render([
            {'role': role, 'content': f'\u2003{place}\u2003'}
            for (role, _), place in zip(messages, places)], chat_template_kwargs))
        if places[-1] not in whole:
            raise TextError("the model's chat template leaves out the last message: "
                            'set chat.template to off')

        def put(place: re.Match[str]) -> str:
            text = messages[int(place[2])].content
            text = text if place[1] else text.lstrip()
            return text if place[3] else text.rstrip()

        whole = re.sub(f'(\u2003?)\ue000{self._nonce}:(\\d+)\ue000(\u2003?)', put, whole)
        return self._ids(whole, add_special_tokens=False)

    def count(self, text: str) -> int:
        """Count the tokens of a text by itself; what is no text counts too."""
        return len(self._ids(text.encode(errors='replace').decode(), add_special_tokens=False))

    def detokenizer(self, stop: Sequence[str] = ()) -> Detokenizer:
        """Give what turns one answer's ids into text; it ends at any of the texts in ``stop``."""
        return Detokenizer(self.backend, self.special_ids, stop)

    def _ids(self, text, add_special_tokens):
        # As a batch: encoding one text keeps every other thread waiting, a megabyte for a second.
        batch = self._encoder.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def _render(self, messages: list[dict[str, str]], kwargs: Mapping[str, Any]) -> str:
        taken = sorted(kwargs.keys() & self._reserved)
        special = next((name for name, value in kwargs.items()
                        if type(value) is str and self._any_name.search(value)), None)
        if taken or special:
            raise TextError(f'chat_template_kwargs.{special or taken[0]} can not be set: it '
                            + ('holds a special token' if special else 'is not a variable that '
                               'belongs to the chat template'))
        for name, value in kwargs.items():
            if type(value) is str:
                _check(f'chat_template_kwargs.{name}', value)
        try:
            return str(self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **kwargs))
        except MemoryError:
            raise
        except Exception as error:
            # A template is a program of the model's maker, and may raise anything.
            roles = ', '.join(message['role'] for message in messages)
            raise TextError(
                f"the model's chat template refuses a conversation of {roles}: {error}; leave "
                'chat.system_prompt empty if that is why, or set chat.template to off') from error


def _check_sandbox() -> None:
    """Refuse every template where jinja2's sandbox has a published escape."""
    installed = version('jinja2')
    if tuple(map(int, re.findall(r'\d+', installed)[:3])) < SANDBOX:
        wanted = '.'.join(map(str, SANDBOX))
        raise TextError(
            f'jinja2 {installed} is installed, from whose sandbox a chat template can break out: '
            f"pip install 'jinja2>={wanted}', or set chat.template to off")


def _check(name: str, content: str) -> None:
    """Refuse what is no text."""
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise TextError(f'the {name} text holds half a surrogate pair at character {error.start}, '
                        'which is no text: send valid UTF-8') from None


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
    except MemoryError:
        raise
    except Exception as error:          # the library raises nothing narrower
        raise TextError(f'the tokenizer builds its special tokens from others: {error}') from error
    for name, secret in names.items():
        if copy.token_to_id(secret) != backend.token_to_id(name):
            raise TextError(f'the tokenizer gives the id of {name!r} to another token: '
                            'its tokenizer.json does not agree with itself')
    return copy
