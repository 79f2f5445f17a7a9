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

"""Requests with tools, and answers with tool calls and thoughts, up to the result."""

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
from physai_decode.tool_forms import TOOL_FORMS
import pytest
from worker_rig import maker
from worker_rig import TOOL

GO = ('go_to', {'room': 'hall'})
THINKS = {'opens': '<think>', 'closes': '</think>', 'close_ids': tuple(map(ord, '\n</think>\n\n'))}
LONG = SamplingConfig(max_new_tokens=900)


make = pytest.fixture(maker)


def text_of(form='', thinks=False):
    text = CharacterText()
    text.manner = Manner(form=form, reason='of the test', **(THINKS if thinks else {}))
    return text


def ask(make, answer, text, engine=None, groups=None, **fields):
    """Send a request that the engine answers so; return report, text, tokens and choice."""
    engine = engine or FakeEngine(lambda prompt: say(answer), max_context=1000, vocab_size=256)
    worker, sink = make(engine, text, sampling=LONG, **groups or {})
    number = worker.submit(Request.from_json(
        fields if 'messages' in fields else {'prompt': 'x', **fields}))
    report, content = sink.end(number)
    tokens = [token for token in sink.tokens if token.request_id == number]
    assert ''.join(token.reasoning for token in tokens) == report.reasoning
    assert [call for token in tokens for call in token.tool_calls] == [*report.tool_calls]
    return report, content, tokens, chat_completion(report, content, 'm')['choices'][0]


