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

"""The decode loop: reuse of the cache, chunks of prompts, and the cache after an error."""

from engine_contract import CHECKS
from engine_contract import decode
from engine_contract import first_step
from fake_engine import FakeEngine
from fake_engine import forever
from fake_engine import say
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import ChunkSize
from physai_decode.decode_loop import DecodeLoop
from physai_decode.decode_loop import Step
from physai_decode.engine import EngineError
from physai_decode.engine import NO_TOKEN
from physai_decode.engine import not_numbers
import pytest

ONE = SamplingConfig(max_new_tokens=1)


class Timed(FakeEngine):
    """Takes a time for each prompt token, and records its chunks."""

    now_s = 0.0

    def __init__(self, token_s=0.0, fails_at=None, **options):
        super().__init__(lambda ids: forever(), max_context=10_000, **options)
        self.token_s, self.chunks, self.fails_at = token_s, [], fails_at

    def feed(self, token_ids):
        """Record the chunk."""
        self.chunks.append(len(token_ids))
        if len(self.chunks) == self.fails_at:
            raise RuntimeError('broken')
        super().feed(token_ids)
        return lambda: len(token_ids) * self.token_s


class ByClock(Timed):
    """Does not know how long a chunk takes, while its own clock shows it."""

    def feed(self, token_ids):
        """Advance the clock while the caller waits."""
        elapsed = super().feed(token_ids)

        def wait():
            self.now_s += elapsed()

        return wait

    def first(self, *arguments):
        """Take long, which no chunk does."""
        self.now_s += 10.0
        return super().first(*arguments)


def loop_of(engine, chunk_ms=100.0):
    return DecodeLoop(engine, chunk_ms)


def feed(loop, tokens, start=0):
    """Feed a prompt, of which other values of ``start`` share no prefix; return its steps."""
    return list(loop.stream([start + 1000 + index for index in range(tokens)], ONE))


class Repeatable(FakeEngine):
    """Answers with tokens that depend only on the prompt, the seed and the position."""

    def __init__(self):
        super().__init__(self._words, vocab_size=200, eos_token_ids=tuple(range(50)))

    def _words(self, ids):
        sampling = self.samplings[-1]
        one = (not sampling.temperature or sampling.top_k == 1 or not sampling.top_p
               or sampling.min_p == 1)
        seed = 0 if one else sampling.seed + 1
        while True:
            ids = [*ids, hash((*ids, seed)) % 200]
            yield Step((ids[-1],), 0.001)


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    """The fake engine passes the same checks as the real ones."""
    check(DecodeLoop(Repeatable()))


@pytest.mark.parametrize('kind', [Timed, ByClock])
def test_chunks_grow_to_the_time_they_may_take(kind):
    engine = kind(token_s=2.0**-10)
    loop = DecodeLoop(engine, 125.0, clock=lambda: engine.now_s)
    feed(loop, 600)
    assert engine.chunks == [32, 128, 128, 128, 128, 56]
    engine.chunks.clear()
    feed(loop, 250, start=5000)     # the size is kept for later prompts; the token did not count
    assert engine.chunks == [128, 122]


def test_waits_for_the_last_chunk_after_the_first_token():
    """The host prepares the token meanwhile; no other chunks are computed at the same time."""
    calls = []

    class Recorded(Timed):
        def feed(self, token_ids):
            calls.append('feed')
            super().feed(token_ids)
            return lambda: calls.append('wait')

        def first(self, *arguments):
            calls.append('first')
            return super().first(*arguments)

    feed(loop_of(Recorded(chunk_tokens=(1, 32))), 50)
    assert calls == ['feed', 'wait', 'feed', 'first', 'wait']


def test_reuses_nothing_after_the_last_chunk_or_the_first_token_failed():
    class Failing(FakeEngine):
        fails = ''

        def feed(self, token_ids):
            super().feed(token_ids)
            return lambda: self._fail('wait')

        def first(self, *arguments):
            self._fail('first')
            return super().first(*arguments)

        def _fail(self, what):
            if self.fails == what:
                raise RuntimeError('broken')

    engine = Failing()
    loop = DecodeLoop(engine)
    prompt = [ord(each) for each in 'go ab']
    expected = decode(loop, prompt)
    for engine.fails in ('first', 'wait'):
        with pytest.raises(RuntimeError, match='broken'):
            decode(loop, prompt)
        assert loop.cached_ids == []
        engine.fails = ''
        assert decode(loop, prompt) == expected


def test_chunks_grow_no_faster_than_fourfold():
    engine = Timed(token_s=1e-6)
    feed(loop_of(engine), 1000)
    assert engine.chunks == [32, 128, 512, 328]


def test_slow_device_gets_small_chunks():
    """They are not so small that a chunk mostly reads weights."""
    engine = Timed(token_s=2.0**-10)
    loop = loop_of(engine, chunk_ms=500.0)
    feed(loop, 1000)
    engine.token_s, engine.chunks = 2.0**-8, []
    feed(loop, 700, start=5000)
    assert engine.chunks == [512, 128, 60]
    engine.token_s, engine.chunks = 0.5, []
    feed(loop, 200, start=9000)
    assert engine.chunks == [128, 32, 32, 8]


def test_chunks_respect_the_limits_of_the_engine():
    engine = Timed(token_s=1e-6, chunk_tokens=(16, 64))
    feed(loop_of(engine), 200)
    assert engine.chunks == [32, 64, 64, 40]
    engine = Timed(token_s=1.0, chunk_tokens=(48, 64))
    feed(loop_of(engine), 60)
    assert engine.chunks == [48, 12]
    engine = Timed(token_s=1.0, chunk_tokens=(1, 16))
    feed(loop_of(engine), 40)
    assert engine.chunks == [16, 16, 8]


