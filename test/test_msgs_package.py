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

"""The files of the interface package match each other and the code; so do its types, if built."""

import ast
import fnmatch
import math
import os
from pathlib import Path
import re
import subprocess
import sys
from xml.etree import ElementTree

import physai_decode
from physai_decode.config import DeadlineConfig
from physai_decode.request import DEADLINE
from physai_decode.request import PACE
from physai_decode.request import SAMPLING
from physai_decode.timing import RequestReport
from physai_decode.timing import TokenReport
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'physai_decode_msgs'
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.glob('*/*'))
REASONS = {'stop', 'tool_calls', 'length', 'deadline', 'cancelled', 'preempted', 'rejected',
           'error'}
FIELD = re.compile(r'^(?P<kind>[\w/]+(\[\])?) +(?P<name>\w+)( +(?P<default>[^ =#]+))? *(#.*)?$')
CONSTANT = re.compile(r'^string +[A-Z_]+ *= *"(\w+)"')

try:
    from physai_decode_msgs.action import Generate
    from physai_decode_msgs.msg import Deadline
    from physai_decode_msgs.msg import Sampling
    from physai_decode_msgs.msg import Token
    from rclpy.serialization import deserialize_message
    from rclpy.serialization import serialize_message
    why_not = ''
except ImportError as error:
    why_not = f'physai_decode_msgs is not built: make msgs ({error})'
built = pytest.mark.skipif(bool(why_not), reason=why_not)


def parts(name: str) -> list[list[str]]:
    """Return the lines of an interface file; for an action, of goal, result and feedback."""
    return [part.splitlines() for part in (PACKAGE / name).read_text().split('---\n')]


def fields(lines: list[str]) -> dict[str, tuple[str, str]]:
    """Return each field's type and default."""
    found = (FIELD.match(line) for line in lines)
    return {match['name']: (match['kind'], match['default'] or '') for match in found if match}


def constants(lines: list[str]) -> set[str]:
    """Return the values of all constants."""
    return {match[1] for match in map(CONSTANT.match, lines) if match}


GOAL, RESULT, FEEDBACK = parts('action/Generate.action')


def test_cmake_builds_every_file_and_package_xml_has_every_dependency():
    """A file that is not in CMakeLists.txt would be missing without an error."""
    cmake = (PACKAGE / 'CMakeLists.txt').read_text()
    assert re.findall(r'"(\w+/\w+\.\w+)"', cmake) == [str(name) for name in FILES]
    manifest = ElementTree.parse(PACKAGE / 'package.xml').getroot()
    named = {entry.text for entry in manifest if entry.tag.endswith('depend')}
    assert set(re.findall(r'find_package\((\w+)', cmake)) <= named
    others = {kind.partition('/')[0] for name in FILES for lines in parts(name)
              for kind, _ in fields(lines).values() if '/' in kind}
    assert others == {'std_msgs'} <= set(re.findall(r'DEPENDENCIES ([\w ]+)', cmake)) & named
    assert re.search(r'project\((\w+)\)', cmake)[1] == manifest.findtext('name') == PACKAGE.name
    assert manifest.findtext('member_of_group') == 'rosidl_interface_packages'
    assert manifest.findtext('version') == physai_decode.__version__


@pytest.mark.parametrize('name', FILES, ids=str)
def test_every_field_has_a_comment(name):
    """It is on the same line, or above a block of fields without a blank line."""
    for lines in parts(name):
        explained = False
        for line in lines:
            if not line:
                explained = False
            elif line.startswith('#'):
                explained = True
            else:
                assert FIELD.match(line) or CONSTANT.match(line), line
                assert explained or '#' in line, line
            assert len(line) < 100


def test_a_goal_has_every_option_of_a_request():
    """
    Typed fields have the names of the JSON form, and defaults that mean "not set".

    A parameter without a typed field is set by options_json.
    """
    sampling, = map(fields, parts('msg/Sampling.msg'))
    deadline, = map(fields, parts('msg/Deadline.msg'))
    assert set(sampling) <= set(SAMPLING)
    pace, = map(fields, parts('msg/Pace.msg'))
    assert set(deadline) == set(DEADLINE)
    assert set(pace) == set(PACE)
    for given, specs in ((sampling, SAMPLING), (deadline, DEADLINE), (pace, PACE)):
        for name, (kind, default) in given.items():
            if kind in ('float64', 'int64'):    # a value that no request can have
                assert float(default) < specs[name].metadata['low']
            else:
                assert default == ''
    assert constants(parts('msg/Deadline.msg')[0]) == set(
        DeadlineConfig.__dataclass_fields__['action'].metadata['choices'])
    assert set(fields(GOAL)) == {
        'id', 'prompt', 'messages_json', 'sampling', 'deadline', 'pace',
        'options_json'}


