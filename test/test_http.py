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

"""The HTTP server with a fake engine, without ROS: OpenAI's client, wrong requests, limits."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
import http.client
import json
import socket
import sys
import threading

from fake_engine import CharacterText
from fake_engine import FakeEngine
from fake_engine import forever
from fake_engine import Gate
from fake_engine import say
import pytest
from worker_rig import Sink
from worker_rig import TIMEOUT_S
from worker_rig import TOOL
from worker_rig import wait_for

openai = pytest.importorskip('openai')
pytest.importorskip('uvicorn')
pytest.importorskip('prometheus_client')

from fake_server import free_port
from physai_decode.config import DecodeConfig
from physai_decode.config import HttpConfig
from physai_decode.config import ModelConfig
from physai_decode.config import QueueConfig
from physai_decode.config import SamplingConfig
from physai_decode.host import Host
from physai_decode.host import Loaded
from physai_decode.http import HttpError
from physai_decode.http import KEY_VARIABLE
from physai_decode.http import server
from physai_decode.http import start_server
from physai_decode.http.exchange import Exchange
from physai_decode.http.openai import failure
from physai_decode.http.openai import Formatter
from physai_decode.roofline import Peak
from physai_decode.speech import Manner
from physai_decode.timing import RequestReport
from physai_decode.tool_forms import TOOL_FORMS
from prometheus_client.parser import text_string_to_metric_families

MODEL = 'folder/model'
CHAT, TEXT = '/v1/chat/completions', '/v1/completions'
HELLO = [{'role': 'user', 'content': 'say hello'}]


class Rig:
    """A host with its HTTP server, and the reports of requests."""

    def __init__(self, engine=None, start=True, queue=None, **http):
        self.engine = engine or FakeEngine(max_context=4096, vocab_size=256)
        self.sink, self.errors = Sink(), []
        self.host = Host(self.sink, lambda config, progress: Loaded(
            self.engine, CharacterText(), Peak(1e6, 'parameter'), sampling={}))
        self.config = DecodeConfig(
            model=ModelConfig(path=MODEL), queue=queue or QueueConfig(),
            http=HttpConfig(port=free_port(), **http))
        self.server = start_server(self.host, self.config.http,
                                   lambda *error: self.errors.append(error),
                                   lambda: len(self.errors))
        if start:
            self.host.load(self.config, lambda text: None)
            self.host.start(self.config)

    @property
    def port(self):
        """The port of the server."""
        return self.config.http.port

    def client(self, key='none'):
        """Return a client of OpenAI's package, which never retries."""
        return openai.OpenAI(base_url=self.server.address, api_key=key, max_retries=0,
                             timeout=TIMEOUT_S)

    def chat(self, **fields):
        """Request a chat completion."""
        return self.client().chat.completions.create(
            **{'model': MODEL, 'messages': HELLO, **fields})

    def request(self, method, path, body=None, **headers):
        """Send raw HTTP; returns status, headers and body."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=TIMEOUT_S)
        if isinstance(body, dict):
            body = json.dumps(body)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        kind = answer.headers['content-type']
        return answer.status, answer.headers, (
            json.loads(data) if kind == 'application/json' else data.decode())

    def metrics(self):
        """Return the values of the metrics by name and label values."""
        status, _, text = self.request('GET', '/metrics')
        assert status == 200
        return {(sample.name, *dict(sorted(sample.labels.items())).values()): sample.value
                for family in text_string_to_metric_families(text) for sample in family.samples}

    def close(self):
        """Stop the server and the host; the server has reported no error."""
        self.host.stop(TIMEOUT_S)
        self.server.close()
        assert not self.server._thread.is_alive()
        self.host.unload()
        assert self.errors == []


@contextmanager
def opened(*arguments, **named):
    """Yield a rig, and close it."""
    rig = Rig(*arguments, **named)
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture(scope='module')
def rig():
    """Yield a rig that echoes the last word."""
    with opened() as rig:
        yield rig


@pytest.fixture
def gate():
    """Yield a gate for the steps of an engine, and open it after the test."""
    gate = Gate()
    yield gate
    gate.open(10000)


def gated(gate):
    """Return an engine whose answer never ends and waits for the gate at each token."""
    return FakeEngine(lambda prompt_ids: gate.steps(forever()), max_context=4096)


def is_ending(rig):
    """Return whether no request is running, or the running one is about to end."""
    running = rig.host.worker._queue.running
    return running is None or running.end_reason


def test_chat_completion(rig):
    answer = rig.chat()
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ('assistant', 'hello')
    assert (choice.finish_reason, answer.model, answer.object) == (
        'stop', MODEL, 'chat.completion')
    assert answer.usage.prompt_tokens == 9 and answer.usage.completion_tokens == 5
    report, text = rig.sink.end(answer.physai['request_id'])
    assert (report.client_id, text) == (answer.id, 'hello')
    assert rig.sink.requests[report.request_id].client_id == answer.id


def test_stream(rig):
    chunks = list(rig.chat(stream=True, stream_options={'include_usage': True}))
    assert ''.join(chunk.choices[0].delta.content or '' for chunk in chunks[:-1]) == 'hello'
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == 'stop'
    assert chunks[0].choices[0].delta.role == 'assistant'
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 14
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in rig.chat(stream=True))


@pytest.mark.parametrize('prompt', [None, 7])
@pytest.mark.parametrize('output', [None, 5])
def test_usage_is_left_out_unless_all_counts_are_known(prompt, output):
    """Clients add them up."""
    report = RequestReport(1, 'stop', '', prompt, output_tokens=3, server_tokens=output,
                           engine='openai')
    formatter = Formatter('id', MODEL, 0, True, True)
    *_, last = formatter.end(report, 'hi')
    assert last['usage'] == formatter.complete(report, 'hi')['usage']
    if None in (prompt, output):
        assert last['usage'] is None and last['choices'][0]['finish_reason'] == 'stop'
    else:
        assert last['usage']['total_tokens'] == 12 and last['choices'] == []


def test_text_completion(rig):
    """The prompt reaches the model without a template."""
    client = rig.client()
    answer = client.completions.create(model=MODEL, prompt='say hello', max_tokens=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ('hel', 'length')
    assert rig.sink.requests[answer.physai['request_id']].raw_prompt == 'say hello'
    pieces = client.completions.create(model=MODEL, prompt=['say hello'], stream=True)
    assert ''.join(piece.choices[0].text for piece in pieces) == 'hello'


def test_options_reach_the_engine(rig):
    rig.chat(max_completion_tokens=2, temperature=0.5, top_p=0.9, seed=7, stop=['q'], n=1,
             user='me', store=False, presence_penalty=0, logprobs=False, tools=[],
             parallel_tool_calls=True, metadata={'room': 'kitchen'},
             extra_body={'top_k': 5, 'min_p': 0.1, 'repetition_penalty': 1.1,
                         'deadline': {'request_ms': 1e6}})
    sampling = rig.engine.samplings[-1]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed,
            sampling.stop, sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (
        2, 0.5, 0.9, 7, ('q',), 5, 0.1, 1.1)


def test_accepts_an_answer_as_a_message(rig):
    """Clients send it back with its empty fields."""
    answer = rig.chat().choices[0].message.model_dump()
    asked = rig.chat(messages=[
        {'role': 'developer', 'content': 'be brief'}, *HELLO, {**answer, 'name': 'planner'},
        {'role': 'user', 'name': 'me', 'content': [
            {'type': 'text', 'text': 'go'}, {'type': 'text', 'text': 'on'}]}])
    messages = rig.sink.requests[asked.physai['request_id']].messages
    assert [each.role for each in messages] == ['system', 'user', 'assistant', 'user']
    assert messages[-1].content == 'goon'


CALLS = [('go_to', {'room': 'hall'}), ('go_to', {'room': 'kitchen'})]


@pytest.fixture
def agent():
    """Yield a rig whose model thinks, answers and calls a tool twice."""
    answer = f'<think>far</think>I go.{TOOL_FORMS["hermes"].written(CALLS)}'
    with opened(FakeEngine(lambda prompt: say(answer), max_context=4096, vocab_size=256)) as rig:
        rig.host.loaded.text.manner = Manner('<think>', '</think>', form='hermes')
        yield rig


def test_answer_has_tool_calls_and_thoughts(agent):
    choice = agent.chat(tools=[TOOL]).choices[0]
    message = choice.message
    assert (choice.finish_reason, message.content) == ('tool_calls', 'I go.')
    assert message.reasoning_content == 'far'
    assert [(call.function.name, json.loads(call.function.arguments))
            for call in message.tool_calls] == CALLS
    again = agent.chat(tools=[TOOL], messages=[*HELLO, message.model_dump(), *(
        {'role': 'tool', 'tool_call_id': call.id, 'content': 'done'}
        for call in message.tool_calls)])
    sent = agent.sink.requests[again.physai['request_id']].messages
    assert [(call.id, call.name, call.arguments) for call in sent[1].tool_calls] == [
        (call.id, *each) for call, each in zip(message.tool_calls, CALLS)]
    assert sent[1].reasoning_content == 'far'
    assert [each.tool_call_id for each in sent[2:]] == [call.id for call in message.tool_calls]


def test_no_parallel_tool_calls_limits_an_answer_to_one_call(agent):
    message = agent.chat(tools=[TOOL], parallel_tool_calls=False).choices[0].message
    assert (message.content, len(message.tool_calls)) == ('I go.', 1)
    echoed = agent.sink.requests[1].to_json()
    assert echoed['parallel_tool_calls'] is False


def test_stream_has_tool_calls_and_thoughts(agent):
    with agent.client().chat.completions.stream(
            model=MODEL, messages=HELLO, tools=[TOOL]) as stream:
        deltas = [event.chunk.choices[0].delta for event in stream if event.type == 'chunk']
        choice = stream.get_final_completion().choices[0]
    assert (choice.finish_reason, choice.message.content) == ('tool_calls', 'I go.')
    assert ''.join(getattr(delta, 'reasoning_content', None) or '' for delta in deltas) == 'far'
    assert [(call.function.name, json.loads(call.function.arguments))
            for call in choice.message.tool_calls] == CALLS
    assert len({call.id for call in choice.message.tool_calls}) == 2


@pytest.mark.parametrize(('begin', 'rest', 'fields'), [
    ('[{"a":1},', '{"a":2}]', {'response_format': {'type': 'json_schema', 'json_schema': {
        'name': 'plan', 'schema': {'type': 'array', 'items': {'type': 'object'}}}}}),
    (f'I go.{TOOL_FORMS["hermes"].written(CALLS[:1])}', ' ...', {'tools': [TOOL]})])
def test_sends_complete_elements_and_calls_at_once(gate, monkeypatch, begin, rest, fields):
    monkeypatch.setattr('physai_decode.http.exchange.PERIOD_S', 1e6)
    engine = FakeEngine(lambda prompt: gate.steps(say(begin + rest)), max_context=4096,
                        vocab_size=256)
    with opened(engine) as rig:
        rig.host.loaded.text.manner = Manner(form='hermes')
        gate.open(len(begin))
        stream = iter(rig.chat(stream=True, max_tokens=400, **fields))
        received = ''
        while '"a":1}' not in received and 'go_to' not in received:
            received += next(stream).choices[0].delta.model_dump_json().replace('\\', '')
        gate.open(10000)
        list(stream)


def test_names_the_tools_if_the_schema_of_one_is_wrong(agent):
    tool = {'type': 'function', 'function': {'name': 'a', 'parameters': {'not': True}}}
    status, _, answer = agent.request('POST', CHAT, {
        'model': MODEL, 'messages': HELLO, 'tools': [tool], 'tool_choice': 'required'})
    assert (status, answer['error']['param']) == (400, 'tools')
    assert answer['error']['message'].startswith(
        'tools[0].function.parameters has the keyword "not"')


def test_answer_to_a_raw_prompt_is_not_parsed(agent):
    answer = agent.client().completions.create(model=MODEL, prompt='x')
    assert answer.choices[0].text.startswith('<think>far</think>I go.<tool_call>')
    status, _, answer = agent.request('POST', TEXT, {
        'model': MODEL, 'prompt': 'x', 'tools': [TOOL]})
    assert status == 400 and 'tools cannot be used: raw_prompt' in answer['error']['message']


def test_constrains_to_a_schema(rig):
    schema = {'type': 'object', 'properties': {'a': {'type': 'integer'}}, 'required': ['a'],
              'additionalProperties': False}
    answer = rig.chat(max_tokens=60, response_format={
        'type': 'json_schema', 'json_schema': {'name': 'plan', 'schema': schema}})
    content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert content.startswith('{') and reason in ('stop', 'length')
    if reason == 'stop':
        assert type(json.loads(content)['a']) is int
    choice = rig.chat(extra_body={'structured_outputs': {'choice': ['yes', 'no']}})
    assert choice.choices[0].message.content in ('yes', 'no')


@pytest.mark.parametrize(('fields', 'param', 'message'), [
    ({'model': None}, 'model', 'model is missing'),
    ({'messages': None}, 'messages', 'messages is missing'),
    ({'messages': []}, 'messages', 'messages is []'),
    ({'messages': [{'role': 'user'}]}, 'messages', 'messages[0].content'),
    ({'messages': [{'role': 'king', 'content': 'x'}]}, 'messages', 'messages[0].role'),
    ({'messages': [{'role': 'user', 'content': [
        {'type': 'image_url', 'image_url': {'url': 'data:'}}]}]}, 'messages', 'accepts only text'),
    ({'prompt': 'x'}, 'prompt', 'prompt is not a field of this body'),
    ({'raw_prompt': 'x'}, 'raw_prompt', 'raw_prompt is not a field of this body'),
    ({'temperature': 99}, 'temperature', 'temperature is 99'),
    ({'temperature': '1'}, 'temperature', 'expected a number'),
    ({'parallel_tool_calls': 0, 'tools': [TOOL]}, 'parallel_tool_calls', 'true or false'),
    ({'n': 2}, 'n', 'n is 2'), ({'n': True}, 'n', 'n is true'),
    ({'logprobs': True}, 'logprobs', 'logprobs is true'),
    ({'logprobs': 0}, 'logprobs', 'logprobs is 0'),
    ({'presence_penalty': 0.5}, 'presence_penalty', 'does not support'),
    ({'frequency_penalty': 0.5}, 'frequency_penalty', 'does not support'),
    ({'logit_bias': {'5': 1}}, 'logit_bias', 'does not support'),
    ({'reasoning_effort': 'low'}, 'reasoning_effort', 'is not a field'),
    ({'guided_json': {}}, 'guided_json', 'is not a field'),
    ({'max_tokens': 0}, 'max_tokens', 'max_tokens is 0'),
    ({'max_tokens': 1, 'max_completion_tokens': 1}, 'max_completion_tokens', 'set one'),
    ({'stream': 'yes'}, 'stream', 'true or false'),
    ({'stream_options': {}, 'stream': 1}, 'stream', 'true or false'),
    ({'stream': False, 'stream_options': {'include_usage': True}}, 'stream_options',
     'without stream'),
    ({'stream': True, 'stream_options': {'x': 1}}, 'stream_options', 'stream_options.x'),
    ({'stream': True, 'stream_options': {'include_usage': 1}}, 'stream_options', 'true or false'),
    ({'stream_options': 1}, 'stream_options', 'expected an object'),
    ({'response_format': {'type': 'xml'}}, 'response_format', 'response_format.type'),
    ({'response_format': {'type': 'json_schema', 'json_schema': {
        'name': 'x', 'schema': {'type': 'object', 'not': {}}}}}, 'response_format', '"not"'),
    ({'structured_outputs': {'regex': '(a'}}, 'structured_outputs', 'regex cannot be used'),
    ({'max_completion_tokens': 0}, 'max_completion_tokens', 'max_completion_tokens is 0'),
    ({'max_completion_tokens': None, 'max_tokens': 0}, 'max_tokens', 'max_tokens is 0'),
    ({'deadline': {'soon': 1}}, 'deadline', 'deadline.soon'),
    ({'tools': [{**TOOL, 'function': {**TOOL['function'], 'strict': True}}]}, 'tools',
     'tools[0].function.strict is true'),
    ({'tools': [TOOL]}, 'tools', 'tools cannot be used with this model'),
    ({'tools': [TOOL], 'response_format': {'type': 'json_object'}}, 'response_format',
     'cannot call tools: remove response_format'),
    ({'tools': [TOOL], 'structured_outputs': {'regex': 'a'}}, 'structured_outputs',
     'cannot call tools: remove structured_outputs'),
    ({'stop': ['x'], 'structured_outputs': {'regex': 'a'}}, 'stop',
     'stop cannot be used with structured_outputs.regex'),
    ({'messages': [{'role': 'user', 'content': ''}], 'prompt': None}, 'messages',
     'the prompt is empty'),
    ({'messages': [{'role': 'user', 'content': 'a' * 5000}]}, 'messages', '5000 tokens')])
@pytest.mark.parametrize('stream', [False, True])
def test_rejects_a_wrong_body(rig, fields, param, message, stream):
    """The status is 400 even if a stream was requested, and the rejection is counted."""
    before = rig.host.counts['refusals']
    body = {'model': MODEL, 'messages': HELLO, 'stream': stream, **fields}
    status, headers, answer = rig.request('POST', CHAT, body)
    assert status == 400 and message in answer['error']['message']
    assert answer['error']['type'] == 'invalid_request_error'
    assert (answer['error']['param'], answer['error']['code']) == (param, 'invalid_request')
    assert rig.host.counts['refusals'] == before + 1


@pytest.mark.parametrize(('path', 'name'), [
    (CHAT, 'model'), (CHAT, 'messages'), (TEXT, 'model'), (TEXT, 'prompt')])
def test_names_a_missing_field(rig, path, name):
    body = {'model': MODEL, 'prompt' if path == TEXT else 'messages': HELLO}
    del body[name]
    status, _, answer = rig.request('POST', path, body)
    assert (status, answer['error']['param']) == (400, name)
    assert answer['error']['message'].startswith(f'{name} is missing')


def test_names_the_constraint_that_the_stop_of_a_parameter_prevents():
    with opened(start=False) as rig:
        config = replace(rig.config, sampling=SamplingConfig(stop=('x',)))
        rig.host.load(config, lambda text: None)
        rig.host.start(config)
        status, _, answer = rig.request('POST', CHAT, {
            'model': MODEL, 'messages': HELLO, 'structured_outputs': {'regex': 'a'}})
    assert (status, answer['error']['param']) == (400, 'structured_outputs')
    assert 'with sampling.stop, because' in answer['error']['message']


def test_names_the_prompt_that_is_too_long(rig):
    status, _, answer = rig.request(
        'POST', TEXT, {'model': MODEL, 'prompt': 'a' * 5000, 'messages': None})
    assert (status, answer['error']['param']) == (400, 'prompt')


@pytest.mark.parametrize(('message', 'names', 'param'), [
    ('id "a" belongs to a request', {'id', 'messages'}, 'id'),
    ('id "a" belongs to a request', {'metadata', 'messages'}, 'metadata'),
    ("the model's chat template omits the last message", {'model', 'messages'}, 'messages'),
    ('the assistant reasoning text has an unpaired surrogate', {'messages'}, 'messages'),
    ('the raw text has an unpaired surrogate', {'prompt'}, 'prompt'),
    ('tool_calls cannot be used without a chat template', {'messages'}, 'messages'),
    ('chat_template_kwargs.a cannot be set', {'messages', 'chat_template_kwargs'},
     'chat_template_kwargs'),
    ('the model has a chat template with a syntax error', {'model', 'messages'}, None),
    ('the queue is full', {'model', 'messages'}, None)])
def test_names_the_field_of_a_refusal(message, names, param):
    report = RequestReport(1, 'rejected', message)
    assert failure(report, '', names).body['error']['param'] == param


@pytest.mark.parametrize('fields', [
    {'messages': None}, {'n': 2}, {'model': 'another'}, {'stream': 1}, {'top': 1},
    {'temperature': 99}])
def test_rejection_keeps_the_id(rig, fields):
    before = len(rig.sink.ends)
    rig.request('POST', CHAT, {'model': MODEL, 'messages': HELLO, 'id': 'mine', **fields})
    report, _ = rig.sink.ends[before]
    assert (report.finish_reason, report.client_id) == ('rejected', 'mine')


@pytest.mark.parametrize(('body', 'message'), [
    (b'', 'is not valid JSON'), (b'{', 'is not valid JSON'), (b'[]', 'expected a JSON object'),
    (b'\xff', 'not UTF-8'), (b'{"a": 1, "a": 2}', 'given twice'), (b'{"n": NaN}', 'NaN'),
    (b'[' * 100000, 'the body is nested too deeply'),
    (b'{"n": ' + b'9' * 5000 + b'}', 'is too large for a number')])
def test_rejects_a_body_that_is_not_an_object(rig, body, message):
    status, _, answer = rig.request('POST', CHAT, body)
    assert status == 400 and message in answer['error']['message']


@pytest.mark.parametrize('fields', [
    {'prompt': ['a', 'b']}, {'prompt': [1, 2]}, {'prompt': ''}, {}, {'prompt': 'x', 'echo': True},
    {'prompt': 'x', 'best_of': 2}, {'prompt': 'x', 'suffix': 'y'}, {'messages': HELLO},
    {'prompt': 'x', 'logprobs': 1}])
def test_rejects_a_wrong_text_completion(rig, fields):
    status, _, answer = rig.request('POST', TEXT, {'model': MODEL, **fields})
    assert status == 400 and answer['error']['message']


def test_lists_the_model_and_rejects_others(rig):
    client = rig.client()
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 4096)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve('another')
    with pytest.raises(openai.NotFoundError) as raised:
        rig.chat(model='gpt-4o')
    assert raised.value.code == 'model_not_found' and MODEL in raised.value.message


def test_rejects_wrong_paths_methods_and_origins(rig):
    assert rig.request('GET', '/nothing')[0] == 404
    status, headers, _ = rig.request('GET', CHAT)
    assert (status, headers['allow']) == (405, 'POST')
    status, _, answer = rig.request('POST', CHAT, {}, Origin='http://page.example')
    assert (status, answer['error']['code']) == (403, 'origin_not_allowed')
    status, _, answer = rig.request('GET', '/health')
    assert (status, answer['status']) == (200, 'idle')


def test_rejects_a_body_beyond_the_limit():
    with opened(queue=QueueConfig(max_request_bytes=1000)) as rig:
        for size in (1001, 10**6):
            status, _, answer = rig.request('POST', CHAT, b'x' * size)
            assert (status, answer['error']['code']) == (413, 'request_too_large')
        assert rig.host.ends == {'rejected': 2}
        assert rig.chat().choices[0].message.content == 'hello'


def test_requires_the_key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, 'secret')
    with opened() as rig:
        assert rig.client('secret').models.list().data
        for key in ('wrong', 'secret2'):
            with pytest.raises(openai.AuthenticationError) as raised:
                rig.client(key).models.list()
            assert raised.value.code == 'invalid_api_key'
        assert rig.request('POST', CHAT, {})[0] == 401
        assert rig.request('GET', '/health')[0] == rig.request('GET', '/metrics')[0] == 200
    monkeypatch.setenv(KEY_VARIABLE, 'two words')
    with pytest.raises(HttpError, match=KEY_VARIABLE):
        Rig()


def test_rejects_requests_without_a_model():
    with opened(start=False) as rig:
        rig.host.config = rig.config
        status, _, answer = rig.request('GET', '/health')
        assert (status, answer['status']) == (503, 'unconfigured')
        assert 'activate' in answer['message']
        with pytest.raises(openai.InternalServerError) as raised:
            rig.chat()
        assert (raised.value.status_code, raised.value.code) == (503, 'model_not_active')
        assert rig.client().models.list().data == []
        assert rig.metrics()['physai_decode_state', 'unconfigured'] == 1


def test_port_in_use_is_an_error(rig):
    with pytest.raises(HttpError, match=f'port {rig.port} of .127.0.0.1. cannot be opened'):
        start_server(rig.host, rig.config.http, print, int)
    with pytest.raises(HttpError, match='http.host'):
        start_server(rig.host, HttpConfig(port=free_port(), host='no.such.host.invalid'), print,
                     int)


def test_disconnect_cancels_the_request(gate):
    with opened(gated(gate)) as rig:
        gate.open(3)
        stream = rig.chat(stream=True)
        next(iter(stream))
        stream.close()
        wait_for(lambda: is_ending(rig))
        gate.open(10)
        report, _ = rig.sink.end(1)
        assert (report.finish_reason, report.message) == (
            'cancelled', 'its HTTP client has disconnected')
        # One request is running and is not a stream; the other one is queued.
        clients = [socket.create_connection(('127.0.0.1', rig.port)) for _ in range(2)]
        body = json.dumps({'model': MODEL, 'messages': HELLO}).encode()
        for number, each in enumerate(clients):
            each.sendall(b'POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s' % (
                CHAT.encode(), len(body), body))
            wait_for(lambda wanted=number + 2: wanted in rig.sink.requests)
        clients[1].close()
        assert rig.sink.end(3)[0].finish_reason == 'cancelled'
        clients[0].close()
        wait_for(lambda: is_ending(rig))
        gate.open(10)
        assert rig.sink.end(2)[0].finish_reason == 'cancelled'


@pytest.mark.parametrize('stream', [False, True])
def test_half_closed_connection_cancels_the_request(gate, stream):
    with opened(gated(gate)) as rig, \
            socket.create_connection(('127.0.0.1', rig.port)) as half:
        body = json.dumps({'model': MODEL, 'messages': HELLO, 'stream': stream}).encode()
        half.sendall(b'POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s' % (
            CHAT.encode(), len(body), body))
        wait_for(gate.waiting.is_set)
        half.shutdown(socket.SHUT_WR)
        wait_for(lambda: is_ending(rig))
        gate.open(10)
        assert rig.sink.end(1)[0].message == 'its HTTP client has disconnected'


@pytest.mark.parametrize('stream', [False, True])
def test_many_clients_at_once(gate, stream):
    """Each of 64 clients gets an answer, or a rejection because the queue is full."""
    engine = FakeEngine(lambda prompt_ids: gate.steps(
        say(''.join(map(chr, prompt_ids)).split()[-1])), max_context=4096)
    with opened(engine, queue=QueueConfig(size=20)) as rig, ThreadPoolExecutor(64) as pool:
        def ask(number):
            try:
                answer = rig.chat(messages=[{'role': 'user', 'content': f'say w{number}'}],
                                  stream=stream)
                return ''.join(chunk.choices[0].delta.content or '' for chunk in answer) \
                    if stream else answer.choices[0].message.content
            except openai.RateLimitError as error:
                assert error.code == 'queue_full' and 'send it again later' in error.message
                return None

        asked = [pool.submit(ask, number) for number in range(64)]
        wait_for(lambda: rig.host.counts['requests'] == 64)
        gate.open(10000)
        answers = [each.result(TIMEOUT_S) for each in asked]
        assert sum(answer is not None for answer in answers) == 21
        for number, answer in enumerate(answers):
            assert answer in (None, f'w{number}')
        assert rig.host.ends == {'stop': 21, 'rejected': 43}


@pytest.mark.parametrize('stream', [False, True])
def test_reports_an_error_of_the_engine(stream):
    def steps(prompt_ids):
        yield from say('ab', end=False)
        raise RuntimeError('the engine broke')

    with opened(FakeEngine(steps)) as rig:
        with pytest.raises(openai.APIError, match='the engine broke') as raised:
            list(rig.chat(stream=stream))
        assert raised.value.code == 'error'
        assert rig.request('GET', '/health')[2]['status'] == 'failed'
        assert rig.metrics()['physai_decode_ends_total', 'error'] == 1


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('reason', ['deadline', 'cancelled', 'preempted'])
def test_reports_an_answer_that_is_cut_off(gate, reason, stream):
    queue = QueueConfig(policy='preempt' if reason == 'preempted' else 'reject')
    with opened(gated(gate), queue=queue) as rig, ThreadPoolExecutor(2) as pool:
        deadline = {'request_ms': 1.0, 'action': 'truncate'} if reason == 'deadline' else {}
        asked = pool.submit(lambda: list(rig.chat(
            stream=stream, extra_body={'deadline': deadline})))
        if reason != 'deadline':
            wait_for(gate.waiting.is_set)
            gate.open(1)
            rig.sink.wait_tokens(1)
        if reason == 'cancelled':
            rig.host.cancel()
        if reason == 'preempted':
            pool.submit(rig.chat, max_tokens=1)
            wait_for(lambda: is_ending(rig))
        gate.open(10000)
        with pytest.raises(openai.APIError) as raised:
            asked.result(TIMEOUT_S)
        assert raised.value.code == reason
        if not stream:
            assert raised.value.response.headers['x-should-retry'] == 'false'


def test_close_ends_streams_and_connections(gate):
    """Each stream ends with an error, and idle connections do not delay the end."""
    rig = Rig(gated(gate))
    idle = socket.create_connection(('127.0.0.1', rig.port))
    gate.open(1)
    stream = iter(rig.chat(stream=True))
    next(stream)
    stopping = threading.Thread(target=rig.host.stop, args=(TIMEOUT_S,))
    stopping.start()
    wait_for(lambda: is_ending(rig))
    gate.open(10)
    stopping.join()
    rig.close()
    with pytest.raises(openai.APIError, match='the node stops answering'):
        list(stream)
    idle.settimeout(TIMEOUT_S)
    assert idle.recv(1) == b''
    socket.create_server(('127.0.0.1', rig.port)).close()       # the port is free


def test_close_while_the_engine_hangs(gate):
    rig = Rig(gated(gate))
    asked = threading.Thread(target=lambda: pytest.raises(openai.APIError, rig.chat))
    asked.start()
    wait_for(gate.waiting.is_set)
    rig.server.close()
    assert not rig.server._thread.is_alive()
    asked.join(TIMEOUT_S)
    assert not asked.is_alive()
    gate.open(10)
    rig.close()


def test_sends_without_nagle_delay():
    config = HttpConfig(port=free_port())
    with server._listen(config) as listening, \
            socket.create_connection(('127.0.0.1', config.port)):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_limits_connections():
    """Above the limit, a connection gets an error; far above, it is closed without one."""
    with opened(max_connections=2) as rig:
        connections = [socket.create_connection(('127.0.0.1', rig.port)) for _ in range(2)]
        status, _, answer = rig.request('GET', '/health')
        assert (status, answer['error']['code']) == (503, 'too_many_connections')
        connections += [socket.create_connection(('127.0.0.1', rig.port))
                        for _ in range(server.SPARE + 1)]
        connections[-1].settimeout(TIMEOUT_S)
        try:
            assert connections[-1].recv(1) == b''
        except ConnectionResetError:
            pass
        for each in connections:
            each.close()
        wait_for(lambda: rig.request('GET', '/health')[0] == 200)


@pytest.mark.parametrize('sent', [b'', b'GET /health HTTP/1.1\r\nhost'])
def test_closes_a_connection_without_a_request(monkeypatch, sent):
    monkeypatch.setattr(server, 'IDLE_TIMEOUT_S', 0.05)
    with opened() as rig, socket.create_connection(('127.0.0.1', rig.port)) as slow:
        slow.settimeout(TIMEOUT_S)
        slow.sendall(sent)
        assert slow.recv(1) == b''


def test_times_out_without_a_body(monkeypatch):
    monkeypatch.setattr('physai_decode.http.app.BODY_TIMEOUT_S', 0.05)
    with opened() as rig, socket.create_connection(('127.0.0.1', rig.port)) as slow:
        slow.settimeout(TIMEOUT_S)
        slow.sendall(b'POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{' % CHAT.encode())
        assert slow.recv(100).startswith(b'HTTP/1.1 408')


def test_answers_400_to_bytes_that_are_not_http(rig):
    with socket.create_connection(('127.0.0.1', rig.port)) as other:
        other.settimeout(TIMEOUT_S)
        other.sendall(b'\x16\x03\x01\x02\r\n\r\n')
        assert other.recv(100).startswith(b'HTTP/1.1 400')
    assert rig.request('GET', '/health')[0] == 200


def test_cancels_the_request_of_a_client_that_does_not_read(monkeypatch):
    monkeypatch.setattr(server, 'WRITE_TIMEOUT_S', 0.2)
    engine = FakeEngine(lambda prompt_ids: forever(), max_context=10**8)
    with opened(engine) as rig, socket.socket() as slow:
        rig.server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(('127.0.0.1', rig.port))
        body = json.dumps({'model': MODEL, 'messages': HELLO, 'stream': True,
                           'max_tokens': 1048576}).encode()
        slow.sendall(b'POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s' % (
            CHAT.encode(), len(body), body))
        report, _ = rig.sink.end(1)
        assert report.finish_reason == 'cancelled' and 'HTTP client' in report.message


def test_cancels_a_request_with_too_many_unsent_pieces():
    class Stub:
        def __init__(self):
            self.cancelled = []

        def submit(self, request, received_s, listener):
            return 7

        def cancel(self, number, message):
            self.cancelled.append((number, message))

    class Piece:
        text, tool_calls = 'x', ()

    async def fill():
        host = Stub()
        exchange = Exchange(host, True, max_pieces=3)
        exchange.submit(None, 0.0)
        for _ in range(10):
            exchange.token(Piece)
        assert len(exchange._pieces) == 3
        await asyncio.sleep(0)
        return host.cancelled

    assert asyncio.run(fill()) == [(7, 'its HTTP client has not read 3 tokens')]


def test_metrics_keep_a_corrected_peak():
    with opened() as rig:
        rig.host.peak = rig.host.worker.peak = Peak(5e9, 'observed in steps')
        assert rig.metrics()['physai_decode_peak_bandwidth_gb_s',] == 5.0
        assert rig.host.stop(TIMEOUT_S)
        assert rig.metrics()['physai_decode_peak_bandwidth_gb_s',] == 5.0


def test_metrics():
    with opened() as rig:
        rig.chat()
        rig.request('POST', CHAT, {})
        rig.chat(extra_body={'structured_outputs': {'choice': ['yes', 'no']}})
        found = rig.metrics()
        text = rig.request('GET', '/metrics')[2]
    assert '# HELP physai_decode_itl_p50_ms median latency of a token\n' in text
    assert found['physai_decode_requests_total',] == 3
    assert found['physai_decode_tokens_total',] == rig.sink.ends[0][0].output_tokens + \
        rig.sink.ends[2][0].output_tokens
    assert found['physai_decode_ends_total', 'stop'] == 2
    assert found['physai_decode_ends_total', 'rejected'] == 1
    assert found['physai_decode_ends_total', 'error'] == 0
    assert found['physai_decode_ends_total', 'tool_calls'] == 0
    assert found['physai_decode_callback_errors_total',] == 0
    assert found['physai_decode_state', 'idle'] == 1
    assert found['physai_decode_model', 'off', 'cpu', 'fake device', 'float32', 'fake', MODEL,
                 'none'] == 1
    for name in ('itl_p50_ms', 'itl_p99_ms', 'r_floor', 'mask_ms', 'ttft_last_ms'):
        assert found[f'physai_decode_{name}',] > 0, name
    assert found['physai_decode_queue_depth',] == found['physai_decode_memory_locked',] == 0


def test_internal_error_is_reported_and_the_server_continues(monkeypatch):
    with opened() as rig:
        monkeypatch.setattr(rig.server._app._metrics, 'text', lambda: 1 / 0)
        status, _, answer = rig.request('GET', '/metrics')
        assert (status, answer['error']['code']) == (500, 'error')
        ((where, error),) = rig.errors
        assert where == 'GET /metrics' and isinstance(error, ZeroDivisionError)
        assert rig.request('GET', '/health')[0] == 200
        rig.errors.clear()


def test_names_the_missing_package(monkeypatch, rig):
    monkeypatch.setitem(sys.modules, 'physai_decode.http.server', None)
    with pytest.raises(HttpError) as raised:
        start_server(rig.host, HttpConfig(port=1), print, int)
    assert str(raised.value).endswith(
        f': {sys.executable} -m pip install uvicorn prometheus_client, or set http.port to 0')
