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

"""What one request asks for: its own options, conversation, identity and end."""

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
from physai_decode.config import QueueConfig
from physai_decode.config import SamplingConfig
from physai_decode.request import Message
from physai_decode.request import Request
import pytest
from worker_rig import making
from worker_rig import Sink
from worker_rig import TIMEOUT_S
from worker_rig import wait_for


def texts(engine):
    """Return the prompts that an engine got, as text."""
    return [''.join(map(chr, ids)) for ids in engine.prompts]


@pytest.fixture
def make():
    """Return a function that makes a started worker and its sink; stop all at the end."""
    with making() as make:
        yield make


def test_each_request_has_its_own_sampling(make):
    engine = FakeEngine()
    worker, sink = make(engine, sampling=SamplingConfig(temperature=0.5, max_new_tokens=4))
    for options in ({}, {'temperature': 0.9, 'max_new_tokens': 2}, {'stop': ('c',)}, {}):
        sink.end(worker.submit(Request('abcdef', sampling=options)))
    assert [(each.temperature, each.max_new_tokens) for each in engine.samplings] == [
        (0.5, 4), (0.9, 2), (0.5, 4), (0.5, 4)]
    assert [text for _, text in sink.ends] == ['abcd', 'ab', 'ab', 'abcd']
    assert [report.message for report, _ in sink.ends] == [     # by the name it was set by
        'sampling.max_new_tokens is 4', 'max_tokens is 2', 'a text in stop matched',
        'sampling.max_new_tokens is 4']


