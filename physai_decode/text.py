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
Text to token ids: chat template and encoding.

What a user writes is text and nothing else: no prompt can yield a special token, nor another by
which the model or its template ends a turn or begins one, so none can close its own turn. For that
the encoder is a twin of the model's tokenizer in which all these have secret names; the chat
template's own are renamed before the user's text is put into it, and all is encoded in one go, so
that the ids are those that the model was trained on. Other added tokens, such as `<tool_call>`,
are encoded wherever they stand, as the library does. Tools with such a name in them are refused.

It works on a tokenizer that is passed in and knows nothing of engines. What a model's files make
it do has no limits here: `TextProcess` sets them.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from importlib.metadata import version
from inspect import signature
import json
import re
import secrets
from types import MappingProxyType
from typing import Any

from physai_decode.config import ChatConfig
from physai_decode.conversation import Conversation
from physai_decode.detokenizer import Detokenizer
from physai_decode.request import Call
from physai_decode.request import Message
from physai_decode.speech import Manner
from physai_decode.tokenizer_files import TextError
from physai_decode.tool_forms import FORMS
from physai_decode.tool_forms import reads

SANDBOX = (3, 1, 6)             # the first jinja2 from whose sandbox no way out is published
_BLANKS = ' \t\n\r\u2581'
# What begins and ends a thought, in the families that have them.
_THOUGHTS = (('<think>', '</think>'), ('[THINK]', '[/THINK]'), ('<seed:think>', '</seed:think>'),
             ('<|START_THINKING|>', '<|END_THINKING|>'))
# A call and a tool by which a template is tried.
_TRIAL = Call('000000001', 'trial_tool', {'trial_key': 'trial_value'})
_TRIAL_TOOL = {'type': 'function', 'function': {
    'name': _TRIAL.name, 'description': 'None.', 'parameters': {
        'type': 'object', 'properties': {'trial_key': {'type': 'string', 'description': 'None.'}},
        'required': ['trial_key']}}}


