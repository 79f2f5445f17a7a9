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

"""The transformers engine: architectures, caches, errors, and memory."""

import gc
import json
import sys
from urllib.error import URLError

import engine_contract
from engine_contract import CHECKS
from engine_contract import decode
from engine_contract import forget
from physai_decode import checkpoint
from physai_decode import engines
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engine import EngineError
from physai_decode.engines import device
from physai_decode.engines import libraries
from physai_decode.engines.transformers import caches
from physai_decode.engines.transformers import engine as module
from physai_decode.engines.transformers import network
from physai_decode.engines.transformers import TransformersEngine
import pytest
import random_model
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
import transformers

CPU = EngineConfig(device='cpu', dtype='float32', cpu_threads=1)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')

_BASE = {
    'vocab_size': 512, 'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 2,
    'num_attention_heads': 2, 'num_key_value_heads': 1, 'head_dim': 32,
    'max_position_embeddings': 256, 'pad_token_id': None}
_EXPERTS = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 32}
ARCHITECTURES = {
    'gpt2': {'vocab_size': 512, 'n_embd': 64, 'n_layer': 2, 'n_head': 2, 'n_positions': 256},
    'bloom': {'vocab_size': 512, 'hidden_size': 64, 'n_layer': 2, 'n_head': 2},
    'phi3': _BASE,
    'gemma3_text': {**_BASE, 'num_hidden_layers': 6, 'sliding_window': 24},
    'mixtral': {**_BASE, 'num_local_experts': 4, 'num_experts_per_tok': 2},
    'qwen3_moe': {**_BASE, **_EXPERTS},
    'mamba': {'vocab_size': 512, 'hidden_size': 64, 'num_hidden_layers': 2, 'state_size': 8},
    'deepseek_v3': {
        **_BASE, 'head_dim': 16, 'num_key_value_heads': 2, 'q_lora_rank': 32, 'kv_lora_rank': 32,
        'qk_rope_head_dim': 16, 'qk_nope_head_dim': 16, 'v_head_dim': 16, 'n_routed_experts': 4,
        'num_experts_per_tok': 2, 'moe_intermediate_size': 32, 'n_group': 1, 'topk_group': 1,
        'first_k_dense_replace': 1},
    'lfm2': {**_BASE, 'layer_types': ['conv', 'full_attention']},
    'bamba': {                          # it does not derive positions from the cache
        **_BASE, 'num_hidden_layers': 3, 'attn_layer_indices': [1], 'mamba_n_heads': 4,
        'mamba_d_head': 32, 'mamba_d_state': 16, 'mamba_n_groups': 1, 'mamba_expand': 2},
    'recurrent_gemma': {                # its state is not in the cache
        **_BASE, 'num_hidden_layers': 3, 'lru_width': 64, 'attention_window_size': 24},
    'gpt_neo': {                        # its mask needs a growing cache
        'vocab_size': 512, 'hidden_size': 64, 'num_layers': 2, 'num_heads': 2,
        'attention_types': [[['global', 'local'], 1]], 'window_size': 24,
        'max_position_embeddings': 256}}


def load(folder, config=CPU):
    return engine_contract.load(TransformersEngine, folder, config)


def change_config(folder, **changes):
    path = folder / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    return random_model.save(tmp_path / 'model', 'llama', 0)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_answers_like_generate(name, tmp_path):
    config = transformers.AutoConfig.for_model(name, **ARCHITECTURES[name])
    loop = load(random_model.save_config(tmp_path, config, 0))
    prompt = list(range(3, 43))
    answer = decode(loop, prompt, SamplingConfig(max_new_tokens=40))
    network = loop.engine.cached.network
    network.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    expected = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert answer == expected[0, len(prompt):].tolist()
    # With the answer in the cache, whole or cut.
    assert decode(loop, prompt + answer[:20], SamplingConfig(max_new_tokens=20)) == answer[20:]
    assert decode(loop, prompt + answer[:9], SamplingConfig(max_new_tokens=31)) == answer[9:]
    loop.engine.close()


