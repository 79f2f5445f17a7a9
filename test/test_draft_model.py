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

"""A draft model: its drafts, their cost, its KV cache, its errors, and unchanged answers."""

from collections import deque
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from random import Random
import shutil
from types import SimpleNamespace

from fake_engine import FakeEngine
from fake_engine import say
from json_file import editing
from physai_decode import checkpoint
from physai_decode import engines
from physai_decode import host
from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from physai_decode.config import ModelConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import SpeculationConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engine import Choice
from physai_decode.engine import Drafter
from physai_decode.engine import EngineError
from physai_decode.engine import NO_TOKEN
from physai_decode.roofline import Peak
from physai_decode.speculation import DraftModel
from physai_decode.speculation import Experience
from physai_decode.speculation import INITIAL_BALANCE
from physai_decode.speculation import MAX_OVERHEAD
from physai_decode.speculation import Policy
import pytest
from test_speculation import always_draft
from test_speculation import answers
from test_speculation import check_same_answers
from test_speculation import constrained
from test_speculation import COSTS
from test_speculation import CPU
from test_speculation import Direct
from test_speculation import drafting
from test_speculation import PipelinedEngine
from test_speculation import text_of
from test_speculation import VerifyingEngine
from test_speculation import vocabulary_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

MODEL = SpeculationConfig('model', 'builtin:tiny_planner')
TINY = 'builtin:tiny_planner'
END = 0


class Small(FakeEngine):
    """Continues the ids in its cache by a rule; it can have steps in flight."""

    def __init__(self, rule, **changes):
        super().__init__(**changes)
        self.rule = rule
        self.feeds, self.ahead = [], deque()

    def rewind(self, length):
        """Drop what is in flight, and cut the cache."""
        assert 0 <= length <= len(self.fed)
        self.ahead.clear()
        return super().rewind(length)

    def feed(self, token_ids):
        """Append to the cache."""
        assert token_ids and not self.ahead
        self.feeds.append(list(token_ids))
        self.fed += token_ids
        assert len(self.fed) < self.footprint.max_context
        return lambda: 0.001

    def first(self, sampling, prompt_ids, constraint=None):
        """Choose by the rule; only greedy choices are drafts."""
        assert sampling.temperature == 0 and constraint is None
        self._last = self.rule(self.fed)
        return Choice(self._last, 0.001)

    def step(self, remaining):
        """Run a step, with further ones in flight."""
        self.fed.append(self._last)
        assert len(self.fed) < self.footprint.max_context
        self.ahead.extend(range(remaining - len(self.ahead)))
        self._last = self.rule(self.fed)
        return Choice(self._last, 0.001)


def successor(ids):
    """Return the rule of a model that counts."""
    return ids[-1] + 1


def draft_model(rule=successor, vocab_size=1000, **changes):
    """Return a draft model, its engine, and a list that receives its warnings."""
    warnings, engine = [], Small(rule, **changes)
    return DraftModel(engine, vocab_size, {END}, warnings.append), engine, warnings


# --- the model ------------------------------------------------------------------------------

def test_cache_follows_the_answer():
    """Accepted tokens stay, rejected ones and forced ones that never came are rewound."""
    model, engine, _ = draft_model()
    assert model.draft([3, 4, 5], 4) == [6, 7, 8, 9]
    assert engine.fed == [3, 4, 5, 6, 7, 8]
    assert model.draft([3, 4, 5, 6, 7, 50], 2) == [51, 52]
    assert engine.feeds[1:] == [[50]]
    assert model.draft([3, 4, 5, 6, 7, 50, 51, 52, 53], 1) == [54]
    assert engine.feeds[2:] == [[52, 53]]
    assert model.draft([3, 4, 5, 6, 7, 50, 51, 52, 53], 2, [20, 30]) == [31, 32]
    assert engine.fed == [3, 4, 5, 6, 7, 50, 51, 52, 53, 20, 30, 31]
    assert model.draft([3, 4, 5, 6, 7, 50, 51, 52, 53, 20, 40], 1) == [41]
    assert engine.feeds[4:] == [[40]]
    model.begin()
    assert model.draft([3, 4, 9], 1) == [10]
    assert engine.feeds[5:] == [[9]]


