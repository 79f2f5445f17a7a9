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

"""Constrained answers of models with random weights conform to their constraint."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import product
import json
from pathlib import Path
import re
from types import SimpleNamespace
from unittest.mock import MagicMock

from fake_engine import byte_tokenizer
from fake_engine import FakeEngine
from fake_engine import forever
from fake_engine import say
import jsonschema
from physai_decode import checkpoint
from physai_decode.config import ConstraintConfig
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.constraint import configured
from physai_decode.constraint import ConstraintError
from physai_decode.constraint import Vocabulary
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engines import device as devices
from physai_decode.engines.native import start
from physai_decode.engines.native.engine import NativeEngine
from physai_decode.engines.transformers.engine import TransformersEngine
from physai_decode.request import Calls
from physai_decode.request import Form
from physai_decode.request import Request
import pytest
import random_model
from tokenizers import Tokenizer
import torch
from worker_rig import maker

TOKENIZER = Path(checkpoint.__file__).parent / 'models' / 'tiny_planner' / 'tokenizer.json'
END = 2
TOKENS = 120
GREEDY = SamplingConfig(max_new_tokens=TOKENS)
SAMPLED = SamplingConfig(max_new_tokens=TOKENS, temperature=1.0, top_p=0.95, seed=3)


def array(items, most, **others):
    return {'type': 'array', 'items': items, 'maxItems': most, **others}


def record(properties, required=None, **others):
    return {'type': 'object', 'properties': properties, 'additionalProperties': False,
            'required': sorted(properties) if required is None else required, **others}


WORD = {'type': 'string', 'pattern': '^[a-z]{1,8}$'}
# Small enough that a model with random weights ends most answers within 120 tokens.
SIMPLE = [
    {'type': 'boolean'}, {'type': 'null'}, {'type': ['boolean', 'null']},
    *({'type': 'integer', 'minimum': low, 'maximum': high} for low, high in (
        (0, 0), (0, 1), (0, 9), (3, 17), (-5, 5), (-100, -90), (95, 105), (0, 255), (-1, 1000),
        (998, 1003))),
    *({'type': 'integer', 'exclusiveMinimum': low, 'exclusiveMaximum': high} for low, high in (
        (0, 2), (-1, 10), (99, 1000), (-12, -9))),
    *({'type': 'number', 'minimum': low, 'maximum': high} for low, high in (
        (0, 1), (-1, 1), (0.5, 0.75), (-2.5, 10), (99.5, 100.5), (0, 1000))),
    *({'type': 'number', 'exclusiveMinimum': low, 'exclusiveMaximum': high}
      for low, high in ((0, 1), (-0.5, 0.5), (9, 11))),
    *({'type': 'integer', 'minimum': 0, 'maximum': 100, 'multipleOf': step}
      for step in (2, 3, 5, 10, 25)),
    *({'enum': texts} for texts in (
        ['a'], ['go', 'pick', 'place'], ['go', 'good', 'goodbye'], [1, 2, 3], [1, 'one', None],
        [True, False], ['a"b', 'c\\d', 'e\nf'], ['ä', 'ö€', '😀'], [[1, 2], {'a': 1}],
        [1.5, -2.25], ['', ' ', '  '])),
    *({'const': value} for value in (
        0, -7, 1.5, True, None, 'x', 'two words', [], {}, [1, 'a', None], {'a': {'b': [1]}},
        'ünïcödé', 'a/b\\c"d')),
    *({'type': 'string', 'minLength': low, 'maxLength': high} for low, high in (
        (0, 0), (0, 3), (1, 1), (2, 5), (4, 4), (0, 10), (5, 8))),
    *({'type': 'string', 'pattern': pattern} for pattern in (
        '^a$', '^[0-9]{3}$', '^[a-z]{2,4}-[0-9]{1,3}$', '^(go|pick|place)$', '^[A-F0-9]{4}$',
        '^x?y?z$', '^(ab){1,3}$', '^[^a-z"]{2,3}$', r'^\d{2}:\d{2}$', r'^\w{1,4}$', '^$',
        r'^[+-]?[0-9]{1,3}\.[0-9]{2}$', '^(a|b(c|d)){2}$', r'^"[a-c]"$', r'^\\[a-c]$',
        '^[äöü]{1,2}$', '^.{2}$')),
    *({'type': 'string', 'format': form} for form in (
        'date', 'time', 'date-time', 'duration', 'uuid', 'ipv4', 'email'))]
PARTS = [{'type': 'boolean'}, {'enum': ['go', 'pick']}, {'type': 'integer', 'minimum': -3,
         'maximum': 12}, WORD, {'const': None}]
NESTED = [
    *(array(each, 2) for each in PARTS),
    *(array(each, most, minItems=least) for each, (least, most) in product(
        PARTS[:3], ((0, 0), (1, 1), (2, 3), (3, 3), (1, 4)))),
    *(record({'a': one, 'b': other}) for one, other in product(PARTS, PARTS)),
    *(record({'a': one, 'b': other}, []) for one, other in zip(PARTS, PARTS[1:])),
    *(record({'a': one, 'b': other}, ['b']) for one, other in zip(PARTS, PARTS[1:])),
    *({'anyOf': [one, other]} for one, other in zip(PARTS, PARTS[2:])),
    *({'anyOf': [record({'kind': {'const': 'a'}, 'x': one}),
                 record({'kind': {'const': 'b'}, 'y': one})]} for one in PARTS),
    *({'oneOf': [record({'kind': {'const': 'a'}, 'x': one}),
                 record({'kind': {'const': 'b'}, 'x': one})]} for one in PARTS),
    *({'type': 'array', 'prefixItems': [one, other], 'items': False, 'minItems': 2}
      for one, other in zip(PARTS, PARTS[1:])),
    *({'type': 'array', 'prefixItems': [one], 'items': one, 'maxItems': 3} for one in PARTS[:3]),
    *(record({'a': record({'b': record({'c': each})})}) for each in PARTS),
    *(record({'list': array(record({'x': each}), 2)}) for each in PARTS),
    *(array(array(each, 2), 2) for each in PARTS),
    *({'$ref': '#/$defs/it', '$defs': {'it': each}} for each in PARTS),
    *(record({'a': {'$ref': '#/$defs/it'}, 'b': array({'$ref': '#/$defs/it'}, 2)},
             **{'$defs': {'it': each}}) for each in PARTS),
    *(record({'a': {'$ref': '#/definitions/it'}}, definitions={'it': each}) for each in PARTS),
    *({'allOf': [{'type': 'integer', 'minimum': low}, {'maximum': low + 4}]} for low in (0, 7)),
    {'allOf': [record({'a': WORD}, additionalProperties=True), record({'a': {'maxLength': 3}})]},
    {'$ref': '#/$defs/node', '$defs': {'node': record(
        {'name': WORD, 'next': {'anyOf': [{'type': 'null'}, {'$ref': '#/$defs/node'}]}})}},
    {'$ref': '#/$defs/tree', '$defs': {'tree': array({'$ref': '#/$defs/tree'}, 2)}},
    {'type': 'object', 'patternProperties': {'^[a-c]{1,2}$': {'type': 'boolean'}},
     'additionalProperties': False, 'maxProperties': 2},
    {'type': 'object', 'additionalProperties': {'type': 'integer', 'maximum': 9, 'minimum': 0},
     'maxProperties': 1},
    {'type': 'object', 'properties': {'a': {'const': 1}}, 'required': ['a', 'b'],
     'additionalProperties': {'enum': [1, 2]}, 'maxProperties': 2},
    record({'a b': WORD, 'ä"': {'type': 'null'}, '': {'const': 0}}),
    {'title': 'title', 'description': 'text', '$schema': jsonschema.Draft202012Validator
     .META_SCHEMA['$id'], 'default': 1, 'examples': [1], **PARTS[0]},
    {'type': 'object', 'maxProperties': 0}, {'enum': [[], {}]}]
SCHEMAS = SIMPLE + NESTED
make = pytest.fixture(maker)


@pytest.fixture(scope='module')
def tokenizer():
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope='module')
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, 1030, (END,))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Write a model with random weights whose vocabulary is larger than its tokenizer's."""
    return random_model.save(tmp_path_factory.mktemp('model'), 'llama', 5, vocab_size=1030)


