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

"""Answers from a server: requests, streams, failures, and the local fallback."""

from contextlib import contextmanager
from contextlib import ExitStack
from itertools import chain
import json
from shutil import which
import socket
import ssl
import subprocess
import threading
import time

from fake_engine import CharacterText
from fake_engine import FakeEngine
from fake_server import MODEL
from fake_server import PATIENCE_S
from fake_server import serving
from fake_server import well
from physai_decode import server_answer
from physai_decode.config import ChatConfig
from physai_decode.config import ConfigError
from physai_decode.config import DeadlineConfig
from physai_decode.config import DecodeConfig
from physai_decode.config import PaceConfig
from physai_decode.config import QueueConfig
from physai_decode.config import RemoteConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import ThinkingConfig
from physai_decode.engines.openai import KEY_VARIABLE
from physai_decode.engines.openai import read
from physai_decode.engines.openai import Server
from physai_decode.request import Form
from physai_decode.request import Message
from physai_decode.request import Request
from physai_decode.result import chat_completion
from physai_decode.roofline import Peak
from physai_decode.worker import Worker
import pytest
from worker_rig import Sink
from worker_rig import TIMEOUT_S
from worker_rig import wait_for

TOOL = {'type': 'function', 'function': {'name': 'go', 'parameters': {'type': 'object'}}}
SHORT_MS = 300.0


@pytest.fixture
def fake():
    """Start a server that sends a valid answer."""
    with serving() as fake:
        yield fake


@contextmanager
def remote_worker(url, key='', local=None, form=None, first_ms=1e3 * PATIENCE_S,
                  token_ms=1e3 * PATIENCE_S, checkpoint=None, energy_j=lambda: None, **groups):
    """Start a worker for a server, with an optional local engine; yield it with its sink."""
    remote = RemoteConfig(url, MODEL, first_ms, token_ms)
    sink = Sink()
    worker = Worker(local, local and CharacterText(), DecodeConfig(remote=remote, **groups), sink,
                    peak=Peak(1e6, 'parameter'), form=form, checkpoint_sampling=checkpoint or {},
                    energy_j=energy_j, server=Server(remote, key))
    worker.start()
    yield worker, sink
    assert worker.stop(TIMEOUT_S)


def ask(fake, request=None, **settings):
    """Send one request; return the report and the text."""
    with remote_worker(fake.url, **settings) as (worker, sink):
        return sink.end(worker.submit(request or Request('where?')))


def answering(*deltas, reason='stop'):
    """Return a handler that sends these deltas, of which a string is a piece of text."""
    def answer(call, body):
        call.begin()
        for each in deltas:
            call.delta({'content': each} if isinstance(each, str) else each)
        call.end(reason)
    return answer


def fragment(index, name='go', arguments='{}', **more):
    """Return the delta of a part of a tool call."""
    return {'tool_calls': [
        {'index': index, 'function': {'name': name, 'arguments': arguments}, **more}]}


def close_in_mid_answer(call, body):
    """Send some text, then close the connection."""
    call.begin()
    call.say('half')
    call.connection.shutdown(socket.SHUT_RDWR)


def hang(call, body):
    """Accept the request, and send nothing."""
    call.wait_for_client_to_go()


def keep_alive(call, body):
    """Send empty deltas and comments without end, but no text."""
    call.begin()
    while True:
        call.say('')
        call.raw(b': ping\n\n')
        time.sleep(0.001)


def hang_in_mid_answer(call, body):
    """Send some text, then nothing."""
    call.begin()
    call.say('half')
    call.wait_for_client_to_go()


def test_publishes_each_piece_as_a_token(fake):
    with remote_worker(fake.url) as (worker, sink):
        report, text = sink.end(worker.submit(Request('where?')))
        assert text == 'far away.'
        assert [token.text for token in sink.tokens] == ['far', ' away', '.']
        assert {(token.token_id, token.context_tokens, token.floor_ms, token.r_floor,
                 token.bandwidth_gb_s, token.device_ms) for token in sink.tokens} == {(None,) * 6}
        assert sink.tokens[0].itl_ms is None
        assert all(token.itl_ms >= 0 for token in sink.tokens[1:])
        window = worker.window()
        assert window.count == 2
        assert window.kv_bytes is window.r_floor is window.context_tokens is None
    assert (report.finish_reason, report.message) == ('stop', '')
    assert (report.engine, report.fallback) == ('openai', '')
    assert (report.prompt_tokens, report.cached_tokens) == (7, 4)
    assert (report.output_tokens, report.server_tokens) == (3, 5)
    assert report.r_floor_p50 is None and report.energy_j is None and report.ttft_ms > 0


