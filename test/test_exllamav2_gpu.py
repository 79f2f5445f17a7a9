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
The ExLlamaV2 engine with the real library; needs a GPU.

The library sums in float16 and in any order, so its answers can vary. The contract requires that
they repeat, so its checks use a model whose best token has a clear lead at each position. In the
other tests, each token need only be almost the most likely one of the float32 network.
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
@pytest.mark.parametrize('length', [20, 40])    # with the library's kernels, with cuBLAS
def test_tokens_are_likely(tmp_path, form, length):
    check_answer(tmp_path, form, length, CONFIG)


def test_tokens_are_likely_without_graphs(tmp_path):
    check_answer(tmp_path, {}, 40, EngineConfig(cuda_graph=False))


def check_answer(folder, form, length, config):
    """Compare answers with the float32 network, without and with the prompt in the cache."""
    _, network = save(folder, **form)
    loop = load(ExLlamaV2Engine, folder, config)
    prompt = engine_contract.prompt_of(loop, length)
    for _ in range(2):
        ids = decode(loop, prompt, SamplingConfig(max_new_tokens=12))
        assert len(ids) == 12
        assert below_the_best(network, prompt, ids) < LIMIT
    loop.engine.close()


def test_close_frees_device_memory(tmp_path):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    load(ExLlamaV2Engine, save(tmp_path)[0], CONFIG).engine.close()
    assert torch.cuda.memory_allocated() - before < 2**20
