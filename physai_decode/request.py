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
A request: identity, prompt or messages, and options.

The field names of its JSON form follow OpenAI's chat completions, and vLLM's where OpenAI has
none. ROS and HTTP share this form.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from functools import cached_property
from functools import partial
import json
from math import isfinite
import re
from typing import Any
from typing import NamedTuple
from typing import NoReturn

from physai_decode.config import check_value
from physai_decode.config import ConfigError
from physai_decode.config import DeadlineConfig
from physai_decode.config import PaceConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import shown_json as shown
from physai_decode.config import ThinkingConfig

MAX_ID_CHARACTERS = 128
MAX_MESSAGES = 4096
MAX_TEMPLATE_KWARGS = 64
MAX_TEMPLATE_CHARACTERS = 4096      # of a name or a string
MAX_TEMPLATE_NUMBER = 2**53         # of the absolute value
ROLES = ('system', 'user', 'assistant', 'tool')
MAX_TOOLS = 128
# JSON name to the field of the settings that the option overrides.
SAMPLING = {{'max_new_tokens': 'max_tokens'}.get(spec.name, spec.name): spec
            for spec in fields(SamplingConfig) if spec.name != 'from_checkpoint'}
DEADLINE = {spec.name: spec for spec in fields(DeadlineConfig)
            if spec.name != 'max_consecutive_misses'}
PACE = {spec.name: spec for spec in fields(PaceConfig)}
THINKING = {spec.name: spec for spec in fields(ThinkingConfig)}
JSON_NAMES = {spec.name: name for name, spec in SAMPLING.items()}
# Fields of a message besides role and content.
_OF_ROLE: dict[str, tuple[str, ...]] = {
    'assistant': ('tool_calls', 'reasoning_content'), 'tool': ('tool_call_id', 'name')}
_FUNCTION_FIELDS = {'name': str, 'description': str, 'parameters': dict, 'strict': bool}
_FUNCTION_NAME = re.compile(r'[A-Za-z0-9_.-]{1,64}')
# Fields of response_format.json_schema. "strict" has no effect: a schema is always enforced.
_SCHEMA_FIELDS = {'name': str, 'description': str, 'schema': dict, 'strict': bool}
_STRUCTURES = {'regex': str, 'choice': list, 'grammar': str}


class RequestError(ValueError):
    """A request is invalid; the message names the field, its value and what is allowed."""

    def __init__(self, message: str, client_id: str = '') -> None:
        """
        Create an error.

        :param client_id: id of the request, for the refusal; empty if it could not be read.
        """
        super().__init__(message)
        self.client_id = client_id


class Call(NamedTuple):
    """A tool call of the model."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's form, in which the arguments are JSON in a string."""
        return {'id': self.id, 'type': 'function', 'function': {
            'name': self.name, 'arguments': json.dumps(self.arguments, ensure_ascii=False)}}


