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

"""The ExLlamaV2 engine over a stand-in for the library, without a GPU."""

from dataclasses import replace
from importlib import import_module
import sys
from types import SimpleNamespace

import engine_contract
from engine_contract import decode
from engine_contract import load
from json_file import editing
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import fake_exllamav2
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import EngineError
from physai_decode.engines import device as devices
import random_exl2
import random_gptq
from safetensors.torch import load_file
from safetensors.torch import save_file
from worker_rig import wait_for

MODULE = 'physai_decode.engines.exllamav2'
SHAPE = {'hidden_size': 256, 'intermediate_size': 384, 'num_attention_heads': 4}
CONFIG = EngineConfig(name='exllamav2', cpu_threads=1)


# A model whose answers to the contract's prompts do not change under NOISE. The order of sums in
# the library is estimated to change a logit by 4e-4 of the largest magnitude, which is enough to
# change the answers of other random models.
DECISIVE = {'seed': 67, 'sharpness': 16.0}
NOISE = 1e-3


def save(folder, seed=1, sharpness=1.0, **options):
    """
    Write a small GPTQ model, or an EXL2 one.

    :param sharpness: what the logits are multiplied by.
    :param options: of `random_gptq.save`, or ``exl2``.
    :returns: the folder, and the transformers library's network of its dense weights.
    """
    common = {'eos_token_id': list(range(128)), **SHAPE}
    if options.pop('exl2', False):
        state = random_exl2.save(folder, 'llama', seed, **common, **options)
    else:
        form = {'group_size': 64, 'act_order': True, **options}
        state = random_gptq.save(folder, 'llama', seed, **common, **form)
    state['lm_head.weight'] = state['lm_head.weight'] * sharpness
    path = folder / 'model.safetensors'
    save_file({**load_file(path), 'lm_head.weight': state['lm_head.weight']}, path,
              metadata={'format': 'pt'})
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    network.load_state_dict(state)
    return folder, network


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp('model'), **DECISIVE)


