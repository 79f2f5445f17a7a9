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

"""The interfaces of physai_decode_msgs; `unavailable` is the reason if they can't be imported."""

__all__ = ['Generate', 'Token', 'unavailable']

try:
    # These imports name classes, because Python would import the source folder as a package.
    from physai_decode_msgs.action import Generate
    from physai_decode_msgs.msg import Token
    unavailable = ''
except ImportError as error:
    Generate = Token = None
    unavailable = (f'physai_decode_msgs is not built ({error}): build it with `make msgs` or with '
                   'colcon (see docs/install.md), and restart the node')