def test_counts_pieces_if_the_server_sends_no_usage(fake):
    fake.answer = answering('a', 'b')
    report, text = ask(fake)
    assert (report.prompt_tokens, report.output_tokens, report.server_tokens) == (None, 2, None)
    usage = chat_completion(report, text, MODEL)['usage']
    assert [usage[f'{name}_tokens'] for name in ('prompt', 'completion', 'total')] == 3 * [None]
    assert usage['prompt_tokens_details'] == {'cached_tokens': None}


def test_usage_counts_tokens_not_pieces(fake):
    def answer(call, body):
        call.begin()
        call.delta({'reasoning': 'well'})
        call.say('a')
        call.end(usage={'prompt_tokens': 7, 'completion_tokens': 5})

    fake.answer = answer
    report, text = ask(fake)
    assert (report.output_tokens, report.reasoning_tokens) == (2, 1)
    assert chat_completion(report, text, MODEL)['usage'] == {
        'prompt_tokens': 7, 'completion_tokens': 5, 'total_tokens': 12,
        'prompt_tokens_details': {'cached_tokens': None},
        'completion_tokens_details': {'reasoning_tokens': None}}


def test_the_last_counts_of_the_server_win(fake):
    """Some servers send the counts so far with each piece, and the final ones after the end."""
    def answer(call, body):
        call.begin()
        for count, piece in enumerate(('a', 'b'), 1):
            call.event({'choices': [{'index': 0, 'delta': {'content': piece}}],
                        'usage': {'prompt_tokens': 7, 'completion_tokens': count}})
        call.end(usage={'prompt_tokens': 7, 'completion_tokens': 3})

    fake.answer = answer
    assert ask(fake)[0].server_tokens == 3


def test_counts_with_the_finish_reason_are_final(fake, monkeypatch):
    """The node waits for no others."""
    monkeypatch.setattr(server_answer, 'USAGE_TIMEOUT_S', PATIENCE_S)

    def answer(call, body):
        call.begin()
        call.event({'choices': [{'index': 0, 'delta': {'content': 'a'}, 'finish_reason': 'stop'}],
                    'usage': {'prompt_tokens': 7, 'completion_tokens': 1}})
        call.wait_for_client_to_go()

    fake.answer = answer
    report, _ = ask(fake)
    assert report.server_tokens == 1 and report.total_ms < 1e3 * PATIENCE_S


def test_sends_all_fields_of_a_request(fake):
    request = Request(
        messages=(Message('system', 'be brief'), Message('user', 'where?')),
        sampling={'temperature': 0.5, 'top_p': 0.9, 'top_k': 40, 'min_p': 0.1, 'seed': 7,
                  'repetition_penalty': 1.1, 'max_new_tokens': 12, 'stop': ('END',)},
        chat_template_kwargs={'enable_thinking': False}, tools=(TOOL,), tool_choice='auto')
    report, _ = ask(fake, request, key='secret')
    path, headers, body = fake.asked[0]
    assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer secret'
    assert body == {
        'model': MODEL, 'messages': [{'role': 'system', 'content': 'be brief'},
                                     {'role': 'user', 'content': 'where?'}],
        'temperature': 0.5, 'top_p': 0.9, 'top_k': 40, 'min_p': 0.1, 'seed': 7,
        'repetition_penalty': 1.1, 'max_tokens': 12, 'stop': ['END'],
        'chat_template_kwargs': {'enable_thinking': False}, 'tools': [TOOL],
        'tool_choice': 'auto', 'stream': True, 'stream_options': {'include_usage': True}}
    assert report.seed == 7


def test_ends_with_an_error_after_a_second_parallel_call(fake):
    fake.answer = answering(
        fragment(0, id='c0'), fragment(1, id='c1'), reason='tool_calls')
    report, _ = ask(fake, Request('x', tools=(TOOL,), parallel_tool_calls=False))
    assert fake.asked[0][2]['parallel_tool_calls'] is False
    assert report.finish_reason == 'error'
    assert 'ignores parallel_tool_calls' in report.message


def test_sends_only_fields_of_openai_by_default(fake):
    """Servers may reject fields that OpenAI's API does not have."""
    ask(fake)
    assert sorted(fake.body) == ['max_tokens', 'messages', 'model', 'seed', 'stream',
                                 'stream_options', 'temperature', 'top_p']
    assert 'Authorization' not in fake.asked[0][1]


