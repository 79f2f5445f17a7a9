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

"""`checkpoint.inspect` and `checkpoint.locate`: valid model folders, and the errors for others."""

import errno
import json
import os
import struct
import sys

import huggingface_hub
from physai_decode import checkpoint
from physai_decode.engine import EngineError
import pytest
from safetensors.torch import save_file
import torch

CONFIG = {'model_type': 'llama', 'max_position_embeddings': 64, 'eos_token_id': 2}
TENSORS = {'a.weight': ('F32', (2, 3)), 'b.weight': ('BF16', (4,)), 'c.qweight': ('I32', ())}
SIZES = {'F32': 4, 'BF16': 2, 'I32': 4}


def write_safetensors(path, tensors):
    """Write tensors of zeros; `tensors` maps names to (dtype, shape)."""
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype]
        for length in shape:
            size *= length
        header[name] = {
            'dtype': dtype, 'shape': list(shape), 'data_offsets': [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + bytes(offset))


def write_json(path, value):
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    """Write a valid model folder."""
    write_json(tmp_path / 'config.json', CONFIG)
    write_safetensors(tmp_path / 'model.safetensors', TENSORS)
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    """Write a valid model folder with two weight files."""
    write_json(tmp_path / 'config.json', CONFIG)
    names = ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')
    write_safetensors(tmp_path / names[0], {'a.weight': ('F32', (2, 3))})
    write_safetensors(tmp_path / names[1], {'b.weight': ('BF16', (4,))})
    write_json(tmp_path / 'model.safetensors.index.json', {
        'weight_map': {'a.weight': names[0], 'b.weight': names[1]}})
    return tmp_path


def error_of(folder):
    """Return the message of the error that `inspect` raises."""
    with pytest.raises(EngineError) as caught:
        checkpoint.inspect(folder)
    return str(caught.value)


def test_inspects_a_folder(folder):
    model = checkpoint.inspect(folder)
    assert model.model_type == 'llama'
    assert model.context_limit == 64
    assert model.eos_token_ids == (2,)
    assert model.quantization == 'none'
    assert model.weight_bytes == 24 + 8 + 4
    entry = model.tensors['b.weight']
    assert (entry.dtype, entry.shape, entry.bytes) == ('BF16', (4,), 8)
    assert entry.start == model.tensors['a.weight'].stop
    assert model.tensors['c.qweight'].stop == (folder / 'model.safetensors').stat().st_size


def test_entries_give_the_place_of_each_tensor(tmp_path):
    write_json(tmp_path / 'config.json', CONFIG)
    values = {'x': torch.arange(6.0).view(2, 3), 'y': torch.arange(5, dtype=torch.int32)}
    save_file(values, tmp_path / 'model.safetensors')
    for name, entry in checkpoint.inspect(tmp_path).tensors.items():
        stored = entry.path.read_bytes()[entry.start:entry.stop]
        assert stored == values[name].numpy().tobytes()
        assert entry.shape == tuple(values[name].shape)


def test_inspects_shards(shards):
    model = checkpoint.inspect(shards)
    assert set(model.tensors) == {'a.weight', 'b.weight'}
    assert model.tensors['b.weight'].path.name == 'model-00002-of-00002.safetensors'


def test_rejects_a_missing_folder(tmp_path):
    assert 'no such folder' in error_of(tmp_path / 'missing')


def test_rejects_an_empty_folder(tmp_path):
    assert 'is empty' in error_of(tmp_path)


def test_rejects_a_missing_config(folder):
    (folder / 'config.json').unlink()
    assert 'config.json is missing' in error_of(folder)


@pytest.mark.parametrize('text', ['{"model_type": ', '[]', ''])
def test_rejects_a_config_that_is_not_an_object(folder, text):
    (folder / 'config.json').write_text(text)
    assert 'config.json' in error_of(folder)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('weights', ['adapter_model.safetensors', 'adapter_model.bin', None])
def test_rejects_an_adapter(folder, whole, weights):
    """With or without a config.json."""
    write_json(folder / 'adapter_config.json', {'base_model_name_or_path': 'org/base'})
    checkpoint.inspect(folder)          # a merged model, whose adapter was left in the folder
    (folder / 'model.safetensors').unlink()
    if weights:
        write_safetensors(folder / weights, TENSORS)
    if not whole:
        (folder / 'config.json').unlink()
    message = error_of(folder)
    assert f'{folder} has an adapter' in message and 'merge it into org/base' in message
    assert 'model.path' in message


def test_rejects_a_config_without_model_type(folder):
    write_json(folder / 'config.json', {'name': 'something'})
    assert 'model_type' in error_of(folder)


@pytest.mark.parametrize('length', [0, 5, 60, -1])
def test_rejects_truncated_weights(folder, length):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:length])
    message = error_of(folder)
    assert 'truncated' in message and str(path) in message


