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
QUICK = '{% if quick is defined %}{{ quick | tojson }}{% endif %}'
SWITCHED = QUICK + ''.join(
    f'{{%- if bomb == {name!r} %}}{bomb}{{% endif %}}' for name, bomb in DELAYED_BOMBS.items())
BLOW_UP = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 10 * 'a'}


@pytest.fixture(scope='module', autouse=True)
def low_cpu_limits():
    """Lower the limits on CPU time, which does not depend on how busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_process, 'LOAD_CPU_S', 5.0)
        patch.setattr(text_process, 'PROMPT_CPU_S', 1.0)
        patch.setattr(text_process, '_START', text_process._START.replace(
            'serve()', 'from physai_decode import text_process as own; '
            'own.PROMPT_CPU_S = 1.0; serve()'))
        yield


def copy(folder, before='', **changes):
    """Copy the tokenizer of the embedded model, with these changes; return the folder."""
    source = checkpoint.open('builtin:tiny_planner').folder
    shutil.copy(source / 'config.json', folder)
    content = json.loads((source / 'tokenizer_config.json').read_text())
    content['chat_template'] = before + content['chat_template']
    (folder / 'tokenizer_config.json').write_text(json.dumps(content))
    state = json.loads((source / 'tokenizer.json').read_text())
    (folder / 'tokenizer.json').write_text(json.dumps({**state, **changes}))
    return str(folder)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a folder whose template runs a bomb if a request asks for it."""
    return copy(tmp_path_factory.mktemp('model'), SWITCHED)


@pytest.fixture(scope='module')
def text(folder):
    """Return the process of that folder; each test leaves it usable."""
    process = TextProcess(folder, ChatConfig())
    yield process
    process.close()


def test_returns_what_text_returns(text, tmp_path):
    """It encodes, raises and decodes like `Text` in this process."""
    process, text = text, Text(load_tokenizer(copy(tmp_path, QUICK)), ChatConfig())
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


@pytest.mark.slow
@pytest.mark.parametrize('bomb', ['power', 'memory'])
def test_rejects_a_template_that_exceeds_a_limit_at_the_load(tmp_path, bomb):
    with pytest.raises(TextError, match='chat template takes more than .* chat.template to off'):
        TextProcess(copy(tmp_path, BOMBS[bomb]), ChatConfig())


@pytest.mark.parametrize('bomb', BOMBS)
def test_rejects_a_prompt_that_exceeds_a_limit(text, bomb):
    """The next prompt is encoded."""
    expected = text.encode(MESSAGES)
    with pytest.raises(TextError, match=r'takes more than \d+ (MB|s of CPU).* chat.template'):
        text.encode(MESSAGES, {'bomb': bomb})
    assert text.encode(MESSAGES) == expected


@pytest.mark.parametrize('changes', [
    {'normalizer': {'type': 'Sequence', 'normalizers': 12 * [BLOW_UP]}},
    {'decoder': {'type': 'Sequence', 'decoders': 12 * [BLOW_UP]}}])
def test_rejects_a_tokenizer_that_expands_text_endlessly(tmp_path, changes):
    with pytest.raises(TextError, match=f'{tmp_path}: .*takes more than .*choose another model'):
        TextProcess(copy(tmp_path, 'a', **changes), ChatConfig())


def test_rejects_a_decoder_with_a_regular_expression(tmp_path):
    """It would run in the parent, without limits."""
    with pytest.raises(TextError, match='decoder has a regular expression.*another model'):
        TextProcess(copy(tmp_path, decoder={**BLOW_UP, 'pattern': {'Regex': '(a|aa)+$'}}),
                    ChatConfig())


def test_rejects_files_that_are_too_large(tmp_path):
    (tmp_path / 'vocab.txt').symlink_to('nowhere')
    (tmp_path / 'vocab.json').touch()
    os.truncate(tmp_path / 'vocab.json', 200_000_000)
    with pytest.raises(TextError, match=f'{tmp_path}.* have 200 MB, and 100 MB are allowed'):
        TextProcess(copy(tmp_path), ChatConfig())


@pytest.mark.parametrize('bomb', ['hang', 'power'])
def test_cancels_while_a_template_renders(text, bomb):
    class Cancelled(Exception):
        pass

    def heartbeat():
        raise Cancelled

    with pytest.raises(Cancelled):
        text.encode(MESSAGES, {'bomb': bomb}, heartbeat)
    assert text.encode(MESSAGES)


def test_replaces_a_child_that_was_killed(text):
    expected = text.encode(MESSAGES)
    os.kill(text._process.pid, signal.SIGKILL)
    text._process.wait()
    assert text.encode(MESSAGES) == expected


def test_says_that_a_child_was_killed_while_it_works(text):
    """As the kernel does if the machine has no memory left."""
    with pytest.raises(TextError, match='cannot be encoded: its process was killed: try again'):
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
def test_child_ends_if_its_parent_is_killed(folder, bomb):
    """The child is idle, or computes."""
    parent = subprocess.Popen([sys.executable, '-c', SCRIPT + 'input()', folder, bomb],
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


def test_child_gets_no_ctrl_c_from_the_terminal(text):
    """It has a session of its own, without a terminal."""
    assert os.getsid(text._process.pid) == text._process.pid != os.getsid(0)
