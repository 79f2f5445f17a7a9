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

"""The documentation builds as a site, and a link that leads nowhere ends the build."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

for needed in ('mkdocs', 'material', 'mkdocstrings_handlers.python'):
    pytest.importorskip(needed, reason=f'no {needed}: pip install -r requirements-docs.txt')

ROOT = Path(__file__).resolve().parent.parent
WRONG = {
    'a page': '[one](nowhere.md)', 'a heading': '[one](index.md#nowhere)',
    'a file of the repository': '[one](../nowhere.py)', 'an absolute path': '[one](/nowhere)'}


def build(config, folder):
    """Build a site; gives the exit code, and what was said."""
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--config-file', str(config),
         '--site-dir', str(folder)], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """Give the folder of the built site."""
    folder = tmp_path_factory.mktemp('site')
    code, said = build(ROOT / 'mkdocs.yml', folder)
    assert code == 0, said
    return folder


def test_pages_name_what_they_are_made_from(site):
    """The code's own docstrings and the files of the messages are in their pages."""
    python = (site / 'reference' / 'python' / 'index.html').read_text()
    for name in ('physai_decode.engine.Engine.rewind', 'physai_decode.config.SamplingConfig'):
        assert f'id="{name}"' in python
    messages = (site / 'reference' / 'messages' / 'index.html').read_text()
    for path in (ROOT / 'physai_decode_msgs').glob('*/*.*'):
        assert path.read_text().splitlines()[0].strip('# ').split(' ')[0] in messages
        assert f'blob/main/physai_decode_msgs/{path.parent.name}/{path.name}' in messages
    assert '--8&lt;--' not in messages


def test_no_page_fetches_from_elsewhere(site):
    """Scripts, styles and fonts are the site's own, so a robot without internet shows them."""
    for page in site.rglob('*.html'):
        text = page.read_text()
        for start in ('<script src="http', '<script src="//', '<img src="http', '<img alt="http'):
            assert start not in text, page
        assert 'data-md-component="source"' not in text, page
        links = [part.split('>')[0] for part in text.split('<link ')[1:]]
        assert not [link for link in links if 'stylesheet' in link and '//' in link], page


@pytest.mark.parametrize('wrong', WRONG.values(), ids=WRONG)
def test_a_link_that_leads_nowhere_ends_the_build(tmp_path, wrong):
    """Whatever it leads to."""
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs' / 'index.md').write_text(f'# Start\n\nA link: {wrong}\n')
    config = tmp_path / 'mkdocs.yml'
    config.write_text(f"""
INHERIT: {ROOT / 'mkdocs.yml'}
docs_dir: docs
hooks: [{ROOT / 'tools' / 'site_links.py'}]
plugins: []
extra_css: []
nav: [index.md]
""")
    code, said = build(config, tmp_path / 'site')
    assert code != 0
    assert 'nowhere' in said
    (tmp_path / 'docs' / 'index.md').write_text('# Start\n\nA link: [one](#start)\n')
    assert build(config, tmp_path / 'site')[0] == 0
