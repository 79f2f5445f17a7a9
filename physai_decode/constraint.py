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
Constrain an answer to a grammar: before each token, a mask selects the allowed tokens.

The llguidance library compiles a JSON Schema, a regular expression, a list of choices or a grammar
for the tokens of the model, within limits on its time and memory. The mask is computed on the
host, while the device computes the logits.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from copy import copy
import json
from pathlib import Path
import re
import time
from typing import Any

from physai_decode import regular_file
from physai_decode.config import ConstraintConfig
from physai_decode.config import shown
from physai_decode.config import shown_json
from physai_decode.engine import described
from physai_decode.engine import EngineError
from physai_decode.pip_command import install
from physai_decode.request import Calls
from physai_decode.request import Form
from physai_decode.request import parse_first
from physai_decode.request import parse_value
from physai_decode.request import RequestError
from physai_decode.speech import BLANKS
from physai_decode.speech import Thought
from physai_decode.tokenizer_files import TextError
from physai_decode.tool_forms import TOOL_FORMS

MAX_BYTES = 65_536              # limit on a schema or a grammar
MAX_CALLS = 8                   # limit on the tool calls of one answer, if calls are required
KEPT = 8                        # compiled constraints in the cache
# Whitespace between two parts of JSON. Without a limit, a model can write blanks forever.
WHITESPACE = r'[ \t\n\r]{1,32}'
AFTER_THOUGHT = r'[ \t\n\r]{1,4}'
_TEXTS = frozenset(('choice', 'grammar', 'regex'))     # forms whose answers can begin with blanks
_JSON = {'lenient': False, 'coerce_one_of': False, 'whitespace_pattern': WHITESPACE}
_ARGUMENTS = {**_JSON, 'whitespace_pattern': ' '}
_COMBINING = frozenset(('$ref', 'additionalProperties', 'allOf', 'anyOf', 'oneOf',
                        'patternProperties'))
# Keywords of JSON Schema: those that are enforced, and those that constrain nothing.
ENFORCED = frozenset((
    '$ref', 'additionalItems', 'additionalProperties', 'allOf', 'anyOf', 'const', 'enum',
    'exclusiveMaximum', 'exclusiveMinimum', 'format', 'items', 'maxItems', 'maxLength',
    'maxProperties', 'maximum', 'minItems', 'minLength', 'minimum', 'multipleOf', 'oneOf',
    'pattern', 'patternProperties', 'prefixItems', 'properties', 'required', 'type'))
ANNOTATIONS = frozenset((
    '$comment', '$defs', '$id', '$schema', 'default', 'definitions', 'deprecated', 'description',
    'examples', 'readOnly', 'title', 'writeOnly'))
_BOUNDS = 'exclusiveMaximum', 'exclusiveMinimum', 'maximum', 'minimum', 'multipleOf'
_EXACT = 2**53                  # the library computes with numbers of 64-bit floating point
TYPES = 'array', 'boolean', 'integer', 'null', 'number', 'object', 'string'
_BY_NAME = '$defs', 'definitions', 'patternProperties', 'properties'
_LISTS = 'allOf', 'anyOf', 'items', 'oneOf', 'prefixItems'
_SINGLE = 'additionalItems', 'additionalProperties', 'items'
_NOTHING = 'no token of the vocabulary can follow'
# What %json can occur in without meaning: comments, strings, regexes and names of special tokens.
_LARK = re.compile(r'(?:#|//)[^\n]*|"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\])+/|<[^<>\s]+>|%json\s*')


class ConstraintError(TextError):
    """A constraint cannot be compiled or enforced; the message says why."""


