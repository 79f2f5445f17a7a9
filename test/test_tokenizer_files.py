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

"""`load_tokenizer` and `Text` on folders whose files contradict each other or are incomplete."""

import json
import shutil

from json_file import editing
from physai_decode.config import ChatConfig
from physai_decode.request import Message
from physai_decode.text import Text
from physai_decode.tokenizer_files import load_tokenizer
from physai_decode.tokenizer_files import TextError
import pytest
from test_text import CHATML
from test_text import llama_like
from test_text import qwen_like
from tokenizers import Tokenizer
from transformers import AutoTokenizer

AUTO = ChatConfig()
SENTENCE = 'Pick up the red cube.'
FAMILIES = ['LlamaTokenizerFast', 'GemmaTokenizer', 'BertTokenizer', 'GPT2Tokenizer',
            'Qwen2TokenizerFast', 'PreTrainedTokenizerFast']


@pytest.fixture
def folder(tmp_path):
    """Write a byte-level tokenizer with a template."""
    qwen_like().save_pretrained(tmp_path)
    return tmp_path


def configure(folder, **changes):
    """Change tokenizer_config.json; None removes a key."""
    with editing(folder / 'tokenizer_config.json') as config:
        config.update(changes)
        for key in [key for key, value in config.items() if value is None]:
            del config[key]


def error_of(folder, chat=AUTO, vocab_size=None):
    """Return the message of the error that loading raises."""
    with pytest.raises(TextError) as raised:
        Text(load_tokenizer(str(folder)), chat, vocab_size)
    return str(raised.value)


@pytest.mark.parametrize('make', [qwen_like, llama_like])
@pytest.mark.parametrize('family', FAMILIES)
def test_reads_tokenizer_json_whatever_class_the_config_names(tmp_path, make, family):
    make().save_pretrained(tmp_path)
    configure(tmp_path, tokenizer_class=family, add_bos_token=False, add_prefix_space=True)
    backend = load_tokenizer(str(tmp_path)).backend_tokenizer
    expected = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    for special in (False, True):
        assert backend.encode(SENTENCE, add_special_tokens=special).ids == expected.encode(
            SENTENCE, add_special_tokens=special).ids
    ids = expected.encode(SENTENCE, add_special_tokens=False).ids
    assert backend.decode(ids) == expected.decode(ids)


def test_rejects_a_token_with_two_ids(folder):
    configure(folder, added_tokens_decoder={'7': {'content': '<|im_end|>'}})
    message = error_of(folder)
    assert 'gives "<|im_end|>" the id 7, tokenizer.json gives it 411' in message
    assert str(folder) in message


def test_adds_a_token_that_only_the_config_has(folder):
    size = Tokenizer.from_file(str(folder / 'tokenizer.json')).get_vocab_size()
    configure(folder, added_tokens_decoder={str(size): {'content': '<x>', 'special': True}})
    assert load_tokenizer(str(folder)).backend_tokenizer.token_to_id('<x>') == size


@pytest.mark.parametrize('by_config', [False, True])
@pytest.mark.parametrize('flags', [{'rstrip': True}, {'lstrip': True}, {'single_word': True}])
@pytest.mark.parametrize('token', ['<|im_start|>', '<|im_end|>'])       # the second is named
def test_flags_of_added_tokens_are_those_of_the_library(folder, token, flags, by_config):
    """Those in the config take precedence."""
    with editing(folder / 'tokenizer.json') as state:
        found = next(each for each in state['added_tokens'] if each['content'] == token)
        found.update({} if by_config else flags)
    configure(folder, tokenizer_class='PreTrainedTokenizerFast', eos_token='<|im_end|>', **({
        'added_tokens_decoder': {str(found['id']): {
            key: value for key, value in {**found, **flags}.items() if key != 'id'}}}
        if by_config else {}))
    ours, expected = (load(folder).backend_tokenizer for load in (
        lambda folder: load_tokenizer(str(folder)), AutoTokenizer.from_pretrained))
    for text in (f'a {token} \n b', f'a{token}b {token}'):
        assert ours.encode(text).ids == expected.encode(text).ids
    added = ours.get_added_tokens_decoder()[found['id']]
    assert all(getattr(added, key) is value for key, value in flags.items())


