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

"""Requests in JSON: the accepted fields, and the error for each wrong one."""

import json
import re
import time

from physai_decode.request import Call
from physai_decode.request import Cancel
from physai_decode.request import Message
from physai_decode.request import parse
from physai_decode.request import Request
from physai_decode.request import RequestError
import pytest

FULL = {
    'id': 'mine', 'messages': [
        {'role': 'system', 'content': 'You are a robot.'}, {'role': 'user', 'content': 'go'},
        {'role': 'assistant', 'content': 'gone'}, {'role': 'tool', 'content': '7'},
        {'role': 'user', 'content': [{'type': 'text', 'text': 'come '},
                                     {'type': 'text', 'text': 'back'}]}],
    'temperature': 0.5, 'top_p': 0.9, 'top_k': 40, 'min_p': 0, 'repetition_penalty': 1.1,
    'seed': 7, 'max_tokens': 12, 'stop': ['a', 'b'],
    'chat_template_kwargs': {'enable_thinking': False},
    'deadline': {'ttft_ms': 100, 'token_ms': 20.5, 'request_ms': 1000, 'action': 'truncate'}}

TOOL = {'type': 'function', 'function': {'name': 'go_to', 'parameters': {
    'type': 'object', 'properties': {'room': {'type': 'string'}}}}}
CALL = {'id': 'call_1', 'type': 'function', 'function': {
    'name': 'go_to', 'arguments': '{"room": "hall"}'}}
WITH_TOOLS = {
    'tools': [TOOL], 'tool_choice': 'required', 'thinking': {'max_tokens': 64}, 'messages': [
        {'role': 'user', 'content': 'go'},
        {'role': 'assistant', 'content': None, 'reasoning_content': 'where?',
         'tool_calls': [CALL]},
        {'role': 'tool', 'tool_call_id': 'call_1', 'name': 'go_to', 'content': 'done'}]}


def read(**fields):
    """Read a request with these fields, and a prompt if it has none."""
    return parse(json.dumps(fields if 'messages' in fields else {'prompt': 'go', **fields}))


def test_every_field():
    asked = parse(json.dumps(FULL))
    assert asked.client_id == 'mine'
    assert [message.role for message in asked.messages] == [
        'system', 'user', 'assistant', 'tool', 'user']
    assert asked.messages[-1] == Message('user', 'come back')
    assert asked.sampling == {
        'temperature': 0.5, 'top_p': 0.9, 'top_k': 40, 'min_p': 0.0, 'repetition_penalty': 1.1,
        'seed': 7, 'max_new_tokens': 12, 'stop': ('a', 'b')}
    assert asked.deadline == {
        'ttft_ms': 100.0, 'token_ms': 20.5, 'request_ms': 1000.0, 'action': 'truncate'}
    assert asked.chat_template_kwargs == {'enable_thinking': False}


@pytest.mark.parametrize('value', [
    FULL, WITH_TOOLS, {'prompt': 'go'}, {'prompt': 'go', 'id': 'x'}, {'raw_prompt': 'go'}])
def test_json_round_trip(value):
    asked = parse(json.dumps(value))
    assert parse(json.dumps(asked.to_json())) == asked


def test_prompt_alone_keeps_all_parameters():
    assert read() == Request('go')


def test_null_is_absent():
    assert read(temperature=None, stop=None, id=None, cancel=None) == Request('go')
    assert parse('{"id": "x", "metadata": null, "prompt": null, "cancel": true}') == Cancel('x')


def test_one_stop_string_is_a_list_of_one():
    assert read(stop='END').sampling == {'stop': ('END',)}


def test_id_can_be_in_the_metadata():
    assert read(metadata={'id': 'x', 'other': 1}).client_id == 'x'
    assert read(metadata={'id': 'x'}, id='x').client_id == 'x'


def test_accepts_fields_without_effect():
    assert read(structured_outputs={}, tools=[], tool_choice='none') == Request('go')


def test_cancel():
    assert parse('{"id": "x", "cancel": true}') == Cancel('x')
    assert parse('{"id": "x", "cancel": true, "reason": "late"}') == Cancel('x', ('reason',))


