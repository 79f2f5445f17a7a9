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

"""How both engines choose a token, against what the transformers library keeps and draws from."""

from dataclasses import dataclass
from dataclasses import replace
from itertools import product
import math
import os

import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

from physai_decode.config import SamplingConfig
from physai_decode.engine import NO_TOKEN
from physai_decode.engines import sampling as native
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.sampling import Drawer
from physai_decode.engines.sampling import FEW
from physai_decode.engines.sampling import GREEDY
from physai_decode.engines.sampling import HostSampler
from physai_decode.engines.sampling import most_likely
from physai_decode.engines.sampling import Plan
from physai_decode.engines.sampling import Row
from physai_decode.engines.sampling import Sampler
import transformers

VOCAB = 50
DRAWS = 3000
CPU = torch.device('cpu')
PROMPT = [3, 9, 9, 21, 40]
PLAIN = SamplingConfig(temperature=1.0)
SETTINGS = {
    'plain': PLAIN,
    'cool': replace(PLAIN, temperature=0.4),
    'hot': replace(PLAIN, temperature=2.5),
    'top_k': replace(PLAIN, top_k=7),
    'top_k_of_more_than_all': replace(PLAIN, top_k=1000),
    'top_p': replace(PLAIN, top_p=0.6),
    'top_p_of_nothing': replace(PLAIN, top_p=0.0),
    'min_p': replace(PLAIN, min_p=0.1),
    'min_p_of_all': replace(PLAIN, min_p=1.0),
    'penalty': replace(PLAIN, repetition_penalty=1.8),
    'reward': replace(PLAIN, repetition_penalty=0.5),
    'all': SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05,
                          repetition_penalty=1.3)}


def random_logits(seed, vocab=VOCAB):
    return 2.0 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def peaked(logits):
    return logits.index_add(0, torch.arange(5), 10.0 + torch.arange(5.0))


def masked(logits):
    return logits.where(torch.arange(len(logits)) % 3 > 0, -math.inf)


SHAPES = {
    'as they come': lambda logits: logits, 'peaked': peaked, 'masked': masked,
    'nearly equal': lambda logits: 1e-3 * logits, 'far apart': lambda logits: 50.0 * logits,
    'ties': torch.round, 'all equal': torch.zeros_like}
WITH_TIES = ('ties', 'all equal')
GRID = [
    SamplingConfig(0.7, top_k, top_p, min_p, penalty)
    for top_k, top_p, min_p, penalty in product(
        (0, 1, 7, 1000), (1.0, 0.9, 0.35, 0.0, 1e-4, 0.9999), (0.0, 0.1, 1.0), (1.0, 1.3))
] + [SamplingConfig(temperature, 0, 0.8, 0.02) for temperature in (1e-38, 1e-3, 1.0, 10.0)]


@pytest.fixture(scope='module')
def network():
    """Return any network of the library, for its method that sets up the logits processors."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1))


@pytest.fixture
def library(network):
    """Return the function that computes the scores which the library's `generate` samples from."""
    def scores(logits, sampling, seen):
        generation = transformers.GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k,
            top_p=sampling.top_p, min_p=sampling.min_p or None,
            repetition_penalty=sampling.repetition_penalty)
        processors = network._get_logits_processor(
            generation, input_ids_seq_length=len(seen), encoder_input_ids=None,
            prefix_allowed_tokens_fn=None, logits_processor=[], device='cpu')
        return processors(torch.tensor([seen]), logits[None])[0]
    return scores


def assert_drawn_from(counts, probabilities):
    """Test counts [vocab] against probabilities [vocab] by chi-square, at five deviations."""
    draws = counts.sum()
    assert counts[probabilities == 0].sum() == 0
    # What is expected less than five times is put together, as the test's approximation needs.
    wanted = probabilities * draws
    rare = wanted < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    wanted = torch.cat([wanted[~rare], wanted[rare].sum().view(1)])
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = ((counts - wanted)**2 / wanted).sum()
    assert statistic <= freedom + 5 * (2 * freedom)**0.5


def count(tokens):
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()


