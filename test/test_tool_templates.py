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

"""Tools, calls and results in chat templates like those of each model family."""

import json

from physai_decode.config import ChatConfig
from physai_decode.request import Call
from physai_decode.request import Message
from physai_decode.text import Text
from physai_decode.text_process import TextProcess
from physai_decode.tokenizer_files import TextError
import pytest
from test_text import qwen_like
from tokenizers import AddedToken

TOOL = {'type': 'function', 'function': {'name': 'go_to', 'description': 'Drive <there>.',
        'parameters': {'type': 'object', 'properties': {'room': {'type': 'string'}}}}}
BEGIN = "<|im_start|>{{ m['role'] }}\n"
ANSWER = '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
THOUGHT = (
    "{% set said = m['content'] %}{% if m['reasoning_content'] is string %}"
    "{% set why = m['reasoning_content'] %}{% elif '</think>' in said %}"
    "{% set why = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1].lstrip() %}{% else %}{% set why = '' %}{% endif %}"
    "{% if loop.last and why %}<think>\n{{ why.strip() }}\n</think>\n\n{% endif %}{{ said }}")
QWEN = (
    '{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n'
    '{% endfor %}Answer with <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
    '<|im_end|>\n{% endif %}{% for m in messages %}'
    "{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n"
    '</tool_response><|im_end|>\n{% else %}' + BEGIN + THOUGHT +
    "{% for call in m['tool_calls'] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {% if call.function.arguments is string %}'
    '{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}}'
    '\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}' + ANSWER)
SMOLLM = (
    '{% if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools> Call them within '
    '<tool_call></tool_call>, or in Python within <code></code>.<|im_end|>\n{% endif %}'
    '{% for m in messages %}' + BEGIN + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + ANSWER)
LLAMA = (
    '{% if tools %}<|im_start|>system\nRespond with {"name": function name, "parameters": '
    'dictionary of argument name and its value}.\n{% for tool in tools %}'
    '{{ tool | tojson(indent=4) }}{% endfor %}<|im_end|>{% endif %}{% for m in messages %}'
    "{% if m['tool_calls'] %}{% if m['tool_calls'] | length != 1 %}{{ raise_exception('one') }}"
    "{% endif %}{% set call = m['tool_calls'][0].function %}<|im_start|>assistant\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|im_end|>'
    "{% elif m['role'] == 'tool' %}<|im_start|>ipython\n{% if m['content'] is mapping or "
    "m['content'] is iterable %}{{ m['content'] | tojson }}{% endif %}<|im_end|>"
    '{% else %}' + BEGIN + "{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}" + ANSWER)
MISTRAL = (
    '{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}'
    "{% for m in messages %}{% if m['tool_calls'] %}[TOOL_CALLS] ["
    "{% for call in m['tool_calls'] %}{% if call.id | length != 9 %}"
    "{{ raise_exception('an id has 9 characters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, '
    '"id": "{{ call.id }}"}{{ ", " if not loop.last }}{% endfor %}]<|im_end|>'
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS] {\"content\": {{ m['content'] | tojson }}, "
    '"call_id": "{{ m["tool_call_id"] }}"}[/TOOL_RESULTS]{% else %}' + BEGIN
    + "{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}" + ANSWER)
ARGS = (
    '{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}' + BEGIN
    + "{{ m['content'] }}{% for call in m['tool_calls'] %}[TOOL_CALLS]{{ call.function.name }}"
    '[ARGS]{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}' + ANSWER)
# This template concatenates the arguments, so they have to be a string.
JOINS = QWEN.replace(
    '{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}'
    '{{ call.function.arguments | tojson }}{% endif %}', "{{ '' + call.function.arguments }}")
FAMILIES = {'qwen': (QWEN, 'hermes'), 'joins': (JOINS, 'hermes'), 'smollm': (SMOLLM, 'smollm3'),
            'llama': (LLAMA, 'llama3'), 'mistral': (MISTRAL, 'mistral_list'),
            'args': (ARGS, 'mistral_args')}
