"""What the engines share of the device: the choice of attention."""

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