class State:
    """What `Sampler.draw` works on: a token, its place, and a history."""

    def __init__(self, place=4, device=CPU):
        self.position = torch.tensor([place], device=device)
        self.token = torch.full((1,), -7, device=device)
        self.history = torch.full((place + 64,), -7, device=device)

    def draw(self, sampler, plan, logits):
        """Return the id that the host reads; assert that the device goes on with a valid one."""
        place, before, history = int(self.position) + 1, logits.clone(), self.history.clone()
        sampler.draw(plan, logits, self.position, self.token, self.history)
        assert torch.equal(logits.nan_to_num(), before.nan_to_num())
        assert int(self.position) == place
        assert 0 <= int(self.token) < len(logits)
        chosen = int(self.history[place])
        assert chosen in (int(self.token), NO_TOKEN)
        history[place] = chosen
        assert torch.equal(self.history, history)
        return chosen


def begun(kind, sampling, vocab=VOCAB, prompt=PROMPT, device=CPU):
    """Return a sampler that has taken a request's settings, and its plan."""
    sampler = kind(vocab, device)
    return sampler, sampler.begin(sampling, torch.tensor(prompt, device=device))


def native_draw(sampler, plan, logits, place):
    return State(place - 1).draw(sampler, plan, logits)


@pytest.fixture(params=['fixed', 'host', 'kernels'])
def kind(request):
    """Return each way to choose on this machine."""
    if request.param != 'kernels':
        return {'fixed': Sampler, 'host': HostSampler}[request.param]
    pytest.importorskip('triton')
    from physai_decode.engines.sampling_kernels import TritonSampler
    if torch.cuda.is_available():
        return lambda vocab, device: OnDevice(TritonSampler(vocab, torch.device('cuda'), 16, True))
    return TritonSampler


class OnDevice:
    """A sampler on a GPU for tests that know a CPU alone."""

    def __init__(self, sampler):
        self.sampler = sampler

    def begin(self, sampling, prompt_ids, constrained=False):
        """See `Sampler.begin`."""
        return self.sampler.begin(sampling, prompt_ids.cuda(), constrained)

    def restrict(self, mask):
        """See `Sampler.restrict`."""
        self.sampler.restrict(mask)

    def draw(self, plan, logits, *outputs):
        """See `Sampler.draw`."""
        moved = [each.cuda() for each in outputs]
        self.sampler.draw(plan, logits.cuda(), *moved)
        for output, each in zip(outputs, moved):
            output.copy_(each)


# --- the plan -----------------------------------------------------------------------------------

@pytest.mark.parametrize('sampling, key', [
    (SamplingConfig(), 'greedy'),
    (SamplingConfig(top_k=3, top_p=0.5, min_p=0.1, seed=9), 'greedy'),
    (SamplingConfig(repetition_penalty=1.1, top_k=3), 'repetition_penalty'),
    (PLAIN, 'temperature'),
    (replace(PLAIN, top_k=4, min_p=0.1), 'temperature+top_k+min_p'),
    (SETTINGS['all'], 'repetition_penalty+temperature+top_k+top_p+min_p')])
def test_a_plan_has_the_stages_that_are_needed(sampling, key):
    plan = Plan.of(sampling)
    assert plan.key == key
    assert (plan == GREEDY) == (key == 'greedy')
    assert {plan: 1}[Plan.of(replace(sampling, seed=5))] == 1


def test_what_draws_on_a_cpu_is_what_may_look_at_values():
    assert type(TorchOps(on_host=True).sampler(VOCAB, CPU)) is HostSampler
    assert type(TorchOps(on_host=False).sampler(VOCAB, CPU)) is Sampler


# --- what is kept -------------------------------------------------------------------------------

def spread(ids, scores, vocab):
    """Return scores [vocab], -inf where an id was dropped."""
    if ids is None:
        return scores
    assert torch.equal(ids, ids.unique())
    return torch.full((vocab,), -math.inf).index_copy_(0, ids, scores)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('vocab', [VOCAB, 5000])
@pytest.mark.parametrize('sampler_kind', [Sampler, HostSampler])
def test_the_same_tokens_are_kept_as_by_the_library(sampler_kind, vocab, shape, library):
    """Bit for bit the same scores; which of equals at top-p's border stay is another matter."""
    assert VOCAB < native.FEW < 5000      # whether scores are put into bins
    for seed, sampling in enumerate(GRID):
        logits = SHAPES[shape](random_logits(seed, vocab))
        sampler, plan = begun(sampler_kind, sampling, vocab)
        wanted = library(logits, replace(sampling, temperature=max(
            sampling.temperature, native.COLDEST)), PROMPT)
        got = spread(*sampler.kept(plan, logits), vocab)
        if shape in WITH_TIES:
            got, wanted = got.sort().values, wanted.sort().values
        assert torch.equal(got, wanted), (shape, sampling)


