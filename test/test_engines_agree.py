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

"""The native engine agrees with the transformers library; both engines keep the contract."""

import dataclasses
import json
import math
from pathlib import Path

import engine_contract
from engine_contract import decode
from engine_contract import load
from physai_decode import checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import Comparable
from physai_decode.engine import EngineError
from physai_decode.engines.native import families
from physai_decode.engines.native import NativeEngine
from physai_decode.engines.transformers import TransformersEngine
import pytest
import random_model
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
import transformers

ENGINES = {'native': NativeEngine, 'transformers': TransformersEngine}
CPU = EngineConfig(device='cpu', dtype='float32', cpu_threads=1)
TOKENS = 32                      # so that the second prompt grows beyond a window of 48
LENGTHS = (1, 23, 130, 191)      # of a context of 256
RELATIVE = 1e-4


@pytest.fixture(scope='module', params=ENGINES)
def loop(request, tmp_path_factory):
    """Return each engine with a small model; a quarter of its ids end an answer."""
    folder = random_model.save(
        tmp_path_factory.mktemp('model'), 'qwen2', 0, eos_token_id=list(range(128)))
    loop = load(ENGINES[request.param], folder, CPU)
    yield loop
    loop.engine.close()


@pytest.mark.parametrize('check', engine_contract.CHECKS, ids=lambda check: check.__name__)
def test_contract(loop, check):
    check(loop)


@pytest.mark.parametrize('name', ENGINES)
@pytest.mark.parametrize('family', random_model.FAMILIES)
def test_footprint(name, family, tmp_path):
    folder = random_model.save(tmp_path, family, 0)
    engine = load(ENGINES[name], folder, EngineConfig(device='cpu', max_context=100)).engine
    engine_contract.check_footprint(engine.footprint, checkpoint.inspect(folder))
    assert isinstance(engine, Comparable)
    assert engine.footprint.engine == name
    assert engine.footprint.cuda_graph == 'unavailable'
    assert engine.footprint.max_context == 100
    engine.close()


def assert_same_answer(ours, theirs, prompt, reference):
    """Compare greedy answers; they may differ from a token on whose logits are almost tied."""
    assert len(ours) == len(theirs)
    if ours == theirs:
        return
    place = next(i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
    logits = reference.engine.prefill_logits(prompt + theirs[:place])[-1]
    gap = (logits[theirs[place]] - logits[ours[place]]).abs() / logits.abs().max()
    assert gap < 1e-5, f'they differ from token {place} of {TOKENS} on, by {gap:.1e} relative'


def random_prompts(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(512, (length,), generator=generator).tolist() for length in LENGTHS]


def same_logits(native, reference, prompt):
    expected = reference.engine.prefill_logits(prompt)
    native.forget()
    difference = (native.engine.prefill_logits(prompt) - expected).abs().max()
    return difference <= RELATIVE * expected.abs().max()


def assert_agreement(folder, seed):
    native, reference = (load(kind, folder, CPU) for kind in ENGINES.values())
    sampling = SamplingConfig(max_new_tokens=TOKENS)
    prompts = random_prompts(seed)
    for prompt in prompts:
        theirs = decode(reference, prompt, sampling)
        ours = decode(native, prompt, sampling)
        assert len(ours) == TOKENS
        assert_same_answer(ours, theirs, prompt, reference)
        assert same_logits(native, reference, prompt)
    # With a part of the prompt in the cache, a prompt that differs later, and a longer one.
    prompt = prompts[2]
    for loop in (native, reference):
        fresh = decode(loop, prompt, sampling)
        for prefix in (prompt[:100], prompt[:100] + prompts[1], prompt + fresh[:9]):
            engine_contract.forget(loop)
            decode(loop, prefix, SamplingConfig(max_new_tokens=3))
            assert_same_answer(decode(loop, prompt, sampling), fresh, prompt, reference)
    native.engine.close()
    reference.engine.close()


@pytest.mark.parametrize(('context', 'kind'), [(128, 'short'), (256, 'long')])
def test_longrope(context, kind, tmp_path):
    """The factors depend on the maximum context, not on the number of cached tokens."""
    folder = random_model.save(tmp_path, 'phi3_part', 0, original_max_position_embeddings=128)
    native = load(NativeEngine, folder, dataclasses.replace(CPU, max_context=context))
    reference = load(TransformersEngine, folder, CPU)
    length = {'short': 100, 'long': 160}[kind]
    prompt = [(7 * i) % 500 for i in range(length)]
    # A whole prompt: in chunks, the library would use the short factors for the first one.
    ours = decode(native, prompt, SamplingConfig(max_new_tokens=20))
    logits = reference.engine.prefill_logits(prompt + ours[:-1])
    assert logits[length - 1:].argmax(-1).tolist() == ours
    for count in (length, 20):
        # For a short prompt, the library uses the short factors in a long context too.
        assert same_logits(native, reference, prompt[:count]) == (
            count == length or kind == 'short')


def test_each_family_has_a_random_model(monkeypatch):
    """Here, and in the check on a GPU."""
    pytest.importorskip('triton')
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / 'tools')
    import gpu_check
    assert random_model.model_type('qwen3_moe') == 'qwen3_moe'
    for found in (set(map(random_model.model_type, random_model.FAMILIES)),
                  {family for family, _ in gpu_check.MODELS.values()}):
        assert not set(families.FAMILIES) - found


