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

"""Samplers keep the same tokens as the transformers library, with the same probabilities."""

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
from physai_decode.engines import sampling as sampling_module
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
    'top_k_above_vocab': replace(PLAIN, top_k=1000),
    'top_p': replace(PLAIN, top_p=0.6),
    'top_p_0': replace(PLAIN, top_p=0.0),
    'min_p': replace(PLAIN, min_p=0.1),
    'min_p_1': replace(PLAIN, min_p=1.0),
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
    'random': lambda logits: logits, 'peaked': peaked, 'masked': masked,
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
    """Return a small network of the library; it makes the logits processors."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1))


@pytest.fixture
def library(network):
    """Return a function that computes the scores from which the library's `generate` samples."""
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
    # The approximation needs expected counts of at least 5, so rarer tokens are combined.
    expected = probabilities * draws
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((counts - expected)**2 / expected).sum()
    assert statistic <= freedom + 5 * (2 * freedom)**0.5


def histogram(tokens):
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()


class State:
    """The tensors that `Sampler.draw` updates: the token, its position, and the history."""

    def __init__(self, place=4, device=CPU):
        self.position = torch.tensor([place], device=device)
        self.token = torch.full((1,), -7, device=device)
        self.history = torch.full((place + 64,), -7, device=device)

    def draw(self, sampler, plan, logits):
        """Return the id that the host reads; assert that the next step's input is a valid id."""
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


def begin(kind, sampling, vocab=VOCAB, prompt=PROMPT, device=CPU):
    """Begin a request; return the sampler and its plan."""
    sampler = kind(vocab, device)
    return sampler, sampler.begin(sampling, prompt)


def draw_at(sampler, plan, logits, place):
    return State(place - 1).draw(sampler, plan, logits)


@pytest.fixture(params=['fixed', 'host', 'kernels'])
def kind(request):
    """Return each kind of sampler that this machine can run."""
    if request.param != 'kernels':
        return {'fixed': Sampler, 'host': HostSampler}[request.param]
    pytest.importorskip('triton')
    from physai_decode.engines.sampling_kernels import TritonSampler
    if torch.cuda.is_available():
        return lambda vocab, device: OnDevice(TritonSampler(vocab, torch.device('cuda'), 16, True))
    return TritonSampler


class OnDevice:
    """Runs a sampler on a GPU, for tests whose tensors are on the CPU."""

    def __init__(self, sampler):
        self.sampler = sampler

    def begin(self, sampling, prompt_ids, constrained=False):
        """See `Sampler.begin`."""
        return self.sampler.begin(sampling, prompt_ids, constrained)

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
def test_plan_has_only_the_needed_stages(sampling, key):
    plan = Plan.of(sampling)
    assert plan.key == key
    assert (plan == GREEDY) == (key == 'greedy')
    assert {plan: 1}[Plan.of(replace(sampling, seed=5))] == 1


def test_only_a_cpu_has_the_host_sampler():
    assert type(TorchOps(on_host=True).sampler(VOCAB, CPU)) is HostSampler
    assert type(TorchOps(on_host=False).sampler(VOCAB, CPU)) is Sampler


# --- truncation --------------------------------------------------------------------------------

def scores_by_id(ids, scores, vocab):
    """Return scores [vocab], -inf where an id was dropped."""
    if ids is None:
        return scores
    assert torch.equal(ids, ids.unique())
    return torch.full((vocab,), -math.inf).index_copy_(0, ids, scores)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('vocab', [VOCAB, 5000])
@pytest.mark.parametrize('sampler_kind', [Sampler, HostSampler])
def test_scores_are_those_of_transformers(sampler_kind, vocab, shape, library):
    """Bit for bit; only which of the tokens tied at top-p's threshold remain can differ."""
    assert VOCAB < sampling_module.FEW < 5000      # without bins, and with
    for seed, sampling in enumerate(GRID):
        logits = SHAPES[shape](random_logits(seed, vocab))
        sampler, plan = begin(sampler_kind, sampling, vocab)
        expected = library(logits, replace(sampling, temperature=max(
            sampling.temperature, sampling_module.COLDEST)), PROMPT)
        got = scores_by_id(*sampler.kept(plan, logits), vocab)
        if shape in WITH_TIES:
            got, expected = got.sort().values, expected.sort().values
        assert torch.equal(got, expected), (shape, sampling)