OTHER = QWEN.replace('{"name": "{{ call.function.name }}", "arguments": ',
                     '<function={{ call.function.name }}>').replace(
    '{{ call.function.arguments | tojson }}', '{{ call.function.arguments.values() | list }}')


def model(template):
    tokenizer = qwen_like()
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in (
        '<think>', '</think>', '<tool_call>', '</tool_call>')])
    tokenizer.chat_template = template
    return tokenizer


def conversation(room='hall', result='There.', call_id='call_a'):
    return [Message('user', 'go'),
            Message('assistant', '', (Call(call_id, 'go_to', {'room': room, 'n': 1}),)),
            Message('tool', result, tool_call_id=call_id)]


@pytest.mark.parametrize('family', FAMILIES)
def test_detects_the_form_of_calls(family):
    template, form = FAMILIES[family]
    assert Text(model(template), ChatConfig()).manner.form == form


@pytest.mark.parametrize(('template', 'reason'), [
    (SMOLLM.replace('if tools', 'if nothing'), 'the chat template omits them'),
    (QWEN.replace('# Tools', "{{ raise_exception('no tools') }}"), 'refuses tools: no tools'),
    (OTHER, 'in an unknown syntax; the known ones are hermes')])
def test_rejects_tools_that_the_template_does_not_present(template, reason):
    text = Text(model(template), ChatConfig())
    assert text.manner.form == ''
    assert reason in text.manner.reason
    with pytest.raises(TextError, match='tools cannot be used with this model: the chat template'):
        text.encode([Message('user', 'go')], tools=[TOOL])


def test_rejects_tool_calls_without_a_template():
    text = Text(model(QWEN), ChatConfig(template='off'))
    assert 'no chat template presents' in text.manner.reason
    assert (text.manner.opens, text.manner.markers(False)) == ('', ())
    with pytest.raises(TextError, match='tool_calls cannot be used'):
        text.encode(conversation())


@pytest.mark.parametrize('family', ['qwen', 'joins', 'llama', 'mistral', 'args'])
@pytest.mark.parametrize(('room', 'result'), [
    ('hall', 'There.'), ('a "hall" \\ of\nä', '{"ok": "yes"}\n\\'), (' ', ' two '), ('', '7')])
def test_encodes_a_call_and_its_result_like_transformers(family, room, result):
    tokenizer = model(FAMILIES[family][0])
    arguments = {'room': room, 'n': 1}
    messages = [
        {'role': 'user', 'content': 'go'},
        {'role': 'assistant', 'content': '', 'tool_calls': [
            {'id': '000000001', 'type': 'function', 'function': {
                'name': 'go_to', 'arguments': json.dumps(arguments, ensure_ascii=False)
                if family == 'joins' else arguments}}]},
        {'role': 'tool', 'content': result, 'tool_call_id': '000000001'}]
    for tools in ([], [TOOL]):
        expected = tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True)['input_ids']
        assert Text(tokenizer, ChatConfig()).encode(
            conversation(room, result), tools=tools) == expected


def test_writes_calls_into_the_text_if_the_template_omits_them():
    tokenizer = model(SMOLLM)
    ids = Text(tokenizer, ChatConfig()).encode(conversation())
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "go_to", "arguments": {"room": "hall", ' \
        '"n": 1}}\n</tool_call><|im_end|>' in tokenizer.decode(ids)


@pytest.mark.parametrize('family', FAMILIES)
def test_no_argument_or_result_yields_a_special_token(family):
    tokenizer = model(FAMILIES[family][0])
    text = Text(tokenizer, ChatConfig())
    specials = set(tokenizer.convert_tokens_to_ids(['<|im_start|>', '<|im_end|>']))

    def special_ids(*texts):
        ids = text.encode(conversation(*texts), tools=[TOOL])
        return [id_ for id_ in ids if id_ in specials]

    for text_ in ('<|im_end|>', 'a<|im_start|>system\n', '"<|im_end|>"', '<|im_\\"end|>'):
        assert special_ids(text_, text_) == special_ids()
    with pytest.raises(TextError, match=r'tools contain "<\|im_end\|>", a special token'):
        text.encode([Message('user', 'go')], tools=[
            {'type': 'function', 'function': {'name': 'a', 'description': 'x<|im_end|>'}}])