def test_feeds_long_prompts_in_chunks(folder, monkeypatch):
    loop = load(folder)
    prompt = list(range(10, 160))
    expected = decode(loop, prompt)
    loop.engine.chunk_tokens = (1, 64)
    loop = DecodeLoop(loop.engine, chunk_ms=0.0)
    steps = list(loop.stream(prompt, SamplingConfig(max_new_tokens=8)))
    assert [len(step.token_ids) for step in steps] == [0, 0] + [1] * 8
    assert [step.token_ids[0] for step in steps[2:]] == expected
    forget(loop)
    stream = loop.stream(prompt, SamplingConfig())
    assert next(stream).token_ids == ()
    stream.close()
    steps = list(loop.stream(prompt, SamplingConfig(max_new_tokens=8)))
    assert steps[-1].cached_tokens == 64
    assert [step.token_ids[0] for step in steps if step.token_ids] == expected


def test_failed_step_empties_the_cache(folder, monkeypatch):
    loop = load(folder)
    prompt = list(range(10, 40))
    expected = decode(loop, prompt)

    def fail(*args, **kwargs):
        raise RuntimeError('broken')

    # The first layer has cached the token's keys and values, the second has not.
    with monkeypatch.context() as patch:
        patch.setattr(loop.engine.cached.network.model.layers[1], 'forward', fail)
        with pytest.raises(RuntimeError, match='broken'):
            decode(loop, prompt + [5])
    steps = list(loop.stream(prompt, SamplingConfig(max_new_tokens=8)))
    assert steps[0].cached_tokens == 0
    assert [step.token_ids[0] for step in steps] == expected


@pytest.mark.parametrize('family', ['llama', 'mistral_window', 'qwen2_window', 'qwen3'])
def test_static_cache_gives_the_same_tokens(family, tmp_path, monkeypatch):
    """The step that a GPU captures runs here without a graph."""
    folder = random_model.save(tmp_path, family, 0)
    reference = load(folder)
    monkeypatch.setattr(caches.CapturedNetwork, '_capture', lambda self: None)
    monkeypatch.setattr(module, 'CachedNetwork', caches.CapturedNetwork)
    loop = load(folder)
    assert loop.engine.footprint.cuda_graph == 'captured'
    prompts = (list(range(3, 100)), list(range(3, 60)) + [7, 8, 9], [5])
    for prompt in prompts:
        sampling = SamplingConfig(max_new_tokens=60)
        assert decode(loop, prompt, sampling) == decode(reference, prompt, sampling)
    if family in ('llama', 'qwen2_window'):     # the others have the same kinds of layers
        for check in CHECKS:
            check(loop)