def test_sampling_from_checkpoint_is_left_to_the_server(fake):
    """Only the sampling settings of the request are sent."""
    ask(fake, Request('where?', sampling={'top_k': 3}), checkpoint={'temperature': 0.1},
        sampling=SamplingConfig(from_checkpoint=True, min_p=0.5))
    assert fake.body['top_k'] == 3
    assert not {'temperature', 'top_p', 'min_p'} & fake.body.keys()


@pytest.mark.parametrize(('fields', 'sent'), [
    ({'response_format': {'type': 'json_object'}}, {'response_format': {'type': 'json_object'}}),
    ({'response_format': {'type': 'text'}}, {}),
    ({'response_format': {'type': 'json_schema', 'json_schema': {'schema': {'type': 'array'}}}},
     {'response_format': {'type': 'json_schema', 'json_schema': {
         'name': 'answer', 'schema': {'type': 'array'}, 'strict': True}}}),
    ({'structured_outputs': {'choice': ['a', 'b']}},
     {'structured_outputs': {'choice': ['a', 'b']}})])
def test_sends_the_constraint(fake, fields, sent):
    fake.answer = hang
    with remote_worker(fake.url) as (worker, _):
        worker.submit(Request('where?', **fields))
        wait_for(lambda: fake.asked)
    assert {name: fake.body[name] for name in ('response_format', 'structured_outputs')
            if name in fake.body} == sent


@pytest.mark.parametrize(('fields', 'content', 'reason'), [
    ({'response_format': {'type': 'json_object'}}, '{"a":', 'error'),
    ({'response_format': {'type': 'json_object'}}, '[1]', 'error'),
    ({'response_format': {'type': 'json_object'}}, '{"a": NaN}', 'error'),
    ({'response_format': {'type': 'json_object'}}, '{"a": 1, "a": 2}', 'error'),
    ({'response_format': {'type': 'json_object'}}, '{"a": 1}', 'stop'),
    ({'structured_outputs': {'choice': ['yes', 'no']}}, 'yes!', 'error'),
    ({'structured_outputs': {'choice': ['yes', 'no']}}, 'yes', 'stop')])
def test_checks_the_answer_against_the_constraint(fake, fields, content, reason):
    """A server may ignore the constraint; an answer that violates it ends with an error."""
    fake.answer = answering(content)
    report, text = ask(fake, Request('where?', **fields))
    assert (report.finish_reason, text) == (reason, content)
    if reason == 'error':
        assert 'violates' in report.message


def test_sends_the_constraint_of_the_parameters(fake):
    ask(fake, form=Form('regex', 'a+', 'constraint.regex'))
    assert fake.body['structured_outputs'] == {'regex': 'a+'}


def test_publishes_items_as_they_complete(fake):
    fake.answer = answering('[{"a"', ':1},', '2', ']')
    with remote_worker(fake.url) as (worker, sink):
        report, _ = sink.end(worker.submit(Request(
            'plan', response_format={'type': 'json_object'})))
        assert [(count, item.value) for count, item in sink.items] == [(2, '{"a":1}'), (4, '2')]
    assert report.items == 2


def test_sends_a_raw_prompt_to_completions(fake):
    def answer(call, body):
        call.begin()
        call.event({'choices': [{'index': 0, 'text': 'on', 'finish_reason': None}]})
        call.event({'choices': [{'index': 0, 'text': '', 'finish_reason': 'length'}]})
        call.end()

    fake.answer = answer
    report, text = ask(fake, Request(raw_prompt='go '))
    assert fake.asked[0][0] == '/v1/completions' and fake.body['prompt'] == 'go '
    assert text == 'on' and report.finish_reason == 'length'
    assert 'sampling.max_new_tokens is 256' in report.message


@pytest.mark.parametrize(('request_', 'settings', 'words'), [
    (Request('x', thinking={'max_tokens': 5}), {}, 'thinking.max_tokens is 5'),
    (Request('x'), {'thinking': ThinkingConfig(6)}, 'thinking.max_tokens is 6'),
    (Request(raw_prompt='x', tools=(TOOL,)), {}, 'raw_prompt'),
    (Request('x', sampling={'stop': ('a',)}, structured_outputs={'regex': 'a'}), {}, 'stop'),
    (Request('x', tools=(TOOL,)), {'form': Form('regex', 'a', 'constraint.regex')},
     'constraint.regex')])
def test_rejects_requests_that_no_server_supports(fake, request_, settings, words):
    report, _ = ask(fake, request_, **settings)
    assert report.finish_reason == 'rejected' and words in report.message
    assert report.engine == '' and not fake.asked