def test_rejects_bytes_after_the_last_tensor(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes() + b'\0')
    assert 'belong to no tensor' in error_of(folder)


@pytest.mark.parametrize('content', [
    b'\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01', struct.pack('<Q', 4) + b'abcd' + bytes(8),
    struct.pack('<Q', 2) + b'[]', struct.pack('<Q', 8) + b'{"a": 1}'])
def test_rejects_weights_that_are_not_safetensors(folder, content):
    (folder / 'model.safetensors').write_bytes(content)
    assert 'model.safetensors' in error_of(folder)


def test_rejects_a_tensor_whose_size_contradicts_its_shape(folder):
    text = json.dumps({'w': {'dtype': 'F32', 'shape': [3], 'data_offsets': [0, 8]}}).encode()
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + bytes(8))
    assert 'tensor w' in error_of(folder)


@pytest.mark.parametrize('name', [
    'model.safetensors', 'config.json', 'tokenizer.json', 'tokenizer_config.json', 'vocab.json',
    'merges.txt', 'tokenizer.model', 'qwen.tiktoken', 'tekken.json', 'chat_template.jinja',
    'generation_config.json'])
def test_rejects_a_git_lfs_pointer(folder, name):
    (folder / name).write_text(
        'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n')
    message = error_of(folder)
    assert f'{folder / name} is a Git LFS pointer' in message and 'git lfs pull' in message


def test_rejects_a_dangling_link(folder):
    """A copy of a hub cache's snapshot has such links if its blobs were left out."""
    path = folder / 'model.safetensors'
    path.unlink()
    path.symlink_to('../../blobs/0')
    assert_damaged(folder, str(path))


def test_rejects_a_folder_in_place_of_weights(folder):
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors').mkdir()
    assert_damaged(folder, 'model.safetensors')


def test_rejects_a_file_that_it_may_not_read(folder, monkeypatch):

    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(os, 'open', refuse)
    assert 'correct its permissions' in error_of(folder)


@pytest.fixture(params=['FIFO', 'device'])
def endless(request, folder):
    """Return a function that puts an endless file in a file's place, and returns the error."""
    def put(name):
        path = folder / name
        path.unlink(missing_ok=True)
        if request.param == 'FIFO':
            os.mkfifo(path)
        else:
            path.symlink_to('/dev/zero')
        return f'{path} is a {request.param}'
    return put


@pytest.mark.parametrize('name', [
    'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
    'tokenizer_config.json', 'chat_template.jinja', 'vocab.txt', 'merges.txt', 'anything'])
def test_rejects_a_file_that_is_not_regular(folder, endless, name):
    """It is not opened, even if only a library would read it."""
    message = endless(name)
    assert message in error_of(folder)


def test_rejects_a_named_template_that_is_not_a_regular_file(folder, endless):
    (folder / 'additional_chat_templates').mkdir()
    message = endless('additional_chat_templates/tools.jinja')
    assert message in error_of(folder)


@pytest.mark.parametrize('name', [
    'config.json', 'generation_config.json', 'model.safetensors.index.json', 'tokenizer.json',
    'tokenizer_config.json', 'chat_template.jinja', 'vocab.txt', 'tokenizer.model'])
