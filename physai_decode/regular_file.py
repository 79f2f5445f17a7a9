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
Open data files so that no FIFO can block the reader and no device can fill the memory.

Opening a FIFO blocks, and a device such as ``/dev/zero`` has no end. A path is therefore opened
without blocking, and the type of the open file is checked, so that it cannot be swapped between
check and read. Symbolic links are followed, because model caches consist of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
import os
from pathlib import Path
import stat

from physai_decode.engine import EngineError

ADVICE = '; copy or download the model again'
_KINDS = {stat.S_IFIFO: 'a FIFO', stat.S_IFCHR: 'a device', stat.S_IFBLK: 'a device',
          stat.S_IFSOCK: 'a socket', stat.S_IFDIR: 'a folder'}


def check(path: Path, most_bytes: int | None = None) -> None:
    """
    Check a path without opening it, for a library that opens it later by itself.

    :param most_bytes: size limit; None for no limit.
    :raises EngineError: the path is not a regular file, or the file is larger.
    :raises OSError: the path cannot be accessed.
    """
    _check(path, path.stat(), most_bytes, ADVICE)


@contextmanager
def opened(path: Path, most_bytes: int | None = None,
           advice: str = ADVICE) -> Iterator[BufferedReader]:
    """
    Open a regular file for reading.

    :param most_bytes: size limit; None for no limit.
    :param advice: end of the message of an EngineError.
    :raises EngineError: the path is not a regular file, or the file is larger.
    :raises OSError: the file cannot be opened.
    """
    with open(path, 'rb', opener=_open) as file:
        _check(path, os.fstat(file.fileno()), most_bytes, advice)
        yield file


def read(path: Path, most_bytes: int, advice: str = ADVICE) -> bytes:
    """
    Read a regular file.

    :param advice: end of the message of an EngineError.
    :raises EngineError: the path is not a regular file, or larger than ``most_bytes``.
    :raises OSError: the file cannot be read.
    """
    with opened(path, most_bytes, advice) as file:
        content = file.read(most_bytes + 1)
        if len(content) > most_bytes:       # the file grew since the check
            raise _too_large(path, len(content), most_bytes, advice)
        return content


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _check(path: Path, status: os.stat_result, most_bytes: int | None, advice: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), 'something else')
        raise EngineError(f'{path} is {kind}, not a regular file{advice}')
    if most_bytes is not None and status.st_size > most_bytes:
        raise _too_large(path, status.st_size, most_bytes, advice)


def _too_large(path: Path, size: int, most_bytes: int, advice: str) -> EngineError:
    return EngineError(
        f'{path} has {size} bytes: at most {most_bytes} are allowed for this file{advice}')
