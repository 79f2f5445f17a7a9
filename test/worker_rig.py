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

"""A worker with a fake engine, and a sink that records all reports."""

import threading
import time
from types import MappingProxyType

from fake_engine import CharacterText
from fake_engine import FakeEngine
from physai_decode.config import DecodeConfig
from physai_decode.roofline import Peak
from physai_decode.worker import Worker

TIMEOUT_S = 60
TOOL = {'type': 'function', 'function': {'name': 'go_to', 'parameters': {
    'type': 'object', 'properties': {'room': {'enum': ['hall', 'kitchen']}},
    'required': ['room']}}}


class Sink:
    """Records all reports, and lets a test wait for the end of a request."""

    def __init__(self):
        self.requests = {}      # accepted ones, by number
        self.tokens = []
        self.items = []
        self.ends = []
        self.threads = {}
        self._changed = threading.Condition()

    def accepted(self, number, request):
        self.requests[number] = request

    def token(self, report):
        with self._changed:
            self.tokens.append(report)
            self._changed.notify_all()

    def item(self, report):
        with self._changed:
            self.items.append((len(self.tokens), report))
            self._changed.notify_all()

    def finished(self, report, text):
        with self._changed:
            self.ends.append((report, text))
            self.threads[report.request_id] = threading.current_thread()
            self._changed.notify_all()

    def end(self, request_id):
        """Wait for the end of a request; returns its report and text."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: any(report.request_id == request_id for report, _ in self.ends),
                TIMEOUT_S), f'request {request_id} did not end'
            ends = [end for end in self.ends if end[0].request_id == request_id]
        assert len(ends) == 1
        report, text = ends[0]
        pieces = [token for token in self.tokens if token.request_id == request_id]
        assert ''.join(piece.text for piece in pieces) == text
        assert [piece.index for piece in pieces] == list(range(len(pieces)))
        assert report.output_tokens == len(pieces)
        return report, text

    def wait_tokens(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens) >= count, TIMEOUT_S)


class FailingSink(Sink):
    """Raises at the end of each request."""

    def finished(self, report, text):
        super().finished(report, text)
        raise ValueError('broken')


def texts(engine):
    """Return the prompts of an engine as text."""
    return [''.join(map(chr, ids)) for ids in engine.prompts]


def maker():
    """Yield a function that returns a started worker and its sink; stop all workers at the end."""
    workers = []

    def make(engine=None, text=None, clock=time.monotonic, sink=None, start=True,
             checkpoint=MappingProxyType({}), form=None, energy_j=lambda: None, **groups):
        sink = sink or Sink()
        worker = Worker(engine or FakeEngine(), text or CharacterText(), DecodeConfig(**groups),
                        sink, clock=clock, peak=Peak(1e6, 'parameter'),
                        checkpoint_sampling=checkpoint, form=form, energy_j=energy_j)
        workers.append(worker)
        if start:
            worker.start()
        return worker, sink

    yield make
    for worker in workers:
        assert worker.stop(TIMEOUT_S)


def slowly(steps, now):
    """Yield steps, each of which takes 40 ms of a clock that shows ``now[0]`` seconds."""
    for step in steps:
        now[0] += 0.04
        yield step


def wait_for(condition):
    until_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.001)
