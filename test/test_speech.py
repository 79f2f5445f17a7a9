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

"""`Speech` separates content, thoughts and tool calls, however the text is split into pieces."""

import itertools
import json
import random

from physai_decode.speech import Manner
from physai_decode.speech import PartKind
from physai_decode.speech import Speech
from physai_decode.tool_forms import TOOL_FORMS
import pytest

NAMES = 'go_to', 'pick'
THINKS = {'opens': '<think>', 'closes': '</think>'}
GO, PICK = ('go_to', {'room': 'hall'}), ('pick', {'object': 'the "cup"', 'count': 2})
JSON = '{"name": "go_to", "arguments": {"room": "hall"}}'
TAGGED = f'<tool_call>\n{JSON}\n</tool_call>'
LLAMA = '{"name": "go_to", "parameters": {"room": "hall"}}'
# Form of calls, whether the model thinks, its text; the content, reasoning and calls in it.
TEXTS = [
    ('', True, 'Hello.\n', 'Hello.\n', '', []),
    ('', True, ' \n Hello', ' \n Hello', '', []),
    ('', True, '<think>\nA cup?\n\nYes. \n</think>\n\nBring it.\n', 'Bring it.\n',
     'A cup?\n\nYes.', []),
    ('', True, '\n<think></think>Yes', 'Yes', '', []),
    ('', True, '<think>cut < off </thin', '', 'cut < off </thin', []),
    ('', True, 'no <think> at </think> all', 'no <think> at </think> all', '', []),
    ('', True, '<thin', '<thin', '', []), ('', True, '', '', '', []), ('', True, ' ', ' ', '', []),
    ('hermes', False, TAGGED, '', '', [GO]),
    ('hermes', False, f'I go. \n\n{TAGGED}\n', 'I go.', '', [GO]),
    ('hermes', False, f'{TAGGED}\n{TAGGED}', '', '', [GO, GO]),
    ('hermes', False, f'{TAGGED} Then.', 'Then.', '', [GO]),
    ('hermes', False, f'<tool_call>{JSON}', '', '', [GO]),
    ('hermes', False, f'<tool_call>{JSON} Then', 'Then', '', [GO]),
    ('hermes', False, '<tool_call>{"name": "pick", "arguments": "{\\"a\\": 1}"}</tool_call>', '',
     '', [('pick', {'a': 1})]),
    ('hermes', False, TAGGED.replace('hall', '</tool_call>'), '', '',
     [('go_to', {'room': '</tool_call>'})]),
    ('hermes', False, TAGGED.replace('hall', 'a\\u00e4\nb'), '', '',
     [('go_to', {'room': 'aä\nb'})]),
    ('hermes', False, 'a <tool_call>\n{"name": oops}\n</tool_call> b',
     'a <tool_call>\n{"name": oops}\n</tool_call> b', '', []),
    ('hermes', False, TAGGED.replace('go_to', 'fly'), TAGGED.replace('go_to', 'fly'), '', []),
    ('hermes', False, '<tool_call>\n{"name": "go_to", "argum',
     '<tool_call>\n{"name": "go_to", "argum', '', []),
    ('hermes', False, f'<tool_call>{{"a"}} {TAGGED}', '<tool_call>{"a"}', '', [GO]),
    ('hermes', False, '<tool_call>{"name": "go_to", "arguments": {"a": NaN}}</tool_call>',
     '<tool_call>{"name": "go_to", "arguments": {"a": NaN}}</tool_call>', '', []),
    *(('hermes', False, text, text, '', []) for text in (
        TAGGED.replace('"arguments"', '"parameters": {}, "arguments"'),
        TAGGED.replace('"hall"', '1e999'), TAGGED.replace('"hall"', '1, "room": 2'),
        TAGGED.replace('{"room": "hall"}', '"{\\"a\\": 1} {\\"a\\": 2}"'))),
    ('hermes', False, 'a < b <tool b\n', 'a < b <tool b\n', '', []),
    ('hermes', True, f'<think>\nSo {TAGGED}?\n</think>\n\nOk.\n{TAGGED}', 'Ok.', f'So {TAGGED}?',
     [GO]),
    ('llama3', False, LLAMA, '', '', [GO]), ('llama3', False, f' \n{LLAMA}', '', '', [GO]),
    ('llama3', False, f'<|python_tag|>{LLAMA}', '', '', [GO]),
    ('llama3', False, f'{LLAMA}; {LLAMA}', '', '', [GO, GO]),
    ('llama3', False, f'I call {LLAMA}', f'I call {LLAMA}', '', []),
    ('llama3', False, f'I call <|python_tag|>{LLAMA}', 'I call', '', [GO]),
    ('llama3', False, ' {"answer": [1, 2]}\n', ' {"answer": [1, 2]}\n', '', []),
    ('llama3', False, '{"n": 1}', '{"n": 1}', '', []), ('llama3', False, '{x} ', '{x} ', '', []),
    ('llama3', False, '<|python_tag|>search.call(q="a")', '<|python_tag|>search.call(q="a")', '',
     []),
    ('llama3', False, LLAMA.replace('go_to', 'fly'), LLAMA.replace('go_to', 'fly'), '', []),
    ('mistral_list', False, f'[TOOL_CALLS] [{JSON}, {JSON}]', '', '', [GO, GO]),
    ('mistral_list', False, f'[TOOL_CALLS][{JSON}]', '', '', [GO]),
    ('mistral_list', False, '[TOOL_CALLS] []', '[TOOL_CALLS] []', '', []),
    ('mistral_args', False, 'Ok. [TOOL_CALLS]go_to[ARGS]{"room": "hall"}[TOOL_CALLS]pick'
     '[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}', 'Ok.', '', [GO, ('pick', {'a': 1})]),
    ('mistral_args', False, '[TOOL_CALLS]go_to {"room": 1}', '[TOOL_CALLS]go_to {"room": 1}', '',
     []),
    ('smollm3', True, f'<think>\n</think>\n{TAGGED}', '', '', [GO]),
    ('smollm3', False, '<code>\nhall = go_to(room="hall")\npick(object=\'the "cup"\', count=2)\n'
     '</code>', '', '', [GO, PICK]),
    ('smollm3', False, '<code>import os</code>', '<code>import os</code>', '', []),
    ('smollm3', False, '<code>go_to(a=b)</code>', '<code>go_to(a=b)</code>', '', []),
    ('smollm3', False, '<code>go_to({"a": 1})</code>', '<code>go_to({"a": 1})</code>', '', []),
    ('smollm3', False, '<code>go_to(**{"a": 1})</code>', '<code>go_to(**{"a": 1})</code>', '', []),
    *(('smollm3', False, text, text, '', []) for text in (
        '<code>go_to(a={[1]: 2})</code>', '<code>go_to(a=[{"b": 1, "b": 2}])</code>',
        '<code>go_to(a={1: 1, "1": 2})</code>'))]


