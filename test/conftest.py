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

"""Each test process has a ROS domain of its own, on the loopback only."""

import gc
from glob import glob
from itertools import chain
import os
import signal
import socket
import sys


def claim_domain() -> tuple[int, socket.socket]:
    """
    Give a domain that no other test process has, and the socket that holds it to the end.

    :raises RuntimeError: all are taken.
    """
    held, first = socket.socket(socket.AF_UNIX), os.getpid() % 100
    for domain in chain(range(1 + first, 101), range(1, 1 + first)):
        try:
            held.bind(f'\0physai_decode/test/domain/{domain}')      # a name, not a file
        except OSError:
            continue
        return domain, held
    raise RuntimeError('100 test processes run at once: wait for one to end')


domain, held = claim_domain()
os.environ['ROS_DOMAIN_ID'] = str(domain)
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
os.environ.pop('ROS_LOCALHOST_ONLY', None)      # of which later distributions warn
if os.environ.get('ROS_DISTRO') == 'humble':    # the same there
    os.environ['ROS_LOCALHOST_ONLY'] = '1'
os.environ.setdefault('OMP_NUM_THREADS', '1')
# A shell's background job ignores Ctrl-C, and hands that on to the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not glob('/dev/nvidia[0-9]*'):               # before anything imports Triton
    os.environ.setdefault('TRITON_INTERPRET', '1')


def pytest_collection_finish(session):
    """Spare the tests what each would do again: see the two functions."""
    leave_out_of_garbage_collection()
    patch_language_once()


def leave_out_of_garbage_collection():
    """
    Keep the garbage collections of each load and request from searching all of torch.

    A worker would let them, at its end.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def patch_language_once():
    """
    Let Triton's interpreter patch the language once for the functions of a module.

    It does so at every call of a device function, which takes half the time of a kernel. What that
    leaves unpatched at the end is patched for each kernel anyway.
    """
    interpreter = sys.modules.get('triton.runtime.interpreter')
    if not interpreter:
        return
    patched, call = set(), interpreter.InterpretedFunction.__call__

    def call_patched(function, *arguments, **named):
        module = function.fn.__module__
        if module in patched:
            return function.rewrite()(*arguments, **named)
        patched.add(module)
        return call(function, *arguments, **named)

    interpreter.InterpretedFunction.__call__ = call_patched