def test_rejects_a_file_that_is_too_large(folder, name):
    with (folder / name).open('wb') as file:
        file.truncate(2**30)
    message = error_of(folder)
    assert str(folder / name) in message and '1073741824 bytes' in message


def test_inspects_a_snapshot_of_a_hub_cache(folder, tmp_path_factory):
    """The files of a snapshot are links."""
    snapshot = tmp_path_factory.mktemp('snapshot')
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert checkpoint.inspect(snapshot).tensors.keys() == TENSORS.keys()


def test_rejects_a_missing_shard(shards):
    (shards / 'model-00002-of-00002.safetensors').unlink()
    assert 'model-00002-of-00002.safetensors' in error_of(shards)


def test_rejects_a_shard_without_its_tensor(shards):
    write_safetensors(
        shards / 'model-00002-of-00002.safetensors', {'other.weight': ('BF16', (4,))})
    assert 'b.weight' in error_of(shards)


@pytest.mark.parametrize('index', [True, False])
def test_rejects_a_tensor_in_two_files(shards, index):
    second = shards / 'model-00002-of-00002.safetensors'
    write_safetensors(second, {'b.weight': ('BF16', (4,)), 'a.weight': ('F32', (2, 3))})
    if not index:
        (shards / 'model.safetensors.index.json').unlink()
    message = error_of(shards)
    assert f'{shards / "model-00001-of-00002.safetensors"} and {second.name}' in message
    assert 'a.weight' in message and 'remove' in message


def test_rejects_a_further_file_without_an_index(shards):
    (shards / 'model.safetensors.index.json').unlink()
    write_safetensors(shards / 'z.safetensors', {'b.weight': ('BF16', (4,))})
    assert 'z.safetensors both have the tensor b.weight' in error_of(shards)


def test_reads_only_the_files_of_the_index(shards):
    write_safetensors(shards / 'z.safetensors', {'b.weight': ('BF16', (4,))})
    path = checkpoint.inspect(shards).tensors['b.weight'].path
    assert path.name == 'model-00002-of-00002.safetensors'


def test_rejects_a_shard_outside_the_folder(shards):
    write_json(shards / 'model.safetensors.index.json', {
        'weight_map': {'a.weight': '../outside.safetensors'}})
    write_safetensors(shards.parent / 'outside.safetensors', {'a.weight': ('F32', (2, 3))})
    assert 'outside.safetensors' in error_of(shards)


YARN = {'rope_type': 'yarn', 'original_max_position_embeddings': 64}


