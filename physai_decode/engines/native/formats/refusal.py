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

"""How a format refuses what the native engine does not run."""

from typing import Any

from physai_decode.engine import EngineError


def refusal(what: str, runs: str) -> EngineError:
    """Return the error that names what is asked for, what is run, and the way out."""
    return EngineError(f'the native engine does not run {what} (it runs {runs}); '
                       'set engine.name to transformers')


def check_group(name: str, size: Any) -> None:
    """
    Hold the columns that share a scale against what the kernels have.

    :param size: -1: all of a row's.
    :raises EngineError: it is another number, or none.
    """
    if type(size) is not int or (size != -1 and (size <= 0 or size % 32)):
        raise refusal(f'{name} groups of {size!r}', 'multiples of 32, and -1')