def loop_of(kind, folder, **settings):
    config = EngineConfig(device='cpu', dtype='float32', **settings)
    return DecodeLoop(kind(checkpoint.inspect(folder), config, lambda text: None))


def decode(loop, vocabulary, tokenizer, form, sampling, prompt=(5, 6, 7)):
    """Return an answer's text, and whether it ended before the token limit."""
    constraint = vocabulary.constraint(form)
    ids = [id_ for step in loop.stream(prompt, sampling, constraint) for id_ in step.token_ids
           if id_ != END]
    return tokenizer.decode(ids, skip_special_tokens=False), constraint.ended


def validate(schema, text):
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_at_least_200_schemas():
    assert len(SCHEMAS) >= 200


@pytest.mark.slow
@pytest.mark.parametrize('kind', [NativeEngine, TransformersEngine])
def test_answers_that_end_conform_to_their_schema(kind, folder, vocabulary, tokenizer):
    loop = loop_of(kind, folder)
    ends = 0
    schemas = SCHEMAS if kind is NativeEngine else SCHEMAS[::15]
    for index, schema in enumerate(schemas):
        for sampling in (GREEDY, SAMPLED):
            text, ended = decode(loop, vocabulary, tokenizer, Form('json_schema', schema, 'name'),
                                 sampling, (5, 6, 7 + index))
            if ended:
                validate(schema, text)
            ends += ended
    loop.engine.close()
    assert ends > 0.9 * 2 * len(schemas)