class Text:
    """What turns prompts into ids, and ids into text, for one tokenizer."""

    def __init__(self, tokenizer: Any, chat: ChatConfig, vocab_size: int | None = None,
                 end_ids: Iterable[int] = ()) -> None:
        """
        Prepare the tokenizer.

        :param tokenizer: of the transformers library, a fast one (made of tokenizers' parts).
        :param chat: which template to use, and the system prompt.
        :param vocab_size: ids that the model has; None where that is not known.
        :param end_ids: ids that end an answer of the model, by its config.
        :raises TextError: the tokenizer is not a fast one or not the model's, there is no such
            template, it refuses the conversation that ``chat`` makes, or the installed jinja2
            can't confine it.
        """
        backend = getattr(tokenizer, 'backend_tokenizer', None)
        if backend is None:
            raise TextError(
                f'the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json: '
                'save the model with its fast tokenizer')
        self._tokenizer = tokenizer
        self.backend = backend
        self.template, self._source = _template(tokenizer, chat.template)
        self._tool_source = self._source
        if self._source:
            _check_sandbox()
            if chat.template == 'auto' and isinstance(tokenizer.chat_template, dict):
                self._tool_source = tokenizer.chat_template.get('tool_use', self._source)
        self._reserved = {'messages', *tokenizer.special_tokens_map,
                          *signature(type(tokenizer).apply_chat_template).parameters}
        self._nonce = secrets.token_hex(8)
        added = {id_: token.content for id_, token in backend.get_added_tokens_decoder().items()}
        # Runs of blanks keep their names: they are in many vocabularies, and are what they say.
        names = {name: id_ for id_, name in added.items() if name.strip(_BLANKS)}
        named = {each for each in tokenizer.special_tokens_map.values() if isinstance(each, str)}
        self.special_ids = frozenset(
            id_ for id_, token in backend.get_added_tokens_decoder().items()
            if token.special or token.content in named)
        self._any_name, self._words = _any(names), _any(())
        own_ends = self._find_end_ids(tokenizer.eos_token_id)
        secret_ids = {*self.special_ids, *own_ends, *end_ids, *self._turn_ids(names)}
        self._names = {name: f'\ue001{self._nonce}:{id_}\ue001'
                       for name, id_ in names.items() if id_ in secret_ids}
        self._any_name = _any(self._names)
        self._words = _any({word for source in {self._source, self._tool_source}
                            for word in _words(source, self._names)})
        self._encoder = _renamed(backend, self._names)
        # What ends an answer: by the config, the tokenizer and the template, without plain text.
        ends = dict.fromkeys((*end_ids, *own_ends))
        self.end_ids = tuple(id_ for id_ in ends if id_ in added) or tuple(ends)
        self._shows_calls = self._texts_arguments = False
        self.manner = self._find_manner(added)
        # A template that refuses the conversation's beginning does so here.
        ids = self.encode(Conversation(chat.system_prompt).messages([], '?'))
        _check_ids(backend, ids, vocab_size)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template, and it is used."""
        return bool(self._source)

    def encode(self, messages: Sequence[Message],
               chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
               tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """
        Give the ids of a conversation, up to where the answer begins.

        Without a template, and where a message has no role, the messages follow one another as
        they are, after what the tokenizer puts before every text. A template sees place-holders
        for all texts, but for blanks at their ends and for the words that it has in its own
        source: it can trim a text, look for a switch in it, or cut it where a thought ends.

        :param messages: any texts; special tokens in them are text.
        :param chat_template_kwargs: further variables of the template.
        :param tools: that the template tells the model of.
        :raises TextError: half a surrogate pair in a text, or a template that refuses it or leaves
            it out.
        """
        for message in messages:
            _check(message.role or 'raw', message.content)
            _check(f'{message.role} reasoning', message.reasoning_content)
        if tools and not self.manner.form:
            raise TextError(f'tools can not be used: {self.manner.reason}')
        if not self._source or any(not message.role for message in messages):
            calls = any(message.tool_calls for message in messages)
            if chat_template_kwargs or calls:
                raise TextError(f'{"tool_calls" if calls else "chat_template_kwargs"} can not be '
                                'used: there is no chat template, or none is used')
            whole = ''.join(message.content for message in messages)
            return self._ids(whole, add_special_tokens=True)
        self._check_kwargs(chat_template_kwargs)
        self._check_tools(tools)
        texts: list[str] = []
        call_ids: dict[str, str] = {}
        shown, begins = [], []
        for message in messages:
            begins.append(len(texts))
            shown.append(self._message(message, texts, call_ids))
        begins.append(len(texts))
        whole = self._render(shown, chat_template_kwargs, tools=tools)
        # The template's own special tokens are renamed, then each text takes its place.
        whole = self._any_name.sub(lambda match: self._names[match[0]], whole)
        place = re.compile(rf'\ue000{self._nonce}:(\d+)(\\*)"\ue000')
        there = {int(index) for index, _ in place.findall(whole)}
        for number, (role, *_) in enumerate(messages):
            places = range(begins[number], begins[number + 1])
            if role != 'assistant' and places and there.isdisjoint(places):
                raise TextError(
                    f"the model's chat template leaves out the {_which(number, messages)}: " + (
                        'leave chat.system_prompt empty, or ' if role == 'system' else '')
                    + 'set chat.template to off')
        whole = place.sub(lambda match: _escaped(texts[int(match[1])], len(match[2])), whole)
        return self._ids(whole, add_special_tokens=False)

    def count(self, text: str) -> int:
        """Count the tokens of a text by itself; what is no text counts too."""
        return len(self._ids(text.encode(errors='replace').decode(), add_special_tokens=False))

    def detokenizer(self, stop: Sequence[str] = ()) -> Detokenizer:
        """Give what turns one answer's ids into text; it ends at any of the texts in ``stop``."""
        return Detokenizer(self.backend, self.special_ids, stop)

    def _message(self, message: Message, texts: list[str],
                 call_ids: dict[str, str]) -> dict[str, Any]:
        """
        Give what the template sees of a message.

        :param call_ids: gets what stands for the id of each call: nine digits, which every
            family's template takes.
        """
        def id_of(call_id: str) -> str:
            return call_ids.setdefault(call_id, f'{len(call_ids) + 1:09}')

        content, calls = message.content, message.tool_calls
        if calls and not self._shows_calls:
            if not self.manner.form:
                raise TextError(f'tool_calls can not be used: {self.manner.reason}')
            written = FORMS[self.manner.form].written(call[1:] for call in calls)
            content, calls = f'{content}\n{written}' if content else written, ()
        found: dict[str, Any] = {
            'role': message.role, 'content': self._shown(content, texts)}
        if message.reasoning_content:
            found['reasoning_content'] = self._shown(message.reasoning_content, texts)
        if calls:
            found['tool_calls'] = [self._call(call, id_of(call.id), texts) for call in calls]
        if message.tool_call_id:
            found['tool_call_id'] = id_of(message.tool_call_id)
        return found | ({'name': message.name} if message.name else {})

    def _call(self, call: Call, call_id: str, texts: list[str]) -> dict[str, Any]:
        arguments: Any = self._hidden_texts(call.arguments, texts)
        if self._texts_arguments:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {'id': call_id, 'type': 'function',
                'function': {'name': call.name, 'arguments': arguments}}

    def _hidden_texts(self, value: Any, texts: list[str]) -> Any:
        """Give a value of JSON with all its texts, the keys' too, as the template sees them."""
        if isinstance(value, str):
            _check('arguments', value)
            return self._shown(value, texts)
        if isinstance(value, Mapping):
            return {self._hidden_texts(key, texts): self._hidden_texts(each, texts)
                    for key, each in value.items()}
        return [self._hidden_texts(each, texts) for each in value] if isinstance(value, list) \
            else value

    def _ids(self, text, add_special_tokens):
        # As a batch: encoding one text keeps every other thread waiting, a megabyte for a second.
        batch = self._encoder.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def _shown(self, content: str, texts: list[str]) -> str:
        """
        Give what the template sees of a text.

        A place-holder has a quotation mark, which shows how the template writes the text: as JSON
        it has a backslash before it.

        :param texts: gets what the place-holders stand for.
        """
        def hidden(text: str) -> str:
            core = text.strip()
            if not core:
                return text
            texts.append(core)
            begin = text.index(core)
            place = f'\ue000{self._nonce}:{len(texts) - 1}"\ue000'
            return f'{text[:begin]}{place}{text[begin + len(core):]}'

        parts, end = [], 0
        for word in self._words.finditer(content):
            parts += [hidden(content[end:word.start()]), word[0]]
            end = word.end()
        return ''.join([*parts, hidden(content[end:])])

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
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

    def _check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        told = json.dumps(tools, ensure_ascii=False)
        _check('tools', told)
        if special := self._any_name.search(told):
            raise TextError(f'tools hold {special[0]!r}, a special token of the model: leave it '
                            'out')

    def _render(self, messages: list[dict[str, Any]], kwargs: Mapping[str, Any],
                answer: bool = True, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(
                messages, chat_template=self._tool_source if tools else self._source,
                tokenize=False, add_generation_prompt=answer,
                **({'tools': [*tools]} if tools else {}), **kwargs))
        except MemoryError:
            raise
        except Exception as error:
            # A template is a program of the model's maker, and may raise anything.
            roles = ', '.join(message['role'] for message in messages)
            raise TextError(
                f"the model's chat template refuses a conversation of {roles}: {error}; leave "
                'chat.system_prompt empty if that is why, or set chat.template to off') from error

    def _trial(self, *roles: str, answer: bool) -> str:
        """Give what the template makes of one-letter texts; empty where it refuses them."""
        try:
            return self._render([{'role': role, 'content': f'\ue000{index}'}
                                 for index, role in enumerate(roles)], {}, answer)
        except TextError:
            return ''

    def _find_manner(self, added: Mapping[int, str]) -> Manner:
        """Find how thoughts are marked, and in what form the template writes a call."""
        if not self._source:
            return Manner(reason='there is no chat template to tell the model of them')
        names = set(added.values())
        opens, closes = next((pair for pair in _THOUGHTS if pair[1] in self._source
                              or names.issuperset(pair)), ('', ''))
        form, reason = self._find_form()
        ids = self.backend.encode(f'\n{closes}\n\n', add_special_tokens=False).ids
        return Manner(opens, closes, tuple(ids) if opens else (), form, reason)

    def _find_form(self) -> tuple[str, str]:
        """Give the form of calls, empty where no tools can be offered, and the reason."""
        asked = {'role': 'user', 'content': 'Go.'}
        try:
            told = self._render([asked], {}, tools=[_TRIAL_TOOL])
        except TextError as error:
            return '', f'the chat template refuses tools: {error.__cause__}'
        if _TRIAL.name not in told:
            return '', 'the chat template leaves them out'
        for self._texts_arguments in (False, True):
            call = self._call(_TRIAL, _TRIAL.id, [])
            call['function']['arguments'] = json.dumps(_TRIAL.arguments) \
                if self._texts_arguments else _TRIAL.arguments
            try:
                said = self._render(
                    [asked, {'role': 'assistant', 'content': '', 'tool_calls': [call]},
                     {'role': 'tool', 'content': 'Done.', 'tool_call_id': _TRIAL.id}], {},
                    tools=[_TRIAL_TOOL])
            except TextError:
                continue
            known = [name for name, form in FORMS.items() if reads(form, said, _TRIAL[1:])
                     and not _is_other(name, self._tool_source)]
            if known:
                self._shows_calls = True
                return known[0], 'the chat template writes calls so'
            if 'trial_value' in said:
                return '', ('the chat template writes calls in a form that is not known: '
                            f'known are {", ".join(FORMS)}')
        known = [name for name, form in FORMS.items()
                 if not _is_other(name, self._tool_source)
                 and any(begin in self._tool_source for begin in form.begins)]
        if not known:
            return '', f'the chat template names no form of calls: known are {", ".join(FORMS)}'
        return known[0], 'the chat template asks for calls so'

    def _find_end_ids(self, eos_id: int | None) -> tuple[int, ...]:
        """Give the tokenizer's own end token, and what the template ends an answer with."""
        ends = [] if eos_id is None else [eos_id]
        if self._source:
            said = self._trial('user', 'assistant', answer=False) or \
                self._trial('user', 'assistant', 'user', answer=False)
            after = said.partition('\ue0001')[2].lstrip()
            if match := self._any_name.match(after):
                ends.append(self.backend.token_to_id(match[0]))
        return tuple(dict.fromkeys(ends))

    def _turn_ids(self, names: Mapping[str, int]) -> set[int]:
        """Give the added tokens that the template writes, but for markup, which comes in pairs."""
        if not self._source:
            return set()
        said = self._trial('user', 'assistant', 'user', answer=True) or \
            self._trial('user', answer=True)
        return {names[name] for name in self._any_name.findall(said)
                if _other_of_pair(name) not in names}