@pytest.fixture(scope='module')
def installed(saved):
    """Return the module of the engine with a stand-in for the library, and the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        library = fake_exllamav2.Library(saved[1])
        library.install(patch)
        for name in [name for name in sys.modules if name.startswith(MODULE)]:
            patch.delitem(sys.modules, name)
        patch.setattr(torch.cuda, 'set_device', lambda device: None)
        patch.setattr(torch.cuda, 'synchronize', lambda device: None)
        module = import_module(MODULE)
        checks = import_module(f'{MODULE}.checks')
        network = import_module(f'{MODULE}.network')
        library.graph_calls = network._GRAPH_CALLS
        patch.setattr(network, '_GRAPH_CALLS', 3)       # of each load
        library.choose_device = checks.device
        patch.setattr(checks, 'device', lambda config: torch.device('cpu', 0))
        patch.setattr(checks, 'CHUNK_TOKENS', 16)
        patch.setattr(module.ExLlamaV2Engine, 'chunk_tokens', (1, 16))
        backends = devices.attention_backends
        patch.setattr(
            devices, 'attention_backends', lambda device: backends(torch.device('cuda')))
        yield module, library
    for name in [name for name in sys.modules if name.startswith(MODULE)]:
        del sys.modules[name]


@pytest.fixture(scope='module')
def loop(installed, saved):
    loop = load(installed[0].ExLlamaV2Engine, saved[0], CONFIG)
    yield loop
    loop.engine.close()


@pytest.fixture
def fresh(installed, saved):
    """Return a new engine with an unused stand-in for the library, and the stand-in."""
    module, library = installed
    loop = load(module.ExLlamaV2Engine, saved[0], CONFIG)
    library.calls.clear()
    yield loop, library
    loop.engine.close()


@pytest.mark.parametrize('noise', [0.0, NOISE])
@pytest.mark.parametrize('check', engine_contract.CHECKS, ids=lambda check: check.__name__)
def test_contract(installed, loop, monkeypatch, check, noise):
    monkeypatch.setattr(installed[1], 'noise', noise)
    check(loop)


def test_answers_as_transformers_with_these_weights(loop, saved):
    prompt = engine_contract.prompt_of(loop, 40)
    expected = answer(saved[1], prompt, 12)
    assert decode(loop, prompt, SamplingConfig(max_new_tokens=12)) == expected


def answer(network, prompt, count):
    """Return the greedy answer of a transformers network."""
    with torch.inference_mode():
        return network.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0)[0, len(prompt):].tolist()


def below_the_best(network, prompt, ids):
    """
    Return how far the logits of an answer are below the network's best ones, at most.

    :returns: relative to the largest magnitude at that position; 0 for the network's own answer.
    """
    with torch.inference_mode():
        rows = network(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
    chosen = rows.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
    return ((rows.amax(1) - chosen) / rows.abs().amax(1)).max().item()


@pytest.mark.parametrize('layout', ['gptq', 'gptq_v2'])
def test_other_zero_points_lead_to_unlikely_tokens(tmp_path, layout):
    folder, network = save(tmp_path, group_size=32, layout=layout)
    prompt = list(range(3, 43))
    assert below_the_best(network, prompt, answer(network, prompt, 12)) == 0.0
    other = 'gptq' if layout == 'gptq_v2' else 'gptq_v2'
    stored = load_file(folder / 'model.safetensors')
    for name in [name for name in stored if name.endswith('.qweight')]:
        module = name.removesuffix('.qweight')
        parts = {end: stored[f'{module}.{end}']
                 for end in ('qweight', 'qzeros', 'scales', 'g_idx')}
        network.get_submodule(module).weight.data = random_gptq.dense(parts, other)
    ids = answer(network, prompt, 12)
    assert below_the_best(save(tmp_path, group_size=32, layout=layout)[1], prompt, ids) > 0.2


def test_feeds_a_prompt_in_chunks(fresh):
    loop, library = fresh
    stream = loop.stream(engine_contract.prompt_of(loop, 40), SamplingConfig())
    assert [next(stream).token_ids for _ in range(2)] == [(), ()]
    stream.close()
    assert library.calls == [(16, 0), (16, 16)]
    # The chunks before the cancel are not fed again.
    step = engine_contract.first_step(loop, engine_contract.prompt_of(loop, 40))
    assert step.cached_tokens == 32
    assert library.calls[2:] == [(8, 32)]


def test_runs_one_step_ahead(fresh):
    loop, library = fresh
    stream = loop.stream([5, 6, 7], SamplingConfig(max_new_tokens=40))
    for _ in range(4):
        next(stream)
    stream.close()
    assert library.calls == [(3, 0), (1, 3), (1, 4), (1, 5), (1, 6)]
    # Only yielded tokens count as cached, so the last one is fed again.
    assert engine_contract.first_step(loop, [5, 6, 7, 0]).cached_tokens == 3


def test_launches_no_unneeded_step(fresh):
    loop, library = fresh
    decode(loop, [5, 6, 7], SamplingConfig(max_new_tokens=9))
    assert library.calls == [(3, 0), *((1, place) for place in range(3, 11))]


def test_keeps_the_attention_of_other_libraries(fresh):
    loop, library = fresh
    assert torch.backends.cuda.cudnn_sdp_enabled()
    stream = loop.stream([5, 6, 7], SamplingConfig())     # the stand-in refuses cuDNN
    next(stream)
    assert library.calls and torch.backends.cuda.cudnn_sdp_enabled()
    stream.close()


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
@pytest.mark.parametrize('sampling', [
    SamplingConfig(), SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2)],
    ids=['greedy', 'sampled', 'all'])
def test_rejects_weights_that_are_not_numbers(fresh, sampling, value):
    """In one row of the head; after its repair, the engine works."""
    loop, library = fresh
    head = library.network.lm_head.weight
    expected, good = decode(loop, [5, 6, 7]), head.detach().clone()
    with torch.no_grad():
        try:
            head[7] = value
            for prompt in ([5, 6, 7], [8, 9]):
                with pytest.raises(EngineError, match='logits are not numbers .* in float16'):
                    decode(loop, prompt, sampling)
        finally:
            head.copy_(good)
    assert decode(loop, [5, 6, 7]) == expected


@pytest.mark.parametrize('heads', [1, 2, 8])    # of keys and values
@pytest.mark.parametrize('tokens', [1, 5])
def test_attention_of_a_step_copies_nothing(fresh, heads, tokens):
    loop, library = fresh
    attention = loop.engine.network.loaded.modules[1]
    queries = torch.randn(1, tokens, 8, 64)
    keys, values = torch.randn(2, 1, 20 + tokens, heads, 64)
    form = SimpleNamespace(block_diag_mask=None if tokens == 1 else torch.full(
        (tokens, 20 + tokens), float('-inf')).triu_(21))
    case = (1, tokens, queries, keys, values, form, loop.engine.network.loaded.config)
    expected = type(attention)._attn_torch(attention, *case)
    library.copies = 0
    torch.testing.assert_close(attention._attn_torch(*case), expected)
    assert library.copies == (0 if tokens == 1 else 2)


def test_footprint(installed, saved):
    module, library = installed
    loop = load(module.ExLlamaV2Engine, saved[0], EngineConfig(max_context=100, cuda_graph=False))
    footprint = loop.engine.footprint
    # A row of the embedding, packed weights without what only served to make them, norm, head.
    assert footprint.read_weight_bytes == 16 + (128 + 32 + 64) + 16 + 256
    assert footprint.checkpoint_weight_bytes == weight_bytes(saved[0])
    assert footprint.engine == 'exllamav2' and footprint.dtype == 'float16'
    assert footprint.quantization == 'gptq-int4-g64'
    assert (footprint.layers, footprint.kv_heads, footprint.head_dim) == (2, 1, 64)
    assert footprint.kv_element_bytes == 2 and footprint.max_context == 100
    assert footprint.cuda_graph == 'off' and footprint.vocab_size == 512
    assert footprint.details['attention'] == 'sdpa over query groups, without cuDNN'
    loop.engine.close()


def test_exl2(installed, tmp_path):
    module, library = installed
    folder, network = save(tmp_path, exl2=True)
    loop = load(module.ExLlamaV2Engine, folder, CONFIG)
    assert loop.engine.footprint.quantization == 'exl2-4.5bpw'
    assert loop.engine.footprint.checkpoint_weight_bytes == weight_bytes(folder)
    assert decode(loop, [3, 4, 5], SamplingConfig(max_new_tokens=4))
    loop.engine.close()


def weight_bytes(folder):
    """Count the bytes of a folder's safetensors files without their headers."""
    return sum(path.stat().st_size - 8 - int.from_bytes(path.open('rb').read(8), 'little')
               for path in folder.glob('*.safetensors'))


