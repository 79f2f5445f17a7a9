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

"""What a measurement depends on besides its settings, as hashes to compare."""

from collections.abc import Iterable
from collections.abc import Mapping
import hashlib
import os
from pathlib import Path
import platform

from physai_decode import checkpoint
from physai_decode.benchmark import machine
from physai_decode.engine import EngineError

_PACKAGE = Path(__file__).resolve().parent.parent


def provenance(model: str) -> dict[str, str]:
    """
    Return a hash for each of model, code, packages and machine.

    The files of a checkpoint are compared by name, size and time of change.

    :param model: as `checkpoint.locate` takes it; empty for random weights, which follow from the
        settings and the code.
    """
    return {
        'model': _digest(_files(model)),
        'code': _digest(path.read_text() for path in sorted(_PACKAGE.rglob('*.py'))),
        'packages': _digest(map(str, sorted(machine.packages().items()))),
        'machine': _digest([platform.node(), platform.python_version(), platform.release(),
                            str(sorted(os.sched_getaffinity(0))), str(machine.driver())]),
    }


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of what has changed."""
    return [name for name in now if before.get(name) != now[name]]


def _files(model: str) -> Iterable[str]:
    if not model:
        return []
    try:
        folder = checkpoint.locate(model)
        return [f'{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}'
                for path in sorted(folder.rglob('*')) if path.is_file()]
    except (EngineError, OSError):
        return ['can not be read']          # the session reports the reason


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]
