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

"""The worker with fake engines: answers, cancels, errors, deadlines, history and tasks."""

from collections import Counter
from concurrent import futures
import gc
from itertools import count
import random
import threading
import time
import weakref

from fake_engine import CharacterText
from fake_engine import EOS
from fake_engine import FakeEngine
from fake_engine import forever
from fake_engine import Gate
from fake_engine import say
from physai_decode.config import ChatConfig
from physai_decode.config import DeadlineConfig
from physai_decode.config import DiagnosticsConfig
from physai_decode.config import QueueConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.decode_loop import Step
from physai_decode.engine import EngineError
from physai_decode.request import Request
from physai_decode.tokenizer_files import TextError
from physai_decode.worker import Busy
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


def test_answers_a_prompt(make):
    worker, sink = make()
    request_id = worker.submit(Request('say hello'))
    assert request_id == 1
    report, text = sink.end(request_id)
    assert text == 'hello'
    assert (report.finish_reason, report.message) == ('stop', '')
    assert (report.prompt_tokens, report.cached_tokens, report.output_tokens) == (9, 0, 5)
    assert report.ttft_ms == pytest.approx(report.queue_ms + report.prefill_ms)
    assert 0 <= report.encode_ms <= report.prefill_ms
    assert report.sample_ms == pytest.approx(1.0)
    assert report.r_ttft == pytest.approx(report.ttft_floor_ms / report.prefill_ms)
    assert report.total_ms >= report.ttft_ms
    assert report.cancel_ms is None
    assert [token.text for token in sink.tokens] == list('hello')
    assert [token.context_tokens for token in sink.tokens] == [9, 10, 11, 12, 13]
    assert [token.publish_ms is None for token in sink.tokens] == [True] + 4 * [False]
    assert all(token.device_ms == pytest.approx(1.0) for token in sink.tokens)
    assert sink.tokens[1].floor_ms == pytest.approx(1.32)
    assert EOS not in [token.token_id for token in sink.tokens]
    assert sink.threads[1].name == 'decode'
    assert worker.window().count == 4
    assert (worker.requests, worker.refusals, worker.tokens) == (1, 0, 5)
    wait_for(lambda: worker.state == 'idle')


def test_times_by_the_given_clock(make):
    now = [100.0]

    def steps(prompt_ids):
        for wait_s in (0.5, 0.01, 0.02):
            now[0] += wait_s
            yield Step((ord('a'),), device_s=wait_s / 2)

    worker, sink = make(FakeEngine(steps), clock=lambda: now[0],
                        deadline=DeadlineConfig(token_ms=15.0))
    report, text = sink.end(worker.submit(Request('ab'), received_s=99.75))
    assert text == 'aaa'
    assert report.queue_ms == pytest.approx(250.0)
    assert report.prefill_ms == pytest.approx(500.0)
    assert report.ttft_ms == pytest.approx(750.0)
    assert report.total_ms == pytest.approx(780.0)
    assert report.cached_tokens == 0
    assert (report.deadline_misses, report.worst_overrun_ms) == (1, pytest.approx(5.0))
    assert [token.deadline_missed for token in sink.tokens] == [False, False, True]
    assert [token.publish_ms for token in sink.tokens] == [None, 0.0, 0.0]
    assert sink.tokens[2].host_gap_ms == pytest.approx(10.0)
    assert worker.window().itl_max_activation_ms == pytest.approx(20.0)


def test_publish_ms_is_of_the_previous_token(make):
    now = [0.0]

    class SlowSink(Sink):
        def token(self, report):
            now[0] += 0.001 * (1 + report.index)
            super().token(report)

    worker, sink = make(sink=SlowSink(), clock=lambda: now[0])
    sink.end(worker.submit(Request('abc')))
    assert [token.publish_ms for token in sink.tokens] == [
        None, pytest.approx(1.0), pytest.approx(2.0)]


def test_ends_at_max_new_tokens(make):
    engine = FakeEngine(lambda ids: forever())
    worker, sink = make(engine, sampling=SamplingConfig(max_new_tokens=5))
    report, text = sink.end(worker.submit(Request('go')))
    assert (report.finish_reason, text) == ('length', 'xxxxx')
    assert report.message == 'sampling.max_new_tokens is 5'


def test_ends_when_the_context_is_full(make):
    engine = FakeEngine(lambda ids: forever(), max_context=16)
    worker, sink = make(engine)
    report, text = sink.end(worker.submit(Request('p' * 10)))
    assert (report.finish_reason, len(text)) == ('length', 6)
    assert report.message == 'the context of 16 tokens is full'


