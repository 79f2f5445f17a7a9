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

"""The params files that a command line names, and whether they hold anything for this node."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
import re

import yaml


def given(args: Sequence[str]) -> list[str]:
    """List the files of ``--params-file`` among the ROS arguments of a command line."""
    files: list[str] = []
    ros = False
    for position, each in enumerate(args):
        if each in ('--ros-args', '--'):
            ros = each == '--ros-args'
        elif ros and each == '--params-file':
            files += args[position + 1:position + 2]
    return files


def unheard(files: Iterable[str], node: str) -> list[str]:
    """
    List the files that hold nothing for a node.

    ROS ignores such a file without a word, and the node would run on its defaults.

    :param node: its full name, such as ``/robot/decode``.
    """
    return [file for file in files if not any(
        re.fullmatch(pattern, node) for pattern in _patterns(Path(file)))]


def _patterns(file: Path) -> Iterator[str]:
    """Give a regular expression for each name that the file has parameters for."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        yield '.*'          # rclpy has read it: judge it by nothing
        return
    yield from _walk(content, '')


def _walk(content, above):
    if isinstance(content, dict):
        for key, inner in content.items():
            if key == 'ros__parameters':
                yield above
            else:
                yield from _walk(inner, above + ''.join(map(_pattern, str(key).split('/'))))


def _pattern(token):
    """Give the regular expression for one token of a node's name, by rcl's rules."""
    wildcards = {'': '', '*': '/[^/]+', '**': '(/[^/]+)*'}
    return wildcards[token] if token in wildcards else f'/{re.escape(token)}'
