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
Converts reports to ROS messages: the keys of each status, and the format of a value.

A value is a plain decimal number or a word, and ``n/a`` if it is unknown. Each kind of message
always has the same keys.
"""

from collections.abc import Mapping
from dataclasses import fields
from dataclasses import replace
import json
from math import isfinite
from types import MappingProxyType
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from diagnostic_msgs.msg import KeyValue
from physai_decode.config import DiagnosticsConfig
from physai_decode.engine import Footprint
from physai_decode.roofline import Peak
from physai_decode.ros.interfaces import unavailable
from physai_decode.timing import INTERNAL
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
from physai_decode.timing import WindowReport
from physai_decode.verdict import Figures
from physai_decode.verdict import judge
from physai_decode.verdict import short

OK = DiagnosticStatus.OK
WARN = DiagnosticStatus.WARN
ERROR = DiagnosticStatus.ERROR
NOT_KNOWN = 'n/a'
NUL_REPLACEMENT = '\ufffd'
NO_TOKEN_ID = 2**32 - 1         # the token_id of text from a server


def _keys(report: type, *excluded: str) -> tuple[str, ...]:
    """Return the fields of a report in their order, except those that are not keys."""
    return tuple(field.name for field in fields(report) if field.name not in excluded)


TOKEN_KEYS = _keys(TokenReport, 'text')
REQUEST_KEYS = _keys(RequestReport, 'message', 'reasoning', 'tool_calls')
BANDWIDTH_KEYS = (
    'weight_gb', 'kv_gb', 'floor_ms', 'r_floor', 'bandwidth_gb_s', 'peak_bandwidth_gb_s',
    'peak_source', 'host_gap_ms', 'verdict', 'no_floor', 'mask_ms')
LATENCY_KEYS = _keys(WindowReport, *INTERNAL, *BANDWIDTH_KEYS)
ENGINE_KEYS = (
    'state', 'engine', 'model', 'dtype', 'quantization', 'device', 'cuda_graph', 'queue_depth',
    'queue_capacity', 'requests', 'tokens', 'refusals', 'memory_used_gb', 'memory_free_gb',
    'temperature_c', 'power_w', 'sm_clock_mhz', 'memory_clock_mhz', 'throttle_reasons',
    'unknown_parameters', 'callback_errors', 'scheduling', 'decode_cores', 'memory_locked',
    'realtime_refused', 'power_mode', 'energy_j', 'j_per_token', 'fallbacks')
MODEL_KEYS = (
    'model', 'engine', 'model_type', 'dtype', 'quantization', 'device', 'device_name',
    'device_uuid', 'cuda_graph', 'max_context', 'vocab_size', 'layers', 'kv_heads', 'head_dim',
    'sliding_window', 'read_weight_gb', 'checkpoint_weight_gb', 'kv_bytes_per_token',
    'peak_bandwidth_gb_s', 'peak_source', 'generate_action', 'engine_reason', 'chat_template',
    'end_tokens', 'checkpoint_sampling', 'tool_form', 'thought_markers', 'fallback',
    'config_notes')
GENERATE_ACTION = unavailable or 'available'
WARN_REASONS = ('rejected', 'deadline')     # finish reasons with level WARN


def text_of(value: Any) -> str:
    """
    Format a value for a message.

    :param value: a number, a word, a bool (1 or 0), tool calls or None.
    :returns: a decimal number with six significant digits and no exponent, the word itself, or
        ``n/a`` for None, an empty word, infinity and NaN.
    """
    if isinstance(value, float):
        if 1e-4 <= value < 999999.5:            # .6g would write 999999.5 as 1e+06
            return f'{value:.6g}'
        return f'{value:.9f}'.rstrip('0').rstrip('.') if isfinite(value) else NOT_KNOWN
    if value is None or value == '' or value == ():
        return NOT_KNOWN
    if isinstance(value, tuple):
        return json.dumps([call.to_json() for call in value])
    return sendable(value) if isinstance(value, str) else str(int(value))


def sendable(text: str) -> str:
    """Replace each NUL, because rclpy cuts a string there."""
    return text.replace('\0', NUL_REPLACEMENT)


def token_id(report: TokenReport) -> int:
    """Return the id of a token, or `NO_TOKEN_ID`, for fields that can only hold a number."""
    return NO_TOKEN_ID if report.token_id is None else report.token_id


def status_name(node: str, task: str) -> str:
    """
    Name a status as diagnostic_updater does, such as ``arm/decode: engine``.

    :param node: the node's fully qualified name.
    """
    return f'{node.removeprefix("/")}: {task}'


def status(name: str, keys: tuple[str, ...], values: Mapping[str, Any] | Any, *, message: str = '',
           level: bytes = OK, hardware_id: str = '') -> DiagnosticStatus:
    """
    Build a status with all its keys.

    :param values: a mapping, in which a missing key means unknown, or a report with an attribute
        for each key.
    """
    if isinstance(values, Mapping):
        ordered = [values.get(key) for key in keys]
    else:
        ordered = [getattr(values, key) for key in keys]
    return DiagnosticStatus(
        level=level, name=name, message=message, hardware_id=hardware_id,
        values=[KeyValue(key=key, value=text_of(value))
                for key, value in zip(keys, ordered, strict=True)])


def values_of(status: DiagnosticStatus) -> dict[str, str]:
    """Return the values of a status by their keys."""
    return {pair.key: pair.value for pair in status.values}


def request_status(node: str, report: RequestReport) -> DiagnosticStatus:
    """
    Build the status of a request; its message is the finish reason and its explanation.

    :param node: the node's fully qualified name, here and below.
    """
    reason = report.finish_reason
    return status(
        status_name(node, 'request'), REQUEST_KEYS, report,
        message=f'{reason}: {report.message}' if report.message else reason,
        level=(ERROR if reason == 'error'
               else WARN if reason in WARN_REASONS or report.fallback else OK))


def model_status(node: str, model: str, footprint: Footprint, peak: Peak, hardware_id: str,
                 facts: Mapping[str, str] = MappingProxyType({})) -> DiagnosticStatus:
    """
    Build the status of ``~/model_info``: the model, the engine and the memory bus.

    :param facts: the values of further keys.
    """
    values = {key: getattr(footprint, key, None) for key in MODEL_KEYS}
    if footprint.is_remote:
        values = {key: value or None for key, value in values.items()}
    else:
        values.update(
            read_weight_gb=footprint.read_weight_bytes / 1e9,
            checkpoint_weight_gb=footprint.checkpoint_weight_bytes / 1e9,
            kv_bytes_per_token=(2 * footprint.layers * footprint.kv_heads * footprint.head_dim
                                * footprint.kv_element_bytes),
            peak_bandwidth_gb_s=_giga(peak.bytes_per_s), peak_source=peak.source)
    details = {key: value for key, value in {**footprint.details, **facts}.items()
               if key not in MODEL_KEYS}
    values.update({**facts, **details}, model=model, generate_action=GENERATE_ACTION)
    return status(status_name(node, 'model'), (*MODEL_KEYS, *details), values,
                  hardware_id=hardware_id)


def latency_status(node: str, window: WindowReport | None, settings: DiagnosticsConfig,
                   late: bool, hardware_id: str) -> DiagnosticStatus:
    """
    Build the status `latency`.

    :param window: None if the node is not active.
    :param late: whether a deadline was missed since the last message.
    """
    name, level, message = status_name(node, 'latency'), OK, ''
    if window is None:
        return status(name, LATENCY_KEYS, {'window_s': settings.window_s},
                      message='not active; deadlines were missed before' if late else 'not active',
                      level=WARN if late else OK, hardware_id=hardware_id)
    if late or window.consecutive_misses:
        level, message = WARN, f'deadlines missed since activation: {window.deadline_misses}'
        if not window.deadline_misses:
            message = 'deadlines were missed before activation'
    if window.miss_limit_reached:
        level, message = ERROR, f'{window.consecutive_misses} tokens in a row were late'
        if window.itl_p50_ms is not None and window.token_deadline_ms is not None:
            message += (f': itl_p50_ms is {short(window.itl_p50_ms)}, deadline.token_ms '
                        f'{short(window.token_deadline_ms)} unless the request sets its own')
        elif window.token_deadline_ms is None and window.ttft_deadline_ms is None:
            message += ', by the deadlines of their requests'
    return status(name, LATENCY_KEYS, window, message=message, level=level,
                  hardware_id=hardware_id)


def bandwidth_status(node: str, window: WindowReport | None, footprint: Footprint | None,
                     peak: Peak, settings: DiagnosticsConfig, hardware_id: str,
                     throttle_reasons: str | None = None, note: str = '') -> DiagnosticStatus:
    """
    Build the status `bandwidth`: medians over the window, from the bytes that a step reads.

    :param throttle_reasons: why the device throttles its clocks.
    :param note: a warning that steps were faster than the peak bandwidth.
    """
    values = {'peak_bandwidth_gb_s': _giga(peak.bytes_per_s), 'peak_source': peak.source,
              'no_floor': peak.no_floor}
    level, message = (WARN, note) if note else (OK, '')
    measured = window is not None and window.r_floor is not None    # by a fallback, too
    if footprint is not None and settings.warn_r_floor and not measured and (
            footprint.is_remote or peak.floor_bytes_per_s is None):
        level, message = WARN, 'diagnostics.warn_r_floor has no effect, there is no r_floor: ' + (
            'a server decodes' if footprint.is_remote else
            peak.no_floor or 'the peak bandwidth is unknown')
    if footprint is not None and not footprint.is_remote:
        values['weight_gb'] = footprint.read_weight_bytes / 1e9
    if window is not None:
        values.update(
            kv_gb=_giga(window.kv_bytes), floor_ms=window.floor_ms, r_floor=window.r_floor,
            bandwidth_gb_s=window.bandwidth_gb_s, host_gap_ms=window.host_gap_ms,
            mask_ms=window.mask_ms)
        if footprint is None or not footprint.is_remote:
            values['verdict'] = str(judge(_figures(window, footprint, throttle_reasons)) or '')
        if window.r_floor is not None and window.r_floor < settings.warn_r_floor:
            level = WARN
            message = f'r_floor {window.r_floor:.3f} is below {settings.warn_r_floor:g}'
    return status(status_name(node, 'bandwidth'), BANDWIDTH_KEYS, values, message=message,
                  level=level, hardware_id=hardware_id)


def _figures(window: WindowReport, footprint: Footprint | None,
             throttle_reasons: str | None) -> Figures:
    """Return the figures of a verdict."""
    itl_ms, gap_ms = window.itl_p50_ms, window.host_gap_ms
    comparable = not window.drafted     # a pass with a draft takes longer, and its tokens share it
    figures = Figures(
        itl_ms, None if itl_ms is None or gap_ms is None else itl_ms - gap_ms, window.floor_ms,
        window.itl_p99_ms if comparable else None, window.count,
        window.wait_ms if window.paced else None, throttle_reasons=throttle_reasons,
        best_r_floor=window.best_r_floor if comparable else None,
        draft_ms=window.draft_ms or 0.0)
    return figures if footprint is None else replace(
        figures, cuda_graph=footprint.cuda_graph, engine=footprint.engine,
        kernels=footprint.details.get('kernels', ''), slow_format=footprint.slow_format)


def _giga(count: float | None) -> float | None:
    return None if count is None else count / 1e9