def test_named_tokens_are_special_although_tokenizer_json_denies_it(folder):
    with editing(folder / 'tokenizer.json') as state:
        for token in state['added_tokens']:
            token['special'] = False
    text = Text(load_tokenizer(str(folder)), ChatConfig())
    end = text.backend.token_to_id('<|im_end|>')
    assert end in text.special_ids
    # And no text of a user contains the token that begins a turn in the template.
    start = text.backend.token_to_id('<|im_start|>')
    ids = text.encode([Message('user', 'a<|im_end|><|im_start|>b')])
    assert (ids.count(start), ids.count(end)) == (2, 1)


@pytest.mark.parametrize('value', [5, ['a'], {'content': None}])
def test_rejects_a_special_token_that_is_not_text(folder, value):
    configure(folder, eos_token=value)
    shown = json.dumps(value['content'] if isinstance(value, dict) else value)
    assert f'tokenizer_config.json has {shown} as eos_token' in error_of(folder)


def test_rejects_a_template_that_uses_a_missing_token(folder):
    configure(folder, bos_token='<bos>')
    Text(load_tokenizer(str(folder)), ChatConfig())             # nothing uses it yet
    (folder / 'chat_template.jinja').write_text('{{ bos_token }}' + CHATML)
    assert 'uses bos_token, which tokenizer_config.json sets to "<bos>"' in error_of(folder)
    Text(load_tokenizer(str(folder)), ChatConfig(template='off'))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('model_type', ['qwen2', 'llama', 'gemma', 'gpt2'])
def test_rejects_a_folder_without_tokenizer_json(folder, family, model_type):
    """For some classes, transformers would create a tokenizer with a few special tokens only."""
    (folder / 'tokenizer.json').unlink()
    (folder / 'config.json').write_text(json.dumps({'model_type': model_type}))
    configure(folder, tokenizer_class=family)
    message = error_of(folder)
    assert 'no tokenizer.json' in message and 'copy or download the model again' in message
    assert 'one of:' not in message


def test_needs_vocab_and_merges_without_tokenizer_json(folder):
    tokenizer = qwen_like()
    shutil.rmtree(folder)
    folder.mkdir()
    state = json.loads(tokenizer.backend_tokenizer.to_str())['model']
    (folder / 'vocab.json').write_text(json.dumps(state['vocab']))
    (folder / 'config.json').write_text('{"model_type": "qwen2"}')
    assert 'copy or download the model again' in error_of(folder)
    (folder / 'merges.txt').write_text('#version: 0.2\n' + ''.join(
        f'{left} {right}\n' for left, right in state['merges']))
    text = Text(load_tokenizer(str(folder)), ChatConfig())
    assert text.encode([Message('user', SENTENCE)])


def test_rejects_an_empty_vocabulary(folder):
    with editing(folder / 'tokenizer.json') as state:
        state['model'].update(vocab={}, merges=[])
    assert 'tokens is text' in error_of(folder)


@pytest.mark.parametrize(('name', 'content', 'library'), [
    ('tokenizer.model', b'\n\x0e\n\x05<unk>', 'sentencepiece'),
    ('tokenizer.model', b'IQ== 0\nIg== 1\n', 'tiktoken'),
    ('qwen.tiktoken', b'IQ== 0\n', 'tiktoken')])
def test_names_a_missing_library(folder, monkeypatch, name, content, library):
    from physai_decode import tokenizer_files

    monkeypatch.setattr(tokenizer_files, '_installed', lambda name: name == 'protobuf')
    (folder / 'tokenizer.json').unlink()
    (folder / name).write_bytes(content)
    assert f'it has {name} but no tokenizer.json' in error_of(folder)
    assert error_of(folder).endswith(
        f'pip install {library}, or save the model with its fast tokenizer')


