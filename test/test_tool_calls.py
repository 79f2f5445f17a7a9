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

"""Requests with tools and answers with thoughts, from the request to its result."""

import json

from fake_engine import CharacterText
from fake_engine import FakeEngine
from fake_engine import say
import jsonschema
from physai_decode.config import ConstraintConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import ThinkingConfig
from physai_decode.constraint import configured
from physai_decode.request import Request
from physai_decode.result import chat_completion
from physai_decode.speech import Manner
from physai_decode.tool_forms import FORMS
import pytest
from worker_rig import making

TOOL = {'type': 'function', 'function': {'name': 'go_to', 'parameters': {
    'type': 'object', 'properties': {'room': {'enum': ['hall', 'kitchen']}},
    'required': ['room']}}}
GO = ('go_to', {'room': 'hall'})
THINKS = {'opens': '<think>', 'closes': '</think>', 'close_ids': tuple(map(ord, '\n</think>\n\n'))}
LONG = SamplingConfig(max_new_tokens=900)


@pytest.fixture
def make():
    with making() as make:
        yield make


def text_of(form='', thinks=False):
    text = CharacterText()
    text.manner = Manner(form=form, reason='of the test', **(THINKS if thinks else {}))
    return text


def asked(make, said, text, engine=None, groups=None, **fields):
    """Have an engine say something; give its report, text, tokens and result."""
    engine = engine or FakeEngine(lambda prompt: say(said), max_context=1000, vocab_size=256)
    worker, sink = make(engine, text, sampling=LONG, **groups or {})
    number = worker.submit(Request.from_json(
        fields if 'messages' in fields else {'prompt': 'x', **fields}))
    report, content = sink.end(number)
    tokens = [token for token in sink.tokens if token.request_id == number]
    assert ''.join(token.reasoning for token in tokens) == report.reasoning
    assert [call for token in tokens for call in token.tool_calls] == [*report.tool_calls]
    return report, content, tokens, chat_completion(report, content, 'm')['choices'][0]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('choice', ['auto', 'required'])
