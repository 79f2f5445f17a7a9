"""What the engines share of the device: the choice of attention."""

from pathlib import Path
import re
import resource

from physai_decode.config import EngineConfig
from physai_decode.engines import device
import pytest
import torch


@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('name', ['cuda', 'cpu'])
def test_cudnn_attention_is_off_only_inside(name, before):
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


def test_no_number_of_threads_is_torchs_own():
    before = torch.get_num_threads()
    try:
        for asked, used in ((1, 1), (3, 3), (0, before)):
            device.select(EngineConfig(device='cpu', cpu_threads=asked))
            assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(before)


def test_the_address_space_bounds_what_is_free(monkeypatch):
    free = device.free_bytes(torch.device('cpu'))
    taken = int(re.search(r'VmSize:\s*(\d+)', Path('/proc/self/status').read_text())[1]) * 1024
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (taken + 10**9, -1))
    assert device.free_bytes(torch.device('cpu')) <= min(free, 2 * 10**9)
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (1, 1))
    assert device.free_bytes(torch.device('cpu')) == 0
