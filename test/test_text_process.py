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

"""A model whose files are made to hang or to fill the memory, and a child that always ends."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

from physai_decode import checkpoint
from physai_decode import text_process
from physai_decode.config import ChatConfig
from physai_decode.request import Message
from physai_decode.text import Text
from physai_decode.text_process import TextProcess
from physai_decode.tokenizer_files import load_tokenizer
from physai_decode.tokenizer_files import TextError
import pytest

ASKED = [Message('user', 'Bring me the red cup.')]
FOR_EVER = ('{%- for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}'
            '{% endfor %}{% endfor %}{% endfor %}')
HOLDS_THE_LOCK = '{{ 9 ** (9 ** 9) }}'
BOMBS = {'hang': FOR_EVER, 'power': HOLDS_THE_LOCK, 'memory': "{{ 'x' * 10 ** 10 }}"}
# Harmless until a request says so. (Of constants, jinja2 computes a power when it compiles.)
BOMBS_OF_VARIABLES = {**BOMBS, 'power': '{% set n = 9 %}{{ n ** (n ** n) }}'}
SWITCHED = ''.join(f'{{%- if bomb == {name!r} %}}{bomb}{{% endif %}}'
                   for name, bomb in BOMBS_OF_VARIABLES.items())
BLOW_UP = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 10 * 'a'}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Let nothing take long: of CPU time, so that a busy machine takes nothing from it."""
    monkeypatch.setattr(text_process, 'LOAD_CPU_S', 5.0)


@pytest.fixture
def folder(tmp_path):
    """Give a copy of the embedded model's tokenizer."""
    source = checkpoint.open('builtin:tiny_planner').folder
    for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(source / name, tmp_path)
    return tmp_path


@pytest.fixture
def make(folder):
    """Give a function that starts the process with changes to the template and the tokenizer."""
    made = []

    def begin(before='', **changes):
        settings = folder / 'tokenizer_config.json'
        content = json.loads(settings.read_text())
        content['chat_template'] = before + content['chat_template']
        settings.write_text(json.dumps(content))
        state = json.loads((folder / 'tokenizer.json').read_text())
        (folder / 'tokenizer.json').write_text(json.dumps({**state, **changes}))
        made.append(TextProcess(str(folder), ChatConfig()))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def test_it_gives_what_text_gives(make, folder):
    """Ids of texts of all kinds, variables of the template, refusals, and the text of ids."""
    process = make('{% if quick is defined %}{{ quick | tojson }}{% endif %}')
    text = Text(load_tokenizer(str(folder)), ChatConfig())
    for said in ('Bring me the red cup.', '', '<|im_end|>', '\0 你好 🤖 \n', 'many words ' * 9999):
        messages = [Message('system', 'Be quick.'), Message('user', said)]
        for kwargs in ({}, {'quick': True}, {'quick': [None, 1.5, {'a': 'é'}]}):
            assert process.encode(messages, kwargs) == text.encode(messages, kwargs)
    for messages, kwargs in (([Message('user', 'a\ud83e')], {}), (ASKED, {'self': 1})):
        with pytest.raises(TextError) as there:
            process.encode(messages, kwargs)
        with pytest.raises(TextError) as here:
            text.encode(messages, kwargs)
        assert str(there.value) == str(here.value)
    ours, theirs = process.detokenizer(), text.detokenizer()
    ids = text.encode(ASKED)
    assert [ours.push(id_) for id_ in ids] == [theirs.push(id_) for id_ in ids]


@pytest.mark.parametrize('bomb', BOMBS)
def test_a_template_that_is_a_bomb_does_not_load(make, bomb):
    with pytest.raises(TextError, match='chat template takes more than .* chat.template to off'):
        make(BOMBS[bomb])


@pytest.mark.parametrize('bomb', BOMBS)
def test_a_prompt_that_sets_a_bomb_off_is_refused(make, bomb):
    """And the next prompt is answered."""
    text = make(SWITCHED)
    expected = text.encode(ASKED)
    with pytest.raises(TextError, match=r'takes more than \d+ (MB|s of CPU).* chat.template'):
        text.encode(ASKED, {'bomb': bomb})
    assert text.encode(ASKED) == expected


@pytest.mark.parametrize('changes', [
    {'normalizer': {'type': 'Sequence', 'normalizers': 12 * [BLOW_UP]}},
    {'decoder': {'type': 'Sequence', 'decoders': 12 * [BLOW_UP]}}])
def test_a_tokenizer_that_blows_text_up_does_not_load(make, folder, changes):
    with pytest.raises(TextError, match=f'{folder}: .*takes more than .*choose another model'):
        make('a', **changes)


def test_a_decoder_with_a_regular_expression_is_refused(make):
    """It would run in the parent, and may take for ever."""
    with pytest.raises(TextError, match='decoder has a regular expression.*another model'):
        make(decoder={**BLOW_UP, 'pattern': {'Regex': '(a|aa)+$'}})


def test_files_that_are_too_large_are_refused_unread(make, folder):
    (folder / 'vocab.txt').symlink_to('nowhere')
    (folder / 'vocab.json').touch()
    os.truncate(folder / 'vocab.json', 200_000_000)
    with pytest.raises(TextError, match=f'{folder}.* have 200 MB, and 100 MB are allowed'):
        make()


@pytest.mark.parametrize('bomb', ['hang', 'power'])
def test_a_cancel_is_heard_while_a_template_renders(make, bomb):
    class Cancelled(Exception):
        pass

    def heartbeat():
        raise Cancelled

    text = make(SWITCHED)
    with pytest.raises(Cancelled):
        text.encode(ASKED, {'bomb': bomb}, heartbeat)
    assert text.encode(ASKED)


def test_a_child_that_was_killed_is_replaced(make):
    text = make()
    expected = text.encode(ASKED)
    os.kill(text._process.pid, signal.SIGKILL)
    text._process.wait()
    assert text.encode(ASKED) == expected


SCRIPT = """
import sys, threading
from physai_decode.config import ChatConfig
from physai_decode.request import Message
from physai_decode.text_process import TextProcess
made = []
starting = threading.Thread(target=lambda: made.append(TextProcess(sys.argv[1], ChatConfig())))
starting.start()
starting.join()                 # the child outlives the thread that started it
text = made[0]
text.encode([Message('user', 'a')])
print(text._process.pid, flush=True)
text.encode([Message('user', 'a')], {'bomb': sys.argv[2]})
"""


@pytest.mark.parametrize('bomb', ['', 'power'])
def test_no_child_outlives_its_parent(make, folder, bomb):
    """Be that killed, and the child idle or deep in a computation."""
    make(SWITCHED)
    parent = subprocess.Popen([sys.executable, '-c', SCRIPT + 'input()', str(folder), bomb],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    while bomb and open(f'/proc/{child}/stat').read().split()[2] != 'R':
        time.sleep(0.01)        # till it works
    watched = os.pidfd_open(child)
    parent.kill()
    parent.communicate()
    ended, _, _ = select.select([watched], [], [], 60)
    os.close(watched)
    assert ended


def test_ctrl_c_in_the_terminal_is_not_for_the_child(make):
    """It is in no session that has one."""
    text = make()
    assert os.getsid(text._process.pid) == text._process.pid != os.getsid(0)
