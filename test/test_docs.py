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

"""The documentation: its links and code, and its statements on layers, floors and requests."""

import ast
from configparser import RawConfigParser
import json
from pathlib import Path
import re
import struct
from xml.etree import ElementTree

from physai_decode import roofline
from physai_decode.benchmark import synthetic
from physai_decode.request import Cancel
from physai_decode.request import parse
from physai_decode.request import Request
from physai_decode.request import RequestError
import pytest
from rclpy.context import Context
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / 'docs').rglob('*.md')) + sorted(ROOT.glob('*.md'))
CONFIGS = sorted((ROOT / 'config').glob('*.yaml'))
ROW = re.compile(r'^\| ([\w ]+) \| ([\d.]+) \|' + r' ([\d.]+) \|' * 4 + '$', re.MULTILINE)
LAYERS, KV_HEADS, HEAD_DIM, HIDDEN = 28, 4, 128, 3584       # Qwen-2.5-7B
CONTEXTS = (2048, 16384)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target, heading in re.findall(r'\]\(([^)#:]+)(?:#([^)]+))?\)', page.read_text()):
        path = page.parent / target
        assert path.exists(), target
        if heading:
            headings = re.findall(r'^#+ (.+)', path.read_text(), re.MULTILINE)
            assert heading in [each.lower().replace(' ', '-') for each in headings], heading


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_parse(page):
    """Each block of Python, JSON, YAML, INI and XML is valid."""
    readers = {'python': ast.parse, 'json': json.loads, 'yaml': yaml.safe_load, 'text': str,
               'ini': lambda block: RawConfigParser(strict=False).read_string(block) or block,
               'xml': lambda block: ElementTree.fromstring(f'<all>{block}</all>').tag}
    for language, block in re.findall(r'^```(\w*)\n(.+?)^```', page.read_text(), re.M | re.S):
        assert readers[language](block), block