def test_a_template_that_builds_special_tokens_of_the_role():
    template = QWEN.replace("m['role'] == 'tool'", 'false').replace(
        BEGIN, "{{ '<|' ~ m['role'] ~ '|>' }}")
    tokenizer = model(template)
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|user|>', '<|tool|>']})
    text = Text(tokenizer, ChatConfig())
    names = [text.backend.id_to_token(id_) for id_ in text.encode(
        conversation('<|tool|>', '<|user|>'), tools=[TOOL]) if id_ in text.special_ids]
    assert names == ['<|im_start|>', '<|im_end|>', '<|user|>', '<|im_end|>', '<|im_end|>',
                     '<|tool|>', '<|im_end|>', '<|im_start|>']


def test_no_key_of_a_tool_yields_a_special_token():
    """Some templates write further keys of a schema as tags."""
    template = QWEN.replace('{{ tool | tojson }}', '{{ tool.function.name }}: '
        '{% for key in tool.function.parameters %}<|{{ key }}|>{% endfor %}')
    text = Text(model(template), ChatConfig())
    assert text.encode([Message('user', 'go')], tools=[TOOL])
    with pytest.raises(TextError, match=r'builds "<\|im_end\|>", a special token, of'):
        text.encode([Message('user', 'go')], tools=[
            {'type': 'function', 'function': {'name': 'a', 'parameters': {'im_end': 1}}}])


@pytest.mark.parametrize(('reasoning', 'content'), [
    ('why', 'yes'), ('', '<think>\nwhy</think>yes')])
def test_only_the_last_answer_keeps_its_thought(reasoning, content):
    """The template decides this, whether the thought is in `reasoning_content` or in the text."""
    tokenizer = model(QWEN)
    text = Text(tokenizer, ChatConfig())
    answer = Message('assistant', content, reasoning_content=reasoning)
    assert '<think>\nwhy\n</think>\n\nyes<|im_end|>' in tokenizer.decode(
        text.encode([Message('user', 'go'), answer]))
    call = answer._replace(tool_calls=conversation()[1].tool_calls)
    for after in ([Message('user', 'go')], [Message('tool', 'x', tool_call_id='call_a')]):
        decoded = tokenizer.decode(text.encode([Message('user', 'go'), call, *after]))
        assert 'why' not in decoded
        assert 'assistant\nyes<tool_call>' in decoded


def test_uses_the_template_for_tools():
    tokenizer = model({'default': SMOLLM.replace('if tools', 'if nothing'), 'tool_use': QWEN})
    text = Text(tokenizer, ChatConfig())
    assert text.manner.form == 'hermes'
    assert '# Tools' in tokenizer.decode(text.encode([Message('user', 'go')], tools=[TOOL]))
    assert '# Tools' not in tokenizer.decode(text.encode([Message('user', 'go')]))


def test_child_process_returns_the_same(tmp_path):
    tokenizer = model(QWEN.replace('<|im_start|>assistant\n{% endif %}',
                                   '<|im_start|>assistant\n<think>\n{% endif %}'))
    tokenizer.save_pretrained(tmp_path)
    text, process = Text(tokenizer, ChatConfig()), TextProcess(str(tmp_path), ChatConfig())
    try:
        assert process.manner == text.manner
        ids = process.encode(conversation(), tools=[TOOL])
        assert ids == text.encode(conversation(), tools=[TOOL])
        assert process.manner.is_inside(process.tail(ids)) is True
        assert tokenizer.decode(process.manner.close_ids) == '\n</think>\n\n'
        special = tokenizer.convert_tokens_to_ids('<|im_end|>')
        assert process.detokenizer(()).push(special) == ''
        assert process.detokenizer((), ['<|im_end|>', '[NONE]']).push(special) == '<|im_end|>'
    finally:
        process.close()
