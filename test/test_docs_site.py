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

"""The documentation builds as a site, and a broken link ends the build."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

for needed in ('mkdocs', 'material', 'mkdocstrings_handlers.python'):
    pytest.importorskip(needed, reason=f'no {needed}: pip install -r requirements-docs.txt')

ROOT = Path(__file__).resolve().parent.parent
BROKEN_LINKS = {
    'a page': '[one](nowhere.md)', 'a heading': '[one](index.md#nowhere)',
    'a file of the repository': '[one](../nowhere.py)', 'an absolute path': '[one](/nowhere)'}


def build(config, folder):
    """Build a site; return the exit code and the output."""
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--config-file', str(config),
         '--site-dir', str(folder)], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """Build the site, and return its folder."""
    folder = tmp_path_factory.mktemp('site')
    code, output = build(ROOT / 'mkdocs.yml', folder)
    assert code == 0, output
    return folder


def test_reference_pages_contain_the_code_and_the_messages(site):
    python = (site / 'reference' / 'python' / 'index.html').read_text()
    for name in ('physai_decode.engine.Engine.rewind', 'physai_decode.config.SamplingConfig'):
        assert f'id="{name}"' in python
    messages = (site / 'reference' / 'messages' / 'index.html').read_text()
    for path in (ROOT / 'physai_decode_msgs').glob('*/*.*'):
        assert path.read_text().splitlines()[0].strip('# ').split(' ')[0] in messages
        assert f'blob/main/physai_decode_msgs/{path.parent.name}/{path.name}' in messages
    assert '--8&lt;--' not in messages


def test_pages_load_nothing_from_the_internet(site):
    """A robot without internet shows them with their scripts, styles and fonts."""
    for page in site.rglob('*.html'):
        text = page.read_text()
        for start in ('<script src="http', '<script src="//', '<img src="http', '<img alt="http'):
            assert start not in text, page
        assert 'data-md-component="source"' not in text, page
        links = [part.split('>')[0] for part in text.split('<link ')[1:]]
        assert not [link for link in links if 'stylesheet' in link and '//' in link], page


def build_page(folder, link):
    """Build a site of one page with this link; return the exit code and the output."""
    (folder / 'docs').mkdir()
    (folder / 'docs' / 'index.md').write_text(f'# Start\n\nA link: {link}\n')
    config = folder / 'mkdocs.yml'
    config.write_text(f"""
INHERIT: {ROOT / 'mkdocs.yml'}
docs_dir: docs
hooks: [{ROOT / 'tools' / 'site_links.py'}]
plugins: []
extra_css: []
nav: [index.md]
""")
    return build(config, folder / 'site')


@pytest.fixture(scope='module')
def valid_page_builds(tmp_path_factory):
    """Check that only a broken link fails a page."""
    code, output = build_page(tmp_path_factory.mktemp('valid'), '[one](#start)')
    assert code == 0, output


@pytest.mark.parametrize('link', BROKEN_LINKS.values(), ids=BROKEN_LINKS)
def test_broken_link_ends_the_build(valid_page_builds, tmp_path, link):
    code, output = build_page(tmp_path, link)
    assert code != 0
    assert 'nowhere' in output