def test_warms_up_beyond_the_graphs_of_the_library(installed, saved, monkeypatch):
    module, library = installed
    monkeypatch.setattr(sys.modules[f'{MODULE}.network'], '_GRAPH_CALLS', library.graph_calls)
    library.calls.clear()
    load(module.ExLlamaV2Engine, saved[0], CONFIG).engine.close()
    assert sum(tokens == 1 for tokens, _ in library.calls) > 205


def test_rotary_base_of_newer_configs(installed, tmp_path):
    module, library = installed
    loop = load(module.ExLlamaV2Engine, save(tmp_path, rope_parameters={
        'rope_type': 'llama3', 'rope_theta': 500000.0, 'factor': 8.0, 'low_freq_factor': 1.0,
        'high_freq_factor': 4.0, 'original_max_position_embeddings': 64})[0], CONFIG)
    settings = loop.engine.network.loaded.config
    assert settings.rotary_embedding_base == 500000.0
    assert settings.alt_rope_method == 'llama3' and settings.l3_rope_factor == 8.0
    loop.engine.close()


@pytest.mark.parametrize('layout', ['gptq', 'gptq_v2'])
@pytest.mark.parametrize('fields', [{}, {'checkpoint_format': None}])
def test_layout_of_zero_points(installed, tmp_path, layout, fields):
    save(tmp_path, layout=layout)
    change(tmp_path, quantization={'format': layout, **fields})
    loop = load(installed[0].ExLlamaV2Engine, tmp_path, CONFIG)
    assert loop.engine.network.loaded.config.checkpoint_offset_qzeros == (layout == 'gptq_v2')
    loop.engine.close()


