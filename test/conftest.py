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

"""Gives each test process its own ROS domain on the loopback, and speeds up all tests."""

from collections import Counter
from dataclasses import replace
import gc
from glob import glob
from itertools import chain
import os
import signal
import socket
import sys

from physai_decode.ros import dds
import pytest


def claim_domain() -> tuple[int, socket.socket]:
    """
    Return a ROS domain that no other test process uses, and the socket that reserves it.

    :raises RuntimeError: all domains are taken.
    """
    reservation, first = socket.socket(socket.AF_UNIX), os.getpid() % 100
    for domain in chain(range(1 + first, 101), range(1, 1 + first)):
        try:
            reservation.bind(f'\0physai_decode/test/domain/{domain}')  # not a file
        except OSError:
            continue
        return domain, reservation
    raise RuntimeError('100 test processes run at once: wait for one to end')


domain, reservation = claim_domain()
os.environ['ROS_DOMAIN_ID'] = str(domain)
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
os.environ.pop('ROS_LOCALHOST_ONLY', None)      # deprecated in later distributions
if os.environ.get('ROS_DISTRO') == 'humble':    # the variable of Humble
    os.environ['ROS_LOCALHOST_ONLY'] = '1'
os.environ.setdefault('OMP_NUM_THREADS', '1')
# A shell's background jobs ignore SIGINT, and nohup's SIGHUP. The programs that tests interrupt
# would inherit this.
for signum, handler in ((signal.SIGINT, signal.default_int_handler),
                        (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, handler)
dds.configure()
if not glob('/dev/nvidia[0-9]*'):               # before anything imports Triton
    os.environ.setdefault('TRITON_INTERPRET', '1')
modules, freeze = 0, gc.freeze
gc.freeze = gc.unfreeze = lambda: None          # see leave_out_of_garbage_collection


@pytest.fixture(scope='module', autouse=True)
def shut_down_ros():
    """Keep a failed fixture of one module from failing the modules after it."""
    yield
    if 'rclpy' in sys.modules:
        sys.modules['rclpy'].try_shutdown()


@pytest.fixture(autouse=True)
def leave_out_of_garbage_collection():
    """
    Exclude torch and all other modules so far from the collections of each load and request.

    A worker that ends would include them again, so only this can freeze.
    """
    global modules
    if modules != len(sys.modules):
        gc.collect()
        freeze()
        modules = len(sys.modules)


@pytest.fixture
def native():
    """Return the class of the native engine, which needs torch."""
    pytest.importorskip('torch')
    from physai_decode.engines.native import NativeEngine
    return NativeEngine


@pytest.fixture
def no_transformers(monkeypatch):
    """Let imports of transformers fail, as if it were not installed."""
    monkeypatch.setitem(sys.modules, 'transformers', None)
    for name in [name for name in sys.modules
                 if name.startswith('physai_decode.engines.transformers')]:
        monkeypatch.delitem(sys.modules, name)


def pytest_configure(config):
    """Let several processes take the modules in the order that follows."""
    config.option.loadscopereorder = False      # of pytest-xdist


def pytest_collection_modifyitems(items):
    """Run the modules with slow tests first, so that none is left to one process at the end."""
    counts = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker('slow'))
    items.sort(key=lambda item: (-slow[item.path], -counts[item.path]))


def pytest_collection_finish(session):
    """Speed up Triton's interpreter, and make its matrix products exact."""
    interpreter = sys.modules.get('triton.runtime.interpreter')
    if interpreter and 'TRITON_INTERPRET' in os.environ:    # else kernels are compiled, for a GPU
        skip_unused_checks(interpreter)
        look_up_types(interpreter)
        patch_language_once(interpreter)
        round_products_once(interpreter)


def skip_unused_checks(interpreter):
    """Skip the checks for overflow, which take half the time of a kernel and report nothing."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug            # with which the checks would report
    builder.options = replace(builder.options, sanitize_overflow=False)


def look_up_types(interpreter):
    """Look up the types of NumPy and of blocks, which each operation would make again."""
    known, numpy_type = {}, interpreter._get_np_dtype

    def look_up(kind):
        found = known.get(kind.name)
        if found is None:
            found = known[kind.name] = numpy_type(kind)
        return found

    interpreter._get_np_dtype = look_up
    interpreter.tl.block_type.to_ir = lambda self, builder: self


def patch_language_once(interpreter):
    """
    Patch the language once per module.

    Otherwise, each call of a device function patches it, which takes half the time of a kernel.
    Each kernel also patches it, so nothing stays unpatched.
    """
    patched, call = set(), interpreter.InterpretedFunction.__call__

    def call_patched(function, *arguments, **named):
        module = function.fn.__module__
        if module in patched:
            return function.rewrite()(*arguments, **named)
        patched.add(module)
        return call(function, *arguments, **named)

    interpreter.InterpretedFunction.__call__ = call_patched


def round_products_once(interpreter):
    """
    Compute matrix products in float64.

    Otherwise, the last bits of a row depend on its place in the matrix, on some processors.
    """
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot = builder.create_dot

    def create_rounded(self, a, b, d, *options):
        if a.data.dtype.kind != 'f' or b.data.dtype.kind != 'f':
            return create_dot(self, a, b, d, *options)
        product = a.data.astype('float64') @ b.data.astype('float64')
        return handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.create_dot = create_rounded
