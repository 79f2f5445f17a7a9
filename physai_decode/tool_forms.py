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
The syntaxes in which models write tool calls, and their parsers.

A syntax is data and a parser. To add one, add an entry to `TOOL_FORMS`.
"""

import ast
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
import json
import re
from typing import Any
from typing import NamedTuple

from physai_decode.request import STRICT_JSON

_LONGEST_NAME = 200             # characters before [ARGS]
_LONGEST_WORD = 12              # characters of a JSON literal or escape that may be incomplete


class Read(NamedTuple):
    """The calls at the beginning of a text."""

    calls: list[tuple[str, Mapping[str, Any]]]      # names and arguments
    length: int                     # number of characters that the calls take up


class Unreadable(ValueError):
    """A text that begins like a call is not one; the message is empty if it is ordinary text."""


@dataclass(frozen=True)
class ToolForm:
    """
    One syntax.

    A model writes ``opens``, its calls separated by ``between``, and ``closes``. A call is
    ``before``, in which ``NAME`` stands for the name of the tool, then the arguments as JSON, then
    ``after``. ``read`` parses a text that starts with a call. Its second argument is True if the
    text is complete; otherwise ``read`` may return None to request more text.
    """

    name: str
    begins: tuple[str, ...]         # texts that begin a call anywhere in an answer
    before: str
    after: str
    between: str
    read: Callable[[str, bool], Read | None]
    markers: tuple[str, ...]        # texts that may be single tokens
    opens: str = ''
    closes: str = ''
    bare: str = ''                  # begins a call only at the beginning of an answer
    parts: str = ''                 # a separator of calls that is not part of the answer's text

    def written(self, calls: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
        """Format calls as a model writes them."""
        each = (f'{self.before.replace("NAME", name)}{json.dumps(arguments, ensure_ascii=False)}'
                f'{self.after}' for name, arguments in calls)
        return f'{self.opens}{self.between.join(each)}{self.closes}'


_DECODER = json.JSONDecoder(strict=False, **STRICT_JSON)


def _decoded(text: str, begin: int, complete: bool) -> tuple[Any, int] | None:
    """
    Decode a JSON value and return it with its end; None if more text is needed.

    :param complete: whether the text is complete.
    :raises Unreadable: the text is not JSON.
    """
    try:
        return _DECODER.raw_decode(text, begin)
    except RecursionError:
        raise Unreadable('it is nested too deeply') from None
    except json.JSONDecodeError as error:
        truncated = error.msg.startswith('Unterminated') or \
            error.pos + _LONGEST_WORD > len(text.rstrip())
        if complete or not truncated:
            raise Unreadable(f'it is not JSON: {error}') from None
        return None
    except ValueError as error:         # of STRICT_JSON
        raise Unreadable(f'it is not JSON: {error}') from None


def _whole(text: str) -> Any:
    value, end = _decoded(text, 0, True) or ({}, 0)
    if end < len(text):
        raise Unreadable('its arguments are more than one JSON value')
    return value


def _call(value: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the arguments of a call from its JSON object."""
    if not isinstance(value, dict) or not isinstance(value.get('name'), str):
        raise Unreadable('it is not an object with a name')
    if 'arguments' in value and 'parameters' in value:
        raise Unreadable('it has both arguments and parameters')
    arguments = value.get('arguments', value.get('parameters', {}))
    if isinstance(arguments, str):
        arguments = _whole(arguments.strip() or '{}')
    if not isinstance(arguments, dict):
        raise Unreadable('its arguments are not an object')
    return value['name'], arguments


def _after_blanks(text: str, begin: int) -> int:
    return begin + len(text[begin:]) - len(text[begin:].lstrip())


def _read_tagged(text: str, complete: bool) -> Read | None:
    """Parse ``<tool_call>{...}</tool_call>``; a complete text may lack the closing tag."""
    begin, close = _after_blanks(text, len('<tool_call>')), '</tool_call>'
    decoded = _decoded(text, begin, complete)
    if decoded is None:
        return None
    value, end = decoded
    rest = _after_blanks(text, end)
    if text.startswith(close, rest):
        end = rest + len(close)
    elif not complete and close.startswith(text[rest:]):
        return None
    return Read([_call(value)], end)


def _read_code(text: str, complete: bool) -> Read | None:
    """Parse ``<code>f(a=1)</code>``: Python calls with keyword arguments."""
    code, close, _ = text.partition('</code>')
    if not close and not complete:
        return None
    try:
        lines = ast.parse(code.removeprefix('<code>').strip()).body
        calls = [line.value for line in lines if isinstance(line, (ast.Expr, ast.Assign))]
        if not calls or len(calls) < len(lines):
            raise Unreadable('it is more than tool calls')
        return Read([_python_call(each) for each in calls], len(code) + len(close))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f'it is not Python: {error}') from None


