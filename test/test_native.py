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

"""What only the native engine has: its memory check, prompts in pieces, the tuning cache."""

import json
import os
import re

from engine_contract import load
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import EngineError
from physai_decode.engines import chip
from physai_decode.engines import device
from physai_decode.engines.native import NativeEngine
from physai_decode.engines.native import start
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.tuning import TuningCache
import pytest
import random_formats
import random_model
import torch

CONFIG = EngineConfig(device='cpu', cpu_threads=1, max_context=128)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return random_model.save(
        tmp_path_factory.mktemp('model'), 'qwen2', 0, max_position_embeddings=10**6)


def ids(steps):
    return [token_id for step in steps for token_id in step.token_ids]


def test_too_little_memory_names_the_context_that_fits(folder, monkeypatch):
    """By the same rule, that context then does fit."""
    monkeypatch.setattr(device, 'free_bytes', lambda device: 20_000_000)
    with pytest.raises(EngineError, match='are needed .* are free') as refused:
        load(NativeEngine, folder, EngineConfig(device='cpu', max_context=128 * 1024))
    fits = int(re.search(r'max_context (\d+) would fit', str(refused.value))[1])
    monkeypatch.undo()
    assert 16 <= fits < 128 * 1024
    load(NativeEngine, folder, EngineConfig(device='cpu', max_context=fits)).engine.close()


def test_no_memory_for_the_weights(folder, monkeypatch):
    monkeypatch.setattr(device, 'free_bytes', lambda device: 1000)
    with pytest.raises(EngineError, match='smaller or a quantised model'):
        load(NativeEngine, folder, CONFIG)


def test_a_long_prompt_can_be_cancelled_between_its_chunks(folder, monkeypatch):
    """What was fed by then is not fed again, and the answer is the same."""
    prompt = [(7 * i) % 500 for i in range(60)]
    sampling = SamplingConfig(max_new_tokens=10)
    loop = load(NativeEngine, folder, CONFIG)
    expected = ids(loop.stream(prompt, sampling))
    loop.engine.close()

    monkeypatch.setattr(NativeEngine, 'chunk_tokens', (1, 16))
    loop = load(NativeEngine, folder, CONFIG)
    stream = loop.stream(prompt, sampling)
    assert [next(stream).token_ids for _ in range(2)] == [(), ()]
    stream.close()
    steps = list(loop.stream(prompt, sampling))
    assert [step.cached_tokens for step in steps[:2]] == [32, 32]     # a chunk, the first token
    assert ids(steps) == expected
    loop.engine.close()


@pytest.mark.parametrize('family', ['qwen3', 'mistral_window', 'gemma3_text', 'ministral3'])
def test_a_step_that_the_host_does_not_look_into(tmp_path, family, monkeypatch):
    """What would be captured where Triton is missing says the same."""
    folder = random_model.save(tmp_path, family, 0)
    answers = []
    for on_host in (True, False):
        ops = TorchOps(on_host)
        monkeypatch.setattr(start, 'operations', lambda *_, ops=ops: ops)
        loop = load(NativeEngine, folder, CONFIG)
        answers.append(ids(loop.stream(list(range(40)), SamplingConfig(max_new_tokens=60))))
        loop.engine.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize(('family', 'dtype'), [
    ('llama', torch.float16), ('gemma3_text', torch.bfloat16)])
def test_int4_is_in_float16_where_that_is_wide_enough(tmp_path, family, dtype, monkeypatch):
    random_formats.save(tmp_path, family, random_formats.awq(32))
    monkeypatch.setattr(
        device, 'select', lambda config: (torch.device('cuda'), torch.bfloat16))
    monkeypatch.setattr(chip, 'capability', lambda device: (9, 0))
    assert start.select(inspect(tmp_path), EngineConfig()) == (torch.device('cuda'), dtype)


@pytest.mark.parametrize(('capability', 'dtype'), [
    ((8, 7), torch.bfloat16), ((7, 5), torch.float16)])
def test_without_kernels_int4_is_in_what_pytorchs_product_takes(
        tmp_path, monkeypatch, capability, dtype):
    random_formats.save(tmp_path, 'llama', random_formats.awq(32))
    monkeypatch.setattr(device, 'select', lambda config: (torch.device('cuda'), torch.float16))
    monkeypatch.setattr(chip, 'capability', lambda device: capability)
    monkeypatch.setattr(start, '_problem', lambda device: 'there is no Triton')
    assert start.select(inspect(tmp_path), EngineConfig()) == (torch.device('cuda'), dtype)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('family', ['qwen2', 'qwen3_moe'])
def test_a_step_tells_what_it_reads_in_every_form(tmp_path, family, dtype):
    """In PyTorch's own forms too; what is left of the weights are norms and an embedding's row."""
    random_model.save(tmp_path, family, 0)
    loop = load(NativeEngine, tmp_path, EngineConfig(device='cpu', dtype=dtype, max_context=64))
    operations = {operation: size for _, operation, size in loop.engine.reads(1)}
    mlp = ['router'] * (family == 'qwen3_moe') + ['gate and up', 'down']
    assert list(operations) == ['qkv', 'attention', 'out', *mlp, 'head']
    assert all(operations.values())
    loop.engine.close()


def test_choices_are_kept(tmp_path):
    """For their owner alone, and beside those of others."""
    TuningCache('chip a', tmp_path).put('shape', [1, 2])
    TuningCache('chip b', tmp_path).put('shape', [3])
    assert TuningCache('chip a', tmp_path).get('shape') == [1, 2]
    assert TuningCache('chip b', tmp_path).get('shape') == [3]
    assert TuningCache('chip b', tmp_path).get('other') is None


@pytest.mark.parametrize('content', [
    '', '[]', '{"chip": 3}', json.dumps({'chip': {}}), '[' * 100_000], ids=lambda text: text[:9])
def test_a_broken_cache_is_no_cache(tmp_path, content):
    (tmp_path / 'kernels.json').write_text(content)
    cache = TuningCache('chip', tmp_path)
    assert cache.get('shape') is None
    cache.put('shape', [4])
    assert TuningCache('chip', tmp_path).get('shape') == [4]


def test_a_cache_that_never_ends_is_no_cache(tmp_path):
    os.mkfifo(tmp_path / 'kernels.json')
    cache = TuningCache('chip', tmp_path)
    assert cache.get('shape') is None
    cache.put('shape', [4])
    assert TuningCache('chip', tmp_path).get('shape') == [4]


def test_a_cache_that_can_not_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    cache = TuningCache('chip', tmp_path / 'file' / 'folder')
    cache.put('shape', [4])
    assert cache.get('shape') == [4]
