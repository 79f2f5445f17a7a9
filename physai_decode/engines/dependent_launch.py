"""
Programmatic dependent launch: a kernel starts while the one before it ends.

Triton has it from 3.4 on, chips from compute capability 9.0 on. Where either lacks it, kernels
are compiled without ``EARLY`` and the names here are never called.
"""

from physai_decode.engines import chip
import torch
import triton

try:
    from triton.language.extra.cuda import gdc_launch_dependents
    from triton.language.extra.cuda import gdc_wait
except ImportError:
    KNOWN = False       # to Triton

    @triton.jit
    def gdc_launch_dependents():
        """Let the next kernel start."""

    @triton.jit
    def gdc_wait():
        """Wait for what the kernels before have written."""
else:
    KNOWN = True

CAPABILITY = (9, 0)     # from which on chips have it


def available(device: torch.device) -> bool:
    """Say whether kernels can be launched early on this device."""
    return KNOWN and device.type == 'cuda' and chip.capability(device) >= CAPABILITY