def test_sends_the_conversation_as_messages(fake):
    with remote_worker(fake.url, chat=ChatConfig(system_prompt='sys', keep_history=True)) as (
            worker, sink):
        for prompt in ('one', 'two'):
            sink.end(worker.submit(Request(prompt)))
    assert [(each['role'], each['content']) for each in fake.body['messages']] == [
        ('system', 'sys'), ('user', 'one'), ('assistant', 'far away.'), ('user', 'two')]


def test_drops_the_oldest_turns_of_a_conversation_that_is_too_long(fake):
    def answer(call, body):
        if len(body['messages']) > 4:
            return call.whole(400, {'error': {'message': 'maximum context length exceeded'}})
        return well(call, body)

    fake.answer = answer
    with remote_worker(fake.url, chat=ChatConfig(keep_history=True)) as (worker, sink):
        ends = [sink.end(worker.submit(Request(prompt)))[0] for prompt in 'abcd']
    assert {end.finish_reason for end in ends} == {'stop'}
    assert [end.message for end in ends[:2]] == ['', '']
    assert 'dropped its oldest 1 turn' in ends[2].message
    assert [each['content'] for each in fake.body['messages']][::2] == ['c', 'd']


def test_publishes_thoughts_and_tool_calls(fake):
    fake.answer = answering(
        {'reasoning_content': 'hm'}, {'reasoning': 'm'}, 'ok',
        fragment(0, arguments='', id='c1', type='function'),
        {'tool_calls': [{'index': 0, 'function': {'arguments': '{"to":'}}]},
        {'tool_calls': [{'index': 0, 'function': {'arguments': '"user"}'}}]},
        fragment(1, id='c2'), reason='tool_calls')
    with remote_worker(fake.url) as (worker, sink):
        report, text = sink.end(worker.submit(Request('where?', tools=(TOOL,))))
        tokens = [(token.text, token.reasoning, [(each.id, each.name, each.arguments)
                                                 for each in token.tool_calls])
                  for token in sink.tokens]
    assert tokens == [('', 'hm', []), ('', 'm', []), ('ok', '', []), ('', '', []), ('', '', []),
                      ('', '', [('c1', 'go', {'to': 'user'})]), ('', '', [('c2', 'go', {})])]
    assert (report.finish_reason, report.reasoning, text) == ('tool_calls', 'hmm', 'ok')
    assert [each.id for each in report.tool_calls] == ['c1', 'c2']
    assert report.reasoning_tokens == 2


@pytest.mark.parametrize(('name', 'arguments', 'words'), [
    ('fly', '{}', 'the tool "fly", but the request allows go'),
    ('go', '{"to": Infinity}', 'not a JSON object'), ('go', '[1', 'not a JSON object')])
def test_invalid_tool_call_is_an_error(fake, name, arguments, words):
    fake.answer = answering(fragment(0, name, arguments, id='c1'), reason='tool_calls')
    report, _ = ask(fake, Request('where?', tools=(TOOL,)))
    assert report.finish_reason == 'error' and words in report.message
    assert not report.tool_calls


@pytest.mark.parametrize(('choice', 'called', 'reason', 'words'), [
    ('required', None, 'stop', 'ignores tool_choice'),
    ({'type': 'function', 'function': {'name': 'go'}}, None, 'stop', 'ignores tool_choice'),
    ({'type': 'function', 'function': {'name': 'go'}}, 'turn', 'tool_calls', 'allows go'),
    ('auto', None, 'tool_calls', 'sent no call'),
    ('auto', None, 'function_call', 'sent no call')])
def test_missing_call_is_an_error(fake, choice, called, reason, words):
    turn = {'type': 'function', 'function': {'name': 'turn', 'parameters': {}}}
    calls = [{'tool_calls': [{'index': 0, 'function': {'name': called}}]}] if called else []
    fake.answer = answering('well', *calls, reason=reason)
    report, _ = ask(fake, Request('x', tools=(TOOL, turn), tool_choice=choice))
    assert report.finish_reason == 'error' and words in report.message
    assert not report.tool_calls


@pytest.mark.parametrize('arguments', ['', '{"to":', '{"to":"us'])
def test_drops_a_call_that_a_length_limit_cuts_off(fake, arguments):
    fake.answer = answering(
        fragment(0, arguments='{"to":"a"}'), fragment(1, arguments=arguments), reason='length')
    report, _ = ask(fake, Request('x', tools=(TOOL,)))
    assert report.finish_reason == 'length', report.message
    assert [each.arguments for each in report.tool_calls] == [{'to': 'a'}]


