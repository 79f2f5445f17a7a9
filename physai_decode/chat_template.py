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
A model's chat template: messages to the text of a conversation.

User text never becomes control tokens: only those that the template writes receive secret names,
by which the encoder knows them. No prompt can yield one, so no prompt can close its own turn.
Tools that contain a control token are refused.

A template is rendered twice. With placeholders instead of the texts, it shows where the texts are;
with the texts, it shows whether it changes them. If it does, it is rendered a third time, with the
secret names in its own source: it changes the texts, but its control tokens remain known.

A template runs without limits here; `TextProcess` sets them.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from importlib.metadata import version
from inspect import signature
import json
import re
import secrets
from typing import Any

from physai_decode.config import shown_json
from physai_decode.pip_command import install
from physai_decode.request import Call
from physai_decode.request import Message
from physai_decode.tokenizer_files import TextError
from physai_decode.tool_forms import reads
from physai_decode.tool_forms import TOOL_FORMS

SANDBOX = (3, 1, 6)             # the first jinja2 without a published escape from its sandbox
# A call and a tool that test a template.
_TRIAL = Call('000000001', 'trial_tool', {'trial_key': 'trial_value'})
_TRIAL_TOOL = {'type': 'function', 'function': {
    'name': _TRIAL.name, 'description': 'None.', 'parameters': {
        'type': 'object', 'properties': {'trial_key': {'type': 'string', 'description': 'None.'}},
        'required': ['trial_key']}}}