def test_each_request_has_its_own_deadline(make):
    now = [0.0]

    def steps(prompt_ids):
        for step in forever():
            now[0] += 0.04
            yield step

    worker, sink = make(FakeEngine(steps), clock=lambda: now[0],
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


def test_sampling_from_the_checkpoint(make):
    """The model's own values take the place of the node's, where asked for; a request's win."""
    engine = FakeEngine()
    node = SamplingConfig(temperature=0.1, top_k=7)
    worker, sink = make(engine, sampling=node, checkpoint={'temperature': 0.6, 'top_p': 0.9})
    asked = Request('go'), Request('go', sampling={'temperature': 0.0})
    for taken in (False, True):
        worker.update(sampling=replace(node, from_checkpoint=taken))
        for each in asked:
            sink.end(worker.submit(each))
    assert [(each.temperature, each.top_p, each.top_k) for each in engine.samplings] == [
        (0.1, 1.0, 7), (0.0, 1.0, 7), (0.6, 0.9, 7), (0.0, 0.9, 7)]


def test_messages_are_the_clients_own_conversation(make):
    engine = FakeEngine()
    worker, sink = make(engine, chat=ChatConfig(keep_history=True, system_prompt='sys'))
    sink.end(worker.submit(Request('one')))
    sink.end(worker.submit(Request(messages=(Message('user', 'x'), Message('user', 'y')))))
    sink.end(worker.submit(Request('two')))
    assert texts(engine) == ['sys\none', 'x\ny', 'sys\none\none\ntwo']


def test_template_gets_the_variables_of_the_request(make):
    class Noting(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            given.append(chat_template_kwargs)
            return super().encode(messages)

    given = []
    worker, sink = make(text=Noting())
    sink.end(worker.submit(Request('go', chat_template_kwargs={'a': 1})))
    assert given == [{'a': 1}]


def test_reports_bear_the_clients_id(make):
    worker, sink = make()
    sink.end(worker.submit(Request('abc', client_id='mine')))
    sink.end(worker.submit(Request('', client_id='mine')))
    sink.end(worker.submit(Request('abc')))
    assert [report.client_id for report, _ in sink.ends] == ['mine', 'mine', '']
    assert [report.client_id for report in sink.tokens] == 3 * ['mine'] + 3 * ['']
    assert {number: asked.client_id for number, asked in sink.asked.items()} == {1: 'mine', 3: ''}


def test_id_is_unique_until_its_request_ends(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    running = worker.submit(Request('a', client_id='x'))
    waiting = worker.submit(Request('a', client_id='y'))
    for taken in 'xy':
        report, _ = sink.end(worker.submit(Request('b', client_id=taken)))
        assert report.finish_reason == 'rejected'
        assert f"id '{taken}' belongs to a request that has not ended" in report.message
    gate.open(9)
    for number in (running, waiting):
        assert sink.end(number)[0].finish_reason == 'stop'
    assert sink.end(worker.submit(Request('a', client_id='x')))[0].finish_reason == 'stop'


def test_cancel_by_the_clients_id(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    numbers = {name: worker.submit(Request('a', client_id=name)) for name in 'abc'}
    assert gate.waiting.wait(TIMEOUT_S)
    assert worker.cancel(client_id='nobody') == 'nothing running'
    assert worker.cancel(client_id='b') == 'removed 1 waiting'
    assert sink.end(numbers['b'])[0].finish_reason == 'cancelled'
    assert worker.cancel(client_id='a') == 'cancelled request 1'
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
    refused = worker.submit(Request(''), listener=mine)
    assert mine.end(refused)[0].finish_reason == 'rejected'
    assert mine.end(number)[1] == 'mine'
    assert {report.request_id for report in mine.tokens} == {number}
    sink.end(number)


def test_correction_follows_the_preempted_turns(make):
    """A running and a queued request, both preempted, stay in the conversation."""
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
    """Even if the next request starts before the end of the preempted one is reported."""
    class Late(Sink):
        def accepted(self, number, request):
            if number == 3:
                gate.open(9)
                wait_for(lambda: len(engine.prompts) == 2)
            super().accepted(number, request)

    gate = Gate()
    engine = FakeEngine(lambda ids: gate.steps(say('ok')))
    worker, sink = make(engine, sink=Late(), chat=ChatConfig(keep_history=True),
                        queue=QueueConfig(policy='preempt'))
    for text in 'abc':
        worker.submit(Request(text))
        assert gate.waiting.wait(TIMEOUT_S)
    assert sink.end(3)[0].finish_reason == 'stop'
    assert texts(engine)[-1] == 'a\n\nb\n\nc'


def test_truncated_answer_stays_in_the_conversation(make):
    """After a deadline, as after a limit of tokens."""
    now = [0.0]

    def steps(prompt_ids):
        for step in say('abcd'):
            now[0] += 0.04
            yield step

    engine = FakeEngine(steps)
    worker, sink = make(engine, clock=lambda: now[0], chat=ChatConfig(keep_history=True))
    sink.end(worker.submit(Request('one', sampling={'max_new_tokens': 1})))
    report, _ = sink.end(worker.submit(Request(
        'two', deadline={'request_ms': 100.0, 'action': 'truncate'})))
    assert report.finish_reason == 'deadline'
    sink.end(worker.submit(Request('go on')))
    assert texts(engine)[-1] == 'one\na\ntwo\nabc\ngo on'


def test_other_listeners_get_their_end_if_one_raises(make):
    class Broken(Sink):
        def finished(self, report, text):
            super().finished(report, text)
            raise ValueError('broken')

    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    numbers = [worker.submit(Request('a'), listener=Broken() if index % 2 else None)
               for index in range(6)]
    with pytest.raises(ValueError, match='broken'):
        worker.cancel()
    gate.open(9)
    for number in numbers:
        assert sink.end(number)[0].finish_reason == 'cancelled'


def test_listener_gets_its_end_if_the_sink_raises(make):
    class Broken(Sink):
        def finished(self, report, text):
            raise ValueError('broken')

    mine = Sink()
    worker, _ = make(sink=Broken())
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
    """A request that only appends to the one before it finds that in the cache."""
    engine = FakeEngine(lambda ids: say('ok'), max_context=200)
    worker, sink = make(engine, chat=ChatConfig(keep_history=True),
                        sampling=SamplingConfig(max_new_tokens=20))
    reports = [sink.end(worker.submit(Request(f'{index:06}')))[0] for index in range(100)]
    lost = [report for report in reports[1:] if report.cached_tokens < 6]
    assert 0 < len(lost) < 15           # and not each one from the twentieth on
    assert all('turns dropped' in report.message for report in lost)


def test_rejected_long_prompt_keeps_the_conversation(make):
    engine = FakeEngine(max_context=64)
    worker, sink = make(engine, chat=ChatConfig(keep_history=True))
    sink.end(worker.submit(Request('one')))
    assert sink.end(worker.submit(Request('p' * 64)))[0].finish_reason == 'rejected'
    sink.end(worker.submit(Request('two')))
    assert texts(engine)[-1] == 'one\none\ntwo'


@pytest.mark.parametrize(('text', 'refused'), [
    ('x' * 1000, False), ('x' * 1001, True), ('ä' * 500, False), ('ä' * 501, True),
    ('\ud800' * 2000, True)])
def test_rejects_a_prompt_beyond_the_bound_unread(make, text, refused):
    class Unread(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            read.append(1)
            return super().encode(messages)

    read = []
    worker, sink = make(FakeEngine(max_context=5000), text=Unread(),
                        queue=QueueConfig(max_request_bytes=1000))
    for request in (Request(text), Request(messages=(Message('user', text),))):
        report, _ = sink.end(worker.submit(request))
        assert ('more than 1000 bytes' in report.message) == refused
    assert bool(read) != refused


def test_cancel_is_heard_while_a_prompt_is_encoded(make):
    class Endless(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            begun.set()
            while True:
                heartbeat()

    begun = threading.Event()
    worker, sink = make(text=Endless())
    number = worker.submit(Request('a'))
    assert begun.wait(TIMEOUT_S)
    worker.cancel(number)
    assert sink.end(number)[0].finish_reason == 'cancelled'


def test_cancel_is_heard_between_two_encodings(make):
    class Slow(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            if len(messages) > 1:
                begun.set()
                assert go.wait(TIMEOUT_S)
                encoded.append(len(messages))
            return super().encode(messages)

    begun, go, encoded = threading.Event(), threading.Event(), []
    worker, sink = make(FakeEngine(lambda ids: say('x' * 30), max_context=200), text=Slow(),
                        chat=ChatConfig(keep_history=True))
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


class Counted(CharacterText):
    """Notes what is counted and what is encoded, and calls ``meanwhile`` while it counts."""

    def __init__(self, meanwhile=lambda: None):
        self.counted, self.encoded, self.meanwhile = [], [], meanwhile

    def count(self, text):
        self.counted.append(len(text))
        self.meanwhile()
        return super().count(text)

    def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
        ids = super().encode(messages)
        self.encoded.append(len(ids))
        return ids


@pytest.mark.parametrize('make_request', [
    Request, lambda text: Request(messages=(Message('user', text[::2]),) * 2)])
def test_never_encodes_a_far_too_long_prompt_as_a_whole(make, make_request):
    text = Counted()
    worker, sink = make(FakeEngine(max_context=40000), text=text)
    report, _ = sink.end(worker.submit(make_request('p' * 900000)))
    assert report.finish_reason == 'rejected'
    assert 'more than 45000 tokens long, and the context holds 40000' in report.message
    assert (text.counted, text.encoded) == ([PIECE, PIECE], [])


def test_answers_a_long_prompt_that_fits(make):
    text = Counted()
    worker, sink = make(FakeEngine(max_context=100000), text=text)
    assert sink.end(worker.submit(Request('p ' * 40000 + 'yes')))[1] == 'yes'
    assert sink.end(worker.submit(Request('p' * 100001)))[0].message.startswith(
        'the prompt is 100001 tokens long')


@pytest.mark.parametrize('reason', ['cancelled', 'deadline'])
def test_ends_between_the_pieces_of_a_prompt(make, reason):
    now = [0.0]

    def meanwhile():
        if reason == 'cancelled':
            worker.cancel()
        now[0] += 1.0

    text = Counted(meanwhile)
    worker, sink = make(FakeEngine(max_context=200000), text=text, clock=lambda: now[0])
    report, _ = sink.end(worker.submit(Request(
        'p' * 150000, deadline={'request_ms': 900.0, 'action': 'truncate'})))
    assert (report.finish_reason, report.output_tokens) == (reason, 0)
    assert (text.counted, text.encoded) == ([PIECE], [])


def test_turns_that_can_not_fit_are_dropped_unread(make):
    """Preempted while they waited, they were never measured."""
    gate, text = Gate(), Counted()
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
        'the conversation no longer fits 59744 tokens: its oldest 31 turns dropped')
    assert len(text.counted) == 4               # two turns, two pieces each
    assert max(text.encoded) < 60000
    sink.end(worker.submit(Request('again')))
    assert len(text.counted) == 4


def test_counts_a_turn_once(make):
    text = Counted()
    worker, sink = make(FakeEngine(max_context=90000), text=text,
                        chat=ChatConfig(keep_history=True))
    for _ in range(3):
        sink.end(worker.submit(Request('q' * 20000 + ' so')))
    assert text.counted == [20006, 20006]       # once they are long together, each turn by itself
    assert text.encoded == [20003, 40010, 60017]


def test_rejected_prompt_removes_no_turn(make):
    """It is too long with its template, but not by itself."""
    class Framed(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            return [1] * 5 + super().encode(messages)

    engine = FakeEngine(lambda ids: say('ok'), max_context=64)
    worker, sink = make(engine, text=Framed(), chat=ChatConfig(keep_history=True))
    sink.end(worker.submit(Request('one')))
    assert sink.end(worker.submit(Request('p' * 60)))[0].finish_reason == 'rejected'
    sink.end(worker.submit(Request('two')))
    assert texts(engine)[-1] == '\1\1\1\1\1one\nok\ntwo'


def test_bounds_all_queued_texts(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok')), max_context=200),
                        queue=QueueConfig(size=100, max_waiting_bytes=100))
    numbers = [worker.submit(Request('a'))]
    assert gate.waiting.wait(TIMEOUT_S)
    numbers.append(worker.submit(Request('b' * 150)))     # none waits
    report, _ = sink.end(worker.submit(Request('c')))
    assert report.message.startswith('the queue is full with 150 bytes, and the request has 1:')
    worker.cancel(numbers[1])
    for text in ('ä' * 40, 'd' * 20, 'e'):
        numbers.append(worker.submit(Request(text)))
    assert 'queue.max_waiting_bytes' in sink.end(numbers.pop())[0].message
    gate.open(99)
    assert [sink.end(number)[0].finish_reason for number in numbers] == [
        'stop', 'cancelled', 'stop', 'stop']


def test_bounds_the_conversation(make, monkeypatch):
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
    assert 'its oldest 998 turns dropped' in report.message


def test_rejection_has_its_kind(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))), start=False,
                        queue=QueueConfig(size=1, max_request_bytes=100))
    assert sink.end(worker.submit(Request('go')))[0].refusal == 'inactive'
    worker.start()
    taken = worker.submit(Request('go'))
    assert gate.waiting.wait(TIMEOUT_S)
    waiting = worker.submit(Request('p' * 64))
    for request, kind in ((Request('go'), 'full'), (Request('x' * 101), 'too_large'),
                          (Request(''), 'invalid')):
        assert sink.end(worker.submit(request))[0].refusal == kind
    gate.open(9)
    assert sink.end(taken)[0].refusal == ''
    assert sink.end(waiting)[0].refusal == 'invalid'        # longer than the context


def test_cancel_has_its_reason(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    number = worker.submit(Request('go'))
    worker.cancel(number, message='nobody listens')
    gate.open(9)
    assert sink.end(number)[0].message == 'nobody listens'


def test_raw_prompt_is_no_turn(make):
    engine = FakeEngine()
    worker, sink = make(engine, chat=ChatConfig(system_prompt='be brief', keep_history=True))
    assert sink.end(worker.submit(Request(raw_prompt='say hello')))[1] == 'hello'
    assert worker.reset() == 'forgot 0 turns'
    assert ''.join(map(chr, engine.prompts[0])) == 'say hello'