class Message(NamedTuple):
    """One message of a conversation."""

    role: str                       # one of ROLES
    content: str
    tool_calls: tuple[Call, ...] = ()
    reasoning_content: str = ''
    tool_call_id: str = ''          # of a result: the id of its call
    name: str = ''                  # of a result: the name of the tool

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form without empty fields."""
        fields = {name: value for name, value in self._asdict().items() if value}
        if self.tool_calls:
            fields['tool_calls'] = [call.to_json() for call in self.tool_calls]
        return {'role': self.role, 'content': self.content, **fields}


class Form(NamedTuple):
    """A constraint on the form of an answer."""

    kind: str                       # json_schema, regex, choice, grammar, calls
    content: Any                    # a schema, a text, a list of choices, or `Calls`
    name: str                       # the field or parameter that sets it, for messages


class Calls(NamedTuple):
    """Tool calls that an answer has to consist of."""

    form: str                       # a key of `physai_decode.tool_forms.TOOL_FORMS`
    tools: tuple[Mapping[str, Any], ...]
    single: bool                    # exactly one call; otherwise one or more


class Refusal(NamedTuple):
    """Why a request is refused."""

    kind: str                       # invalid, too_large, full (retry later), inactive (no model)
    message: str


class Cancel(NamedTuple):
    """A message that cancels the request with this id."""

    client_id: str
    surplus: tuple[str, ...] = ()       # fields of the message that have no effect


@dataclass(frozen=True)
class Request:
    """
    A client's request.

    It has a ``prompt``, which is a turn of the node's conversation; or ``messages``, a
    conversation that the client keeps; or a ``raw_prompt``, which bypasses conversation and chat
    template. An absent option keeps the node's parameter.
    """

    prompt: str = ''
    raw_prompt: str = ''
    client_id: str = ''             # the client's id of the request; empty for none
    messages: tuple[Message, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)   # by field of SamplingConfig
    deadline: Mapping[str, Any] = field(default_factory=dict)   # by field of DeadlineConfig
    pace: Mapping[str, Any] = field(default_factory=dict)       # by field of PaceConfig
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    response_format: Mapping[str, Any] = field(default_factory=dict)
    structured_outputs: Mapping[str, Any] = field(default_factory=dict)
    thinking: Mapping[str, Any] = field(default_factory=dict)   # by field of ThinkingConfig
    tools: tuple[Mapping[str, Any], ...] = ()                   # in OpenAI's form
    tool_choice: str | Mapping[str, Any] = ''       # empty: auto
    parallel_tool_calls: bool = True                # False: at most one call per answer

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> 'Request':
        """
        Create a request from its JSON form.

        :param value: the parsed object.
        :raises RequestError: a field is invalid; the message names the first such field, its value
            and what is allowed.
        """
        value = _given(value)
        client_id = _client_id(value)
        try:
            return cls(client_id=client_id, **_read(value))
        except (ConfigError, RequestError) as error:
            raise RequestError(str(error), client_id) from None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form that `from_json` reads."""
        value: dict[str, Any] = {'id': self.client_id} if self.client_id else {}
        if self.messages:
            value['messages'] = [message.to_json() for message in self.messages]
        elif self.raw_prompt:
            value['raw_prompt'] = self.raw_prompt
        else:
            value['prompt'] = self.prompt
        value.update({name: self.sampling[spec.name] for name, spec in SAMPLING.items()
                      if spec.name in self.sampling})
        if not self.parallel_tool_calls:
            value['parallel_tool_calls'] = False
        return value | {name: _plain(getattr(self, name)) for name in _READ
                        if name not in (*TEXTS, 'parallel_tool_calls') and getattr(self, name)}

    @property
    def is_free(self) -> bool:
        """Whether the request asks for free text, even if the node's parameters constrain it."""
        return self.response_format.get('type') == 'text' and not self.structured_outputs

    @property
    def form(self) -> Form | None:
        """The constraint that the request sets, or None."""
        for kind, content in self.structured_outputs.items():
            return Form(kind, content, f'structured_outputs.{kind}')
        if self.response_format.get('type') == 'json_object':
            return Form('json_schema', {'type': 'object'}, 'response_format')
        if self.response_format.get('type') == 'json_schema':
            return Form('json_schema', self.response_format['json_schema']['schema'],
                        'response_format.json_schema.schema')
        return None

    @property
    def offered(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that the model may call."""
        return () if self.tool_choice == 'none' else self.tools

    @property
    def forced(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that the answer has to call; empty if it may be text."""
        if isinstance(self.tool_choice, Mapping):
            name = self.tool_choice['function']['name']
            return tuple(tool for tool in self.tools if tool['function']['name'] == name)
        return self.tools if self.tool_choice == 'required' else ()

    @property
    def text(self) -> str:
        """All texts of the request except for the tools."""
        return self.prompt or self.raw_prompt or '\n'.join(map(_text_of, self.messages))

    @cached_property
    def size(self) -> int:
        """The size of `text` in UTF-8 and of the tools, in bytes."""
        tools = json.dumps(self.tools) if self.tools else ''
        return len(self.text.encode(errors='surrogatepass')) + len(tools)


def parse(text: str) -> Request | Cancel:
    """
    Parse a message of ``~/request``: a request, or ``{"id": ..., "cancel": true}``.

    :raises RequestError: the message is not a JSON object, or a field is invalid.
    """
    value = parse_value(text, 'the request')
    if not isinstance(value, dict):
        raise RequestError(
            f'the request is {shown(value)}: expected a JSON object such as {{"prompt": "..."}}')
    value = _given(value)
    if 'cancel' not in value:
        return Request.from_json(value)
    client_id = _client_id(value)
    if value['cancel'] is not True or not client_id:
        # Without an id: a result with the id would look like the end of that request.
        named = f'; request {shown(client_id)} goes on' if client_id else ''
        raise RequestError(f'to cancel, send {{"id": "...", "cancel": true}}{named}')
    return Cancel(client_id, tuple(sorted(value.keys() - {'id', 'metadata', 'cancel'})))


def parse_value(text: str, name: str) -> Any:
    """
    Parse JSON strictly: without duplicate fields in an object, and with finite numbers only.

    :param name: name of the text, for the message.
    :raises RequestError: the text is not such JSON.
    """
    return _parsed(lambda: json.loads(text, **STRICT_JSON), name)


def parse_first(text: str, name: str) -> tuple[Any, int]:
    """Parse the JSON that a text begins with, as `parse_value`, and return its length too."""
    return _parsed(lambda: json.JSONDecoder(**STRICT_JSON).raw_decode(text), name)


def _parsed(parse: Callable[[], Any], name: str) -> Any:
    try:
        return parse()
    except RecursionError:
        raise RequestError(f'{name} is nested too deeply') from None
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f'{name} is not valid JSON: {error}') from None


