"""The demo, as `make demo` runs it."""

from pathlib import Path
import re
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not Path(sys.executable).with_name('decode_node').exists(),
                    reason='the commands are not installed beside this Python')
def test_demo():
    """It shows the answer, its figures and a line of /diagnostics, and exits with 0."""
    result = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'demo.py')], capture_output=True, text=True,
        timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ''
    assert int(re.search(r'^output_tokens +(\d+)$', result.stdout, re.MULTILINE)[1]) > 1
    assert float(re.search(r'^itl_p50_ms +([\d.]+)$', result.stdout, re.MULTILINE)[1]) > 0
    assert float(re.search(r' r_floor=([\d.]+) ', result.stdout)[1]) > 0
    assert result.stdout.endswith('The node ended with code 0.\n')