class ChatTemplate:
    """Writes conversations, in which control tokens have secret names."""

    def __init__(self, tokenizer: Any, choice: str) -> None:
        """
        Select the template.

        :param tokenizer: a fast tokenizer of the transformers library.
        :param choice: the parameter ``chat.template``.
        :raises TextError: the template does not exist, or the installed jinja2 cannot confine it.
        """
        self._tokenizer = tokenizer
        self.name, self.source = _template(tokenizer, choice)       # empty: there is none
        self._tool_source = self.source
        self._files: Mapping[str, str] = getattr(tokenizer, 'template_files', {})
        if self.source:
            _check_sandbox()
            if choice == 'auto' and isinstance(tokenizer.chat_template, dict):
                self._tool_source = tokenizer.chat_template.get('tool_use', self.source)
        self._reserved = {'messages', *tokenizer.special_tokens_map,
                          *signature(type(tokenizer).apply_chat_template).parameters}
        self._nonce = str(secrets.randbits(64))     # digits, so that no change of case breaks it
        self._place = re.compile(rf'\ue000{self._nonce}:(\d+)(\\*)"\ue000')
        self._secret = re.compile(rf'\ue001{self._nonce}:(\d+)\ue001')
        self._names: dict[str, str] = {}            # secret ones, by name
        self._ordinary: dict[str, str] = {}         # the reverse
        self._writes_calls = self._arguments_as_text = False
        self.form, self.reason = '', 'no chat template presents them to the model'

    def find_turns(self, names: Iterable[str]) -> tuple[str, set[str]]:
        """
        Find the added tokens that mark turns.

        :param names: of all added tokens.
        :returns: the one that ends an assistant turn, or an empty string; and all that the
            template writes, except for pairs of tags.
        """
        if not self.source:
            return '', set()
        names = frozenset(names)
        pattern = _matcher(names)
        rendered = self._trial('user', 'assistant', answer=False) or \
            self._trial('user', 'assistant', 'user', answer=False)
        end = pattern.match(rendered.partition('\ue0001')[2].lstrip())
        rendered = self._trial('user', 'assistant', 'user', answer=True) or \
            self._trial('user', answer=True)
        return end[0] if end else '', {
            name for name in pattern.findall(rendered) if _matching_tag(name) not in names}

    def prepare(self, ids: Mapping[str, int]) -> Mapping[str, str]:
        """
        Give control tokens secret names, and find the syntax of tool calls.

        :param ids: of the control tokens, by name.
        :returns: the secret names, by name.
        :raises TextError: the template has a syntax error.
        """
        self._names = {name: f'\ue001{self._nonce}:{id_}\ue001' for name, id_ in ids.items()}
        self._ordinary = {secret: name for name, secret in self._names.items()}
        self._special = {key: self._names.get(token, token)
                         for key, token in self._tokenizer.special_tokens_map.items()
                         if isinstance(token, str)}
        self._name_pattern = _matcher(self._names)
        parts = {source: self._parts(source)
                 for source in {self.source, self._tool_source} - {''}}
        self._word_pattern = _matcher({
            word for each in parts.values() for word in self._words(each)})
        self._marked = {source: self._with_secrets(each) for source, each in parts.items()}
        if self.source:
            self._built = self._find_built()
            self.form, self.reason = self._find_form()
        return self._names

    def conversation(self, messages: Sequence[Message], kwargs: Mapping[str, Any],
                     tools: Sequence[Mapping[str, Any]]) -> str:
        """
        Write a conversation up to the start of the answer, for the encoder.

        :param messages: texts of any content, with roles.
        :param kwargs: further variables of the template.
        :param tools: tools that the template presents to the model.
        :raises TextError: a text has an unpaired surrogate, the template refuses or omits a
            message, or its control tokens cannot be told from the texts.
        """
        self._check_kwargs(kwargs)
        self._check_tools(tools)
        # All renderings see the same time.
        render = partial(self._render, tools=tools, kwargs={
            'strftime_now': datetime.now().strftime, **kwargs})
        call_ids: dict[str, str] = {}
        real = [self._message(message, str, call_ids) for message in messages]
        texts: list[str] = []
        hidden, places = [], []
        for message in messages:
            begin = len(texts)
            hidden.append(self._message(message, lambda text: self._shown(text, texts), call_ids))
            places.append(range(begin, len(texts)))
        # A template whose control tokens have secret names does not find them in the texts.
        marked = any(map(self._name_pattern.search, texts))
        direct = render(real, marked=marked)
        try:
            whole = render(hidden, marked=True)
        except TextError:               # it refuses placeholders
            whole = ''
        present = {int(index) for index, _ in self._place.findall(whole)}
        for number, (role, *_) in enumerate(messages):
            if role != 'assistant' and places[number] and present.isdisjoint(places[number]):
                self._check_omitted(number, real, direct, partial(render, marked=marked))
        built, whole = {*self._name_pattern.findall(whole)}, self._plain(whole)
        if self._inserted(whole, texts) == self._plain(direct):
            if built - self._built:
                shown = json.dumps(min(built - self._built), ensure_ascii=False)
                raise TextError(
                    f"the model's chat template builds {shown}, a special token, of other texts, "
                    'such as a key of a tool or a value in chat_template_kwargs: change them, or '
                    'set chat.template to off')
            whole = self._name_pattern.sub(lambda match: self._names[match[0]], whole)
            return self._inserted(whole, texts)
        # The template changes the texts.
        whole = direct if marked else render(real, marked=True)
        if built or self._built or self._plain(whole) != (render(real) if marked else direct):
            raise TextError(
                "the model's chat template changes the texts, and with them its special tokens: "
                'rephrase the texts, or set chat.template to off')
        return whole

    def _inserted(self, whole: str, texts: Sequence[str]) -> str:
        return self._place.sub(lambda match: _escaped(texts[int(match[1])], len(match[2])), whole)

    def _plain(self, whole: str) -> str:
        """Undo the renaming of control tokens."""
        return self._secret.sub(lambda match: self._ordinary.get(match[0], match[0]), whole)

    def _check_omitted(self, number: int, messages: list[dict[str, Any]], whole: str,
                       render: Callable[[list[dict[str, Any]]], str]) -> None:
        """
        Refuse a message whose text has no effect on the conversation.

        :param whole: the conversation with it.
        """
        message = messages[number]
        for content in ('', f'x{message["content"]}'):
            other = [*messages]
            other[number] = {**message, 'content': content}
            try:
                if render(other) != whole:
                    return
            except TextError:
                return
        role = message['role']
        which = 'last' if number == len(messages) - 1 else role
        raise TextError(
            f"the model's chat template omits the {which} message: "
            + ('leave chat.system_prompt empty, or ' if role == 'system' else '')
            + 'set chat.template to off')

    def _message(self, message: Message, hide: Callable[[str], str],
                 call_ids: dict[str, str]) -> dict[str, Any]:
        """
        Convert a message to the form that the template sees.

        :param hide: returns what the template sees of a text.
        :param call_ids: receives a replacement for each call id: nine digits, which the templates
            of all families accept.
        """
        def id_of(call_id: str) -> str:
            return call_ids.setdefault(call_id, f'{len(call_ids) + 1:09}')

        content, calls = message.content, message.tool_calls
        if calls and not self._writes_calls:
            if not self.form:
                raise TextError(f'tool_calls cannot be used: {self.reason}')
            written = TOOL_FORMS[self.form].written(call[1:] for call in calls)
            content, calls = f'{content}\n{written}' if content else written, ()
        found: dict[str, Any] = {
            'role': message.role, 'content': hide(content)}
        if message.reasoning_content:
            found['reasoning_content'] = hide(message.reasoning_content)
        if calls:
            found['tool_calls'] = [self._call(call, id_of(call.id), hide) for call in calls]
        if message.tool_call_id:
            found['tool_call_id'] = id_of(message.tool_call_id)
        return found | ({'name': message.name} if message.name else {})

    def _call(self, call: Call, call_id: str, hide: Callable[[str], str]) -> dict[str, Any]:
        arguments: Any = _hidden_texts(call.arguments, hide)
        if self._arguments_as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {'id': call_id, 'type': 'function',
                'function': {'name': call.name, 'arguments': arguments}}

    def _shown(self, content: str, texts: list[str]) -> str:
        """
        Replace a text with placeholders, except for blanks at its ends and words of the template.

        The template can therefore trim it, look for a switch in it, or cut it at the end of a
        thought, and its place is still known. A placeholder contains a quotation mark. If the
        template writes the text as JSON, there is a backslash before the mark.

        :param texts: receives the text of each placeholder.
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
        for word in self._word_pattern.finditer(content):
            parts += [hidden(content[end:word.start()]), word[0]]
            end = word.end()
        return ''.join([*parts, hidden(content[end:])])

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        reserved = sorted(kwargs.keys() & self._reserved)
        special = next((name for name, value in kwargs.items()
                        if type(value) is str and self._name_pattern.search(value)), None)
        if reserved or special:
            raise TextError(f'chat_template_kwargs.{special or reserved[0]} cannot be set: it '
                            + ('contains a special token' if special else
                               'is not a variable of the chat template itself'))
        for name, value in kwargs.items():
            if type(value) is str:
                check_text(f'chat_template_kwargs.{name}', value)

    def _check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        text = json.dumps(tools, ensure_ascii=False)
        check_text('tools', text)
        if special := self._name_pattern.search(text):
            shown = json.dumps(special[0], ensure_ascii=False)
            raise TextError(f'tools contain {shown}, a special token of the model: remove it')

    def _render(self, messages: list[dict[str, Any]], kwargs: Mapping[str, Any],
                answer: bool = True, tools: Sequence[Mapping[str, Any]] = (),
                marked: bool = False) -> str:
        source = self._tool_source if tools else self.source
        if marked:
            kwargs = {**self._special, **kwargs}
        try:
            return str(self._tokenizer.apply_chat_template(
                messages, chat_template=self._marked[source] if marked else source,
                tokenize=False, add_generation_prompt=answer,
                **({'tools': [*tools]} if tools else {}), **kwargs))
        except MemoryError:
            raise
        except Exception as error:
            # A template is a program and can raise any exception.
            self._check_syntax(error, source)
            roles = ', '.join(message['role'] for message in messages)
            raise TextError(
                f"the model's chat template refuses a conversation of {roles}: "
                f'{self._plain(str(error))}; leave '
                'chat.system_prompt empty if that is the cause, or set chat.template to off'
            ) from error

    def _check_syntax(self, error: Exception, source: str) -> None:
        """Raise the error of a template that is not valid."""
        from jinja2 import TemplateSyntaxError

        if isinstance(error, TemplateSyntaxError):
            raise TextError(
                f'{self._files.get(source, "the model")} has a chat template with a syntax error '
                f'in line {error.lineno}: copy or download the model again, or set '
                'chat.template to off') from error

    def _parts(self, source: str) -> list[tuple[str, str]]:
        """Return the kind and the text of each part of a template's source."""
        from jinja2 import Environment

        try:
            return [part[1:] for part in Environment(keep_trailing_newline=True).lex(source)]
        except Exception as error:
            self._check_syntax(error, source)
            raise

    def _words(self, parts: list[tuple[str, str]]) -> set[str]:
        """
        Return the string literals in a template, which it may search messages for.

        Literals that overlap with a control token are left out.
        """
        words = {_unescaped(text[1:-1]) for kind, text in parts if kind == 'string'}
        return {word for word in words if len(word.strip()) > 1
                and not any(_overlap(word, name) for name in self._names)}

    def _with_secrets(self, parts: list[tuple[str, str]]) -> str:
        """Return a template whose texts and literals have control tokens by secret names."""
        return ''.join(
            self._name_pattern.sub(lambda match: self._names[match[0]], text)
            if kind in ('data', 'string') else text for kind, text in parts)

    def _find_built(self) -> set[str]:
        """Return the control tokens that the template builds, such as from the role."""
        trials = [partial(self._trial, *roles, answer=True, tools=tools)
                  for tools in ((), (_TRIAL_TOOL,))
                  for roles in (('user',), ('system', 'user'), ('user', 'assistant'),
                                ('user', 'assistant', 'tool'))]
        plain, marked = ([trial(marked=value) for trial in trials] for value in (False, True))
        if [*map(self._plain, marked)] != plain:    # it compares or cuts their names
            self._marked, self._special = {source: source for source in self._marked}, {}
            marked = plain
        return {name for each in marked for name in self._name_pattern.findall(each)}

    def _trial(self, *roles: str, answer: bool, **options: Any) -> str:
        """Render short messages of these roles; empty if the template refuses them."""
        kwargs = {'strftime_now': datetime(2000, 1, 1).strftime}
        try:
            return self._render([{'role': role, 'content': f'\ue000{index}'}
                                 for index, role in enumerate(roles)], kwargs, answer, **options)
        except TextError:
            return ''

    def _find_form(self) -> tuple[str, str]:
        """Return the syntax of tool calls, empty if tools are not supported, and the reason."""
        prompt = {'role': 'user', 'content': 'Go.'}
        try:
            rendered = self._render([prompt], {}, tools=[_TRIAL_TOOL])
        except TextError as error:
            return '', f'the chat template refuses tools: {error.__cause__}'
        if _TRIAL.name not in rendered:
            return '', 'the chat template omits them'
        for self._arguments_as_text in (False, True):
            call = self._call(_TRIAL, _TRIAL.id, lambda text: text)
            call['function']['arguments'] = json.dumps(_TRIAL.arguments) \
                if self._arguments_as_text else _TRIAL.arguments
            called = partial(self._render, [
                prompt, {'role': 'assistant', 'content': '', 'tool_calls': [call]},
                {'role': 'tool', 'content': 'Done.', 'tool_call_id': _TRIAL.id}], {},
                tools=[_TRIAL_TOOL])
            try:
                rendered = called()
                self._built.update(self._name_pattern.findall(called(marked=True)))
            except TextError:
                continue
            known = [name for name, form in TOOL_FORMS.items() if reads(form, rendered, _TRIAL[1:])
                     and not _is_excluded(name, self._tool_source)]
            if known:
                self._writes_calls = True
                return known[0], 'the chat template writes calls in this syntax'
            if 'trial_value' in rendered:
                return '', ('the chat template writes calls in an unknown syntax; '
                            f'the known ones are {", ".join(TOOL_FORMS)}')
        known = [name for name, form in TOOL_FORMS.items()
                 if not _is_excluded(name, self._tool_source)
                 and any(begin in self._tool_source for begin in form.begins)]
        if not known:
            return '', ('the chat template names no known syntax of calls, which are '
                        f'{", ".join(TOOL_FORMS)}')
        return known[0], 'the chat template asks for calls in this syntax'


