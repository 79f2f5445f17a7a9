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

"""The engine of the ExLlamaV2 library."""

from importlib.util import find_spec

if find_spec('exllamav2') is None:
    raise ModuleNotFoundError("No module named 'exllamav2'", name='exllamav2')

from physai_decode.engines.exllamav2.engine import ExLlamaV2Engine

__all__ = ['ExLlamaV2Engine']
