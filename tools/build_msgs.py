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
`make msgs`: build the interface package with the ROS 2 wheels and install it beside them.

The package goes into the virtual environment of the running Python, beside the message packages
of the wheels, so it needs no sourcing. With a ROS 2 distribution, use colcon instead; see
docs/install.md.

    .venv/bin/python tools/build_msgs.py            build and install
    .venv/bin/python tools/build_msgs.py --check    list what is missing; exit code 1 if any
"""

import os
from pathlib import Path
import shutil
import subprocess
import sys
import sysconfig
import time

ROOT = Path(__file__).resolve().parent.parent
PREFIX = Path(sys.prefix)
NAME = 'physai_decode_msgs'
BUILD = PREFIX / 'build' / NAME         # in the environment, because it contains its paths
# Variable with the tool for CMake, name that CMake searches for by default, Debian package.
TOOLS = (('', ('cmake',), 'cmake'), ('CC', ('cc', 'gcc', 'clang'), 'gcc'),
         ('CXX', ('c++', 'g++', 'clang++'), 'g++'))
INSTALLED = (
    f'include/{NAME}', f'lib/lib{NAME}__*', f'share/{NAME}',
    f'share/ament_index/resource_index/*/{NAME}', f'lib/python*/site-packages/{NAME}',
    f'lib/python*/site-packages/{NAME}-*')


def missing() -> list[str]:
    """Return the missing Debian packages that the build needs."""
    packages = [package for variable, names, package in TOOLS
                if not os.environ.get(variable) and not any(map(shutil.which, names))]
    if not Path(sysconfig.get_path('include'), 'Python.h').is_file():
        packages.append(f'python{sysconfig.get_python_version()}-dev')
    return packages


def remove_installed() -> None:
    """Remove the files of an earlier build, whose messages may no longer exist."""
    for pattern in INSTALLED:
        for path in PREFIX.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def build() -> None:
    """
    Build and install from scratch.

    :raises subprocess.CalledProcessError: a step failed; its tool has printed the reason.
    """
    environment = {
        **os.environ, 'AMENT_PREFIX_PATH': str(PREFIX), 'CMAKE_PREFIX_PATH': str(PREFIX)}
    environment.pop('PYTHONPATH', None)         # of a sourced ROS distribution
    shutil.rmtree(BUILD, ignore_errors=True)
    for command in (
            ['cmake', '-S', ROOT / NAME, '-B', BUILD, '-Wno-dev', '-DCMAKE_BUILD_TYPE=Release',
             '-DBUILD_TESTING=OFF', f'-DCMAKE_INSTALL_PREFIX={PREFIX}',
             f'-DPython3_EXECUTABLE={sys.executable}',
             f'-DCMAKE_PROJECT_{NAME}_INCLUDE={ROOT / "tools" / "build_msgs.cmake"}'],
            ['cmake', '--build', BUILD, '--parallel', str(os.cpu_count() or 1)]):
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    remove_installed()
    subprocess.run(['cmake', '--install', BUILD], env=environment, stdout=subprocess.DEVNULL,
                   check=True)


def main() -> int:
    """Build or check; return the exit code."""
    if sys.prefix == sys.base_prefix:
        print(f'{NAME}: run it with the Python of a virtual environment, as `make msgs` does',
              file=sys.stderr)
        return 1
    packages = missing()
    if packages:
        print(f'{NAME} cannot be built here: install what is missing by '
              f"'apt install {' '.join(packages)}', then 'make msgs'.", file=sys.stderr)
        return 1
    if sys.argv[1:] == ['--check']:
        return 0
    print(f'Building {NAME}; this takes about 20 s.', flush=True)
    begin_s = time.monotonic()
    try:
        build()
    except subprocess.CalledProcessError as error:
        print(f'{NAME}: {error}', file=sys.stderr)
        return 1
    print(f'{NAME} is built and installed in {PREFIX} after {time.monotonic() - begin_s:.1f} s.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