def test_a_result_has_every_figure_of_a_request():
    """The finish reasons are constants."""
    result = fields(RESULT)
    others = {'client_id', 'reasoning', 'tool_calls'}       # result_json has them
    assert set(result) == (set(RequestReport.__dataclass_fields__) - others) | {
        'text', 'result_json'}
    assert constants(RESULT) == REASONS
    assert {name for name, (kind, _) in result.items() if kind == 'float64'} >= {
        name for name in result if name.endswith('_ms')}


def test_token_fields_have_the_names_of_token_stats():
    """Feedback has batches of tokens, elements and tool calls."""
    token, = map(fields, parts('msg/Token.msg'))
    assert set(token) - set(TokenReport.__dataclass_fields__) == {'header'}
    assert {'header', 'request_id', 'client_id', 'index', 'text', 'itl_ms', 'r_floor'} < set(token)
    assert fields(FEEDBACK) == {'tokens': ('Token[]', ''), 'items_json': ('string[]', ''),
                                'tool_calls_json': ('string[]', '')}


def test_setup_does_not_install_the_interface_package():
    """The only Python package of this repository is physai_decode."""
    tree = ast.parse((ROOT / 'setup.py').read_text())
    call, = (part for part in ast.walk(tree)
             if isinstance(part, ast.Call) and getattr(part.func, 'id', '') == 'find_packages')
    patterns = eval(ast.unparse(call.keywords[0].value), {'package_name': 'physai_decode'})
    assert not any(fnmatch.fnmatch(PACKAGE.name, pattern) for pattern in patterns)
    assert not list(PACKAGE.rglob('*.py'))


def test_build_tools_are_pinned():
    """`make msgs` installs the versions that belong to the other wheels."""
    pinned = {line.partition('==')[0]
              for line in (ROOT / 'constraints.txt').read_text().splitlines()}
    for line in (ROOT / 'requirements-msgs.txt').read_text().splitlines():
        assert line.startswith('#') or line in pinned, line


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason='not in a virtual environment')
def test_check_names_a_missing_compiler(tmp_path):
    """`make test` runs this check first, and continues without the package."""
    environment = {name: value for name, value in os.environ.items() if name not in ('CC', 'CXX')}
    result = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'build_msgs.py', '--check'], text=True,
        env={**environment, 'PATH': str(tmp_path)}, capture_output=True, timeout=120)
    assert result.returncode == 1
    assert "'apt install cmake gcc g++" in result.stderr and result.stderr.count('\n') == 1


@built
def test_installed_package_is_current():
    """If this fails, run `make msgs`."""
    share = next(parent / 'share' / PACKAGE.name
                 for parent in Path(sys.modules[Generate.__module__].__file__).parents
                 if (parent / 'share' / PACKAGE.name).is_dir())
    for name in FILES:
        assert (share / name).read_text() == (PACKAGE / name).read_text(), name


@built
def test_defaults_mean_not_set():
    goal = Generate.Goal()
    assert goal.sampling.temperature == goal.sampling.top_p == -1.0
    assert goal.sampling.top_k == goal.sampling.max_tokens == -1
    assert goal.deadline == Deadline(ttft_ms=-1.0, token_ms=-1.0, request_ms=-1.0, action='')
    assert Deadline.TRUNCATE == 'truncate'
    assert Generate.Result().prompt_tokens == Generate.Result().items == -1
    assert Generate.Result.CANCELLED == 'cancelled'


@built
@pytest.mark.parametrize('message', [
    lambda: Generate.Goal(id='mine', prompt='p', sampling=Sampling(stop=['a', 'ü'], seed=2**31),
                          options_json='{}'),
    lambda: Generate.Result(text='ü', finish_reason='stop', request_id=2**40, itl_p50_ms=2.5),
    lambda: Generate.Feedback(tokens=[Token(index=1, text='ü', r_floor=0.5), Token(index=2)],
                              items_json=['{}', '"ü"'])])
def test_serialisation_keeps_all_fields(message):
    message = message()
    assert deserialize_message(serialize_message(message), type(message)) == message


@built
def test_serialisation_keeps_nan():
    token = deserialize_message(serialize_message(Token(itl_ms=math.nan)), Token)
    assert math.isnan(token.itl_ms)
