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

"""The params files on a command line, their errors, and the sections for this node."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
import re
from typing import Any

import yaml


def from_arguments(args: Sequence[str]) -> list[str]:
    """List the ``--params-file`` files among the ROS arguments of a command line."""
    files: list[str] = []
    ros = False
    for position, each in enumerate(args):
        if each in ('--ros-args', '--'):
            ros = each == '--ros-args'
        elif ros and each == '--params-file':
            files += args[position + 1:position + 2]
    return files


def without_section(files: Iterable[str], node: str) -> list[str]:
    """
    List the files that have no section for a node.

    ROS silently ignores such a file, and the node would run with its defaults.

    :param node: the fully qualified name, such as ``/robot/decode``.
    """
    return [file for file in files if not any(
        re.fullmatch(pattern, node) for pattern in _patterns(Path(file)))]


def advice(files: Iterable[str]) -> str:
    """Say what to change in params files that ROS can't parse; its own message hardly does."""
    for file in files:
        try:
            yaml.safe_load(Path(file).read_text())
        except yaml.MarkedYAMLError as error:
            line = f', line {error.problem_mark.line + 1}' if error.problem_mark else ''
            return f'{file}{line}: {error.problem}'
        except (OSError, ValueError, yaml.YAMLError) as error:
            return f'{file}: {error}'
    return ('a params file begins with `/**:` and `ros__parameters:`, as in config/decode.yaml; '
            'between { and }, put quotes around a value with a colon')


def _patterns(file: Path) -> Iterator[str]:
    """Yield a regular expression for each node name that has a section in the file."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        yield '.*'          # rclpy could read it, so report nothing
        return
    yield from _walk(content, '')


def _walk(content: Any, prefix: str) -> Iterator[str]:
    if isinstance(content, dict):
        for key, inner in content.items():
            if key == 'ros__parameters':
                yield prefix
            else:
                yield from _walk(inner, prefix + ''.join(map(_pattern, str(key).split('/'))))


def _pattern(token: str) -> str:
    """Return the regular expression for one token of a node name, by rcl's rules."""
    wildcards = {'': '', '*': '/[^/]+', '**': '(/[^/]+)*'}
    return wildcards[token] if token in wildcards else f'/{re.escape(token)}'
