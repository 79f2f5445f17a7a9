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
Responses of services are sent without the interpreter's lock.

The middleware waits up to 100 ms for a client that it has not matched, because the client called
before the node discovered it, or because its QoS does not fit. rclpy holds the lock meanwhile, so
each such call would stop all threads of the process, decoding included.
"""

from collections.abc import Callable
from ctypes import c_bool
from ctypes import c_char_p
from ctypes import c_int
from ctypes import c_int64
from ctypes import c_void_p
from ctypes import CDLL
from ctypes import py_object
from ctypes import PYFUNCTYPE
from ctypes import pythonapi
from typing import Any
import warnings

from rclpy.action.server import RCLError
from rclpy.impl.implementation_singleton import rclpy_implementation as _rclpy

TIMEOUT = 2                     # RCL_RET_TIMEOUT
GUID_BYTES = 16                 # of rmw_request_id_t, before its sequence number

_pointer_of = PYFUNCTYPE(c_void_p, py_object, c_char_p)(('PyCapsule_GetPointer', pythonapi))
# The type support of a message in C; these functions keep the lock.
_CREATE = PYFUNCTYPE(c_void_p)
_CONVERT = PYFUNCTYPE(c_bool, py_object, c_void_p)
_DESTROY = PYFUNCTYPE(None, c_void_p)


def release_lock() -> None:
    """Replace the methods of rclpy that send a response, in this process."""
    try:
        if type(_rclpy.rmw_request_id_t).__name__ != 'pybind11_type':       # see _address
            return
        rcl, action = CDLL('librcl.so'), CDLL('librcl_action.so')
        reset_error = CDLL('librcutils.so').rcutils_reset_error
        _replace(_rclpy.Service, 'service_send_response', rcl.rcl_send_response, reset_error)
        for name in ('goal', 'cancel', 'result'):
            _replace(_rclpy.ActionServer, f'send_{name}_response',
                     getattr(action, f'rcl_action_send_{name}_response'), reset_error)
    except (AttributeError, OSError):   # another platform or version: rclpy's own methods remain
        return


def _replace(kind: Any, name: str, send: Any, reset_error: Callable[[], object]) -> None:
    """Replace a method that takes a request id and a response, in any order."""
    own = getattr(kind, name)
    if getattr(own, 'is_replaced', False):
        return
    send.argtypes, send.restype = (c_void_p, c_void_p, c_void_p), c_int

    def method(self: Any, first: Any, second: Any) -> None:
        request_id, response = (first, second) if isinstance(
            first, _rclpy.rmw_request_id_t) else (second, first)
        address = _address(request_id)
        if not address:
            own(self, first, second)
            return
        create, convert, destroy = (
            prototype(_pointer_of(getattr(type(response), f'_{each}'), None))
            for prototype, each in ((_CREATE, 'CREATE_ROS_MESSAGE'),
                                    (_CONVERT, 'CONVERT_FROM_PY'),
                                    (_DESTROY, 'DESTROY_ROS_MESSAGE')))
        message = create()
        try:
            if not (message and convert(response, message)):
                raise RCLError(f'{response!r:.200} cannot be converted')
            with self:          # it is not destroyed meanwhile
                code = send(self.pointer, address, message)
        finally:
            destroy(message)
        if code:
            reset_error()
        if code == TIMEOUT:
            warnings.warn('a client will not receive its response, because it was not discovered',
                          RuntimeWarning, stacklevel=2)
        elif code:
            raise RCLError(f'failed to send a response: error {code} of rcl')

    method.is_replaced = True           # type: ignore[attr-defined]
    setattr(kind, name, method)


def _address(request_id: Any) -> int | None:
    """
    Return the address of the rmw_request_id_t in an object of rclpy, None if it is not there.

    pybind11 stores it right after the head of the object.
    """
    address = c_void_p.from_address(id(request_id) + object.__basicsize__).value
    if address and c_int64.from_address(
            address + GUID_BYTES).value == request_id.sequence_number:
        return address
    return None
