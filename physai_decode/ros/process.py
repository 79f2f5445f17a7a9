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

"""The node's process: signals, the executor, and an end in bounded time whatever hangs."""

import os
import signal
import sys
import threading
import time

from physai_decode.config import ConfigError
from physai_decode.host import load
from physai_decode.ros import params_files
from physai_decode.ros import room
from physai_decode.ros import watchdog
from physai_decode.ros.executor import Executor
from physai_decode.ros.node import DecodeNode
from physai_decode.ros.node import EXIT_TIMEOUT_S
from physai_decode.ros.parent import Parent
import rclpy
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

EXIT_LIMIT_S = 1.5              # from a signal seen to the end of the process, whatever hangs
FLUSH_S = 0.4                   # of it, for the last messages to be sent and heard
SPARE_S = 0.1                   # of it, for taking the node down
POLL_S = 0.1                    # how often the main thread looks for signals and the launcher
THREADS = 3                     # of the executor; node.py says what they are for


class Ending:
    """Why the process ends, once it does; any thread may say so."""

    def __init__(self) -> None:
        """Go on."""
        self.code = 0
        self._event = threading.Event()

    def begin(self, code: int = 0) -> None:
        """End the process with this exit code, or a worse one."""
        self.code = max(self.code, code)
        self._event.set()

    def begun(self, timeout_s: float) -> bool:
        """Tell, within this time, whether the process ends."""
        return self._event.wait(timeout_s)


def spin(executor: Executor, ending: Ending) -> None:
    """Serve callbacks until the executor is shut down; where it can't, the process ends."""
    try:
        executor.spin()
    except BaseException:
        ending.begin(code=1)    # so that systemd restarts the node
        raise
    ending.begin()


def main(args: list[str] | None = None, load=load) -> int:
    """
    Run the node until SIGINT or SIGTERM, then end the process; returns where it can't start.

    The exit code is 0 for a signal or the end of the launcher, and 1 where the executor is broken.

    :raises SystemExit: there is no room to start.
    """
    room.check_address_space()
    ending, parent = Ending(), Parent()
    args = sys.argv if args is None else args
    signals = signal.SIGINT, signal.SIGTERM
    # Blocked here, and so in every thread to come, and looked for below: a handler may be replaced
    # by a library's. They stay pending, for the watchdog to see. This handler is for threads that
    # are older.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for number in signals:
        signal.signal(number, lambda *_: ending.begin())
    watchdog.start()
    # Fast DDS sends in a thread of its own then: a slow network does not hold up decoding.
    os.environ.setdefault('RMW_FASTRTPS_PUBLICATION_MODE', 'ASYNCHRONOUS')
    try:
        # rclpy's own handlers would end the context before the last messages are out.
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        others = remove_ros_args(args)[1:]
    except (RuntimeError, ValueError) as error:     # a params file that is not there, a slip
        print(f'decode_node: {type(error).__name__}: {error}', file=sys.stderr)
        return 1
    if others:
        print(f'decode_node: it takes no {others[0]}; usage: decode_node [--ros-args '
              '[--params-file FILE] [-p NAME:=VALUE] [-r OLD:=NEW] ...]', file=sys.stderr)
        rclpy.shutdown()
        return 2
    try:
        node = DecodeNode(load, params_files=params_files.given(args))
    except Exception as error:          # rclpy's own parameters raise whatever is behind them
        kind = '' if isinstance(error, ConfigError) else f'{type(error).__name__}: '
        rclpy.logging.get_logger('decode').fatal(f'{kind}{error}')
        rclpy.shutdown()
        return 1
    executor = Executor(THREADS, node.faults.note)
    executor.add_node(node)
    thread = threading.Thread(target=spin, args=(executor, ending), name='executor')
    thread.start()
    while not ending.begun(POLL_S):
        if signal.sigpending().intersection(signals):
            ending.begin()
        if parent.ended():
            node.get_logger().warning('the process that launched this one has ended: ending too')
            ending.begin()
    # Whatever a driver does while its memory is freed, the process ends when it was told to.
    last = threading.Timer(EXIT_LIMIT_S, lambda: os._exit(ending.code))
    last.daemon = True
    last.start()
    end_s = time.monotonic() + EXIT_LIMIT_S - SPARE_S
    closed = node.close(EXIT_TIMEOUT_S)
    executor.settle(end_s - FLUSH_S - time.monotonic())     # goals get their results in callbacks
    node.flush(end_s - time.monotonic())
    if closed:
        executor.shutdown()
        thread.join()
        node.destroy_node()
        rclpy.shutdown()
    # Else a thread hangs in a load or a kernel, which nothing but this can end. And where all has
    # ended well, Python would take up to two seconds to take torch apart, for nothing.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ending.code)


if __name__ == '__main__':
    sys.exit(main())