def is_client_id(value: Any) -> bool:
    """Whether a value is allowed as the id of a request."""
    return type(value) is str and value.isprintable() and 0 < len(value) <= MAX_ID_CHARACTERS


def _given(value: Mapping[str, Any]) -> dict[str, Any]:
    """Drop null fields, which count as absent."""
    return {name: each for name, each in value.items() if each is not None}


def _client_id(value: Mapping[str, Any]) -> str:
    metadata = _mapping(value.get('metadata', {}), 'metadata')
    named = {'id': value.get('id'), 'metadata.id': metadata.get('id')}
    found = {name: each for name, each in named.items() if each is not None}
    for name, each in found.items():
        if not is_client_id(each):
            raise RequestError(f'{name} is {shown(each)}: expected a string of 1 to '
                               f'{MAX_ID_CHARACTERS} printable characters')
    if len(set(found.values())) > 1:
        raise RequestError(f'id is {shown(found["id"])}, but metadata.id is '
                           f'{shown(found["metadata.id"])}: give one of them')
    return next(iter(found.values()), '')


def _read(value: Mapping[str, Any]) -> dict[str, Any]:
    """Parse all fields of a `Request` except for its id."""
    known = ('id', 'metadata', *_READ, *SAMPLING)
    for name in value:
        if name not in known:
            raise RequestError(f'{shown(name)} is not a field of a request: the fields are '
                               f'{", ".join(known)}')
    given = [name for name in TEXTS if name in value]
    if len(given) != 1:
        raise RequestError('expected one of prompt (a string), messages (a list) and raw_prompt '
                           f'(a string): {" and ".join(given) + " were" if given else "none was"} '
                           'given')
    if value.get('structured_outputs') and \
            value.get('response_format', _TEXT) != _TEXT:
        raise RequestError('response_format and structured_outputs were both given: remove one')
    found = {name: read(value[name]) for name, read in _READ.items() if name in value}
    return {'sampling': _options(value, SAMPLING), **_checked_tools(found)}