@pytest.mark.parametrize(('fields', 'word'), [
    ({'rope_scaling': 'yarn'}, 'rope_scaling'),
    ({'rope_parameters': ['yarn', None]}, 'rope_parameters is ["yarn", null]'),
    ({'rope_scaling': YARN}, 'factor'), ({'rope_scaling': {**YARN, 'factor': '4'}}, 'factor'),
    ({'rope_scaling': {**YARN, 'factor': 4, 'original_max_position_embeddings': '64'}},
     'original_max_position_embeddings'),
    ({'rope_theta': 5e5, 'rope_parameters': {'rope_theta': 1e4}},
     'rope_theta is 500000.0, but 10000.0 in rope_parameters'),
    ({'text_config': {'rope_theta': 5e5, 'rope_scaling': {'rope_theta': 1e4}}},
     'rope_theta is 500000.0, but 10000.0 in rope_scaling'),
    ({'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0},
      'rope_scaling': {'rope_type': 'yarn', 'factor': 8.0}},
     'factor is 4.0 in rope_parameters, but 8.0 in rope_scaling'),
    ({'rope_parameters': {'rope_type': 'default'}, 'rope_scaling': {'type': 'yarn'}},
     'rope_type is "default" in rope_parameters, but "yarn" in rope_scaling'),
    ({'rope_parameters': {'rope_type': 'llama3', 'factor': 8}, 'rope_scaling': {'factor': 8.0}},
     'rope_type is in rope_parameters, but not in rope_scaling'),
    ({'rope_parameters': {'rope_theta': 5e5}, 'rope_scaling': {
        'rope_type': 'linear', 'factor': 2.0}}, 'rope_theta is in rope_parameters, but not in'),
    ({'architectures': ['BertModel']},
     'architectures is ["BertModel"], but model_type is "llama"'),
    ({'architectures': ['LlamaForCausalLM'], 'model_type': 'granite'}, 'model_type is "granite"'),
    ({'max_position_embeddings': '64'}, 'max_position_embeddings'),
    ({'max_position_embeddings': -1}, 'max_position_embeddings'),
    ({'text_config': 'llama', 'eos_token_id': None}, 'text_config'),
    ({'text_config': {'num_hidden_layers': 10**9}}, 'num_hidden_layers is 1000000000'),
    ({'num_attention_heads': 0}, 'num_attention_heads is 0'), ({'n_layer': 1e308}, 'n_layer'),
    ({'hidden_size': '64'}, 'hidden_size'), ({'head_dim': True}, 'head_dim is true'),
    ({'rms_norm_eps': 1e308}, 'rms_norm_eps'),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps is NaN'),
    ({'eos_token_id': 'end'}, 'eos_token_id is "end"'), ({'eos_token_id': [[2]]}, 'eos_token_id'),
    ({'physai_decode_random_weights': [0]}, 'physai_decode_random_weights'),
    ({'physai_decode_random_weights': {'seed': '0'}}, 'seed "0"'),
    ({'quantization_config': 'gptq'}, 'quantization_config')])
def test_rejects_a_wrong_value_in_the_config(folder, fields, word):
    write_json(folder / 'config.json', {**CONFIG, **fields})
    assert_damaged(folder, 'config.json', word)


@pytest.mark.parametrize('fields', [
    {'is_causal': False}, {'text_config': {'model_type': 'qwen2', 'is_causal': False}}])
def test_rejects_a_model_that_reads_in_both_directions(folder, fields):
    write_json(folder / 'config.json', {**CONFIG, **fields})
    assert 'is_causal is false in config.json, so' in error_of(folder)


