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

"""The node's status between two messages on /diagnostics, without a node."""

from dataclasses import replace
from types import SimpleNamespace

from physai_decode.config import DeadlineConfig
from physai_decode.request import Request
from physai_decode.ros.messages import OK
from physai_decode.ros.messages import WARN
from physai_decode.ros.status import Status
import pytest
from test_host import CONFIG
from test_host import host  # noqa: F401
from worker_rig import TIMEOUT_S
from worker_rig import wait_for

LATE = replace(CONFIG, deadline=DeadlineConfig(request_ms=1e-6))


@pytest.fixture
def latency(host):  # noqa: F811
    """Return a function that publishes the status, and returns the part `latency`."""
    published = []
    topics = SimpleNamespace(node_name='/decode', diagnostics=published.append)
    status = Status(host, topics, (), SimpleNamespace(look=str), SimpleNamespace(count=0),
                    lambda text: None)

    def publish():
        status.publish()
        return published[-1][0]

    return publish


def miss(host):  # noqa: F811
    """Answer a request that misses its deadline."""
    host.update(LATE)
    count = host.deadline_misses
    host.submit(Request('a'))
    wait_for(lambda: host.deadline_misses > count)


@pytest.mark.parametrize('misses_after', [0, 1])
def test_a_reactivation_does_not_hide_a_miss(host, latency, misses_after):  # noqa: F811
    """Neither one before it nor one after it, whatever the count since activation."""
    miss(host)
    assert latency().level == WARN
    assert latency().level == OK
    if not misses_after:
        miss(host)
    assert host.stop(TIMEOUT_S)
    host.start(CONFIG)
    if misses_after:
        miss(host)
    status = latency()
    assert (status.level, status.message) == (
        WARN, 'deadlines missed since activation: 1' if misses_after else
        'deadlines were missed before activation')
    assert latency().level == OK


def test_a_deactivation_does_not_hide_a_miss(host, latency):  # noqa: F811
    miss(host)
    assert host.stop(TIMEOUT_S)
    status = latency()
    assert (status.level, status.message) == (WARN, 'not active; deadlines were missed before')
    status = latency()
    assert (status.level, status.message) == (OK, 'not active')