class Vocabulary:
    """The tokens of a model; compiles constraints for them."""

    def __init__(self, tokenizer: Any, size: int, end_ids: Sequence[int]) -> None:
        """
        Read the tokens, which takes a second for 150,000 tokens.

        :param tokenizer: the ``tokenizers.Tokenizer`` of the model.
        :param size: vocabulary size of the model; ids that the tokenizer lacks are never allowed.
        :param end_ids: ids that end an answer.
        :raises ConstraintError: llguidance is not installed, or cannot read the tokenizer.
        """
        try:
            import llguidance
        except ImportError as error:
            raise ConstraintError(
                f'an answer cannot be constrained: {error}: {install("llguidance")}') from error
        self._library: Any = llguidance
        self._size, self._end_ids = size, tuple(end_ids)
        # The most recently used one is last.
        self._kept: dict[tuple[Thought | None, str], Constraint] = {}
        self._added = {token.content: id_
                       for id_, token in tokenizer.get_added_tokens_decoder().items()}
        least = max(tokenizer.get_vocab().values(), default=0) + 1      # may exceed ``size``
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.to_str(), n_vocab=max(size, least), eos_token=list(end_ids) or None)
        except Exception as error:          # the library raises no narrower type
            raise ConstraintError(
                'an answer cannot be constrained: llguidance cannot read the tokenizer: '
                f'{described(error)}; remove the constraint, or choose another model') from error

    def constraint(self, form: Form, thought: Thought | None = None) -> 'Constraint':
        """
        Return a constraint in its initial state; use it for one answer at a time.

        The last `KEPT` constraints stay compiled, and their masks become faster with use.

        :param thought: a thought that may precede the constrained answer.
        :raises ConstraintError: the constraint is not supported or too large; the message names
            the field.
        """
        matcher = self._library.LLMatcher
        try:
            grammar = self._grammar(form)
            key = thought, grammar
            constraint = self._kept.pop(key, None)
            if constraint is not None and constraint.reset():
                self._kept[key] = constraint
                return constraint
            exact = False
            if form.kind in _TEXTS:
                compiled = matcher(self._tokenizer, grammar, log_level=0)
                exact = not compiled.is_error() and self._may_begin_blank(compiled)
            if thought is not None or form.kind not in _TEXTS:
                compiled = matcher(
                    self._tokenizer, self._after(thought, grammar, exact), log_level=0)
        except ConstraintError:
            raise
        except Exception as error:          # of the library's parsers in Python and Rust
            raise ConstraintError(f'{form.name} cannot be used: {error}') from error
        reason = compiled.get_error() or '; '.join(compiled.get_grammar_warnings())
        if reason:
            raise ConstraintError(f'{form.name} cannot be used: {" ".join(reason.split())}')
        self._kept[key] = constraint = Constraint(compiled, self._size, self._end_ids, exact)
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return constraint

    def _grammar(self, form: Form) -> str:
        """Convert a form to a grammar of the library."""
        if form.kind == 'calls':
            content = self._lark(form.content)
        elif form.kind in ('regex', 'grammar'):
            content = form.content
        else:
            content = json.dumps(form.content)
        if len(content) > MAX_BYTES:
            raise ConstraintError(
                f'{form.name} has {len(content)} bytes: at most {MAX_BYTES} are allowed')
        matcher = self._library.LLMatcher
        if form.kind == 'json_schema':
            check_schema(form.content, form.name)
            return str(matcher.grammar_from_json_schema(
                json.dumps(_without_draft(form.content)), overrides=_JSON))
        if form.kind == 'regex':
            return str(matcher.grammar_from_regex(content))
        if form.kind == 'calls':
            return str(matcher.grammar_from_lark(content))
        grammar = str(self._library.grammar_from(form.kind, content))
        return _with_checked_schemas(grammar, form.name) if form.kind == 'grammar' else grammar

    def _lark(self, calls: Calls) -> str:
        """Write a grammar of tool calls, with fixed text around the arguments."""
        form, rules = TOOL_FORMS[calls.form], []

        def literal(text: str) -> str:
            parts = re.split(f'({"|".join(map(re.escape, form.markers))})', text)
            return ' '.join(self._marker(part) for part in parts if part)

        for index, tool in enumerate(calls.tools):
            function = tool['function']
            name = f'tools[{index}].function.parameters'
            schema = _arguments(function.get('parameters', {}))
            check_schema(schema, name)
            schema = _without_draft(schema) | {'x-guidance': _ARGUMENTS}
            rules.append(f'call_{index}: {literal(form.before.replace("NAME", function["name"]))} '
                         f'%json {json.dumps(schema)} {literal(form.after)}')
        more = '' if calls.single else f'({literal(form.between)} call){{0,{MAX_CALLS - 1}}}'
        choice = ' | '.join(f'call_{index}' for index in range(len(rules)))
        return '\n'.join((f'start: {literal(form.opens)} call {more} {literal(form.closes)}',
                          f'call: {choice}', *rules))

    def _marker(self, text: str) -> str:
        """Write a text for a grammar: as a token id if it is an added token, else as a string."""
        return f'<[{self._added[text]}]>' if text in self._added else json.dumps(text)

    def _may_begin_blank(self, compiled: Any) -> bool:
        """Whether an answer may begin with a blank."""
        return any(compiled.validate_tokens(self._tokenizer.tokenize_bytes(blank.encode()))
                   for blank in BLANKS)

    def _after(self, thought: Thought | None, grammar: str, exact: bool) -> str:
        """Extend a grammar by a thought that may come first, and by blanks unless ``exact``."""
        if thought is None:
            return grammar
        answer = json.loads(grammar)['grammars'] if grammar.startswith('{') else [
            {'lark_grammar': grammar}]
        close = self._added.get(thought.closes)
        # As in `Speech`, a thought also ends if ordinary tokens spell out the marker.
        text = json.dumps(thought.closes)
        body = 'body' if close is None else f'(body | TEXT? <[{close}]>)'
        blanks = '' if exact else f' /{AFTER_THOUGHT}/?'
        rules = [f'thought: {body}{blanks}', 'start: ' + (
            'thought @answer' if thought.inside else
            f'({self._marker(thought.opens)} thought)? @answer'),
            f'body[suffix={text}]: /(?s:.*)/',
            f'TEXT: /(?s:.+)/ & ~(/(?s:.*)/ {text} /(?s:.*)/)']
        return json.dumps({'grammars': [
            {'name': 'thought', 'lark_grammar': '\n'.join(rules)},
            {**answer[0], 'name': 'answer'}, *answer[1:]]})