@pytest.mark.parametrize('form', TOOL_FORMS)
@pytest.mark.parametrize('choice', ['auto', 'required'])
def test_first_call_ends_the_answer_without_parallel_tool_calls(make, form, choice):
    answer = TOOL_FORMS[form].written([GO, GO]) + ' and more'
    report, content, tokens, result = ask(
        make, answer, text_of(form), tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert result['finish_reason'] == 'tool_calls'
    call, = result['message']['tool_calls']
    assert (call['function']['name'], json.loads(call['function']['arguments'])) == GO
    assert content == ''


@pytest.mark.parametrize('form', TOOL_FORMS)
def test_call_is_not_part_of_the_text(make, form):
    answer = TOOL_FORMS[form].written([GO])
    if not TOOL_FORMS[form].bare:
        answer = f'I go.\n{answer}'
    report, content, tokens, choice = ask(make, answer, text_of(form), tools=[TOOL])
    assert content == ('' if TOOL_FORMS[form].bare else 'I go.')
    assert (report.finish_reason, choice['finish_reason']) == ('tool_calls', 'tool_calls')
    call, = choice['message']['tool_calls']
    assert call['id'].startswith('call_')
    assert call['type'] == 'function'
    assert (call['function']['name'], json.loads(call['function']['arguments'])) == GO
    assert sum(bool(token.tool_calls) for token in tokens) == 1
    # A client can send it back unchanged.
    ask(make, 'ok', text_of(form), tools=[TOOL], messages=[
        {'role': 'user', 'content': 'x'}, choice['message'],
        {'role': 'tool', 'tool_call_id': call['id'], 'content': 'done'}])


def test_publishes_a_call_before_the_answer_ends(make):
    answer = f'{TOOL_FORMS["hermes"].written([GO])} Then more text follows.'
    _, content, tokens, _ = ask(make, answer, text_of('hermes'), tools=[TOOL])
    at = next(index for index, token in enumerate(tokens) if token.tool_calls)
    assert at == answer.index('</tool_call>') + len('</tool_call>') - 1
    assert content == 'Then more text follows.'


def test_invalid_call_stays_text(make):
    answer = '<tool_call>{"name": "fly", "arguments": {}}</tool_call>'
    report, content, _, choice = ask(make, answer, text_of('hermes'), tools=[TOOL])
    assert content == answer
    assert report.finish_reason == choice['finish_reason'] == 'stop'
    assert 'fly is not one of the tools' in report.message


def test_without_tools_a_call_is_text(make):
    answer = TOOL_FORMS['hermes'].written([GO])
    for fields in ({}, {'tools': [TOOL], 'tool_choice': 'none'}):
        text = text_of('hermes')
        report, content, _, _ = ask(make, answer, text, **fields)
        assert (content, report.tool_calls, report.finish_reason) == (answer, (), 'stop')
        assert text.tools == ()


def test_rejects_tools_for_a_model_without_a_form(make):
    report, *_ = ask(make, 'x', text_of(), tools=[TOOL])
    assert report.finish_reason == 'rejected'
    assert report.message == (
        'tools cannot be used with this model: of the test; choose a model whose chat template '
        'accepts tools')


@pytest.mark.parametrize('form', TOOL_FORMS)
@pytest.mark.parametrize('choice', ['required', {'type': 'function', 'function': {
    'name': 'go_to'}}])
@pytest.mark.parametrize('thinks', [False, True])
def test_constrains_a_required_call(make, form, choice, thinks):
    """Without the constraint, the engine would answer something else."""
    text = text_of(form, thinks)
    report, content, _, _ = ask(
        make, '<think>so</think>qqqqqqqqqqq' if thinks else 'qqqqqqqq', text, tools=[TOOL],
        tool_choice=choice)
    assert report.finish_reason == 'tool_calls', report
    assert content == ''
    assert report.reasoning == ('so' if thinks else '')
    for call in report.tool_calls:
        jsonschema.Draft202012Validator(TOOL['function']['parameters']).validate(call.arguments)
    assert text.tools == (TOOL,)


def test_required_call_that_is_unreadable_is_an_error(make):
    """A schema allows numbers that JSON parsers do not represent."""
    tool = {'type': 'function', 'function': {'name': 'go_to', 'parameters': {
        'type': 'object', 'properties': {'x': {'type': 'number'}}, 'required': ['x']}}}
    answer = TOOL_FORMS['hermes'].written([('go_to', {'x': 9})]).replace('9', '9e999')
    report, *_ = ask(make, answer, text_of('hermes'), tools=[tool], tool_choice='required')
    assert report.finish_reason == 'error' and not report.tool_calls
    assert 'tool_choice requires' in report.message and 'too large' in report.message


def test_rejects_tools_if_a_parameter_constrains_every_answer(make):
    worker, sink = make(FakeEngine(), text_of('hermes'),
                        form=configured(ConstraintConfig(choice=('a', 'b'))))
    report, _ = sink.end(worker.submit(Request.from_json({'prompt': 'x', 'tools': [TOOL]})))
    assert report.finish_reason == 'rejected'
    assert 'constraint.choice constrains every answer' in report.message


def test_thought_is_not_part_of_the_text(make):
    report, content, tokens, choice = ask(
        make, '<think>\nwhere?\n</think>\n\nthere', text_of(thinks=True))
    assert content == choice['message']['content'] == 'there'
    assert report.reasoning == choice['message']['reasoning_content'] == 'where?'
    assert report.reasoning_tokens == len('<think>\nwhere?\n</think>')
    assert len(tokens) == report.output_tokens == len('<think>\nwhere?\n</think>\n\nthere')
    assert report.finish_reason == 'stop'


def test_thought_that_the_prompt_opens(make):
    report, content, *_ = ask(make, 'where?\n</think>\n\nthere', text_of(thinks=True),
                              messages=[{'role': 'user', 'content': 'x<think>\n'}])
    assert (report.reasoning, content) == ('where?', 'there')


def test_constraint_begins_after_the_thought(make):
    for answer, prompt, reasoning in (('<think>a {b}</think>nothing', 'x', 'a {b}'),
                                      ('a {b}</think>nothing', 'x<think>', 'a {b}'),
                                      ('nothing', 'x<think>\n</think>\n\n', ''),
                                      ('nothing', 'x', '')):
        report, content, *_ = ask(
            make, answer, text_of(thinks=True), structured_outputs={'choice': ['yes', 'no']},
            messages=[{'role': 'user', 'content': prompt}])
        assert (report.reasoning, report.finish_reason) == (reasoning, 'stop')
        assert content in ('yes', 'no')


@pytest.mark.parametrize(('form', 'answer'), [
    ({'choice': [' yes', 'yes']}, ' yes'), ({'choice': [' yes', 'yes']}, 'yes'),
    ({'choice': ['\fyes', 'no']}, '\fyes'), ({'regex': ' {2}yes'}, '  yes'),
    ({'grammar': r'root ::= "\nyes"'}, '\nyes')])
@pytest.mark.parametrize(('said', 'prompt'), [
    ('<think>a</think>', 'x'), ('a</think>', 'x<think>'), ('', 'x')])
def test_blanks_that_begin_a_constrained_answer_stay(make, form, answer, said, prompt):
    """After a thought, and without one."""
    report, content, *_ = ask(
        make, said + answer, text_of(thinks=True), structured_outputs=form,
        messages=[{'role': 'user', 'content': prompt}])
    assert (report.reasoning, report.finish_reason) == ('a' if said else '', 'stop')
    assert content == answer


def thinker(prompt):
    """Think for a long time, unless the prompt ends the thought."""
    text = ''.join(map(chr, prompt))
    yield from say('done' if '</think>' in text else '<think>' + 'so ' * 200)


@pytest.mark.parametrize(('thinking', 'parameter', 'limit'), [
    ({'max_tokens': 20}, 0, 20), ({}, 30, 30), ({'max_tokens': 10}, 30, 10)])
def test_thought_ends_at_its_token_limit(make, thinking, parameter, limit):
    engine = FakeEngine(thinker, max_context=1000, vocab_size=256)
    report, content, tokens, _ = ask(
        make, '', text_of(thinks=True), engine, {'thinking': ThinkingConfig(parameter)},
        thinking=thinking)
    assert (content, report.finish_reason) == ('done', 'stop')
    assert report.reasoning == ('so ' * 99)[:limit - len('<think>')].rstrip()
    assert report.reasoning_tokens == limit
    assert report.prompt_tokens == 1
    assert len(tokens) == limit + len('done')
    assert f'thinking.max_tokens is {limit}' in report.message
    assert ''.join(map(chr, engine.prompts[1])) == \
        'x' + ('<think>' + 'so ' * 99)[:limit] + '\n</think>\n\n'


def test_figures_after_a_thought_that_reached_its_limit(make):
    """The pace holds, its delay is not part of a latency, and the context has the added tokens."""
    *_, tokens, _ = ask(
        make, '', text_of(thinks=True), FakeEngine(thinker, max_context=1000, vocab_size=256),
        thinking={'max_tokens': 10}, pace={'tokens_per_s': 100.0})
    assert all(token.itl_ms >= 0 for token in tokens[1:])
    assert sum(token.itl_ms + token.wait_ms for token in tokens[1:]) > 9.9 * (len(tokens) - 1)
    added = len('\n</think>\n\n')
    assert [token.context_tokens for token in tokens] == \
        [1 + index + (added if index >= 10 else 0) for index in range(len(tokens))]


def test_max_tokens_0_does_not_limit_the_thought(make):
    report, *_ = ask(make, '<think>' + 'so ' * 30 + '</think>a', text_of(thinks=True),
                       groups={'thinking': ThinkingConfig(5)}, thinking={'max_tokens': 0})
    assert report.reasoning_tokens == 90 + len('<think></think>')


@pytest.mark.parametrize('choice', [['yes', 'no'], [' yes', ' no']])
def test_constraint_after_a_thought_that_reached_its_limit(make, choice):
    """Blanks that begin the answer stay."""
    report, content, *_ = ask(
        make, '', text_of(thinks=True), FakeEngine(thinker, max_context=1000, vocab_size=256),
        thinking={'max_tokens': 20}, structured_outputs={'choice': choice})
    assert (report.finish_reason, report.reasoning_tokens) == ('stop', 20)
    assert content in choice


def test_constraint_after_a_thought_that_is_cut_in_a_character(make):
    half = '\xc3'               # the id of the first byte of a character

    def steps(prompt):
        return say('no' if '</think>' in ''.join(map(chr, prompt)) else f'<think>{half}')

    report, content, *_ = ask(
        make, '', text_of(thinks=True), FakeEngine(steps, max_context=1000, vocab_size=256),
        thinking={'max_tokens': 8}, structured_outputs={'choice': ['yes', 'no']})
    assert (report.finish_reason, report.reasoning, content) == ('stop', half, 'no')


def test_max_tokens_counts_thought_and_answer(make):
    report, content, *_ = ask(
        make, '', text_of(thinks=True), FakeEngine(thinker, max_context=1000, vocab_size=256),
        thinking={'max_tokens': 20}, max_tokens=22)
    assert (content, report.finish_reason, report.output_tokens) == ('do', 'length', 22)


def test_context_that_is_full_after_the_thought(make):
    report, content, *_ = ask(
        make, '', text_of(thinks=True), FakeEngine(thinker, max_context=30, vocab_size=256),
        thinking={'max_tokens': 20})
    assert (content, report.finish_reason) == ('', 'length')
    assert report.reasoning == ('so ' * 9)[:13].rstrip()


def test_keeps_no_turn_with_a_tool_call(make):
    """The history could not contain the tool's result, which comes in messages."""
    answer = iter([TOOL_FORMS['hermes'].written([GO]), 'b'])
    engine = FakeEngine(lambda prompt: say(next(answer)), max_context=1000, vocab_size=256)
    worker, sink = make(engine, text_of('hermes'), sampling=LONG)
    for fields in ({'tools': [TOOL]}, {}):
        sink.end(worker.submit(Request.from_json({'prompt': 'x', **fields})))
    assert worker.reset() == 'forgot 0 turns'