@pytest.mark.parametrize(('fragments', 'expected', 'words'), [
    ([('c1', 'go', '{"to":'), ('', '', '1}'), ('c2', 'go', '{"to":2}')], [1, 2], ''),
    ([('c1', 'go', '{"to":1}'), ('c1', 'go', '{"to":1}')], [], 'allows go'),
    ([('c1', 'go', '{"to":1}'), None, ('c1', 'go', '{"to":1}')], [1], 'after its end'),
    ([('c1', 'go', '{"to":1}'), None, ('c2', 'go', '{"to":2}')], [1, 2], ''),
    ([('c1', 'go', '{"to":'), ('c2', 'go', '{"to":2}')], [], 'before the end of another'),
    ([('c1', 'go', '{"to":'), ('c1', '', '1}')], [1], '')])
def test_calls_with_the_same_index_differ_by_their_ids(fake, fragments, expected, words):
    """A call that is sent twice is an error, not two calls; None is a piece of text."""
    fake.answer = answering(*('well' if each is None else fragment(0, *each[1:], id=each[0])
                              for each in fragments), reason='tool_calls')
    report, _ = ask(fake, Request('x', tools=(TOOL,)))
    assert report.finish_reason == ('error' if words else 'tool_calls')
    assert words in report.message
    assert [each.arguments['to'] for each in report.tool_calls] == expected


def test_interleaved_calls_keep_their_arguments(fake):
    """No call is published before its arguments are complete."""
    fake.answer = answering(*chain.from_iterable((fragment(*each), ' ') for each in (
        (0, 'go', ''), (1, 'go', '{"to":'), (0, '', '{"to":"a"}'), (1, '', '"b"}'),
        (2, 'go', ''), (3, 'go', '{}'))), reason='tool_calls')
    report, _ = ask(fake, Request('x', tools=(TOOL,)))
    assert report.finish_reason == 'tool_calls', report.message
    assert [each.arguments for each in report.tool_calls] == [{'to': 'a'}, {'to': 'b'}, {}, {}]


def test_several_calls_in_one_event(fake):
    fake.answer = answering('ok', {'tool_calls': [
        {'index': index, 'function': {'name': 'go', 'arguments': f'{{"to":{index}}}'}}
        for index in range(3)]}, reason='tool_calls')
    report, text = ask(fake, Request('x', tools=(TOOL,)))
    assert (report.finish_reason, text) == ('tool_calls', 'ok')
    assert [each.arguments for each in report.tool_calls] == [{'to': 0}, {'to': 1}, {'to': 2}]


def test_further_choices_are_not_part_of_the_answer(fake):
    def answer(call, body):
        call.begin()
        for index, text in ((1, 'left'), (0, 'right'), (1, ' now')):
            call.event({'choices': [{'index': index, 'delta': {'content': text}}]})
        call.event({'choices': [{'index': 1, 'delta': {}, 'finish_reason': 'length'},
                                {'index': 0, 'delta': {'content': ' turn'}}]})
        call.end()

    fake.answer = answer
    report, text = ask(fake)
    assert (report.finish_reason, text) == ('stop', 'right turn')


def responding(status, value, kind='application/json', **headers):
    """Return a handler that sends a whole response."""
    return lambda call, body: call.whole(status, value, kind, **headers)


def streaming(*events):
    """Return a handler that sends a stream of these raw events."""
    def answer(call, body):
        call.begin()
        for each in events:
            call.raw(each)
        call.wfile.write(b'0\r\n\r\n')
    return answer


# What the server does before it sends text: the handler, and words of the error message.
FAILURES = {
    'refuses the key': (responding(401, {'error': {'message': 'no such key'}}), KEY_VARIABLE),
    'has no such model': (responding(404, {'error': {'message': 'no such model'}}),
                          '404: no such model'),
    'is busy': (responding(429, {'error': {'message': 'too many'}}), '429: too many'),
    'has an error': (responding(500, 'Internal Server Error', 'text/plain'),
                     'Internal Server Error'),
    'rejects a field': (responding(422, {'detail': 'seed: wrong'}), '422: seed: wrong'),
    'redirects': (responding(307, '', Location='https://other/v1'), "'https://other/v1'"),
    'sends a page': (responding(200, '<html>Sign in</html>', 'text/html'), 'text/html'),
    'does not stream': (responding(200, {'choices': []}), 'not a stream'),
    'sends no JSON': (streaming(b'data: oops\n\n'), "'oops' is not a JSON object"),
    'sends no choices': (streaming(b'data: {"answer": 1}\n\n'), 'not an event of a stream'),
    'sends other types': (streaming(b'data: {"choices": [{"delta": {"content": 5}}]}\n\n'),
                          'not an event of a stream'),
    'fails in the stream': (streaming(b'data: {"error": {"message": "out of memory"}}\n\n'),
                            'out of memory'),
    'sends deeply nested JSON': (streaming(b'data: ' + b'[' * 100_000 + b'\n\n'),
                                 'not a JSON object'),
    'filters the answer': (
        streaming(b'data: {"choices": [{"finish_reason": "content_filter"}]}\n\n'),
        '"content_filter"'),
    'ends an empty stream': (streaming(), 'ended the stream too early'),
    'closes the connection': (lambda call, body: call.connection.shutdown(socket.SHUT_RDWR),
                              'cannot be reached'),
    'hangs': (hang, 'remote.first_token_timeout_ms, which is 300'),
    'hangs but sends comments': (keep_alive, 'remote.first_token_timeout_ms, which is 300')}


