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

"""A multi-threaded executor that survives exceptions in callbacks."""

from collections.abc import Callable
import threading
import time
from typing import Any

import rclpy.executors
from rclpy.executors import ExternalShutdownException
from rclpy.executors import ShutdownException
from rclpy.executors import TimeoutException
from rclpy.task import Task

MAX_FAILURES = 10               # consecutive failures of the wait for work
POLL_S = 0.001
WAITING = 'waiting for callbacks'


class Executor(rclpy.executors.Executor):
    """
    One thread waits for a callback and then runs it, while the next thread waits.

    rclpy's own executors end with the first exception in a callback, so any participant could end
    a node with a message that can't be deserialised. This executor reports the exception and
    continues.
    """

    def __init__(self, threads: int, note: Callable[[str, Exception], None]) -> None:
        """
        Create the executor; `spin` starts its threads.

        :param threads: how many callbacks may run at once.
        :param note: called from any thread with the source of an exception and the exception.
        """
        super().__init__()
        self._count, self._note = threads, note
        self._wait_lock = threading.Lock()      # held by the thread that waits for work
        self._running: set[Task] = set()        # rclpy returns a task again until it has begun
        self._failures = 0                      # consecutive; guarded by _wait_lock

    def spin(self) -> None:
        """
        Run callbacks until the executor is shut down.

        :raises Exception: waiting for work failed `MAX_FAILURES` times in a row.
        """
        errors: list[BaseException] = []

        def serve() -> None:
            try:
                while self._context.ok() and not self._is_shutdown:
                    self.spin_once()
            except BaseException as error:
                errors.append(error)
                self.shutdown()

        threads = [threading.Thread(target=serve, name='executor')
                   for _ in range(self._count - 1)]
        for thread in threads:
            thread.start()
        serve()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """
        Wait for one callback and run it; from any thread.

        :raises Exception: waiting for work failed `MAX_FAILURES` times in a row.
        """
        with self._wait_lock:
            try:
                task, entity, _ = self.wait_for_ready_callbacks(timeout_sec=timeout_sec)
                self._failures = 0
            except (ShutdownException, ExternalShutdownException, TimeoutException):
                return
            except Exception as error:          # such as an entity that was just destroyed
                self._failures += 1
                if self._failures == MAX_FAILURES:
                    raise
                self._note(WAITING, error)
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
        Wait until no task is left, while other threads run them; False after the timeout.

        This includes tasks that callbacks created with `create_task`, such as rclpy's response to
        the client that waits for a goal's result.
        """
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            with self._tasks_lock:
                if all(task.done() for task, _, _ in self._tasks):
                    return True
            time.sleep(POLL_S)
        return False

    def _make_handler(self, entity: Any, node: Any, take: Callable[[Any], Any],
                      *execute: Any) -> Task:
        """
        Create the task of an entity that is ready.

        An exception while a message is taken must not reach rclpy's handler, which would never
        serve the entity and its callback group again.
        """
        def take_safely(entity: Any) -> Any:
            try:
                return take(entity)
            except Exception as error:
                self._note(_name(entity), error)
                return None                     # to rclpy: there was no message

        return super()._make_handler(entity, node, take_safely, *execute)


def _name(entity: Any) -> str:
    """Name the topic, service, action or entity of a callback."""
    for attribute in ('topic_name', 'srv_name', '_action_name'):
        if name := getattr(entity, attribute, ''):
            return name
    return 'a task' if entity is None else f'a {type(entity).__name__.lower()}'
