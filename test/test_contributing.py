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

"""docs/contributing: the Python code on the pages runs, and the files that they name exist."""

import os
from pathlib import Path
import re
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / 'docs' / 'contributing').glob('*.md'))
NEW = re.compile('acme|rows8|bigram')               # files that the examples add


def test_the_index_links_each_page():
    index = (ROOT / 'docs' / 'contributing' / 'index.md').read_text()
    for page in PAGES:
        assert page.name == 'index.md' or f'({page.name})' in index


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_named_files_exist(page):
    for name in re.findall(r'\b(?:physai_decode|physai_decode_msgs|test|tools)/[\w/.]*\w',
                           page.read_text()):
        assert NEW.search(name) or (ROOT / name).exists(), name


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_the_python_code_runs(page):
    """The code blocks of a page run in order, as one program."""
    code = '\n'.join(re.findall(r'^```python\n(.+?)^```', page.read_text(), re.M | re.S))
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=600,
        env={**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "test"}'})
    assert done.returncode == 0, done.stderr