def test_of_equals_at_the_border_the_highest_ids_are_kept():
    for vocab in (8, 8192):
        for sampler_kind in (Sampler, HostSampler):
            sampler, plan = begun(sampler_kind, replace(PLAIN, top_p=0.5), vocab, [1])
            got = spread(*sampler.kept(plan, torch.zeros(vocab)), vocab)
            assert torch.equal(got == 0, torch.arange(vocab) >= vocab // 2)
            sampler, plan = begun(sampler_kind, replace(PLAIN, top_k=3), vocab, [1])
            assert (spread(*sampler.kept(plan, torch.zeros(vocab)), vocab) == 0).all()


@pytest.mark.parametrize('vocab', [51, 2501])
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_keep_and_draw_what_their_twin_does(shape, vocab):
    """With more scores at a border than stay in registers, too."""
    kernels = pytest.importorskip('physai_decode.engines.sampling_kernels')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    assert 51 < kernels.FEW.value < 2501
    every = 11 if vocab == 51 else 23
    for seed, sampling in enumerate(GRID[list(SHAPES).index(shape)::every]):
        sampling = replace(sampling, seed=seed)
        logits = SHAPES[shape](random_logits(seed, vocab)).to(device)
        twin, plan = begun(Sampler, sampling, vocab, PROMPT, device)
        sampler, _ = begun(kernels.TritonSampler, sampling, vocab, PROMPT, device)
        wanted = twin.kept(plan, logits)[1] > -math.inf
        one, other = State(device=device), State(device=device)
        assert one.draw(twin, plan, logits) == other.draw(sampler, plan, logits), sampling
        border = int(sampler._state[-1])
        for _ in range(2):
            assert one.draw(twin, plan, logits) == other.draw(sampler, plan, logits), sampling
        sampler.begin(sampling, torch.tensor(PROMPT, device=device))
        got = left_by_kernels(sampler, plan, logits, border)
        assert torch.equal(got, wanted), sampling


def left_by_kernels(sampler, plan, logits, border):
    """Return the ids kernels keep that found ``border``."""
    scores = sampler.kept(Plan(plan.repetition_penalty), logits)[1] * (1 / sampler._floats[0])
    keep = scores > -math.inf
    if plan.truncates:
        # As `_ordered`; the id counts only among equals.
        bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
        bits = (bits ^ ((bits >> 31) & 0x7fffffff)).long()
        keep &= (bits << 32) + torch.arange(len(bits), device=bits.device) >= border
    if plan.min_p:
        keep &= (scores - scores.max()).exp() >= sampler._floats[2]
    return keep


@pytest.mark.parametrize('name', SETTINGS)
def test_native_probabilities(name, library):
    sampling = SETTINGS[name]
    for seed in range(20):
        logits = random_logits(seed)
        sampler, plan = begun(HostSampler, sampling)
        ours = spread(*sampler.kept(plan, logits), VOCAB).softmax(0)
        wanted = library(logits, sampling, PROMPT).softmax(0)
        assert torch.allclose(ours, wanted, atol=1e-6)


# --- what is drawn ------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [
    'plain', 'cool', 'hot', 'top_k', 'top_p', 'top_p_of_nothing', 'min_p'])
def test_native_draws(name, library):
    sampling, logits = SETTINGS[name], random_logits(0)
    sampler, plan = begun(HostSampler, sampling)
    tokens = [native_draw(sampler, plan, logits, place) for place in range(1, DRAWS + 1)]
    assert_drawn_from(count(tokens), library(logits, sampling, PROMPT).softmax(0).double())


def test_native_draws_over_seeds(library):
    logits = random_logits(1)
    sampler = HostSampler(VOCAB, CPU)
    tokens = []
    for seed in range(DRAWS):
        plan = sampler.begin(replace(PLAIN, seed=seed), torch.tensor(PROMPT))
        tokens.append(native_draw(sampler, plan, logits, len(PROMPT)))
    assert_drawn_from(count(tokens), library(logits, PLAIN, PROMPT).softmax(0).double())


def test_native_draws_are_independent():
    logits = torch.zeros(VOCAB)
    sampler, plan = begun(HostSampler, PLAIN)
    tokens = torch.tensor([
        native_draw(sampler, plan, logits, place) for place in range(1, 2 * DRAWS + 1)])
    # Neighbours as one of the pairs of 5 * 5 equal classes.
    classes = tokens // (VOCAB // 5)
    pairs = torch.bincount(classes[0::2] * 5 + classes[1::2], minlength=25).double()
    assert_drawn_from(pairs, torch.full((25,), 1 / 25, dtype=torch.float64))


