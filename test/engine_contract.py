"""
What every engine must do, whatever it runs: see `physai_decode.engine.Engine`.

Each check takes a loaded engine of at least 64 tokens of context and leaves it usable. An engine's
tests parametrise over `CHECKS`.
"""

from itertools import chain
import threading

from physai_decode.config import SamplingConfig
import pytest

GREEDY = SamplingConfig(max_new_tokens=8)
WARM = SamplingConfig(temperature=1.5, max_new_tokens=24)


def decode(engine, prompt, sampling=GREEDY):
    """Give all ids of an answer."""
    return list(chain.from_iterable(step.token_ids for step in engine.stream(prompt, sampling)))


def first_step(engine, prompt):
    """Give the step that brings the first token."""
    stream = engine.stream(prompt, SamplingConfig(max_new_tokens=1))
    return next(step for step in stream if step.token_ids)


def prompt_of(engine, length, start=3):
    """Give ids of the vocabulary, without repetition where it is large enough."""
    return [(start + 7 * index) % engine.footprint.vocab_size for index in range(length)]


def forget(engine):
    """Fill the cache with a prompt that shares no prefix with the others."""
    decode(engine, [1, 1, 1, 1])


def check_max_new_tokens(engine):
    for count in (1, 2, 9):
        assert len(decode(engine, prompt_of(engine, 5), SamplingConfig(max_new_tokens=count))) \
            == count


def check_ids_are_of_the_vocabulary(engine):
    for sampling in (SamplingConfig(max_new_tokens=9), WARM):
        for token in decode(engine, prompt_of(engine, 5), sampling):
            assert type(token) is int
            assert 0 <= token < engine.footprint.vocab_size


def check_ends_where_the_context_is_full(engine):
    limit = engine.footprint.max_context
    for room in (1, 2, 5):
        prompt = prompt_of(engine, limit - room)
        assert len(decode(engine, prompt, SamplingConfig(max_new_tokens=100))) == room
        assert len(decode(engine, prompt, SamplingConfig(max_new_tokens=100, temperature=1.0))) \
            == room


def check_bad_prompts(engine):
    limit, size = engine.footprint.max_context, engine.footprint.vocab_size
    expected = decode(engine, prompt_of(engine, 5))
    for prompt in ([], prompt_of(engine, limit), prompt_of(engine, limit + 100), [-1], [3, size],
                   [2**40]):
        with pytest.raises(ValueError):
            decode(engine, prompt)
    assert decode(engine, prompt_of(engine, 5)) == expected


def check_closing_cancels(engine):
    prompt = prompt_of(engine, 20)
    expected = decode(engine, prompt)
    for sampling in (SamplingConfig(max_new_tokens=40), WARM):
        for taken in (0, 1, 2, 7):
            stream = engine.stream(prompt, sampling)
            for _ in range(taken):
                next(stream)
            stream.close()
            assert decode(engine, prompt) == expected
        forget(engine)
        assert decode(engine, prompt) == expected


def check_prefix_reuse(engine):
    shared = prompt_of(engine, 30)
    other = prompt_of(engine, 12, start=5)
    forget(engine)
    fresh = decode(engine, shared + other)
    decode(engine, shared)
    step = first_step(engine, shared + other)
    assert step.cached_tokens in (0, len(shared))     # 0 where the state can't be cut back
    assert step.token_ids == (fresh[0],)
    forget(engine)
    decode(engine, shared)
    assert decode(engine, shared + other) == fresh


def check_the_same_prompt_again(engine):
    prompt = prompt_of(engine, 20)
    forget(engine)
    assert first_step(engine, prompt).cached_tokens == 0
    expected = decode(engine, prompt)
    again = first_step(engine, prompt)
    assert again.cached_tokens <= len(prompt) - 1     # the last is run for its logits
    assert again.token_ids == (expected[0],)
    assert decode(engine, prompt) == expected


def check_a_conversation(engine):
    prompt, more = prompt_of(engine, 20), prompt_of(engine, 6, start=11)
    forget(engine)
    answer = decode(engine, prompt)
    step = first_step(engine, prompt + answer + more)
    assert 0 <= step.cached_tokens <= len(prompt + answer)
    expected = step.token_ids
    forget(engine)
    assert first_step(engine, prompt + answer + more).token_ids == expected