def _template(tokenizer: Any, choice: str) -> tuple[str, str]:
    """Return the name and the source of the chat template; the source is empty without one."""
    known = tokenizer.chat_template or {}
    if isinstance(known, str):
        known = {'default': known}
    if choice == 'off':
        return 'off', ''
    if choice == 'auto' and not known:
        return 'none', ''
    name = 'default' if choice == 'auto' else choice
    if name not in known:
        raise TextError(
            f'chat.template is {choice}, but the model has no chat template of that name: it has '
            f'{", ".join(sorted(known)) or "none"}; set chat.template to one of these, or to off')
    source = known[name]
    for key, token in getattr(tokenizer, 'absent_tokens', {}).items():
        if key in source:
            raise TextError(
                f'the chat template uses {key}, which tokenizer_config.json sets to '
                f'{shown_json(token)}, but tokenizer.json lacks this token: copy or download the '
                'model again, or set chat.template to off')
    return name, source


def _hidden_texts(value: Any, hide: Callable[[str], str]) -> Any:
    """Replace all texts of a JSON value, keys included, with what the template sees."""
    if isinstance(value, str):
        check_text('the arguments text', value)
        return hide(value)
    if isinstance(value, Mapping):
        return {_hidden_texts(key, hide): _hidden_texts(each, hide)
                for key, each in value.items()}
    return [_hidden_texts(each, hide) for each in value] if isinstance(value, list) else value


