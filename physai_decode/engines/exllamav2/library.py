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

"""Import ExLlamaV2 and compile its extension if necessary."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
import os
from pathlib import Path
import shutil
import sysconfig
import threading
import time
from typing import Any

from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.pip_command import install
import torch
from torch.utils import cpp_extension

_TICK_S = 5.0


def library(progress: Callable[[str], None]) -> Any:
    """
    Import the library, which compiles its extension at first use.

    :param progress: called every few seconds, from another thread; its exceptions end the import.
    :raises EngineError: the library is missing, or its extension cannot be compiled.
    """
    doing = "loading ExLlamaV2's kernels"
    if find_spec('exllamav2_ext') is None:
        _check_tools()
        doing = "compiling ExLlamaV2's kernels"
        lock = Path(cpp_extension._get_build_directory('exllamav2_ext', False), 'lock')
        if lock.exists():
            doing = ("waiting for another process that compiles ExLlamaV2's kernels (if none "
                     f'runs, delete {lock})')
    with _ticking(progress, doing):
        try:
            import_module('exllamav2.generator')
            return import_module('exllamav2')
        except ImportError as error:
            package = [error.name] if error.name else ['-U', 'exllamav2']
            raise EngineError(
                f'ExLlamaV2 cannot be imported ({first_line(error)}): install '
                f'{error.name or "it"} ({install(*package)}), or choose another engine.name'
            ) from None
        except (OSError, RuntimeError) as error:
            raise EngineError(
                f"ExLlamaV2's extension could not be compiled for PyTorch {torch.__version__} "
                f'with CUDA {torch.version.cuda}: {_compiler_error(error)}; choose another '
                'engine.name, or install a build of ExLlamaV2 for them') from None


def _check_tools() -> None:
    """Raise EngineError if the tools that compile a PyTorch extension are missing."""
    home = cpp_extension.CUDA_HOME
    compiler = os.environ.get('CXX', 'c++')
    missing = []
    if not home or not Path(home, 'bin', 'nvcc').exists():
        missing.append(f"nvcc (NVIDIA's CUDA toolkit {torch.version.cuda}; set CUDA_HOME if it "
                       'is not in the default folder)')
    if not shutil.which(compiler):
        missing.append(f'{compiler} (apt install g++)')
    if not cpp_extension.is_ninja_available():
        missing.append(f'ninja ({install("ninja")})')
    if not Path(sysconfig.get_path('include'), 'Python.h').exists():
        missing.append('Python.h (apt install python3-dev)')
    if missing:
        raise EngineError(
            "ExLlamaV2's extension is compiled at first use, and that needs "
            f'{"; ".join(missing)}; or choose another engine.name')


@contextmanager
def _ticking(progress: Callable[[str], None], doing: str) -> Iterator[None]:
    """Report progress periodically inside ``with``; an exception of `progress` is raised here."""
    done, raised, begun_s = threading.Event(), list[Exception](), time.monotonic()

    def tick() -> None:
        while not done.wait(_TICK_S):
            try:
                progress(f'{doing}, {time.monotonic() - begun_s:.0f} s so far')
            except Exception as error:
                raised.append(error)
                return

    thread = threading.Thread(target=tick, name='exllamav2 progress', daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if raised:
        raise raised[0]


def _compiler_error(error: Exception) -> str:
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if 'error:' in line or 'fatal' in line),
                first_line(error))