@pytest.mark.parametrize('name', FAILURES)
def test_reports_a_failure_of_the_server(fake, name):
    """Without a local engine, the request ends with the reason; the next one is answered."""
    fake.answer, words = FAILURES[name]
    with remote_worker(fake.url, first_ms=SHORT_MS if 'hangs' in name else 1e3 * PATIENCE_S) as (
            worker, sink):
        report, text = sink.end(worker.submit(Request('where?')))
        assert (report.finish_reason, text) == ('error', '')
        assert words in report.message
        assert worker.state == 'failed' and worker.last_error == report.message
    fake.answer = well
    assert ask(fake)[1] == 'far away.'


@pytest.mark.parametrize('name', FAILURES)
def test_local_engine_answers_if_the_server_fails(fake, name):
    fake.answer, words = FAILURES[name]
    with remote_worker(fake.url, local=FakeEngine(),
                 first_ms=SHORT_MS if 'hangs' in name else 1e3 * PATIENCE_S) as (worker, sink):
        report, text = sink.end(worker.submit(Request('say here')))
        assert (report.finish_reason, text, report.message) == ('stop', 'here', '')
        assert report.engine == 'fake' and words in report.fallback
        assert worker.fallback == report.fallback and worker.fallbacks == 1
        assert worker.state == 'idle'
        assert all(token.token_id is not None for token in sink.tokens)
        assert sink.tokens[1].floor_ms is not None and report.prompt_tokens == 8
        fake.answer = well
        if 'hangs' not in name:         # a busy machine can exceed this short timeout
            report, text = sink.end(worker.submit(Request('where?')))
            assert (text, report.engine, report.fallback) == ('far away.', 'openai', '')
            assert worker.fallback == '' and worker.fallbacks == 1


def hang_after_the_usage(call, body):
    """Send token counts, then nothing."""
    call.begin()
    call.event({'choices': [], 'usage': {'prompt_tokens': 99, 'completion_tokens': 1}})
    call.wait_for_client_to_go()


def test_figures_of_a_fallback_are_those_of_the_local_engine(fake):
    """Neither the wait for the server nor its counts are part of them."""
    fake.answer = hang_after_the_usage
    joules = iter((100.0, 150.0))
    with remote_worker(fake.url, local=FakeEngine(), first_ms=SHORT_MS,
                       energy_j=lambda: next(joules)) as (worker, sink):
        report, _ = sink.end(worker.submit(Request('say here')))
    assert (report.engine, report.prompt_tokens, report.server_tokens) == ('fake', 8, None)
    assert report.encode_ms < report.prefill_ms - SHORT_MS
    assert report.energy_j == 50.0
    assert report.power_w > 50e3 / (report.total_ms - report.queue_ms - SHORT_MS)


def test_a_refused_fallback_has_no_counts_of_the_server(fake):
    fake.answer = hang_after_the_usage
    report, _ = ask(fake, Request('x' * 100), local=FakeEngine(), first_ms=SHORT_MS)
    assert (report.finish_reason, report.engine) == ('rejected', '')
    assert report.prompt_tokens is report.server_tokens is None


def test_reports_a_refused_connection():
    with socket.create_server(('127.0.0.1', 0)) as found:
        port = found.getsockname()[1]
    with remote_worker(f'http://127.0.0.1:{port}/v1') as (worker, sink):
        report, _ = sink.end(worker.submit(Request('where?')))
    assert report.finish_reason == 'error' and 'Connection refused' in report.message


