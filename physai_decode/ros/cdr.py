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
Serialises the messages of one token to CDR, the wire format of DDS.

rclpy converts a message object to a C struct, field by field, and serialises that. For the figures
of a token, this takes as long as the rest of publishing. These types are therefore serialised here
directly, and a test deserialises them with rclpy. All other messages use rclpy.
"""

from math import nan
from operator import attrgetter
from struct import Struct

from physai_decode.ros import messages
from physai_decode.timing import TokenReport

_LITTLE_ENDIAN = b'\0\1\0\0'                # encapsulation header; alignment counts from its end
_PADDING = (b'\0\0\0\0', b'\0\0\0', b'\0\0', b'\0')     # a NUL, then zeros to 4-byte alignment
_length = Struct('<I').pack
_float64 = Struct('<4sd').pack
_stamp = Struct('<4siI').pack
_request_id = Struct('<Q').pack
_indices = Struct('<II').pack
_figures = Struct('<ddd?').pack


def _text(text: str) -> bytes:
    """Serialise a string that starts 4-byte aligned, with padding to the next multiple of 4."""
    data = text.encode()
    return _length(len(data) + 1) + data + _PADDING[len(data) & 3]


def string(text: str) -> bytes:
    """Serialise a std_msgs/String."""
    return _LITTLE_ENDIAN + _text(text)


def float64(value: float) -> bytes:
    """Serialise a std_msgs/Float64."""
    return _float64(_LITTLE_ENDIAN, value)


class StampedToken:
    """Serialises the physai_decode_msgs/Token of ``~/stamped_tokens``."""

    def __init__(self, node: str) -> None:
        """
        Serialise the constant parts.

        :param node: the node's fully qualified name.
        """
        frame_id = _text(node)
        self._frame_id = frame_id + b'\0' * (len(frame_id) & 4)     # the next field is 8-aligned

    def write(self, report: TokenReport, text: str, now_ns: int) -> bytes:
        """Serialise one token; see `TokenStats.write`."""
        texts = b''.join((
            _text(report.client_id), _indices(report.index, messages.token_id(report)),
            _text(text), _text(messages.sendable(report.reasoning))))
        return b''.join((
            _stamp(_LITTLE_ENDIAN, *divmod(now_ns, 10**9)), self._frame_id,
            _request_id(report.request_id), texts, b'\0' * (len(texts) & 4),
            _figures(*(nan if value is None else value for value in (
                report.itl_ms, report.device_ms, report.r_floor)), report.deadline_missed)))


class TokenStats:
    """Serialises the diagnostic_msgs/DiagnosticArray of ``~/token_stats``."""

    def __init__(self, node: str) -> None:
        """
        Serialise the constant parts.

        :param node: the node's fully qualified name.
        """
        name = _text(messages.status_name(node, 'token'))
        self._frame_id = _text(node) + _length(1)               # one status follows
        self._levels = {late: level + b'\0\0\0' + name for late, level in (
            (False, messages.OK), (True, messages.WARN))}
        self._values = _text('') + _length(len(messages.TOKEN_KEYS))    # an empty hardware_id
        self._keys = [_text(key) for key in messages.TOKEN_KEYS]
        self._fields = attrgetter(*messages.TOKEN_KEYS)

    def write(self, report: TokenReport, text: str, now_ns: int) -> bytes:
        """
        Serialise the figures of one token.

        :param text: the message of the status, without NUL.
        :param now_ns: the stamp of the header, in nanoseconds.
        """
        values = map(messages.text_of, self._fields(report))
        parts = [_stamp(_LITTLE_ENDIAN, *divmod(now_ns, 10**9)), self._frame_id,
                 self._levels[report.deadline_missed], _text(text), self._values]
        for key, value in zip(self._keys, values):
            data = value.encode()
            parts += (key, _length(len(data) + 1), data, _PADDING[len(data) & 3])
        return b''.join(parts)