def test_steps_of_several_tokens(make, monkeypatch):
    class Passes(DecodeLoop):
        def stream(self, prompt_ids, sampling, constraint=None, ahead=True):
            yield Step(())
            yield Step((ord('a'), ord('b')), device_s=0.002)
            yield Step((ord('c'), EOS, ord('d')), device_s=0.002)

    monkeypatch.setattr('physai_decode.worker.DecodeLoop', Passes)
    worker, sink = make()
    report, text = sink.end(worker.submit(Request('go')))
    assert (report.finish_reason, text) == ('stop', 'abc')
    assert [token.device_ms for token in sink.tokens] == [1.0, 1.0, pytest.approx(2 / 3)]
    assert [token.pass_tokens for token in sink.tokens] == [2, 2, 3]
    assert sink.tokens[1].itl_ms == 0.0
    assert sink.tokens[2].itl_ms > 0.0


def test_drops_tokens_of_a_pass_after_a_stop_string(make, monkeypatch):
    """The KV cache keeps the tokens up to the stop string, as it would with single steps."""
    lengths = []

    class Passes(DecodeLoop):
        cached_ids = [0] * 9

        def stream(self, prompt_ids, sampling, constraint=None, ahead=True):
            yield Step((ord('a'),))
            yield Step((ord('b'), ord('.'), ord('c'), ord('d')))

        def forget(self, length=0):
            lengths.append(length)

    monkeypatch.setattr('physai_decode.worker.DecodeLoop', Passes)
    worker, sink = make(sampling=SamplingConfig(stop=('.',)))
    report, text = sink.end(worker.submit(Request('go')))
    assert (report.finish_reason, text) == ('stop', 'ab')
    assert lengths == [7]


def test_stop_string_ends_the_answer(make):
    engine = FakeEngine(lambda ids: say('one. two.'))
    worker, sink = make(engine, sampling=SamplingConfig(stop=('.',)))
    report, text = sink.end(worker.submit(Request('count')))
    assert (report.finish_reason, text) == ('stop', 'one')
    assert report.output_tokens == 4
    assert 'sampling.stop' in report.message


@pytest.mark.parametrize('answer, end, pieces', [
    ('a^b', True, ['a', '', '^b']), ('a^', True, ['a', '^']), ('a^', False, ['a', '^']),
    ('^^^', True, ['', '^', '^^'])])
def test_delivers_text_that_was_held_back(make, answer, end, pieces):
    worker, sink = make(FakeEngine(lambda ids: say(answer, end)))
    _, text = sink.end(worker.submit(Request('go')))
    assert text == answer
    assert [token.text for token in sink.tokens] == pieces
    assert [token.publish_ms is None for token in sink.tokens] == [True] + [False] * (
        len(pieces) - 1)


def test_delivers_held_back_text_before_an_error(make):
    def steps(prompt_ids):
        yield from say('ab^', end=False)
        raise EngineError('the device is lost')

    worker, sink = make(FakeEngine(steps))
    report, text = sink.end(worker.submit(Request('go')))
    assert (report.finish_reason, text) == ('error', 'ab^')


def test_empty_answer(make):
    worker, sink = make(FakeEngine(lambda ids: say('')))
    report, text = sink.end(worker.submit(Request('go')))
    assert (report.finish_reason, text, report.output_tokens) == ('stop', '', 0)
    assert report.ttft_ms is None


def test_only_a_request_that_an_engine_took_names_one(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))))
    first = worker.submit(Request('a'))
    second = worker.submit(Request('b', deadline={'request_ms': 1.0, 'action': 'truncate'}))
    assert gate.waiting.wait(TIMEOUT_S)
    time.sleep(0.002)
    gate.open(9)
    assert sink.end(first)[0].engine == 'fake'
    report, _ = sink.end(second)
    assert (report.finish_reason, report.engine) == ('deadline', '')


def test_rejects_an_empty_prompt_at_once(make):
    worker, sink = make()
    request_id = worker.submit(Request(''))
    assert sink.threads[request_id] is threading.current_thread()
    report, text = sink.end(request_id)
    assert (report.finish_reason, text) == ('rejected', '')
    assert 'empty' in report.message
    assert (worker.requests, worker.refusals) == (1, 1)