def test_cache_is_right_in_any_order():
    """Answers, forced tokens and rejected drafts are mixed; with few ids, wrong ones coincide."""
    draw = Random(2)
    model, engine, warnings = draft_model(
        lambda ids: 1 + sum(place * id_ for place, id_ in enumerate(ids, 1)) % 3, vocab_size=9)
    for _ in range(200):
        model.begin()
        ids = [draw.randint(1, 3) for _ in range(draw.randint(1, 12))]
        while len(ids) < 40:
            forced = [draw.randint(1, 3) for _ in range(draw.randint(0, 2))]
            while draw.random() < 0.5 and model.prefill(ids, draw.randint(1, 5)):
                pass
            expected = [*ids, *forced]
            for _ in range(count := draw.randint(1, 5)):
                expected.append(engine.rule(expected))
            assert model.draft(ids, count, forced) == expected[-count:]
            assert engine.fed == expected[:-1]
            ids = [*expected[:len(ids) + draw.randint(0, len(forced) + count)], draw.randint(1, 3)]
    assert not warnings


def test_prompt_is_prefilled_in_chunks():
    """Later, a draft first feeds the missing tokens, unless they are more than a chunk."""
    model, engine, _ = draft_model()
    ids = list(range(1, 12))
    assert [model.prefill(ids, 4) for _ in range(4)] == [True, True, True, False]
    assert engine.feeds == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert model.draft(ids, 1) == [12]
    ids += 12, 13, 14, 15
    assert not model.prefill(ids, 4)
    ids += 16, 17
    assert model.prefill(ids, 4) and not model.prefill(ids, 4)
    assert engine.fed == ids[:-2]


@pytest.mark.parametrize(('after', 'expected'), [(END, [6]), (1000, [6]), (999, [6, 999])])
def test_draft_ends_before_an_end_and_an_id_that_the_model_lacks(after, expected):
    model, _, warnings = draft_model(
        lambda ids: {5: 6, 6: after}.get(ids[-1], END), vocab_size=1000)
    assert model.draft([5], 3) == expected
    assert not warnings


def not_a_number(ids):
    """Return the rule of a model whose logits are not finite after id 7."""
    return NO_TOKEN if ids[-1] == 7 else ids[-1] + 1


def broken(ids):
    """Return the rule of a model that fails."""
    raise RuntimeError('device lost')


@pytest.mark.parametrize(('rule', 'reason'), [
    (not_a_number, 'not numbers'), (broken, 'RuntimeError: device lost')])
def test_error_switches_the_draft_model_off(rule, reason):
    """It would fail again, so one warning says so."""
    model, engine, warnings = draft_model(rule)
    model.draft([6], 3)
    for _ in range(3):
        assert model.room(1) == 0 and model.draft([6], 3) == []
        assert not model.prefill([6, 9, 9, 9], 1)
        model.begin()
    assert len(warnings) == 1 and reason in warnings[0]
    assert warnings[0].startswith('the draft model is off until the node is activated again')


def test_unknown_id_ends_the_drafts_of_one_answer():
    """Before the draft model computes anything, so it can reuse its cache; one warning says so."""
    model, engine, warnings = draft_model(vocab_size=256)
    engine.footprint = replace(engine.footprint, vocab_size=256)
    assert model.draft([6, 7], 1) == [8]
    for _ in range(3):
        model.begin()
        assert not model.prefill([6, 7, 9, 300, 9], 1)
        assert model.room(5) == 0 and model.draft([6, 7, 9, 300, 9], 3) == []
    assert engine.feeds == [[6, 7]]
    assert len(warnings) == 1 and 'such as 300, are outside its vocabulary' in warnings[0]
    model.begin()
    assert model.draft([6, 7, 20], 2) == [21, 22]
    assert engine.feeds == [[6, 7], [20]]
    model.begin()
    assert model.draft([6, 300], 2) == [] and len(warnings) == 1


# --- its cost -------------------------------------------------------------------------------

def cost_of(policy, draft_cost, accepted):
    """Return an answer's cost in steps, and its tokens; ``accepted`` tells which drafts are."""
    steps, tokens = 0.0, 0
    for right in accepted:
        _, rows = policy.best(8, by_model=True)
        brought = rows if right else 1
        for place in range(brought):
            drafted = None if rows == 1 or place == rows - 1 else right
            policy.learn(None, None, drafted)
        if rows > 1:
            policy.spend(rows, brought, rows - 1)
        steps += policy._experience.of(rows) + (rows - 1) * draft_cost
        tokens += brought
    return steps, tokens