@pytest.mark.parametrize(('answer', 'words'), [
    (close_in_mid_answer, 'ended the stream too early'),
    (hang_in_mid_answer, 'remote.token_timeout_ms, which is 300'),
    (lambda call, body: (call.begin(), call.say('half'), call.raw(b'data: oops\n\n')),
     'not a JSON object')])
def test_local_engine_does_not_continue_a_broken_answer(fake, answer, words):
    """The beginning is already published, so the text of another model must not follow it."""
    fake.answer = answer
    hangs = answer is hang_in_mid_answer
    with remote_worker(fake.url, local=FakeEngine(),
                 token_ms=SHORT_MS if hangs else 1e3 * PATIENCE_S) as (worker, sink):
        report, text = sink.end(worker.submit(Request('say here')))
        assert (report.finish_reason, text) == ('error', 'half')
        assert words in report.message and 'in mid-answer' in report.message
        assert (report.engine, report.fallback) == ('openai', '')
        assert worker.state == 'failed'
        if not hangs:                   # with the short timeout, the next token may be late too
            fake.answer = well
            report, text = sink.end(worker.submit(Request('where?')))
            assert (report.finish_reason, text) == ('stop', 'far away.')


def test_ends_an_answer_that_exceeds_max_tokens(fake):
    def answer(call, body):
        call.begin()
        while True:
            call.say('x')

    fake.answer = answer
    report, text = ask(fake, Request('go', sampling={'max_new_tokens': 8}))
    assert report.finish_reason == 'error' and 'max_tokens, which is 8' in report.message
    assert text == 16 * 'x'
    assert fake.client_closed.wait(PATIENCE_S)


@pytest.mark.parametrize('answer', [hang, hang_in_mid_answer])
def test_cancels_while_the_server_hangs(fake, answer):
    """The worker closes the connection, so the server can stop too."""
    fake.answer = answer
    with remote_worker(fake.url, local=FakeEngine()) as (worker, sink):
        number = worker.submit(Request('where?'))
        if answer is hang:
            wait_for(lambda: fake.asked)
        else:
            sink.wait_tokens(1)
        worker.cancel(number)
        report, _ = sink.end(number)
        assert report.finish_reason == 'cancelled' and report.fallback == ''
        assert fake.client_closed.wait(PATIENCE_S)


def test_fallback_and_cancel_do_not_wait_for_a_connection():
    """The connection is never established, as if a firewall dropped the packets."""
    with socket.socket() as listener, ExitStack() as clients:
        listener.bind(('127.0.0.1', 0))
        listener.listen(0)
        for _ in range(4):              # fill the queue, so the kernel ignores later connections
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        url = f'http://127.0.0.1:{listener.getsockname()[1]}/v1'
        with remote_worker(url, first_ms=SHORT_MS, local=FakeEngine()) as (worker, sink):
            report, text = sink.end(worker.submit(Request('say here')))
            assert (text, report.engine) == ('here', 'fake')
        with remote_worker(url) as (worker, sink):
            number = worker.submit(Request('where?'))
            wait_for(lambda: worker.state == 'generating')
            worker.cancel(number)
            assert sink.end(number)[0].finish_reason == 'cancelled'


def test_new_request_preempts_one_whose_server_hangs(fake):
    fake.answer = hang
    with remote_worker(fake.url, queue=QueueConfig(policy='preempt')) as (worker, sink):
        first = worker.submit(Request('where?'))
        wait_for(lambda: fake.asked)
        fake.answer = well
        report, text = sink.end(worker.submit(Request('and now?')))
        assert sink.end(first)[0].finish_reason == 'preempted'
    assert text == 'far away.'


def test_worker_stops_while_the_server_hangs(fake):
    fake.answer = hang
    with remote_worker(fake.url) as (worker, sink):
        number = worker.submit(Request('where?'))
        wait_for(lambda: fake.asked)
        assert worker.stop(TIMEOUT_S)
        assert sink.end(number)[0].finish_reason == 'cancelled'


@pytest.mark.parametrize('answer', [hang, hang_in_mid_answer])
def test_deadline_ends_an_answer_that_hangs(fake, answer):
    fake.answer = answer
    report, _ = ask(fake, deadline=DeadlineConfig(request_ms=400.0, action='truncate'))
    assert report.finish_reason == 'deadline' and report.deadline_misses == 1


def test_accepts_a_slow_stream(fake):
    """The server sends each piece only after the previous one was published."""
    published = threading.Semaphore(0)

    def answer(call, body):
        call.begin()
        for piece in 'abc':
            call.say(piece)
            assert published.acquire(timeout=PATIENCE_S)
        call.end()

    fake.answer = answer
    with remote_worker(fake.url) as (worker, sink):
        number = worker.submit(Request('where?'))
        for count in (1, 2, 3):
            sink.wait_tokens(count)
            published.release()
        assert sink.end(number)[1] == 'abc'