def test_rejects_a_prompt_without_tokens(make):
    class EmptyText(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            return []

    worker, sink = make(text=EmptyText())
    report, _ = sink.end(worker.submit(Request('x')))
    assert report.finish_reason == 'rejected'


def test_rejects_a_long_prompt_with_its_length(make):
    engine = FakeEngine(max_context=16)
    worker, sink = make(engine)
    report, _ = sink.end(worker.submit(Request('p' * 16)))
    assert (report.finish_reason, report.engine) == ('rejected', '')
    assert '16 tokens long' in report.message
    assert 'context holds 16 tokens' in report.message
    assert engine.prompts == []
    assert worker.refusals == 1
    assert sink.end(worker.submit(Request('p' * 15)))[0].finish_reason == 'length'


def test_rejects_text_that_cannot_be_encoded(make):
    class FailingText(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            raise TextError('no such character')

    worker, sink = make(text=FailingText())
    report, _ = sink.end(worker.submit(Request('x')))
    assert (report.finish_reason, report.message) == ('rejected', 'no such character')
    assert worker.state == 'idle'


def test_rejects_if_the_queue_is_full(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ok'))), queue=QueueConfig(size=2))
    running = worker.submit(Request('a'))
    assert gate.waiting.wait(TIMEOUT_S)
    waiting = [worker.submit(Request('b')), worker.submit(Request('c'))]
    assert worker.queue_depth == 2
    rejected, _ = sink.end(worker.submit(Request('d')))
    assert rejected.finish_reason == 'rejected'
    assert 'queue is full with 2' in rejected.message
    gate.open(9)
    for request_id in (running, *waiting):
        assert sink.end(request_id)[1] == 'ok'
    assert [report.request_id for report, _ in sink.ends] == [4, 1, 2, 3]


def test_rejects_prompts_while_stopped(make):
    worker, sink = make(start=False)
    report, _ = sink.end(worker.submit(Request('early')))
    assert report.finish_reason == 'rejected'
    assert 'not active' in report.message
    worker.start()
    assert sink.end(worker.submit(Request('go')))[1] == 'go'
    assert worker.stop(TIMEOUT_S)
    assert sink.end(worker.submit(Request('late')))[0].finish_reason == 'rejected'
    worker.start()
    assert sink.end(worker.submit(Request('again')))[1] == 'again'
    assert worker.window().count == 4               # only tokens since the last start


def test_cancel_ends_running_and_queued_requests(make):
    gate = Gate()
    engine = FakeEngine(lambda ids: gate.steps(forever()))
    worker, sink = make(engine)
    assert worker.cancel() == Cancelled()
    running = worker.submit(Request('a'))
    gate.open(3)
    sink.wait_tokens(3)
    waiting = [worker.submit(Request('b')), worker.submit(Request('c'))]
    assert str(worker.cancel()) == 'cancelled request 1, removed 2 waiting'
    for request_id in waiting:
        report, text = sink.end(request_id)
        assert (report.finish_reason, text) == ('cancelled', '')
        assert report.queue_ms is None      # it never left the queue
        assert sink.threads[request_id] is threading.current_thread()
    gate.open(1)                                    # the cancel takes effect within a step
    report, text = sink.end(running)
    assert (report.finish_reason, text) == ('cancelled', 'xxx')
    assert report.cancel_ms >= 0.0
    assert worker.queue_depth == 0


def test_cancel_at_the_last_token(make):
    class Canceller(Sink):
        def token(self, report):
            super().token(report)
            if report.index == 1:
                assert worker.cancel() == Cancelled(1)

    worker, sink = make(sink=Canceller(), sampling=SamplingConfig(max_new_tokens=2))
    report, text = sink.end(worker.submit(Request('abc')))
    assert (report.finish_reason, text) == ('cancelled', 'ab')
    assert report.cancel_ms is not None


def test_cancel_before_the_engine_begins(make):
    class Canceller(CharacterText):
        def encode(self, messages, chat_template_kwargs=None, heartbeat=None):
            worker.cancel()
            return super().encode(messages)

    engine = FakeEngine()
    worker, sink = make(engine, text=Canceller())
    assert sink.end(worker.submit(Request('abc')))[0].finish_reason == 'cancelled'
    assert engine.prompts == []


def test_cancel_between_two_chunks_of_a_prompt(make):
    class GatedPrefill(FakeEngine):
        def feed(self, token_ids):
            next(chunks)
            return super().feed(token_ids)

    gate = Gate()
    chunks = gate.steps(count())
    engine = GatedPrefill(chunk_tokens=(1, 2))
    worker, sink = make(engine)
    request_id = worker.submit(Request('a long prompt'))
    gate.open(2)
    assert gate.waiting.wait(TIMEOUT_S)
    worker.cancel()
    gate.open(2)
    report, _ = sink.end(request_id)
    assert len(engine.fed) < len('a long prompt')
    assert engine.prompts == []
    assert (report.finish_reason, report.output_tokens, report.ttft_ms) == ('cancelled', 0, None)


def test_new_prompt_preempts_running_and_queued_requests(make):
    gate = Gate()
    engine = FakeEngine(lambda ids: gate.steps(forever()))
    worker, sink = make(engine, queue=QueueConfig(size=1, policy='preempt'))
    first = worker.submit(Request('a'))
    gate.open(2)
    sink.wait_tokens(2)
    second = worker.submit(Request('b'))
    third = worker.submit(Request('c'))
    report, _ = sink.end(second)
    assert (report.finish_reason, report.message) == ('preempted', 'request 3 arrived')
    assert sink.end(worker.submit(Request('')))[0].finish_reason == 'rejected'
    gate.open(1)
    report, text = sink.end(first)
    assert (report.finish_reason, text) == ('preempted', 'xx')
    assert report.message == 'request 2 arrived'
    gate.open(1)
    sink.wait_tokens(3)
    worker.cancel()
    gate.open(1)
    assert sink.end(third)[0].finish_reason == 'cancelled'


def test_reports_an_engine_that_raises_and_continues(make):
    def steps(prompt_ids):
        yield from say('so ', end=False)
        if len(prompt_ids) == 3:
            raise EngineError('the device is lost')
        yield from say('good')

    engine = FakeEngine(steps)
    worker, sink = make(engine)
    report, text = sink.end(worker.submit(Request('bad')))
    assert (report.finish_reason, text) == ('error', 'so ')
    assert report.message == 'EngineError: the device is lost'
    assert report.output_tokens == 3
    assert worker.state == 'failed'
    assert 'the device is lost' in worker.last_error
    report, text = sink.end(worker.submit(Request('fine')))
    assert (report.finish_reason, text) == ('stop', 'so good')
    wait_for(lambda: worker.state == 'idle')


def test_engine_that_rejects_a_prompt(make):
    class RejectingEngine(FakeEngine):
        def feed(self, token_ids):
            raise ValueError('token 5 is not in the vocabulary')

    worker, sink = make(RejectingEngine())
    assert sink.end(worker.submit(Request('x')))[0].message == (
        'ValueError: token 5 is not in the vocabulary')


def test_state_is_stalled_until_the_engine_recovers(make):
    now = [0.0]
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('abc'))), clock=lambda: now[0],
                        diagnostics=DiagnosticsConfig(stall_timeout_s=2.0))
    request_id = worker.submit(Request('go'))
    gate.open(1)
    sink.wait_tokens(1)
    assert worker.state == 'generating'
    now[0] = 1.9
    assert worker.state == 'generating'
    now[0] = 2.1
    assert worker.state == 'stalled'
    gate.open(1)
    sink.wait_tokens(2)
    assert worker.state == 'generating'
    gate.open(2)
    assert sink.end(request_id)[1] == 'abc'
    assert sink.tokens[1].itl_ms == pytest.approx(2100.0)