class Constraint:
    """
    The constraint of one answer; see `physai_decode.engine.Constraint`.

    Its state follows from the accepted tokens.
    """

    def __init__(self, matcher: Any, size: int, end_ids: Sequence[int], exact: bool) -> None:
        """
        Wrap a compiled grammar.

        :param matcher: an ``llguidance.LLMatcher``.
        :param exact: whether blanks after a thought belong to the answer.
        """
        self.exact = exact
        self._matcher, self._bytes = matcher, (size + 7) // 8
        self._ends = [(id_, id_ >> 3, 1 << (id_ & 7)) for id_ in end_ids]
        self._end_ids = frozenset(end_ids)
        self._nothing, self._last_byte = bytes(self._bytes), 0xff >> -size % 8
        self._end_taken = False
        self.mask_s = 0.0

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and only an end token can follow."""
        return self._end_taken or bool(self._matcher.is_stopped()) and self.complete

    def mask(self) -> bytearray:
        """
        Compute the mask of allowed tokens: bit ``id % 8`` of byte ``id // 8``.

        End tokens are allowed if and only if the answer may end here.

        :raises ConstraintError: no token is allowed, or a limit of the library was exceeded.
        """
        begin_s = time.perf_counter()
        bits = bytearray(self._matcher.compute_bitmask())
        del bits[self._bytes:]
        bits[-1] &= self._last_byte             # the tokenizer may have more ids than the model
        complete = self.complete
        for _, place, bit in self._ends:
            bits[place] = bits[place] | bit if complete else bits[place] & ~bit
        self.mask_s = time.perf_counter() - begin_s
        if self._matcher.is_error():
            raise self._error()
        if bits == self._nothing:
            raise ConstraintError(f'the constraint cannot be enforced any further: {_NOTHING}')
        return bits

    def forced(self) -> list[int]:
        """Return the tokens that the constraint forces next, which may be none."""
        return [] if self._end_taken else list(self._matcher.compute_ff_tokens())

    def fits(self, token_ids: Sequence[int]) -> int:
        """Return the length of the allowed prefix of ``token_ids``, which has no end token."""
        return 0 if self._end_taken else int(self._matcher.validate_tokens(list(token_ids)))

    def walk(self, draft: Sequence[int]) -> Iterator[bytearray]:
        """
        Yield the mask before each draft token, and the one after the last.

        Stop early if the constraint rejects a draft token, or if nothing can follow. The state of
        the constraint does not change.

        :raises ConstraintError: as `mask`, for the first mask only.
        """
        yield self.mask()
        ahead = copy(self)
        ahead._matcher = self._matcher.deep_copy()
        for token_id in draft:
            try:
                ahead.accept(token_id)
                if ahead.ended:
                    return
                mask = ahead.mask()
            except ConstraintError:
                return
            self.mask_s += ahead.mask_s
            yield mask

    def accept(self, token_id: int) -> None:
        """
        Advance by the sampled token.

        :raises ConstraintError: the token is not allowed.
        """
        if token_id in self._end_ids and self.complete:
            self._end_taken = True
        elif not self._matcher.consume_token(token_id):
            raise self._error()

    def rollback(self, count: int) -> None:
        """Undo the last ``count`` tokens."""
        if count and self._end_taken:
            self._end_taken, count = False, count - 1
        if count and not self._matcher.rollback(count):
            raise self._error()

    def reset(self) -> bool:
        """Return to the initial state; False if it cannot because a limit was exceeded."""
        self._end_taken = False
        return bool(self._matcher.reset())

    def _error(self) -> ConstraintError:
        # What follows is the state of the library and the whole grammar.
        reason = ' '.join(self._matcher.get_error().partition('<state>')[0].split())
        return ConstraintError('the constraint cannot be enforced any further: '
                               + (_NOTHING if reason == 'NoExtensionBias' else reason))


def configured(config: ConstraintConfig) -> Form | None:
    """
    Return the constraint that the parameters set, or None.

    :raises ConstraintError: more than one is set, or a file cannot be read.
    """
    given = {name: value for name, value in vars(config).items() if value}
    if len(given) > 1:
        raise ConstraintError(f'{" and ".join(f"constraint.{name}" for name in given)} are set: '
                              'set one of them')
    for name, value in given.items():
        kind, is_file = name.removesuffix('_file'), name.endswith('_file')
        name = f'constraint.{name}'
        where = f'{name} ({shown(value)})'
        if is_file:
            value = _read(name, value)
        if kind == 'schema':
            return Form('json_schema', _parsed(where if is_file else name, value), name)
        return Form(kind, list(value) if kind == 'choice' else value, name)
    return None


def _arguments(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the schema of a tool's arguments: an object without further properties."""
    closed = {} if _COMBINING & schema.keys() else {'additionalProperties': False}
    return {'type': 'object', **closed, **schema}


