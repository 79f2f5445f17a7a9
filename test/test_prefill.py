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

"""`Prefill` with padded chunks against `Transformer.prefill`; on a CPU in Triton's interpreter."""

from importlib import import_module
import os
from pkgutil import iter_modules

import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
pytest.importorskip('triton')
pytest.importorskip('transformers')

from physai_decode.checkpoint import inspect
from physai_decode.engine import EngineError
from physai_decode.engines import native
from physai_decode.engines.native import families
from physai_decode.engines.native import prefill
from physai_decode.engines.native import self_check
from physai_decode.engines.native import source
from physai_decode.engines.native import weights
from physai_decode.engines.native.fp4_kernels import Fp4Ops
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.prefill import Prefill
from physai_decode.engines.native.prefill_tiling import LIBRARY
from physai_decode.engines.native.prefill_tiling import Tiling
from physai_decode.engines.native.transformer import EagerPrefill
from physai_decode.engines.native.transformer import Transformer
import random_formats
import random_gptq
import random_model

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
CONTEXT = 96
LIMIT = 1e-5
# The kernels of a layer do not depend on the number of layers, which test_families varies.
ONE_LAYER = {'num_hidden_layers': 1, 'vocab_size': 64}
ONE_LAYER_OF = {'gemma3_text': {**ONE_LAYER, 'layer_types': ['sliding_attention']}}
# A chunk of one of these families is like that of another that is not in this set.
NOT_HERE = {'llama', 'llama_scaled', 'mistral', 'qwen2',
            'qwen2_tied', 'qwen2_yarn', 'qwen3_tied', 'smollm3_window', 'phi3'}


@pytest.fixture(autouse=True)
def short_context(monkeypatch):
    """Reduce the length of a short context to 40 tokens."""
    monkeypatch.setattr(prefill, 'SHORT_CONTEXT', 40)


def load(folder, dtype=torch.float32):
    """Return a transformer by kernels, and the reference in torch and float32."""
    checkpoint = inspect(folder)
    shape = families.parse(checkpoint.config)

    def build(dtype, ops):
        loaded = weights.load(shape, source.Files(checkpoint, DEVICE),
                              checkpoint.quantized, dtype, lambda message: None)
        return Transformer(shape, loaded, CONTEXT, dtype, DEVICE, ops)

    return build(dtype, Fp4Ops(DEVICE, splits=2)), build(torch.float32, TorchOps(on_host=False))


