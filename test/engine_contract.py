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

"""
Checks that every engine must pass; see `physai_decode.engine.Engine`.

Each check takes the `DecodeLoop` of a loaded engine of at least 64 tokens of context, and leaves
it usable. An engine's tests parametrise over `CHECKS`.
"""

from itertools import chain
import threading

from physai_decode import checkpoint
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
import pytest

GREEDY = SamplingConfig(max_new_tokens=8)
WARM = SamplingConfig(temperature=1.5, max_new_tokens=24)


def decode(loop, prompt, sampling=GREEDY):
    """Return all ids of an answer."""
    return list(chain.from_iterable(step.token_ids for step in loop.stream(prompt, sampling)))


def first_step(loop, prompt):
    """Return the step with the first token."""
    stream = loop.stream(prompt, SamplingConfig(max_new_tokens=1))
    return next(step for step in stream if step.token_ids)


def prompt_of(loop, length, start=3):
    """Return ids of the vocabulary, without repetition if it is large enough."""
    return [(start + 7 * index) % loop.engine.footprint.vocab_size for index in range(length)]


def load(kind, folder, config, progress=lambda text: None):
    """Return the loop of an engine of this class, loaded from a folder."""
    return DecodeLoop(kind(checkpoint.inspect(folder), config, progress))


def forget(loop):
    """Fill the cache with a prompt that shares no prefix with the others."""
    decode(loop, [1, 1, 1, 1])


def check_max_new_tokens(loop):
    for count in (1, 2, 9):
        assert len(decode(loop, prompt_of(loop, 5), SamplingConfig(max_new_tokens=count))) \
            == count


def check_ids_are_of_the_vocabulary(loop):
    for sampling in (SamplingConfig(max_new_tokens=9), WARM):
        for token in decode(loop, prompt_of(loop, 5), sampling):
            assert type(token) is int
            assert 0 <= token < loop.engine.footprint.vocab_size


def check_ends_where_the_context_is_full(loop):
    limit = loop.engine.footprint.max_context
    for room in (1, 2, 5):
        prompt = prompt_of(loop, limit - room)
        assert len(decode(loop, prompt, SamplingConfig(max_new_tokens=100))) == room
        assert len(decode(loop, prompt, SamplingConfig(max_new_tokens=100, temperature=1.0))) \
            == room


def check_bad_prompts(loop):
    limit, size = loop.engine.footprint.max_context, loop.engine.footprint.vocab_size
    expected = decode(loop, prompt_of(loop, 5))
    for prompt in ([], prompt_of(loop, limit), prompt_of(loop, limit + 100), [-1], [3, size],
                   [2**40]):
        with pytest.raises(ValueError):
            decode(loop, prompt)
    assert decode(loop, prompt_of(loop, 5)) == expected


def check_closing_cancels(loop):
    prompt = prompt_of(loop, 20)
    expected = decode(loop, prompt)
    for sampling in (SamplingConfig(max_new_tokens=40), WARM):
        for taken in (0, 1, 2, 7):
            stream = loop.stream(prompt, sampling)
            for _ in range(taken):
                next(stream)
            stream.close()
            assert decode(loop, prompt) == expected
        forget(loop)
        assert decode(loop, prompt) == expected


def check_prefix_reuse(loop):
    shared = prompt_of(loop, 30)
    other = prompt_of(loop, 12, start=5)
    forget(loop)
    fresh = decode(loop, shared + other)
    decode(loop, shared)
    step = first_step(loop, shared + other)
    assert step.cached_tokens in (0, len(shared))     # 0 if the state cannot be truncated
    assert step.token_ids == (fresh[0],)
    forget(loop)
    decode(loop, shared)
    assert decode(loop, shared + other) == fresh


def check_the_same_prompt_again(loop):
    prompt = prompt_of(loop, 20)
    forget(loop)
    assert first_step(loop, prompt).cached_tokens == 0
    expected = decode(loop, prompt)
    again = first_step(loop, prompt)
    assert again.cached_tokens <= len(prompt) - 1     # the last is run for its logits
    assert again.token_ids == (expected[0],)
    assert decode(loop, prompt) == expected


def check_a_conversation(loop):
    prompt, more = prompt_of(loop, 20), prompt_of(loop, 6, start=11)
    forget(loop)
    answer = decode(loop, prompt)
    step = first_step(loop, prompt + answer + more)
    assert 0 <= step.cached_tokens <= len(prompt + answer)
    expected = step.token_ids
    forget(loop)
    assert first_step(loop, prompt + answer + more).token_ids == expected


def check_a_shorter_prompt(loop):
    prompt = prompt_of(loop, 30)
    forget(loop)
    expected = decode(loop, prompt[:10])
    decode(loop, prompt)
    assert decode(loop, prompt[:10]) == expected