def test_the_first_call_ends_an_answer_that_may_have_one(make, form, choice):
    said = FORMS[form].written([GO, GO]) + ' and more'
    report, content, tokens, ended = asked(
        make, said, text_of(form), tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert ended['finish_reason'] == 'tool_calls'
    call, = ended['message']['tool_calls']
    assert (call['function']['name'], json.loads(call['function']['arguments'])) == GO
    assert content == ''


@pytest.mark.parametrize('form', FORMS)
def test_a_call_is_no_text(make, form):
    said = FORMS[form].written([GO])
    if not FORMS[form].bare:
        said = f'I go.\n{said}'
    report, content, tokens, choice = asked(make, said, text_of(form), tools=[TOOL])
    assert content == ('' if FORMS[form].bare else 'I go.')
    assert (report.finish_reason, choice['finish_reason']) == ('tool_calls', 'tool_calls')
    call, = choice['message']['tool_calls']
    assert call['id'].startswith('call_')
    assert call['type'] == 'function'
    assert (call['function']['name'], json.loads(call['function']['arguments'])) == GO
    assert sum(bool(token.tool_calls) for token in tokens) == 1
    # It can be sent back as it is.
    asked(make, 'ok', text_of(form), tools=[TOOL], messages=[
        {'role': 'user', 'content': 'x'}, choice['message'],
        {'role': 'tool', 'tool_call_id': call['id'], 'content': 'done'}])


def test_a_complete_call_goes_out_before_the_answer_ends(make):
    said = f'{FORMS["hermes"].written([GO])} Then more text follows.'
    _, content, tokens, _ = asked(make, said, text_of('hermes'), tools=[TOOL])
    at = next(index for index, token in enumerate(tokens) if token.tool_calls)
    assert at == said.index('</tool_call>') + len('</tool_call>') - 1
    assert content == 'Then more text follows.'


def test_what_can_not_be_read_stays_text_and_is_told(make):
    said = '<tool_call>{"name": "fly", "arguments": {}}</tool_call>'
    report, content, _, choice = asked(make, said, text_of('hermes'), tools=[TOOL])
    assert content == said
    assert report.finish_reason == choice['finish_reason'] == 'stop'
    assert 'fly is not one of the tools' in report.message


def test_without_tools_nothing_is_a_call(make):
    said = FORMS['hermes'].written([GO])
    for fields in ({}, {'tools': [TOOL], 'tool_choice': 'none'}):
        text = text_of('hermes')
        report, content, _, _ = asked(make, said, text, **fields)
        assert (content, report.tool_calls, report.finish_reason) == (said, (), 'stop')
        assert text.tools == ()


def test_a_model_without_a_form_refuses_tools(make):
    report, *_ = asked(make, 'x', text_of(), tools=[TOOL])
    assert report.finish_reason == 'rejected'
    assert report.message == 'tools can not be used: of the test'


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('choice', ['required', {'type': 'function', 'function': {
    'name': 'go_to'}}])
@pytest.mark.parametrize('thinks', [False, True])
def test_a_forced_call(make, form, choice, thinks):
    """The engine would say something else; it says a call."""
    text = text_of(form, thinks)
    report, content, _, _ = asked(
        make, '<think>so</think>qqqqqqqqqqq' if thinks else 'qqqqqqqq', text, tools=[TOOL],
        tool_choice=choice)
    assert report.finish_reason == 'tool_calls', report
    assert content == ''
    assert report.reasoning == ('so' if thinks else '')
    for call in report.tool_calls:
        jsonschema.Draft202012Validator(TOOL['function']['parameters']).validate(call.arguments)
    assert text.tools == (TOOL,)


def test_a_form_of_every_answer_and_tools(make):
    worker, sink = make(FakeEngine(), text_of('hermes'),
                        form=configured(ConstraintConfig(choice=('a', 'b'))))
    report, _ = sink.end(worker.submit(Request.from_json({'prompt': 'x', 'tools': [TOOL]})))
    assert report.finish_reason == 'rejected'
    assert 'constraint.choice constrains every answer' in report.message


def test_a_thought_is_no_text(make):
    report, content, tokens, choice = asked(
        make, '<think>\nwhere?\n</think>\n\nthere', text_of(thinks=True))
    assert content == choice['message']['content'] == 'there'
    assert report.reasoning == choice['message']['reasoning_content'] == 'where?'
    assert report.reasoning_tokens == len('<think>\nwhere?\n</think>')
    assert len(tokens) == report.output_tokens == len('<think>\nwhere?\n</think>\n\nthere')
    assert report.finish_reason == 'stop'


def test_a_thought_that_was_opened_by_the_prompt(make):
    report, content, *_ = asked(make, 'where?\n</think>\n\nthere', text_of(thinks=True),
                                messages=[{'role': 'user', 'content': 'x<think>\n'}])
    assert (report.reasoning, content) == ('where?', 'there')


def test_a_form_of_the_answer_begins_after_the_thought(make):
    for said, prompt, reasoning in (('<think>a {b}</think>nothing', 'x', 'a {b}'),
                                    ('a {b}</think>nothing', 'x<think>', 'a {b}'),
                                    ('nothing', 'x<think>\n</think>\n\n', ''),
                                    ('nothing', 'x', '')):
        report, content, *_ = asked(
            make, said, text_of(thinks=True), structured_outputs={'choice': ['yes', 'no']},
            messages=[{'role': 'user', 'content': prompt}])
        assert (report.reasoning, report.finish_reason) == (reasoning, 'stop')
        assert content in ('yes', 'no')


def thinker(prompt):
    """Think for ever, until somebody ends the thought."""
    asked_of = ''.join(map(chr, prompt))
    yield from say('done' if '</think>' in asked_of else '<think>' + 'so ' * 200)


@pytest.mark.parametrize(('own', 'node', 'spent'), [
    ({'max_tokens': 20}, 0, 20), ({}, 30, 30), ({'max_tokens': 10}, 30, 10)])
def test_a_thought_ends_when_its_tokens_are_spent(make, own, node, spent):
    engine = FakeEngine(thinker, max_context=1000, vocab_size=256)
    report, content, tokens, _ = asked(
        make, '', text_of(thinks=True), engine, {'thinking': ThinkingConfig(node)}, thinking=own)
    assert (content, report.finish_reason) == ('done', 'stop')
    assert report.reasoning == ('so ' * 99)[:spent - len('<think>')].rstrip()
    assert report.reasoning_tokens == spent
    assert report.prompt_tokens == 1
    assert len(tokens) == spent + len('done')
    assert f'thinking.max_tokens is {spent}' in report.message
    assert ''.join(map(chr, engine.prompts[1])) == \
        'x' + ('<think>' + 'so ' * 99)[:spent] + '\n</think>\n\n'


def test_0_sets_no_limit(make):
    report, *_ = asked(make, '<think>' + 'so ' * 30 + '</think>a', text_of(thinks=True),
                       groups={'thinking': ThinkingConfig(5)}, thinking={'max_tokens': 0})
    assert report.reasoning_tokens == 90 + len('<think></think>')


def test_a_thought_that_is_ended_and_a_form(make):
    report, content, *_ = asked(
        make, '', text_of(thinks=True), FakeEngine(thinker, max_context=1000, vocab_size=256),
        thinking={'max_tokens': 20}, structured_outputs={'choice': ['yes', 'no']})
    assert (report.finish_reason, report.reasoning_tokens) == ('stop', 20)
    assert content in ('yes', 'no')


def test_max_tokens_counts_both(make):
    report, content, *_ = asked(
        make, '', text_of(thinks=True), FakeEngine(thinker, max_context=1000, vocab_size=256),
        thinking={'max_tokens': 20}, max_tokens=22)
    assert (content, report.finish_reason, report.output_tokens) == ('do', 'length', 22)


def test_a_context_that_ends_with_the_thought(make):
    report, content, *_ = asked(
        make, '', text_of(thinks=True), FakeEngine(thinker, max_context=30, vocab_size=256),
        thinking={'max_tokens': 20})
    assert (content, report.finish_reason) == ('', 'length')
    assert report.reasoning == ('so ' * 9)[:13].rstrip()


def test_a_turn_that_called_a_tool_is_not_kept(make):
    """Its result could come in messages only."""
    said = iter([FORMS['hermes'].written([GO]), 'b'])
    engine = FakeEngine(lambda prompt: say(next(said)), max_context=1000, vocab_size=256)
    worker, sink = make(engine, text_of('hermes'), sampling=LONG)
    for fields in ({'tools': [TOOL]}, {}):
        sink.end(worker.submit(Request.from_json({'prompt': 'x', **fields})))
    assert worker.reset() == 'forgot 0 turns'
