"""The ExLlamaV2 engine over the library itself, where there are the library and a GPU."""

from importlib.util import find_spec

import engine_contract
from engine_contract import decode
import pytest

torch = pytest.importorskip('torch')
if not torch.cuda.is_available():
    pytest.skip('needs a CUDA device', allow_module_level=True)
if find_spec('exllamav2') is None:
    pytest.skip('needs ExLlamaV2', allow_module_level=True)

from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engines.exllamav2 import ExLlamaV2Engine
from test_exllamav2 import answer
from test_exllamav2 import CONFIG
from test_exllamav2 import save

FORMS = [{'group_size': 64}, {'group_size': 128, 'act_order': False}, {'group_size': -1},
         {'group_size': 32, 'layout': 'gptq_v2'}, {'group_size': 64, 'num_key_value_heads': 4}]


@pytest.fixture(scope='module')
def engine(tmp_path_factory):
    engine = ExLlamaV2Engine(save(tmp_path_factory.mktemp('model'))[0], CONFIG)
    yield engine
    engine.close()


@pytest.mark.parametrize('check', engine_contract.CHECKS, ids=lambda check: check.__name__)
def test_contract(engine, check):
    check(engine)


@pytest.mark.parametrize('form', FORMS, ids=str)
def test_it_says_what_the_weights_say(tmp_path, form):
    folder, network = save(tmp_path, **form)
    engine = ExLlamaV2Engine(folder, CONFIG)
    prompt = engine_contract.prompt_of(engine, 40)
    assert decode(engine, prompt, SamplingConfig(max_new_tokens=12)) == answer(network, prompt, 12)
    engine.close()


def test_its_graphs_change_nothing(engine, tmp_path):
    prompt = engine_contract.prompt_of(engine, 40)
    expected = decode(engine, prompt, SamplingConfig(max_new_tokens=12))
    other = ExLlamaV2Engine(save(tmp_path)[0], EngineConfig(cuda_graph=False))
    assert decode(other, prompt, SamplingConfig(max_new_tokens=12)) == expected
    other.close()


def test_nothing_stays_allocated(tmp_path):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    ExLlamaV2Engine(save(tmp_path)[0], CONFIG).close()
    assert torch.cuda.memory_allocated() - before < 2**20