def check_seeds(loop):
    prompt = prompt_of(loop, 10)
    answers = []
    for seed in (0, 1, 2, 2**31 - 1):
        sampling = SamplingConfig(temperature=1.5, seed=seed, max_new_tokens=24)
        answers.append(decode(loop, prompt, sampling))
        assert decode(loop, prompt, sampling) == answers[-1]
        forget(loop)
        assert decode(loop, prompt, sampling) == answers[-1]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def check_greedy_ignores_the_seed(loop):
    prompt = prompt_of(loop, 10)
    expected = decode(loop, prompt)
    assert decode(loop, prompt, SamplingConfig(seed=7, top_p=0.5, max_new_tokens=8)) == expected


def check_one_candidate_is_the_likeliest(loop):
    prompt = prompt_of(loop, 10)
    expected = decode(loop, prompt)
    for sampling in (SamplingConfig(temperature=1.5, top_k=1, max_new_tokens=8),
                     SamplingConfig(temperature=1.5, top_p=0.0, max_new_tokens=8),
                     SamplingConfig(temperature=1.5, min_p=1.0, max_new_tokens=8)):
        assert decode(loop, prompt, sampling) == expected


def check_end_ids_are_yielded(loop):
    ends = set(loop.engine.footprint.eos_token_ids)
    assert ends
    for seed in range(100):
        sampling = SamplingConfig(temperature=3.0, seed=seed, max_new_tokens=24)
        answer = decode(loop, prompt_of(loop, 5), sampling)
        assert len(answer) == 24
        if ends.intersection(answer[:-1]):
            return
    pytest.fail(f'none of the end ids {sorted(ends)[:5]} ... came in 2400 tokens')


def check_device_times(loop):
    times = [step.device_s for step in loop.stream(
        prompt_of(loop, 20), SamplingConfig(max_new_tokens=8)) if step.token_ids]
    assert all(time is None or 0.0 < time < 60.0 for time in times)
    if loop.engine.footprint.device == 'cpu':
        assert None not in times


def check_the_protocol(loop):
    """Check what the loop does not show: `rewind` truncates the cache to the given length."""
    engine, prompt = loop.engine, prompt_of(loop, 10)
    loop.forget()
    least, most = engine.chunk_tokens
    assert 1 <= least <= most
    for chunk in (prompt[:6], prompt[6:]) if least == 1 else (prompt,):
        elapsed = engine.feed(chunk)
        took_s = elapsed()
    first = engine.first(GREEDY, prompt).token_id
    assert elapsed() == took_s          # not the time of the first token
    # A caller may cancel however many steps were announced.
    second = engine.step(5).token_id
    assert engine.rewind(len(prompt)) in (0, len(prompt))
    assert engine.rewind(0) == 0
    elapsed = engine.feed([*prompt, first])     # which need not be called before `first`
    assert engine.first(GREEDY, [*prompt, first]).token_id == second
    elapsed()
    ids = [first, second, *(engine.step(remaining).token_id for remaining in (1, 0))]
    assert engine.rewind(0) == 0
    assert decode(loop, prompt, SamplingConfig(max_new_tokens=4)) == ids


def check_the_chunks_of_a_prompt(loop):
    """Check that an answer does not depend on the chunks of its prompt."""
    prompt = prompt_of(loop, 50)
    answers = []
    for chunk_ms in (0.0, 1e-6):
        loop.forget()
        answers.append(decode(DecodeLoop(loop.engine, chunk_ms), prompt))
        loop.engine.rewind(0)
    assert answers[0] == answers[1]


def check_another_thread(loop):
    prompt = prompt_of(loop, 10)
    answers = [decode(loop, prompt)]
    thread = threading.Thread(target=lambda: answers.append(decode(loop, prompt)))
    thread.start()
    thread.join(60.0)
    assert len(answers) == 2 and answers[0] == answers[1]


CHECKS = [value for name, value in list(globals().items()) if name.startswith('check_')]


def check_footprint(footprint, model):
    """
    Compare a footprint with its checkpoint.

    :param model: an unquantised `physai_decode.checkpoint.Checkpoint`; a step has to read all its
        weights, except for an input embedding and experts that are not selected.
    """
    config = model.text_config
    stored = {'BF16': 2, 'F16': 2, 'F32': 4}[model.tensors['model.norm.weight'].dtype]
    used = {'bfloat16': 2, 'float16': 2, 'float32': 4}[footprint.dtype]
    embedding = model.tensors['model.embed_tokens.weight']
    read = model.weight_bytes
    if not config['tie_word_embeddings']:
        read -= embedding.bytes - embedding.bytes // embedding.shape[0]
    experts = sum(entry.bytes for name, entry in model.tensors.items() if '.experts.' in name)
    if experts:
        taken = experts * config['num_experts_per_tok'] // config['num_local_experts']
        read += taken - experts
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