def test_waiting_times_are_exponential():
    """Over ids, places and seeds, down to the shortest, which decide."""
    ids = native.mix(torch.arange(100_000, dtype=torch.int32), 0, 0)
    for seed, place in ((0, 1), (0, 2), (1, 1), (2**31 - 1, 10**6)):
        times = native.waiting_times(
            ids, *native.keys(torch.tensor([seed]), torch.tensor([place]))).double()
        assert times.min() > 0
        assert abs(times.mean() - 1) < 5 / math.sqrt(len(ids))
        # -log(1 - u) is uniform in u: as many in each of 100 classes, within 6 deviations.
        uniform = -torch.expm1(-times)
        for values in (uniform, (uniform * 1000) % 1.0):
            counted = torch.histc(values.float(), 100, 0.0, 1.0)
            assert (counted - 1000).abs().max() < 6 * math.sqrt(1000)


def test_hashes_are_those_of_their_authors():
    """By whole numbers of any length."""
    def splitmix64(bits):
        bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94d049bb133111eb % 2**64
        return bits ^ bits >> 31

    def lowbias32(word):
        word = (word ^ word >> 16) * 0x7feb352d % 2**32
        word = (word ^ word >> 15) * 0x846ca68b % 2**32
        return word ^ word >> 16

    for seed, place in ((0, 0), (1, 2), (2**31 - 1, 10**6)):
        pair = [int(key) for key in native.keys(torch.tensor([seed]), torch.tensor([place]))]
        assert tuple(pair) == native.host_keys(seed, place)
        wanted = splitmix64(((seed << 32) + place * 0x9e3779b97f4a7c15) % 2**64)
        assert [key % 2**32 for key in pair] == [wanted % 2**32, wanted >> 32]
    words = [0, 1, 5, 2**31 - 1, -1, -2**31]
    mixed = native.mix(torch.tensor(words, dtype=torch.int32), 0, 0).tolist()
    assert [word % 2**32 for word in mixed] == [lowbias32(word % 2**32) for word in words]


def test_native_penalises_its_own_tokens(library):
    sampling = replace(PLAIN, repetition_penalty=1.8)
    for sampler_kind in (Sampler, HostSampler):
        sampler, plan = begun(sampler_kind, sampling)
        seen, state = list(PROMPT), State()
        for place in range(10):
            seen.append(state.draw(sampler, plan, random_logits(place)))
        ours = spread(*sampler.kept(plan, random_logits(99)), VOCAB)
        assert torch.equal(ours, library(random_logits(99), sampling, seen))


def test_native_is_repeatable(kind):
    answers = []
    for seed in (5, 5, 6):
        sampler, plan = begun(kind, replace(PLAIN, seed=seed))
        answers.append([native_draw(sampler, plan, random_logits(0), place)
                        for place in range(1, 50)])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize('name', ['plain', 'top_k', 'top_p', 'min_p'])
def test_a_place_draws_the_same_token_whatever_was_drawn_before(kind, name):
    """As a step that reads several guesses at once needs it."""
    sampler, plan = begun(kind, replace(SETTINGS[name], seed=3))
    forwards = [native_draw(sampler, plan, random_logits(place), place) for place in range(1, 20)]
    backwards = [native_draw(sampler, plan, random_logits(place), place)
                 for place in reversed(range(1, 20))]
    other, plan = begun(HostSampler, replace(SETTINGS[name], seed=3))
    elsewhere = [native_draw(other, plan, random_logits(place), place) for place in range(1, 20)]
    assert forwards == backwards[::-1] == elsewhere


@pytest.mark.parametrize('name', SETTINGS)
def test_a_drawer_draws(name, library):
    """What the engines without a captured draw use."""
    sampling, logits, tokens = SETTINGS[name], random_logits(0), []
    drawer = Drawer(VOCAB, DRAWS + len(PROMPT), CPU)
    if sampling.repetition_penalty == 1.0:
        drawer.begin(sampling, PROMPT)
        tokens = [int(drawer.draw(logits, len(PROMPT) + index)) for index in range(DRAWS)]
    else:       # what was drawn counts as seen, so each draw is a request's first
        for seed in range(DRAWS):
            drawer.begin(replace(sampling, seed=seed), PROMPT)
            tokens.append(int(drawer.draw(logits, len(PROMPT))))
            assert int(drawer.token) == tokens[-1]
    assert torch.equal(logits, random_logits(0))
    assert_drawn_from(count(tokens), library(logits, sampling, PROMPT).softmax(0).double())


