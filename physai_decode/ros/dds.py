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

"""Settings of Fast DDS, for what the user has not set."""

import os
from pathlib import Path

PROFILES = Path(__file__).with_name('fastdds.xml')
VARIABLE = 'FASTDDS_DEFAULT_PROFILES_FILE'      # of Fast DDS 3; version 2 needs no profile
# Fast DDS also reads it, from the working directory.
OWN_PROFILES = 'DEFAULT_FASTDDS_PROFILES.xml'


def configure() -> None:
    """Set the environment of this process for Fast DDS; call it before ``rclpy.init``."""
    # Fast DDS then sends from its own thread, and a slow network does not delay decoding.
    os.environ.setdefault('RMW_FASTRTPS_PUBLICATION_MODE', 'ASYNCHRONOUS')
    if not os.environ.get(VARIABLE) and not os.path.exists(OWN_PROFILES):
        os.environ[VARIABLE] = str(PROFILES)