def test_ties_at_the_threshold():
    """Top-p keeps the highest ids; top-k keeps all."""
    for vocab in (8, 8192):
        for sampler_kind in (Sampler, HostSampler):
            sampler, plan = begin(sampler_kind, replace(PLAIN, top_p=0.5), vocab, [1])
            got = scores_by_id(*sampler.kept(plan, torch.zeros(vocab)), vocab)
            assert torch.equal(got == 0, torch.arange(vocab) >= vocab // 2)
            sampler, plan = begin(sampler_kind, replace(PLAIN, top_k=3), vocab, [1])
            assert (scores_by_id(*sampler.kept(plan, torch.zeros(vocab)), vocab) == 0).all()


@pytest.mark.parametrize('vocab', [51, 2501])
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_keep_and_draw_the_tokens_of_their_reference(shape, vocab):
    """Also with more scores near the threshold than fit in registers."""
    kernels = pytest.importorskip('physai_decode.engines.sampling_kernels')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    assert 51 < kernels.FEW.value < 2501
    every = 23 if vocab == 51 else 41
    for seed, sampling in enumerate(GRID[list(SHAPES).index(shape)::every]):
        sampling = replace(sampling, seed=seed)
        logits = SHAPES[shape](random_logits(seed, vocab)).to(device)
        reference, plan = begin(Sampler, sampling, vocab, PROMPT, device)
        sampler, _ = begin(kernels.TritonSampler, sampling, vocab, PROMPT, device)
        expected = reference.kept(plan, logits)[1] > -math.inf
        one, other = State(device=device), State(device=device)
        assert one.draw(reference, plan, logits) == other.draw(sampler, plan, logits), sampling
        border = int(sampler._state[-1])
        for _ in range(2):
            assert one.draw(reference, plan, logits) == other.draw(sampler, plan, logits), sampling
        sampler.begin(sampling, PROMPT)
        got = kept_by_kernels(sampler, plan, logits, border)
        assert torch.equal(got, expected), sampling


def kept_by_kernels(sampler, plan, logits, border):
    """Return a mask of the ids that kernels keep whose threshold is ``border``."""
    scores = sampler.kept(Plan(plan.repetition_penalty), logits)[1] * (1 / sampler._floats[0])
    keep = scores > -math.inf
    if plan.truncates:
        # As in `_ordered`; ids only decide between ties.
        bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
        bits = (bits ^ ((bits >> 31) & 0x7fffffff)).long()
        keep &= (bits << 32) + torch.arange(len(bits), device=bits.device) >= border
    if plan.min_p:
        keep &= (scores - scores.max()).exp() >= sampler._floats[2]
    return keep


@pytest.mark.parametrize('name', SETTINGS)
def test_probabilities_are_those_of_transformers(name, library):
    sampling = SETTINGS[name]
    for seed in range(20):
        logits = random_logits(seed)
        sampler, plan = begin(HostSampler, sampling)
        ours = scores_by_id(*sampler.kept(plan, logits), VOCAB).softmax(0)
        expected = library(logits, sampling, PROMPT).softmax(0)
        assert torch.allclose(ours, expected, atol=1e-6)


# --- draws -------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [
    'plain', 'cool', 'hot', 'top_k', 'top_p', 'top_p_0', 'min_p'])
def test_draws_follow_the_probabilities(name, library):
    sampling, logits = SETTINGS[name], random_logits(0)
    sampler, plan = begin(HostSampler, sampling)
    tokens = [draw_at(sampler, plan, logits, place) for place in range(1, DRAWS + 1)]
    assert_drawn_from(histogram(tokens), library(logits, sampling, PROMPT).softmax(0).double())


def test_draws_of_many_seeds_follow_the_probabilities(library):
    logits = random_logits(1)
    sampler = HostSampler(VOCAB, CPU)
    tokens = []
    for seed in range(DRAWS):
        plan = sampler.begin(replace(PLAIN, seed=seed), PROMPT)
        tokens.append(draw_at(sampler, plan, logits, len(PROMPT)))
    assert_drawn_from(histogram(tokens), library(logits, PLAIN, PROMPT).softmax(0).double())