def _checked_tools(found: dict[str, Any]) -> dict[str, Any]:
    """Check the tool fields against each other and the other fields."""
    tools, choice = found.get('tools', ()), found.get('tool_choice', 'auto')
    if not tools:
        if choice not in ('none', 'auto'):
            raise RequestError(
                f'tool_choice is {shown(choice)}, but there are no tools: add some')
        return {name: value for name, value in found.items()
                if name not in ('tool_choice', 'parallel_tool_calls')}
    names = [tool['function']['name'] for tool in tools]
    if isinstance(choice, Mapping) and choice['function']['name'] not in names:
        raise RequestError(f'tool_choice.function.name is {shown(choice["function"]["name"])}: '
                           f'the tools are {", ".join(names)}')
    strict = [index for index, tool in enumerate(tools) if tool['function'].get('strict')]
    if strict and choice == 'auto':
        raise RequestError(f'tools[{strict[0]}].function.strict is true, which is enforced only '
                           'if the answer has to call a tool: set tool_choice to required, or '
                           'remove strict')
    format_ = found.get('response_format', _TEXT)
    if choice != 'none' and (format_.get('type') != 'text' or found.get('structured_outputs')):
        name = 'structured_outputs' if found.get('structured_outputs') else 'response_format'
        raise RequestError(f'{name} constrains the answer, so it cannot call tools: remove '
                           f'{name}, or set tool_choice to none')
    return found


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f'{name} is {shown(value)}: expected an object')
    return value


def _options(value: Mapping[str, Any], specs: Mapping[str, Any],
             prefix: str = '') -> dict[str, Any]:
    """Return the options in ``value`` by the names of their settings."""
    if prefix:
        for name in value:
            if name not in specs:
                raise RequestError(f'{shown(prefix + name)} is not a field of a request: the '
                                   f'fields are {", ".join(prefix + each for each in specs)}')
    found = {}
    for name, spec in specs.items():
        given = value.get(name)
        if given is None:
            continue
        if type(spec.default) is tuple:             # OpenAI allows a string instead of a list
            given = (given,) if type(given) is str else \
                tuple(given) if type(given) is list else given
        found[spec.name] = check_value(prefix + name, given, spec, shown)
    return found


def _group(value: Any, name: str, specs: Mapping[str, Any]) -> dict[str, Any]:
    """Parse an object whose fields override the settings of a group."""
    return _options(_mapping(value, name), specs, f'{name}.')


def _text(value: Any, name: str) -> str:
    if type(value) is not str:
        raise RequestError(f'{name} is {shown(value)}: expected a string')
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if type(value) is not list or not value:
        raise RequestError(f'messages is {shown(value)}: expected a list of at least one message')
    if len(value) > MAX_MESSAGES:
        raise RequestError(f'messages has {len(value)} messages: at most {MAX_MESSAGES} are '
                           'allowed')
    return tuple(_message(each, f'messages[{index}]') for index, each in enumerate(value))


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise RequestError(f'{name} is {shown(value)}: expected an object with role and content')
    role = value.get('role')
    if role not in ROLES:
        raise RequestError(f'{name}.role is {shown(role)}: expected one of {", ".join(ROLES)}')
    fields = 'role', 'content', *_OF_ROLE.get(role, ())
    for key in value:
        if key not in fields:
            raise RequestError(f'{shown(f"{name}.{key}")} is not a field of a message: the '
                               f'fields are {", ".join(fields)}')
    found: dict[str, Any] = {
        key: _text(value[key], f'{name}.{key}')
        for key in ('reasoning_content', 'tool_call_id') if value.get(key)}
    if value.get('name'):
        found['name'] = _function_name(value['name'], f'{name}.name')
    calls = _given(value).get('tool_calls', [])
    if type(calls) is not list:
        raise RequestError(f'{name}.tool_calls is {shown(calls)}: expected a list of calls')
    found['tool_calls'] = tuple(_call(each, f'{name}.tool_calls[{index}]')
                                for index, each in enumerate(calls))
    content = value.get('content')
    if content is None and calls:
        content = ''
    if type(content) is list:
        content = ''.join(_part(each, f'{name}.content[{index}]')
                          for index, each in enumerate(content))
    return Message(role, _text(content, f'{name}.content'), **found)


