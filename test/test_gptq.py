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

"""GPTQ checkpoints in the native engine: a library's own, random ones of every form, bad ones."""

import json
from pathlib import Path
import shutil
import struct
import sys

from json_file import editing
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

from engine_contract import load
import evaluate_tiny_planner
from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engine import EngineError
from physai_decode.engines import build
from physai_decode.engines.native import NativeEngine
import random_gptq
from safetensors.torch import load_file
from safetensors.torch import save_file

DATA = ROOT / 'test' / 'data'
CPU = EngineConfig(device='cpu', dtype='float32', cpu_threads=1)
RELATIVE = 1e-5
PROJECTIONS = 28


def library_logits(folder, state, ids):
    """Return the logits [tokens, vocab] of the library's own model with these float32 weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    lost, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and set(lost) <= {'lm_head.weight'}
    model.tie_weights()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def assert_close(got, expected, relative=RELATIVE):
    assert (got - expected).norm() / expected.norm() < relative     # a NaN does not pass


@pytest.fixture(scope='module', params=['tiny_planner_gptq', 'tiny_planner_gptq_v2'])
def folder(request):
    return DATA / request.param


@pytest.fixture(scope='module')
def engine(folder):
    engine = load(NativeEngine, folder, CPU).engine
    yield engine
    engine.close()


@pytest.fixture(scope='module')
def prompts():
    """Return prompts and expected answers, as ids, of held-out commands."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(evaluate_tiny_planner.FOLDER)
    _, chats, answers = next(evaluate_tiny_planner.held_out_sets(seed=0, count=40))
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
             for chat in chats]
    return [(tokenizer(text)['input_ids'],
             tokenizer(answer)['input_ids'] + [tokenizer.eos_token_id])
            for text, answer in zip(texts, answers, strict=True)]


def test_checkpoint_of_the_library_has_the_logits_of_the_formula(folder, engine, prompts):
    stored = load_file(folder / 'model.safetensors')
    layout = json.loads((folder / 'config.json').read_text())[
        'quantization_config']['checkpoint_format']
    state = {}
    for name in stored:
        module, _, end = name.rpartition('.')
        if end == 'weight':
            state[name] = stored[name].float()
        elif end == 'qweight':
            parts = {part: stored[f'{module}.{part}']
                     for part in ('qweight', 'qzeros', 'scales', 'g_idx')}
            state[f'{module}.weight'] = random_gptq.dense(parts, layout)
    assert sum(name.endswith('qweight') for name in stored) == PROJECTIONS
    ids = [token for prompt, answer in prompts[:3] for token in prompt + answer]
    assert_close(engine.prefill_logits(ids), library_logits(folder, state, ids))


def test_checkpoint_of_the_library_answers_held_out_commands(engine, prompts):
    right = 0
    for prompt, answer in prompts:
        # The likeliest token after each token of the right answer: what greedy decoding says.
        likeliest = engine.prefill_logits(prompt + answer).argmax(-1)
        right += likeliest[len(prompt) - 1:-1].tolist() == answer
    print(f'{right} of {len(prompts)} held-out commands')
    assert right >= 38      # observed: 40 of both checkpoints


def test_checkpoint_of_the_library_streams(engine, prompts):
    prompt, answer = min(prompts, key=lambda pair: len(pair[1]))
    steps = DecodeLoop(engine).stream(prompt, SamplingConfig(max_new_tokens=len(answer)))
    assert [token for step in steps for token in step.token_ids] == answer


def test_footprint(folder, engine):
    model = inspect(folder)
    group_size = model.quantized.group_size
    assert engine.footprint.quantization == f'gptq-int4-g{group_size}'
    assert engine.footprint.checkpoint_weight_bytes == model.weight_bytes
    assert 'dense_fallbacks' not in engine.footprint.details


def test_auto_picks_native(folder):
    engine = build(inspect(folder), EngineConfig(device='cpu', cpu_threads=1))
    assert engine.footprint.engine == 'native'
    engine.close()


IDS = [(3 + 7 * index) % 512 for index in range(40)]


def check_answer(engine, folder, state):
    """Compare an answer with the library's model of ``state``: steps have own arithmetic."""
    steps = DecodeLoop(engine).stream(IDS, SamplingConfig(max_new_tokens=5))
    answer = [token for step in steps for token in step.token_ids]
    expected = library_logits(folder, state, IDS + answer)[len(IDS) - 1:-1]
    assert answer == expected.argmax(-1).tolist()
    engine.close()