def test_successive_draws_are_independent():
    logits = torch.zeros(VOCAB)
    sampler, plan = begin(HostSampler, PLAIN)
    tokens = torch.tensor([
        draw_at(sampler, plan, logits, place) for place in range(1, 2 * DRAWS + 1)])
    # Pairs of neighbours, in 5 * 5 classes of equal probability.
    classes = tokens // (VOCAB // 5)
    pairs = torch.bincount(classes[0::2] * 5 + classes[1::2], minlength=25).double()
    assert_drawn_from(pairs, torch.full((25,), 1 / 25, dtype=torch.float64))


def test_waiting_times_are_exponential():
    """Also the shortest ones, which decide what is drawn."""
    ids = sampling_module.mix(torch.arange(100_000, dtype=torch.int32), 0, 0)
    for seed, place in ((0, 1), (0, 2), (1, 1), (2**31 - 1, 10**6)):
        times = sampling_module.waiting_times(
            ids, *sampling_module.keys(torch.tensor([seed]), torch.tensor([place]))).double()
        assert times.min() > 0
        assert abs(times.mean() - 1) < 5 / math.sqrt(len(ids))
        # 1 - exp(-time) is uniform, so 100 classes have equal counts, within 6 deviations.
        uniform = -torch.expm1(-times)
        for values in (uniform, (uniform * 1000) % 1.0):
            counted = torch.histc(values.float(), 100, 0.0, 1.0)
            assert (counted - 1000).abs().max() < 6 * math.sqrt(1000)


def test_hashes_match_their_definitions():
    """The definitions are written with Python's integers, which do not overflow."""
    def splitmix64(bits):
        bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94d049bb133111eb % 2**64
        return bits ^ bits >> 31

    def lowbias32(word):
        word = (word ^ word >> 16) * 0x7feb352d % 2**32
        word = (word ^ word >> 15) * 0x846ca68b % 2**32
        return word ^ word >> 16

    for seed, place in ((0, 0), (1, 2), (2**31 - 1, 10**6)):
        pair = [int(key) for key in sampling_module.keys(
            torch.tensor([seed]), torch.tensor([place]))]
        assert tuple(pair) == sampling_module.host_keys(seed, place)
        expected = splitmix64(((seed << 32) + place * 0x9e3779b97f4a7c15) % 2**64)
        assert [key % 2**32 for key in pair] == [expected % 2**32, expected >> 32]
    words = [0, 1, 5, 2**31 - 1, -1, -2**31]
    mixed = sampling_module.mix(torch.tensor(words, dtype=torch.int32), 0, 0).tolist()
    assert [word % 2**32 for word in mixed] == [lowbias32(word % 2**32) for word in words]


def test_penalises_tokens_of_the_answer(library):
    sampling = replace(PLAIN, repetition_penalty=1.8)
    for sampler_kind in (Sampler, HostSampler):
        sampler, plan = begin(sampler_kind, sampling)
        seen, state = list(PROMPT), State()
        for place in range(10):
            seen.append(state.draw(sampler, plan, random_logits(place)))
        ours = scores_by_id(*sampler.kept(plan, random_logits(99)), VOCAB)
        assert torch.equal(ours, library(random_logits(99), sampling, seen))


def test_same_seed_draws_the_same_tokens(kind):
    answers = []
    for seed in (5, 5, 6):
        sampler, plan = begin(kind, replace(PLAIN, seed=seed))
        answers.append([draw_at(sampler, plan, random_logits(0), place)
                        for place in range(1, 50)])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize('name', ['plain', 'top_k', 'top_p', 'min_p'])
def test_draws_do_not_depend_on_earlier_draws(kind, name):
    """A pass that verifies a draft needs this."""
    sampler, plan = begin(kind, replace(SETTINGS[name], seed=3))
    forwards = [draw_at(sampler, plan, random_logits(place), place) for place in range(1, 20)]
    backwards = [draw_at(sampler, plan, random_logits(place), place)
                 for place in reversed(range(1, 20))]
    other, plan = begin(HostSampler, replace(SETTINGS[name], seed=3))
    elsewhere = [draw_at(other, plan, random_logits(place), place) for place in range(1, 20)]
    assert forwards == backwards[::-1] == elsewhere