def change(folder, quantization=None, **fields):
    with editing(folder / 'config.json') as config:
        config.update(fields)
        config.pop('architectures', None)
        config['quantization_config'].update(quantization or {})


@pytest.mark.parametrize('form, changes, message', [
    ({}, {'model_type': 'gpt2'}, ('"gpt2"', 'llama', 'transformers')),
    ({}, {'quantization': {'quant_method': 'awq'}}, ('awq', 'auto')),
    ({}, {'quantization': {'bits': 8}}, ('8-bit', 'transformers')),
    ({}, {'quantization': {'bits': None}}, ('null-bit', 'transformers')),
    ({}, {'quantization': {'checkpoint_format': 'marlin'}}, ('marlin', 'transformers')),
    ({}, {'quantization': {'group_size': 96}}, ('not 96', 'transformers')),
    ({}, {'quantization': {'group_size': 128}}, ('.g_idx', 'inconsistent')),
    ({'symmetric': False}, {}, ('zero points of 0', 'native')),
    ({'symmetric': False, 'layout': 'gptq_v2'}, {}, ('zero points of 0', 'native')),
    ({}, {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, ('yarn', 'native')),
    ({}, {'model_type': 'mistral', 'sliding_window': 48}, ('48', 'engine.max_context', 'native')),
    ({}, {'quantization': {'group_size': None}}, ('config.json', 'damaged')),
    ({}, {'model_type': 'mistral', 'sliding_window': '48'}, ('config.json', 'damaged')),
    ({}, {'physai_decode_random_weights': {}}, ('--write-checkpoint',))])
def test_rejections(installed, tmp_path, form, changes, message):
    save(tmp_path, **form)
    change(tmp_path, **changes)
    with pytest.raises(EngineError) as error:
        load(installed[0].ExLlamaV2Engine, tmp_path, CONFIG)
    for part in message:
        assert part in str(error.value)


def test_default_window(installed, tmp_path):
    """The default is that of transformers."""
    save(tmp_path)
    change(tmp_path, model_type='mistral', max_position_embeddings=4097)
    with pytest.raises(EngineError, match='window of 4096'):
        load(installed[0].ExLlamaV2Engine, tmp_path, replace(CONFIG, max_context=8192))
    change(tmp_path, sliding_window=None)
    load(installed[0].ExLlamaV2Engine, tmp_path, replace(CONFIG, max_context=8192)).engine.close()


def test_window_as_long_as_the_context(installed, tmp_path):
    change(save(tmp_path)[0], model_type='mistral', sliding_window=256)
    load(installed[0].ExLlamaV2Engine, tmp_path, CONFIG).engine.close()


def test_window_without_windowed_layers(installed, tmp_path):
    """As in the configs of Qwen2, whose first 28 layers have no window by default."""
    change(save(tmp_path)[0], model_type='qwen2', sliding_window=48, use_sliding_window=True)
    load(installed[0].ExLlamaV2Engine, tmp_path, CONFIG).engine.close()


@pytest.mark.parametrize('config, message', [
    ({'dtype': 'bfloat16', 'device': 'cpu'}, ('bfloat16', 'float16 or auto')),
    ({'device': 'cpu'}, ('NVIDIA GPU', 'native'))])
def test_rejects_settings(installed, config, message):
    with pytest.raises(EngineError) as error:
        installed[1].choose_device(EngineConfig(**config))
    for part in message:
        assert part in str(error.value)


@pytest.mark.parametrize('missing, message', [
    ('nvcc', 'CUDA toolkit'), ('c++', 'apt install g++'), ('ninja', 'pip install ninja'),
    ('Python.h', 'python3-dev')])
def test_names_what_compiling_needs(installed, tmp_path, monkeypatch, missing, message):
    module = sys.modules[f'{MODULE}.library']
    home = tmp_path / 'cuda'
    for path in (home / 'bin' / 'nvcc', tmp_path / 'include' / 'Python.h'):
        path.parent.mkdir(parents=True)
        if path.name != missing:
            path.touch()
    monkeypatch.setattr(module.cpp_extension, 'CUDA_HOME', str(home))
    monkeypatch.setattr(module.cpp_extension, 'is_ninja_available', lambda: missing != 'ninja')
    monkeypatch.setattr(module.shutil, 'which', lambda name: None if name == missing else name)
    monkeypatch.setattr(module.sysconfig, 'get_path', lambda name: str(tmp_path / 'include'))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(EngineError) as error:
        module._check_tools()
    assert missing in str(error.value) and message in str(error.value)
    assert str(error.value).count('install') + str(error.value).count('toolkit') == 1
    missing = ''
    (home / 'bin' / 'nvcc').touch()
    (tmp_path / 'include' / 'Python.h').touch()
    module._check_tools()


def importing(module, monkeypatch, act):
    """Run a function when the library is imported."""
    monkeypatch.setattr(module, 'import_module', lambda name: act())


@pytest.mark.parametrize('locked', [False, True])
def test_logs_that_it_compiles(installed, tmp_path, monkeypatch, locked):
    module = sys.modules[f'{MODULE}.library']
    lines = []
    if locked:
        (tmp_path / 'lock').touch()
    monkeypatch.delitem(sys.modules, 'exllamav2_ext')
    monkeypatch.setattr(module, '_check_tools', lambda: None)
    monkeypatch.setattr(
        module.cpp_extension, '_get_build_directory', lambda name, verbose: str(tmp_path))
    monkeypatch.setattr(module, '_TICK_S', 0.01)
    importing(module, monkeypatch, lambda: wait_for(lambda: len(lines) > 1))
    module.library(lines.append)
    if locked:
        assert lines[0].startswith('waiting for another process')
        assert f'delete {tmp_path}/lock), 0 s so far' in lines[0]
    else:
        assert lines[0] == "compiling ExLlamaV2's kernels, 0 s so far"


def test_progress_that_raises_ends_the_load(installed, monkeypatch):
    module = sys.modules[f'{MODULE}.library']
    messages = []

    def progress(text):
        messages.append(text)
        raise InterruptedError('the process ends')

    monkeypatch.setattr(module, '_TICK_S', 0.01)
    importing(module, monkeypatch, lambda: wait_for(lambda: messages))
    with pytest.raises(InterruptedError):
        module.library(progress)
    assert len(messages) == 1


def raising(error):
    def act():
        raise error
    return act


@pytest.mark.parametrize('error, message', [
    (RuntimeError("Error building extension 'exllamav2_ext': [1/48] c++ -c\n"
                  'x.h:10:10: fatal error: cusparse.h: No such file\n'), 'cusparse.h: No such'),
    (OSError('CUDA_HOME environment variable is not set'), 'CUDA_HOME'),
    (ModuleNotFoundError("No module named 'rich'", name='rich'), 'pip install rich')])
def test_reports_a_library_that_does_not_load(installed, monkeypatch, error, message):
    module = sys.modules[f'{MODULE}.library']
    importing(module, monkeypatch, raising(error))
    with pytest.raises(EngineError) as raised:
        module.library(lambda text: None)
    assert message in str(raised.value) and 'engine.name' in str(raised.value)


@pytest.mark.parametrize('error, message', [
    (AssertionError('rope_scaling key has both'), 'rope_scaling key has both'),
    (KeyError('architectures'), 'architectures'),
    (RuntimeError('CUDA out of memory'), 'not enough memory')])
def test_reports_a_model_that_does_not_load(installed, saved, monkeypatch, error, message):
    module, library = installed
    unloaded = library.unloaded
    monkeypatch.setattr(library, 'fail', error)
    with pytest.raises(EngineError) as raised:
        load(module.ExLlamaV2Engine, saved[0], CONFIG)
    assert message in str(raised.value)
    assert library.unloaded == unloaded + 1
