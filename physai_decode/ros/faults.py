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

"""Errors that the node survives: each is logged and counted."""

import threading

from physai_decode.engine import described
from rclpy.impl.rcutils_logger import RcutilsLogger

LOG_PERIOD_S = 1.0              # at most one line per period, so that errors don't flood the log


class Faults:
    """The exceptions raised in callbacks, most often by malformed messages or calls."""

    def __init__(self, logger: RcutilsLogger) -> None:
        """Start with a count of 0."""
        self.count = 0
        self._logger = logger
        self._lock = threading.Lock()

    def note(self, where: str, error: BaseException) -> None:
        """
        Count an error and log it with the line of code that raised it; from any thread.

        :param where: the source of the error, such as a topic.
        """
        with self._lock:
            self.count += 1
            count = self.count
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        line = '' if trace is None else \
            f' ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})'
        self._logger.error(
            f'{where} failed; the node continues: {described(error)}{line}; callback_errors: '
            f'{count}', throttle_duration_sec=LOG_PERIOD_S)