def test_stop_abandons_an_engine_that_hangs(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('abc'))))
    running, waiting = worker.submit(Request('a')), worker.submit(Request('b'))
    gate.open(1)
    sink.wait_tokens(1)
    assert not worker.stop(0.05)
    report, text = sink.end(waiting)
    assert report.finish_reason == 'cancelled'
    assert 'did not return within 0.05 s' in worker.last_error
    with pytest.raises(RuntimeError, match='has not returned'):
        worker.start()
    gate.open(9)
    assert worker.stop(TIMEOUT_S)
    report, text = sink.end(running)                # it has the tokens until the stop
    assert (report.finish_reason, report.output_tokens, text) == ('error', 1, 'a')
    assert report.ttft_ms > 0
    assert len(sink.tokens) == 1                    # no tokens after the stop
    worker.start()
    gate.open(9)
    assert sink.end(worker.submit(Request('c')))[1] == 'abc'


def test_error_of_the_detokenizer_ends_only_its_request(make):
    text = CharacterText()
    detokenizer, text.detokenizer = text.detokenizer, lambda stop: 1 / 0
    worker, sink = make(text=text)
    report, _ = sink.end(worker.submit(Request('a')))
    assert (report.finish_reason, report.message.partition(':')[0]) == (
        'error', 'ZeroDivisionError')
    text.detokenizer = detokenizer
    assert sink.end(worker.submit(Request('say hello')))[0].finish_reason == 'stop'