@pytest.mark.parametrize('name', ['CachedNetwork', 'CapturedNetwork'])
def test_attention_of_changing_length_does_not_use_cudnn(folder, monkeypatch, name):
    """A captured step has a fixed length, so it keeps PyTorch's choice."""
    monkeypatch.setattr(caches.CapturedNetwork, '_capture', lambda self: None)
    monkeypatch.setattr(module, 'CachedNetwork', getattr(caches, name))
    backends = device.attention_backends
    monkeypatch.setattr(
        device, 'attention_backends', lambda device: backends(torch.device('cuda')))
    loop = load(folder)
    seen = []
    loop.engine.cached.network.register_forward_pre_hook(
        lambda network, args: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    stream = loop.stream([5, 6, 7], SamplingConfig(max_new_tokens=3))
    next(stream)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    list(stream)
    assert seen == [False, *[name == 'CapturedNetwork'] * 2]


def test_does_not_capture_recurrent_states():
    config = transformers.AutoConfig.for_model('mamba', **ARCHITECTURES['mamba'])
    with pytest.raises(EngineError, match='engine.cuda_graph to false'):
        caches.whole_cache(config, 64)


@pytest.mark.parametrize('name', ['bloom', 'gpt_neo', 'recurrent_gemma'])
def test_rejects_models_that_fail_with_a_static_cache(name, tmp_path, monkeypatch):
    config = transformers.AutoConfig.for_model(name, **ARCHITECTURES[name])
    monkeypatch.setattr(caches.CapturedNetwork, '_capture', lambda self: None)
    monkeypatch.setattr(module, 'CachedNetwork', caches.CapturedNetwork)
    with pytest.raises(EngineError, match=f'^{name}: .*set engine.cuda_graph to false'):
        load(random_model.save_config(tmp_path, config, 0))


def test_footprint_omits_layers_without_keys(tmp_path):
    name = 'recurrent_gemma'
    config = transformers.AutoConfig.for_model(name, **ARCHITECTURES[name])
    footprint = load(random_model.save_config(tmp_path, config, 0)).engine.footprint
    assert (footprint.layers, footprint.windowed_layers) == (1, 1)


def test_footprint_omits_unselected_experts(tmp_path):
    config = transformers.AutoConfig.for_model('qwen3_moe', **ARCHITECTURES['qwen3_moe'])
    folder = random_model.save_config(tmp_path, config, 0)
    tensors = checkpoint.inspect(folder).tensors
    experts = sum(entry.bytes for name, entry in tensors.items() if '.experts.' in name)
    embedding = tensors['model.embed_tokens.weight']
    assert experts > 0
    assert load(folder).engine.footprint.read_weight_bytes == \
        sum(entry.bytes for entry in tensors.values()) - experts // 2 \
        - embedding.bytes + embedding.bytes // embedding.shape[0]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_dtypes(folder, dtype):
    loop = load(folder, EngineConfig(device='cpu', dtype=dtype))
    assert loop.engine.footprint.dtype == dtype
    assert loop.engine.footprint.kv_element_bytes == (4 if dtype == 'float32' else 2)
    assert len(decode(loop, [3, 4, 5])) == 8


def live_linears():
    """Count the linear layers in memory."""
    gc.collect()
    return sum(issubclass(type(each), torch.nn.Linear) for each in gc.get_objects())


def test_close_frees_the_weights(folder):
    before = live_linears()
    loop = load(folder)
    decode(loop, [3, 4, 5])
    assert live_linears() > before
    loop.engine.close()
    loop.engine.close()
    assert live_linears() == before


def build(path, progress=lambda text: None, **engine):
    """Build an engine from a folder, on the CPU."""
    return engines.build(checkpoint.open(str(path)), EngineConfig(
        **{'device': 'cpu', 'name': 'transformers', **engine}), progress)


def error_of(path, **engine):
    """Return the message of the error that building an engine raises."""
    with pytest.raises(EngineError) as caught:
        build(path, **engine)
    return str(caught.value)


def test_reports_a_library_that_needs_a_download(folder, monkeypatch):
    def refused(*args, **kwargs):
        raise URLError(ConnectionRefusedError(111, 'Connection refused'))

    monkeypatch.setattr(transformers.LlamaForCausalLM, 'from_pretrained', refused)
    message = error_of(folder)
    assert 'Connection refused' in message and 'connect this machine to the network' in message


def test_rejects_missing_weights(folder):
    tensors = load_file(folder / 'model.safetensors')
    del tensors['model.layers.1.mlp.up_proj.weight']
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    before = live_linears()
    assert 'up_proj' in error_of(folder)
    assert live_linears() == before
    random_model.save(folder, 'llama', 0)
    build(folder).close()


@pytest.mark.parametrize('name', ['transformers', 'native'])
def test_rejects_truncated_weights(folder, name):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])
    assert 'truncated' in error_of(folder, name=name)


@pytest.mark.parametrize('name', ['auto', 'transformers'])
def test_rejects_unknown_architectures(folder, name):
    change_config(folder, model_type='never_heard_of')
    message = error_of(folder, name=name)
    assert 'never_heard_of' in message and 'choose another model' in message


def test_rejects_encoder_decoder_models(tmp_path):
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert 'causal language model' in error_of(tmp_path)


