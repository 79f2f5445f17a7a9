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

"""The node's process: it handles signals, runs the executor, and exits in bounded time."""

from contextlib import suppress
import os
from pathlib import Path
import signal
import sys
import threading
import time

from physai_decode.config import ConfigError
from physai_decode.host import Load
from physai_decode.host import load
from physai_decode.ros import dds
from physai_decode.ros import memory
from physai_decode.ros import params_files
from physai_decode.ros import responses
from physai_decode.ros import SIGNALS
from physai_decode.ros import watchdog
from physai_decode.ros.executor import Executor
from physai_decode.ros.launcher import Launcher
from physai_decode.ros.node import DecodeNode
from physai_decode.ros.node import EXIT_TIMEOUT_S
import rclpy
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

EXIT_LIMIT_S = 1.5              # from a signal to the end of the process, even if a thread hangs
FLUSH_S = 0.4                   # of EXIT_LIMIT_S, to send the last messages
DESTROY_S = 0.1                 # of EXIT_LIMIT_S, to destroy the node
POLL_S = 0.1                    # period at which the main thread checks signals and the launcher
THREADS = 3                     # of the executor; node.py describes their use
USAGE = 'decode_node [--ros-args [--params-file FILE] [-p NAME:=VALUE] [-r OLD:=NEW] ...]'
HELP = """Run a language model on ROS topics, until SIGINT or SIGTERM.

  --params-file FILE    read parameters from a YAML file, such as config/decode.yaml
  -p NAME:=VALUE        set a parameter, such as model.path:=/path/to/folder
  -r OLD:=NEW           rename a topic; __node:=NAME and __ns:=/NAMESPACE rename the node

docs/interface.md lists all parameters. While the node runs, ros2 param describe explains one:
  ros2 param describe /decode model.path"""


class Exit:
    """The request to end the process, and its exit code; any thread may make it."""

    def __init__(self) -> None:
        """Request nothing yet."""
        self.code = 0
        self._event = threading.Event()

    def request(self, code: int = 0) -> None:
        """End the process with this exit code, or a higher one that was requested before."""
        self.code = max(self.code, code)
        self._event.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a request; False after the timeout."""
        return self._event.wait(timeout_s)


def spin(executor: Executor, ending: Exit) -> None:
    """Run callbacks until the executor is shut down; then, or if it fails, end the process."""
    try:
        executor.spin()
    except BaseException:
        ending.request(code=1)  # so that systemd restarts the node
        raise
    ending.request()


def replace_closed_streams() -> None:
    """Open /dev/null as each closed standard stream; a socket would get the log otherwise."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # takes the lowest number that is free


def _advice(error: Exception, files: list[str]) -> str:
    """Say what to do about an error of rclpy, if that is known."""
    if 'failed to initialize logging' in str(error):
        return ': set ROS_LOG_DIR to a folder that can be written'
    if 'Sequence should be of same type' in str(error):
        return ': give all values of the list one type, such as [0.0, 1.5]'
    if "Couldn't parse params file" in str(error):
        return f': {params_files.advice(files)}'
    if "Couldn't parse parameter override rule" in str(error):
        return ": expected -p NAME:=VALUE, with '' as an empty text"
    if "Couldn't parse remap rule" in str(error):
        return (': expected -r OLD:=NEW; a namespace begins with /, and names consist of letters, '
                'digits and _')
    return ''


def main(args: list[str] | None = None, load: Load = load) -> int:
    """
    Run the node until a signal, then end the process; return only if it can't start.

    The exit code is 0 after a signal or the end of the launcher, and 1 if the executor failed.

    :raises SystemExit: there is too little memory to start.
    """
    memory.check_address_space()
    ending, launcher = Exit(), Launcher()
    args = sys.argv if args is None else args
    # New threads inherit this mask, so the signals stay pending, where the loop below and the
    # watchdog see them. A handler alone would not do, because libraries replace handlers. This one
    # is for threads that already run.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, lambda *_: ending.request())
    replace_closed_streams()
    watchdog.start()
    dds.configure()
    responses.release_lock()
    files = params_files.from_arguments(args)
    for file in files:
        if not Path(file).exists():
            print(f'decode_node: there is no params file {file}: correct the path after '
                  '--params-file', file=sys.stderr)
            return 1
    try:
        # rclpy's signal handlers would shut down the context before the last messages are sent.
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        unexpected = remove_ros_args(args)[1:]
    except (RuntimeError, ValueError) as error:     # such as a params file that can't be parsed
        print(f'decode_node: {type(error).__name__}: {error}{_advice(error, files)}',
              file=sys.stderr)
        return 1
    if unexpected and unexpected[0] in ('-h', '--help'):
        print(f'usage: {USAGE}\n\n{HELP}')
        rclpy.shutdown()
        return 0
    if unexpected:
        print(f'decode_node: unexpected argument {unexpected[0]}; usage: {USAGE}', file=sys.stderr)
        rclpy.shutdown()
        return 2
    try:
        node = DecodeNode(load, params_files=files)
    except Exception as error:          # rclpy raises many types for its own parameters
        kind = '' if isinstance(error, ConfigError) else f'{type(error).__name__}: '
        rclpy.logging.get_logger('decode').fatal(f'{kind}{error}')
        rclpy.shutdown()
        return 1
    executor = Executor(THREADS, node.faults.note)
    executor.add_node(node)
    thread = threading.Thread(target=spin, args=(executor, ending), name='executor')
    thread.start()
    while not ending.wait(POLL_S):
        if signal.sigpending().intersection(SIGNALS):
            ending.request()
        if launcher.ended():
            node.get_logger().warning('the process that launched this node has ended: ending too')
            ending.request()
    # The process ends in time even if a driver hangs while its memory is freed.
    deadline = threading.Timer(EXIT_LIMIT_S, lambda: os._exit(ending.code))
    deadline.daemon = True
    deadline.start()
    end_s = time.monotonic() + EXIT_LIMIT_S - DESTROY_S
    closed = node.close(EXIT_TIMEOUT_S)
    executor.settle(end_s - FLUSH_S - time.monotonic())     # callbacks send the results of goals
    node.flush(end_s - time.monotonic())
    if closed:
        executor.shutdown()
        thread.join()
        node.destroy_node()
        rclpy.shutdown()
    # Only this ends a thread that hangs in a load or a kernel. It also skips Python's teardown of
    # torch, which takes up to two seconds.
    with suppress(AttributeError, OSError):         # None if it is closed
        sys.stdout.flush()
    os._exit(ending.code)


if __name__ == '__main__':
    sys.exit(main())
