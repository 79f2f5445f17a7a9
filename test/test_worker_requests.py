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

"""Requests at the worker: options, conversation, client ids, cancels and limits."""

from dataclasses import replace
import threading

from fake_engine import CharacterText
from fake_engine import FakeEngine
from fake_engine import forever
from fake_engine import Gate
from fake_engine import say
from physai_decode.answer import PIECE
from physai_decode.config import ChatConfig
from physai_decode.config import DeadlineConfig
from physai_decode.config import DiagnosticsConfig
from physai_decode.config import QueueConfig
from physai_decode.config import SamplingConfig
from physai_decode.request import Message
from physai_decode.request import Request
from physai_decode.worker import Cancelled
import pytest
from worker_rig import FailingSink
from worker_rig import maker
from worker_rig import Sink
from worker_rig import slowly
from worker_rig import texts
from worker_rig import TIMEOUT_S
from worker_rig import wait_for

make = pytest.fixture(maker)


def test_each_request_has_its_own_sampling(make):
    engine = FakeEngine()
    worker, sink = make(engine, sampling=SamplingConfig(temperature=0.5, max_new_tokens=4))
    for options in ({}, {'temperature': 0.9, 'max_new_tokens': 2}, {'stop': ('c',)}, {}):
        sink.end(worker.submit(Request('abcdef', sampling=options)))
    assert [(each.temperature, each.max_new_tokens) for each in engine.samplings] == [
        (0.5, 4), (0.9, 2), (0.5, 4), (0.5, 4)]
    assert [text for _, text in sink.ends] == ['abcd', 'ab', 'ab', 'abcd']
    assert [report.message for report, _ in sink.ends] == [     # named as the client set it
        'sampling.max_new_tokens is 4', 'max_tokens is 2', 'a string in stop matched',
        'sampling.max_new_tokens is 4']


def test_each_request_has_its_own_deadline(make):
    now = [0.0]

    worker, sink = make(FakeEngine(lambda ids: slowly(forever(), now)), clock=lambda: now[0],
                        deadline=DeadlineConfig(request_ms=100.0, action='truncate'))
    for options, count in (({}, 3), ({'request_ms': 200.0}, 6), ({'action': 'report'}, 9)):
        report, text = sink.end(worker.submit(Request(
            'go', deadline=options, sampling={'max_new_tokens': 9})))
        assert len(text) == count
        assert report.deadline_misses == 1


def test_draws_a_fresh_seed_for_each_request(make):
    engine = FakeEngine()
    worker, sink = make(engine, sampling=SamplingConfig(seed=-1))
    reports = [sink.end(worker.submit(Request('go')))[0] for _ in range(8)]
    fixed, _ = sink.end(worker.submit(Request('go', sampling={'seed': 5})))
    used = [each.seed for each in engine.samplings]
    assert [report.seed for report in [*reports, fixed]] == used
    assert used[-1] == 5
    assert len(set(used)) == 9
    assert all(0 <= seed < 2**31 for seed in used)


def test_sampling_from_the_checkpoint_overrides_that_of_the_node(make):
    """It does so only with from_checkpoint; the options of a request override both."""
    engine = FakeEngine()
    node = SamplingConfig(temperature=0.1, top_k=7)
    worker, sink = make(engine, sampling=node, checkpoint={'temperature': 0.6, 'top_p': 0.9})
    requests = Request('go'), Request('go', sampling={'temperature': 0.0})
    for from_checkpoint in (False, True):
        worker.update(sampling=replace(node, from_checkpoint=from_checkpoint))
        for request in requests:
            sink.end(worker.submit(request))
    assert [(each.temperature, each.top_p, each.top_k) for each in engine.samplings] == [
        (0.1, 1.0, 7), (0.0, 1.0, 7), (0.6, 0.9, 7), (0.0, 0.9, 7)]


def test_request_with_messages_does_not_use_the_conversation(make):
    engine = FakeEngine()
    worker, sink = make(engine, chat=ChatConfig(keep_history=True, system_prompt='sys'))
    sink.end(worker.submit(Request('one')))
    sink.end(worker.submit(Request(messages=(Message('user', 'x'), Message('user', 'y')))))
    sink.end(worker.submit(Request('two')))
    assert texts(engine) == ['sys\none', 'x\ny', 'sys\none\none\ntwo']