@pytest.mark.parametrize('name', SETTINGS)
def test_drawer_follows_the_probabilities(name, library):
    """`Drawer` serves engines that do not capture sampling with the step."""
    sampling, logits, tokens = SETTINGS[name], random_logits(0), []
    drawer = Drawer(VOCAB, DRAWS + len(PROMPT), CPU)
    if sampling.repetition_penalty == 1.0:
        drawer.begin(sampling, PROMPT)
        tokens = [int(drawer.draw(logits, len(PROMPT) + index)) for index in range(DRAWS)]
    else:       # a drawn token is penalised later, so each draw is a new request
        for seed in range(DRAWS):
            drawer.begin(replace(sampling, seed=seed), PROMPT)
            tokens.append(int(drawer.draw(logits, len(PROMPT))))
            assert int(drawer.token) == tokens[-1]
    assert torch.equal(logits, random_logits(0))
    assert_drawn_from(histogram(tokens), library(logits, sampling, PROMPT).softmax(0).double())


def test_greedy_with_a_repetition_penalty(kind):
    sampling = SamplingConfig(repetition_penalty=3.0)
    sampler, plan = begin(kind, sampling)
    assert plan != GREEDY
    seen, state = set(PROMPT), State()
    for place in range(60):
        logits = random_logits(place % 3)
        expected = torch.tensor([
            (x / 3.0 if x > 0 else x * 3.0) if i in seen else x
            for i, x in enumerate(logits.tolist())]).argmax()
        assert state.draw(sampler, plan, logits) == expected
        seen.add(int(expected))


@pytest.mark.parametrize('sampling', [
    SamplingConfig(), SamplingConfig(repetition_penalty=1.1), replace(PLAIN, temperature=1e-38),
    replace(PLAIN, temperature=5e-324)])
def test_greedy_takes_the_first_of_ties(kind, sampling):
    """With any seed. A temperature close to 0 takes the most likely token."""
    logits = random_logits(0)
    logits[[5, 9, 12][:3 if sampling.temperature == 0 else 1]] = logits.max() + 20.0
    for seed in range(1, 20):
        sampler, plan = begin(kind, replace(sampling, seed=seed), VOCAB, [0])
        assert draw_at(sampler, plan, logits, seed) == 5


@pytest.mark.parametrize('vocab, best', [(5, 4), (1000, 0), (5000, 4321)])
def test_greedy_takes_the_most_likely_token(kind, vocab, best):
    logits = random_logits(0, vocab)
    logits[best] = 100.0
    if best + 1 < vocab:
        logits[best + 1] = 100.0     # a tie: the first one counts
    sampler, plan = begin(kind, SamplingConfig(top_k=3, seed=9), vocab, [1])
    assert plan == GREEDY
    state = State()
    for _ in range(2):
        assert state.draw(sampler, plan, logits) == best


@pytest.mark.filterwarnings('ignore::RuntimeWarning')       # of the interpreter
@pytest.mark.parametrize('name', ['greedy', 'penalty', 'plain', 'top_k', 'top_p', 'min_p', 'all'])
def test_logits_that_are_not_numbers(kind, name):
    """The host reads `NO_TOKEN`; the next step's input is a valid id, see `State.draw`."""
    sampling = SETTINGS.get(name, SamplingConfig())
    for bad in (torch.nan, torch.inf, -torch.inf):
        sampler, plan = begin(kind, sampling)
        whole, one = torch.full((VOCAB,), bad), random_logits(0).index_fill(
            0, torch.tensor([VOCAB - 1]), bad)
        assert draw_at(sampler, plan, whole, 9) == NO_TOKEN
        masked_out = bad == -torch.inf      # a single -inf is valid: this token is never chosen
        assert (draw_at(sampler, plan, one, 9) == NO_TOKEN) != masked_out
        assert draw_at(sampler, plan, random_logits(1), 10) != NO_TOKEN