def check_a_shorter_prompt(engine):
    prompt = prompt_of(engine, 30)
    forget(engine)
    expected = decode(engine, prompt[:10])
    decode(engine, prompt)
    assert decode(engine, prompt[:10]) == expected


def check_seeds(engine):
    prompt = prompt_of(engine, 10)
    answers = []
    for seed in (0, 1, 2, 2**31 - 1):
        sampling = SamplingConfig(temperature=1.5, seed=seed, max_new_tokens=24)
        answers.append(decode(engine, prompt, sampling))
        assert decode(engine, prompt, sampling) == answers[-1]
        forget(engine)
        assert decode(engine, prompt, sampling) == answers[-1]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def check_greedy_ignores_the_seed(engine):
    prompt = prompt_of(engine, 10)
    expected = decode(engine, prompt)
    assert decode(engine, prompt, SamplingConfig(seed=7, top_p=0.5, max_new_tokens=8)) == expected


def check_one_candidate_is_the_likeliest(engine):
    prompt = prompt_of(engine, 10)
    expected = decode(engine, prompt)
    for sampling in (SamplingConfig(temperature=1.5, top_k=1, max_new_tokens=8),
                     SamplingConfig(temperature=1.5, top_p=0.0, max_new_tokens=8),
                     SamplingConfig(temperature=1.5, min_p=1.0, max_new_tokens=8)):
        assert decode(engine, prompt, sampling) == expected


def check_end_ids_are_yielded(engine):
    ends = set(engine.footprint.eos_token_ids)
    assert ends
    for seed in range(100):
        sampling = SamplingConfig(temperature=3.0, seed=seed, max_new_tokens=24)
        answer = decode(engine, prompt_of(engine, 5), sampling)
        assert len(answer) == 24
        if ends.intersection(answer[:-1]):
            return
    pytest.fail(f'none of the end ids {sorted(ends)[:5]} ... came in 2400 tokens')


def check_device_times(engine):
    times = [step.device_s for step in engine.stream(
        prompt_of(engine, 20), SamplingConfig(max_new_tokens=8)) if step.token_ids]
    assert all(time is None or 0.0 < time < 60.0 for time in times)
    if engine.footprint.device == 'cpu':
        assert None not in times


def check_another_thread(engine):
    prompt = prompt_of(engine, 10)
    answers = [decode(engine, prompt)]
    thread = threading.Thread(target=lambda: answers.append(decode(engine, prompt)))
    thread.start()
    thread.join(60.0)
    assert len(answers) == 2 and answers[0] == answers[1]


CHECKS = [value for name, value in list(globals().items()) if name.startswith('check_')]


def check_footprint(footprint, model):
    """
    Hold a footprint against its checkpoint.

    :param model: the `physai_decode.checkpoint.Checkpoint`, not quantised, of a network whose
        every weight a step reads, but for an input embedding.
    """
    config = model.text_config
    stored = {'BF16': 2, 'F16': 2, 'F32': 4}[model.tensors['model.norm.weight'].dtype]
    used = {'bfloat16': 2, 'float16': 2, 'float32': 4}[footprint.dtype]
    embedding = model.tensors['model.embed_tokens.weight']
    read = model.weight_bytes
    if not config['tie_word_embeddings']:
        read -= embedding.bytes - embedding.bytes // embedding.shape[0]
    assert footprint.read_weight_bytes == read * used // stored
    assert footprint.checkpoint_weight_bytes == model.weight_bytes
    assert footprint.model_type == model.model_type
    assert footprint.eos_token_ids == model.eos_token_ids
    assert footprint.vocab_size == config['vocab_size']
    assert footprint.layers == config['num_hidden_layers']
    assert footprint.kv_heads == config['num_key_value_heads']
    assert footprint.head_dim == config.get(
        'head_dim', config['hidden_size'] // config['num_attention_heads'])
    assert footprint.kv_element_bytes == used
    assert footprint.max_context <= model.context_limit