def test_template_gets_the_variables_of_the_request(make):
    class RecordingText(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            variables.append(chat_template_kwargs)
            return super().encode(messages)

    variables = []
    worker, sink = make(text=RecordingText())
    sink.end(worker.submit(Request('go', chat_template_kwargs={'a': 1})))
    assert variables == [{'a': 1}]


def test_reports_have_the_client_id(make):
    worker, sink = make()
    sink.end(worker.submit(Request('abc', client_id='mine')))
    sink.end(worker.submit(Request('', client_id='mine')))
    sink.end(worker.submit(Request('abc')))
    assert [report.client_id for report, _ in sink.ends] == ['mine', 'mine', '']
    assert [report.client_id for report in sink.tokens] == 3 * ['mine'] + 3 * ['']
    assert {number: request.client_id for number, request in sink.requests.items()} == {
        1: 'mine', 3: ''}


def test_id_is_unique_until_its_request_ends(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    running = worker.submit(Request('a', client_id='x'))
    waiting = worker.submit(Request('a', client_id='y'))
    for client_id in 'xy':
        report, _ = sink.end(worker.submit(Request('b', client_id=client_id)))
        assert (report.finish_reason, report.refusal) == ('rejected', 'duplicate')
        assert f'id "{client_id}" belongs to a request that is still running' in report.message
    gate.open(9)
    for number in (running, waiting):
        assert sink.end(number)[0].finish_reason == 'stop'
    assert sink.end(worker.submit(Request('a', client_id='x')))[0].finish_reason == 'stop'


def test_cancel_by_client_id(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    numbers = {name: worker.submit(Request('a', client_id=name)) for name in 'abc'}
    assert gate.waiting.wait(TIMEOUT_S)
    assert worker.cancel(client_id='nobody') == Cancelled()
    assert worker.cancel(client_id='b') == Cancelled(waiting=1)
    assert sink.end(numbers['b'])[0].finish_reason == 'cancelled'
    assert worker.cancel(client_id='a') == Cancelled(1)
    gate.open(9)
    assert sink.end(numbers['a'])[0].finish_reason == 'cancelled'
    assert sink.end(numbers['c'])[0].finish_reason == 'stop'


def test_cancel_by_number(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    first, second = worker.submit(Request('a')), worker.submit(Request('b'))
    worker.cancel(second)
    gate.open(9)
    assert sink.end(first)[0].finish_reason == 'stop'
    assert sink.end(second)[0].finish_reason == 'cancelled'


def test_listener_receives_only_its_request(make):
    worker, sink = make()
    mine = Sink()
    worker.submit(Request('other'))
    number = worker.submit(Request('mine'), listener=mine)
    rejected = worker.submit(Request(''), listener=mine)
    assert mine.end(rejected)[0].finish_reason == 'rejected'
    assert mine.end(number)[1] == 'mine'
    assert {report.request_id for report in mine.tokens} == {number}
    sink.end(number)


def test_preempted_turns_stay_in_the_conversation(make):
    """One was running and one was queued; the correction follows both."""
    gate = Gate()
    engine = FakeEngine(lambda ids: gate.steps(say('ok')), max_context=400)
    worker, sink = make(engine, chat=ChatConfig(keep_history=True),
                        queue=QueueConfig(policy='preempt'))
    first = worker.submit(Request('Bring me the red cup'))
    gate.open(1)
    sink.wait_tokens(1)
    second = worker.submit(Request('No, the blue one'))
    third = worker.submit(Request('No, the green one'))
    gate.open(9)
    assert [sink.end(number)[0].finish_reason for number in (first, second, third)] == [
        'preempted', 'preempted', 'stop']
    assert texts(engine)[-1] == (
        'Bring me the red cup\no\nNo, the blue one\n\nNo, the green one')


def test_preempted_queued_turn_is_in_the_next_prompt(make):
    """It is there even if that prompt starts before the end of the turn is reported."""
    class LateSink(Sink):
        def accepted(self, number, request):
            if number == 3:
                gate.open(9)
                wait_for(lambda: len(engine.prompts) == 2)
            super().accepted(number, request)

    gate = Gate()
    engine = FakeEngine(lambda ids: gate.steps(say('ok')))
    worker, sink = make(engine, sink=LateSink(), chat=ChatConfig(keep_history=True),
                        queue=QueueConfig(policy='preempt'))
    for text in 'abc':
        worker.submit(Request(text))
        assert gate.waiting.wait(TIMEOUT_S)
    assert sink.end(3)[0].finish_reason == 'stop'
    assert texts(engine)[-1] == 'a\n\nb\n\nc'


def test_truncated_answer_stays_in_the_conversation(make):
    """It stays after a limit of tokens and after a deadline."""
    now = [0.0]

    engine = FakeEngine(lambda ids: slowly(say('abcd'), now))
    worker, sink = make(engine, clock=lambda: now[0], chat=ChatConfig(keep_history=True))
    sink.end(worker.submit(Request('one', sampling={'max_new_tokens': 1})))
    report, _ = sink.end(worker.submit(Request(
        'two', deadline={'request_ms': 100.0, 'action': 'truncate'})))
    assert report.finish_reason == 'deadline'
    sink.end(worker.submit(Request('go on')))
    assert texts(engine)[-1] == 'one\na\ntwo\nabc\ngo on'


def test_all_requests_end_if_a_listener_raises(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    numbers = [worker.submit(Request('a'), listener=FailingSink() if index % 2 else None)
               for index in range(6)]
    with pytest.raises(ValueError, match='broken'):
        worker.cancel()
    gate.open(9)
    for number in numbers:
        assert sink.end(number)[0].finish_reason == 'cancelled'


def test_listener_receives_the_end_if_the_sink_raises(make):
    mine = Sink()
    worker, _ = make(sink=FailingSink())
    assert mine.end(worker.submit(Request('a'), listener=mine))[1] == 'a'
    with pytest.raises(ValueError, match='broken'):
        worker.submit(Request(''), listener=mine)
    assert mine.end(2)[0].finish_reason == 'rejected'


def test_cancelled_turn_leaves_the_conversation(make):
    gate = Gate()
    engine = FakeEngine(lambda ids: gate.steps(say('ok')))
    worker, sink = make(engine, chat=ChatConfig(keep_history=True))
    first, second = worker.submit(Request('a')), worker.submit(Request('b'))
    worker.cancel()
    gate.open(9)
    sink.end(first), sink.end(second)
    sink.end(worker.submit(Request('c')))
    assert texts(engine)[-1] == 'c'


def test_full_conversation_keeps_most_of_its_cache(make):
    """Most prompts only append to the previous one, whose tokens are in the cache."""
    engine = FakeEngine(lambda ids: say('ok'), max_context=200)
    worker, sink = make(engine, chat=ChatConfig(keep_history=True),
                        sampling=SamplingConfig(max_new_tokens=20))
    reports = [sink.end(worker.submit(Request(f'{index:06}')))[0] for index in range(100)]
    uncached = [report for report in reports[1:] if report.cached_tokens < 6]
    assert 0 < len(uncached) < 15       # not each prompt once the context is full
    assert all('dropped its oldest' in report.message for report in uncached)


def test_rejected_long_prompt_keeps_the_conversation(make):
    engine = FakeEngine(max_context=64)
    worker, sink = make(engine, chat=ChatConfig(keep_history=True))
    sink.end(worker.submit(Request('one')))
    assert sink.end(worker.submit(Request('p' * 64)))[0].finish_reason == 'rejected'
    sink.end(worker.submit(Request('two')))
    assert texts(engine)[-1] == 'one\none\ntwo'


@pytest.mark.parametrize(('text', 'rejected'), [
    ('x' * 1000, False), ('x' * 1001, True), ('ä' * 500, False), ('ä' * 501, True),
    ('\ud800' * 2000, True)])
def test_rejects_a_prompt_with_too_many_bytes_before_encoding(make, text, rejected):
    class RecordingText(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            encoded.append(messages)
            return super().encode(messages)

    encoded = []
    worker, sink = make(FakeEngine(max_context=5000), text=RecordingText(),
                        queue=QueueConfig(max_request_bytes=1000))
    for request in (Request(text), Request(messages=(Message('user', text),))):
        report, _ = sink.end(worker.submit(request))
        assert ('more than 1000 bytes' in report.message) == rejected
    assert bool(encoded) != rejected


def test_cancel_interrupts_the_encoding_of_a_prompt(make):
    """The state is stalled meanwhile, as if the process of the tokenizer was stopped."""
    class EndlessText(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            while True:
                heartbeat()

    worker, sink = make(text=EndlessText(), diagnostics=DiagnosticsConfig(stall_timeout_s=0.2))
    number = worker.submit(Request('a'))
    wait_for(lambda: worker.state == 'stalled')
    worker.cancel(number)
    assert sink.end(number)[0].finish_reason == 'cancelled'


def test_cancel_takes_effect_between_two_encodings(make):
    class WaitingText(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            if len(messages) > 1:
                begun.set()
                assert go.wait(TIMEOUT_S)
                encoded.append(len(messages))
            return super().encode(messages)

    begun, go, encoded = threading.Event(), threading.Event(), []
    worker, sink = make(FakeEngine(lambda ids: say('x' * 30), max_context=200),
                        text=WaitingText(), chat=ChatConfig(keep_history=True))
    go.set()
    for index in range(5):
        sink.end(worker.submit(Request(f'{index}')))
    encoded.clear(), begun.clear(), go.clear()
    number = worker.submit(Request('p' * 100))
    assert begun.wait(TIMEOUT_S)
    worker.cancel(number)
    go.set()
    assert sink.end(number)[0].finish_reason == 'cancelled'
    assert len(encoded) == 1


class CountedText(CharacterText):
    """Records the lengths of counted and encoded texts; calls ``on_count`` at each count."""

    def __init__(self, on_count=lambda: None):
        self.counted, self.encoded, self.on_count = [], [], on_count

    def count(self, text):
        self.counted.append(len(text))
        self.on_count()
        return super().count(text)

    def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
        ids = super().encode(messages)
        self.encoded.append(len(ids))
        return ids


@pytest.mark.parametrize('make_request', [
    Request, lambda text: Request(messages=(Message('user', text[::2]),) * 2)])
def test_rejects_a_far_too_long_prompt_after_counting_two_pieces(make, make_request):
    text = CountedText()
    worker, sink = make(FakeEngine(max_context=40000), text=text)
    report, _ = sink.end(worker.submit(make_request('p' * 900000)))
    assert report.finish_reason == 'rejected'
    assert 'more than 45000 tokens long, and the context holds 40000' in report.message
    assert (text.counted, text.encoded) == ([PIECE, PIECE], [])


def test_answers_a_long_prompt_that_fits(make):
    text = CountedText()
    worker, sink = make(FakeEngine(max_context=100000), text=text)
    assert sink.end(worker.submit(Request('p ' * 40000 + 'yes')))[1] == 'yes'
    assert sink.end(worker.submit(Request('p' * 100001)))[0].message.startswith(
        'the prompt is 100001 tokens long')


@pytest.mark.parametrize('reason', ['cancelled', 'deadline'])
def test_request_can_end_between_the_pieces_of_a_prompt(make, reason):
    now = [0.0]

    def on_count():
        if reason == 'cancelled':
            worker.cancel()
        now[0] += 1.0

    text = CountedText(on_count)
    worker, sink = make(FakeEngine(max_context=200000), text=text, clock=lambda: now[0])
    report, _ = sink.end(worker.submit(Request(
        'p' * 150000, deadline={'request_ms': 900.0, 'action': 'truncate'})))
    assert (report.finish_reason, report.output_tokens) == (reason, 0)
    assert (text.counted, text.encoded) == ([PIECE], [])


def test_drops_preempted_turns_that_can_not_fit_without_counting_them(make):
    gate, text = Gate(), CountedText()
    engine = FakeEngine(lambda ids: gate.steps(say('ok')), max_context=60000)
    worker, sink = make(engine, text=text, chat=ChatConfig(keep_history=True),
                        queue=QueueConfig(policy='preempt'))
    worker.submit(Request('first'))
    assert gate.waiting.wait(TIMEOUT_S)
    for _ in range(30):
        worker.submit(Request('q' * 40000))
    number = worker.submit(Request('last'))
    gate.open(9)
    report, _ = sink.end(number)
    assert report.finish_reason == 'stop'
    assert report.message == (
        'the conversation no longer fits into 59744 tokens: dropped its oldest 31 turns')
    assert len(text.counted) == 4               # two turns, two pieces each
    assert max(text.encoded) < 60000
    sink.end(worker.submit(Request('again')))
    assert len(text.counted) == 4


def test_counts_a_turn_once(make):
    text = CountedText()
    worker, sink = make(FakeEngine(max_context=90000), text=text,
                        chat=ChatConfig(keep_history=True))
    for _ in range(3):
        sink.end(worker.submit(Request('q' * 20000 + ' so')))
    assert text.counted == [20006, 20006]       # each turn once, when the conversation is long
    assert text.encoded == [20003, 40010, 60017]


def test_rejected_prompt_removes_no_turn(make):
    """It is too long with its template, but not by itself."""
    class TemplateText(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            return [1] * 5 + super().encode(messages)

    engine = FakeEngine(lambda ids: say('ok'), max_context=64)
    worker, sink = make(engine, text=TemplateText(), chat=ChatConfig(keep_history=True))
    sink.end(worker.submit(Request('one')))
    assert sink.end(worker.submit(Request('p' * 60)))[0].finish_reason == 'rejected'
    sink.end(worker.submit(Request('two')))
    assert texts(engine)[-1] == '\1\1\1\1\1one\nok\ntwo'


def test_limits_the_bytes_of_all_queued_requests(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok')), max_context=200),
                        queue=QueueConfig(size=100, max_waiting_bytes=100))
    numbers = [worker.submit(Request('a'))]
    assert gate.waiting.wait(TIMEOUT_S)
    numbers.append(worker.submit(Request('b' * 150)))     # accepted, as the queue is empty
    report, _ = sink.end(worker.submit(Request('c')))
    assert report.message.startswith('the queue is full with 150 bytes, and the request adds 1:')
    worker.cancel(numbers[1])
    for text in ('ä' * 40, 'd' * 20, 'e'):
        numbers.append(worker.submit(Request(text)))
    assert 'queue.max_waiting_bytes' in sink.end(numbers.pop())[0].message
    gate.open(99)
    assert [sink.end(number)[0].finish_reason for number in numbers] == [
        'stop', 'cancelled', 'stop', 'stop']


def test_limits_the_characters_of_the_conversation(make, monkeypatch):
    monkeypatch.setattr('physai_decode.conversation.MAX_CHARACTERS', 3500)
    gate = Gate()
    engine = FakeEngine(lambda ids: gate.steps(say('ok')), max_context=4000)
    worker, sink = make(engine, chat=ChatConfig(keep_history=True),
                        queue=QueueConfig(policy='preempt'))
    worker.submit(Request('a'))
    assert gate.waiting.wait(TIMEOUT_S)
    for index in range(1000):
        worker.submit(Request(f'{index}'))
    number = worker.submit(Request('last'))
    gate.open(9)
    report, _ = sink.end(number)
    assert texts(engine)[-1] == '997\n\n998\n\n999\n\nlast'
    assert 'dropped its oldest 998 turns' in report.message


def test_rejection_has_its_kind(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))), start=False,
                        queue=QueueConfig(size=1, max_request_bytes=100))
    assert sink.end(worker.submit(Request('go')))[0].refusal == 'inactive'
    worker.start()
    running = worker.submit(Request('go'))
    assert gate.waiting.wait(TIMEOUT_S)
    waiting = worker.submit(Request('p' * 64))
    for request, kind in ((Request('go'), 'full'), (Request('x' * 101), 'too_large'),
                          (Request(''), 'invalid')):
        assert sink.end(worker.submit(request))[0].refusal == kind
    gate.open(9)
    assert sink.end(running)[0].refusal == ''
    assert sink.end(waiting)[0].refusal == 'invalid'        # longer than the context


def test_report_has_the_message_of_the_cancel(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    number = worker.submit(Request('go'))
    worker.cancel(number, message='nobody listens')
    gate.open(9)
    assert sink.end(number)[0].message == 'nobody listens'


def test_raw_prompt_does_not_join_the_conversation(make):
    engine = FakeEngine()
    worker, sink = make(engine, chat=ChatConfig(system_prompt='be brief', keep_history=True))
    assert sink.end(worker.submit(Request(raw_prompt='say hello')))[1] == 'hello'
    assert worker.reset() == 'forgot 0 turns'
    assert texts(engine) == ['say hello']