@pytest.mark.parametrize('family', random_model.FAMILIES)
def test_agreement(family, tmp_path):
    assert_agreement(random_model.save(tmp_path, family, 1), 1)


@pytest.mark.parametrize('family', [
    'llama_scaled', 'mistral_window', 'qwen2_yarn', 'qwen2_window', 'qwen3', 'gemma3_text',
    'granite', 'phi3_part', 'smollm3', 'smollm3_window'])
def test_agreement_with_configs_of_earlier_versions(family, tmp_path):
    folder = random_model.save(tmp_path, family, 2)
    random_model.rewrite_config_as_before(folder)
    native, reference = (load(kind, folder, CPU) for kind in ENGINES.values())
    assert all(same_logits(native, reference, prompt) for prompt in random_prompts(2))


@pytest.mark.parametrize('fields', [{}, {'use_sliding_window': True}, {'sliding_window': None}])
@pytest.mark.parametrize('family', families.FAMILIES)
def test_defaults_of_missing_config_fields(family, fields, tmp_path):
    """They are those of the library."""
    given = {'model_type': family, 'vocab_size': 512, 'hidden_size': 4096, 'intermediate_size': 64,
             'num_hidden_layers': 30, 'num_attention_heads': 64, 'pad_token_id': None, **fields}
    (tmp_path / 'config.json').write_text(json.dumps(given))
    if family == 'gemma3_text' and 'sliding_window' in fields:
        with pytest.raises(EngineError, match='sliding_window is null'):
            families.parse(given)
        return
    ours = families.parse(given)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device('meta'):
        network = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name.removeprefix('model.layers.0.'): tuple(weight.shape)
              for name, weight in network.state_dict().items()}
    rows = {name: shapes[f'self_attn.{name}.weight'][0] for name in ours.names.qkv}
    assert rows == dict(zip(rows, (ours.q_size, ours.kv_size, ours.kv_size))) or list(
        rows.values()) == [ours.q_size + 2 * ours.kv_size]
    assert (f'self_attn.{ours.names.qkv[0]}.bias' in shapes) == ours.qkv_bias
    assert ('self_attn.o_proj.bias' in shapes) == ours.out_bias
    assert (f'mlp.{ours.names.gate_up[-1]}.bias' in shapes) == ours.mlp_bias
    assert ('self_attn.q_norm.weight' in shapes) == ours.qk_norm
    for name in (ours.names.mlp_norm, ours.names.out_norm, ours.names.down_norm):
        assert not name or f'{name}.weight' in shapes
    assert config.tie_word_embeddings == ours.tied_head
    assert getattr(config, 'no_rope_layers', [1] * ours.layers) == [
        int(bool(each.inverse_frequencies)) for each in ours.rotaries]
    assert config.rms_norm_eps == ours.norm_eps
    activation = getattr(config, 'hidden_act', None) or config.hidden_activation
    assert activation == {'gelu_tanh': 'gelu_pytorch_tanh'}.get(ours.activation, ours.activation)
    assert network.model.layers[0].self_attn.scaling == pytest.approx(ours.attention_scale)
    window = getattr(config, 'sliding_window', None) or 0
    kinds = getattr(config, 'layer_types', None) or ['sliding_attention'] * ours.layers
    assert ours.windows == tuple(window if kind == 'sliding_attention' else 0 for kind in kinds)
    rotary = type(network.model.rotary_emb)(config)
    for kind, found in zip(kinds, ours.rotaries, strict=True):
        wanted = getattr(rotary, f'{kind}_inv_freq', None)
        wanted = rotary.inv_freq if wanted is None else wanted
        if not found.inverse_frequencies:
            continue
        assert found.inverse_frequencies == pytest.approx(wanted.tolist())
        assert found.scale == 1.0


YARN = {'rope_type': 'yarn', 'original_max_position_embeddings': 64}
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 64}