@pytest.mark.parametrize('fields', [
    {'architectures': ['LlamaForCausalLM']}, {'architectures': ['LlamaModel']},
    {'architectures': ['OwnForCausalLM']}, {'architectures': ['BertLlamaForCausalLM']},
    {'architectures': ['LlamaForCausalLM'], 'model_type': 'mistral'},
    {'architectures': ['Gemma3ForConditionalGeneration'], 'model_type': 'gemma3_text'},
    {'architectures': ['Mistral3ForConditionalGeneration'], 'model_type': 'mistral3',
     'text_config': {'model_type': 'mistral'}},
    {'architectures': ['LlavaForConditionalGeneration'], 'model_type': 'llava',
     'text_config': {'model_type': 'llama', 'architectures': ['LlamaForCausalLM']}},
    {'architectures': ['Qwen3MoeForCausalLM'], 'model_type': 'qwen3_moe'},
    {'architectures': ['BertModel'], 'model_type': 'own'}, {'architectures': None},
    {'architectures': 'llama'}, {'architectures': [3]},
    {'rope_theta': 10000, 'rope_parameters': {'rope_theta': 1e4}},
    {'rope_parameters': {'rope_type': 'llama3', 'factor': 8}, 'rope_scaling': {
        'type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0}},
    {'rope_theta': 1e6, 'rope_parameters': {'rope_theta': 1e6, 'rope_type': 'default'},
     'rope_scaling': {'rope_theta': 1e6}},
    {'rope_theta': 1e6, 'rope_parameters': {'rope_theta': 1e6}, 'rope_scaling': {
        'rope_type': 'linear', 'factor': 2.0}}, {'is_causal': True}, {'is_causal': None},
    {'rope_theta': 1e6, 'rope_parameters': {'full_attention': {'rope_theta': 1e4}}}])
def test_accepts_a_config_without_a_certain_contradiction(folder, fields):
    write_json(folder / 'config.json', {**CONFIG, **fields})
    checkpoint.inspect(folder)


@pytest.mark.parametrize(('fields', 'notes'), [
    ({'architectures': ['LlamaForCausalLM']}, ()), ({'architectures': ['MistralForCausalLM']}, ()),
    ({'architectures': ['Gemma3ForConditionalGeneration'], 'model_type': 'gemma3_text'}, ()),
    ({'architectures': ['Qwen3MoeForCausalLM'], 'model_type': 'qwen3_moe'}, ()),
    ({'architectures': ['OwnForCausalLM']},
     ('architectures is ["OwnForCausalLM"]: model_type "llama" decides',)),
    ({'architectures': ['BertModel'], 'model_type': 'own'},
     ('architectures is ["BertModel"]: model_type "own" decides',)),
    ({}, ('architectures is missing: model_type "llama" decides',)),
    ({'architectures': []}, ('architectures is []: model_type "llama" decides',)),
    ({'architectures': 'llama'}, ('architectures is "llama": model_type "llama" decides',)),
    ({'architectures': ['LlamaForCausalLM'], 'dtype': 'float16', 'torch_dtype': 'float16'}, ()),
    ({'architectures': ['LlamaForCausalLM'], 'dtype': None, 'torch_dtype': 'float16'}, ()),
    ({'architectures': ['LlamaForCausalLM'], 'dtype': 'float16', 'torch_dtype': 'bfloat16'},
     ('dtype is "float16", but torch_dtype "bfloat16": engine.dtype decides',))])
def test_notes_what_is_uncertain_in_the_config(folder, fields, notes):
    config = {key: value for key, value in CONFIG.items() if key != 'architectures'}
    write_json(folder / 'config.json', {**config, **fields})
    assert checkpoint.inspect(folder).notes == notes


DEEP = '[' * 100_000


@pytest.mark.parametrize('name', ['config.json', 'generation_config.json'])
def test_rejects_json_that_is_nested_too_deep(folder, name):
    (folder / name).write_text('{"a": ' + DEEP)
    assert_damaged(folder, name, 'RecursionError')


def assert_damaged(folder, *words):
    """Assert that the error has these words, and advises to get the model again."""
    message = error_of(folder)
    for part in (*words, 'again'):
        assert part in message


@pytest.mark.parametrize('file', [3, None, ['a']])
def test_rejects_a_wrong_value_in_the_index(shards, file):
    write_json(shards / 'model.safetensors.index.json', {'weight_map': {'a.weight': file}})
    assert_damaged(shards, 'model.safetensors.index.json')


def tensor(begin, end, dtype='F32', shape=(2,)):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


@pytest.mark.parametrize('header', [
    {'a': tensor(0, 8), 'b': tensor(0, 8), 'c': tensor(8, 16)},
    {'a': tensor(0, 8), 'b': tensor(4, 12), 'c': tensor(8, 16)},
    {'a': tensor(8, 16)},
    {'a': tensor(-8, 0), 'b': tensor(0, 8), 'c': tensor(8, 16)},
    {'a': tensor(0, 16, 'X', (-1,)), 'b': tensor(16, 8, 'X'), 'c': tensor(8, 16)},
    {'a': tensor(0, 16, ['F32'])}, {'a': tensor(0, 16, 32)}, {'a': tensor(0, 16, shape='22')},
    {'a': tensor(0, 16, 'X', '22')}, {'a': tensor(0, 16, shape=2)}, {'a': tensor('0', 16)},
    {'a': tensor(0, 16, shape=(None,))}, DEEP], ids=lambda header: str(header)[:60])
def test_rejects_a_wrong_value_in_a_header(folder, header):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + bytes(16))
    assert_damaged(folder, 'model.safetensors')


@pytest.mark.parametrize(('name', 'word'), [
    ('pytorch_model.bin', 'safetensors'), ('consolidated.00.pth', 'pickle'),
    ('model.gguf', 'GGUF'), ('notes.txt', 'no weights')])
def test_rejects_other_formats_of_weights(folder, name, word):
    (folder / 'model.safetensors').rename(folder / name)
    message = error_of(folder)
    assert word in message
    if 'no weights' not in word:
        (folder / 'config.json').unlink()           # which folders of GGUF files do not have
        assert error_of(folder) == message


def test_never_loads_a_pickle(folder):
    (folder / 'model.safetensors').unlink()
    trace = folder / 'executed'
    payload = f"cbuiltins\neval\n(S'open({str(trace)!r}, \"w\")'\ntR."
    (folder / 'pytorch_model.bin').write_bytes(payload.encode())
    error_of(folder)
    assert not trace.exists()


@pytest.mark.parametrize(('generation', 'config', 'expected'), [
    ({'eos_token_id': [5, 6]}, {'eos_token_id': 2}, (5, 6, 2)),
    ({'eos_token_id': [5, 6]}, {'eos_token_id': 6, 'text_config': {'eos_token_id': 7}}, (5, 6, 7)),
    ({}, {'eos_token_id': 2}, (2,)), ({}, {'eos_token_id': None}, ()),
    ({}, {'text_config': {'eos_token_id': [7]}}, (7,)), ({}, {'eos_token_id': 0}, (0,))])
def test_end_token_ids_of_config_and_generation_config(folder, generation, config, expected):
    write_json(folder / 'config.json', {'model_type': 'llama', **config})
    write_json(folder / 'generation_config.json', generation)
    assert checkpoint.inspect(folder).eos_token_ids == expected


@pytest.mark.parametrize(('generation', 'expected'), [
    ({}, {}), ({'temperature': 0.6, 'top_p': 0.9, 'top_k': 50}, {}),
    ({'do_sample': True, 'temperature': 0.6, 'top_k': 20, 'top_p': None, 'typical_p': 0.3},
     {'temperature': 0.6, 'top_k': 20}),
    ({'do_sample': True, 'temperature': 1, 'min_p': 0.1, 'top_p': 0.9, 'repetition_penalty': 1.1},
     {'temperature': 1.0, 'min_p': 0.1, 'top_p': 0.9, 'repetition_penalty': 1.1}),
    ({'repetition_penalty': 1.1, 'temperature': 0.6}, {'repetition_penalty': 1.1})])
def test_sampling_of_the_checkpoint(folder, generation, expected):
    write_json(folder / 'generation_config.json', generation)
    assert checkpoint.inspect(folder).sampling == expected


@pytest.mark.parametrize(('generation', 'expected'), [
    ({}, ()), ({'do_sample': True, 'top_k': 5, 'typical_p': 1.0, 'num_beams': 1, 'max_length': 9,
               'min_new_tokens': 0, 'suppress_tokens': [], 'guidance_scale': 1.0}, ()),
    ({'suppress_tokens': [7], 'bad_words_ids': [[3]], 'forced_bos_token_id': 0},
     ('bad_words_ids', 'forced_bos_token_id', 'suppress_tokens')),
    ({'num_beams': 4, 'no_repeat_ngram_size': 3, 'typical_p': 0.5},
     ('no_repeat_ngram_size', 'num_beams')),
    ({'do_sample': True, 'typical_p': 0.5, 'begin_suppress_tokens': None}, ('typical_p',)),
    ({'exponential_decay_length_penalty': [9, 1.1], 'min_new_tokens': 1, 'guidance_scale': 1.5,
      'sequence_bias': [[[7], 2.0]]}, (
         'exponential_decay_length_penalty', 'guidance_scale', 'min_new_tokens',
         'sequence_bias'))])
def test_settings_of_the_checkpoint_that_are_not_applied(folder, generation, expected):
    write_json(folder / 'generation_config.json', generation)
    assert checkpoint.inspect(folder).unapplied == expected


@pytest.mark.parametrize('value', [-1.0, 'warm', [0.5], 1e9, True])
def test_rejects_a_sampling_setting_out_of_range(folder, value):
    write_json(folder / 'generation_config.json', {'do_sample': True, 'temperature': value})
    assert (f'generation_config.json is damaged (temperature is {json.dumps(value)}:'
            in error_of(folder))


def test_names_a_missing_key():
    with pytest.raises(EngineError, match=r'is damaged \("size" is missing\): .*correct the file'):
        with checkpoint.parsing('x.json'):
            {}['size']


@pytest.mark.parametrize('value', [-1, True, 2.0, {'id': 2}])
def test_rejects_an_end_token_that_is_not_an_id(folder, value):
    for name in ('config.json', 'generation_config.json'):
        write_json(folder / name, {**CONFIG, 'eos_token_id': value})
        assert f'{name} is damaged (eos_token_id is' in error_of(folder)
        write_json(folder / name, CONFIG)


@pytest.mark.parametrize(('config', 'limit'), [
    ({}, None), ({'n_positions': 1024}, 1024),
    ({'text_config': {'max_position_embeddings': 32}}, 32),
    ({'max_position_embeddings': 64, 'rope_scaling': {
        'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64}}, 256),
    ({'max_position_embeddings': 256, 'rope_parameters': {
        'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64}}, 256),
    ({'max_position_embeddings': 256, 'rope_scaling': {
        'rope_type': 'llama3', 'factor': 8.0, 'original_max_position_embeddings': 64}}, 256),
    ({'max_position_embeddings': 256, 'rope_scaling': {
        'type': 'yarn', 'factor': None, 'original_max_position_embeddings': 64}}, 256)])
def test_context_limit(folder, config, limit):
    write_json(folder / 'config.json', {'model_type': 'llama', **config})
    assert checkpoint.inspect(folder).context_limit == limit


@pytest.mark.parametrize(('quantization', 'name'), [
    ({'quant_method': 'gptq', 'bits': 4, 'group_size': 128}, 'gptq-int4-g128'),
    ({'quant_method': 'gptq', 'bits': 4, 'group_size': -1}, 'gptq-int4'),
    ({'quant_method': 'awq', 'bits': 4, 'group_size': 64}, 'awq-int4-g64'),
    ({'quant_method': 'exl2', 'bits': 4.25}, 'exl2-4.25bpw'),
    ({'quant_method': 'bitsandbytes', 'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'},
     'bitsandbytes-nf4'),
    ({'quant_method': 'bitsandbytes', 'load_in_8bit': True}, 'bitsandbytes-int8'),
    ({'quant_method': 'bitsandbytes', 'load_in_4bit': True, 'bnb_4bit_quant_type': None},
     'bitsandbytes-unknown'),
    *(({'quant_method': 'compressed-tensors', 'config_groups': {
        name: {'weights': {'num_bits': bits, 'type': kind, 'group_size': size}}
        for name, (kind, bits, size) in groups.items()}}, f'compressed-tensors{suffix}')
      for groups, suffix in (
          ({'0': ('int', 4, 128)}, '-int4-g128'), ({'0': ('float', 8, None)}, '-float8'),
          ({'0': ('int', 4, 128), '1': ('int', 4, 32)}, '-int4'),
          ({'0': ('int', 4, 128), '1': ('int', 8, 128)}, '-g128'))),
    ({'quant_method': 'fp8'}, 'fp8')])
def test_names_the_quantization(folder, quantization, name):
    write_json(folder / 'config.json', {**CONFIG, 'quantization_config': quantization})
    assert checkpoint.inspect(folder).quantization == name


def test_locates_a_folder(folder):
    assert checkpoint.locate(str(folder)) == folder


def test_reads_the_quantization_from_the_file_of_modelopt(folder):
    path = folder / 'hf_quant_config.json'
    write_json(path, {'quantization': {'quant_algo': None, 'kv_cache_quant_algo': 'FP8'}})
    assert checkpoint.inspect(folder).quantized is None
    write_json(path, {'quantization': {'quant_algo': 'NVFP4', 'exclude_modules': ['lm_head']}})
    assert checkpoint.inspect(folder).quantization == 'modelopt-nvfp4'
    write_json(folder / 'config.json', {**CONFIG, 'quantization_config': {'quant_method': 'fp8'}})
    assert checkpoint.inspect(folder).quantization == 'fp8'
    write_json(folder / 'config.json', CONFIG)
    write_json(path, {'quantization': []})
    assert_damaged(folder, path.name)


def test_locates_no_gguf_file(folder):
    path = folder / 'model.gguf'
    path.touch()
    with pytest.raises(EngineError, match='GGUF file.* llama-server'):
        checkpoint.locate(str(path))


def test_does_not_locate_a_file(folder):
    with pytest.raises(EngineError, match='is a file'):
        checkpoint.locate(str(folder / 'config.json'))


@pytest.mark.parametrize('path', ['/no/such/folder', './none', 'none', '~/none/such', '', 'a/b/c'])
def test_does_not_locate_a_missing_folder(path):
    with pytest.raises(EngineError, match='no such folder'):
        checkpoint.locate(path)


@pytest.mark.parametrize('path', ['~no_such_user/model', '/' + 'a' * 300, 'a' * 5000])
def test_does_not_locate_an_impossible_path(path):
    with pytest.raises(EngineError, match=r'model\.path .*(set it to a|expected builtin)'):
        checkpoint.locate(path)


def test_errors_name_the_parameter_of_the_model(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    for path in ('/none', 'builtin:none', 'a' * 5000, str(folder / 'config.json'), 'some/model'):
        with pytest.raises(EngineError) as raised:
            checkpoint.open(path, parameter='the.setting')
        assert str(raised.value).startswith('the.setting ')
    write_json(folder / 'config.json', {'name': 'something'})
    with pytest.raises(EngineError, match=r'set the\.setting to such a folder'):
        checkpoint.open(str(folder), parameter='the.setting')
    write_json(folder / 'adapter_config.json', {})
    (folder / 'model.safetensors').unlink()
    with pytest.raises(EngineError, match=r'set the\.setting to that folder'):
        checkpoint.open(str(folder), parameter='the.setting')


@pytest.mark.parametrize('name', ['no_such_model', '..', '../models', ''])
def test_does_not_locate_an_unknown_builtin_model(name):
    with pytest.raises(EngineError, match='the package does not contain this model'):
        checkpoint.locate(f'builtin:{name}')


def test_hub_id_without_a_network(monkeypatch):

    def unreachable(*args, **kwargs):
        raise OSError('network is unreachable')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', unreachable)
    with pytest.raises(EngineError, match='hf download some-org/some-model --local-dir'):
        checkpoint.locate('some-org/some-model')


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_hub_id_without_a_folder_for_the_download(monkeypatch, number):
    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', full)
    with pytest.raises(EngineError, match=f'{os.strerror(number)}.: set HF_HOME in the envir'):
        checkpoint.locate('some-org/some-model')


def test_hub_id_without_the_library_of_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(EngineError) as raised:
        checkpoint.locate('some-org/some-model')
    assert str(raised.value).endswith(
        f' from the hub, {sys.executable} -m pip install huggingface_hub')


def test_downloads_only_data_from_the_hub(monkeypatch, tmp_path):
    given = {}

    def download(name, **options):
        given.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    assert checkpoint.locate('some-org/some-model', 'v2') == tmp_path
    assert (given['name'], given['revision']) == ('some-org/some-model', 'v2')
    files = ['config.json', 'model.safetensors', 'tokenizer.model', 'chat_template.jinja',
             'pytorch_model.bin', 'modeling_x.py', 'onnx/model.safetensors', 'model.gguf']
    chosen = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=given['allow_patterns'], ignore_patterns=given['ignore_patterns'])
    assert list(chosen) == files[:4]