def mask_of(allowed):
    """Return the mask that allows these ids."""
    bits = bytearray((VOCAB + 7) // 8)
    for id_ in allowed.tolist():
        bits[id_ // 8] |= 1 << id_ % 8
    return bits


@pytest.mark.filterwarnings('ignore::RuntimeWarning')       # of the interpreter
@pytest.mark.parametrize('name', ['greedy', 'penalty', 'plain', 'all'])
def test_mask_comes_before_all_other_stages(kind, name):
    sampling = SETTINGS.get(name, SamplingConfig())
    free, plan = begin(kind, sampling)
    sampler, _ = begin(kind, sampling)
    masked = sampler.begin(sampling, torch.tensor(PROMPT), True)
    assert 'mask' in masked.key and 'mask' not in plan.key
    for place in range(9, 13):
        logits = random_logits(place)
        allowed = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(place))[:7]
        alone = torch.full((VOCAB,), -math.inf).index_copy(0, allowed, logits[allowed])
        sampler.restrict(mask_of(allowed))
        token = draw_at(sampler, masked, logits, place)
        assert token == draw_at(free, plan, alone, place) and token in allowed
    for count in (1, 2, VOCAB):
        none = logits.index_fill(0, allowed, -math.inf)
        assert draw_at(sampler, masked, none, 13) == NO_TOKEN
        allowed = torch.arange(count)
        sampler.restrict(mask_of(allowed))
        alone = torch.full((VOCAB,), -math.inf).index_copy(0, allowed, logits[allowed])
        assert draw_at(sampler, masked, logits, 13) == draw_at(free, plan, alone, 13)
    logits[VOCAB - 1] = math.nan            # from damaged weights, not from a mask
    for count in (2, 7):
        sampler.restrict(mask_of(torch.arange(count)))
        assert draw_at(sampler, masked, logits, 13) == NO_TOKEN


@pytest.mark.parametrize('count', [1, 5, 1024, 9999])
def test_waiting_times_of_numpy_equal_those_of_torch(count):
    mixed = sampling_module.mix(torch.arange(count).int(), 0, 0)
    for seed, place in product((0, 7, 2**31 - 1), (0, 1, 4095)):
        keys = sampling_module.host_keys(seed, place)
        assert torch.equal(sampling_module.host_waiting_times(mixed.numpy(), *keys),
                           sampling_module.waiting_times(mixed, *keys))


@pytest.mark.parametrize('sampler_kind', ['fixed', 'kernels'])
@pytest.mark.parametrize('sampling', [
    SamplingConfig(), SamplingConfig(repetition_penalty=1.8), PLAIN, SETTINGS['all'],
    SETTINGS['top_p']], ids=lambda each: Plan.of(each).key)
def test_pass_draws_up_to_the_first_wrong_draft_token(sampler_kind, sampling):
    """Token, position, history and penalised ids are then those after single steps."""
    if sampler_kind == 'kernels':
        pytest.importorskip('triton')
        from physai_decode.engines.sampling_kernels import TritonSampler as own
    else:
        own = Sampler
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    slow = sampler_kind == 'kernels' and device.type == 'cpu'       # Triton's interpreter
    for seed in (0, 5, 7) if slow else range(12):
        sampling = replace(sampling, seed=seed)
        logits = [random_logits(100 * seed + row).to(device) for row in range(4)]
        if seed == 5:
            logits[1][3] = math.nan
        steps, one, plan = begin_rows(own, sampling, device)
        tokens = [steps.draw(one, plan, each) for each in logits]
        for right in range(4):
            draft = [*tokens[:right], *[(each + 1) % VOCAB for each in tokens[right:]]][:3]
            if seed == 7:
                draft[right:] = [-1] * (3 - right)            # no draft
            state, sampler, _ = begin_rows(own, sampling, device)
            for row, each in enumerate(logits):
                draft_token = torch.tensor(draft[row:row + 1], device=device) if row < 3 else None
                sampler.draw(plan, each, state.position, state.token, state.history,
                             Row(row, draft_token))
            count = 1 + right
            if NO_TOKEN in tokens[:right]:
                count = 1 + tokens.index(NO_TOKEN)      # no draft contains it
            expected, other, _ = begin_rows(own, sampling, device)
            for each in logits[:count]:
                expected.draw(other, plan, each)
            for name in ('position', 'token', 'history'):
                assert torch.equal(getattr(state, name), getattr(expected, name)), (name, right)
            assert torch.equal(sampler._seen, other._seen)


def begin_rows(kind, sampling, device):
    """Return a state, a sampler and a plan."""
    sampler, plan = begin(kind, sampling, device=device)
    return State(device=device), sampler, plan


def test_stage_without_a_kernel_runs_in_torch():
    """So a new sampling parameter needs a field and a stage; its kernel can be added later."""
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
    assert draw_at(sampler, Longer(temperature=True, even=True), logits, 9) == 8


@pytest.mark.parametrize('count', [1, 7, FEW, FEW + 1, 9000, 9999])
def test_most_likely_includes_ties_with_the_last(count):
    scores = torch.randn(10000, generator=torch.Generator().manual_seed(3)).mul(50).round()
    least = sorted(scores.tolist())[-count]
    assert most_likely(scores, count).tolist() == [
        id_ for id_, score in enumerate(scores.tolist()) if score >= least]