@pytest.mark.parametrize('text', [
    '{"id": "x", "cancel": "true"}', '{"id": "x", "prompt": "go", "cancel": false}',
    '{"cancel": true}'])
def test_refusal_of_an_invalid_cancel_has_no_id(text):
    """A result with the id would look like the end of the request, which continues."""
    with pytest.raises(RequestError, match='to cancel, send') as caught:
        parse(text)
    assert caught.value.client_id == ''


@pytest.mark.parametrize(('fields', 'message'), [
    ({'temprature': 1}, '"temprature" is not a field of a request: the fields are id, metadata,'),
    ({'temperature': 'hot'}, 'temperature is "hot": expected a number'),
    ({'temperature': True}, 'temperature is true: expected a number'),
    ({'temperature': -1}, 'temperature is -1: expected 0.0 to 10.0'),
    ({'temperature': 11}, 'temperature is 11: expected 0.0 to 10.0'),
    ({'temperature': 10**400}, 'temperature is 1000'), ({'top_k': 10**400}, 'top_k is 1000'),
    ({'top_k': 1.5}, 'top_k is 1.5: expected an integer'),
    ({'max_tokens': 0}, 'max_tokens is 0: expected 1 to'),
    ({'max_new_tokens': 5}, '"max_new_tokens" is not a field of a request'),
    ({'stop': [1]}, 'stop is [1]: expected a list of strings'),
    ({'stop': {}}, 'stop is {}: expected a list of strings'),
    ({'stop': ['x'] * 65}, 'stop has 65 strings: at most 64 are allowed'),
    ({'stop': ['', 'x' * 257]}, 'a string of 257 characters: at most 256 are allowed'),
    ({'stop': 'x' * 257}, 'stop is ["xxx'),
    ({'stop': '\ud83d'}, 'stop is ["\\ud83d"], with an unpaired surrogate: send valid UTF-8'),
    ({'prompt': 7}, 'prompt is 7: expected a string'),
    ({'prompt': None}, 'and raw_prompt (a string): none was given'),
    ({'messages': [], 'prompt': 'go'}, 'raw_prompt (a string): prompt and messages were given'),
    ({'raw_prompt': 7, 'prompt': None}, 'raw_prompt is 7: expected a string'),
    ({'messages': []}, 'messages is []: expected a list of at least one message'),
    ({'messages': 'go'}, 'messages is "go": expected a list'),
    ({'messages': ['go']}, 'messages[0] is "go": expected an object'),
    ({'messages': [{'role': 'robot', 'content': ''}]}, 'messages[0].role is "robot"'),
    ({'messages': [{'role': 'user'}]}, 'messages[0].content is null: expected a string'),
    ({'messages': [{'role': 'user', 'content': 'x', 'name': 'y'}]},
     '"messages[0].name" is not a field of a message'),
    ({'messages': [{'role': 'user', 'content': 'x', '\ud800': 'y'}]},
     r'"messages[0].\ud800" is not a field of a message'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}]},
     'messages[0].content[0] is {"image_url": {}, "type": "image_url"}'),
    ({'messages': [{'role': 'user', 'content': ''}] * 4097},
     'messages has 4097 messages: at most 4096 are allowed'),
    ({'deadline': 5}, 'deadline is 5: expected an object'),
    ({'deadline': {'ms': 5}}, '"deadline.ms" is not a field of a request: the fields are deadl'),
    ({'deadline': {'\ud800': 5}}, r'"deadline.\ud800" is not a field of a request'),
    ({'deadline': {'x' * 9999: 5}}, '"deadline.xxx'),
    ({'deadline': {'token_ms': 10**400}}, 'deadline.token_ms is 1000'),
    ({'deadline': {'action': 'shout'}}, 'deadline.action is "shout": expected one of report, tr'),
    ({'deadline': {'token_ms': -1}}, 'deadline.token_ms is -1: expected 0.0 to'),
    ({'chat_template_kwargs': []}, 'chat_template_kwargs is []: expected an object'),
    ({'chat_template_kwargs': {'a': [1]}}, '"chat_template_kwargs.a" is [1]: expected true'),
    ({'chat_template_kwargs': {'a b': 1}}, '"chat_template_kwargs.a b" is 1: expected'),
    ({'chat_template_kwargs': {'\0\ud800': 1}}, r'"chat_template_kwargs.\u0000\ud800" is 1'),
    ({'chat_template_kwargs': {f'a{index}': 1 for index in range(65)}},
     'chat_template_kwargs has 65 variables: at most 64 are allowed'),
    ({'chat_template_kwargs': {'a': 'x' * 4097}},
     '"chat_template_kwargs.a" has 4097 characters: at most 4096 are'),
    ({'chat_template_kwargs': {'x' * 4097: 1}}, 'has 4097 characters: at most 4096 are allowed'),
    ({'chat_template_kwargs': {'a': 2**53 + 1}},
     '"chat_template_kwargs.a" is 9007199254740993: expected -9007199254740992 to 900'),
    ({'chat_template_kwargs': {'a': -1e300}}, '"chat_template_kwargs.a" is -1e+300: expected'),
    ({'response_format': 'json_object'}, 'response_format is'),
    ({'response_format': {'type': 'xml'}}, 'response_format.type is "xml"'),
    ({'response_format': {'type': 'json_object', 'schema': {}}}, 'response_format.schema'),
    ({'response_format': {'type': 'json_schema'}}, 'response_format.json_schema.schema is'),
    ({'response_format': {'type': 'json_schema', 'json_schema': {'schema': []}}},
     'response_format.json_schema.schema is'),
    ({'structured_outputs': {'regex': 7}}, 'structured_outputs.regex is'),
    ({'structured_outputs': {'regexp': 'a'}}, 'structured_outputs.regexp'),
    ({'structured_outputs': {'choice': []}}, 'structured_outputs.choice is'),
    ({'structured_outputs': {'choice': ['a', 1]}}, 'structured_outputs.choice is ["a", 1]'),
    ({'structured_outputs': {'regex': 'a', 'grammar': 'b'}}, 'regex and grammar'),
    ({'structured_outputs': {'regex': 'a'}, 'response_format': {'type': 'json_object'}},
     'were both given'),
    ({'tools': {}}, 'tools is {}: expected a list'), ({'tools': [{}]}, 'tools[0] is {}: expected'),
    ({'tools': [TOOL] * 129}, 'tools has 129 tools: at most 128 are allowed'),
    ({'tools': [TOOL, TOOL]}, 'tools has go_to twice'),
    ({'tools': [{'type': 'function', 'function': {'name': 'a b'}}]},
     'tools[0].function.name is "a b": expected 1 to 64 letters'),
    ({'tools': [{'type': 'function', 'function': {'name': 'a', 'parameters': []}}]},
     'tools[0].function.parameters is []: expected an object'),
    ({'tools': [{'type': 'function', 'function': {'name': 'a', 'strict': True}}]},
     'tools[0].function.strict is true, which is enforced only if'),
    ({'tool_choice': 'required'}, 'tool_choice is "required", but there are no tools'),
    ({'tools': [TOOL], 'tool_choice': 'always'}, 'tool_choice is "always": expected none, au'),
    ({'tools': [TOOL], 'tool_choice': {'type': 'function', 'function': {'name': 'fly'}}},
     'tool_choice.function.name is "fly": the tools are go_to'),
    ({'tools': [TOOL], 'response_format': {'type': 'json_object'}},
     'response_format constrains the answer, so it cannot call tools: remove response_format'),
    ({'messages': [{'role': 'user', 'content': 'x', 'tool_calls': []}]},
     '"messages[0].tool_calls" is not a field of a message: the fields are role, content'),
    ({'messages': [{'role': 'assistant', 'content': None, 'tool_calls': [CALL | {'type': 'x'}]}]},
     'messages[0].tool_calls[0].type is "x": expected function'),
    ({'messages': [{'role': 'assistant', 'tool_calls': [
        {'function': {'name': 'a', 'arguments': '[1]'}}]}]},
     'messages[0].tool_calls[0].function.arguments is [1]: expected a JSON object, in a string'),
    ({'messages': [{'role': 'assistant', 'tool_calls': [
        {'function': {'name': 'a', 'arguments': '{'}}]}]},
     'messages[0].tool_calls[0].function.arguments is not valid JSON'),
    ({'thinking': {'max_tokens': -1}}, 'thinking.max_tokens is -1: expected 0 to'),
    ({'thinking': {'tokens': 1}}, '"thinking.tokens" is not a field of a request')])