def _call(value: Any, name: str) -> Call:
    """Parse a call of an earlier answer, in the form of a result."""
    value = _typed(_mapping(value, name), name, {'id': str, 'type': str, 'function': dict})
    if value.get('type', 'function') != 'function':
        raise RequestError(f'{name}.type is {shown(value["type"])}: expected function')
    function = value.get('function', {})
    for key in function:
        if key not in ('name', 'arguments'):
            raise RequestError(f'{shown(f"{name}.function.{key}")} is not a field of a call: '
                               'the fields are name and arguments')
    place, arguments = f'{name}.function.arguments', function.get('arguments', {})
    if type(arguments) is str:
        arguments = parse_value(arguments, place) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise RequestError(f'{place} is {shown(arguments)}: expected a JSON object, in a string')
    return Call(value.get('id', ''),
                _function_name(function.get('name'), f'{name}.function.name'), arguments)


def _function_name(value: Any, name: str) -> str:
    if type(value) is not str or not _FUNCTION_NAME.fullmatch(value):
        raise RequestError(f'{name} is {shown(value)}: expected 1 to 64 letters, digits, dots, '
                           'underscores or dashes')
    return value


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    if type(value) is not list:
        raise RequestError(f'tools is {shown(value)}: expected a list of tools')
    if len(value) > MAX_TOOLS:
        raise RequestError(f'tools has {len(value)} tools: at most {MAX_TOOLS} are allowed')
    tools = tuple(_tool(each, f'tools[{index}]') for index, each in enumerate(value))
    twice = [name for name, count in Counter(
        tool['function']['name'] for tool in tools).items() if count > 1]
    if twice:
        raise RequestError(f'tools has {twice[0]} twice: give each tool a different name')
    return tools


def _tool(value: Any, name: str) -> dict[str, Any]:
    value = _typed(_mapping(value, name), name, {'type': str, 'function': dict})
    if value.get('type') != 'function' or 'function' not in value:
        raise RequestError(f'{name} is {shown(value)}: expected '
                           '{"type": "function", "function": {"name": "...", ...}}')
    function = _typed(value['function'], f'{name}.function', _FUNCTION_FIELDS)
    _function_name(function.get('name'), f'{name}.function.name')
    return {'type': 'function', 'function': function}


def _parallel_tool_calls(value: Any) -> bool:
    if type(value) is not bool:
        raise RequestError(f'parallel_tool_calls is {shown(value)}: expected true or false')
    return value


def _tool_choice(value: Any) -> str | dict[str, Any]:
    if value in ('none', 'auto', 'required'):
        return str(value)
    if not isinstance(value, Mapping) or value.get('type') != 'function' or value.keys() != {
            'type', 'function'}:
        raise RequestError(f'tool_choice is {shown(value)}: expected none, auto, required or '
                           '{"type": "function", "function": {"name": "..."}}')
    function = _typed(_mapping(value['function'], 'tool_choice.function'), 'tool_choice.function',
                      {'name': str})
    return {'type': 'function', 'function': {
        'name': _function_name(function.get('name'), 'tool_choice.function.name')}}


def _text_of(message: Message) -> str:
    """Join all texts of a message."""
    calls = (json.dumps(call.arguments, ensure_ascii=False) for call in message.tool_calls)
    return '\n'.join(filter(None, (message.reasoning_content, message.content, *calls)))


def _plain(value: Any) -> Any:
    """Convert a field to a JSON value."""
    return value if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else [
        *value]


def _part(value: Any, name: str) -> str:
    """Parse one part of a message's content; only text is supported."""
    if not isinstance(value, Mapping) or value.get('type') != 'text' \
            or type(value.get('text')) is not str or len(value) != 2:
        raise RequestError(f'{name} is {shown(value)}: expected '
                           '{"type": "text", "text": "..."}, as the node accepts only text')
    return str(value['text'])