@pytest.mark.parametrize('fields', [
    *({key: value} for value in (None, '64', 0, -1, 1.5, True, [64]) for key in (
        'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
        'num_attention_heads')),
    *({key: value} for value in ('2', 0, 1.5, [2]) for key in ('num_key_value_heads', 'head_dim')),
    *({'rms_norm_eps': value} for value in (None, '1e-6', 0, float('nan'))),
    {'rope_theta': 'x'}, {'rope_theta': -1}, {'rope_scaling': 'linear'},
    *({'rope_scaling': {'rope_type': 'linear', 'factor': value}}
      for value in (None, 0, '2', float('inf'))),
    {'rope_scaling': {'rope_type': 'linear'}}, {'rope_scaling': YARN},
    {'rope_scaling': {**YARN, 'factor': 0}}, {'rope_scaling': {**YARN, 'factor': '4'}},
    {'rope_scaling': {**YARN, 'factor': 4, 'attention_factor': 'x'}},
    {'rope_scaling': {**YARN, 'factor': 4, 'beta_fast': 'x'}},
    *({'rope_scaling': {**LLAMA3, key: value}} for value in (None, '1', 0)
      for key in LLAMA3 if key != 'rope_type'),
    {'use_sliding_window': True, 'sliding_window': '64'},
    {'use_sliding_window': True, 'sliding_window': 0},
    {'use_sliding_window': True, 'max_window_layers': 'x'},
    {'use_sliding_window': True, 'layer_types': ['full_attention']},
    {'use_sliding_window': True, 'layer_types': 2},
    {'use_sliding_window': True, 'layer_types': ['full_attention', None]}], ids=str)
def test_rejects_invalid_config_fields(fields):
    config = {
        'model_type': 'qwen2', 'vocab_size': 512, 'hidden_size': 128, 'intermediate_size': 256,
        'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 1,
        'max_position_embeddings': 256}
    families.parse(config)
    with pytest.raises(EngineError, match=r'config\.json .*again'):
        families.parse({**config, **fields})


def test_the_original_context_of_ministral3_may_be_all_that_is_set(tmp_path):
    folder = random_model.save(tmp_path, 'ministral3', 1)
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    config |= {'rope_parameters': None, 'original_max_position_embeddings': 40}
    path.write_text(json.dumps(config))
    native, reference = (load(kind, folder, CPU) for kind in ENGINES.values())
    assert all(same_logits(native, reference, prompt) for prompt in random_prompts(1))


@pytest.mark.parametrize(('fields', 'word'), [
    ({'rope_scaling': {'type': 'linear', 'factor': 8.0}}, 'rename type to rope_type'),
    ({'rope_parameters': {'rope_theta': 5e5}}, 'rope_parameters has neither full_attention nor'),
    ({'rope_scaling': {**YARN, 'factor': 4.0, 'truncate': False}}, 'delete truncate'),
    ({'rope_scaling': {'type': 'default'}}, ''),
    ({'rope_scaling': {'rope_type': 'linear', 'type': 'linear', 'factor': 8.0}}, ''),
    ({'rope_scaling': {**YARN, 'factor': 4.0, 'truncate': True}}, '')])
def test_gemma3_rejects_what_the_library_ignores(fields, word, tmp_path):
    """It would run another rotary embedding than the library."""
    folder = random_model.save(tmp_path, 'gemma3_text', 1)
    path = folder / 'config.json'
    config = {**json.loads(path.read_text()), 'rope_parameters': None, **fields}
    path.write_text(json.dumps(config))
    if word:
        with pytest.raises(EngineError, match=word):
            families.parse(config)
        return
    native, reference = (load(kind, folder, CPU) for kind in ENGINES.values())
    assert same_logits(native, reference, random_prompts(1)[2])


@pytest.mark.parametrize('length', [1, 254, 255])
def test_agreement_at_the_end_of_the_context(length, tmp_path):
    folder = random_model.save(tmp_path, 'qwen2', 3)
    prompt = torch.randint(512, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    native, reference = (load(kind, folder, CPU) for kind in ENGINES.values())
    ours, theirs = (
        decode(loop, prompt, SamplingConfig(max_new_tokens=1000))
        for loop in (native, reference))
    assert len(ours) == 256 - length
    assert_same_answer(ours, theirs, prompt, reference)


def test_engines_report_the_same_cached_tokens(tmp_path):
    folder = random_model.save(tmp_path, 'llama', 4)
    prompt = list(range(10, 60))
    reported = []
    for kind in ENGINES.values():
        loop = load(kind, folder, CPU)
        steps = [engine_contract.first_step(loop, ids) for ids in (
            prompt, prompt, prompt[:20] + [7, 8, 9], prompt[:10], [3])]
        reported.append([step.cached_tokens for step in steps])
    assert reported == [[0, 49, 20, 9, 0]] * 2


@pytest.mark.parametrize('name', ENGINES)
@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('sampling', [
    SamplingConfig(), SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    SamplingConfig(repetition_penalty=1.2)], ids=['greedy', 'sampled', 'all', 'penalty'])
def test_rejects_logits_that_are_not_numbers(name, value, sampling, tmp_path):
    """One row of the embedding is damaged; prompts without its token still work."""
    folder = random_model.save(tmp_path, 'llama', 0)
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    tensors['model.embed_tokens.weight'][100] = value
    save_file(tensors, path, metadata={'format': 'pt'})
    loop = load(ENGINES[name], folder, CPU)
    for _ in range(2):
        with pytest.raises(EngineError, match='logits are not numbers'):
            decode(loop, [3, 100, 5], sampling)
    assert len(decode(loop, [3, 4, 5])) == 8
    loop.engine.close()