def test_greedy_with_a_penalty_is_alike(kind):
    sampling = SamplingConfig(repetition_penalty=3.0)
    sampler, plan = begun(kind, sampling)
    assert plan != GREEDY
    seen, state = set(PROMPT), State()
    for place in range(60):
        logits = random_logits(place % 3)
        wanted = torch.tensor([
            (x / 3.0 if x > 0 else x * 3.0) if i in seen else x
            for i, x in enumerate(logits.tolist())]).argmax()
        assert state.draw(sampler, plan, logits) == wanted
        seen.add(int(wanted))


@pytest.mark.parametrize('sampling', [
    SamplingConfig(), SamplingConfig(repetition_penalty=1.1), replace(PLAIN, temperature=1e-38),
    replace(PLAIN, temperature=5e-324)])
def test_the_likeliest_of_equals_is_the_first(kind, sampling):
    """Without temperature whatever the seed; next to none is all but that."""
    logits = random_logits(0)
    logits[[5, 9, 12][:3 if sampling.temperature == 0 else 1]] = logits.max() + 20.0
    for seed in range(1, 20):
        sampler, plan = begun(kind, replace(sampling, seed=seed), VOCAB, [0])
        assert native_draw(sampler, plan, logits, seed) == 5


@pytest.mark.parametrize('vocab, best', [(5, 4), (1000, 0), (5000, 4321)])
def test_greedy_takes_the_likeliest(kind, vocab, best):
    logits = random_logits(0, vocab)
    logits[best] = 100.0
    if best + 1 < vocab:
        logits[best + 1] = 100.0     # of equals the first
    sampler, plan = begun(kind, SamplingConfig(top_k=3, seed=9), vocab, [1])
    assert plan == GREEDY
    state = State()
    for _ in range(2):
        assert state.draw(sampler, plan, logits) == best


@pytest.mark.filterwarnings('ignore::RuntimeWarning')       # of the interpreter
@pytest.mark.parametrize('name', ['greedy', 'penalty', 'plain', 'top_k', 'top_p', 'min_p', 'all'])
def test_logits_that_are_no_numbers(kind, name):
    """The host reads so; the device gets an id of the vocabulary, see `State.draw`."""
    sampling = SETTINGS.get(name, SamplingConfig())
    for bad in (torch.nan, torch.inf, -torch.inf):
        sampler, plan = begun(kind, sampling)
        whole, one = torch.full((VOCAB,), bad), random_logits(0).index_fill(
            0, torch.tensor([VOCAB - 1]), bad)
        assert native_draw(sampler, plan, whole, 9) == NO_TOKEN
        masked_out = bad == -torch.inf      # one token that may not be chosen is legitimate
        assert (native_draw(sampler, plan, one, 9) == NO_TOKEN) != masked_out
        assert native_draw(sampler, plan, random_logits(1), 10) != NO_TOKEN