def _template(tokenizer: Any, asked: str) -> tuple[str, str]:
    """Give the name and the source of the chat template; the source of none is empty."""
    known = tokenizer.chat_template or {}
    if isinstance(known, str):
        known = {'default': known}
    if asked == 'off':
        return 'off', ''
    if asked == 'auto' and not known:
        return 'none', ''
    name = 'default' if asked == 'auto' else asked
    if name not in known:
        raise TextError(
            f'chat.template is {asked}, but of that name the model has no chat template: it has '
            f'{", ".join(sorted(known)) or "none"}; set chat.template to one of its names, or to '
            'off')
    source = known[name]
    for key, token in getattr(tokenizer, 'absent_tokens', {}).items():
        if key in source:
            raise TextError(
                f'the chat template asks for {key}, which tokenizer_config.json has as {token!r}, '
                'a token that tokenizer.json lacks: copy or download the model again, or set '
                'chat.template to off')
    return name, source


def _is_other(form: str, source: str) -> bool:
    """Tell two forms that read the same texts apart, by a template that has one of them."""
    return {'hermes': '<code>' in source, 'smollm3': '<code>' not in source,
            'mistral_list': '[ARGS]' in source,
            'mistral_args': '[ARGS]' not in source}.get(form, False)


def _escaped(text: str, backslashes: int) -> str:
    """Write a text as the quotation mark after so many backslashes was: as JSON, or in such."""
    while backslashes:
        text, backslashes = json.dumps(text, ensure_ascii=False)[1:-1], backslashes // 2
    return text