@pytest.mark.parametrize('model_type', ['llama', 'never_heard_of'])
def test_runs_no_code_of_the_folder(folder, tmp_path, model_type):
    trace = tmp_path / 'ran'
    code = f'open({str(trace)!r}, "w")\n'
    for name in ('modeling_own.py', 'configuration_own.py'):
        (folder / name).write_text(code)
    change_config(folder, model_type=model_type, auto_map={
        'AutoConfig': 'configuration_own.OwnConfig',
        'AutoModelForCausalLM': 'modeling_own.OwnForCausalLM'})
    if model_type == 'llama':
        build(folder).close()
    else:
        assert 'never run' in error_of(folder)
    assert not trace.exists()


@pytest.mark.parametrize(('method', 'missing'), [
    ('gptq', 'gptqmodel optimum'), ('awq', 'gptqmodel'), ('bitsandbytes', 'bitsandbytes'),
    ('compressed-tensors', 'compressed-tensors'), ('torchao', 'torchao')])
def test_names_the_missing_library_of_a_quantisation(folder, method, missing, monkeypatch):
    monkeypatch.setattr(
        libraries, 'find_spec', lambda name: None if name != 'accelerate' else 'found')
    change_config(folder, quantization_config={
        'quant_method': method, 'bits': 4, 'group_size': 128, 'load_in_4bit': True,
        'bnb_4bit_quant_type': 'nf4'})
    message = error_of(folder)
    assert message.endswith(f': {sys.executable} -m pip install {missing}') and method in message


def test_rejects_quantised_weights_that_the_library_does_not_read(folder):
    path = folder / 'model.safetensors'
    save_file({name: tensor.to(torch.float8_e4m3fn) if name.endswith('proj.weight') else tensor
               for name, tensor in load_file(path).items()}, path)
    change_config(folder, quantization_config={'quant_method': 'modelopt', 'quant_algo': 'FP8'})
    assert 'does not read modelopt-fp8 weights: set engine.name to native' in error_of(folder)


def test_rejects_scales_that_the_library_did_not_read(folder):
    change_config(folder, quantization_config={'quant_method': 'fp8'})
    model = checkpoint.open(str(folder))
    network._check_scales(model, ['model.layers.0.mlp.up_proj.input_scale'])
    with pytest.raises(EngineError, match=r'mlp\.up_proj\.weight_scale, so its fp8 weights'):
        network._check_scales(model, ['model.layers.0.mlp.up_proj.weight_scale'])


@pytest.mark.parametrize('method', ['fp8', 'mxfp4', 'gptq', 'bitnet'])
def test_names_accelerate_if_it_is_missing(folder, method, monkeypatch):
    monkeypatch.setattr(
        libraries, 'find_spec', lambda name: None if name == 'accelerate' else 'found')
    change_config(folder, quantization_config={'quant_method': method})
    assert error_of(folder).endswith(
        f'for {method} weights: {sys.executable} -m pip install accelerate') or method == 'gptq'


def test_rejects_missing_and_unknown_devices(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for name in ('cuda', 'cuda:0'):
        message = error_of(folder, device=name)
        assert 'set engine.device to cpu' in message and 'PyTorch for its JetPack' in message
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert 'this machine has 1 CUDA device' in error_of(folder, device='cuda:7')
    for name in ('gpu', 'cuda:', 'cuda:x', 'tpu', ''):
        assert 'expected auto, cpu, cuda or cuda:N' in error_of(folder, device=name)


def test_rejects_an_unsupported_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda which: (7, 5))
    monkeypatch.setattr(device, 'describe', lambda which: ('an old GPU', ''))
    with pytest.raises(EngineError, match='an old GPU does not support'):
        device.select(EngineConfig(device='cuda', dtype='bfloat16'))
    assert device.select(EngineConfig(device='cuda'))[1] == torch.float16
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda which: (8, 7))
    assert device.select(EngineConfig(device='cuda'))[1] == torch.bfloat16
    with pytest.raises(EngineError, match='engine.dtype'):
        device.select(EngineConfig(device='cpu', dtype='int8'))