def mask_of(allowed):
    """Return the mask that allows some ids."""
    bits = bytearray((VOCAB + 7) // 8)
    for id_ in allowed.tolist():
        bits[id_ // 8] |= 1 << id_ % 8
    return bits


@pytest.mark.filterwarnings('ignore::RuntimeWarning')       # of the interpreter
@pytest.mark.parametrize('name', ['greedy', 'penalty', 'plain', 'all'])
def test_a_mask_comes_before_all_other_stages(kind, name):
    sampling = SETTINGS.get(name, SamplingConfig())
    free, plan = begun(kind, sampling)
    sampler, _ = begun(kind, sampling)
    masked = sampler.begin(sampling, torch.tensor(PROMPT), True)
    assert 'mask' in masked.key and 'mask' not in plan.key
    for place in range(9, 13):
        logits = random_logits(place)
        allowed = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(place))[:7]
        alone = torch.full((VOCAB,), -math.inf).index_copy(0, allowed, logits[allowed])
        sampler.restrict(mask_of(allowed))
        token = native_draw(sampler, masked, logits, place)
        assert token == native_draw(free, plan, alone, place) and token in allowed
    for count in (1, 2, VOCAB):
        none = logits.index_fill(0, allowed, -math.inf)
        assert native_draw(sampler, masked, none, 13) == NO_TOKEN
        allowed = torch.arange(count)
        sampler.restrict(mask_of(allowed))
        alone = torch.full((VOCAB,), -math.inf).index_copy(0, allowed, logits[allowed])
        assert native_draw(sampler, masked, logits, 13) == native_draw(free, plan, alone, 13)
    logits[VOCAB - 1] = math.nan            # of damaged weights, not of a mask
    for count in (2, 7):
        sampler.restrict(mask_of(torch.arange(count)))
        assert native_draw(sampler, masked, logits, 13) == NO_TOKEN


@pytest.mark.parametrize('count', [1, 5, 1024, 9999])
def test_the_host_draws_the_same_waiting_times_with_numpy(count):
    mixed = native.mix(torch.arange(count).int(), 0, 0)
    for seed, place in product((0, 7, 2**31 - 1), (0, 1, 4095)):
        keys = native.host_keys(seed, place)
        assert torch.equal(native.host_waiting_times(mixed.numpy(), *keys),
                           native.waiting_times(mixed, *keys))


@pytest.mark.parametrize('sampler_kind', ['fixed', 'kernels'])
@pytest.mark.parametrize('sampling', [
    SamplingConfig(), SamplingConfig(repetition_penalty=1.8), PLAIN, SETTINGS['all'],
    SETTINGS['top_p']], ids=lambda each: Plan.of(each).key)
def test_rows_of_a_pass_are_drawn_as_far_as_guesses_come_true(sampler_kind, sampling):
    """Then the token, its place, the history and what counts as seen are as after steps."""
    if sampler_kind == 'kernels':
        pytest.importorskip('triton')
        from physai_decode.engines.sampling_kernels import TritonSampler as own
    else:
        own = Sampler
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    for seed in range(12):
        sampling = replace(sampling, seed=seed)
        logits = [random_logits(100 * seed + row).to(device) for row in range(4)]
        if seed == 5:
            logits[1][3] = math.nan
        steps, one, plan = begin_rows(own, sampling, device)
        tokens = [steps.draw(one, plan, each) for each in logits]
        for right in range(4):
            guesses = [*tokens[:right], *[(each + 1) % VOCAB for each in tokens[right:]]][:3]
            if seed == 7:
                guesses[right:] = [-1] * (3 - right)            # no guesses there
            state, sampler, _ = begin_rows(own, sampling, device)
            for row, each in enumerate(logits):
                guess = torch.tensor(guesses[row:row + 1], device=device) if row < 3 else None
                sampler.draw(plan, each, state.position, state.token, state.history,
                             Row(row, guess))
            count = 1 + right
            if NO_TOKEN in tokens[:right]:
                count = 1 + tokens.index(NO_TOKEN)      # nobody guesses that
            wanted, other, _ = begin_rows(own, sampling, device)
            for each in logits[:count]:
                wanted.draw(other, plan, each)
            for name in ('position', 'token', 'history'):
                assert torch.equal(getattr(state, name), getattr(wanted, name)), (name, right)
            assert torch.equal(sampler._seen, other._seen)


def begin_rows(kind, sampling, device):
    """Return a state, a sampler and a plan."""
    sampler, plan = begun(kind, sampling, device=device)
    return State(device=device), sampler, plan


def test_a_stage_without_a_kernel_is_its_twins():
    """So a further sampling parameter is a field and a stage; a kernel can come later."""
    pytest.importorskip('triton')
    from physai_decode.engines.sampling_kernels import TritonSampler

    @dataclass(frozen=True)
    class Longer(Plan):
        even: bool = False

    class Even(TritonSampler):
        def kept(self, plan, logits):
            ids, scores = super().kept(plan, logits)
            return ids, scores.where(torch.arange(VOCAB) % 2 == 0, -math.inf)

    sampler = Even(VOCAB, CPU)
    logits = random_logits(0)
    logits[[3, 8]] = torch.tensor([90.0, 80.0])
    sampler.begin(PLAIN, torch.tensor(PROMPT))
    assert native_draw(sampler, Longer(temperature=True, even=True), logits, 9) == 8


@pytest.mark.parametrize('count', [1, 7, FEW, FEW + 1, 9000, 9999])
def test_however_many_are_kept_they_are_the_likeliest_and_the_equals_of_the_last(count):
    scores = torch.randn(10000, generator=torch.Generator().manual_seed(3)).mul(50).round()
    least = sorted(scores.tolist())[-count]
    assert most_likely(scores, count).tolist() == [
        id_ for id_, score in enumerate(scores.tolist()) if score >= least]
