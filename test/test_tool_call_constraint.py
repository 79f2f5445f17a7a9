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

"""A constraint makes a model with random weights call a tool with valid arguments."""

from pathlib import Path

import jsonschema
from physai_decode import checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.constraint import ConstraintError
from physai_decode.constraint import Vocabulary
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engines.native.engine import NativeEngine
from physai_decode.request import Calls
from physai_decode.request import Form
from physai_decode.speech import Manner
from physai_decode.speech import PartKind
from physai_decode.speech import Speech
from physai_decode.speech import Thought
from physai_decode.tool_forms import TOOL_FORMS
import pytest
import random_model
from tokenizers import AddedToken
from tokenizers import Tokenizer

TOKENIZER = Path(checkpoint.__file__).parent / 'models' / 'tiny_planner' / 'tokenizer.json'
END, SIZE = 2, 1040
SAMPLINGS = [SamplingConfig(max_new_tokens=160),
             SamplingConfig(max_new_tokens=160, temperature=1.0, top_p=0.95, seed=3)]
TOOLS = tuple({'type': 'function', 'function': {'name': name, 'parameters': parameters}}
              for name, parameters in (
    ('go_to', {'type': 'object', 'properties': {
        'room': {'enum': ['hall', 'kitchen']}, 'speed': {
            'type': 'integer', 'minimum': 0, 'maximum': 9}}, 'required': ['room', 'speed']}),
    ('pick', {'properties': {'object': {'type': 'string', 'pattern': '^[a-z"]{1,8}$'}},
              'required': ['object'], 'additionalProperties': False}),
    ('wait', {})))
THOUGHT_MARKERS = '<think>', '</think>'
CALL_MARKERS = ('<tool_call>', '</tool_call>', '[TOOL_CALLS]', '[ARGS]')


def tokenizer_with(*names):
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return tokenizer


@pytest.fixture(scope='module')
def loop(tmp_path_factory):
    folder = random_model.save(tmp_path_factory.mktemp('model'), 'llama', 5, vocab_size=SIZE)
    loop = DecodeLoop(NativeEngine(checkpoint.inspect(folder), EngineConfig(
        device='cpu', dtype='float32'), lambda text: None))
    yield loop
    loop.engine.close()


def decode(loop, tokenizer, form, sampling, prompt, thought=None):
    """Return an answer's text, and whether it ended before the token limit."""
    vocabulary = Vocabulary(tokenizer, SIZE, (END,))
    constraint = vocabulary.constraint(form, thought)
    ids = [id_ for step in loop.stream(prompt, sampling, constraint) for id_ in step.token_ids]
    return tokenizer.decode([id_ for id_ in ids if id_ != END], skip_special_tokens=False), \
        constraint.ended or END in ids


@pytest.mark.parametrize('added', [(), CALL_MARKERS], ids=['text', 'tokens'])
@pytest.mark.parametrize('form', TOOL_FORMS)
def test_required_call_is_valid(loop, form, added):
    tokenizer, ends = tokenizer_with(*added), 0
    for index, sampling in enumerate(SAMPLINGS * 3):
        for tool in (*TOOLS, None):
            calls = Calls(form, TOOLS if tool is None else (tool,), tool is not None)
            text, ended = decode(loop, tokenizer, Form('calls', calls, 'tool_choice'), sampling,
                                 (5, 6, 7 + index))
            speech = Speech(Manner(form=form), [each['function']['name'] for each in TOOLS])
            parts = speech.push(text) + speech.flush()
            found = [part.call for part in parts if part.kind is PartKind.CALL]
            schemas = {each['function']['name']: each['function']['parameters']
                       for each in calls.tools}
            for call in found:
                jsonschema.Draft202012Validator(schemas[call.name]).validate(call.arguments)
            if tool is not None:
                assert ended
                assert len(found) == 1
            if ended:
                assert found
                assert {part.kind for part in parts} == {PartKind.CALL}
            ends += ended
    assert ends >= 18


@pytest.mark.parametrize('added', [(), THOUGHT_MARKERS], ids=['text', 'tokens'])
@pytest.mark.parametrize('form', [
    Form('json_schema', {'type': 'boolean'}, 'name'), Form('regex', '[0-9]{3}', 'name'),
    Form('choice', ['yes', 'no'], 'name'), Form('grammar', 'root ::= "go" | "stop"', 'name'),
    Form('calls', Calls('hermes', TOOLS[1:2], True), 'name')], ids=lambda form: form.kind)
def test_constraint_begins_after_the_thought(form, added):
    tokenizer = tokenizer_with(*added)
    vocabulary = Vocabulary(tokenizer, SIZE, (END,))
    plain = vocabulary.constraint(form).mask()
    for thought, text in ((Thought(*THOUGHT_MARKERS, True), 'so\n</think>\n\n'),
                          (Thought(*THOUGHT_MARKERS, False), '<think>\nso\n</think>\n\n'),
                          (Thought(*THOUGHT_MARKERS, False), '')):
        constraint = vocabulary.constraint(form, thought)
        for id_ in tokenizer.encode(text, add_special_tokens=False).ids:
            mask = constraint.mask()
            assert mask[id_ >> 3] >> (id_ & 7) & 1, (text, id_)
            assert not mask[END >> 3] >> (END & 7) & 1
            constraint.accept(id_)
        after = constraint.mask()
        lost = [byte & ~other for byte, other in zip(plain, after)]
        assert not any(lost)
        if text:                    # one more blank is allowed, and no other thought
            assert sum(byte.bit_count() for byte in after) <= \
                sum(byte.bit_count() for byte in plain) + 120


def test_constraint_holds_after_a_random_thought(loop):
    tokenizer = tokenizer_with(*THOUGHT_MARKERS)
    for index in range(6):
        text, ended = decode(
            loop, tokenizer, Form('choice', ['yes', 'no'], 'name'),
            SamplingConfig(max_new_tokens=400, temperature=3.0, seed=index), (5, 6),
            Thought(*THOUGHT_MARKERS, True))
        _, _, answer = text.partition('</think>')
        assert not ended or answer.strip() in ('yes', 'no')


def test_thought_ends_at_a_marker_in_letters():
    """The text after it is the answer, as the parser of the answer reads it."""
    tokenizer = tokenizer_with(*THOUGHT_MARKERS)
    constraint = Vocabulary(tokenizer, SIZE, (END,)).constraint(
        Form('choice', ['yes'], 'name'), Thought(*THOUGHT_MARKERS, True))
    for letter in 'so</think>yes':
        constraint.accept(*tokenizer.encode(letter, add_special_tokens=False).ids)
    assert constraint.ended


def test_rejects_a_schema_keyword_that_is_not_enforced():
    tool = {'type': 'function', 'function': {'name': 'a', 'parameters': {
        'type': 'object', 'not': {}}}}
    with pytest.raises(ConstraintError, match=r'tools\[0\].function.parameters has the key'):
        Vocabulary(tokenizer_with(), SIZE, (END,)).constraint(
            Form('calls', Calls('hermes', (tool,), True), 'tool_choice'))