def error(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def check_chunks(folder, chunks, limit=LIMIT, dtype=torch.float32, **options):
    """Feed a prompt to both in chunks of these lengths; compare the logits and the caches."""
    own, reference = load(folder, dtype)
    for each in (own, reference):       # to notice writes to other positions
        each.keys.fill_(3.0)
        each.values.fill_(3.0)
    fed = Prefill(own, (16, 32), **{'capture': DEVICE.type == 'cuda', **options})
    ids = torch.randint(0, own.architecture.vocab_size, (sum(chunks),),
                        generator=torch.Generator().manual_seed(len(chunks)))
    start = 0
    for count in chunks:
        piece = ids[start:start + count]
        fed.feed(piece, start)
        expected = reference.prefill(piece.to(DEVICE), start)
        start += count
    assert error(fed.logits(), expected) < limit
    for cache in ('keys', 'values'):
        assert error(getattr(own, cache), getattr(reference, cache)) < limit
        assert (getattr(own, cache)[:, :, start:] == 3.0).all()
    return fed


@pytest.mark.slow
@pytest.mark.parametrize('family', [
    family for family in random_model.FAMILIES if family not in NOT_HERE])
def test_families(tmp_path, family):
    """Where a family has a window, the second chunk is longer than it."""
    windowed = 'window' in family or 'gemma3' in family
    check_chunks(random_model.save(
        tmp_path, family, 0, **({'sliding_window': 6} if windowed else {})), (7, 12))


@pytest.mark.parametrize('library, form', [
    (False, {'group_size': 32}), (False, {'group_size': 128, 'symmetric': False}),
    (True, {'group_size': 64, 'symmetric': False}), (True, {'group_size': 64, 'act_order': True}),
    (False, {'group_size': 32, 'act_order': True, 'symmetric': False, 'one_order': False})])
def test_gptq(tmp_path, form, library, monkeypatch):
    if library:
        monkeypatch.setattr(prefill, 'rule', lambda *_: LIBRARY)
        monkeypatch.setattr(prefill, 'UNPACKED_BYTES', 0)
        monkeypatch.setattr(prefill, 'UNPACKED_ROWS', 128)
    folder = tmp_path / 'model'
    random_gptq.save(folder, 'qwen2', 0, **form, **ONE_LAYER)
    check_chunks(folder, (7, 30), 2e-5)


@pytest.mark.parametrize('family', ['phi3_part', 'gemma3_text'])
@pytest.mark.parametrize('library', [False, True])
def test_gptq_of_other_families(tmp_path, family, library, monkeypatch):
    if library:
        monkeypatch.setattr(prefill, 'rule', lambda *_: LIBRARY)
    random_gptq.save(tmp_path / 'model', family, 0, 32, symmetric=False,
                     **ONE_LAYER_OF.get(family, ONE_LAYER))
    check_chunks(tmp_path / 'model', (9,), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('form', [
    random_formats.int8(-1, symmetric=False), random_formats.float8('block'),
    random_formats.packed(8, 32, act_order=True), random_formats.bitsandbytes('nf4', double=True),
    random_formats.float4('nvfp4')])
@pytest.mark.parametrize('library', [False, True])
def test_other_formats(tmp_path, form, library, monkeypatch):
    if library:
        monkeypatch.setattr(prefill, 'rule', lambda *_: LIBRARY)
    monkeypatch.setattr(prefill, 'UNPACKED_BYTES', 0)
    monkeypatch.setattr(prefill, 'UNPACKED_ROWS', 128)
    random_formats.save(tmp_path / 'model', 'qwen2', form, **ONE_LAYER)
    check_chunks(tmp_path / 'model', (9,), 2e-5)


@pytest.mark.parametrize('dtype', [torch.float16] + [torch.bfloat16] * (DEVICE.type == 'cuda'))
@pytest.mark.parametrize('form', [
    random_formats.packed(4, 32, symmetric=False), random_formats.int8(-1),
    random_formats.packed(8, 32, symmetric=False), random_formats.float8('channel'),
    random_formats.float8('block'), random_formats.bitsandbytes('nf4'),
    random_formats.float4('nvfp4')])
def test_16_bits(tmp_path, form, dtype):
    """On a GPU, kernels convert weights to 16 bits with instructions of their own."""
    random_formats.save(tmp_path / 'model', 'qwen2', form, **ONE_LAYER)
    check_chunks(tmp_path / 'model', (9, 20), 0.02, dtype)


class Spoiled:
    """A kernel that swaps two columns of its output."""

    def __init__(self, kernel):
        self._kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches += 1
            self._kernel[grid](*arguments, **options)
            out = arguments[self._kernel.arg_names.index('out')]
            out[:, :2] = out[:, :2].flip(1)
        return launch


def dequantising_kernels():
    """Return the module and name of each kernel that has the scales of weights, but no input."""
    modules = [import_module(f'{native.__name__}.{each.name}')
               for each in iter_modules(native.__path__) if each.name.endswith('kernels')]
    return {(module, name) for module in modules for name, each in vars(module).items()
            if {'scales', 'out'} <= {*getattr(each, 'arg_names', ())}
            and 'x' not in each.arg_names}


FORMS = (random_formats.packed(4, 32), random_formats.packed(4, 32, symmetric=False),
         random_formats.int8(-1), random_formats.bitsandbytes('nf4'),
         random_formats.float4('nvfp4'))


def test_check_finds_each_wrong_dequantisation(tmp_path, monkeypatch):
    """In the prefill with chunks and the one without, which have different kernels."""
    spoiled = {(module, name): Spoiled(getattr(module, name))
               for module, name in dequantising_kernels()}
    assert {name for _, name in spoiled} == {'_unpack', '_dequantise', '_widen'}
    assert len(spoiled) == 4
    for number, form in enumerate(FORMS):
        folder = tmp_path / str(number)
        random_formats.save(folder, 'qwen2', form, **ONE_LAYER)
        t = load(folder)[0]
        for dequantiser in (Prefill(t, (16,), capture=False).dequantiser,
                            EagerPrefill(t).dequantiser):
            self_check._check_dequantisers(t, dequantiser, LIMIT)
            with monkeypatch.context() as patch:
                for (module, name), kernel in spoiled.items():
                    patch.setattr(module, name, kernel)
                with pytest.raises(EngineError, match=r'a long prompt wrongly.* qkv \('):
                    self_check._check_dequantisers(t, dequantiser, LIMIT)
    assert all(each.launches for each in spoiled.values())


@pytest.mark.parametrize('form', FORMS)
def test_check_dequantises_as_long_chunks_do(tmp_path, monkeypatch, form):
    """Each function that writes dequantised weights is one that the check calls."""
    called = {'check': set(), 'chunk': set()}
    now = 'check'

    def noted(widen):
        def call(*arguments):
            called[now].add(widen)
            widen(*arguments)
        return call

    monkeypatch.setattr(prefill, '_unpack', noted(prefill._unpack))
    monkeypatch.setattr(Fp4Ops, 'wideners', {
        kind: noted(widen) for kind, widen in Fp4Ops.wideners.items()})
    monkeypatch.setattr(prefill, 'rule', lambda *_: LIBRARY)
    random_formats.save(tmp_path / 'model', 'qwen2', form, **ONE_LAYER)
    t = load(tmp_path / 'model')[0]
    chunks = Prefill(t, (16,), capture=False)
    self_check._check_dequantisers(t, chunks.dequantiser, LIMIT)
    now = 'chunk'
    chunks([1, 2, 3], 0)
    assert called['check'] == called['chunk'] != set()


@pytest.mark.parametrize('form', [random_formats.int8(-1), random_formats.float4('nvfp4')])
def test_gelu(tmp_path, form):
    random_formats.save(tmp_path / 'model', 'gemma3_text', form, **ONE_LAYER_OF['gemma3_text'])
    check_chunks(tmp_path / 'model', (7,), 2e-5)


def test_heads_of_96_dimensions_in_groups_of_3(tmp_path):
    folder = random_model.save(tmp_path, 'qwen3', 1, head_dim=96, num_attention_heads=6,
                               num_key_value_heads=2, **ONE_LAYER)
    check_chunks(folder, (20, 3))


def test_single_token_and_full_context(tmp_path):
    check_chunks(random_model.save(tmp_path, 'qwen2', 2, **ONE_LAYER), (1, 32, 32, 31))


def test_prompt_longer_than_the_largest_chunk(tmp_path):
    check_chunks(random_model.save(tmp_path, 'qwen2', 3, **ONE_LAYER), (70, 5))


def test_splits(tmp_path, monkeypatch):
    """Attention without splits, products with and without them, and partial tiles."""
    monkeypatch.setattr(Prefill, '_splits', lambda self, tokens: 1)
    folder = random_model.save(tmp_path, 'llama_biases', 3, **ONE_LAYER)
    for tiling in (Tiling(64, 32, 16, 4, 2, 3), Tiling(128, 64, 16, 4, 2, 1)):
        monkeypatch.setattr(prefill, 'rule', lambda *_, tiling=tiling: tiling)
        check_chunks(folder, (40,))


def test_rejects_a_prompt_longer_than_the_context(tmp_path):
    own, _ = load(random_model.save(tmp_path, 'qwen2', 3))
    fed = Prefill(own, (16,), capture=False)
    with pytest.raises(ValueError, match='97 tokens do not fit behind 0 of 96'):
        fed([0] * 97, 0)


def test_ignores_chunk_sizes_that_no_context_needs(tmp_path):
    own, _ = load(random_model.save(tmp_path, 'qwen2', 3))
    fed = Prefill(own, (16, 64, 128, 256), capture=False)
    assert fed.sizes == (16, 64, 128)
    assert fed.buffer_bytes > 0 and fed.graph_bytes == 0


@pytest.mark.parametrize('form', [None, {'group_size': 32, 'symmetric': False}])
def test_splits_the_last_tiles_of_gate_and_up(tmp_path, form, monkeypatch):
    monkeypatch.setattr(prefill, 'TAIL', 1)
    folder = tmp_path / 'model'
    if form:
        random_gptq.save(folder, 'qwen2', 0, **form, intermediate_size=288, **ONE_LAYER)
    else:
        random_model.save(folder, 'qwen2', 0, intermediate_size=288, **ONE_LAYER)
    tilings = {16: Tiling(64, 32, 16, 4, 2, 1), 32: Tiling(128, 32, 16, 4, 2, 1)}
    monkeypatch.setattr(prefill, 'rule', lambda weight, tokens, *_: tilings[tokens])
    check_chunks(folder, (9, 20), 2e-5)