def test_deadline_with_truncate_ends_the_answer(make):
    now = [0.0]

    worker, sink = make(FakeEngine(lambda ids: slowly(forever(), now)), clock=lambda: now[0],
                        deadline=DeadlineConfig(request_ms=100.0, action='truncate'))
    report, text = sink.end(worker.submit(Request('go')))
    assert (report.finish_reason, text) == ('deadline', 'xxx')
    assert report.total_ms == pytest.approx(120.0)
    assert (report.deadline_misses, report.worst_overrun_ms) == (1, pytest.approx(20.0))
    # A request that misses its deadline in the queue is not started.
    report, text = sink.end(worker.submit(Request('go'), received_s=now[0] - 1.0))
    assert (report.finish_reason, report.output_tokens) == ('deadline', 0)


def test_deadline_ends_a_waiting_request_while_another_runs(make):
    """It does not wait for its turn. A new deadline of the node applies to it, too."""
    now, gate, faulty = [0.0], Gate(), FailingSink()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(forever())), clock=lambda: now[0],
                        sampling=SamplingConfig(max_new_tokens=4))
    running = worker.submit(Request('a'))
    assert gate.waiting.wait(TIMEOUT_S)
    own = worker.submit(Request('b', deadline={'request_ms': 100.0, 'action': 'truncate'}),
                        listener=faulty)
    common = worker.submit(Request('c'))
    now[0] = 0.2
    gate.open()
    report, text = sink.end(own)
    assert (report.finish_reason, text, worker.queue_depth) == ('deadline', '', 1)
    assert report.message == 'deadline.request_ms passed while the request waited'
    assert (report.deadline_misses, report.cancel_ms, len(faulty.ends)) == (1, None, 1)
    worker.update(deadline=DeadlineConfig(request_ms=300.0, action='truncate'))
    now[0] = 0.31
    gate.open()
    assert [sink.end(number)[0].finish_reason for number in (common, running)] == [
        'deadline', 'deadline']
    assert len(sink.tokens) == 2


def test_deadline_with_report_only_counts_the_miss(make):
    now = [0.0]

    worker, sink = make(FakeEngine(lambda ids: slowly(say('abc'), now)), clock=lambda: now[0],
                        deadline=DeadlineConfig(request_ms=100.0))
    report, text = sink.end(worker.submit(Request('go')))
    assert (report.finish_reason, text, report.deadline_misses) == ('stop', 'abc', 1)


def test_new_deadline_applies_at_once_and_new_sampling_to_the_next_request(make):
    gate = Gate()
    engine = FakeEngine(lambda ids: gate.steps(forever()))
    worker, sink = make(engine, sampling=SamplingConfig(max_new_tokens=3))
    first = worker.submit(Request('a'))
    gate.open(1)
    sink.wait_tokens(1)
    worker.update(sampling=SamplingConfig(max_new_tokens=2, temperature=0.5),
                  deadline=DeadlineConfig(token_ms=1e-6))
    gate.open(4)
    report, text = sink.end(first)
    assert (text, report.deadline_misses) == ('xxx', 2)
    assert sink.end(worker.submit(Request('b')))[1] == 'xx'
    assert [sampling.temperature for sampling in engine.samplings] == [0.0, 0.5]


def test_prompt_has_no_earlier_turns_without_history(make):
    engine = FakeEngine()
    worker, sink = make(engine)
    for prompt in ('one', 'two'):
        sink.end(worker.submit(Request(prompt)))
    assert texts(engine) == ['one', 'two']


def test_prompt_has_the_earlier_turns_until_reset(make):
    engine = FakeEngine()
    worker, sink = make(engine, chat=ChatConfig(keep_history=True))
    for prompt in ('one', 'two', 'p' * 64, 'three'):
        sink.end(worker.submit(Request(prompt)))
    assert texts(engine) == ['one', 'one\none\ntwo', 'one\none\ntwo\ntwo\nthree']
    assert worker.reset() == 'forgot 3 turns'
    sink.end(worker.submit(Request('four')))
    assert texts(engine)[-1] == 'four'


