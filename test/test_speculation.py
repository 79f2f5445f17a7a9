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

"""Speculation: drafts, the policy that limits their cost, and unchanged answers."""

from dataclasses import replace
from functools import partial
from itertools import chain
from itertools import product
from random import Random
from types import SimpleNamespace

from fake_engine import FakeEngine
from fake_engine import forever
from fake_engine import say
from physai_decode import checkpoint
from physai_decode import engines
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import SpeculationConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.decode_loop import Step
from physai_decode.engine import Choices
from physai_decode.engine import EngineError
from physai_decode.engine import NO_TOKEN
from physai_decode.request import Form
from physai_decode.speculation import Experience
from physai_decode.speculation import INITIAL_BALANCE
from physai_decode.speculation import Lookup
from physai_decode.speculation import MAX_BALANCE
from physai_decode.speculation import MAX_OVERHEAD
from physai_decode.speculation import Policy
from physai_decode.speculation import Speculation
import pytest

try:
    import random_model
except ImportError:         # without torch, only the tests of drafts and of the loop run
    FAMILIES = ()
else:
    FAMILIES = random_model.DENSE

LOOKUP = SpeculationConfig('lookup')
COSTS = {1: 1.0, 2: 1.02, 4: 1.05, 8: 1.1}


def drafting_loop(engine, speculation=LOOKUP, warn=print):
    """Return a loop whose clock stands still, so that the costs of passes stay as given."""
    return DecodeLoop(engine, 0.0, lambda: 0.0, speculation, warn)


# --- drafts ----------------------------------------------------------------------------

def test_drafts_what_followed_the_last_tokens():
    """After the last occurrence of the longest n-gram."""
    assert Lookup([5, 6, 7, 8, 9, 5, 6]).draft(3) == [7, 8, 9]
    assert Lookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).draft(1) == [4]
    assert Lookup([2, 3, 4, 2, 3, 5, 2, 3]).draft(1) == [5]
    assert Lookup([1, 2, 3, 4]).draft(4) == []
    assert Lookup([1]).draft(4) == []


