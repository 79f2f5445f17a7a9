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

"""Check the logits of a model once, when it is loaded."""

from physai_decode.engine import EngineError
from physai_decode.engine import not_numbers
import torch
from torch import Tensor

_WARM_UP_TOKENS = 8


def warm_up_ids(vocab_size: int, max_context: int) -> list[int]:
    """
    Return a prompt of different ids; a single one could be padding.

    :param max_context: in tokens; half of it is left for steps.
    """
    return list(range(min(_WARM_UP_TOKENS, vocab_size, max(1, max_context // 2))))


def check(logits: Tensor, dtype: torch.dtype) -> None:
    """
    Check that a token can be sampled.

    :param logits: float [vocab], after the prompt of the warm-up.
    :param dtype: of the computation.
    :raises EngineError: the logits are not finite, or all equal.
    """
    least, most = (float(each) for each in logits.aminmax())
    if not torch.tensor(most).isfinite():
        raise not_numbers(str(dtype).removeprefix('torch.'))
    if least == most:
        raise EngineError(
            f"the model's logits are all {most:g}, whatever the prompt: its weights are all zero "
            'or damaged, or config.json does not belong to them (rms_norm_eps, for one); copy or '
            'download the model again')