def test_paces_an_answer(fake):
    report, text = ask(fake, Request('where?', pace={'tokens_per_s': 200.0}))
    assert report.paced and text == 'far away.'
    report, _ = ask(fake, pace=PaceConfig(0.1), deadline=DeadlineConfig(
        request_ms=400.0, action='truncate'))
    assert report.finish_reason == 'deadline'


def test_replaces_an_unpaired_surrogate():
    """A ROS message cannot contain it."""
    delta = read('server', json.dumps(
        {'choices': [{'delta': {'content': 'a\ud83d\U0001f600'}}]}).encode())
    assert delta.content == 'a\ufffd\U0001f600'


@pytest.mark.parametrize('data', [
    b'data: {"choices": [{"delta": {"content": "a"}}]}\r\n\r\n',
    b': ping\n\ndata: {"choices": [{"delta":\ndata: {"content": "a"}}]}\n\n',
    b'event: message\nid: 1\ndata:{"choices": [{"delta": {"content": "a"}}]}\n\n'])
def test_reads_all_forms_of_server_sent_events(fake, data):
    fake.answer = streaming(data, b'data: {"choices": [{"finish_reason": "stop"}]}\n\n')
    assert ask(fake)[1] == 'a'


@pytest.mark.parametrize(('url', 'words'), [
    ('', 'begins with http'), ('10.0.0.2:8000/v1', 'begins with http'), ('ftp://a/v1', 'begins'),
    ('http://', 'names a host'), ('http://a:b/v1', 'a URL (Port'), ('http://a:99999/v1', 'Port'),
    ('http://me:secret@a/v1', KEY_VARIABLE), ('http://a/v1?x=1', 'without'),
    ('http://a/v1\r\nHost: b', 'printable'), ('http://[::1/v1', 'a URL (')])
def test_rejects_an_invalid_base_url(url, words):
    with pytest.raises(ConfigError, match=r'^remote\.base_url') as raised:
        Server(RemoteConfig(url, MODEL))
    assert words in str(raised.value) and 'secret' not in str(raised.value)


def test_rejects_a_missing_model_and_an_invalid_key():
    with pytest.raises(ConfigError, match=r'remote\.model'):
        Server(RemoteConfig('http://a/v1'))
    with pytest.raises(ConfigError, match=KEY_VARIABLE):
        Server(RemoteConfig('http://a/v1', MODEL), 'a\nb')


def test_probe_checks_the_models_of_the_server(fake):
    remote = RemoteConfig(fake.url, MODEL)
    server = Server(remote)
    assert server.footprint.is_remote and server.footprint.max_context == 0
    assert server.probe() == '' and server.footprint.max_context == 8192
    fake.models = [{'id': 'other'}]
    assert server.probe().endswith(
        "no model 'far/model': it has 'other': set remote.model to one of them, or load it there")
    fake.models = [{'id': f'm{index}'} for index in range(20)]
    assert "it has 'm0', 'm1', 'm2'," in server.probe() and "'m7' and 12 more:" in server.probe()
    fake.models = []
    assert server.probe().endswith("no model 'far/model': it has none: load it there")
    fake.models = 'none'
    assert 'not a list of models' in server.probe()


@pytest.mark.skipif(which('openssl') is None, reason='openssl makes the certificate')
def test_checks_the_certificate(tmp_path, monkeypatch, fake):
    """An unknown certificate is an error, whose message names SSL_CERT_FILE."""
    subprocess.run(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', 'key.pem', '-out',
         'certificate.pem', '-days', '3650', '-subj', '/CN=127.0.0.1', '-addext',
         'subjectAltName=IP:127.0.0.1'], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / 'certificate.pem', tmp_path / 'key.pem')
    fake.use_tls(context)
    with remote_worker(fake.url) as (worker, sink):
        report, _ = sink.end(worker.submit(Request('where?')))
    assert report.finish_reason == 'error' and 'SSL_CERT_FILE' in report.message
    assert not fake.asked
    monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path / 'certificate.pem'))
    assert ask(fake)[1] == 'far away.'
    fake.answer = hang
    with remote_worker(fake.url) as (worker, sink):
        number = worker.submit(Request('where?'))
        wait_for(lambda: len(fake.asked) == 2)
        worker.cancel(number)
        assert sink.end(number)[0].finish_reason == 'cancelled'
    assert fake.client_closed.wait(PATIENCE_S)
