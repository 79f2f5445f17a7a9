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
The ExLlamaV2 engine over the library itself, where there are the library and a GPU.

The library's sums come in any order and in float16. So the contract, which wants answers to
repeat, is held with a model that has a clear favourite at each place; elsewhere an answer need
only be, at each of its places, almost the likeliest of the float32 network.
"""

from importlib.util import find_spec

import engine_contract
from engine_contract import decode
from engine_contract import load
import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    pytest.skip('needs a CUDA device', allow_module_level=True)
if find_spec('exllamav2') is None:
    pytest.skip('needs ExLlamaV2', allow_module_level=True)

from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engines.exllamav2 import ExLlamaV2Engine
from test_exllamav2 import below_the_best
from test_exllamav2 import CONFIG
from test_exllamav2 import DECISIVE
from test_exllamav2 import save

FORMS = [{'group_size': 64}, {'group_size': 128, 'act_order': False}, {'group_size': -1},
         {'group_size': 32, 'layout': 'gptq_v2'}, {'group_size': 64, 'num_key_value_heads': 4},
         {'exl2': True}]
LIMIT = 2e-2


@pytest.fixture(scope='module')
def loop(tmp_path_factory):
    loop = load(ExLlamaV2Engine, save(tmp_path_factory.mktemp('model'), **DECISIVE)[0], CONFIG)
    yield loop
    loop.engine.close()


@pytest.mark.parametrize('check', engine_contract.CHECKS, ids=lambda check: check.__name__)
def test_contract(loop, check):
    check(loop)


@pytest.mark.parametrize('form', FORMS, ids=str)
@pytest.mark.parametrize('length', [20, 40])    # by the library's kernels, by cuBLAS
def test_it_says_what_the_weights_say(tmp_path, form, length):
    hold(tmp_path, form, length, CONFIG)


def test_it_says_so_without_graphs(tmp_path):
    hold(tmp_path, {}, 40, EngineConfig(cuda_graph=False))


def hold(folder, form, length, config):
    """Hold an engine's answer against the float32 network, with the prompt read and kept."""
    _, network = save(folder, **form)
    loop = load(ExLlamaV2Engine, folder, config)
    prompt = engine_contract.prompt_of(loop, length)
    for _ in range(2):
        ids = decode(loop, prompt, SamplingConfig(max_new_tokens=12))
        assert len(ids) == 12
        assert below_the_best(network, prompt, ids) < LIMIT
    loop.engine.close()


def test_nothing_stays_allocated(tmp_path):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    load(ExLlamaV2Engine, save(tmp_path)[0], CONFIG).engine.close()
    assert torch.cuda.memory_allocated() - before < 2**20
