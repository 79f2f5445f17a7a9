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

"""Publishes the node's status: `/diagnostics`, in every lifecycle state, and ``~/model_info``."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import threading
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from physai_decode.host import Host
from physai_decode.roofline import Peak
from physai_decode.ros import messages
from physai_decode.ros.duplicates import Duplicates
from physai_decode.ros.faults import Faults
from physai_decode.ros.topics import Topics

NO_PEAK = Peak(None, 'unknown')


class Status:
    """Builds the statuses from the host's figures and publishes them."""

    def __init__(self, host: Host, topics: Topics, unknown_parameters: Sequence[str],
                 duplicates: Duplicates, faults: Faults, warn: Callable[[str], object]) -> None:
        """
        Publish nothing yet.

        :param unknown_parameters: the names given at start that the node does not declare.
        :param warn: logs a warning.
        """
        self._host, self._topics = host, topics
        self._warn = warn
        self._duplicates, self._faults = duplicates, faults
        self._unknown = ' '.join(unknown_parameters)
        self._latch = threading.Lock()
        self._misses = 0                        # deadline misses at the last publish

    def model_info(self) -> None:
        """Publish the loaded model on ``~/model_info``, which is latched."""
        with self._latch:                       # so that the latched message is the newest
            loaded, node = self._host.loaded, self._topics.node_name
            if loaded is None:
                status = messages.status(
                    messages.status_name(node, 'model'), messages.MODEL_KEYS,
                    {'generate_action': messages.GENERATE_ACTION}, message='nothing is loaded',
                    hardware_id=messages.NOT_KNOWN)
            else:
                status = messages.model_status(
                    node, self._host.config.model_name, loaded.footprint,
                    self._host.peak or loaded.peak, self._hardware_id(), loaded.facts)
            self._topics.model_info(status)

    def publish(self) -> None:
        """Publish the three statuses of `/diagnostics`."""
        settings, hardware_id = self._host.config.diagnostics, self._hardware_id()
        loaded, worker, node = self._host.loaded, self._host.worker, self._topics.node_name
        misses_before, self._misses = self._misses, self._host.deadline_misses
        late = self._misses > misses_before
        window = worker.window() if worker is not None else None    # has these misses
        note = self._host.follow_peak(window) if window is not None else ''
        if note:
            self._warn(note)
            self.model_info()
        telemetry = self._host.telemetry
        device = telemetry.read() if telemetry is not None else {}
        throttle_reasons = device.get('throttle_reasons')
        self._topics.diagnostics([
            messages.latency_status(node, window, settings, late, hardware_id),
            messages.bandwidth_status(
                node, window, loaded and loaded.footprint,
                (worker.peak if worker else self._host.peak) or NO_PEAK, settings, hardware_id,
                None if throttle_reasons is None else str(throttle_reasons), note),
            self._engine_status(hardware_id, device)])

    def _hardware_id(self) -> str:
        loaded = self._host.loaded
        if loaded is None:
            return messages.NOT_KNOWN
        footprint = loaded.footprint
        return f'{footprint.device_name} {footprint.device_uuid}'.strip()

    def _engine_status(self, hardware_id: str, device: Mapping[str, Any]) -> DiagnosticStatus:
        host = self._host
        config, worker, state = host.config, host.worker, host.state
        loaded, loading = host.loaded, host.loading
        values: dict[str, Any] = {
            'state': state, 'engine': config.engine.name, 'model': config.model_name,
            'queue_depth': worker.queue_depth if worker is not None else 0,
            'queue_capacity': config.queue.size, 'unknown_parameters': self._unknown,
            'callback_errors': self._faults.count,
            **host.counts}
        if loaded is not None:
            values.update({
                name: getattr(loaded.footprint, name)
                for name in ('engine', 'dtype', 'quantization', 'device', 'cuda_graph')})
        values.update(device)
        if worker is not None:
            values.update(energy_j=worker.energy_j, j_per_token=worker.j_per_token)
        in_force = worker.in_force if worker is not None else None
        level, message = messages.OK, loading or state
        if in_force is not None:
            values.update(vars(in_force))
            if in_force.realtime_refused:
                level, message = messages.WARN, in_force.realtime_refused
        if worker is not None and worker.fallback:
            level, message = messages.WARN, f'the local model answers: {worker.fallback}'
        if self._unknown:
            level, message = messages.WARN, f'unknown parameters: {self._unknown}'
        if host.params_problems:
            level, message = messages.WARN, '; '.join(host.params_problems)
        if problem := self._duplicates.look():
            level, message = messages.ERROR, problem
        if state == 'stalled':
            level = messages.ERROR
            message = f'no token for more than {config.diagnostics.stall_timeout_s:g} s'
        if state == 'failed':
            level = messages.ERROR
            message = worker.last_error if worker is not None else host.reason
        return messages.status(
            messages.status_name(self._topics.node_name, 'engine'), messages.ENGINE_KEYS, values,
            message=message, level=level, hardware_id=hardware_id)