def check_random(folder, family, group_size, **form):
    form = {'hidden_size': 256, 'intermediate_size': 384, 'num_attention_heads': 4, **form}
    state = random_gptq.save(folder, family, 1, group_size, **form)
    engine = load(NativeEngine, folder, CPU).engine
    assert_close(engine.prefill_logits(IDS), library_logits(folder, state, IDS))
    check_answer(engine, folder, state)
    return engine


def test_bias_of_only_one_fused_projection(tmp_path):
    random_gptq.save(tmp_path, 'llama', 1, 64)
    stored = load_file(tmp_path / 'model.safetensors')
    plain = load(NativeEngine, tmp_path, CPU).engine.prefill_logits(IDS)
    name = 'model.layers.0.self_attn.k_proj.bias'
    rows = stored['model.layers.0.self_attn.k_proj.scales'].shape[1]
    for value, same in ((0.0, True), (0.5, False)):
        stored[name] = torch.full((rows,), value, dtype=torch.float16)
        save_file(stored, tmp_path / 'model.safetensors', {'format': 'pt'})
        logits = load(NativeEngine, tmp_path, CPU).engine.prefill_logits(IDS)
        assert torch.equal(logits, plain) == same


@pytest.mark.parametrize('layout', ['gptq', 'gptq_v2'])
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('act_order', [False, True])
@pytest.mark.parametrize('group_size', [32, 64, 128, -1])
def test_each_layout(tmp_path, group_size, act_order, symmetric, layout):
    engine = check_random(tmp_path, 'llama', group_size, act_order=act_order,
                          symmetric=symmetric, layout=layout)
    assert 'dense_fallbacks' not in engine.footprint.details


@pytest.mark.parametrize('group_size', [96, 160, 192, 256])
def test_group_sizes_that_are_split_for_the_kernels(tmp_path, group_size):
    check_random(tmp_path, 'llama', group_size, act_order=True, symmetric=False)


@pytest.mark.parametrize('family', ['llama_biases', 'mistral', 'qwen2', 'qwen2_tied', 'qwen3'])
def test_each_family(tmp_path, family):
    check_random(tmp_path, family, 64, act_order=True, symmetric=False)


def test_quantised_head(tmp_path):
    check_random(tmp_path, 'llama', 128, head=True)


def test_projections_with_different_column_orders_are_not_fused(tmp_path):
    engine = check_random(tmp_path, 'llama', 64, act_order=True, one_order=False)
    assert engine.footprint.details['dense_fallbacks'] == '4'   # QKV, gate and up, of 2 layers


def test_rows_that_do_not_fill_tiles(tmp_path):
    """The columns of `down` do not fill groups either."""
    engine = check_random(tmp_path, 'llama', 64, symmetric=False, intermediate_size=392)
    assert engine.footprint.details['dense_fallbacks'] == '2'   # gate and up, of 2 layers


def test_rules_for_single_modules(tmp_path):
    """A rule of GPTQModel sets another group size for a module, or leaves it dense."""
    state = random_gptq.save(tmp_path, 'llama', 2, 64)
    tensors = load_file(tmp_path / 'model.safetensors')
    other, dense = random_gptq.tensors(5, 128, 256, 32)
    for end, tensor in other.items():
        tensors[f'{PROJECTION}.{end}'] = tensor
    state[f'{PROJECTION}.weight'] = dense
    name = 'model.layers.0.self_attn.o_proj'
    for end in other:
        del tensors[f'{name}.{end}']
    tensors[f'{name}.weight'] = state[f'{name}.weight']
    save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
    change(tmp_path, dynamic={'-:.*0.self_attn.o_proj': {},
                              r'.*1\.mlp\.down.*': {'group_size': 32}})
    assert_close(load(NativeEngine, tmp_path, CPU).engine.prefill_logits(IDS),
                 library_logits(tmp_path, state, IDS))


def test_without_g_idx(tmp_path):
    state = random_gptq.save(tmp_path, 'llama', 2, 64)
    change(tmp_path, drop='g_idx')
    assert_close(load(NativeEngine, tmp_path, CPU).engine.prefill_logits(IDS),
                 library_logits(tmp_path, state, IDS))


