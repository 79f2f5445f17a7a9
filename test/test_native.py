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

"""The native engine: its memory check, prompts in chunks, dtypes, and the tuning cache."""

import errno
import json
import os
from pathlib import Path
import re

from engine_contract import load
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import EngineError
from physai_decode.engines import chip
from physai_decode.engines import device
from physai_decode.engines.native import families
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


def test_error_states_the_context_that_fits_in_memory(folder, monkeypatch):
    """With that context, the model loads."""
    monkeypatch.setattr(device, 'free_bytes', lambda device: 20_000_000)
    with pytest.raises(EngineError, match='are needed .* are free') as error:
        load(NativeEngine, folder, EngineConfig(device='cpu', max_context=128 * 1024))
    context = int(re.search(r'max_context (\d+) would fit', str(error.value))[1])
    monkeypatch.undo()
    assert 16 <= context < 128 * 1024
    load(NativeEngine, folder, EngineConfig(device='cpu', max_context=context)).engine.close()


def test_rejects_weights_that_do_not_fit_in_memory(folder, monkeypatch):
    monkeypatch.setattr(device, 'free_bytes', lambda device: 1000)
    with pytest.raises(EngineError, match='smaller or a quantised model'):
        load(NativeEngine, folder, CONFIG)


def test_cancels_between_chunks_of_a_prompt(folder, monkeypatch):
    """The same prompt then continues after the chunks in the cache, with the same answer."""
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
    # A chunk, then the first token.
    assert [step.cached_tokens for step in steps[:2]] == [32, 32]
    assert ids(steps) == expected
    loop.engine.close()


@pytest.mark.parametrize('family', families.FAMILIES)
def test_step_without_host_reads_gives_the_same_answer(tmp_path, family, monkeypatch):
    """A GPU without Triton captures such a step."""
    folder = random_model.save(tmp_path, family, 0)
    answers = []
    for on_host in (True, False):
        ops = TorchOps(on_host)
        monkeypatch.setattr(start, 'operations', lambda *_, ops=ops: ops)
        loop = load(NativeEngine, folder, CONFIG)
        answers.append(ids(loop.stream(list(range(40)), SamplingConfig(max_new_tokens=30))))
        loop.engine.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize(('family', 'dtype'), [
    ('llama', torch.float16), ('gemma3_text', torch.bfloat16)])
def test_int4_uses_float16_unless_activations_may_overflow(tmp_path, family, dtype, monkeypatch):
    random_formats.save(tmp_path, family, random_formats.awq(32))
    monkeypatch.setattr(
        device, 'select', lambda config: (torch.device('cuda'), torch.bfloat16))
    monkeypatch.setattr(start, '_problem', lambda device: None)
    assert start.select(inspect(tmp_path), EngineConfig()) == (torch.device('cuda'), dtype)


@pytest.mark.parametrize(('capability', 'dtype'), [
    ((8, 7), torch.bfloat16), ((7, 5), torch.float16)])
def test_int4_without_kernels_uses_the_dtype_of_pytorchs_product(
        tmp_path, monkeypatch, capability, dtype):
    random_formats.save(tmp_path, 'llama', random_formats.awq(32))
    monkeypatch.setattr(device, 'select', lambda config: (torch.device('cuda'), torch.float16))
    monkeypatch.setattr(chip, 'capability', lambda device: capability)
    monkeypatch.setattr(start, '_problem', lambda device: 'there is no Triton')
    assert start.select(inspect(tmp_path), EngineConfig()) == (torch.device('cuda'), dtype)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('family', ['qwen2', 'qwen3_moe'])
def test_reports_the_bytes_that_each_operation_reads(tmp_path, family, dtype):
    """Also for weights in PyTorch's own layouts."""
    random_model.save(tmp_path, family, 0)
    loop = load(NativeEngine, tmp_path, EngineConfig(device='cpu', dtype=dtype, max_context=64))
    operations = {operation: size for _, operation, size in loop.engine.reads(1)}
    mlp = ['router'] * (family == 'qwen3_moe') + ['gate and up', 'down']
    assert list(operations) == ['qkv', 'attention', 'out', *mlp, 'head']
    assert all(operations.values())
    loop.engine.close()


def test_cache_stores_choices_by_owner(tmp_path):
    TuningCache('chip a', tmp_path).put('shape', [1, 2])
    TuningCache('chip b', tmp_path).put('shape', [3])
    assert TuningCache('chip a', tmp_path).get('shape') == [1, 2]
    assert TuningCache('chip b', tmp_path).get('shape') == [3]
    assert TuningCache('chip b', tmp_path).get('other') is None


@pytest.mark.parametrize('content', [
    '', '[]', '{"chip": 3}', json.dumps({'chip': {}}), '[' * 100_000, 'a FIFO'],
    ids=lambda text: text[:9])
def test_ignores_an_invalid_cache(tmp_path, content):
    if content == 'a FIFO':
        os.mkfifo(tmp_path / 'kernels.json')
    else:
        (tmp_path / 'kernels.json').write_text(content)
    cache = TuningCache('chip', tmp_path)
    assert cache.get('shape') is None
    cache.put('shape', [4])
    assert TuningCache('chip', tmp_path).get('shape') == [4]


def test_a_full_disk_leaves_no_part_of_the_cache(tmp_path, monkeypatch):
    def fill(path, text):
        path.write_bytes(text.encode()[:3])
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_text', fill)
    cache = TuningCache('chip', tmp_path)
    cache.put('shape', [4])
    assert cache.get('shape') == [4]
    assert not list(tmp_path.iterdir())


def test_keeps_choices_without_a_home_folder(monkeypatch):
    """As in a container whose user id has no name."""
    def fail():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(Path, 'home', fail)
    cache = TuningCache('chip')
    cache.put('shape', [4])
    assert cache.get('shape') == [4]


def test_keeps_choices_if_the_cache_is_not_writable(tmp_path):
    (tmp_path / 'file').write_text('')
    cache = TuningCache('chip', tmp_path / 'file' / 'folder')
    cache.put('shape', [4])
    assert cache.get('shape') == [4]
