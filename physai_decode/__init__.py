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

"""A ROS 2 node for batch-1 decoding that reports how near each token came to the memory floor."""

import os
import sys

__version__ = '0.2.0'

_COMMAND = os.path.basename((getattr(sys, 'argv', None) or [''])[0])


def _say_interrupted(kind, error, trace):
    """Report Ctrl-C in one line, even while a command still imports its libraries."""
    if issubclass(kind, KeyboardInterrupt):
        print(f'{_COMMAND}: interrupted', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if _COMMAND.startswith('decode_'):      # this module is imported before any other of the command
    sys.excepthook = _say_interrupted
