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

"""Which engine `auto` picks, and what the load reports."""

from dataclasses import replace
import shutil

from json_file import editing
from physai_decode import engines
from physai_decode.checkpoint import locate
from physai_decode.config import ChatConfig
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import ModelConfig
from physai_decode.config import RooflineConfig
from physai_decode.engine import EngineError
from physai_decode.engines import libraries
from physai_decode.host import load
import pytest
import random_model

CPU = EngineConfig(device='cpu', cpu_threads=1)
GPTQ = {'quant_method': 'gptq', 'bits': 4, 'group_size': 128}


@pytest.fixture
def model(tmp_path):
    """Return a small model of a family that native runs."""
    from physai_decode.checkpoint import inspect

    return inspect(random_model.save(tmp_path, 'llama', 0))


def chosen(model, monkeypatch, installed=(), **changes):
    """Choose for a folder with changes to its config, with these libraries installed."""
    monkeypatch.setattr(libraries, 'find_spec', lambda name: name in installed or None)
    return engines.choose(replace(model, config={**model.config, **changes}), CPU)


def test_auto_picks_native_if_it_can_run_the_model(model, monkeypatch):
    everything = ('gptqmodel', 'optimum', 'accelerate')
    assert chosen(model, monkeypatch) == (
        'native', 'it supports llama with unquantised weights')
    # Even if GPTQModel is installed, which transformers calls on a CPU.
    assert chosen(model, monkeypatch, everything, quantization_config=GPTQ).name == 'native'


@pytest.mark.parametrize('quantization', [
    {'quant_method': 'bitsandbytes', 'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'},
    {'quant_method': 'modelopt', 'quant_algo': 'NVFP4'}])
@pytest.mark.parametrize('installed', [(), ('bitsandbytes', 'accelerate')])
def test_auto_picks_native_for_four_bits(model, monkeypatch, quantization, installed):
    found = chosen(model, monkeypatch, installed, quantization_config=quantization)
    assert found.name == 'native'
    assert found.reason.endswith('4 weights')


@pytest.mark.parametrize(('changes', 'name', 'word'), [
    ({'model_type': 'gemma2'}, 'transformers', 'gemma2'),
    ({'hidden_act': 'gelu'}, 'transformers', 'gelu'),
    ({'quantization_config': {**GPTQ, 'bits': 3}}, 'transformers', '3 bits'),
    ({'quantization_config': {'quant_method': 'awq', 'bits': 4, 'version': 'gemv'}},
     'transformers', 'gemv'),
    ({'quantization_config': {'quant_method': 'awq', 'bits': 4, 'zero_point': False}},
     'transformers', 'zero points'),
    ({'quantization_config': {'quant_method': 'exl2', 'bits': 4.0}}, 'exllamav2', 'exl2')])
def test_auto_picks_another_engine_for_unsupported_models(model, monkeypatch, changes, name, word):
    found = chosen(model, monkeypatch, **changes)
    assert found.name == name
    assert word in found.reason


def test_engine_name_takes_precedence(model):
    assert engines.choose(model, replace(CPU, name='transformers')) == (
        'transformers', 'engine.name is set to it')
    with pytest.raises(EngineError, match="engine.name is 'fast': expected one of auto, native"):
        engines.choose(model, replace(CPU, name='fast'))


def settings(**changes):
    return replace(DecodeConfig(
        model=ModelConfig(path='builtin:tiny_planner'), engine=CPU,
        roofline=RooflineConfig(peak_bandwidth_gb_s=10.0)), **changes)


@pytest.mark.parametrize(('template', 'shown', 'form'), [
    ('auto', 'default', 'none: the chat template omits them'),
    ('off', 'off', 'none: no chat template presents them to the model')])
def test_load_reports_its_decisions(template, shown, form):
    said = []
    loaded = load(settings(chat=ChatConfig(template=template)), said.append)
    assert loaded.facts == {
        'engine_reason': 'it supports llama with unquantised weights', 'chat_template': shown,
        'end_tokens': '<|im_end|>', 'checkpoint_sampling': 'none', 'tool_form': form,
        'thought_markers': 'none', 'config_notes': 'none'}
    assert any('end_tokens: <|im_end|>' in line for line in said)
    loaded.engine.close()
    loaded.text.close()


def test_end_token_that_only_the_template_has(tmp_path):
    """With those of the config alone, the model would continue with a turn of the user."""
    shutil.copytree(locate(ModelConfig.path), tmp_path, dirs_exist_ok=True)
    for name, change in (('config.json', {'eos_token_id': 0}),
                         ('generation_config.json', {'eos_token_id': 0}),
                         ('tokenizer_config.json', {'eos_token': '<|endoftext|>'})):
        with editing(tmp_path / name) as content:
            content.update(change)
    loaded = load(settings(model=ModelConfig(path=str(tmp_path))), lambda text: None)
    assert loaded.facts['end_tokens'] == '<|endoftext|> <|im_end|>'
    assert loaded.engine.footprint.eos_token_ids == (0, 2)
    loaded.engine.close()
    loaded.text.close()


def test_reports_an_end_token_that_is_plain_text(tmp_path):
    shutil.copytree(locate(ModelConfig.path), tmp_path, dirs_exist_ok=True)
    with editing(tmp_path / 'config.json') as config:
        config['eos_token_id'] = [2, 70]
    said = []
    loaded = load(settings(model=ModelConfig(path=str(tmp_path))), said.append)
    assert loaded.engine.footprint.eos_token_ids == (2,)
    assert any(line.startswith('ignoring 70 in eos_token_id') for line in said)
    loaded.engine.close()
    loaded.text.close()