def _any(names: Iterable[str]) -> 're.Pattern[str]':
    """Give what matches any of these, the longest first, as a tokenizer does; of none, nothing."""
    return re.compile('|'.join(
        re.escape(name) for name in sorted(names, key=len, reverse=True)) or r'(?!)')


def _words(source: str, names: Iterable[str]) -> set[str]:
    """
    Give the texts in a template's source, which it may look for in what it is given.

    No part of them can be a part of a secret token, whatever stands beside them.
    """
    if not source:
        return set()
    from jinja2 import Environment

    words = {_unescaped(token[1:-1]) for _, kind, token in Environment().lex(source)
             if kind == 'string'}
    return {word for word in words if len(word.strip()) > 1
            and not any(_overlap(word, name) for name in names)}


def _unescaped(token: str) -> str:
    """Read a string as jinja2 does."""
    try:
        return token.encode('ascii', 'backslashreplace').decode('unicode-escape')
    except UnicodeDecodeError:
        return ''                       # the template itself will be refused for it


def _overlap(word: str, name: str) -> bool:
    """Tell whether a part of one text can be a part of the other, at its place."""
    return word in name or name in word or any(
        word.endswith(name[:length]) or word.startswith(name[-length:])
        for length in range(1, min(len(word), len(name))))


def _other_of_pair(name: str) -> str:
    """Give the closing tag of an opening one, and the other way round; else nothing."""
    match = re.fullmatch(r'<(/?)(\w+)>', name)
    return f'<{"" if match[1] else "/"}{match[2]}>' if match else ''


def _which(number: int, messages: Sequence[Message]) -> str:
    return 'last message' if number == len(messages) - 1 else \
        f'{messages[number].role} message'


def _check_ids(backend: Any, ids: Sequence[int], vocab_size: int | None) -> None:
    """Hold the tokens of a first prompt, and all that are no added ones, against the model's."""
    if vocab_size is None:
        return
    beyond = next((id_ for id_ in ids if id_ >= vocab_size), None)
    if beyond is not None:
        raise TextError(
            f'the chat template writes {backend.id_to_token(beyond)!r}, token {beyond}, but the '
            f"model has {vocab_size}: the tokenizer's files and config.json do not belong "
            'together; copy or download the model again')
    added = backend.get_added_tokens_decoder().keys()
    last = max(backend.get_vocab(with_added_tokens=True).values())
    words = backend.get_vocab_size()
    while last in added:
        last -= 1
    if last >= vocab_size or words < vocab_size // 2:
        raise TextError(
            f'the tokenizer has {words} tokens, up to {last} but for added ones, and the model '
            f'{vocab_size}: tokenizer.json and config.json do not belong together; copy or '
            'download the model again')


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