def test_rejects_wrong_fields(fields, message):
    with pytest.raises(RequestError, match=re.escape(message)) as raised:
        read(id='mine', **fields)
    assert raised.value.client_id == 'mine'
    assert len(str(raised.value)) < 400
    str(raised.value).encode()              # else it could not be sent


def test_tools_and_their_calls():
    asked = parse(json.dumps(WITH_TOOLS))
    assert asked.tools == asked.offered == asked.forced == (TOOL,)
    assert asked.messages[1:] == (
        Message('assistant', '', (Call('call_1', 'go_to', {'room': 'hall'}),), 'where?'),
        Message('tool', 'done', tool_call_id='call_1', name='go_to'))
    assert asked.to_json()['messages'][1]['tool_calls'] == [CALL]
    assert asked.size > len(json.dumps(TOOL)) + len('go where? {"room": "hall"} done')


def test_which_tools_are_offered_and_which_are_forced():
    other = {'type': 'function', 'function': {'name': 'other'}}
    tools = [TOOL, other]
    assert read(tools=tools).offered == (TOOL, other)
    assert read(tools=tools).forced == ()
    assert read(tools=tools, tool_choice='none').offered == ()
    named = read(tools=tools, tool_choice={'type': 'function', 'function': {'name': 'other'}})
    assert (named.offered, named.forced) == ((TOOL, other), (other,))