def _template_kwargs(value: Any) -> dict[str, Any]:
    if len(_mapping(value, 'chat_template_kwargs')) > MAX_TEMPLATE_KWARGS:
        raise RequestError(f'chat_template_kwargs has {len(value)} variables: at most '
                           f'{MAX_TEMPLATE_KWARGS} are allowed')
    for name, each in value.items():
        if not name.isidentifier() or type(each) not in (bool, int, float, str):
            raise RequestError(
                f'{shown("chat_template_kwargs." + name)} is {shown(each)}: expected true, '
                'false, a number or a string, under the name of a variable of the chat template')
        longest = max(len(name), len(each) if type(each) is str else 0)
        if longest > MAX_TEMPLATE_CHARACTERS:
            raise RequestError(f'{shown("chat_template_kwargs." + name)} has {longest} '
                               f'characters: at most {MAX_TEMPLATE_CHARACTERS} are allowed')
        if type(each) in (int, float) and abs(each) > MAX_TEMPLATE_NUMBER:
            raise RequestError(f'{shown("chat_template_kwargs." + name)} is {shown(each)}: '
                               f'expected {-MAX_TEMPLATE_NUMBER} to {MAX_TEMPLATE_NUMBER}')
    return dict(value)


def _response_format(value: Any) -> dict[str, Any]:
    kind = _mapping(value, 'response_format').get('type')
    if kind not in ('text', 'json_object', 'json_schema'):
        raise RequestError(f'response_format.type is {shown(kind)}: expected text, '
                           'json_object or json_schema')
    found = _typed(value, 'response_format',
                   {'type': str} | ({'json_schema': dict} if kind == 'json_schema' else {}))
    if kind == 'json_schema':
        inner = _typed(found.get('json_schema', {}), 'response_format.json_schema', _SCHEMA_FIELDS)
        if 'schema' not in inner:
            raise RequestError('response_format.json_schema.schema is missing: give the schema')
        found['json_schema'] = inner
    return found


def _structured_outputs(value: Any) -> dict[str, Any]:
    found = _typed(_mapping(value, 'structured_outputs'), 'structured_outputs', _STRUCTURES)
    if len(found) > 1:
        raise RequestError(f'structured_outputs has {" and ".join(found)}: keep one of them')
    choice = found.get('choice')
    if choice is not None and not (choice and all(type(each) is str and each for each in choice)):
        raise RequestError(f'structured_outputs.choice is {shown(choice)}: expected a list of at '
                           'least one string, none of them empty')
    return found


def _typed(value: Mapping[str, Any], name: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Check the types of an object's fields; null counts as absent."""
    value = _given(value)
    for key, each in value.items():
        if key not in kinds:
            raise RequestError(f'{shown(f"{name}.{key}")} is not a field of a request: the '
                               f'fields are {", ".join(f"{name}.{kind}" for kind in kinds)}')
        if type(each) is not kinds[key]:
            raise RequestError(f'{name}.{key} is {shown(each)}: expected {_KINDS[kinds[key]]}')
    return value


_KINDS: dict[type, str] = {str: 'a string', dict: 'an object', list: 'a list of strings',
                           bool: 'true or false'}
_TEXT = {'type': 'text'}
TEXTS = ('prompt', 'messages', 'raw_prompt')        # a request has exactly one
# Field of `Request` and of its JSON form to its parser, which raises RequestError.
_READ: dict[str, Callable[[Any], Any]] = {
    'prompt': partial(_text, name='prompt'), 'messages': _messages,
    'raw_prompt': partial(_text, name='raw_prompt'), 'chat_template_kwargs': _template_kwargs,
    'deadline': partial(_group, name='deadline', specs=DEADLINE),
    'pace': partial(_group, name='pace', specs=PACE), 'response_format': _response_format,
    'structured_outputs': _structured_outputs,
    'thinking': partial(_group, name='thinking', specs=THINKING), 'tools': _tools,
    'tool_choice': _tool_choice, 'parallel_tool_calls': _parallel_tool_calls}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; refuse duplicate fields, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise RequestError(f'{shown(twice)} is given twice: remove one')
    return found


def _float(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise RequestError(f'{shown(text)} is too large for a number')
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:                  # more digits than Python converts
        raise RequestError(f'{shown(text)} is too large for a number') from None


def _no_number(text: str) -> NoReturn:
    raise RequestError(f'{text} is not a number in JSON')


# Arguments of json's parsers that refuse duplicate fields and numbers that are not finite.
STRICT_JSON: dict[str, Any] = {
    'object_pairs_hook': _object, 'parse_float': _float, 'parse_int': _int,
    'parse_constant': _no_number}
