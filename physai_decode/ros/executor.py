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

"""The executor: threads that take turns, and that no error in a callback ends."""

from collections.abc import Callable
import threading
import time
from typing import Any

import rclpy.executors
from rclpy.executors import ExternalShutdownException
from rclpy.executors import ShutdownException
from rclpy.executors import TimeoutException
from rclpy.task import Task

LAST_FAILURE = 10               # waits for work that fail one after the other
POLL_S = 0.001


class Executor(rclpy.executors.Executor):
    """
    One thread waits for work and then does it, while the next one waits.

    rclpy's own executors end with the first exception in a callback, so that any participant can
    end a node by a message that can't be read. This one notes it and goes on.
    """

    def __init__(self, threads: int, note: Callable[[str, Exception], None]) -> None:
        """
        Serve nothing yet.

        :param threads: callbacks that may run at once.
        :param note: gets what an exception came from, and the exception; from any thread.
        """
        super().__init__()
        self._count, self._note = threads, note
        self._turn = threading.Lock()           # held while waiting for work
        self._running: set[Task] = set()        # rclpy offers a task until it has begun
        self._failures = 0                      # of waits in a row; both guarded by _turn

    def spin(self) -> None:
        """
        Serve callbacks until the executor is shut down.

        :raises Exception: it can't wait for work, however often it tries.
        """
        broken: list[BaseException] = []

        def serve():
            try:
                while self._context.ok() and not self._is_shutdown:
                    self.spin_once()
            except BaseException as error:
                broken.append(error)
                self.shutdown()

        threads = [threading.Thread(target=serve, name='executor')
                   for _ in range(self._count - 1)]
        for thread in threads:
            thread.start()
        serve()
        for thread in threads:
            thread.join()
        if broken:
            raise broken[0]

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """
        Wait for one callback and run it; from any thread.

        :raises Exception: waiting has failed `LAST_FAILURE` times in a row.
        """
        with self._turn:
            try:
                task, entity, _ = self.wait_for_ready_callbacks(timeout_sec=timeout_sec)
                self._failures = 0
            except (ShutdownException, ExternalShutdownException, TimeoutException):
                return
            except Exception as error:          # as where an entity was destroyed meanwhile
                self._failures += 1
                if self._failures == LAST_FAILURE:
                    raise
                self._note('waiting for callbacks', error)
                return
            if task in self._running:
                return
            self._running.add(task)
        try:
            task()
        finally:
            self._running.discard(task)
        raised = task.exception()
        if raised is not None and not self._is_shutdown:
            self._note(_name(entity), raised)

    def settle(self, timeout_s: float) -> bool:
        """
        Wait until no callback runs or is about to, while others serve; False after the timeout.

        What callbacks have asked for by `create_task`, such as rclpy's answer to who waits for a
        goal's result, is done then.
        """
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            with self._tasks_lock:
                if all(task.done() for task, _, _ in self._tasks):
                    return True
            time.sleep(POLL_S)
        return False

    def _make_handler(self, entity, node, take, *execute):
        """
        Make a task of what is ready.

        An exception in taking a message must not reach rclpy's handler, which would leave the
        entity taken for ever and its callback group closed.
        """
        def taken(entity):
            try:
                return take(entity)
            except Exception as error:
                self._note(_name(entity), error)
                return None                     # as where there was no message

        return super()._make_handler(entity, node, taken, *execute)


def _name(entity: Any) -> str:
    """Name what a callback belongs to."""
    for attribute in ('topic_name', 'srv_name', '_action_name'):
        if name := getattr(entity, attribute, ''):
            return name
    return 'a task' if entity is None else f'a {type(entity).__name__.lower()}'
