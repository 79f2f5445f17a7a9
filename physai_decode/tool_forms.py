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
The forms in which models write calls of tools: how each is read, and how it is written.

A form is data and one function that reads; a new one is an entry of `FORMS`. It knows neither
tokens nor templates.
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
from typing import NoReturn

_LONGEST_NAME = 200             # characters until [ARGS]
_LONGEST_WORD = 12              # of JSON that may be cut: a literal, or an escape


class Read(NamedTuple):
    """Calls that were read from the beginning of a text."""

    calls: list[tuple[str, Mapping[str, Any]]]      # names and arguments
    length: int                     # characters of the text that they are


class Unreadable(ValueError):
    """What began like a call is none; the message says why, and is empty where it is just text."""


@dataclass(frozen=True)
class ToolForm:
    """
    One form.

    Calls are written as ``opens``, then each between ``before``, with ``NAME`` for the tool's
    name, and ``after``, parted by ``between``, then ``closes``. ``read`` takes a text that starts
    where a call begins, and whether it is all there is; it gives None where more has to come.
    """

    name: str
    begins: tuple[str, ...]         # texts that begin a call, wherever they stand
    before: str
    after: str
    between: str
    read: Callable[[str, bool], Read | None]
    markers: tuple[str, ...]        # texts that may be tokens of their own
    opens: str = ''
    closes: str = ''
    bare: str = ''                  # begins a call too, at the beginning of an answer alone
    parts: str = ''                 # stands between two calls, and is no text

    def written(self, calls: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
        """Write calls as a model does."""
        each = (f'{self.before.replace("NAME", name)}{json.dumps(arguments, ensure_ascii=False)}'
                f'{self.after}' for name, arguments in calls)
        return f'{self.opens}{self.between.join(each)}{self.closes}'


def _no_number(text: str) -> NoReturn:
    raise Unreadable(f'{text} is no number of JSON')


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_number)


def _decoded(text: str, begin: int, over: bool) -> tuple[Any, int] | None:
    """
    Decode a JSON value, and give where it ends; None where more has to come.

    :param over: no more comes.
    """
    try:
        return _DECODER.raw_decode(text, begin)
    except RecursionError:
        raise Unreadable('it is nested too deeply') from None
    except json.JSONDecodeError as error:
        open_ = error.msg.startswith('Unterminated') or \
            error.pos + _LONGEST_WORD > len(text.rstrip())
        if over or not open_:
            raise Unreadable(f'it is no JSON: {error}') from None
        return None


def _call(value: Any) -> tuple[str, Mapping[str, Any]]:
    """Give the call that a JSON object is."""
    if not isinstance(value, dict) or not isinstance(value.get('name'), str):
        raise Unreadable('it is no object with a name')
    arguments = value.get('arguments', value.get('parameters', {}))
    if isinstance(arguments, str):
        arguments, _ = _decoded(arguments.strip() or '{}', 0, True) or ({}, 0)
    if not isinstance(arguments, dict):
        raise Unreadable('its arguments are no object')
    return value['name'], arguments


def _after_blanks(text: str, begin: int) -> int:
    return begin + len(text[begin:]) - len(text[begin:].lstrip())


def _read_tagged(text: str, over: bool) -> Read | None:
    """Read ``<tool_call>{...}</tool_call>``; the last tag may be missing at the end."""
    begin, close = _after_blanks(text, len('<tool_call>')), '</tool_call>'
    found = _decoded(text, begin, over)
    if found is None:
        return None
    value, end = found
    rest = _after_blanks(text, end)
    if text.startswith(close, rest):
        end = rest + len(close)
    elif not over and close.startswith(text[rest:]):
        return None
    return Read([_call(value)], end)


def _read_code(text: str, over: bool) -> Read | None:
    """Read ``<code>f(a=1)</code>``: calls with the names and values of their arguments."""
    code, close, _ = text.partition('</code>')
    if not close and not over:
        return None
    try:
        lines = ast.parse(code.removeprefix('<code>').strip()).body
        calls = [line.value for line in lines if isinstance(line, (ast.Expr, ast.Assign))]
        if not calls or len(calls) < len(lines):
            raise Unreadable('it is more than calls of tools')
        return Read([_python_call(each) for each in calls], len(code) + len(close))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f'it is no Python: {error}') from None


def _python_call(node: ast.expr) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise Unreadable('it is more than calls of tools with named arguments')
    arguments = {each.arg: ast.literal_eval(each.value) for each in node.keywords if each.arg}
    if len(arguments) < len(node.keywords):
        raise Unreadable('it is more than calls of tools with named arguments')
    try:
        return node.func.id, json.loads(json.dumps(arguments, allow_nan=False))
    except TypeError as error:
        raise Unreadable(f'its arguments are no JSON: {error}') from None


def _read_tagged_or_code(text: str, over: bool) -> Read | None:
    return (_read_code if text.startswith('<code>') else _read_tagged)(text, over)


def _read_object(text: str, over: bool) -> Read | None:
    """Read ``{"name": ..., "parameters": {...}}``, with or without ``<|python_tag|>``."""
    tag = '<|python_tag|>'
    tagged = text.startswith(tag)
    begin = _after_blanks(text, len(tag) if tagged else 0)
    first = re.match(r'\{\s*"(\w*)', text[begin:])
    if text[begin:begin + 1] not in ('{', '') or first and not any(
            key.startswith(first[1]) for key in ('name', 'parameters', 'arguments', 'type')):
        raise Unreadable('it is no object with a name' if tagged else '')
    try:
        found = _decoded(text, begin, over)
        return found and Read([_call(found[0])], found[1])
    except Unreadable as error:
        raise Unreadable(str(error) if tagged or '"name"' in text else '') from None


def _read_list(text: str, over: bool) -> Read | None:
    """Read ``[TOOL_CALLS] [{...}, ...]`` and ``[TOOL_CALLS]name[ARGS]{...}``."""
    begin = _after_blanks(text, len('[TOOL_CALLS]'))
    rest = text[begin:]
    if rest[:1] in ('[', '{'):
        found = _decoded(text, begin, over)
        if found is None:
            return None
        value, end = found
        return Read([_call(each) for each in (value if isinstance(value, list) else [value])], end)
    named = re.match(r'([\w.-]{1,64})(?:\[CALL_ID\]\w{1,64})?\[ARGS\]', rest)
    if named is None:
        if over or len(rest) > _LONGEST_NAME:
            raise Unreadable('it is neither a list of calls nor a name with arguments')
        return None
    found = _decoded(text, _after_blanks(text, begin + named.end()), over)
    return found and Read([_call({'name': named[1], 'arguments': found[0]})], found[1])


_TAGS = '<tool_call>', '</tool_call>'
_TAGGED = {'before': '<tool_call>\n{"name": "NAME", "arguments": ', 'after': '}\n</tool_call>',
           'between': '\n'}
# The first that reads what a template writes is taken.
FORMS = {form.name: form for form in (
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
    """Tell whether a form finds a call anywhere in a text."""
    starts = (match.start() for begin in (*form.begins, form.bare) if begin
              for match in re.finditer(re.escape(begin), text))
    for start in starts:
        try:
            found = form.read(text[start:], True)
        except Unreadable:
            continue
        if found is not None and call in found.calls:
            return True
    return False