def _without_draft(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema without its draft, as the library ignores keywords that the draft lacks."""
    return {keyword: value for keyword, value in schema.items() if keyword != '$schema'}


def check_schema(schema: Any, name: str) -> None:
    """
    Refuse a JSON Schema with keywords that are not enforced, wrong types, or rounded numbers.

    :param name: path of the schema in the request, for the message.
    :raises ConstraintError: a keyword is not enforced, a type does not exist, or an integer would
        be rounded; the message names it and its place, a JSON Pointer.
    """
    if not isinstance(schema, Mapping):
        raise ConstraintError(f'{name} is {shown_json(schema)}: expected an object')
    found = [(schema, '')]
    while found:
        each, pointer = found.pop()
        where = f'{name} at {pointer}' if pointer else name
        for keyword, value in each.items():
            if keyword not in ENFORCED | ANNOTATIONS or keyword == '$schema' and pointer:
                raise ConstraintError(
                    f'{where} has the keyword {shown_json(keyword)}, which is not enforced: '
                    f'remove it; the enforced keywords are {", ".join(sorted(ENFORCED))}')
            rounded = _rounded(keyword, value)
            if rounded is not None:
                raise ConstraintError(
                    f'{where} has {rounded} in {keyword}, but integers beyond {_EXACT} would be '
                    'rounded: use a smaller one, or a string')
        if 'additionalItems' in each and 'prefixItems' in each:
            raise ConstraintError(f'{where} has additionalItems beside prefixItems, which is not '
                                  'enforced: use items instead')
        kind = each.get('type', 'object')
        kinds = kind if isinstance(kind, list) else [kind]
        if not kinds or not all(isinstance(one, str) and one in TYPES for one in kinds):
            raise ConstraintError(f'{where} has the type {shown_json(kind)}: expected one of '
                                  f'{", ".join(TYPES)}, or a list of these')
        found += _subschemas(each, pointer)


def _with_checked_schemas(lark: str, name: str) -> str:
    """
    Check each %json schema of a grammar, and remove its draft.

    :raises ConstraintError: as `check_schema`, or a schema is not valid JSON.
    """
    parts, end, at = [], 0, 0
    while match := _LARK.search(lark, at):
        at = match.end()
        if match[0].startswith('%json'):
            line = lark.count('\n', 0, match.start()) + 1
            where = f'the %json in line {line} of {name}'
            schema, length = _parsed(where, lark[at:], parse_first)
            options = schema.pop('x-guidance', None) if isinstance(schema, dict) else None
            check_schema(schema, where)
            if '$schema' in schema:
                schema = _without_draft(schema) | ({'x-guidance': options} if options else {})
                parts += [lark[end:at], json.dumps(schema)]
                end = at + length
            at += length
    return ''.join([*parts, lark[end:]])


def _rounded(keyword: str, value: Any) -> int | None:
    """Return an integer of a keyword's value that the library would round; None without one."""
    if keyword in _BOUNDS:      # it cuts greater ones off at 64 bits
        return value if type(value) is int and _EXACT < abs(value) < 2**63 - 1 else None
    found = [value] if keyword in ('const', 'enum') else []
    while found:
        each = found.pop()
        if type(each) is int and abs(each) > _EXACT:
            return each
        found += each.values() if isinstance(each, Mapping) else \
            each if isinstance(each, list) else ()
    return None


def _subschemas(schema: Mapping[str, Any],
                pointer: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the direct subschemas of a schema and their JSON Pointers."""
    for keyword, value in schema.items():
        parts: list[tuple[str, Any]] = []
        if keyword in _BY_NAME and isinstance(value, Mapping):
            parts = [(f'{keyword}/{name.replace("~", "~0").replace("/", "~1")}', part)
                     for name, part in value.items()]
        elif keyword in _LISTS and isinstance(value, list):
            parts = [(f'{keyword}/{index}', part) for index, part in enumerate(value)]
        elif keyword in _SINGLE:
            parts = [(keyword, value)]
        for place, part in parts:
            if isinstance(part, Mapping):
                yield part, f'{pointer}/{place}'


def _read(name: str, path: str) -> str:
    try:
        return regular_file.read(Path(path).absolute(), MAX_BYTES, '').decode('utf-8-sig')
    except (OSError, EngineError, UnicodeDecodeError) as error:
        raise ConstraintError(
            f'{name} is {shown(path)}, which cannot be read: {error}') from error


def _parsed(name: str, text: str, parse: Callable[[str, str], Any] = parse_value) -> Any:
    try:
        return parse(text, name)
    except RequestError as error:
        message = str(error)
        raise ConstraintError(
            message if message.startswith(name) else f'{name}: {message}') from error
