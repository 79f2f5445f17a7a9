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

"""The node with the embedded model: it rejects a damaged copy and answers with an intact one."""

import json
from pathlib import Path
import re
import shutil

from node_rig import new_rig
import physai_decode
from physai_decode.host import load
import pytest

MODEL = Path(physai_decode.__file__).parent / 'models' / 'tiny_planner'


def truncate(folder):
    """Truncate the weights file to half its size."""
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def delete(pattern):
    """Return a function that deletes the files of a folder that match a pattern."""
    def damage(folder):
        for path in folder.glob(pattern):
            path.unlink()
    return damage


@pytest.fixture(scope='module')
def rig():
    """Return the rig of an unconfigured node."""
    with new_rig(load=load, **{
            'engine.cpu_threads': 1, 'roofline.peak_bandwidth_gb_s': 10.0}) as rig:
        yield rig


@pytest.mark.parametrize(('damage', 'words'), [
    (shutil.rmtree, 'no such folder'), (delete('*'), 'is empty'), (truncate, 'truncated'),
    (delete('model.safetensors'), 'no weights'),
    (delete('config.json'), 'config.json is missing'), (delete('tokenizer*'), 'no tokenizer')],
    ids=['no folder', 'empty', 'truncated', 'no weights', 'no config', 'no tokenizer'])
def test_rejects_a_damaged_model(rig, tmp_path, damage, words):
    """The node stays unconfigured, and /diagnostics has the reason and the folder."""
    folder = tmp_path / 'model'
    shutil.copytree(MODEL, folder)
    damage(folder)
    assert rig.set(model__path=str(folder)) == (True, '')
    assert not rig.change('configure')
    assert rig.state() == 'unconfigured'
    engine = rig.diagnostics('decode: engine')
    assert engine['state'] == 'failed'
    assert words in engine['message']
    assert str(folder) in engine['message']


@pytest.mark.parametrize(('name', 'value', 'words'), [
    ('engine__device', 'cuda:99', 'cuda:99'), ('engine__name', 'exllamav2', 'exllamav2')])
def test_rejects_a_device_or_engine_that_is_missing(rig, name, value, words):
    """The message names it, and says what to do."""
    assert rig.set(model__path='builtin:tiny_planner') == (True, '')
    assert rig.set(**{name: value}) == (True, '')
    assert not rig.change('configure')
    assert words in rig.diagnostics('decode: engine')['message']
    assert rig.set(**{name: 'auto'}) == (True, '')


def test_embedded_model_answers(rig):
    """It answers although earlier loads failed, and its figures include r_floor."""
    assert rig.set(model__path='builtin:tiny_planner') == (True, '')
    assert rig.change('configure', 'activate')
    info = rig.values(rig.received['model_info'][-1].status[0])
    assert info['cpu_threads'] == '1'
    begin = len(rig.received['tokens'])
    stats = rig.ask('please bring the red cup to the kitchen')
    rig.wait(lambda: rig.received['response']
             and len(rig.received['tokens']) - begin == int(stats['output_tokens']))
    answer = rig.received['response'][-1].data
    assert answer == ''.join(message.data for message in rig.received['tokens'][begin:])
    assert isinstance(json.loads(answer), list)
    assert stats['finish_reason'] == 'stop'
    assert 0 < float(stats['r_floor_p50']) < 10
    assert rig.ask('please bring the red cup to the office')['cached_tokens'] not in ('0', 'n/a')
    assert rig.change('deactivate', 'cleanup')


def test_constraint_parameters_apply_to_prompts(rig, tmp_path):
    """A schema that cannot be enforced fails the load; another one constrains each answer."""
    file = tmp_path / 'schema.json'
    file.write_text('{"uniqueItems": true}')
    assert rig.set(constraint__schema_file=str(file)) == (True, '')
    assert not rig.change('configure')
    engine = rig.diagnostics('decode: engine')['message']
    assert 'constraint.schema_file' in engine and 'uniqueItems' in engine
    file.write_text('{"const": {"answer": [42, "x"]}}')
    assert rig.change('configure', 'activate')
    count = len(rig.received['response'])
    assert rig.ask('please bring the red cup to the kitchen')['finish_reason'] == 'stop'
    rig.wait(lambda: len(rig.received['response']) > count)
    assert json.loads(rig.received['response'][-1].data) == {'answer': [42, 'x']}
    rig.wait(lambda: len(rig.received['item']) == 2)
    items = [json.loads(message.data) for message in rig.received['item']]
    assert [(item['path'], item['index'], item['value']) for item in items] == [
        ('/answer', 0, 42), ('/answer', 1, 'x')]
    figures = rig.requests()[-1]
    assert figures['items'] == '2'
    assert float(figures['first_item_ms']) == pytest.approx(items[0]['t_ms'], rel=1e-3)
    assert rig.change('deactivate', 'cleanup')
    assert rig.set(constraint__schema_file='') == (True, '')


def test_measures_the_gap_of_the_embedded_model(rig):
    """It compares native with transformers, and keeps the cache and the counters."""
    def answer():
        count = len(rig.received['response'])
        stats = rig.ask('please bring the red cup to the kitchen')
        rig.wait(lambda: len(rig.received['response']) > count)
        return rig.received['response'][-1].data, stats['cached_tokens'], stats['output_tokens']

    def counts():
        engine = rig.diagnostics('decode: engine')
        return engine['state'], engine['requests'], engine['tokens'], engine['refusals']

    assert rig.change('configure', 'activate')
    answer()
    expected = answer()
    before = counts()
    result = rig.trigger('measure_gap')
    assert result.success, result.message
    assert re.match(r'native [\d.]+ ms, transformers [\d.]+ ms a token: native is [\d.]+ times as '
                    r'fast; floor [\d.]+ ms \(r_floor [\d.]+ and [\d.]+\); float32 on cpu, '
                    r'context \d+ tokens, medians of 30 steps after 5; what holds native back: ',
                    result.message)
    assert counts() == before
    assert answer() == expected
    assert rig.change('deactivate', 'cleanup')
