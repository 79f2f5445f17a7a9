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

"""The embedded model: its folder, its tokenizer, its training data, and its answers."""

import json
from pathlib import Path
from random import Random
import sys

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'physai_decode' / 'models' / 'tiny_planner'

sys.path.insert(0, str(ROOT / 'tools'))

import planner_data  # noqa: E402

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import evaluate_tiny_planner  # noqa: E402
import train_tiny_planner  # noqa: E402


@pytest.fixture(scope='module')
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope='module')
def answers():
    torch.set_num_threads(1)
    return evaluate_tiny_planner.LibraryAnswers(FOLDER, 'cpu', torch.float32, batch=40)


def draw(held_out, count, seed=1):
    rng = Random(f'{seed} test')
    return [planner_data.turn(rng, held_out) for _ in range(count)]


def test_folder_is_complete_and_small():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {'README.md', 'config.json', 'generation_config.json', 'model.safetensors',
                     'tokenizer.json', 'tokenizer_config.json'}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8e6


def test_plans_conform_to_the_shipped_schema():
    schema = json.loads((ROOT / 'config' / 'plan.schema.json').read_text())
    validator = jsonschema.Draft202012Validator(schema)
    for turn in draw(False, 500) + draw(True, 500):
        validator.validate(json.loads(turn.answer))


def test_shape_fits_the_kernels():
    config = json.loads((FOLDER / 'config.json').read_text())
    assert config['model_type'] == 'llama'
    assert config['head_dim'] in (64, 128)
    assert config['num_attention_heads'] % config['num_key_value_heads'] == 0
    for width in ('hidden_size', 'intermediate_size', 'vocab_size'):
        assert config[width] % 128 == 0
    assert config['max_position_embeddings'] >= 4096


def test_weights_are_bfloat16_of_the_configured_shapes():
    from safetensors import safe_open

    with safe_open(FOLDER / 'model.safetensors', 'pt') as weights:
        stored = {name: weights.get_tensor(name) for name in weights.keys()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert 'lm_head.weight' not in stored
    model = transformers.AutoModelForCausalLM.from_config(train_tiny_planner.model_config())
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
        if name != 'lm_head.weight'}


@pytest.mark.parametrize('text', [
    '', ' ', '  two  spaces ', '\r\n\t\n', 'Bring me the red cup.', "don't ,stop , now !",
    '\0', 'a\0b', 'привет, 你好, こんにちは, مرحبا', '🤖👩‍👩‍👧🏽', 'e\u0301\u00e9',
    '\ufeff\u200b', '１２３ 42', '<|im_end', '| im_start |>'])
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_round_trips_any_text(tokenizer):
    rng = Random('any text')
    for _ in range(500):
        ranges = ((0, 128), (0, 0xD800), (0xE000, 0x110000))
        text = ''.join(
            chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token == '<|im_end|>'
    assert tokenizer.convert_tokens_to_ids(list(train_tiny_planner.SPECIAL_TOKENS)) == [0, 1, 2]
    assert len(tokenizer) == 1024
    as_text = tokenizer('<|im_end|>', split_special_tokens=True)['input_ids']
    assert not {0, 1, 2} & set(as_text)
    assert tokenizer.decode(as_text) == '<|im_end|>'


def test_template_is_that_of_the_training(tokenizer):
    chat = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Stop.'},
            {'role': 'assistant', 'content': '[]'}, {'role': 'user', 'content': 'Go.'}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == ''.join(
        train_tiny_planner.chat(**message) for message in chat) + train_tiny_planner.ANSWER


def test_batches_label_only_the_answers(tokenizer):
    batches = train_tiny_planner.Batches(
        tokenizer.backend_tokenizer, seed=3, steps=2, tokens=1024, lengths=[256, 512])
    ids, labels = batches[0]
    assert ids.shape == labels.shape == (4, 256)
    assert batches[1][0].shape == (2, 512)
    assert torch.equal(batches[0][0], ids)
    for row, row_labels in zip(ids, labels, strict=True):
        labelled = row_labels != train_tiny_planner.IGNORED
        assert torch.equal(row[labelled], row_labels[labelled])
        answers = tokenizer.decode(row_labels[labelled]).split('<|im_end|>')
        assert answers.pop() == ''
        text = tokenizer.decode(row)
        for answer in answers:
            assert isinstance(json.loads(answer), list)
            assert f'assistant\n{answer}<|im_end|>\n' in text


def test_held_out_pairs_are_not_in_the_training_data():
    trained = set().union(*(turn.pairs for turn in draw(False, 5000)))
    for turn in draw(True, 500):
        kept = {pair for pair in turn.pairs if planner_data.is_held_out(pair)}
        assert kept
        assert not kept & trained


def test_held_out_steps_are_not_in_the_training_plans():
    trained = {json.dumps(step) for turn in draw(False, 5000) for step in turn.plan}
    steps = [step for turn in draw(True, 500) for step in turn.plan]
    for step in steps:
        words = step.get('object', '').split(' ', 1)
        if len(words) == 2 and planner_data.is_held_out((words[0], words[1])):
            assert json.dumps(step) not in trained
    assert any(json.dumps(step) not in trained for step in steps)


def test_seed_determines_the_data():
    assert draw(False, 50) == draw(False, 50)
    assert draw(False, 50) != draw(False, 50, seed=2)


def test_answers_held_out_commands(answers):
    rng = Random('40 held-out commands')
    commands = [planner_data.turn(rng, held_out=True, commands_only=True) for _ in range(40)]
    texts = answers([evaluate_tiny_planner.messages(command) for command in commands])
    wrong = [(command.text, text, command.answer)
             for command, text in zip(commands, texts, strict=True) if text != command.answer]
    assert len(wrong) <= 0.02 * len(commands), wrong


@pytest.mark.parametrize(
    'text', ['Hello!', 'What time is it?', 'Where is the red cup?', 'Never mind.'])
def test_plans_nothing_without_a_command(answers, text):
    assert answers([[{'role': 'user', 'content': text}]]) == ['[]']
