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

"""The recorder, fed with made-up times, against figures worked out by hand."""

from dataclasses import replace
import threading

from fake_engine import footprint
from physai_decode.config import DeadlineConfig
from physai_decode.roofline import Peak
from physai_decode.roofline import Roofline
from physai_decode.timing import Recorder
import pytest


def recorder(window_s=10.0, peak=1e6, **deadline):
    return Recorder(window_s, DeadlineConfig(**deadline),
                    Roofline(footprint(), Peak(peak, 'parameter')))


def test_request():
    request = recorder().request(7, received_s=100.0, taken_s=100.2)
    request.prompt_tokens, request.cached_tokens = 10, 4
    first = request.token(100.5, 65, 'A', device_s=0.25)
    assert (first.request_id, first.index, first.token_id, first.text) == (7, 0, 65, 'A')
    assert first.context_tokens == 10
    assert first.device_ms == pytest.approx(250.0)
    assert (first.itl_ms, first.host_gap_ms, first.publish_ms, first.floor_ms, first.r_floor,
            first.bandwidth_gb_s) == (None,) * 6

    second = request.token(100.51, 66, 'B', device_s=0.004, publish_s=0.0001)
    # The step reads the keys of the prompt and of the token before: 1000 + 11 * 32 bytes.
    assert second.context_tokens == 11
    assert second.itl_ms == pytest.approx(10.0)
    assert second.device_ms == pytest.approx(4.0)
    assert second.host_gap_ms == pytest.approx(6.0)
    assert second.publish_ms == pytest.approx(0.1)
    assert second.floor_ms == pytest.approx(1.352)
    assert second.r_floor == pytest.approx(0.1352)
    assert second.bandwidth_gb_s == pytest.approx(1352 / 0.01 / 1e9)

    request.token(100.53, 67, 'C')
    request.encoded_s, request.sample_s = 100.25, 0.002
    report = request.finish(100.6, 'cancelled', 'why', cancel_s=100.55)
    assert (report.request_id, report.finish_reason, report.message) == (7, 'cancelled', 'why')
    assert (report.prompt_tokens, report.cached_tokens, report.output_tokens) == (10, 4, 3)
    assert report.queue_ms == pytest.approx(200.0)
    assert report.prefill_ms == pytest.approx(300.0)
    assert report.ttft_ms == pytest.approx(500.0)
    assert (report.encode_ms, report.sample_ms) == pytest.approx((50.0, 2.0))
    # A prompt reads the weights and the keys of what is cached: 1000 + 4 * 32 bytes.
    assert report.ttft_floor_ms == pytest.approx(1.128)
    assert report.r_ttft == pytest.approx(1.128 / 300)
    assert report.total_ms == pytest.approx(600.0)
    assert report.itl_p50_ms == pytest.approx(15.0)
    assert report.itl_max_ms == pytest.approx(20.0)
    assert report.jitter_ms == pytest.approx(5.0)
    assert report.tokens_per_s == pytest.approx(2 / 0.03)
    assert report.r_floor_p50 == pytest.approx((0.1352 + 1.384 / 20) / 2)
    assert report.cancel_ms == pytest.approx(50.0)
    assert (report.deadline_misses, report.worst_overrun_ms) == (0, None)


def test_request_without_tokens():
    report = recorder().request(1, 0.0, 1.0).finish(3.0, 'error', 'broken')
    assert report.queue_ms == pytest.approx(1000.0)
    assert report.total_ms == pytest.approx(3000.0)
    assert report.output_tokens == 0
    assert (report.prefill_ms, report.ttft_ms, report.itl_p50_ms, report.jitter_ms,
            report.tokens_per_s, report.r_floor_p50, report.cancel_ms, report.prompt_tokens,
            report.encode_ms, report.ttft_floor_ms, report.r_ttft) == (None,) * 11


def test_a_prompt_that_a_server_reads_has_no_floor():
    """Also if a local engine is loaded, which answers if the server fails."""
    request = recorder().request(1, 0.0, 0.0)
    request.token(0.1, None, 'x')
    request.prompt_tokens = 5
    report = request.finish(0.2, 'stop')
    assert (report.ttft_floor_ms, report.r_ttft, report.encode_ms) == (None, None, None)