def test_constrains_the_fake_engine():
    vocabulary, ends = Vocabulary(byte_tokenizer(), 256, (0,)), 0
    for index, schema in enumerate(SCHEMAS):
        engine = FakeEngine(lambda prompt: forever(chr(33 + prompt[0])), vocab_size=256,
                            max_context=512)
        text, ended = decode(DecodeLoop(engine), vocabulary, byte_tokenizer(),
                             Form('json_schema', schema, 'name'), GREEDY, (index % 90,))
        text = text.removesuffix('\0')
        if ended:
            validate(schema, text)
        ends += ended
    assert ends > len(SCHEMAS) / 2


@pytest.mark.parametrize(('kind', 'content', 'pattern'), [
    ('regex', '[0-9]{3}-[a-z]{2}', '[0-9]{3}-[a-z]{2}'),
    ('choice', ['yes', 'no', 'may"be', 'yesterday'], 'yes|no|may"be|yesterday'),
    ('grammar', 'root ::= "go " room ("," room)? \nroom ::= "kitchen" | "hall"',
     'go (kitchen|hall)(,(kitchen|hall))?'),
    ('grammar', 'start: "a"~2..4 /b+/ "c"', 'a{2,4}b+c')])
@pytest.mark.parametrize('sampling', [GREEDY, SAMPLED])
def test_constrains_to_a_regex_a_choice_or_a_grammar(
        kind, content, pattern, sampling, folder, vocabulary, tokenizer):
    loop = loop_of(NativeEngine, folder)
    for first in range(5):
        text, ended = decode(loop, vocabulary, tokenizer, Form(kind, content, 'name'), sampling,
                             (first,))
        assert not ended or re.fullmatch(pattern, text)
        assert ended or 'b' in text
    loop.engine.close()