def test_rejects_models_that_do_not_fit_in_memory(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(device, 'free_bytes', lambda which: 1000)
        assert 'not enough memory on cpu' in error_of(folder)

    def exhaust(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaModel, 'forward', exhaust)
        before = live_linears()
        message = error_of(folder)
        assert 'not enough memory on cpu' in message and 'are free' in message
        assert live_linears() == before
    build(folder).close()


def test_auto_selects_by_architecture(folder, tmp_path):
    messages = []
    engine = build(folder, messages.append, name='auto')
    assert engine.footprint.engine == 'native'
    config = transformers.AutoConfig.for_model('gpt2', **ARCHITECTURES['gpt2'])
    other = random_model.save_config(tmp_path / 'other', config, 0)
    engine = build(other, messages.append, name='auto')
    assert engine.footprint.engine == 'transformers'
    assert any('engine transformers, because' in text and 'gpt2' in text for text in messages)


def test_native_rejects_unsupported_architectures(tmp_path):
    config = transformers.AutoConfig.for_model('gpt2', **ARCHITECTURES['gpt2'])
    message = error_of(random_model.save_config(tmp_path, config, 0), name='native')
    assert 'gpt2' in message and 'transformers' in message


def test_reports_an_engine_that_is_not_installed(folder, no_transformers):
    assert 'pip install -U transformers' in error_of(folder)


def test_reports_that_exllamav2_is_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'exllamav2', None)
    monkeypatch.delitem(sys.modules, 'physai_decode.engines.exllamav2', raising=False)
    assert 'pip install exllamav2' in error_of(folder, name='exllamav2')


def test_rejects_an_unknown_engine(folder):
    assert 'expected one of auto, native' in error_of(folder, name='vllm')


def test_reports_a_pytorch_that_the_library_does_not_use(folder, monkeypatch):
    """It treats a pre-release, such as 2.5.0a0 for a Jetson, as older than the release."""
    # Of the engine in use: tests that hide the library may have imported it again.
    used = engines._load('transformers').TransformersEngine.__init__.__globals__['network']
    monkeypatch.setattr(used.transformers, 'is_torch_available', lambda: False)
    message = error_of(folder)
    assert f'considers PyTorch {torch.__version__} too old' in message
    assert message.endswith("'transformers<5.15'")


def test_reports_progress(folder):
    messages = []
    build(folder, messages.append).close()
    assert any('loading' in text for text in messages) and 'warming up' in messages


@on_gpu
@pytest.mark.parametrize('family', random_model.FAMILIES)
def test_captured_step_gives_the_same_tokens(family, tmp_path):
    folder = random_model.save(tmp_path, family, 0, eos_token_id=list(range(128)))
    captured, eager = (
        load(folder, EngineConfig(device='cuda', dtype='float32', cuda_graph=graph))
        for graph in (True, False))
    assert captured.engine.footprint.cuda_graph == 'captured'
    assert eager.engine.footprint.cuda_graph == 'off'
    for prompt in (list(range(3, 100)), list(range(3, 60)) + [7, 8, 9], [5]):
        sampling = SamplingConfig(max_new_tokens=60)
        assert decode(captured, prompt, sampling) == decode(eager, prompt, sampling)
    for check in CHECKS:
        check(captured)
        check(eager)
    steps = list(captured.stream([3, 4, 5], SamplingConfig(max_new_tokens=8)))
    assert all(step.device_s > 0 for step in steps)


@on_gpu
def test_close_frees_device_memory(folder):
    def memory_before_and_after_close():
        loop = load(folder, EngineConfig(device='cuda'))
        decode(loop, [3, 4, 5])
        before = torch.cuda.memory_allocated()
        loop.engine.close()
        return before, torch.cuda.memory_allocated()

    gc.collect()
    _, kept = memory_before_and_after_close()       # by the libraries, for the next engine
    for _ in range(3):
        before, after = memory_before_and_after_close()
        assert after == kept < before


@on_gpu
def test_names_a_model_that_can_not_be_captured(tmp_path):
    config = transformers.AutoConfig.for_model('mamba', **ARCHITECTURES['mamba'])
    folder = random_model.save_config(tmp_path, config, 0)
    assert 'mamba' in error_of(folder, device='cuda')
    assert len(decode(load(folder, EngineConfig(device='cuda', cuda_graph=False)), [3])) == 8