def test_draft_can_repeat_itself():
    assert Lookup([1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]
    assert Lookup([7, 7, 7]).draft(4) == [7, 7, 7, 7]


def test_draft_contains_no_end_token():
    assert Lookup([5, 6, 7, 0, 9, 5, 6], {0}).draft(3) == [7]
    assert Lookup([5, 6, 0, 9, 5, 6], {0}).draft(3) == []


def test_draft_advances_with_the_answer():
    lookup = Lookup([5, 6, 7, 8, 9, 5])
    assert lookup.draft(2) == []
    assert lookup.add(6) is None
    assert lookup.draft(2) == [7, 8]
    assert lookup.add(7) is True
    assert lookup.draft(2) == [8, 9]
    assert lookup.add(3) is False
    assert lookup.draft(2) == []


def test_drafts_are_those_of_a_linear_search(seeds=30):
    """At each position of random sequences that grow token by token."""
    for seed in range(seeds):
        draw = Random(seed)
        ids = [draw.randrange(4) for _ in range(60)]
        lookup = Lookup(ids[:20])
        for place in range(20, 60):
            if lookup.add(ids[place]):
                continue                # the match continues, so no search is needed
            known, expected = ids[:place + 1], []
            for size in (2, 3):
                for end in range(size, place + 1):
                    if known[end - size:end] == known[-size:]:
                        expected = known[end:end + 1]
            assert lookup.draft(1) == expected


# --- policy ---------------------------------------------------------------------------

def cost_of(policy, accepted):
    """Return an answer's cost in steps, and its tokens; ``accepted`` tells which drafts are."""
    steps, tokens = 0.0, 0
    for right in accepted:
        rows = policy.best(8)[1]
        brought = rows if right else 1
        for place in range(brought):
            policy.learn(right or place < brought - 1)
        if rows > 1:
            policy.spend(rows, brought)
        steps += policy._experience.of(rows)
        tokens += brought
    return steps, tokens


@pytest.mark.parametrize('costs', [COSTS, {1: 1.0, 2: 1.3, 4: 2.0, 8: 3.5}, {1: 1.0, 2: 9.0}])
@pytest.mark.parametrize('count', [20, 100, 3000])
def test_rejected_drafts_cost_little(costs, count):
    steps, tokens = cost_of(Policy(Experience(costs)), [False] * count)
    assert tokens == count
    assert steps <= (1 + MAX_OVERHEAD) * count + INITIAL_BALANCE


@pytest.mark.parametrize('period', [2, 3, 7, 50])
def test_cost_is_bounded_in_any_order_of_acceptance(period):
    """Earlier savings can be lost again, up to `MAX_BALANCE`."""
    accepted = [place // period % 2 == 0 for place in range(2000)]
    steps, tokens = cost_of(Policy(Experience(COSTS)), accepted)
    assert steps <= tokens
    steps, tokens = cost_of(policy := Policy(Experience(COSTS)), [True] * 100)
    again, more = cost_of(policy, [False] * 1000)
    assert again <= (1 + MAX_OVERHEAD) * more + MAX_BALANCE


def test_accepted_drafts_grow():
    policy = Policy(Experience(COSTS))
    steps, tokens = cost_of(policy, [True] * 30)
    assert policy.best(8)[1] == 8
    assert tokens / steps > 6
    assert policy.best(3)[1] == 3          # where the answer has room for no more


def test_avoids_passes_that_cost_more_than_they_bring():
    policy = Policy(Experience({1: 1.0, 2: 1.1, 4: 4.5}))
    for _ in range(100):
        policy.learn(True)
    assert policy.best(8)[1] == 2


def test_resumes_when_drafts_would_have_been_accepted():
    policy = Policy(Experience(COSTS))
    cost_of(policy, [False] * 200)
    assert policy.best(8)[1] == 1
    for _ in range(30):
        policy.learn(True)
    assert policy.best(8)[1] > 1


def test_drafts_are_repeatable():
    draw = Random(1)
    ids = [draw.randrange(3) for _ in range(200)]
    drafts = []
    for _ in range(2):
        speculation = Speculation(ids[:50], Experience(COSTS))
        drafts.append([])
        for token_id in ids[50:]:
            speculation.rows(9)
            drafts[-1].append(speculation.draft())
            speculation.take((token_id,), 1 + len(drafts[-1][-1]))
    assert drafts[0] == drafts[1] and any(drafts[0])


def test_costs_of_passes_follow_their_times():
    """A delayed pass counts at most double; nothing is learned before a step was timed."""
    experience = Experience({1: 1.0, 2: 1.47, 8: 2.97})
    experience.learn(2, 9.0)
    assert dict(experience.items()) == {2: 1.5, 8: 3.0}
    for _ in range(50):
        experience.learn(1, 0.1)
        experience.learn(2, 0.2)
        experience.learn(5, 0.4)
    assert dict(experience.items()) == pytest.approx({2: 2.0, 8: 4.0}, rel=0.01)
    experience.learn(2, 100.0)
    assert experience.of(2) == pytest.approx(2.0 + 2.0 / 8, rel=0.01)
    assert experience.of(3) == experience.of(8)


def test_costs_that_a_busy_device_raised_fall_again():
    """It is slow for passes and steps alike, but there are no steps to compare with."""
    experience = Experience(COSTS, 0.1, step_s=0.01)

    def rows_of(**source):
        policy = Policy(experience)
        for _ in range(100):
            policy.learn(True, None, True)
        return policy.best(8, **source)[1]

    while (rows := rows_of()) > 1:
        experience.learn(rows, 0.01 * 8 * COSTS[rows])
    for _ in range(2000):
        experience.learn(1, 0.01)
    assert rows_of() > 1
    while rows_of(by_model=True) > 1:
        experience.learn_draft(1, 0.01 * 80 * 0.1)
    for _ in range(2000):
        experience.learn(1, 0.01)
    assert rows_of(by_model=True) > 1


def test_asks_a_constraint_only_after_tokens_that_led_to_forced_ones():
    experience = Experience(COSTS)
    for _ in range(4):
        assert experience.asks(7)
        experience.asked(7, False)
    assert not experience.asks(7) and experience.asks(8)
    for found in (True, False, False, False, False):
        experience.asked(8, found)
        assert experience.asks(8)


def test_asks_again_now_and_then():
    """Another constraint may force tokens where those before have not."""
    experience, asked = Experience(COSTS), 0
    for _ in range(1000):
        if experience.asks(7):
            experience.asked(7, False)
            asked += 1
    assert 10 < asked < 30
    while not experience.asks(7):
        pass
    experience.asked(7, True)
    assert experience.asks(7)


# --- the loop -----------------------------------------------------------------------------------

class VerifyingEngine(FakeEngine):
    """Verifies drafts against its script; it can have steps in flight, as on a GPU."""

    ahead = 0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.pass_costs, self.drafter = COSTS, None
        self.drafts, self.announced, self.flying = [], [], 0

    @property
    def is_idle(self):
        return not self.flying

    def step(self, remaining):
        """Take a step, with as many more in flight as allowed."""
        self.announced.append(remaining)
        self.flying = min(max(self.flying - 1, remaining), self.ahead)
        return super().step(remaining)

    def verify(self, draft):
        """Compare, and continue after the accepted tokens."""
        assert self.is_idle and 0 < len(draft) < 8
        self.drafts.append(list(draft))
        chosen = [super().step(0).token_id]
        for guess in draft:
            if chosen[-1] != guess:
                break
            chosen.append(super().step(0).token_id)
        return Choices(tuple(chosen), 0.002)


class PipelinedEngine(VerifyingEngine):
    """Has up to two steps in flight."""

    ahead = 2


def steps_of(engine, prompt, sampling, speculation=LOOKUP):
    return list(drafting_loop(engine, speculation).stream(prompt, sampling))


def text_of(steps):
    return ''.join(map(chr, chain.from_iterable(step.token_ids for step in steps)))


@pytest.mark.parametrize('kind', [VerifyingEngine, PipelinedEngine])
def test_copies_of_the_prompt_take_few_passes(kind):
    answer = 'the cup is on the table, the lid is on the cup, the cup is on the table'
    engine = kind(lambda ids: say(answer, end=False), max_context=200)
    prompt = [ord(each) for each in 'Where? the cup is on the table, the lid']
    steps = steps_of(engine, prompt, SamplingConfig(max_new_tokens=len(answer)))
    assert text_of(steps) == answer
    assert len(steps) < len(answer) / 2
    assert engine.fed == [*prompt, *map(ord, answer[:-1])]
    assert steps[-1].device_s in (0.001, 0.002)


@pytest.mark.parametrize('kind', [VerifyingEngine, PipelinedEngine])
@pytest.mark.parametrize('limit', [1, 2, 3, 17, 64])
def test_ends_at_the_limit_or_the_end_of_the_context(kind, limit):
    engine = kind(lambda ids: forever(), max_context=40)
    prompt = [1, 2, 3, 4, 5]
    answer = text_of(steps_of(engine, prompt, SamplingConfig(max_new_tokens=limit)))
    assert len(answer) == min(limit, 35)
    assert len(engine.fed) == len(prompt) + len(answer) - 1


def test_no_step_runs_ahead_of_a_draft():
    """Without a draft, steps run ahead as usual."""
    engine = PipelinedEngine(lambda ids: say('abcdefgh, abcdefgh', end=False), max_context=200)
    steps_of(engine, [1], SamplingConfig(max_new_tokens=18))
    assert engine.announced[0] == 16
    assert 0 in engine.announced
    assert engine.drafts


def test_is_off_by_default_and_for_other_engines():
    for engine, speculation in ((VerifyingEngine(lambda ids: forever()), SpeculationConfig()),
                                (FakeEngine(lambda ids: forever()), LOOKUP)):
        steps = steps_of(engine, [1, 2], SamplingConfig(max_new_tokens=20), speculation)
        assert [len(step.token_ids) for step in steps] == [1] * 20


def test_can_be_disabled_for_one_answer():
    engine = VerifyingEngine(lambda ids: forever())
    loop = drafting_loop(engine)
    list(loop.stream([1, 2], SamplingConfig(max_new_tokens=20), drafts=False))
    assert not engine.drafts


def test_pass_with_logits_that_are_not_numbers():
    """The valid tokens come first."""
    words = [*say('ababab', end=False), Step((NO_TOKEN,))]
    stream = drafting_loop(VerifyingEngine(lambda ids: words)).stream(
        [ord('a'), ord('b'), ord('a'), ord('b')], SamplingConfig())
    steps = []
    with pytest.raises(EngineError, match='not numbers'):
        for step in stream:
            steps.append(step)
    assert text_of(steps) == 'ababab'


def test_failed_pass_leaves_nothing_cached():
    engine = VerifyingEngine(lambda ids: forever())
    engine.verify = lambda draft: 1 / 0
    loop = drafting_loop(engine)
    with pytest.raises(ZeroDivisionError):
        list(loop.stream([1, 2, 3], SamplingConfig()))
    assert loop.cached_ids == []


# --- the native engine --------------------------------------------------------------------------

SAMPLINGS = (
    {}, {'temperature': 0.7}, {'temperature': 1.0, 'top_k': 20, 'top_p': 0.9},
    {'repetition_penalty': 1.3}, {'repetition_penalty': 0.6},
    {'temperature': 0.9, 'min_p': 0.05, 'repetition_penalty': 1.1})


def answers(loop, prompts, count, first=0):
    """Return an answer per prompt, with alternating sampling settings, and the passes."""
    ids, passes = [], 0
    for number, prompt in enumerate(prompts, first):
        sampling = SamplingConfig(
            max_new_tokens=count, seed=number, **SAMPLINGS[number % len(SAMPLINGS)])
        steps = [step for step in loop.stream(prompt, sampling) if step.token_ids]
        ids.append(list(chain.from_iterable(step.token_ids for step in steps)))
        passes += len(steps)
    return ids, passes


def always_draft(monkeypatch):
    """Verify each draft, with a random number of its tokens."""
    draw, source = Random(3), Random(4)
    monkeypatch.setattr(Policy, 'best', lambda self, most, forced=0, by_model=False: (
        1 + source.random(), draw.randint(1, max(1, most))))


def drafting(kind, folder, config=None):
    """Return the loop of an engine that verifies drafts, whatever its passes cost."""
    engine = kind(checkpoint.open(str(folder)), config or CPU, passes=True)
    engine.pass_costs = COSTS
    return DecodeLoop(engine)


def check_same_answers(loop, prompts, count, decode=answers, speculation=LOOKUP, warn=print):
    """
    Assert the same answers with and without drafts; returns the number of saved passes.

    :param decode: returns the answers of a loop, and its passes.
    """
    results = []
    for each in (SpeculationConfig(), speculation):
        loop.engine.rewind(0)
        results.append(decode(drafting_loop(loop.engine, each, warn), prompts, count))
    (expected, steps), (got, passes) = results
    assert got == expected
    return steps - passes


CPU = EngineConfig(device='cpu', cpu_threads=1, max_context=160)


@pytest.mark.parametrize('family', FAMILIES)
def test_random_models_answer_the_same(native, family, tmp_path, monkeypatch):
    """Prompts of few different tokens lead to many drafts, most of which are wrong."""
    always_draft(monkeypatch)
    loop = drafting(native, random_model.save(tmp_path, family, 1))
    draw = Random(family)
    prompts = [[draw.randrange(3, 3 + draw.choice((2, 9, 500)))
                for _ in range(draw.randint(2, 70))] for _ in range(6)]
    first = FAMILIES.index(family)     # to test all sampling settings
    assert check_same_answers(loop, prompts, 30, partial(answers, first=first)) > 0, (
        'no draft was accepted: with random weights, that can be chance; change the settings of '
        'the family in random_model.py, or add it at the end')
    loop.engine.close()


def test_embedded_model_answers_the_same(native):
    """It needs fewer passes."""
    from physai_decode.tokenizer_files import load_tokenizer
    folder = checkpoint.open('builtin:tiny_planner').folder
    loop = drafting(native, folder, replace(CPU, max_context=512))
    tokenizer = load_tokenizer(str(folder))
    prompts = [tokenizer.apply_chat_template(
        [{'role': 'user', 'content': f'{verb} the {thing}{rest}'}],
        add_generation_prompt=True, tokenize=True, return_dict=False)
        for verb in ('Bring me', 'Find', 'Throw away')
        for thing in ('red cup', 'small screwdriver')
        for rest in ('.', ' from the kitchen table, then close the box and go to the door.')]
    saved = check_same_answers(loop, prompts, 60)
    assert saved > 0
    loop.engine.close()


PLAN = {'type': 'array', 'maxItems': 6, 'items': {'type': 'object', 'properties': {
    'action': {'enum': ['go', 'find', 'pick']}, 'object': {'type': 'string', 'maxLength': 12}},
    'required': ['action', 'object'], 'additionalProperties': False}}
FORMS = (Form('json_schema', PLAN, 'schema'), Form('regex', '(ab|ac){2,9}[0-9]{3}', 'regex'),
         Form('choice', ['open the door', 'open the window', 'close'], 'choice'))


def vocabulary_of(model):
    """Return the vocabulary that compiles constraints for a model."""
    from physai_decode.constraint import Vocabulary
    from physai_decode.tokenizer_files import load_tokenizer
    return Vocabulary(load_tokenizer(str(model.folder)).backend_tokenizer, model.vocab_size,
                      model.eos_token_ids)


def constrained(vocabulary, loop, prompts, count):
    """Return the constrained answer to each prompt, and the number of passes."""
    ids, passes = [], 0
    for number, prompt in enumerate(prompts):
        sampling = SamplingConfig(
            max_new_tokens=count, seed=number, **SAMPLINGS[number % len(SAMPLINGS)])
        constraint = vocabulary.constraint(FORMS[number % len(FORMS)])
        steps = [step for step in loop.stream(prompt, sampling, constraint) if step.token_ids]
        ids.append(list(chain.from_iterable(step.token_ids for step in steps)))
        assert all(step.mask_s is not None for step in steps)
        passes += len(steps)
    return ids, passes


@pytest.mark.parametrize('kind', ['host', 'piped'])
def test_passes_follow_a_constraint(native, kind, tmp_path, monkeypatch):
    """Forced tokens are drafted; each row has its mask, on the host and in a captured draw."""
    pytest.importorskip('llguidance')
    from test_constraint import replace_cuda
    always_draft(monkeypatch)
    model = checkpoint.open('builtin:tiny_planner')
    loop = drafting(native, model.folder, replace(CPU, max_context=200))
    if kind == 'piped':
        replace_cuda(monkeypatch)
        loop.engine.pipeline = loop.engine.piped(False)
        loop.engine.transformer.ops._on_host = False
        loop.engine._sampler = loop.engine.transformer.ops.sampler(
            model.vocab_size, loop.engine.transformer.token.device)
    draw = Random(7)
    prompts = [[draw.randrange(3, 3 + draw.choice((2, 9, 500)))
                for _ in range(draw.randint(2, 60))] for _ in range(36 if kind == 'host' else 12)]
    assert check_same_answers(loop, prompts, 50, partial(constrained, vocabulary_of(model))) > 0
    loop.engine.close()


def test_drafts_what_a_constraint_forces():
    pytest.importorskip('llguidance')
    from physai_decode.tokenizer_files import load_tokenizer
    model = checkpoint.open('builtin:tiny_planner')
    tokenizer = load_tokenizer(str(model.folder)).backend_tokenizer
    constraint = vocabulary_of(model).constraint(
        Form('choice', ['open the door', 'close'], 'choice'))
    ids = tokenizer.encode('open the door', add_special_tokens=False).ids
    constraint.accept(ids[0])
    assert constraint.forced() == ids[1:]
    speculation = Speculation([1, ids[0]], Experience(COSTS), model.eos_token_ids)
    assert speculation.rows(9, constraint) == len(ids)
    assert speculation.draft(constraint) == ids[1:]
    wrong = [ids[1], ids[1]]
    assert constraint.fits(wrong) == 1
    masks = [bytes(mask) for mask in constraint.walk(ids[1:])]
    assert len(list(constraint.walk(wrong))) == 2
    assert len(masks) == len(ids) - 1           # nothing can follow the last one
    for token_id, mask in zip(ids[1:], masks):
        assert bytes(constraint.mask()) == mask
        constraint.accept(token_id)
    assert constraint.ended


@pytest.mark.parametrize(('family', 'name', 'reason'), [
    ('qwen3_moe', 'native', 'experts take their tokens one by one'),
    ('qwen3', 'transformers', 'the engine transformers does not support drafts; native does')])
def test_reports_why_it_is_off(native, family, name, reason, tmp_path):
    """Answers are those without speculation."""
    messages = []
    model = checkpoint.open(str(random_model.save(tmp_path, family, 0)))
    engine = engines.build(model, replace(CPU, name=name), messages.append, passes=True)
    assert engine.footprint.details['speculation'] == f'off: {reason}'
    assert f'speculation is off: {reason}' in messages
    steps = steps_of(engine, [5, 6, 5, 6, 5, 6], SamplingConfig(max_new_tokens=8))
    assert [len(step.token_ids) for step in steps if step.token_ids] == [1] * 8
    engine.close()


def test_kernels_of_other_forms_take_one_row(native):
    from physai_decode.engines.native import start
    from physai_decode.engines.native.mlp import Mlp
    weight = SimpleNamespace(kind='int8-g32')
    layer = SimpleNamespace(qkv=weight, out=weight, mlp=Mlp(weight, weight))
    loaded = SimpleNamespace(layers=[layer], head=weight)
    reason = start._no_passes(loaded, SimpleNamespace(name='triton 3.7'))
    assert reason == 'the kernels of int8-g32 weights take one row'
    assert not start._no_passes(loaded, SimpleNamespace(name='torch'))


class Direct:
    """A pipeline on a CPU: up to two passes in flight, each of which runs at its launch."""

    def __init__(self, engine):
        self.engine, self.done = engine, []

    @property
    def flying(self):
        return len(self.done)

    @property
    def full(self):
        return self.flying == 2

    def prepare(self, plan, begin):
        """Do nothing."""

    def launch(self, plan, place, restrict=None, rows=1):
        """Run a pass, and keep its tokens."""
        import torch
        with torch.inference_mode():
            self.engine.transformer.step(rows)
            if plan.mask:
                restrict()
            self.engine._draw(plan, rows)
        self.done.append(self.engine._history[place:place + rows].clone())

    def collect(self):
        """Return the tokens of the oldest pass."""
        return self.done.pop(0), 0.001

    def drain(self):
        """Drop the passes in flight."""
        self.done.clear()


@pytest.fixture
def piped(native, monkeypatch):
    """Return a factory of engines whose steps run ahead of the host, as on a GPU."""
    from physai_decode.engines import logits
    from physai_decode.engines.native import self_check
    from physai_decode.engines.native import start

    def make(folder, ops):
        monkeypatch.setattr(start, 'operations', lambda *_: ops)
        # Steps at the load, which are slow in the interpreter.
        for module, name in ((start, 'warm_up'), (logits, 'check'), (self_check, 'check')):
            monkeypatch.setattr(module, name, lambda *_: None)
        monkeypatch.setattr(start, 'pass_costs', lambda *_: {})
        loop = drafting(native, folder, replace(CPU, dtype='float32'))
        loop.engine.pipeline = Direct(loop.engine)
        return loop

    return make


@pytest.mark.parametrize('family', ['qwen3', 'mistral_window'])
def test_captured_passes_answer_the_same(piped, family, tmp_path, monkeypatch):
    """The device decides which rows count; steps in flight end before a draft is verified."""
    from physai_decode.engines.native.ops import TorchOps
    always_draft(monkeypatch)
    loop = piped(random_model.save(tmp_path, family, 1), TorchOps(on_host=False))
    draw = Random(family)
    prompts = [[draw.randrange(3, 3 + draw.choice((2, 9, 500)))
                for _ in range(draw.randint(2, 70))] for _ in range(18)]
    assert check_same_answers(loop, prompts, 30) > 0
    loop.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dense', 'gptq', 'nvfp4'])
def test_kernels_answer_the_same(piped, kind, tmp_path, monkeypatch):
    """In Triton's interpreter, with the kernels of the sampler."""
    import random_formats
    import random_gptq
    import torch
    if torch.cuda.is_available():
        pytest.skip('the interpreter is for machines without a GPU')
    kernels = pytest.importorskip('physai_decode.engines.native.pass_kernels')
    small = {'vocab_size': 64, 'hidden_size': 64, 'intermediate_size': 64, 'num_hidden_layers': 1,
             'num_attention_heads': 2, 'num_key_value_heads': 1, 'head_dim': 64}
    if kind == 'gptq':
        random_gptq.save(tmp_path, 'qwen3', 0, 32, **small)
    elif kind == 'nvfp4':
        random_formats.save(tmp_path, 'qwen3', random_formats.float4('nvfp4'), 0, **small)
    else:
        random_model.save(tmp_path, 'qwen3', 0, **small)
    always_draft(monkeypatch)
    loop = piped(tmp_path, kernels.PassOps(torch.device('cpu'), splits=2))
    prompts = [[5, 6, 7, 5, 6, 7, 5, 6], [9] * 5]       # the second repeats itself
    if kind == 'dense':     # int4 is several times as slow; its rows are compared below
        assert check_same_answers(loop, prompts, 8, partial(answers, first=3)) > 0
    check_rows(loop.engine.transformer, 3, torch.Generator().manual_seed(1), places=(45,))
    loop.engine.close()


@pytest.mark.parametrize(('kind', 'rows', 'on_host'), [
    *((family, 5, False) for family in FAMILIES),
    *product(('gemma3_text', 'gptq'), (2, 3, 8), (False, True))])
def test_row_is_bit_for_bit_a_step(native, on_host, kind, rows, tmp_path, monkeypatch):
    from physai_decode.engines.native import start
    from physai_decode.engines.native.ops import TorchOps
    import random_gptq
    import torch
    ops = TorchOps(on_host)
    monkeypatch.setattr(start, 'operations', lambda *_: ops)
    if kind == 'gptq':
        random_gptq.save(tmp_path, 'qwen2', 0, 32, act_order=True, symmetric=False)
    else:
        random_model.save(tmp_path, kind, 0)
    engine = drafting(native, tmp_path).engine
    check_rows(engine.transformer, rows, torch.Generator().manual_seed(rows))
    engine.close()


def check_rows(transformer, rows, generator, places=(0, 1, 45, 100)):
    """Compare logits, keys and values of a pass with those of steps, at a few positions."""
    import torch
    t = transformer
    with torch.inference_mode():
        for cache in (t.keys, t.values):
            cache.copy_(torch.randn(cache.shape, generator=generator))
        vocab = t.architecture.vocab_size
        ids = torch.randint(0, vocab, (rows,), generator=generator)
        for place in places:
            t.position.fill_(place)
            t.tokens[:rows] = ids
            t.step(rows)
            got = [each.clone() for each in t.row_logits[:rows]]
            caches = t.keys.clone(), t.values.clone()
            for row in range(rows):
                t.position.fill_(place + row)
                t.token.copy_(ids[row:row + 1])
                t.step()
                assert torch.equal(got[row], t.logits)
            assert torch.equal(caches[0], t.keys) and torch.equal(caches[1], t.values)
