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

"""Chat templates need a jinja2 whose sandbox has no published escape."""

from pathlib import Path
import re
from xml.etree import ElementTree

from physai_decode import chat_template
from physai_decode.config import ChatConfig
from physai_decode.text import Text
from physai_decode.tokenizer_files import load_tokenizer
from physai_decode.tokenizer_files import TextError
import pytest

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = '.'.join(map(str, chat_template.SANDBOX))


@pytest.fixture(scope='module')
def tokenizer():
    """Load the tokenizer of the embedded model, which has a template."""
    return load_tokenizer(str(ROOT / 'physai_decode' / 'models' / 'tiny_planner'))


@pytest.mark.parametrize('version', ['3.0.3', '3.1.2', '3.1.5', '2.11'])
def test_rejects_an_older_jinja2(tokenizer, monkeypatch, version):
    """Ubuntu 22.04 and 24.04 have such versions; without a template, any version works."""
    monkeypatch.setattr(chat_template, 'version', lambda name: version)
    with pytest.raises(TextError, match=f'jinja2 {version}: .*>=3.1.6.*chat.template to off'):
        Text(tokenizer, ChatConfig())
    Text(tokenizer, ChatConfig(template='off'))


@pytest.mark.parametrize('version', ['3.1.6', '3.1.10', '3.2', '4.0.0'])
def test_accepts_a_newer_jinja2(tokenizer, monkeypatch, version):
    """Versions are compared as numbers: 3.1.10 is newer than 3.1.6."""
    monkeypatch.setattr(chat_template, 'version', lambda name: version)
    Text(tokenizer, ChatConfig())


def test_requirements_name_the_minimum_version():
    """Each file that requires jinja2 requires the version that templates need."""
    manifest = ElementTree.parse(ROOT / 'package.xml').getroot()
    depend, = (each for each in manifest.iter('exec_depend') if each.text == 'python3-jinja2')
    assert depend.get('version_gte') == MINIMUM
    pinned = re.search(r'^jinja2==(.+)$', (ROOT / 'constraints.txt').read_text(), re.MULTILINE)[1]
    assert tuple(map(int, pinned.split('.'))) >= chat_template.SANDBOX
    for name in ('setup.py', 'docs/install.md'):
        versions = re.findall(r"'jinja2>=([\d.]+)'", (ROOT / name).read_text())
        assert set(versions) == {MINIMUM}, name