def _python_call(node: ast.expr) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise Unreadable('it is more than tool calls with keyword arguments')
    try:
        arguments = {each.arg: ast.literal_eval(each.value) for each in node.keywords if each.arg}
        if len(arguments) < len(node.keywords):
            raise Unreadable('it is more than tool calls with keyword arguments')
        for each in ast.walk(node):
            if isinstance(each, ast.Dict) and len(ast.literal_eval(each)) < len(each.keys):
                raise Unreadable('an object has a field twice')
        return node.func.id, _whole(json.dumps(arguments, allow_nan=False))
    except TypeError as error:          # such as a list as the key of an object
        raise Unreadable(f'its arguments are not JSON: {error}') from None


def _read_tagged_or_code(text: str, complete: bool) -> Read | None:
    return (_read_code if text.startswith('<code>') else _read_tagged)(text, complete)


def _read_object(text: str, complete: bool) -> Read | None:
    """Parse ``{"name": ..., "parameters": {...}}``, with or without ``<|python_tag|>``."""
    tag = '<|python_tag|>'
    tagged = text.startswith(tag)
    begin = _after_blanks(text, len(tag) if tagged else 0)
    first = re.match(r'\{\s*"(\w*)', text[begin:])
    if text[begin:begin + 1] not in ('{', '') or first and not any(
            key.startswith(first[1]) for key in ('name', 'parameters', 'arguments', 'type')):
        raise Unreadable('it is not an object with a name' if tagged else '')
    try:
        decoded = _decoded(text, begin, complete)
        return decoded and Read([_call(decoded[0])], decoded[1])
    except Unreadable as error:
        raise Unreadable(str(error) if tagged or '"name"' in text else '') from None


def _read_list(text: str, complete: bool) -> Read | None:
    """Parse ``[TOOL_CALLS] [{...}, ...]`` and ``[TOOL_CALLS]name[ARGS]{...}``."""
    begin = _after_blanks(text, len('[TOOL_CALLS]'))
    rest = text[begin:]
    if rest[:1] in ('[', '{'):
        decoded = _decoded(text, begin, complete)
        if decoded is None:
            return None
        value, end = decoded
        return Read([_call(each) for each in (value if isinstance(value, list) else [value])], end)
    named = re.match(r'([\w.-]{1,64})(?:\[CALL_ID\]\w{1,64})?\[ARGS\]', rest)
    if named is None:
        if complete or len(rest) > _LONGEST_NAME:
            raise Unreadable('it is neither a list of calls nor a name with arguments')
        return None
    decoded = _decoded(text, _after_blanks(text, begin + named.end()), complete)
    return decoded and Read([_call({'name': named[1], 'arguments': decoded[0]})], decoded[1])


_TAGS = '<tool_call>', '</tool_call>'
_TAGGED = {'before': '<tool_call>\n{"name": "NAME", "arguments": ', 'after': '}\n</tool_call>',
           'between': '\n'}
# In order of preference: the node picks the first that can parse what the template writes.
TOOL_FORMS = {form.name: form for form in (
    ToolForm('hermes', _TAGS[:1], read=_read_tagged, markers=_TAGS, **_TAGGED),
    ToolForm('smollm3', ('<tool_call>', '<code>'), read=_read_tagged_or_code,
             markers=(*_TAGS, '<code>', '</code>'), **_TAGGED),
    ToolForm('mistral_list', ('[TOOL_CALLS]',), '{"name": "NAME", "arguments": ', '}', ', ',
             _read_list, ('[TOOL_CALLS]', '[ARGS]', '[CALL_ID]'), '[TOOL_CALLS] [', ']'),
    ToolForm('mistral_args', ('[TOOL_CALLS]',), '[TOOL_CALLS]NAME[ARGS]', '', '', _read_list,
             ('[TOOL_CALLS]', '[ARGS]', '[CALL_ID]')),
    ToolForm('llama3', ('<|python_tag|>',), '{"name": "NAME", "parameters": ', '}', '; ',
             _read_object, ('<|python_tag|>',), bare='{', parts=';'))}


def reads(form: ToolForm, text: str, call: tuple[str, Mapping[str, Any]]) -> bool:
    """Return whether a syntax can parse a call anywhere in a text."""
    starts = (match.start() for begin in (*form.begins, form.bare) if begin
              for match in re.finditer(re.escape(begin), text))
    for start in starts:
        try:
            parsed = form.read(text[start:], True)
        except Unreadable:
            continue
        if parsed is not None and call in parsed.calls:
            return True
    return False