def _is_excluded(form: str, source: str) -> bool:
    """Whether the template's source rules a form out; some forms read the same texts."""
    return {'hermes': '<code>' in source, 'smollm3': '<code>' not in source,
            'mistral_list': '[ARGS]' in source,
            'mistral_args': '[ARGS]' not in source}.get(form, False)


def _escaped(text: str, backslashes: int) -> str:
    """Escape a text as JSON as often as the template escaped the quotation mark."""
    while backslashes:
        text, backslashes = json.dumps(text, ensure_ascii=False)[1:-1], backslashes // 2
    return text


def _matcher(names: Iterable[str]) -> 're.Pattern[str]':
    """Compile a pattern that matches any of these, the longest first, as a tokenizer does."""
    return re.compile('|'.join(
        re.escape(name) for name in sorted(names, key=len, reverse=True)) or r'(?!)')


def _unescaped(token: str) -> str:
    """Decode the escapes of a string literal as jinja2 does."""
    try:
        return token.encode('ascii', 'backslashreplace').decode('unicode-escape')
    except UnicodeDecodeError:
        return ''                       # jinja2 will refuse the template


def _overlap(word: str, name: str) -> bool:
    """Whether one text contains the other, or an end of one is a beginning of the other."""
    return word in name or name in word or any(
        word.endswith(name[:length]) or word.startswith(name[-length:])
        for length in range(1, min(len(word), len(name))))


def _matching_tag(name: str) -> str:
    """Return the closing tag of an opening one, or the reverse; empty if it is not a tag."""
    match = re.fullmatch(r'<(/?)(\w+)>', name)
    return f'<{"" if match[1] else "/"}{match[2]}>' if match else ''


def _check_sandbox() -> None:
    """Refuse chat templates if the sandbox of the installed jinja2 has a published escape."""
    installed = version('jinja2')
    if tuple(map(int, re.findall(r'\d+', installed)[:3])) < SANDBOX:
        wanted = '.'.join(map(str, SANDBOX))
        raise TextError(
            f'a chat template can escape from the sandbox of jinja2 {installed}: '
            f'{install(f"jinja2>={wanted}")}, or set chat.template to off')


def check_text(name: str, content: str) -> None:
    """Refuse a text that UTF-8 cannot encode."""
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise TextError(f'{name} has an unpaired surrogate at character {error.start}: '
                        'send valid UTF-8') from None
