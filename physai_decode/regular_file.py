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
Files of data, opened so that nothing that lies in their place can hang the reader or fill memory.

A FIFO blocks whoever opens it, and a device such as ``/dev/zero`` has no end. So a path is opened
without waiting, and what was opened is looked at: nobody can put something else there in between.
Links are followed, as caches of models are made of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import stat
from typing import BinaryIO

from physai_decode.engine import EngineError

_KINDS = {stat.S_IFIFO: 'a FIFO', stat.S_IFCHR: 'a device', stat.S_IFBLK: 'a device',
          stat.S_IFSOCK: 'a socket', stat.S_IFDIR: 'a folder'}


def check(path: Path, most_bytes: int | None = None) -> None:
    """
    Look at a path without opening it, for a reader that opens it later by itself.

    :param most_bytes: None: of any size.
    :raises EngineError: it is no regular file, or larger.
    :raises OSError: it can't be looked at.
    """
    _check(path, path.stat(), most_bytes)


@contextmanager
def opened(path: Path, most_bytes: int | None = None) -> Iterator[BinaryIO]:
    """
    Open a regular file to read it.

    :param most_bytes: None: of any size.
    :raises EngineError: it is no regular file, or larger.
    :raises OSError: it can't be opened.
    """
    with open(path, 'rb', opener=_open) as file:
        _check(path, os.fstat(file.fileno()), most_bytes)
        yield file


def read(path: Path, most_bytes: int) -> bytes:
    """
    Read a regular file.

    :raises EngineError: it is no regular file, or larger than ``most_bytes``.
    :raises OSError: it can't be read.
    """
    with opened(path, most_bytes) as file:
        content = file.read(most_bytes + 1)
        if len(content) > most_bytes:       # it grew
            raise _too_large(path, len(content), most_bytes)
        return content


def _open(path, flags):
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _check(path, status, most_bytes):
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), 'something else')
        raise EngineError(f'{path} is {kind}, not a regular file: remove it, and copy or download '
                          'the model again')
    if most_bytes is not None and status.st_size > most_bytes:
        raise _too_large(path, status.st_size, most_bytes)


def _too_large(path, size, most_bytes):
    return EngineError(f'{path} has {size} bytes, and no file of its kind more than {most_bytes}: '
                       'copy or download the model again')
