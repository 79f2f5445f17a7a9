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

"""The engine's cache against float32 products of its weights, when it is loaded."""

from dataclasses import replace

from physai_decode.checkpoint import inspect
from physai_decode.config import EngineConfig
from physai_decode.engine import EngineError
from physai_decode.engines.logits import warm_up_ids
from physai_decode.engines.native import NativeEngine
from physai_decode.engines.native import self_check
from physai_decode.engines.native.ops import TorchOps
from physai_decode.engines.native.transformer import EagerPrefill
import pytest
import random_gptq
import random_model
import torch

CPU = EngineConfig(device='cpu', cpu_threads=1, max_context=64)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def differences(engine):
    """Return the relative errors of keys and values."""
    t = engine.transformer
    limit = self_check.ROUNDINGS * torch.finfo(t.keys.dtype).eps
    with torch.inference_mode():
        engine.rewind(0)
        engine.feed(PROMPT)
        return [float((torch.cat((t.keys[index, :, :8], t.values[index, :, :8])).float()
                       - expected)[:, sure].norm() / expected[:, sure].norm())
                for index, (expected, sure) in enumerate(
                    self_check._keys_and_values(t, PROMPT, limit))]


@pytest.mark.parametrize('family', random_model.FAMILIES)
def test_passes_for_each_family(tmp_path, family):
    found = differences(NativeEngine(inspect(random_model.save(tmp_path, family, 0)), CPU))
    assert len(found) == (3 if family == 'gemma3_text' else 2)
    assert max(found) < 1e-5


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('family', [
    'qwen2', 'gemma3_text', 'granite', 'phi3_part', 'qwen3_moe'])
def test_passes_in_other_dtypes(tmp_path, family, dtype):
    model = inspect(random_model.save(tmp_path, family, 0))
    limit = self_check.ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps
    assert max(differences(NativeEngine(model, replace(CPU, dtype=dtype)))) < limit / 4


@pytest.mark.parametrize('act_order', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_passes_for_gptq(tmp_path, dtype, act_order):
    random_gptq.save(tmp_path, 'qwen2', 0, 32, act_order)
    limit = self_check.ROUNDINGS * torch.finfo(torch.bfloat16).eps / 4
    assert max(differences(NativeEngine(inspect(tmp_path), replace(CPU, dtype=dtype)))) < (
        1e-4 if dtype == 'float32' else limit)


def wrong_norm(monkeypatch):
    monkeypatch.setattr(TorchOps, '_input', lambda self, x, gain, eps: x)


def wrong_gate(monkeypatch):
    gated = TorchOps.gated
    monkeypatch.setattr(TorchOps, 'gated', lambda self, x, weight, out, *rest: (
        gated(self, x, weight, out, *rest), out.neg_()))


def wrong_position(monkeypatch):
    attend = TorchOps.attend
    monkeypatch.setattr(
        TorchOps, 'attend', lambda self, qkv, keys, values, position, cos, sin, layer, out:
        attend(self, qkv, keys, values, position, cos.roll(1, 0), sin.roll(1, 0), layer, out))


def wrong_head(monkeypatch):
    linear = TorchOps.linear

    def product(self, x, weight, out, **options):
        linear(self, x, weight, out, **options)
        if weight.shape[0] == 512:          # the head alone has as many rows
            out.copy_(out.roll(1))

    monkeypatch.setattr(TorchOps, 'linear', product)


def wrong_experts(monkeypatch):
    select = TorchOps.select
    monkeypatch.setattr(TorchOps, 'select', lambda self, logits, into, normalised: (
        select(self, logits, into, normalised), into.ids.copy_(into.ids.roll(1))))


def test_rejects_a_step_with_other_routing_weights(tmp_path, monkeypatch):
    model = inspect(random_model.save(tmp_path, 'qwen3_moe', 0))
    NativeEngine(model, CPU).close()
    wrong_experts(monkeypatch)
    with pytest.raises(EngineError, match='computes a decode step wrongly'):
        NativeEngine(model, CPU)


def test_compares_further_steps_if_the_experts_of_some_depend_on_rounding(tmp_path, monkeypatch):
    model = inspect(random_model.save(tmp_path, 'qwen3_moe', 0))
    wrong_experts(monkeypatch)
    mlp, prompt = self_check._mlp, len(warm_up_ids(512, 64))

    def unclear(x, *rest):
        out, clear = mlp(x, *rest)
        clear[prompt:prompt + 2] = False
        return out, clear

    monkeypatch.setattr(self_check, '_mlp', unclear)
    with pytest.raises(EngineError, match='computes a decode step wrongly'):
        NativeEngine(model, CPU)


def test_ignores_tokens_whose_experts_depend_on_rounding(tmp_path):
    """If two experts have the same logits, either choice is right."""
    t = NativeEngine(inspect(random_model.save(tmp_path, 'qwen3_moe', 0)), CPU).transformer
    with torch.inference_mode():
        for held in (True, False):
            (_, first), (_, sure) = self_check._keys_and_values(t, PROMPT, 1e-3)
            assert first.all() and sure.any() == held
            router = t.weights.layers[0].mlp.router.weight
            router.copy_(router[:1].expand_as(router).clone())


@pytest.mark.parametrize('spoil', [wrong_norm, wrong_gate, wrong_position, wrong_head])
def test_rejects_a_step_with_a_wrong_result(tmp_path, monkeypatch, spoil):
    model = inspect(random_model.save(tmp_path, 'llama', 0))
    spoil(monkeypatch)
    with pytest.raises(EngineError, match='computes a decode step wrongly.*engine.name to trans'):
        NativeEngine(model, CPU)


def test_rejects_a_wrong_prefill(tmp_path, monkeypatch):
    model = inspect(random_model.save(tmp_path, 'llama', 0))
    feed = EagerPrefill.feed
    monkeypatch.setattr(EagerPrefill, 'feed', lambda self, ids, start: feed(
        self, ids[::-1], start))
    with pytest.raises(EngineError, match='computes a prompt wrongly'):
        NativeEngine(model, CPU)


def test_model_of_one_layer(tmp_path):
    model = inspect(random_model.save(tmp_path, 'llama', 0, num_hidden_layers=1))
    assert len(differences(NativeEngine(model, CPU))) == 1