def separate(form, thinks, pieces, thinking=False):
    """Return the content, the reasoning and the calls in these pieces of text."""
    manner = Manner(form=form, **(THINKS if thinks else {}))
    speech = Speech(manner, NAMES if form else (), thinking)
    parts = [part for piece in pieces for part in speech.push(piece)] + speech.flush()
    assert not speech.held
    texts = [''.join(part.text for part in parts if part.kind is kind)
             for kind in (PartKind.CONTENT, PartKind.REASONING)]
    return *texts, [part.call for part in parts if part.kind is PartKind.CALL]


def check(form, thinks, pieces, content, reasoning, calls):
    separated = separate(form, thinks, pieces)
    assert separated[:2] == (content, reasoning)
    assert [(call.name, call.arguments) for call in separated[2]] == calls
    assert len({call.id for call in separated[2]}) == len(calls)
    assert all(call.id.startswith('call_') for call in separated[2])


@pytest.mark.parametrize(('form', 'thinks', 'text', 'content', 'reasoning', 'calls'), TEXTS)
def test_parts_do_not_depend_on_the_split_of_the_text(
        form, thinks, text, content, reasoning, calls):
    check(form, thinks, [text], content, reasoning, calls)
    check(form, thinks, text, content, reasoning, calls)
    for one, other in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        pieces = text[:one], text[one:other], text[other:]
        check(form, thinks, pieces, content, reasoning, calls)


def test_parts_of_random_text_do_not_depend_on_its_split():
    parts = ['<think>', '</think>', '<tool_call>', '</tool_call>', JSON, LLAMA, '{', '}', ' ',
             '\n', 'go', '"', '[TOOL_CALLS]', '[ARGS]', '[', ']', ';', '<|python_tag|>', '<code>',
             'go_to(a=1)', '</code>', '<', 'nan', ':', '\\']
    draw = random.Random(5)
    for form in TOOL_FORMS:
        for _ in range(300):
            text = ''.join(draw.choices(parts, k=draw.randrange(1, 9)))
            expected = separate(form, True, [text])
            for pieces in (text, [text[:7], text[7:]]):
                separated = separate(form, True, pieces)
                assert separated[:2] == expected[:2], text
                calls, wanted = ([call[1:] for call in each[2]] for each in (separated, expected))
                assert calls == wanted, text


@pytest.mark.parametrize('form', TOOL_FORMS)
def test_parses_the_calls_that_its_form_writes(form):
    written = TOOL_FORMS[form].written([GO, PICK])
    check(form, False, written, '', '', [GO, PICK])


def test_thought_that_the_prompt_opens():
    for pieces in (['so\n</think>\n\nYes'], '\nso </think> Yes'):
        assert separate('', True, pieces, True) == ('Yes', 'so', [])
    assert separate('', True, 'no end', True) == ('', 'no end', [])


@pytest.mark.parametrize(('tail', 'inside'), [
    ('<assistant>', None), ('<assistant><think>\n', True), ('<think>\n\n</think>\n\n', False),
    ('<think> a', None), ('', None)])
def test_detects_whether_a_prompt_ends_inside_a_thought(tail, inside):
    assert Manner(**THINKS).is_inside(tail) is inside
    assert Manner().is_inside(tail) is None


def test_returns_text_as_soon_as_its_kind_is_known():
    speech = Speech(Manner(form='hermes', **THINKS), NAMES)
    out = [''.join(part.text for part in speech.push(piece)) for piece in (
        'I ', 'go', ' now', '. <', 'b>')]
    assert out == ['I', ' go', ' now', '.', ' <b>']
    out = [speech.push(piece) for piece in ('<tool_call>', JSON, '</tool_call>')]
    assert [len(parts) for parts in out] == [0, 0, 1]
    assert not speech.held


def test_number_with_too_many_digits_is_no_call():
    """Python does not convert more than 4300; a small model may repeat a digit for long."""
    text = TAGGED.replace('"hall"', 5000 * '1')
    check('hermes', False, [text[:4900], text[4900:]], text, '', [])


def test_reports_why_text_is_not_a_call():
    speech = Speech(Manner(form='hermes'), NAMES)
    speech.push(TAGGED.replace('go_to', 'fly'))
    assert 'fly is not one of the tools' in speech.problem
    plain = Speech(Manner(form='llama3'), NAMES)
    plain.push(json.dumps({'answer': 1}))
    plain.flush()
    assert not plain.problem