def test_unknown_peak_gives_no_floor_but_a_bandwidth():
    times = recorder(peak=None)
    request = times.request(1, 0.0, 0.0)
    request.token(0.1, 1, '')
    report = request.token(0.2, 1, '')
    assert (report.floor_ms, report.r_floor) == (None, None)
    assert report.bandwidth_gb_s > 0
    window = times.window(0.2)
    assert (window.floor_ms, window.r_floor) == (None, None)
    request.prompt_tokens, request.encoded_s = 5, 0.05
    assert request.finish(0.3, 'stop').ttft_floor_ms is None
    assert window.bandwidth_gb_s == report.bandwidth_gb_s


def test_tokens_of_one_pass_share_its_times_and_its_floor():
    """No token exceeds the limit, and the deadline of a token applies to its share."""
    request = recorder(token_ms=30.0).request(1, 0.0, 0.0)
    request.prompt_tokens = 10
    assert request.token(0.1, 1, '').pass_tokens == 1
    reports = [request.token(0.2, 1, '', device_s=0.08, pass_tokens=4) for _ in range(4)]
    for index, report in enumerate(reports, 1):
        assert report.pass_tokens == 4
        assert report.itl_ms == pytest.approx(25.0)
        assert report.device_ms == pytest.approx(20.0)
        assert report.host_gap_ms == pytest.approx(5.0)
        assert report.floor_ms == pytest.approx((1000 + 32 * (10 + index)) / 1e3 / 4)
        assert report.r_floor == pytest.approx(report.floor_ms / 25.0)
        assert report.bandwidth_gb_s == pytest.approx((1000 + 32 * (10 + index)) / 0.1 / 1e9)
        assert not report.deadline_missed
    late = request.token(0.24, 1, '')
    assert (late.itl_ms, late.pass_tokens) == (pytest.approx(40.0), 1)
    assert late.deadline_missed
    report = request.finish(0.25, 'stop')
    assert report.pass_tokens == pytest.approx(5 / 2)
    assert report.tokens_per_s == pytest.approx(5 / 0.14)
    assert report.deadline_misses == 1
    assert recorder().request(2, 0.0, 0.0).finish(1.0, 'stop').pass_tokens is None


def test_window_counts_the_steps_of_the_local_engine():
    times = recorder()
    request = times.request(1, 0.0, 0.0)
    for tick, token_id in enumerate((None, None, None, 1, 1)):
        request.token(0.1 * tick, token_id, '')
    window = times.window(0.5)
    assert (window.count, window.floor_count) == (4, 2)


@pytest.mark.parametrize('count', [1, 2])
def test_window_knows_of_passes_with_a_draft(count):
    """Also of rejected ones, which bring one token."""
    times = recorder(window_s=1.0)
    request = times.request(1, 0.0, 0.0)
    request.token(0.1, 1, '')
    request.token(0.2, 1, '')
    assert not times.window(0.2).drafted
    for _ in range(count):
        request.token(0.3, 1, '', pass_tokens=count, draft_s=0.0)
    assert times.window(1.25).drafted
    assert not times.window(1.35).drafted


def test_window_has_the_time_of_the_draft_model():
    """The tokens of a pass share it."""
    times = recorder()
    request = times.request(1, 0.0, 0.0)
    request.token(0.1, 1, '')
    assert times.window(0.1).draft_ms is None
    request.token(0.2, 1, '', device_s=0.1)
    assert times.window(0.2).draft_ms == 0.0
    for _ in range(4):
        request.token(0.3, 1, '', device_s=0.1, pass_tokens=4, draft_s=0.08)
    assert times.window(0.3).draft_ms == pytest.approx(20.0)


def test_window_forgets():
    times = recorder(window_s=1.0)
    request = times.request(1, 0.0, 0.0)
    request.prompt_tokens = 5
    for tick in range(31):
        request.token(0.1 * tick, 1, '', device_s=0.06)
    window = times.window(3.0)
    assert window.window_s == 1.0
    assert window.count == 11               # the tokens of 2.0 to 3.0 s
    assert window.context_tokens == 35
    assert window.kv_bytes == 35 * 32
    assert window.itl_p50_ms == pytest.approx(100.0)
    assert window.host_gap_ms == pytest.approx(40.0)
    assert window.floor_ms == pytest.approx((1000 + 30 * 32) / 1e3)
    assert window.ttft_last_ms == 0.0
    later = times.window(60.0)
    assert later.count == 0
    assert (later.itl_p50_ms, later.itl_max_ms, later.jitter_ms, later.context_tokens,
            later.kv_bytes, later.floor_ms, later.host_gap_ms) == (None,) * 7
    assert later.itl_max_activation_ms == pytest.approx(100.0)