def test_history_has_only_answered_prompts(make):
    def steps(prompt_ids):
        if prompt_ids[-1] == ord('!'):
            raise EngineError('no')
        yield from say('ok')

    engine = FakeEngine(steps)
    worker, sink = make(engine, chat=ChatConfig(keep_history=True))
    for prompt in ('a', 'b!', 'c'):
        sink.end(worker.submit(Request(prompt)))
    assert texts(engine)[-1] == 'a\nok\nc'


def test_reset_while_answering_drops_that_turn_too(make):
    gate = Gate()
    engine = FakeEngine(lambda ids: gate.steps(say('ok')))
    worker, sink = make(engine, chat=ChatConfig(keep_history=True))
    request_id = worker.submit(Request('a'))
    assert gate.waiting.wait(TIMEOUT_S)
    assert worker.reset() == 'forgot 0 turns'
    gate.open(9)
    sink.end(request_id)
    sink.end(worker.submit(Request('b')))
    assert texts(engine)[-1] == 'b'


def test_drops_the_oldest_turns(make):
    engine = FakeEngine(lambda ids: say('ok'), max_context=24)
    worker, sink = make(engine, chat=ChatConfig(keep_history=True),
                        sampling=SamplingConfig(max_new_tokens=8))
    reports = [sink.end(worker.submit(Request(prompt)))[0]
               for prompt in ('aaaa', 'bbbb', 'cccc', 'dddd', 'd' * 14)]
    assert texts(engine) == [
        'aaaa', 'aaaa\nok\nbbbb', 'cccc', 'cccc\nok\ndddd', 'd' * 14]
    assert [report.finish_reason for report in reports] == ['stop'] * 5
    assert [report.message.partition(': ')[2] for report in reports] == [
        '', '', 'dropped its oldest 2 turns', '', 'dropped its oldest 2 turns']
    assert '16 tokens' in reports[2].message


def test_error_of_the_sink_ends_only_its_request(make):
    class FailingSink(Sink):
        def token(self, report):
            super().token(report)
            if report.request_id == 1:
                raise OSError('token')

        def finished(self, report, text):
            super().finished(report, text)
            if report.request_id == 2:
                raise OSError('finished')

    worker, sink = make(sink=FailingSink())
    report, text = sink.end(worker.submit(Request('abc')))
    assert (report.finish_reason, report.message, text) == ('error', 'OSError: token', 'a')
    sink.end(worker.submit(Request('abc')))
    wait_for(lambda: worker.state == 'failed')
    assert worker.last_error == 'OSError: finished'
    assert sink.end(worker.submit(Request('abc')))[1] == 'abc'


def test_no_garbage_collection_while_answering(make):
    enabled, collections = [], []

    class AllocatingSink(Sink):
        def token(self, report):
            enabled.append(gc.isenabled())
            [[] for _ in range(5000)]               # would trigger a collection
            super().token(report)

    def watch(phase, info):
        if phase == 'start' and threading.current_thread().name == 'decode':
            collections.append(worker._queue.running is not None)

    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('abc'))), sink=AllocatingSink())
    assert gc.isenabled()
    gc.callbacks.append(watch)
    try:
        worker.submit(Request('go'))
        gate.open(4)
        sink.end(1)
        wait_for(gc.isenabled)
    finally:
        gc.callbacks.remove(watch)
    assert enabled == [False] * 3
    assert collections == [False]                   # one, between the requests
    assert worker.stop(TIMEOUT_S)


def test_garbage_collection_stays_off_if_it_was_off(make):
    gc.disable()
    try:
        worker, sink = make()
        sink.end(worker.submit(Request('go')))
        assert worker.stop(TIMEOUT_S)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_each_of_1200_concurrent_requests_has_one_end(make):
    source = random.Random(1)

    def steps(prompt_ids):
        if prompt_ids[-1] == ord('!'):
            raise EngineError('no')
        yield Step(())
        yield from say('x' * source.randrange(20))

    engine = FakeEngine(steps)
    worker, sink = make(engine, queue=QueueConfig(size=3))
    submitted = []

    def ask(seed):
        choice = random.Random(seed)
        for _ in range(400):
            submitted.append(worker.submit(Request(
                choice.choice(['ask', 'ask', 'no!', '', 'p' * 99]))))
            if choice.random() < 0.1:
                worker.cancel()
            if choice.random() < 0.5:
                time.sleep(0.0005)

    clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(timeout=TIMEOUT_S)
    assert worker.stop(TIMEOUT_S)
    assert sorted(submitted) == list(range(1, 1201))
    for request_id in submitted:
        sink.end(request_id)
    assert len(sink.ends) == 1200
    reasons = Counter(report.finish_reason for report, _ in sink.ends)
    assert worker.requests == 1200
    assert worker.refusals == reasons['rejected'] > 0
    assert reasons['stop'] > 0 and reasons['error'] > 0 and reasons['cancelled'] > 0
    assert worker.tokens == len(sink.tokens)
    assert not engine.closed
    assert worker.queue_depth == 0


