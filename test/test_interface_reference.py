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

"""docs/interface.md agrees with the code that tools/make_interface_reference.py reads."""

from importlib.util import module_from_spec
from importlib.util import spec_from_file_location
from pathlib import Path
import subprocess
import sys

import pytest

TOOL = Path(__file__).resolve().parent.parent / 'tools' / 'make_interface_reference.py'


@pytest.fixture
def tool():
    """Import the tool."""
    spec = spec_from_file_location('make_interface_reference', TOOL)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_current():
    """If this fails, run the tool and commit the page."""
    done = subprocess.run(
        [sys.executable, str(TOOL), '--check'], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_check_finds_a_stale_page(tool, tmp_path, monkeypatch):
    """The page is missing, or has an old default; the tool rewrites it."""
    current = tool.PAGE.read_text()
    monkeypatch.setattr(tool, 'PAGE', tmp_path / 'interface.md')
    assert tool.main(['--check']) == 1
    tool.PAGE.write_text(current.replace('`256`', '`255`'))
    assert tool.main(['--check']) == 1
    assert tool.main([]) == 0
    assert tool.PAGE.read_text() == current


def test_names_and_sentences_must_match(tool):
    """The tool rejects a name without a sentence, and a sentence without a name."""
    with pytest.raises(SystemExit, match='itl_ms'):
        tool.described(tool.DESCRIPTIONS, set(tool.DESCRIPTIONS) - {'itl_ms'})
    with pytest.raises(SystemExit, match='another'):
        tool.described(tool.DESCRIPTIONS, {*tool.DESCRIPTIONS, 'another'})


def test_writes_values_as_in_a_params_file(tool):
    """Floats have no exponent and are not rounded."""
    assert [tool.written(value) for value in (0.01, 1e9, 3.0, True, 7, '', ())] == [
        '0.01', '1000000000.0', '3.0', 'true', '7', "''", '[]']