def test_the_best_r_floor_counts_from_the_last_change_of_the_peak():
    """Windows with earlier tokens, which have another floor, do not count."""
    roofline = Roofline(footprint(), Peak(1e6, 'parameter'))
    times = Recorder(1.0, DeadlineConfig(), roofline)
    request = times.request(1, 0.0, 0.0)
    ends_s = [0.01 * (tick + 1) for tick in range(400)]
    for end_s in ends_s[:100]:
        request.token(end_s, 1, '')
    assert times.window(1.0).best_r_floor == pytest.approx(times.window(1.0).r_floor)
    roofline.peak = Peak(2e6, 'observed in steps')
    for end_s in ends_s[100:]:
        request.token(end_s, 1, '')
        if end_s in (1.01, 1.5, 2.0):
            assert times.window(end_s).best_r_floor is None
    window = times.window(ends_s[-1])
    assert window.best_r_floor == pytest.approx(window.r_floor)


def test_busy_window_is_accurate_to_half_a_percent():
    times = recorder(window_s=10.0)
    request = times.request(1, 0.0, 0.0)
    for tick in range(20000):
        request.token(0.001 * tick + 0.0004 * (tick % 2), 1, '', device_s=0.0001)
    window = times.window(20.0)
    assert 10000 <= window.count <= 10250
    assert window.itl_p95_ms == pytest.approx(1.4, rel=0.0051)
    assert window.itl_max_ms == pytest.approx(1.4)
    assert window.jitter_ms == pytest.approx(0.4, rel=1e-3)
    assert window.context_tokens == 19999
    assert window.floor_ms == pytest.approx((1000 + 15000 * 32) / 1e3, rel=0.02)
    assert window.bandwidth_gb_s == pytest.approx(window.r_floor * 1e6 / 1e9, rel=0.011)
    report = request.finish(20.0, 'stop')
    assert report.output_tokens == 20000
    assert report.itl_p99_ms == pytest.approx(1.4, rel=0.0051)
    assert report.tokens_per_s == pytest.approx(1000.0, rel=1e-4)
    assert times.window(60.0).count == 0


def test_deadlines_of_tokens():
    times = recorder(ttft_ms=100.0, token_ms=10.0, max_consecutive_misses=2)
    request = times.request(1, 0.0, 0.0)
    at_s, missed = 0.0, []
    for wait_s in (0.15, 0.02, 0.005, 0.03, 0.011, 0.012, 0.009):
        at_s += wait_s
        missed.append(request.token(at_s, 1, '').deadline_missed)
    assert missed == [True, True, False, True, True, True, False]
    window = times.window(at_s)
    assert (window.ttft_deadline_ms, window.token_deadline_ms,
            window.request_deadline_ms) == (100.0, 10.0, None)
    assert window.deadline_misses == 5
    assert (window.consecutive_misses, window.miss_limit_reached) == (0, False)
    assert window.worst_overrun_ms == pytest.approx(50.0)
    report = request.finish(at_s, 'stop')
    assert (report.deadline_misses, report.max_consecutive_misses) == (5, 3)
    assert report.worst_overrun_ms == pytest.approx(50.0)


def test_consecutive_misses_reach_their_limit_and_age():
    times = recorder(window_s=5.0, token_ms=10.0, max_consecutive_misses=2)
    request = times.request(1, 0.0, 0.0)
    for at_s in (0.1, 0.2):
        request.token(at_s, 1, '')
    assert not times.window(0.2).miss_limit_reached
    request.token(0.3, 1, '')
    assert times.window(0.3).consecutive_misses == 2
    assert times.window(0.3).miss_limit_reached
    assert times.window(6.0).consecutive_misses == 0
    assert times.window(6.0).deadline_misses == 2
    request = times.request(2, 6.0, 6.0)
    request.token(6.1, 1, '')
    request.token(6.2, 1, '')
    assert times.window(6.2).consecutive_misses == 1


