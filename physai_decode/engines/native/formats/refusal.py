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

"""The errors of a format that the native engine does not run."""

from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError


def refusal(what: str, runs: str) -> EngineError:
    """Return the error that names what is unsupported, what is supported, and the way out."""
    return EngineError(f'the native engine does not run {what} (it runs {runs}); '
                       'set engine.name to transformers')


def check_group(name: str, size: Any) -> None:
    """
    Check that the kernels support a group size.

    :param size: columns per group; -1: one group per row.
    :raises EngineError: it is neither -1 nor a positive multiple of 32.
    """
    if type(size) is not int or (size != -1 and (size <= 0 or size % 32)):
        raise refusal(f'{name} groups of {shown(size)}', 'multiples of 32, and -1')