@pytest.mark.parametrize('draft_cost', [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize('count', [20, 3000])
def test_rejected_drafts_cost_little(draft_cost, count):
    """The cost includes that of the draft model."""
    steps, tokens = cost_of(
        Policy(Experience(COSTS, draft_cost)), draft_cost, [False] * count)
    assert tokens == count
    assert steps <= (1 + MAX_OVERHEAD) * count + INITIAL_BALANCE


def test_accepted_drafts_save_steps_unless_they_cost_as_much():
    steps, tokens = cost_of(Policy(Experience(COSTS, 0.1)), 0.1, [True] * 100)
    assert tokens / steps > 4
    steps, tokens = cost_of(Policy(Experience(COSTS, 1.0)), 1.0, [True] * 100)
    assert (steps, tokens) == (100, 100)


def test_drafts_are_tried_again():
    policy = Policy(Experience(COSTS, 0.1))
    cost_of(policy, 0.1, [False] * 300)
    steps, tokens = cost_of(policy, 0.1, [True] * 300)
    assert tokens / steps > 4


def test_cost_of_a_draft_follows_its_time():
    experience = Experience(COSTS, 0.3)
    experience.learn_draft(4, 9.0)
    assert experience.draft_cost == 0.3             # no step was timed
    for _ in range(80):
        experience.learn(1, 0.1)
        experience.learn_draft(4, 0.2)
    assert experience.draft_cost == pytest.approx(0.5, rel=0.01)
    experience.learn_draft(1, 99.0)
    assert experience.draft_cost == pytest.approx(0.5 + 0.5 / 8, rel=0.01)
    experience = Experience(COSTS, 0.3, step_s=0.1)     # timed at the load
    experience.learn_draft(1, 0.02)
    assert experience.draft_cost == pytest.approx(0.3 - 0.1 / 8)


# --- the loop -------------------------------------------------------------------------------

ANSWER = 'pick up the cup, then go to the table'


def follows(answer):
    """Return the rule of a model that knows the answer after a prompt of digits."""
    def rule(ids):
        text = ''.join(map(chr, ids)).lstrip('0123456789')
        return ord(answer[len(text)]) if answer.startswith(text) and text != answer else END
    return rule


def loop_with(small, kind=VerifyingEngine, cost=0.1, warn=print, clock=lambda: 0.0, step_s=0.0,
              **changes):
    """Return a loop whose engine has a draft model, and whose clock stands still by default."""
    engine = kind(lambda ids: say(ANSWER, end=False), **{'max_context': 200, **changes})
    engine.drafter = Drafter(small, cost, step_s)
    return DecodeLoop(engine, 0.0, clock, MODEL, warn)


DIGITS = [ord(each) for each in '0123456789']
ALL = SamplingConfig(max_new_tokens=len(ANSWER))


@pytest.mark.parametrize('kind', [VerifyingEngine, PipelinedEngine])
def test_accepted_drafts_take_few_passes(kind):
    """Their times include the draft model, and its prompt comes after the first token."""
    small = Small(follows(ANSWER), max_context=200)
    stream = loop_with(small, kind).stream(DIGITS, ALL)
    first = next(stream)
    assert first.token_ids == (ord('p'),) and not small.fed
    steps = [first, *stream]
    assert text_of(steps) == ANSWER
    passes = [step for step in steps if step.token_ids]
    assert len(passes) < len(ANSWER) / 2
    computed = len(small.fed) - len(DIGITS) - 1
    drafted_s = sum(step.draft_s or 0.0 for step in passes)
    assert drafted_s > 0.001 * computed
    assert sum(step.device_s for step in passes[1:]) > drafted_s
    assert first.draft_s is None


def test_wrong_and_expensive_drafts_leave_the_text():
    """A model whose drafts cost too much does not even read the prompt."""
    wrong = Small(lambda ids: ord('z'), max_context=200)
    expensive = Small(follows(ANSWER), max_context=200)
    for small, cost in ((wrong, 0.1), (expensive, 1.0)):
        assert text_of(list(loop_with(small, cost=cost).stream(DIGITS, ALL))) == ANSWER
    assert wrong.fed and not expensive.fed


@pytest.mark.parametrize('limit', [5, 10, 11, 20])
def test_shorter_context_ends_the_drafts(limit):
    small = Small(follows(ANSWER), max_context=limit)
    warnings = []
    steps = list(loop_with(small, warn=warnings.append).stream(DIGITS, ALL))
    assert text_of(steps) == ANSWER
    assert bool(small.fed) == (limit == 20)
    assert not warnings


def test_failing_draft_model_ends_no_answer():
    warnings = []
    small = Small(lambda ids: NO_TOKEN, max_context=200)
    loop = loop_with(small, warn=warnings.append)
    for _ in range(2):
        assert text_of(list(loop.stream(DIGITS, ALL))) == ANSWER
    assert len(warnings) == 1 and 'the draft model is off' in warnings[0]


def test_an_error_does_not_change_the_cost_of_drafts():
    small = Small(broken, max_context=200)
    loop = loop_with(small, warn=lambda message: None, clock=iter(range(10**6)).__next__,
                     step_s=1.0)
    assert text_of(list(loop.stream(DIGITS, ALL))) == ANSWER
    assert small.fed and {each.draft_cost for each in loop._experience.values()} == {0.1}


def test_cancel_takes_effect_between_chunks_of_the_draft_model():
    """The next answer reuses the chunk."""
    small = Small(follows(ANSWER), max_context=200)
    loop = loop_with(small, chunk_tokens=(1, 4))
    stream = loop.stream(DIGITS, ALL)
    steps = [next(stream) for _ in range(4)]       # three are of the prompt, then a token
    assert [bool(step.token_ids) for step in steps] == [False, False, True, False]
    stream.close()
    assert small.feeds == [DIGITS[:4]]
    assert text_of(list(loop.stream(DIGITS, ALL))) == ANSWER
    assert small.feeds[1] == DIGITS[4:8]


# --- the native engine ----------------------------------------------------------------------

def saved_passes(loop, prompts, count, decode=answers):
    """Return the number of passes that drafts save, after checking that answers are the same."""
    warnings = []
    saved = check_same_answers(loop, prompts, count, decode, MODEL, warnings.append)
    assert all('outside its vocabulary' in each for each in warnings)
    return saved


def pair(kind, folder, draft):
    """Return the loop of an engine with a draft model, whatever they cost."""
    loop = drafting(kind, folder)
    loop.engine.drafter = Drafter(kind(checkpoint.open(str(draft)), CPU), 0.1)
    return loop


def conversations(seed, count):
    """Return prompts, most of which continue the one before, of different lengths."""
    draw, prompts = Random(seed), [[5]]
    while len(prompts) < count:
        known = prompts[-1] if draw.random() < 0.7 else []
        prompts.append([*known[:draw.randint(0, 90)],
                        *(draw.randrange(3, 500) for _ in range(draw.randint(1, 30)))])
    return prompts


@pytest.mark.parametrize('steps', ['on the host', 'in a pipeline'])
def test_another_model_drafts(native, steps, tmp_path, monkeypatch):
    """It has another family and shape, fewer ids, and a shorter context."""
    import random_model
    always_draft(monkeypatch)
    target = random_model.save(tmp_path / 'target', 'qwen3', 1)
    draft = random_model.save(
        tmp_path / 'draft', 'llama', 2, hidden_size=64, num_hidden_layers=1, head_dim=64,
        vocab_size=500, max_position_embeddings=100)
    loop = pair(native, target, draft)
    if steps == 'in a pipeline':
        from physai_decode.engines.native.ops import TorchOps
        for engine in (loop.engine, loop.engine.drafter.engine):
            t = engine.transformer
            t.ops = TorchOps(on_host=False)
            engine._sampler = t.ops.sampler(t.architecture.vocab_size, t.token.device)
            engine.pipeline = Direct(engine)
    saved_passes(loop, conversations(3, 12), 20)
    assert loop.engine.drafter.engine._length       # it drafted
    loop.engine.close()


def greedy(loop, prompts, count):
    """Return the greedy answers, and the passes."""
    steps = [step.token_ids for prompt in prompts
             for step in loop.stream(prompt, SamplingConfig(max_new_tokens=count))
             if step.token_ids]
    return list(chain(*steps)), len(steps)


def test_both_engines_share_a_stream(native, monkeypatch):
    """Work of one is ordered behind that of the other."""
    from physai_decode.engines import device
    import torch
    monkeypatch.setattr(torch.cuda, 'Stream', lambda *_, priority: object())
    cuda = torch.device('cuda', 77)
    assert device.stream(cuda, -1) is device.stream(cuda, -1)
    assert device.stream(cuda, 0) is None


@pytest.mark.parametrize('family', ['qwen2_window', 'gemma3_text'])
def test_model_that_drafts_for_itself_saves_most_passes(
        native, family, tmp_path, monkeypatch):
    """Over turns that share prefixes, so its cache is that of the answer."""
    import random_model
    always_draft(monkeypatch)
    folder = random_model.save(tmp_path, family, 1)
    loop, prompts = pair(native, folder, folder), conversations(4, 8)
    saved = saved_passes(loop, prompts, 20, greedy)
    assert saved > 0.5 * 20 * len(prompts)
    loop.engine.close()


def test_drafts_follow_a_constraint(native, monkeypatch):
    pytest.importorskip('llguidance')
    always_draft(monkeypatch)
    model = checkpoint.open(TINY)
    loop = pair(native, model.folder, model.folder)
    assert saved_passes(
        loop, conversations(5, 18), 40, partial(constrained, vocabulary_of(model))) > 0
    loop.engine.close()


# --- the load -------------------------------------------------------------------------------

def config_of(draft, path=TINY, **engine):
    """Return the configuration of a node on a CPU with a draft model."""
    return DecodeConfig(model=ModelConfig(path), engine=replace(CPU, **engine),
                        speculation=SpeculationConfig('model', str(draft)))


def test_loads_a_draft_model(native, monkeypatch):
    """Its details are in ~/model_info; it is closed with the other model."""
    from physai_decode.engines.native import start
    monkeypatch.setattr(start, 'pass_costs', lambda *_: COSTS)
    monkeypatch.setattr(host, 'find_engine_peak', lambda *_: Peak(None, 'unknown'))
    messages = []
    loaded = host.load(config_of(TINY), messages.append)
    loaded.text.close()
    drafter = loaded.engine.drafter
    assert loaded.warnings == tuple(host._idle_draft(loaded.engine, TINY))
    assert 0.2 < drafter.cost < 5 and 0 < drafter.step_s < 1
    details = loaded.engine.footprint.details['draft_model']
    assert details.endswith(f'a token costs {drafter.cost:.2f} steps')
    assert 'tiny_planner: ' in details and 'GB, float32, context 160' in details
    assert f'the draft model is {details}' in messages
    loaded.engine.close()
    assert not hasattr(loaded.engine, 'transformer')
    assert not hasattr(drafter.engine, 'transformer')


@pytest.mark.parametrize(('cost', 'used'), [(0.1, True), (0.4, True), (0.9, False), (2.0, False)])
def test_load_warns_of_a_draft_model_that_is_never_used(cost, used):
    engine = VerifyingEngine()
    engine.drafter = Drafter(FakeEngine(), cost)
    warnings = list(host._idle_draft(engine, 'small'))
    assert all(f'small is never used, because a token of it costs {cost:.2f} ' in each
               for each in warnings)
    policy = Policy(Experience(COSTS, cost))
    for _ in range(1000):
        policy.learn(None)
    assert (policy.best(8, by_model=True)[1] > 1) == (not warnings) == used


def test_draft_model_is_closed_if_drafts_can_not_be_verified(
        native, tmp_path, monkeypatch):
    import random_model
    small = checkpoint.open(str(random_model.save(tmp_path / 'small', 'qwen3', 0)))
    experts = checkpoint.open(str(random_model.save(tmp_path / 'experts', 'qwen3_moe', 0)))
    closed, close = [], native.close

    def noting(engine):
        closed.append(engine.footprint.model_type)
        close(engine)

    monkeypatch.setattr(native, 'close', noting)
    engine = engines.build(experts, CPU, passes=True, draft=small)
    assert closed == ['qwen3'] and engine.drafter is None
    assert engine.footprint.details['speculation'].startswith('off: experts')
    assert 'draft_model' not in engine.footprint.details
    engine.close()
    other = engines.build(small, replace(CPU, name='transformers'), passes=True, draft=small)
    assert 'does not support drafts' in other.footprint.details['speculation']
    other.close()


def test_both_models_have_to_fit(native, tmp_path, monkeypatch):
    from physai_decode.engines import device
    import random_model
    model = checkpoint.open(str(random_model.save(tmp_path, 'qwen3', 0)))
    monkeypatch.setattr(device, 'free_bytes', lambda device: 10)
    with pytest.raises(EngineError, match='draft model .* cannot be used: not enough memory.*; or '
                                          'set speculation.draft_model'):
        engines.build(model, CPU, passes=True, draft=model)
    free = [10**9]
    monkeypatch.setattr(device, 'free_bytes', lambda device: free[0])
    close, closed = native.close, []

    def load(self, *arguments, own=native.__init__, **options):
        own(self, *arguments, **options)
        free[0] = 10

    monkeypatch.setattr(native, '__init__', load)
    monkeypatch.setattr(native, 'close', lambda self: (closed.append(self), close(self)))
    with pytest.raises(EngineError, match='beside a draft model of .* GB: not enough memory'):
        engines.build(model, CPU, passes=True, draft=model)
    assert len(closed) == 1


def test_another_tokenizer_is_refused(tmp_path):
    folder = shutil.copytree(checkpoint.open(TINY).folder, tmp_path / 'draft')
    path = folder / 'tokenizer.json'
    path.write_text(path.read_text().replace('"!": ', '"~~": '))
    with closing(host.TextProcess(str(checkpoint.open(TINY).folder), DecodeConfig().chat)) as text:
        with pytest.raises(EngineError, match=(
                '^the draft model .* cannot be used: it has another tokenizer than the model: '
                'id 3 is "~~", but in the model it is "!"; take')):
            host._open_draft(config_of(folder), text, print)


@pytest.mark.parametrize(('theirs', 'difference'), [
    ({'a': 0, 'b': 1, 'c': 2}, ''), ({'a': 0, 'b': 1}, ''), ({'a': 0, 'b': 1, 'c': 2, 'x': 3}, ''),
    ({'a': 0, 'c': 1, 'b': 2}, 'id 1 is "c", but in the model it is "b"'),
    ({'a': 0, 'b': 1, 'x': 2}, 'id 2 is "x", but in the model it is "c"'),
    ({'a': 0, 'b': 1, 'c': 7}, '"c" is id 7, but in the model it is 2')])
def test_tokens_and_ids_have_to_agree_where_both_have_them(theirs, difference):
    """Sizes may differ."""
    ours, other = (SimpleNamespace(_backend=Tokenizer(WordLevel(vocab, 'a')))
                   for vocab in ({'a': 0, 'b': 1, 'c': 2}, theirs))
    assert host.TextProcess.difference(ours, other) == difference


def test_draft_model_has_to_exist(tmp_path):
    with pytest.raises(ConfigError, match=r'speculation\.draft_model is empty: set it'):
        host._open_draft(config_of(''), None, print)
    with pytest.raises(EngineError, match=r"speculation\.draft_model '.*none': no such folder"):
        host._open_draft(config_of(tmp_path / 'none'), None, print)


@pytest.mark.parametrize('name', ['tokenizer.json', 'config.json', 'model.safetensors'])
def test_error_names_the_draft_model(tmp_path, name):
    folder = shutil.copytree(checkpoint.open(TINY).folder, tmp_path / 'draft')
    (folder / name).write_text('{')
    with pytest.raises(engines.DraftError, match=f'^the draft model {folder} cannot be used: .*'
                                                 f'{name}.*; or set speculation'):
        host._open_draft(config_of(folder), None, print)


def test_load_tells_the_notes_of_a_draft_model(tmp_path):
    folder, told = shutil.copytree(checkpoint.open(TINY).folder, tmp_path / 'draft'), []
    with editing(folder / 'config.json') as config:
        config['architectures'] = ['Strange']
    with closing(host.TextProcess(str(folder), DecodeConfig().chat)) as text:
        host._open_draft(config_of(folder), text, told.append)
    assert len(told) == 2 and told[1].startswith('draft model: config_notes: ')
    assert 'Strange' in told[1]
