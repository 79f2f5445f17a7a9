"""How both engines draw a token, against the probabilities that the transformers library gives."""

from dataclasses import replace

from physai_decode.config import SamplingConfig
from physai_decode.engines.native.sampling import is_plain_greedy
from physai_decode.engines.native.sampling import Sampler
from physai_decode.engines.transformers import Chooser
import pytest
import torch
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


def random_logits(seed):
    return 2.0 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def network():
    """Give any network of the library: what sets up the logits processors is a method of it."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1))


@pytest.fixture
def expected(network):
    """Give the function that computes what the library's `generate` would sample from."""
    def probabilities(logits, sampling, seen):
        generation = transformers.GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k,
            top_p=sampling.top_p, min_p=sampling.min_p or None,
            repetition_penalty=sampling.repetition_penalty)
        processors = network._get_logits_processor(
            generation, input_ids_seq_length=len(seen), encoder_input_ids=None,
            prefix_allowed_tokens_fn=None, logits_processor=[], device='cpu')
        return processors(torch.tensor([seen]), logits[None]).softmax(-1)[0]
    return probabilities


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


@pytest.mark.parametrize('name', SETTINGS)
def test_native_probabilities(name, expected):
    sampling = SETTINGS[name]
    sampler = Sampler(VOCAB, CPU)
    for seed in range(20):
        logits = random_logits(seed)
        sampler.begin(sampling, torch.tensor(PROMPT))
        weights, ids = sampler.probabilities(logits)
        ours = torch.zeros(VOCAB).index_copy_(0, ids, weights / weights.sum())
        assert torch.allclose(ours, expected(logits, sampling, PROMPT), atol=1e-6)


def native_draw(sampler, logits, position):
    token = torch.zeros(1, dtype=torch.int64)
    sampler.draw(logits, torch.tensor([position]), token)
    return int(token)


@pytest.mark.parametrize('name', [
    'plain', 'cool', 'hot', 'top_k', 'top_p', 'top_p_of_nothing', 'min_p'])
def test_native_draws(name, expected):
    sampling, logits = SETTINGS[name], random_logits(0)
    sampler = Sampler(VOCAB, CPU)
    sampler.begin(sampling, torch.tensor(PROMPT))
    tokens = [native_draw(sampler, logits, position) for position in range(DRAWS)]
    assert_drawn_from(count(tokens), expected(logits, sampling, PROMPT).double())


def test_native_draws_over_seeds(expected):
    logits = random_logits(1)
    sampler = Sampler(VOCAB, CPU)
    tokens = []
    for seed in range(DRAWS):
        sampler.begin(replace(PLAIN, seed=seed), torch.tensor(PROMPT))
        tokens.append(native_draw(sampler, logits, len(PROMPT)))
    assert_drawn_from(count(tokens), expected(logits, PLAIN, PROMPT).double())


def test_native_draws_are_independent():
    logits = torch.zeros(VOCAB)
    sampler = Sampler(VOCAB, CPU)
    sampler.begin(PLAIN, torch.tensor(PROMPT))
    tokens = torch.tensor([native_draw(sampler, logits, place) for place in range(2 * DRAWS)])
    # Neighbours as one of the pairs of 5 * 5 equal classes.
    classes = tokens // (VOCAB // 5)
    pairs = torch.bincount(classes[0::2] * 5 + classes[1::2], minlength=25).double()
    assert_drawn_from(pairs, torch.full((25,), 1 / 25, dtype=torch.float64))


def test_native_penalises_its_own_tokens(expected):
    sampling = replace(PLAIN, repetition_penalty=1.8)
    sampler = Sampler(VOCAB, CPU)
    sampler.begin(sampling, torch.tensor(PROMPT))
    seen = list(PROMPT)
    for place in range(10):
        seen.append(native_draw(sampler, random_logits(place), len(seen)))
    weights, ids = sampler.probabilities(random_logits(99))
    ours = torch.zeros(VOCAB).index_copy_(0, ids, weights / weights.sum())
    assert torch.allclose(ours, expected(random_logits(99), sampling, seen), atol=1e-6)


def test_native_is_repeatable():
    answers = []
    for seed in (5, 5, 6):
        sampler = Sampler(VOCAB, CPU)
        sampler.begin(replace(PLAIN, seed=seed), torch.tensor(PROMPT))
        answers.append([native_draw(sampler, random_logits(0), place) for place in range(50)])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize('name', SETTINGS)
def test_transformers_draws(name, expected):
    sampling, logits = SETTINGS[name], random_logits(0)
    tokens = []
    if sampling.repetition_penalty == 1.0:
        choose = Chooser(sampling, PROMPT, DRAWS + len(PROMPT), CPU)
        tokens = [int(choose(logits[None], logits.argmax().view(1))) for _ in range(DRAWS)]
    else:       # what was chosen counts as seen, so each draw is a request's first
        for seed in range(DRAWS):
            choose = Chooser(replace(sampling, seed=seed), PROMPT, len(PROMPT) + 1, CPU)
            tokens.append(int(choose(logits[None], logits.argmax().view(1))))
    assert torch.equal(logits, random_logits(0))
    assert_drawn_from(count(tokens), expected(logits, sampling, PROMPT).double())


def test_greedy_with_a_penalty_is_alike():
    sampling = SamplingConfig(repetition_penalty=3.0)
    assert not is_plain_greedy(sampling)
    choose = Chooser(sampling, PROMPT, 100, CPU)
    sampler = Sampler(VOCAB, CPU)
    sampler.begin(sampling, torch.tensor(PROMPT))
    seen = set(PROMPT)
    for place in range(60):
        logits = random_logits(place % 3)
        wanted = torch.tensor([
            (x / 3.0 if x > 0 else x * 3.0) if i in seen else x
            for i, x in enumerate(logits.tolist())]).argmax()
        assert int(choose(logits[None], logits.argmax().view(1))) == wanted
        assert native_draw(sampler, logits, place) == wanted
        seen.add(int(wanted))


@pytest.mark.parametrize('sampling', [
    SamplingConfig(repetition_penalty=1.1), replace(PLAIN, temperature=1e-38),
    replace(PLAIN, temperature=5e-324)])
def test_the_likeliest_of_equals_is_the_first(sampling):
    """Without temperature whatever the seed; next to none is all but that."""
    logits = random_logits(0)
    logits[[5, 9, 12][:3 if sampling.temperature == 0 else 1]] = logits.max() + 20.0
    for seed in range(20):
        sampler = Sampler(VOCAB, CPU)
        sampler.begin(replace(sampling, seed=seed), torch.tensor([0]))
        assert native_draw(sampler, logits, seed) == 5


def test_logits_that_are_no_numbers():
    """Some id of the vocabulary comes out: on a GPU another one would take the process along."""
    sampler = Sampler(VOCAB, CPU)
    sampler.begin(PLAIN, torch.tensor(PROMPT))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for logits in (torch.full((VOCAB,), bad), random_logits(0).index_fill(
                0, torch.tensor([3]), bad)):
            assert 0 <= native_draw(sampler, logits, 0) < VOCAB


def test_plain_greedy_takes_the_likeliest():
    assert is_plain_greedy(SamplingConfig(top_k=3, seed=9))
    logits = random_logits(0)
    choose = Chooser(SamplingConfig(top_k=3, seed=9), PROMPT, 100, CPU)
    assert int(choose(logits[None], logits.argmax().view(1))) == logits.argmax()
