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

"""Settings of the device: cuDNN attention, CPU threads, the GPU share, and free memory."""

import os
from pathlib import Path
import re
import resource

from physai_decode.config import EngineConfig
from physai_decode.engine import EngineError
from physai_decode.engines import device
import pytest
import torch


@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('name', ['cuda', 'cpu'])
def test_cudnn_attention_is_off_only_in_the_context(name, before):
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    found = enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with pytest.raises(RuntimeError, match='broken'):
            with device.attention_backends(torch.device(name)):
                assert enabled() == (before and name == 'cpu')
                raise RuntimeError('broken')
        assert enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(found)


def test_zero_cpu_threads_restores_the_default_of_torch():
    before = torch.get_num_threads()
    try:
        for asked, used in ((1, 1), (3, 3), (0, before)):
            device.select(EngineConfig(device='cpu', cpu_threads=asked))
            assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(before)


def test_gpu_share_must_be_set_before_the_first_use(monkeypatch, tmp_path):
    """It takes effect only if the MPS daemon runs, and cannot be changed later."""
    monkeypatch.setenv('CUDA_MPS_PIPE_DIRECTORY', str(tmp_path))
    monkeypatch.delenv(device._SHARE, raising=False)
    config = EngineConfig(device='cpu', gpu_share_percent=40)
    assert device.in_force(EngineConfig(), 'cuda:0') == {}
    device.select(config)
    assert os.environ[device._SHARE] == '40'
    assert f'no MPS daemon listens in {tmp_path}' in device.in_force(config, 'cuda:0')['gpu_share']
    (tmp_path / 'control').touch()
    assert device.in_force(config, 'cuda:0') == {'gpu_share': '40 %'}
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    device.select(config)
    with pytest.raises(EngineError, match='gpu_share_percent is 30, but'):
        device.select(EngineConfig(device='cpu', gpu_share_percent=30))


def test_free_memory_is_within_the_limit_of_the_address_space(monkeypatch):
    free = device.free_bytes(torch.device('cpu'))
    used = int(re.search(r'VmSize:\s*(\d+)', Path('/proc/self/status').read_text())[1]) * 1024
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (used + 10**9, -1))
    assert device.free_bytes(torch.device('cpu')) <= min(free, 2 * 10**9)
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (1, 1))
    assert device.free_bytes(torch.device('cpu')) == 0


def test_an_assertion_of_the_allocator_on_a_jetson_means_out_of_memory(monkeypatch):
    message = ('NVML_SUCCESS == r INTERNAL ASSERT FAILED at '
               '"/opt/pytorch/pytorch/c10/cuda/CUDACachingAllocator.cpp":838, please report a bug '
               'to PyTorch. ')
    with pytest.raises(EngineError, match='not enough memory on cpu'):
        with device.enough_memory(torch.device('cpu'), 0):
            raise RuntimeError(message)
    assert not device.is_out_of_memory(RuntimeError('another INTERNAL ASSERT FAILED'))
    monkeypatch.setattr(device, 'shares_memory', lambda which: True)
    with pytest.raises(EngineError, match=r'not enough memory on cuda.* vm\.drop_caches=3'):
        with device.enough_memory(torch.device('cuda'), 0):
            raise RuntimeError(message)
