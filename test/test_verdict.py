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

"""`judge` names the main cause of a step's time, for measured and constructed figures."""

from dataclasses import replace

from physai_decode.verdict import Figures
from physai_decode.verdict import judge
from physai_decode.verdict import Verdict
import pytest

# Measured: medians of docs/h200, docs/h100 and docs/performance.md, and of an L4 in the_gap.md.
NATIVE = Figures(3.590, device_ms=3.575, floor_ms=2.97, cuda_graph='captured')
EAGER = Figures(18.305, device_ms=18.249, floor_ms=2.97, cuda_graph='off')
GPTQ = Figures(1.751, device_ms=1.74, floor_ms=0.96, cuda_graph='captured')
CAPTURED = Figures(11.776, device_ms=11.7, floor_ms=4.58, cuda_graph='captured')
L4 = Figures(58.7, device_ms=58.5, floor_ms=47.53, cuda_graph='captured')
CPU = Figures(3.1, device_ms=2.8, cuda_graph='unavailable')         # the embedded model
NATIVE_NF4 = replace(CAPTURED, engine='native', kernels='triton 3.6.0',
                     slow_format=True)
BUSY = Figures(5.53, device_ms=5.2, itl_p99_ms=16.0, count=975)     # beside two busy loops


@pytest.mark.parametrize(('figures', 'cause', 'part_ms', 'advice'), [
    (NATIVE, 'bytes', 2.97, 'fewer bytes'),
    (L4, 'bytes', 47.53, 'fewer bytes'),
    (GPTQ, 'bytes', 0.96, 'fewer bytes'),
    (EAGER, 'host', 18.305 - 2.97, 'engine.cuda_graph: true'),
    (CAPTURED, 'kernels', 11.7 - 4.58, 'engine.name: native with Triton'),
    (CPU, 'kernels', 2.8, 'engine.name: native, another value of engine.cpu_threads'),
    (replace(CPU, engine='transformers'), 'kernels', 2.8, 'engine.name: native'),
    (BUSY, 'a neighbour', 10.47, 'realtime.priority and realtime.cpu_affinity'),
    (replace(NATIVE, itl_ms=9.0), 'host', 9.0 - 3.575, 'engine.steps_ahead'),
    (replace(CPU, itl_ms=9.0), 'host', 6.2, 'realtime.priority'),
    (replace(CAPTURED, throttle_reasons='sw_power_cap'), 'clocks', 7.12, 'cooling'),
    (replace(CAPTURED, throttle_reasons='none'), 'kernels', 7.12, 'native'),
    (replace(NATIVE, wait_ms=96.4), 'pacing', 96.4, '279 tokens per s'),
    (replace(NATIVE, wait_ms=0.0), 'bytes', 2.97, 'fewer bytes'),
    (replace(NATIVE, itl_p99_ms=12.0, count=1000), 'a neighbour', 8.41, 'engine.stream_priority'),
    (replace(NATIVE, itl_p99_ms=12.0, count=30), 'bytes', 2.97, 'fewer bytes'),
    (Figures(12.0, 11.9, 2.97, best_r_floor=0.83, cuda_graph='captured'), 'a neighbour',
     12 - 2.97 / 0.83, 'share by MPS'),
    (Figures(12.0, 11.9, 2.97, best_r_floor=0.26, cuda_graph='captured'), 'kernels', 8.93,
     'native'),
    (Figures(60.0, 11.9, 2.97, best_r_floor=0.83, cuda_graph='captured'), 'a neighbour',
     60 - 2.97 / 0.83, 'share by MPS'),
    (replace(CAPTURED, draft_ms=5.0), 'drafts', 5.0, 'smaller draft model'),
    (replace(CAPTURED, draft_ms=1.0), 'kernels', 11.7 - 4.58 - 1.0, 'native'),
    (replace(NATIVE, draft_ms=0.5), 'bytes', 2.97, 'fewer bytes'),
    (replace(EAGER, draft_ms=10.0), 'drafts', 10.0, 'smaller draft model'),
    (replace(EAGER, draft_ms=1.0), 'host', 18.305 - 2.97 - 1.0, 'engine.cuda_graph: true'),
    (replace(CPU, draft_ms=1.5), 'drafts', 1.5, 'speculation.name: lookup')])
def test_names_the_largest_part(figures, cause, part_ms, advice):
    verdict = judge(figures)
    assert verdict.cause == cause
    assert verdict.part_ms == pytest.approx(part_ms)
    assert advice in verdict.advice


@pytest.mark.parametrize(('figures', 'advice'), [
    (NATIVE_NF4, 'use weights in another format, such as GPTQ of four bits'),
    (replace(NATIVE_NF4, slow_format=False),
     'use a smaller model; decode_bench --kernels times each kernel'),
    (replace(NATIVE_NF4, kernels='torch'),
     'install a Triton that supports this GPU; the log says why none is used'),
    (replace(NATIVE_NF4, engine='exllamav2', kernels=''),
     'use another engine, such as engine.name: native with Triton'),
    (replace(CPU, engine='native', kernels='torch'),
     'try another value of engine.cpu_threads, a smaller model, or a GPU')])
def test_advice_on_kernels_does_not_name_what_runs_already(figures, advice):
    verdict = judge(figures)
    assert (verdict.cause, verdict.advice) == ('kernels', advice)


@pytest.mark.parametrize(('changes', 'cause', 'advice'), [
    ({'itl_ms': 60.0}, 'host', 'engine.steps_ahead'),
    ({'throttle_reasons': 'sw_power_cap'}, 'clocks', 'cooling'),
    ({'cuda_graph': 'off'}, 'host', 'engine.cuda_graph: true')])
def test_advice_on_other_causes_is_that_of_any_engine(changes, cause, advice):
    verdict = judge(replace(NATIVE_NF4, **changes))
    assert verdict.cause == cause
    assert advice in verdict.advice


def test_text_has_cause_part_share_and_advice():
    assert str(judge(CAPTURED)) == (
        'kernels: 7.12 of 11.8 ms (60 %); use another engine, such as engine.name: native with '
        'Triton')
    assert str(Verdict('host', 999.7, 12345.6, 'do')) == 'host: 1000 of 12346 ms (8 %); do'
    assert str(judge(BUSY)).startswith('a neighbour: 10.5 of 16 ms (65 %); set realtime.priority')


@pytest.mark.parametrize('figures', [
    Figures(None), Figures(0.0), Figures(3.0), Figures(3.0, cuda_graph='off', device_ms=2.9),
    Figures(3.0, cuda_graph='off', device_ms=2.9, draft_ms=0.1), Figures(3.0, draft_ms=0.1)])
def test_gives_no_verdict_from_too_few_figures(figures):
    assert judge(figures) is None


def test_no_combination_of_figures_raises():
    for cuda_graph in ('captured', 'off', 'unavailable'):
        for device_ms in (None, 0.0, 5.0, 20.0):
            for floor_ms in (None, 1.0, 20.0):
                for throttled in (None, 'none', 'hw_thermal'):
                    for best in (None, 0.9):
                        for p99_ms in (None, 100.0):
                            for draft_ms in (0.0, 20.0):
                                judge(Figures(10.0, device_ms, floor_ms, p99_ms, 1000, None,
                                              cuda_graph, throttled, best, draft_ms=draft_ms))
