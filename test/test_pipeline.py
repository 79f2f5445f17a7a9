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

"""`Depth`: the number of steps in flight."""

from physai_decode.engines.native.graph import AHEAD
from physai_decode.engines.native.graph import CALM_STEPS
from physai_decode.engines.native.graph import Depth
from physai_decode.engines.native.graph import MOST_AHEAD
import pytest


def test_depth_adapts_to_the_host():
    """A late host adds a step in flight; many steps in time remove one."""
    depth = Depth()
    assert depth.steps == AHEAD and depth.most == MOST_AHEAD
    depth.learn(late=True)
    assert depth.steps == AHEAD + 1
    for _ in range(CALM_STEPS - 1):
        depth.learn(late=False)
    assert depth.steps == AHEAD + 1
    depth.learn(late=False)
    assert depth.steps == AHEAD


def test_depth_has_bounds():
    """It stays from `AHEAD` to `MOST_AHEAD`."""
    depth = Depth()
    for _ in range(2 * MOST_AHEAD):
        depth.learn(late=True)
    assert depth.steps == MOST_AHEAD
    for _ in range(MOST_AHEAD * CALM_STEPS):
        depth.learn(late=False)
    assert depth.steps == AHEAD


@pytest.mark.parametrize('fixed', [1, 2, 5])
def test_fixed_depth_does_not_adapt(fixed):
    depth = Depth(fixed)
    for late in [True] * MOST_AHEAD + [False] * CALM_STEPS:
        depth.learn(late)
        assert depth.steps == depth.most == fixed
