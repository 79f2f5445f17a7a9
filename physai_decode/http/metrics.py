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

"""
The node's figures for Prometheus, named after the keys of `/diagnostics`.

Each scrape reads the host. Unknown figures are left out.
"""

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from physai_decode.host import Host
from physai_decode.keys import DESCRIPTIONS
from physai_decode.timing import INTERNAL
from prometheus_client import CollectorRegistry
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
STATES = ('unconfigured', 'inactive', 'loading', 'idle', 'generating', 'stalled', 'failed')
ENDS = ('stop', 'tool_calls', 'length', 'deadline', 'cancelled', 'preempted', 'rejected', 'error')
_MODEL = ('engine', 'dtype', 'quantization', 'device', 'device_name', 'cuda_graph')


class Metrics(Collector):
    """The figures of one host."""

    def __init__(self, host: Host, errors: Callable[[], int]) -> None:
        """
        Register the collector.

        :param errors: see `physai_decode.http.start_server`.
        """
        self._host, self._errors = host, errors
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Describe no metrics in advance, because they depend on the loaded model."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the current figures of the host."""
        host = self._host
        worker, loaded, telemetry, state = host.worker, host.loaded, host.telemetry, host.state
        states = GaugeMetricFamily(
            'physai_decode_state', '1 for the state of the node, else 0', labels=['state'])
        for each in STATES:
            states.add_metric([each], each == state)
        yield states
        ends = CounterMetricFamily(
            'physai_decode_ends', 'requests that ended, by finish reason',
            labels=['finish_reason'])
        for each, count in {**dict.fromkeys(ENDS, 0), **host.ends}.items():
            ends.add_metric([each], count)
        yield ends
        for name, count in {**host.counts, 'callback_errors': self._errors()}.items():
            yield CounterMetricFamily(f'physai_decode_{name}', DESCRIPTIONS[name], count)
        figures: dict[str, Any] = {'queue_capacity': host.config.queue.size,
                                   'queue_depth': worker.queue_depth if worker else 0}
        if worker is not None:
            figures.update(asdict(worker.window()), energy_j=worker.energy_j,
                           j_per_token=worker.j_per_token)
            if (kv_bytes := figures['kv_bytes']) is not None:
                figures['kv_gb'] = kv_bytes / 1e9
            if (in_force := worker.in_force) is not None:
                figures['memory_locked'] = in_force.memory_locked
        if telemetry is not None:
            figures.update(telemetry.read())
        if loaded is not None:
            shape = loaded.footprint
            if not shape.is_remote:
                figures['weight_gb'] = shape.read_weight_bytes / 1e9
            if shape.max_context:
                figures['max_context'] = shape.max_context
            peak = worker.peak if worker else host.peak or loaded.peak
            if peak.bytes_per_s is not None:
                figures['peak_bandwidth_gb_s'] = peak.bytes_per_s / 1e9
            model = GaugeMetricFamily(
                'physai_decode_model', '1 for the loaded model', labels=['model', *_MODEL])
            model.add_metric([host.config.model_name, *(str(getattr(shape, name))
                                                        for name in _MODEL)], 1)
            yield model
        for name, value in figures.items():
            if isinstance(value, (int, float)) and name not in INTERNAL:
                yield GaugeMetricFamily(f'physai_decode_{name}', DESCRIPTIONS[name],
                                        float(value))