@pytest.mark.parametrize('page', [*PAGES, *CONFIGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_ros_reads_parameter_files(page, tmp_path):
    """ROS 2's own parser is stricter than PyYAML: in braces, it needs quotes around a colon."""
    blocks = [page.read_text()] if page in CONFIGS else re.findall(
        r'^```yaml\n(.+?)^```', page.read_text(), re.M | re.S)
    for block in blocks:
        if 'ros__parameters' in block:
            path = tmp_path / 'params.yaml'
            path.write_text(block)
            context = Context()
            context.init(['--ros-args', '--params-file', str(path)])
            context.shutdown()


def test_reliability_names_files_that_exist():
    page = (ROOT / 'docs' / 'reliability.md').read_text()
    names = re.findall(r'`(test_\w+\.py|tools/\w+\.py)`', page)
    assert len(names) > 15
    for name in names:
        assert (ROOT / ('test' if name.startswith('test_') else '') / name).exists(), name


def test_imports_follow_the_layers():
    """Each file has a layer in architecture.md, and imports from no layer above its own."""
    package = ROOT / 'physai_decode'
    page = (ROOT / 'docs' / 'architecture.md').read_text()
    rows = re.findall(r'^\| \w+ \| (`.+?) \|', page.partition('## A prompt')[0], re.M)
    layers = {name.removesuffix('.py').rstrip('/'): height for height, row in enumerate(rows)
              for name in re.findall(r'`([\w./]+)`', row)}
    paths = {path.stem if path.parent == package else path.relative_to(package).parts[0]
             for path in package.rglob('*.py')}
    assert paths - {'__init__', 'bench', 'benchmark'} == set(layers)
    for path in package.rglob('*.py'):
        own = layers.get(path.relative_to(package).with_suffix('').parts[0], -1)
        found = re.findall(r'^ *from physai_decode(?:\.| import )(\w+)', path.read_text(), re.M)
        for name in found:
            assert own <= layers.get(name, -1), f'{path} imports {name}'


def tensor_bytes(folder) -> dict[str, int]:
    """Return the size of each tensor of a checkpoint."""
    header = {}
    for path in folder.glob('*.safetensors'):
        with path.open('rb') as file:
            header.update(json.loads(file.read(struct.unpack('<Q', file.read(8))[0])))
    return {name: entry['data_offsets'][1] - entry['data_offsets'][0]
            for name, entry in header.items() if name != '__metadata__'}


def step_bytes(folder) -> int:
    """Return the bytes of weights that a step reads, with one row of an embedding without head."""
    sizes = tensor_bytes(folder)
    if 'lm_head.weight' not in sizes:
        return sum(sizes.values())
    return sum(sizes.values()) - sizes['model.embed_tokens.weight'] + 2 * HIDDEN


def test_tuning_guide_has_the_computed_floors(tmp_path):
    """The table has the floors that `roofline` computes for Qwen-2.5-7B."""
    weights = []
    for kind in ('none', 'gptq'):
        synthetic.describe(tmp_path / kind, 'qwen2.5-7b', kind)
        weights.append(step_bytes(tmp_path / kind))
    rows = ROW.findall((ROOT / 'docs' / 'tuning.md').read_text())
    assert len(rows) >= 7
    for machine, gb_s, *table in rows:
        floors = [
            roofline.floor_s(count, roofline.kv_bytes(LAYERS, KV_HEADS, HEAD_DIM, context, 2),
                             float(gb_s) * 1e9)
            for count in weights for context in CONTEXTS]
        assert [f'{1e3 * floor_s:.2f}' for floor_s in floors] == table, machine


FIGURES_OF_THE_PAPER = {'14.828', '11.776', '1.259', '1.253', '1.267', '1.028'}


def test_tuning_guide_names_the_source_of_each_statement():
    """Each one is marked as measured here, measured by the paper, or derived."""
    page = (ROOT / 'docs' / 'tuning.md').read_text()
    points = re.findall(r'^- (?:.+\n(?!- |\n))*.+', page, re.MULTILINE)
    assert len(points) > 15
    for point in points:
        assert re.search(
            r'\*(Measured by the paper|Measured\s+here|[Dd]erived)\.?\*', point), point


def test_measured_figures_of_the_tuning_guide_are_in_a_report():
    """Those with three decimals are in a report in docs/, or come from the paper."""
    report = ''.join((ROOT / 'docs' / name).read_text() for name in (
        'h200/report.md', 'h200/exllamav2.txt', 'h100/report.md'))
    tuning = (ROOT / 'docs' / 'tuning.md').read_text()
    figures = re.findall(r'(?<![\d.,])\d+\.\d{3}(?![\d,]|\.\d)', tuning)  # not 1.234.5, a version
    assert figures
    for figure in figures:
        assert figure in FIGURES_OF_THE_PAPER or f' {figure} ' in report, figure


@pytest.mark.parametrize(('machine', 'name'), [
    ('H200', 'NVIDIA H200'), ('H100 SXM', 'NVIDIA H100 80GB HBM3'), ('L40S', 'NVIDIA L40S'),
    ('L4', 'NVIDIA L4'), ('Jetson Thor', 'NVIDIA Jetson AGX Thor'),
    ('Jetson AGX Orin', 'NVIDIA Jetson AGX Orin'), ('Jetson Orin NX', 'NVIDIA Jetson Orin NX')])
def test_tuning_guide_has_the_bandwidths_of_the_data_sheets(machine, name):
    rows = {row[0]: float(row[1])
            for row in ROW.findall((ROOT / 'docs' / 'tuning.md').read_text())}
    assert rows[machine] * 1e9 == roofline.datasheet(name).bytes_per_s


def test_jetson_page_has_the_computed_sizes_and_floors(tmp_path):
    """The table has those of the random weights of each shape, at 4,096 tokens."""
    page = (ROOT / 'docs' / 'howto' / 'jetson.md').read_text()
    rows = re.findall(r'^\| ((?:Qwen|Llama)\S+) \|(.+)\|$', page, re.MULTILINE)
    assert len(rows) >= 7
    for model, row in rows:
        folders = [tmp_path / model / kind for kind in ('gptq', 'none')]
        for folder in folders:
            synthetic.describe(folder, model.lower(), folder.name)
        sizes = [f'{sum(tensor_bytes(folder).values()) / 1e9:.1f}' for folder in folders]
        shape = json.loads((folders[0] / 'config.json').read_text())
        head_dim = shape.get('head_dim') or shape['hidden_size'] // shape['num_attention_heads']
        kv_bytes = roofline.kv_bytes(
            shape['num_hidden_layers'], shape['num_key_value_heads'], head_dim, 4096, 2)
        read_bytes = step_bytes(folders[0])
        floors_s = [
            roofline.floor_s(read_bytes, kv_bytes, roofline.datasheet(name).bytes_per_s)
            for name in ('Orin NX', 'AGX Orin', 'AGX Thor')]
        assert [cell.strip() for cell in row.split('|')] == [
            *sizes, f'{kv_bytes / 1e9:.2f}', *(f'{1e3 * each:.1f}' for each in floors_s)], model


def test_requests_page_is_complete():
    """Each JSON block of requests.md parses as a request, and the table has each field."""
    page = (ROOT / 'docs' / 'requests.md').read_text()
    blocks = re.findall(r'```json\n(.+?)```', page, re.DOTALL)
    assert [type(parse(block)) for block in blocks] == [Request, Cancel]
    fields = re.findall(r'`(\w+)`', ''.join(re.findall(r'^\| (`.+?) \|', page, re.MULTILINE)))
    with pytest.raises(RequestError) as raised:
        parse('{"nothing": 1}')
    allowed = str(raised.value).partition('the fields are ')[2].split(', ')
    assert sorted([*fields, 'metadata']) == sorted(allowed)
