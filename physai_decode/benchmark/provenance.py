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

"""Hashes of what a measurement depends on besides its settings."""

from collections.abc import Iterable
from collections.abc import Mapping
import hashlib
import os
from pathlib import Path
import platform
import re

from physai_decode import checkpoint
from physai_decode.benchmark import machine

_PACKAGE = Path(__file__).resolve().parent.parent


def provenance(model: str) -> dict[str, str]:
    """
    Return a hash for each of model, code, packages and machine.

    The files of a checkpoint are compared by name, size and modification time.

    :param model: as `checkpoint.locate` takes it; empty for random weights, which follow from the
        settings and the code. A model of the hub is compared only if it is in the local cache.
    """
    return {
        'model': _digest(_files(model)),
        'code': _digest(path.read_bytes().hex() for path in sorted(_PACKAGE.rglob('*.py'))),
        'packages': _digest([platform.python_version(),
                             *map(str, sorted(machine.packages().items()))]),
        'machine': _digest([platform.release(), _cpu(), str(sorted(os.sched_getaffinity(0))),
                            str(machine.driver()), *machine.gpus(),
                            os.environ.get('CUDA_VISIBLE_DEVICES', 'all')]),
    }


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of what has changed."""
    return [name for name in now if before.get(name) != now[name]]


def _files(model: str) -> Iterable[str]:
    folder = checkpoint.local_folder(model) if model else None
    if folder is None:
        return []
    try:
        return [f'{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}'
                for path in sorted(folder.rglob('*')) if path.is_file()]
    except OSError:
        return []                   # the session reports the reason


def _cpu() -> str:
    try:
        return str(set(re.findall(r'^model name.*', Path('/proc/cpuinfo').read_text(), re.M)))
    except OSError:
        return platform.machine()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256('\0'.join(parts).encode(errors='surrogateescape')).hexdigest()[:16]