PROJECTION = 'model.layers.1.mlp.down_proj'


def change(folder, drop='', replace=None, **quantization):
    """Change a written checkpoint: tensors of one projection (drop: of all), its config."""
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    if drop:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(drop)}
    for name, make in (replace or {}).items():
        tensors[f'{PROJECTION}.{name}'] = make(tensors[f'{PROJECTION}.{name}'])
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path,
              metadata={'format': 'pt'})
    with editing(folder / 'config.json') as config:
        config['quantization_config'].update(quantization)


@pytest.mark.parametrize('changes, message', [
    ({'bits': 3}, ('3 bits', 'transformers')),
    ({'bits': 8}, ('q_proj.qweight', '[16, ', '[32, ')),
    ({'bits': '4'}, ('"4" bits', 'runs 4 and 8', 'transformers')),
    ({'checkpoint_format': 'marlin'}, ('"marlin"', 'transformers')),
    ({'group_size': 48}, ('groups of 48', 'multiples of 32', 'transformers')),
    *(({'group_size': size}, ('config.json', f'group_size is {json.dumps(size)},', 'again'))
      for size in (None, '32', 0, -32, 64.5)),
    ({'quant_method': 'exl2'}, ('exl2', 'exllamav2')),
    ({'quant_method': None}, ('unknown checkpoints', 'transformers')),
    ({'dynamic': {'-:.*head': {}, '+:.*down.*': {'bits': 3}}}, ('3 bits', 'transformers')),
    ({'dynamic': {'+:.*down.*': 3}}, ('quantization_config', 'damaged')),
    ({'drop': '0.self_attn.q_proj.qweight'}, ('q_proj.weight', 'no tensor')),
    ({'drop': '0.self_attn.k_proj.qweight'}, ('k_proj.weight', 'no tensor')),
    ({'group_size': 32}, (PROJECTION.replace('1.mlp.down', '0.self_attn.q'), '[2, ', '[4, ')),
    ({'replace': {'g_idx': lambda tensor: tensor * 0}}, (PROJECTION, 'g_idx', 'groups of 64')),
    ({'replace': {'g_idx': lambda tensor: tensor + 1}}, (PROJECTION, 'g_idx', 'groups of 64')),
    ({'replace': {'qzeros': lambda tensor: None}}, (f'{PROJECTION}.qzeros', 'no tensor')),
    ({'replace': {'scales': lambda tensor: None}}, (f'{PROJECTION}.scales', 'no tensor')),
    ({'replace': {'qweight': lambda tensor: tensor[:-1]}}, (f'{PROJECTION}.qweight', '[31, 128]')),
    ({'replace': {'qzeros': lambda tensor: tensor[:, 1:].contiguous()}},
     (f'{PROJECTION}.qzeros', '[4, 15]')),
    ({'replace': {'g_idx': lambda tensor: tensor[:-1]}}, (f'{PROJECTION}.g_idx', '[255]'))])
def test_rejects_damaged_or_unsupported_checkpoints(tmp_path, changes, message):
    random_gptq.save(tmp_path, 'llama', 2, 64)
    change(tmp_path, **changes)
    with pytest.raises(EngineError) as error:
        load(NativeEngine, tmp_path, CPU)
    for part in message:
        assert part in str(error.value)


def test_rejects_a_config_without_quantization_config(tmp_path):
    """Older writers put the settings into a file of their own."""
    random_gptq.save(tmp_path, 'llama', 2, 64)
    change(tmp_path, dynamic={'-:.*nothing': {}})
    load(NativeEngine, tmp_path, CPU).engine.close()
    with editing(tmp_path / 'config.json') as config:
        del config['quantization_config']
    with pytest.raises(EngineError, match='quantised, but config.json has no quantization_conf'):
        load(NativeEngine, tmp_path, CPU)


def test_rejects_an_unknown_type(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'model.safetensors'
    content = path.read_bytes()
    end = 8 + struct.unpack('<Q', content[:8])[0]
    header = json.loads(content[8:end])
    header['model.norm.weight']['dtype'] = 'F17'
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + content[end:])
    with pytest.raises(EngineError, match=r'model\.safetensors has .* type F17.*again'):
        load(NativeEngine, tmp_path, CPU)


def test_rejects_an_incomplete_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(EngineError, match=r'truncated.*again'):
        load(NativeEngine, tmp_path, CPU)