def test_task_runs_in_the_thread_of_the_worker(make):
    engine = FakeEngine()
    worker, sink = make(engine)
    sink.end(worker.submit(Request('say hello')))
    before = worker.window()

    def work(loop, heartbeat):
        assert loop.engine is engine
        assert worker.state == 'generating'
        assert not gc.isenabled()
        for _ in loop.stream([1, 2], SamplingConfig()):
            heartbeat()
        return threading.current_thread().name

    assert worker.run(work, TIMEOUT_S) == 'decode'
    assert worker.state == 'idle'
    assert (worker.requests, worker.refusals, worker.tokens) == (1, 0, 5)
    assert worker.last_error == ''
    assert worker.window() == before
    assert len(sink.ends) == 1


def test_rejects_a_task_during_a_request(make):
    gate = Gate()
    worker, sink = make(FakeEngine(lambda ids: gate.steps(say('ab'))),
                        diagnostics=DiagnosticsConfig(stall_timeout_s=0.05))
    request_id = worker.submit(Request('go'))
    assert gate.waiting.wait(TIMEOUT_S)
    wait_for(lambda: worker.state == 'stalled')
    with pytest.raises(Busy, match='request 1 is stalled'):
        worker.run(lambda engine, heartbeat: None, TIMEOUT_S)
    gate.open(3)
    assert sink.end(request_id)[1] == 'ab'
    assert worker.run(lambda engine, heartbeat: 7, TIMEOUT_S) == 7


@pytest.mark.parametrize('start', [False, True])
def test_task_needs_a_running_worker(make, start):
    worker, _ = make(start=start)
    assert worker.stop(TIMEOUT_S)
    with pytest.raises(Busy, match='not active'):
        worker.run(lambda engine, heartbeat: None, TIMEOUT_S)