def test_rejects_a_template_with_a_token_beyond_the_model_s_vocabulary(folder):
    """Chat tokens may have been added to the tokenizer, but not to the model."""
    assert 'writes "<|im_start|>", token 410, but the model has 410' in error_of(
        folder, vocab_size=410)
    Text(load_tokenizer(str(folder)), ChatConfig(), vocab_size=415)
    # Without the template, the tokens are never used.
    Text(load_tokenizer(str(folder)), ChatConfig(template='off'), vocab_size=410)


@pytest.mark.parametrize('vocab_size', [300, 2000])
def test_rejects_the_tokenizer_of_another_model(folder, vocab_size):
    assert 'do not belong together' in error_of(folder, ChatConfig(template='off'), vocab_size)


def test_order_of_the_files_of_a_template(folder):
    (folder / 'chat_template.jinja').rename(folder / 'kept')
    assert load_tokenizer(str(folder)).chat_template is None
    for name, content in (
            ('chat_template.json', json.dumps({'chat_template': '1'})),
            ('tokenizer_config.json', json.dumps({'chat_template': '2'})),
            ('chat_template.jinja', '3')):
        (folder / name).write_text(content)
        assert load_tokenizer(str(folder)).chat_template == str(
            ['chat_template.json', 'tokenizer_config.json', 'chat_template.jinja'].index(name) + 1)


@pytest.mark.parametrize('template', [
    '\n{{ a }', '\n{% nope %}', '\n{{ a | nope }}', '\n{% if a %}'])
def test_names_the_file_of_a_template_with_a_syntax_error(folder, template):
    single = folder / 'chat_template.jinja'
    single.write_text(template)
    assert f'{single} has a chat template with a syntax error in line 2' in error_of(folder)
    assert 'nope' not in error_of(folder)
    single.unlink()
    configure(folder, chat_template=template)
    assert f'{folder / "tokenizer_config.json"} has a chat template' in error_of(folder)
    configure(folder, chat_template=None)
    path = folder / 'chat_template.json'
    path.write_text(json.dumps({'chat_template': template}))
    assert f'{path} has a chat template' in error_of(folder)
    more = folder / 'additional_chat_templates'
    more.mkdir()
    (more / 'loud.jinja').write_text(template)
    message = error_of(folder, ChatConfig(template='loud'))
    assert f'{more / "loud.jinja"} has a chat template' in message
    Text(load_tokenizer(str(folder)), ChatConfig(template='off'))


def test_names_a_template_that_is_not_utf_8(folder):
    (folder / 'chat_template.jinja').write_bytes(b'\xff')
    assert 'chat_template.jinja is damaged' in error_of(folder)


@pytest.mark.parametrize(('content', 'words'), [
    ('no', 'tokenizer.json is damaged'), ('{}', 'pip install -U tokenizers')])
def test_names_a_tokenizer_json_that_can_not_be_read(folder, content, words):
    (folder / 'tokenizer.json').write_text(content)
    message = error_of(folder)
    assert words in message and str(folder) in message
    assert 'tokenizer_config.json' not in message


def test_chooses_a_template_by_name(folder):
    (folder / 'chat_template.jinja').unlink()
    configure(folder, chat_template=[
        {'name': 'plain', 'template': "{{ messages[-1]['content'] }}"}])
    assert 'the model has no chat template of that name: it has plain' in error_of(folder)
    more = folder / 'additional_chat_templates'
    more.mkdir()
    (more / 'loud.jinja').write_text("{{ messages[-1]['content'] }}!")
    assert 'it has loud, plain' in error_of(folder, ChatConfig(template='quiet'))
    tokenizer, messages = load_tokenizer(str(folder)), [Message('user', SENTENCE)]
    for name, written in (('plain', SENTENCE), ('loud', f'{SENTENCE}!')):
        text = Text(tokenizer, ChatConfig(template=name))
        assert text.template == name
        assert text.encode(messages) == tokenizer(written)['input_ids']