def test_accepts_an_answer_as_a_message():
    told = {'role': 'assistant', 'content': 'yes', 'reasoning_content': None, 'tool_calls': []}
    assert read(messages=[told]).messages == (Message('assistant', 'yes'),)


@pytest.mark.parametrize('value', ['', 'x' * 129, 7, ['x'], 'a\nb', 'a\0', '\ud800', True])
@pytest.mark.parametrize('place', ['id', 'metadata.id'])
def test_rejects_a_wrong_id(value, place):
    with pytest.raises(RequestError, match=f'^{re.escape(place)} is .*128 printable') as raised:
        read(**({'id': value} if place == 'id' else {'metadata': {'id': value}}))
    assert raised.value.client_id == ''


def test_rejects_two_different_ids():
    with pytest.raises(RequestError, match='id is "a", but metadata.id is "b"'):
        read(id='a', metadata={'id': 'b'})
    with pytest.raises(RequestError, match='metadata is 7'):
        read(metadata=7)


@pytest.mark.parametrize('text', [
    '', 'hello', '{', '[1]', '"x"', '7', 'null', '{"prompt": NaN}', '{"prompt": "a"} x',
    '[' * 100_000, '{"a":' * 100_000, '{"temperature": 1e999, "prompt": "a"}',
    '{"prompt": "a", "chat_template_kwargs": {"x": -1e999}}',
    '{"prompt": "a", "prompt": "b"}', '{"seed": 1' + '0' * 5000 + ', "prompt": "a"}'])
def test_rejects_text_that_is_not_a_request(text):
    with pytest.raises(RequestError):
        parse(text)


def test_rejects_duplicate_fields():
    with pytest.raises(RequestError, match='"prompt" is given twice'):
        parse('{"prompt": "a", "prompt": "b"}')


def test_finds_duplicate_fields_in_linear_time():
    many = ','.join(f'"{index}":0' for index in range(30_000))
    begin_s = time.thread_time()        # of this thread alone, however busy the machine is
    with pytest.raises(RequestError, match='"7" is given twice'):
        parse(f'{{{many},"7":0}}')
    assert time.thread_time() - begin_s < 5     # quadratic time would be 47 s


def test_shortens_long_values_in_messages():
    with pytest.raises(RequestError) as raised:
        read(temperature='x' * 10_000)
    assert len(str(raised.value)) < 400