class Event:
    """Replaces a CUDA event, for a device that is never busy and whose clock stands still."""

    now_ms = 0.0

    def __init__(self, enable_timing=False, blocking=False):
        self.blocking = blocking

    def record(self, stream):
        self.at_ms = Event.now_ms

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at_ms - self.at_ms

    def query(self):
        return True


def replace_cuda(monkeypatch):
    """Replace what a pipeline needs of CUDA, so that it runs on a CPU."""
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device, priority: MagicMock())
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: None)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor)


@pytest.fixture
def piped(folder, monkeypatch):
    """Return a factory of decode loops whose steps run in a pipeline, on a CPU."""
    replace_cuda(monkeypatch)
    loops = []

    def made(steps_ahead=0, **settings):
        loop = loop_of(NativeEngine, folder, **settings)
        loop.engine._ahead = steps_ahead
        loop.engine.pipeline = loop.engine.piped(False)
        loops.append(loop)
        return loop

    yield made
    for loop in loops:
        loop.engine.close()


@pytest.mark.parametrize('blocking', [False, True])
def test_host_polls_or_sleeps_until_a_token_is_copied(piped, blocking, folder, monkeypatch):
    """`engine.blocking_wait`; the other events are only timed. A CPU computes meanwhile."""
    engine = piped(blocking_wait=blocking).engine
    assert not engine.footprint.sleeps
    monkeypatch.setattr(devices, 'describe', lambda device: ('', ''))
    monkeypatch.setattr(engine.transformer, 'keys', SimpleNamespace(
        dtype=torch.float32, device=torch.device('cuda', 0)))
    assert start.footprint(checkpoint.inspect(folder), engine.transformer, 64, EngineConfig(
        blocking_wait=blocking), {}).sleeps is blocking
    slots = engine.pipeline._free
    assert slots and all(slot.copied.blocking is blocking for slot in slots)
    assert not any(slot.end.blocking for slot in slots)


FORM = Form('json_schema', {'type': 'object'}, 'name')


def free(loop, ids=(5, 6, 7), sampling=GREEDY):
    return [step.token_ids for step in loop.stream(ids, sampling)]


@pytest.mark.parametrize('steps_ahead', [0, 1, 2, 8])
@pytest.mark.parametrize('sampling', [GREEDY, SAMPLED])
def test_pipeline_samples_with_the_mask_of_its_own_step(
        sampling, steps_ahead, folder, vocabulary, tokenizer, piped):
    def answers(loop):
        loop.forget()
        return free(loop, sampling=sampling), decode(loop, vocabulary, tokenizer, FORM, sampling)

    plain = loop_of(NativeEngine, folder)
    assert answers(piped(steps_ahead)) == answers(plain)
    plain.engine.close()


def test_pipeline_starts_the_next_forward_pass_before_the_host_reads_the_token(
        vocabulary, tokenizer, piped, monkeypatch):
    loop, calls = piped(), []
    pipeline, sampler = loop.engine.pipeline, loop.engine._sampler

    def record(owner, name, call, takes_ms):
        own = getattr(owner, name)

        def recorded(*given):
            calls.append(call)
            Event.now_ms += takes_ms
            return own(*given)
        monkeypatch.setattr(owner, name, recorded)

    record(pipeline, '_forward', 'forward', 2.0)
    record(sampler, 'restrict', 'restrict', 100.0)
    record(pipeline, '_draw', 'draw', 1.0)
    record(pipeline, 'collect', 'collect', 1000.0)
    steps = list(loop.stream((5, 6, 7), GREEDY, vocabulary.constraint(FORM)))
    assert calls[:9] == ['restrict', 'forward', 'restrict', 'draw', 'forward', 'collect',
                         'restrict', 'draw', 'forward']
    # The device's time of a step includes neither the mask nor the host's work.
    assert [step.device_s for step in steps[1:]] == pytest.approx([0.003] * len(steps[1:]))