def test_consecutive_misses_age_while_tokens_have_no_deadline():
    times = recorder(window_s=5.0, token_ms=10.0, max_consecutive_misses=2)
    request = times.request(1, 0.0, 0.0)
    for at_s in (0.1, 0.2, 0.3):
        request.token(at_s, 1, '')
    times.deadline = DeadlineConfig()
    for at_s in (2.0, 4.0, 6.0):
        request.token(at_s, 1, '')
    assert times.window(6.0).consecutive_misses == 0


def test_request_can_be_late():
    times = recorder(request_ms=100.0)
    assert times.request(1, 0.0, 0.0).finish(0.09, 'stop').deadline_misses == 0
    report = times.request(2, 1.0, 1.0).finish(1.25, 'stop')
    assert (report.deadline_misses, report.max_consecutive_misses) == (1, 0)
    assert report.worst_overrun_ms == pytest.approx(150.0)
    assert times.window(1.25).deadline_misses == 1
    assert times.window(1.25).consecutive_misses == 0


def test_new_deadline_applies_at_once():
    times = recorder()
    request = times.request(1, 0.0, 0.0)
    request.token(0.1, 1, '')
    assert not request.token(0.2, 1, '').deadline_missed
    times.deadline = DeadlineConfig(token_ms=50.0)
    assert request.token(0.3, 1, '').deadline_missed


def test_reports_have_the_client_id():
    request = recorder().request(3, 0.0, 0.0, client_id='arm-7')
    request.seed = 42
    assert request.token(0.1, 1, '').client_id == 'arm-7'
    report = request.finish(0.2, 'stop')
    assert (report.client_id, report.seed) == ('arm-7', 42)
    request = recorder().request(4, 0.0, 0.0)
    assert request.token(0.1, 1, '').client_id == ''
    report = request.finish(0.2, 'stop')
    assert (report.client_id, report.seed) == ('', None)


def test_deadlines_of_a_request():
    times = recorder(ttft_ms=1000.0, token_ms=100.0, request_ms=0.0)
    request = times.request(1, 0.0, 0.0, deadline={'token_ms': 10.0, 'request_ms': 300.0,
                                                   'action': 'truncate'})
    other = times.request(2, 0.0, 0.0)
    assert request.deadline == DeadlineConfig(
        ttft_ms=1000.0, token_ms=10.0, request_ms=300.0, action='truncate')
    assert other.deadline == times.deadline
    assert not request.token(0.1, 1, '').deadline_missed
    assert request.token(0.15, 1, '').deadline_missed
    assert not other.token(0.1, 1, '').deadline_missed
    assert not other.token(0.15, 1, '').deadline_missed
    assert times.window(0.15).deadline_misses == 1
    assert times.window(0.15).token_deadline_ms == 100.0        # the node's
    report = request.finish(0.4, 'deadline')
    assert (report.deadline_misses, report.worst_overrun_ms) == (2, pytest.approx(100.0))
    assert other.finish(0.4, 'stop').deadline_misses == 0
    assert times.window(0.4).deadline_misses == 2


def test_new_deadline_applies_unless_the_request_has_its_own():
    times = recorder(token_ms=10.0)
    request = times.request(1, 0.0, 0.0, deadline={'token_ms': 0.0})
    assert request.deadline.action == 'report'
    times.deadline = replace(times.deadline, token_ms=1.0, ttft_ms=50.0, action='truncate')
    assert request.deadline == DeadlineConfig(ttft_ms=50.0, token_ms=0.0, action='truncate')
    assert request.token(0.1, 1, '').deadline_missed
    assert not request.token(9.0, 1, '').deadline_missed


def test_window_can_be_read_while_tokens_arrive():
    times = recorder(window_s=0.05)
    request = times.request(1, 0.0, 0.0)
    failures = []

    def read():
        try:
            for tick in range(300):
                window = times.window(tick * 0.01)
                assert window.itl_max_ms is None or window.itl_p50_ms <= window.itl_max_ms
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for tick in range(3000):
        request.token(tick * 0.001, 1, '')
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert failures == []
    assert request.finish(3.0, 'stop').output_tokens == 3000