class Task:
    """A task that runs until the test sets `go`; a thread waits for its result."""

    def __init__(self, worker, timeout_s=TIMEOUT_S, begun=None):
        self.begun, self.go = begun or threading.Event(), threading.Event()
        self.outcome = None
        self._worker, self._timeout_s = worker, timeout_s
        self._thread = threading.Thread(target=self._call)
        self._thread.start()
        assert self.begun.wait(TIMEOUT_S)

    def _call(self):
        try:
            self.outcome = self._worker.run(self._work, self._timeout_s)
        except Exception as error:
            self.outcome = error

    def _work(self, engine, heartbeat):
        heartbeat()
        self.begun.set()
        assert self.go.wait(TIMEOUT_S)
        heartbeat()
        return 'done'

    def end(self):
        """Wait for the end of the task; returns its result or its exception."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.outcome


@pytest.mark.parametrize('policy', ['reject', 'preempt'])
def test_answers_prompts_after_a_task(make, policy):
    engine = FakeEngine()
    worker, sink = make(engine, queue=QueueConfig(policy=policy))
    task = Task(worker)
    first, second = worker.submit(Request('one')), worker.submit(Request('two'))
    assert worker.queue_depth == (2 if policy == 'reject' else 1)
    assert worker.state == 'generating'
    assert engine.prompts == []
    with pytest.raises(Busy, match='about to run'):
        worker.run(lambda engine, heartbeat: None, TIMEOUT_S)
    task.go.set()
    assert task.end() == 'done'
    assert sink.end(second)[1] == 'two'
    assert sink.end(first)[0].finish_reason == ('stop' if policy == 'reject' else 'preempted')


def test_cancel_does_not_end_a_task(make):
    worker, sink = make()
    task = Task(worker)
    waiting = worker.submit(Request('one'))
    assert worker.cancel() == Cancelled(waiting=1)
    assert sink.end(waiting)[0].finish_reason == 'cancelled'
    task.go.set()
    assert task.end() == 'done'


@pytest.mark.parametrize('error', [EngineError('no'), KeyboardInterrupt(), StopIteration(3)])
def test_caller_gets_the_error_of_a_task(make, error):
    def work(engine, heartbeat):
        raise error

    worker, sink = make()
    with pytest.raises(type(error)) as caught:
        worker.run(work, TIMEOUT_S)
    assert caught.value is error
    assert (worker.state, worker.last_error) == ('idle', '')
    assert sink.end(worker.submit(Request('go')))[1] == 'go'


def test_frees_the_objects_of_a_failed_task(make):
    class Memory:
        """An object that holds device memory."""

    def work(engine, heartbeat):
        memory = Memory()
        references.append(weakref.ref(memory))
        heartbeat()
        raise EngineError('no')

    references = []
    worker, _ = make()
    gc.disable()
    try:
        with pytest.raises(EngineError):
            worker.run(work, TIMEOUT_S)
        wait_for(lambda: references[0]() is None)
    finally:
        gc.enable()


def test_stop_ends_a_task_at_its_next_step(make):
    worker, sink = make()
    task = Task(worker)
    waiting = worker.submit(Request('one'))
    stopped = []
    stopper = threading.Thread(target=lambda: stopped.append(worker.stop(TIMEOUT_S)))
    stopper.start()
    assert sink.end(waiting)[0].finish_reason == 'cancelled'
    task.go.set()
    stopper.join(TIMEOUT_S)
    assert stopped == [True]
    assert isinstance(task.end(), Busy)
    assert 'stops answering' in str(task.outcome)
    worker.start()
    assert sink.end(worker.submit(Request('go')))[1] == 'go'


def test_stop_abandons_a_task_that_hangs(make):
    worker, _ = make(diagnostics=DiagnosticsConfig(stall_timeout_s=0.05))
    task = Task(worker)
    wait_for(lambda: worker.state == 'stalled')
    assert not worker.stop(0.05)
    with pytest.raises(RuntimeError, match='has not returned'):
        worker.start()
    task.go.set()
    assert isinstance(task.end(), Busy)
    assert worker.stop(TIMEOUT_S)


def test_abandons_a_task_that_takes_too_long(make, monkeypatch):
    worker, sink = make()
    begun, wait = threading.Event(), futures.wait
    # The time limit counts from the start of the task.
    monkeypatch.setattr(futures, 'wait', lambda outcomes, timeout_s: (
        begun.wait(TIMEOUT_S), wait(outcomes, timeout_s))[1])
    task = Task(worker, 0.05, begun)
    assert isinstance(task.end(), EngineError)
    assert 'did not return within 0.05 s' in str(task.outcome)
    assert worker.state == 'generating'
    request_id = worker.submit(Request('go'))
    task.go.set()
    assert sink.end(request_id)[1] == 'go'


def test_second_start_is_an_error(make):
    worker, _ = make()
    with pytest.raises(RuntimeError):
        worker.start()


def test_energy_of_each_answer(make):
    """It is measured from the start to the end of a request; a rejected one has none."""
    readings_j = iter((100.0, 112.0, 200.0, 203.0))
    now = [0.0]

    class SlowSink(Sink):
        def token(self, report):
            now[0] += 1.0
            super().token(report)

    worker, sink = make(sink=SlowSink(), clock=lambda: now[0], energy_j=lambda: next(readings_j))
    assert worker.energy_j is worker.j_per_token is None
    report, _ = sink.end(worker.submit(Request('abc')))
    assert (report.energy_j, report.j_per_token, report.power_w) == (12.0, 4.0, 4.0)
    report, _ = sink.end(worker.submit(Request('d')))
    assert (report.energy_j, report.j_per_token, report.power_w) == (3.0, 3.0, 3.0)
    assert (worker.energy_j, worker.j_per_token) == (15.0, 3.75)
    assert sink.end(worker.submit(Request('')))[0].energy_j is None


@pytest.mark.parametrize(('readings_j', 'expected_j'), [
    ((100.0, 90.0), None), ((100.0, None), None), ((100.0, 100.0), 0.0)])
def test_an_answer_without_a_plausible_energy_has_none(make, readings_j, expected_j):
    """The counter was reset, ended, or did not advance during the short answer."""
    worker, sink = make(energy_j=iter(readings_j).__next__)
    report, _ = sink.end(worker.submit(Request('abc')))
    assert report.energy_j is report.j_per_token is report.power_w is None
    assert worker.energy_j == expected_j and worker.j_per_token is None