@pytest.mark.parametrize('end', ['cancel', 'error'])
def test_pipeline_drops_a_started_forward_pass(end, folder, vocabulary, tokenizer, piped):
    """As when an answer is cancelled, or its mask fails."""
    loop, plain = piped(), loop_of(NativeEngine, folder)
    constraint = vocabulary.constraint(FORM)
    steps = loop.stream([5, 6, 7], GREEDY, constraint)
    for _ in range(3):
        next(steps)
    assert loop.engine.pipeline._begun
    if end == 'cancel':
        steps.close()
    else:
        constraint.mask = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            next(steps)
        del constraint.mask
    assert free(loop, (9, 8)) == free(plain, (9, 8))
    assert decode(loop, vocabulary, tokenizer, FORM, GREEDY) == decode(
        plain, vocabulary, tokenizer, FORM, GREEDY)
    plain.engine.close()


@pytest.mark.parametrize(('kind', 'content', 'words'), [
    ('json_schema', {'not': {}}, 'the keyword "not", which is not enforced'),
    ('json_schema', {'properties': {'a': {'items': {'uniqueItems': True}}}},
     'name at /properties/a/items has the keyword "uniqueItems"'),
    ('json_schema', {'anyOf': [{'type': 'null'}, {'contains': {}}]}, 'at /anyOf/1 has'),
    ('json_schema', {'x-guidance': {'lenient': True}}, 'x-guidance'),
    ('json_schema', {'type': 'object', 'minProperties': 2}, 'minProperties'),
    ('json_schema', {'minLenght': 3}, 'minLenght'),
    ('json_schema', {'type': 'text'}, '^name has the type "text": expected one of array, .*str'),
    ('json_schema', {'properties': {'a/b~': {'items': {'type': ['null', 'int']}}}},
     r'name at /properties/a~1b~0/items has the type \["null", "int"\]'),
    ('json_schema', {'anyOf': [{'type': 'null'}, {'type': None}]}, '1 has the type null'),
    ('json_schema', {'type': []}, r'has the type \[\]: expected'),
    ('json_schema', {'type': [['string']]}, 'has the type'),
    ('json_schema', {'type': 'string', 'format': 'phone'}, 'phone'),
    ('json_schema', {'type': 'integer', 'minimum': 3, 'maximum': 2}, 'minimum'),
    ('json_schema', {'type': 'integer', 'minimum': 10**400}, 'cannot be used'),
    ('json_schema', {'$ref': 'http://example.org/it.json'}, 'example.org'),
    ('json_schema', {'type': 'string', 'pattern': '(?=a)b'}, 'look'),
    ('json_schema', {'oneOf': [{'type': 'string'}, {'maxLength': 3}]}, 'oneOf'),
    ('json_schema', {'enum': ['x' * 300_000]}, 'at most 65536 are allowed'),
    ('json_schema', {'allOf': [{'anyOf': [record({f'{a}{b}': WORD}) for b in range(9)]}
                               for a in range(9)]}, 'cannot be used'),
    ('json_schema', {'type': 'integer', 'multipleOf': 10**9 + 7}, 'fuel'),
    *(('json_schema', schema, '9007199254740993 in .* would be rounded')
      for schema in ({'const': 2**53 + 1}, {'enum': [1, {'a': [2**53 + 1]}]},
                     {'type': 'integer', 'minimum': 2**53 + 1})),
    ('json_schema', {'items': {'enum': [-2**60]}}, 'at /items has -1152921504606846976 in enum'),
    ('json_schema', {'type': 'array', 'prefixItems': [{'const': 1}], 'additionalItems': False},
     'additionalItems beside prefixItems'),
    ('json_schema', {'items': {'$schema': 'http://json-schema.org/draft-07/schema#'}}, 'schema'),
    ('regex', '(a', 'cannot be used'),
    ('regex', r'(a)\1', 'backreferences'),
    ('grammar', 'root ::= (', 'cannot be used'),
    ('grammar', 'start: ' + '(' * 5000 + '"a"' + ')' * 5000, 'nested'),
    ('grammar', 'start: %json {"x-guidance": {"lenient": true}, "not": {}}', 'not'),
    ('grammar', f'start: "a"\n | %json {{"items": {{"const": {2**53 + 1}}}}}',
     '^the %json in line 2 of name at /items has 9007199254740993 in const'),
    ('grammar', 'start: %json{"const": 1, "const": 2}', 'line 1 of name.*const'),
    ('grammar', 'start: %json 7', 'expected an object'),
    ('grammar', 'start: %json ' + '[' * 30_000, 'nested'),
    *(('grammar', f'%llguidance {{}}\n{hidden} %json {{"const": {2**60}}}\n{after}', 'rounded')
      for hidden, after in (('start: <a"b>', 'b: <a"b>'), ('start: /"\\//', 'a: /"/'),
                            ('start: "\\""', 'a: "b"'), ('# "\nstart:', '# "'),
                            ('// /\nstart:', '// /'), ('start: %regex {"a": "#"}', '')))])
