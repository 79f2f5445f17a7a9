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

"""`TextProcess`: limits on malicious model files, and the end of its child process."""

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

MESSAGES = [Message('user', 'Bring me the red cup.')]
ENDLESS_LOOP = (
    '{%- for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}'
    '{% endfor %}{% endfor %}{% endfor %}')
HOLDS_THE_LOCK = '{{ 9 ** (9 ** 9) }}'
BOMBS = {'hang': ENDLESS_LOOP, 'power': HOLDS_THE_LOCK, 'memory': "{{ 'x' * 10 ** 10 }}"}
# They run only if a request asks for it. (jinja2 would compute a power of constants early.)
DELAYED_BOMBS = {**BOMBS, 'power': '{% set n = 9 %}{{ n ** (n ** n) }}'}
SWITCHED = ''.join(f'{{%- if bomb == {name!r} %}}{bomb}{{% endif %}}'
                   for name, bomb in DELAYED_BOMBS.items())
BLOW_UP = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 10 * 'a'}


@pytest.fixture(autouse=True)
def low_cpu_limit(monkeypatch):
    """Lower the limit on CPU time, which does not depend on how busy the machine is."""
    monkeypatch.setattr(text_process, 'LOAD_CPU_S', 5.0)


@pytest.fixture
def folder(tmp_path):
    """Copy the tokenizer of the embedded model."""
    source = checkpoint.open('builtin:tiny_planner').folder
    for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(source / name, tmp_path)
    return tmp_path


@pytest.fixture
def make(folder):
    """Return a function that starts the process with a changed template and tokenizer."""
    processes = []

    def begin(before='', **changes):
        settings = folder / 'tokenizer_config.json'
        content = json.loads(settings.read_text())
        content['chat_template'] = before + content['chat_template']
        settings.write_text(json.dumps(content))
        state = json.loads((folder / 'tokenizer.json').read_text())
        (folder / 'tokenizer.json').write_text(json.dumps({**state, **changes}))
        processes.append(TextProcess(str(folder), ChatConfig()))
        return processes[-1]

    yield begin
    for each in processes:
        each.close()


def test_returns_what_text_returns(make, folder):
    """It encodes, raises and decodes like `Text` in this process."""
    process = make('{% if quick is defined %}{{ quick | tojson }}{% endif %}')
    text = Text(load_tokenizer(str(folder)), ChatConfig())
    for content in (
            'Bring me the red cup.', '', '<|im_end|>', '\0 你好 🤖 \n', 'many words ' * 9999):
        messages = [Message('system', 'Be quick.'), Message('user', content)]
        for kwargs in ({}, {'quick': True}, {'quick': [None, 1.5, {'a': 'é'}]}):
            assert process.encode(messages, kwargs) == text.encode(messages, kwargs)
    for messages, kwargs in (([Message('user', 'a\ud83e')], {}), (MESSAGES, {'self': 1})):
        with pytest.raises(TextError) as in_child:
            process.encode(messages, kwargs)
        with pytest.raises(TextError) as here:
            text.encode(messages, kwargs)
        assert str(in_child.value) == str(here.value)
    ours, theirs = process.detokenizer(), text.detokenizer()
    ids = text.encode(MESSAGES)
    assert [ours.push(id_) for id_ in ids] == [theirs.push(id_) for id_ in ids]


@pytest.mark.parametrize('bomb', BOMBS)
def test_rejects_a_template_that_exceeds_a_limit_at_the_load(make, bomb):
    with pytest.raises(TextError, match='chat template takes more than .* chat.template to off'):
        make(BOMBS[bomb])


@pytest.mark.parametrize('bomb', BOMBS)
def test_rejects_a_prompt_that_exceeds_a_limit(make, bomb):
    """The next prompt is encoded."""
    text = make(SWITCHED)
    expected = text.encode(MESSAGES)
    with pytest.raises(TextError, match=r'takes more than \d+ (MB|s of CPU).* chat.template'):
        text.encode(MESSAGES, {'bomb': bomb})
    assert text.encode(MESSAGES) == expected


@pytest.mark.parametrize('changes', [
    {'normalizer': {'type': 'Sequence', 'normalizers': 12 * [BLOW_UP]}},
    {'decoder': {'type': 'Sequence', 'decoders': 12 * [BLOW_UP]}}])
def test_rejects_a_tokenizer_that_expands_text_endlessly(make, folder, changes):
    with pytest.raises(TextError, match=f'{folder}: .*takes more than .*choose another model'):
        make('a', **changes)


def test_rejects_a_decoder_with_a_regular_expression(make):
    """It would run in the parent, without limits."""
    with pytest.raises(TextError, match='decoder has a regular expression.*another model'):
        make(decoder={**BLOW_UP, 'pattern': {'Regex': '(a|aa)+$'}})


def test_rejects_files_that_are_too_large(make, folder):
    (folder / 'vocab.txt').symlink_to('nowhere')
    (folder / 'vocab.json').touch()
    os.truncate(folder / 'vocab.json', 200_000_000)
    with pytest.raises(TextError, match=f'{folder}.* have 200 MB, and 100 MB are allowed'):
        make()


@pytest.mark.parametrize('bomb', ['hang', 'power'])
def test_cancels_while_a_template_renders(make, bomb):
    class Cancelled(Exception):
        pass

    def heartbeat():
        raise Cancelled

    text = make(SWITCHED)
    with pytest.raises(Cancelled):
        text.encode(MESSAGES, {'bomb': bomb}, heartbeat)
    assert text.encode(MESSAGES)


def test_replaces_a_child_that_was_killed(make):
    text = make()
    expected = text.encode(MESSAGES)
    os.kill(text._process.pid, signal.SIGKILL)
    text._process.wait()
    assert text.encode(MESSAGES) == expected


def test_says_that_a_child_was_killed_while_it_works(make):
    """As the kernel does if the machine has no memory left."""
    text = make(SWITCHED)
    with pytest.raises(TextError, match='can not be encoded: its process was killed: try again'):
        text.encode(MESSAGES, {'bomb': 'hang'}, lambda: text._process.kill())
    assert text.encode(MESSAGES)


SCRIPT = """
import sys, threading
from physai_decode.config import ChatConfig
from physai_decode.request import Message
from physai_decode.text_process import TextProcess
made = []
starting = threading.Thread(target=lambda: made.append(TextProcess(sys.argv[1], ChatConfig())))
starting.start()
starting.join()                 # the child must outlive this thread
text = made[0]
text.encode([Message('user', 'a')])
print(text._process.pid, flush=True)
text.encode([Message('user', 'a')], {'bomb': sys.argv[2]})
"""


@pytest.mark.parametrize('bomb', ['', 'power'])
def test_child_ends_if_its_parent_is_killed(make, folder, bomb):
    """The child is idle, or computes."""
    make(SWITCHED)
    parent = subprocess.Popen([sys.executable, '-c', SCRIPT + 'input()', str(folder), bomb],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    while bomb and open(f'/proc/{child}/stat').read().split()[2] != 'R':
        time.sleep(0.01)        # until the child computes
    watched = os.pidfd_open(child)
    parent.kill()
    parent.communicate()
    ended, _, _ = select.select([watched], [], [], 60)
    os.close(watched)
    assert ended


def test_child_gets_no_ctrl_c_from_the_terminal(make):
    """It has a session of its own, without a terminal."""
    text = make()
    assert os.getsid(text._process.pid) == text._process.pid != os.getsid(0)