def test_prompt_in_one_chunk():
    """This is so if the engine does not support chunks, or if no time is set."""
    engine = Timed(token_s=1.0, chunk_tokens=(10_000, 10_000))
    feed(loop_of(engine), 500)
    assert engine.chunks == [500]
    engine = Timed(token_s=1.0, chunk_tokens=(1, 400))
    feed(loop_of(engine, chunk_ms=0.0), 500)
    assert engine.chunks == [400, 100]


def test_short_chunk_does_not_enlarge_the_next():
    size = ChunkSize(1, 1000, 100, 100.0)
    size.learn(10, 0.0001)
    assert size.tokens == 100
    size.learn(10, 1.0)                     # only a slow one shrinks it
    assert size.tokens == 32
    size.learn(32, 0.0)                     # the clock did not advance
    assert size.tokens == 32


def test_yields_a_step_without_tokens_between_chunks():
    steps = feed(loop_of(Timed(token_s=0.001)), 150)
    assert [len(step.token_ids) for step in steps] == [0, 0, 1]


def test_does_not_feed_cached_tokens():
    engine = Timed()
    loop = loop_of(engine)
    feed(loop, 30)
    steps = feed(loop, 40)
    assert engine.chunks == [30, 10]
    assert steps[-1].cached_tokens == 30
    assert feed(loop, 40)[-1].cached_tokens == 39       # the last is fed for its logits
    assert loop.cached_ids == [1000 + index for index in range(40)]


def test_cancel_between_chunks_keeps_the_cache():
    engine = Timed(token_s=0.001)
    loop = loop_of(engine)
    stream = loop.stream(range(1000, 1150), ONE)
    next(stream)
    stream.close()
    assert len(loop.cached_ids) == 32
    assert feed(loop, 150)[-1].cached_tokens == 32


@pytest.mark.parametrize('fails_at', [1, 2])
def test_failed_chunk_empties_the_cache(fails_at):
    engine = Timed(token_s=0.001, fails_at=fails_at)
    loop = loop_of(engine)
    with pytest.raises(RuntimeError, match='broken'):
        feed(loop, 150)
    assert loop.cached_ids == []
    steps = feed(loop, 150)
    assert steps[-1].cached_tokens == 0
    assert engine.fed == [1000 + index for index in range(150)]


@pytest.mark.parametrize('said', ['', 'ab'])
def test_failed_step_empties_the_cache(said):
    """The step samples the first token of an answer, or a later one."""
    def steps(ids):
        yield from say(said, end=False)
        if len(ids) == 3:
            raise RuntimeError('broken')
        yield from say('good')

    loop = DecodeLoop(FakeEngine(steps))
    with pytest.raises(RuntimeError, match='broken'):
        decode(loop, [1, 2, 3])
    assert loop.cached_ids == []
    assert first_step(loop, [1, 2, 3, 4]).cached_tokens == 0


def test_failed_rewind_empties_the_cache():
    engine = FakeEngine()
    loop = DecodeLoop(engine)
    decode(loop, [1, 2, 3])
    engine.rewind = lambda length: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop.forget(1)
    assert loop.cached_ids == []


@pytest.mark.parametrize(('length', 'limit', 'count'), [
    (10, 3, 3), (10, 1, 1), (13, 99, 3), (15, 99, 1)])
def test_ends_at_the_limit_or_the_end_of_the_context(length, limit, count):
    """The engine is told that no further step follows."""
    engine = FakeEngine(lambda ids: forever(), max_context=16)
    loop = DecodeLoop(engine)
    prompt = list(range(1, length + 1))
    assert len(decode(loop, prompt, SamplingConfig(max_new_tokens=limit))) == count
    assert engine.asked == list(reversed(range(count - 1)))


def test_sum_with_an_unknown_time_is_unknown():
    class Untimed(FakeEngine):
        def feed(self, token_ids):
            super().feed(token_ids)
            return lambda: None

    steps = list(DecodeLoop(Untimed(lambda ids: say('ab'))).stream(
        [1, 2], SamplingConfig(max_new_tokens=2)))
    assert [step.device_s for step in steps] == [None, 0.001]


@pytest.mark.parametrize('place', [0, 2])
def test_logits_that_are_not_numbers_are_an_error(place):
    """They are those of the first token, or of a later one."""
    engine = FakeEngine(lambda ids: [*say('abc'[:place], end=False), Step((NO_TOKEN,))])
    loop = DecodeLoop(engine)
    stream = loop.stream([1, 2, 3], SamplingConfig())
    assert [next(stream).token_ids for _ in range(place)] == [(97,), (98,)][:place]
    with pytest.raises(EngineError, match='logits are not numbers .* in float32'):
        next(stream)


@pytest.mark.parametrize(('dtype', 'advice'), [
    ('float16', 'set engine.dtype to float32 or bfloat16'),
    ('bfloat16', 'set engine.dtype to float32'), ('float32', 'copy or download the model again')])
def test_logits_that_are_not_numbers_advise_another_dtype(dtype, advice):
    assert str(not_numbers(dtype)).endswith(advice)


def test_forget():
    loop = loop_of(Timed())
    feed(loop, 30)
    loop.forget(12)
    assert loop.cached_ids == [1000 + index for index in range(12)]
    loop.forget(100)
    assert len(loop.cached_ids) == 12
    loop.forget()
    assert loop.cached_ids == []


def test_state_that_can_not_be_rewound():
    class Whole(Timed):
        def rewind(self, length):
            return length if length == len(self.fed) else super().rewind(0)

    engine = Whole()
    loop = loop_of(engine)
    feed(loop, 30)
    assert feed(loop, 20)[-1].cached_tokens == 0
    assert engine.chunks == [30, 20]
