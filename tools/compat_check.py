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

"""
`make compat`: compile the native engine's kernels with each Triton for each GPU, without a GPU.

Each version of Triton is installed into its own folder in .venv-compat and kept there. The table
has a column per compute capability: `yes`; `-` if that Triton does not support the GPU; `no` for a
known failure; `NO` for an unexpected one. Arguments select versions, such as 3.4; by default, all
in VERSIONS run. This takes an hour on two cores. Compiled kernels are kept in .venv-compat.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
import os
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / '.venv-compat'
VERSIONS = ('3.1', '3.2', '3.3', '3.4', '3.5', '3.6', '3.7', '3.8', '3.9')
CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 110, 120)
UNKNOWN = "is not defined for option 'gpu-name'"       # error of ptxas for an unknown GPU
KNOWN_FAILURES = {('3.3', 75)}      # the engine reports it and does not use Triton
TIMEOUT_S = 900


def install(version: str) -> Path | None:
    """Install a version of Triton; return None if PyPI has none for this Python."""
    folder = FOLDER / version
    if not (folder / 'triton').is_dir():
        done = subprocess.run(
            [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet',
             '--no-deps', '--target', str(folder), f'triton=={version}.*'],
            stdin=subprocess.DEVNULL)
        if done.returncode:
            return None
    return folder


def check(folder: Path, capability: int) -> str:
    """Compile all kernels with a Triton for a capability; return the cell of the table."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ('TRITON_INTERPRET', 'PHYSAI_DECODE_CAPABILITY')}
    environment |= {'PYTHONPATH': f'{folder}:{ROOT}', 'TRITON_CACHE_DIR': str(FOLDER / 'cache'),
                    'TRITON_DISABLE_LINE_INFO': '1'}
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / 'test' / 'compile_kernels.py'), str(capability)],
            env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f'NO: it took more than {TIMEOUT_S} s'
    if done.stdout.splitlines()[-1:] == ['compiled']:
        return 'yes'
    if UNKNOWN in done.stderr:
        return '-'
    if (folder.name, capability) in KNOWN_FAILURES:
        return 'no'
    return f'NO: {(done.stderr.strip().splitlines() or ["no message"])[-1]}'


def main() -> int:
    """Print the table; return 1 after an unexpected failure."""
    versions = sys.argv[1:] or VERSIONS
    heads = [f'{capability / 10}' for capability in CAPABILITIES]
    print(f'| Triton | {" | ".join(heads)} |\n|---|{"---|" * len(heads)}', flush=True)
    failures = []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        for version in versions:
            folder = install(version)
            if folder is None:
                print(f'| {version} | PyPI has none for this Python |', flush=True)
                continue
            print(f'| {version} |', end='', flush=True)
            for head, cell in zip(heads, pool.map(partial(check, folder), CAPABILITIES)):
                print(f' {cell[:3].rstrip(":")} |', end='', flush=True)
                if cell.startswith('NO'):
                    failures.append(f'{version}, {head}: {cell}')
            print(flush=True)
    print(*failures, sep='\n')
    return bool(failures)


if __name__ == '__main__':
    sys.exit(main())