def test_rejects_what_it_can_not_enforce(kind, content, words, vocabulary):
    with pytest.raises(ConstraintError, match=words):
        vocabulary.constraint(Form(kind, content, 'name'))


@pytest.mark.parametrize('draft', [
    'http://json-schema.org/draft-04/schema#', 'http://json-schema.org/draft-07/schema#',
    'https://json-schema.org/draft/2019-09/schema'])
@pytest.mark.parametrize(('schema', 'good', 'bad'), [
    ({'const': 1}, '1', '2'), ({'type': 'array', 'prefixItems': [{'const': 1}]}, '[1]', '[2]'),
    ({'type': 'array', 'items': [{'enum': [1]}], 'additionalItems': False}, '[1]', '[1,1]')],
    ids=str)
@pytest.mark.parametrize('kind', ['json_schema', 'grammar', 'calls'])
def test_enforces_keywords_that_the_draft_lacks(schema, good, bad, draft, kind, vocabulary,
                                                tokenizer):
    form = Form(kind, {'$schema': draft, **schema}, 'name')
    if kind == 'grammar':
        lark = f'# %json\nstart: a "%json"\na: %json {json.dumps(form.content)}\n'
        form = Form(kind, lark, 'name')
        good, bad = f'{good}%json', f'{bad}%json'
    if kind == 'calls':
        tools = ({'type': 'function', 'function': {'name': 'go', 'parameters': {
            '$schema': draft, 'properties': {'a': schema}, 'required': ['a']}}},)
        form = Form('calls', Calls('hermes', tools, True), 'tools')
        good, bad = (f'<tool_call>\n{{"name": "go", "arguments": {{"a": {each}'
                     for each in (good, bad))
    for text, fits in ((good, True), (bad, False)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert (vocabulary.constraint(form).fits(ids) == len(ids)) == fits


def test_allows_the_end_token_only_if_the_answer_is_complete(vocabulary, tokenizer):
    constraint = vocabulary.constraint(Form('regex', 'ab?', 'name'))

    def may_end():
        return bool(constraint.mask()[END // 8] >> END % 8 & 1)

    a, b = (tokenizer.token_to_id(text) for text in 'ab')
    assert not may_end() and not constraint.complete
    constraint.accept(a)
    assert may_end() and constraint.complete and not constraint.ended
    constraint.accept(END)
    assert constraint.ended
    constraint.rollback(1)
    assert not constraint.ended and may_end()
    constraint.accept(b)
    assert constraint.ended
    constraint.rollback(2)
    assert not may_end()
    constraint.accept(a)
    constraint.reset()
    assert not may_end()
    with pytest.raises(ConstraintError):
        constraint.accept(b)


def test_never_allows_ids_beyond_the_vocabulary(tokenizer):
    size = tokenizer.get_vocab_size() - 3
    constraint = Vocabulary(tokenizer, size, (END,)).constraint(Form('regex', '(?s:.)+', 'name'))
    assert int.from_bytes(constraint.mask(), 'little').bit_length() <= size


def test_end_token_that_is_also_text_only_ends(tokenizer):
    """The answer needs this token as text, so no token is allowed there."""
    a = tokenizer.token_to_id('a')
    constraint = Vocabulary(tokenizer, 1024, (a,)).constraint(Form('regex', 'ba', 'name'))
    constraint.accept(tokenizer.token_to_id('b'))
    with pytest.raises(ConstraintError, match='no token'):
        constraint.mask()


@pytest.mark.parametrize(('grammar', 'reason'), [
    ('start: start', 'no token of the vocabulary can follow'),
    ('start: "a" start', 'Too many items .*short lexemes')])
def test_says_briefly_why_a_constraint_ends(grammar, reason, vocabulary, tokenizer):
    """The library adds its state and the whole grammar."""
    constraint = vocabulary.constraint(Form('grammar', grammar, 'name'))
    with pytest.raises(ConstraintError, match=f'any further: [^<]*{reason}$'):
        while True:
            constraint.mask()
            constraint.accept(tokenizer.token_to_id('a'))
            constraint.forced()


def test_reuses_compiled_constraints(vocabulary, tokenizer):
    form = Form('regex', 'a{3}', 'name')
    constraint = vocabulary.constraint(form)
    a = tokenizer.token_to_id('a')
    constraint.accept(a)
    assert vocabulary.constraint(form) is constraint
    for _ in range(3):
        assert not constraint.ended
        constraint.accept(a)
    assert constraint.ended
    vocabulary.constraint(form)
    with pytest.raises(ConstraintError):
        constraint.accept(tokenizer.token_to_id('b'))
    again = vocabulary.constraint(form)         # one that has failed is not used again
    again.accept(a)
    assert again is not constraint
    for count in range(9):
        vocabulary.constraint(Form('regex', f'b{{{count + 1}}}', 'name'))
    assert vocabulary.constraint(form) is not again


def quotes(prompt):
    yield from forever('"')


def test_worker_constrains_answers(make):
    worker, sink = make(FakeEngine(quotes, vocab_size=128))
    number = worker.submit(Request('go', structured_outputs={'choice': ['go', 'stop']}))
    report, text = sink.end(number)
    assert (report.finish_reason, text) == ('stop', 'go')
    assert all(token.mask_ms > 0 for token in sink.tokens)
    number = worker.submit(Request('go', sampling={'max_new_tokens': 4}))
    assert sink.end(number)[1] == '""""'
    assert sink.tokens[-1].mask_ms is None
    number = worker.submit(Request(
        'go', structured_outputs={'regex': '"{40}'}, sampling={'max_new_tokens': 4}))
    assert sink.end(number)[0].finish_reason == 'length'


def test_listed_name_in_escapes_is_an_error(make):
    schema = {'properties': {'a': {'type': 'integer'}}, 'required': ['a']}
    form = Form('json_schema', {'type': 'object', **schema}, 'schema')
    for text, reason in ((r'{"a":1,"\u0061":"x"}', 'error'), (r'{"a":1,"b":"\\u0061"}', 'stop')):
        worker, sink = make(FakeEngine(lambda _, text=text: say(text), vocab_size=128),
                            form=form)
        report, got = sink.end(worker.submit(Request('go')))
        assert (report.finish_reason, got) == (reason, text)


def test_elements_with_a_name_in_escapes_are_not_published(make):
    """The schema does not constrain them, and their path or name may look like a listed one."""
    action = {'properties': {'a': {'enum': ['go']}}, 'type': 'object'}
    form = Form('json_schema', {
        'type': 'object', 'properties': {'plan': {'type': 'array', 'items': action}}}, 'schema')
    text = (r'{"plan":[{"a":"go"},{"a":"go","\u0061":"hit"},{"b":"\\u0061"}],'
            r'"\u0070lan":[{"a":"hit"}]}')
    worker, sink = make(FakeEngine(lambda _: say(text), max_context=400, vocab_size=128),
                        form=form)
    request = Request('go', sampling={'max_new_tokens': 2 * len(text)})
    report, got = sink.end(worker.submit(request))
    assert (report.finish_reason, got) == ('error', text)
    assert [(item.path, item.index, item.value) for _, item in sink.items] == [
        ('/plan', 0, '{"a":"go"}'), ('/plan', 2, r'{"b":"\\u0061"}')]


@pytest.mark.parametrize(('options', 'words'), [
    ({'response_format': {'type': 'json_schema', 'json_schema': {'schema': {'not': {}}}}},
     'response_format.json_schema.schema has the keyword'),
    ({'structured_outputs': {'regex': '('}}, 'structured_outputs.regex cannot be used'),
    ({'structured_outputs': {'regex': 'a'}, 'sampling': {'stop': ('x',)}}, 'stop cannot be used'),
])
def test_worker_rejects_a_constraint_and_goes_on(make, options, words):
    worker, sink = make(FakeEngine(vocab_size=128))
    report, text = sink.end(worker.submit(Request('go', **options)))
    assert report.finish_reason == 'rejected' and words in report.message and not text
    assert sink.end(worker.submit(Request('go')))[1] == 'go'
    assert worker.state == 'idle' and not worker.last_error


def test_a_parameter_with_stop_strings_is_named(make):
    """A plain prompt has no field to override it, so the message names the parameter too."""
    worker, sink = make(FakeEngine(vocab_size=128), sampling=SamplingConfig(stop=('x',)))
    request = Request('go', structured_outputs={'regex': 'a'})
    report = sink.end(worker.submit(request))[0]
    assert 'clear sampling.stop, or set "stop" to []' in report.message
    request = replace(request, sampling={'stop': ()})
    assert sink.end(worker.submit(request))[0].refusal == ''


def test_parameters_constrain_requests_without_a_constraint(make, tmp_path, monkeypatch):
    file = tmp_path / 'answer.json'
    file.write_text('{"enum": [1, 22]}')
    assert configured(ConstraintConfig()) is None
    assert configured(ConstraintConfig(choice=('a', 'b'))).content == ['a', 'b']
    form = configured(ConstraintConfig(schema_file=str(file)))
    assert form == ('json_schema', {'enum': [1, 22]}, 'constraint.schema_file')
    with pytest.raises(ConstraintError, match=r'constraint\.regex and constraint\.choice'):
        configured(ConstraintConfig(regex='a', choice=('a',)))
    for content in ('{', '{"a": 1, "a": 2}'):
        file.write_text(content)
        with pytest.raises(ConstraintError, match=r'constraint\.schema_file'):
            configured(ConstraintConfig(schema_file=str(file)))
    file.write_text('\ufeff"a"')         # as some editors do
    assert configured(ConstraintConfig(schema_file=str(file))).content == 'a'
    file.write_text('a' * 65_537)
    for path in ('/dev/zero', str(tmp_path), str(tmp_path / 'none'), str(file)):
        with pytest.raises(ConstraintError, match=r'constraint\.grammar_file') as raised:
            configured(ConstraintConfig(grammar_file=path))
        assert 'model' not in str(raised.value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConstraintError, match=re.escape(f"'{tmp_path}/sub/none'")):
        configured(ConstraintConfig(schema_file='sub/none'))
    file.write_text('{"enum": [1, 22]}')
    assert configured(ConstraintConfig(schema_file='answer.json')) == form
    worker, sink = make(FakeEngine(quotes, vocab_size=128), form=form)
    assert sink.end(worker.submit(Request('go')))[1] in ('1', '22')
    unconstrained = Request(
        'go', response_format={'type': 'text'}, sampling={'max_new_tokens': 2})
    assert sink.end(worker.submit(unconstrained))[1] == '""'
