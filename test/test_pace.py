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

"""Paced answers: their schedule, the times of their tokens, and cancels while they wait."""

from fake_engine import FakeEngine
from fake_engine import footprint
from fake_engine import forever
from physai_decode.config import DeadlineConfig
from physai_decode.config import DiagnosticsConfig
from physai_decode.config import PaceConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.pace import Pace
from physai_decode.request import parse
from physai_decode.request import Request
from physai_decode.request import RequestError
from physai_decode.roofline import Peak
from physai_decode.roofline import Roofline
from physai_decode.timing import Recorder
import pytest
from worker_rig import maker
from worker_rig import wait_for

make = pytest.fixture(maker)


@pytest.mark.parametrize('slow', [5e-324, 0.05])
def test_rejects_a_pace_that_would_never_end(slow):
    with pytest.raises(RequestError, match='0.1'):
        parse(f'{{"prompt": "x", "pace": {{"tokens_per_s": {slow}}}}}')


def test_schedule_does_not_drift():
    """However late each step begins."""
    pace = Pace(10.0, start_s=100.0)
    due = [pace.due_s(100.0 + 0.1 * turn + late_s)
           for turn, late_s in enumerate((0.01, 0.05, 0.02, 0.09, 0.0))]
    assert due == pytest.approx([100.1, 100.2, 100.3, 100.4, 100.5])


def test_does_not_wait_after_a_slow_step():
    """The steps after it catch up by one period at most."""
    pace = Pace(10.0, start_s=0.0)
    assert pace.due_s(0.15) == pytest.approx(0.1)       # over: at once
    assert pace.due_s(0.16) == pytest.approx(0.2)       # on the same schedule
    assert pace.due_s(5.0) == pytest.approx(4.9)        # the rest is given up
    assert pace.due_s(5.01) == pytest.approx(5.0)
    assert pace.due_s(5.02) == pytest.approx(5.1)


def test_step_of_several_tokens_takes_as_many_periods():
    pace = Pace(10.0, start_s=0.0)
    assert pace.due_s(0.0, tokens=3) == pytest.approx(0.3)
    assert pace.due_s(0.3, tokens=1) == pytest.approx(0.4)


def test_latency_of_a_paced_token_excludes_the_wait():
    """wait_ms has the wait; tokens_per_s includes it."""
    recorder = Recorder(10.0, DeadlineConfig(token_ms=50.0),
                        Roofline(footprint(), Peak(1e6, 'parameter')))
    request = recorder.request(1, 0.0, 0.0)
    request.prompt_tokens, request.paced = 10, True
    request.token(1.0, 65, 'A')
    token = request.token(1.1, 66, 'B', device_s=0.008, waited_s=0.09)
    assert token.itl_ms == pytest.approx(10.0)
    assert token.wait_ms == pytest.approx(90.0)
    assert token.host_gap_ms == pytest.approx(2.0)
    assert token.r_floor == pytest.approx(0.1352)
    assert not token.deadline_missed
    window = recorder.window(1.1)
    assert window.paced and window.wait_ms == pytest.approx(90.0)
    report = request.finish(1.1, 'stop')
    assert report.paced and report.itl_p50_ms == pytest.approx(10.0)
    assert report.tokens_per_s == pytest.approx(10.0)
    assert not recorder.window(100.0).paced


def test_answers_at_the_pace(make):
    """The pace is that of the node or of the request."""
    worker, sink = make(pace=PaceConfig(tokens_per_s=100.0))
    report, text = sink.end(worker.submit(Request('abcd')))
    assert text == 'abcd' and report.paced
    assert report.tokens_per_s <= 101.0
    assert [token.wait_ms is None for token in sink.tokens] == [True, False, False, False]
    report, _ = sink.end(worker.submit(Request('abcd', pace={'tokens_per_s': 0.0})))
    assert not report.paced
    worker.update(pace=PaceConfig())
    report, _ = sink.end(worker.submit(Request('abcd')))
    assert not report.paced


def test_starts_no_step_early():
    """A paced answer requests only the step that is due."""
    for ahead, asked in ((True, [2, 1, 0]), (False, [0, 0, 0])):
        engine = FakeEngine(lambda ids: forever())
        list(DecodeLoop(engine).stream([65], SamplingConfig(max_new_tokens=4), ahead=ahead))
        assert engine.asked == asked


def test_cancels_while_a_step_waits(make):
    """The next token would take minutes; the engine does not count as stalled."""
    worker, sink = make(FakeEngine(lambda ids: forever()), pace=PaceConfig(tokens_per_s=0.001),
                        diagnostics=DiagnosticsConfig(stall_timeout_s=0.05))
    number = worker.submit(Request('go'))
    sink.wait_tokens(1)
    wait_for(lambda: worker._last_heartbeat_s > worker._clock() + 60)     # it waits
    assert worker.state == 'generating'
    worker.cancel(number)
    report, text = sink.end(number)
    assert (report.finish_reason, text) == ('cancelled', 'x')


def test_deadline_passes_while_a_step_waits(make):
    worker, sink = make(FakeEngine(lambda ids: forever()), pace=PaceConfig(tokens_per_s=0.001),
                        deadline=DeadlineConfig(request_ms=50.0, action='truncate'))
    report, _ = sink.end(worker.submit(Request('go')))
    assert report.finish_reason == 'deadline'


def test_stops_while_a_step_waits(make):
    worker, sink = make(FakeEngine(lambda ids: forever()), pace=PaceConfig(tokens_per_s=0.001))
    number = worker.submit(Request('go'))
    sink.wait_tokens(1)
    assert worker.stop(60.0)
    assert sink.end(number)[0].finish_reason == 'cancelled'


def test_json_form():
    """It is parsed and written; the message for a wrong one names the field."""
    request = parse('{"prompt": "x", "pace": {"tokens_per_s": 8}}')
    assert request.pace == {'tokens_per_s': 8.0}
    assert request.to_json() == {'prompt': 'x', 'pace': {'tokens_per_s': 8.0}}
    with pytest.raises(RequestError, match=r'pace\.tokens_per_s is -1: expected 0\.0 to'):
        parse('{"prompt": "x", "pace": {"tokens_per_s": -1}}')
    with pytest.raises(RequestError, match=r'"pace\.hz" is not a field'):
        parse('{"prompt": "x", "pace": {"hz": 8}}')


@pytest.mark.parametrize('constraint', [None, object()])
def test_paced_pipeline_has_one_step_in_flight(constraint):
    """On a GPU too, a step, and the forward pass of the next one, starts only when it is due."""
    from physai_decode.engines.native.engine import NativeEngine

    launched = []

    class Pipeline:
        flying, full = 0, False

        def launch(self, plan, place, restrict):
            launched.append(place)
            self.flying += 1

        def collect(self):
            self.flying -= 1
            return [7], 1e-3

    engine = object.__new__(NativeEngine)
    engine.pipeline, engine._length, engine._plan = Pipeline(), 4, None
    engine._constraint = constraint
    for step in range(3):
        engine.step(0)
        assert engine.pipeline.flying == 0 and launched == list(range(5, 6 + step))
