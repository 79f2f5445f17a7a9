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
Run cases one at a time, each in a fresh process, and store their results in files.

A result that is already in the folder is not measured again, so an interrupted run resumes where
it stopped. It is measured again if the model, the code, the packages or the machine have changed,
or if ``again`` is set. The next run repeats a session that died or was interrupted, and the result
records how the session was lost.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import contextlib
from dataclasses import replace
import importlib.util
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from physai_decode.benchmark import synthetic
from physai_decode.benchmark.case import Case
from physai_decode.benchmark.case import ModelSource
from physai_decode.benchmark.provenance import changes
from physai_decode.benchmark.provenance import provenance
from physai_decode.pip_command import install

Result = dict[str, Any]


class Runner:
    """
    Runs cases and stores their results in ``out/sessions``.

    :param models: parent of the folders with random weights.
    :param session_timeout_s: time limit of a session; one that exceeds it is killed and counts as
        died.
    :param budget_s: time limit of the whole run; 0 sets none.
    :param again: whether to measure existing results again.
    """

    def __init__(self, out: Path, models: Path, session_timeout_s: float = 3600.0,
                 budget_s: float = 0.0, progress: Callable[[str], None] = print,
                 again: bool = False) -> None:
        self.sessions = out / 'sessions'
        self.sessions.mkdir(parents=True, exist_ok=True)
        self.models = models
        self.made: list[Path] = []
        self.session_timeout_s = session_timeout_s
        self.end_s = time.monotonic() + budget_s if budget_s else float('inf')
        self.progress = progress
        self.again = again

    def run(self, cases: Sequence[Case]) -> list[Result]:
        """Return one result per case, in order; the result of a failed case has the reason."""
        results = []
        for number, case in enumerate(cases, 1):
            self.progress(f'[{number}/{len(cases)}] {case.session or case.label}: {case.source}, '
                          f'contexts {" ".join(map(str, case.contexts))}')
            results.append(self._result(case))
            self.progress('  ' + _summary(results[-1]))
        return results

    def _result(self, case: Case) -> Result:
        path, lost = self.sessions / f'{case.key()}.json', []
        own = provenance(case.source.path)
        if path.is_file():
            kept = json.loads(path.read_text())
            changed = changes(kept.get('provenance', {}), own)
            done = kept['status'] == 'done'
            if done and not changed and not self.again:
                self.progress(f'  already measured, {kept["date"]} (--again measures it again): '
                              f'{path.name}')
                return {**kept, 'kept': True}
            if changed:
                self.progress(f'  measured again, as these have changed: {", ".join(changed)}')
            if changed or done:
                path.rename(path.with_suffix('.old'))
            else:
                lost = kept.get('lost', []) + [kept['error']] * (kept['status'] == 'died')
        record = {'case': case.to_dict(), 'provenance': own, 'lost': lost}
        result = {**self._measure(case, path, record), **record}
        keep(result, path)
        return result

    def _measure(self, case: Case, path: Path, record: Result) -> Result:
        """Run a session and return its result; until it ends, the file reports it as lost."""
        missing = [name for name in case.requires if importlib.util.find_spec(name) is None]
        if missing:
            return {'status': 'unavailable', 'contexts': [],
                    'error': f'not installed: {", ".join(missing)} ({install(*missing)})'}
        left_s = min(self.session_timeout_s, self.end_s - time.monotonic())
        if left_s <= 0:
            return {'status': 'unavailable', 'contexts': [],
                    'error': 'not started: --budget-s is used up'}
        try:
            located = replace(case, source=replace(case.source, path=self._folder(case.source)))
        except (OSError, ValueError) as error:
            return {'status': 'unavailable', 'contexts': [], 'error': str(error)}
        case_path, result_path, log_path = map(path.with_suffix, ('.case', '.seen', '.log'))
        case_path.write_text(json.dumps(located.to_dict()))
        result_path.unlink(missing_ok=True)
        keep({'status': 'died', 'contexts': [], **record,
              'error': 'the session was interrupted with its run'}, path)
        failure = self._process(case_path, result_path, log_path, left_s)
        case_path.unlink()
        if result_path.is_file():
            result: Result = json.loads(result_path.read_text())
            result_path.unlink()
            if failure is None:
                log_path.unlink()
            else:                   # only the kernel times are missing
                result['contexts'][0]['kernels_error'] = \
                    f'the session {failure}; see {log_path.name}'
            return result
        return {'status': 'died', 'contexts': [],
                'error': f'the session {failure or "wrote nothing"}; {log_path.name} ends: '
                         f'{_last_line(log_path.read_text(errors="replace"))}'}

    def _process(self, case_path: Path, result_path: Path, log_path: Path,
                 timeout_s: float) -> str | None:
        """Run a session; return how it failed, or None."""
        command = [sys.executable, '-m', 'physai_decode.benchmark.session',
                   str(case_path), str(result_path)]
        with log_path.open('w') as log, subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True) as process:
            reader = threading.Thread(target=self._forward, args=(process.stdout,))
            reader.start()
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return f'was killed after {timeout_s:.0f} s'
            finally:                # also after Ctrl-C; the group includes compilers
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                reader.join()
        return _failure(code)

    def _forward(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.progress(f'  {line.rstrip()}')

    def _folder(self, source: ModelSource) -> str:
        """Return the path of the model; create a folder with random weights if necessary."""
        if source.path:
            return source.path
        kind = 'weights' if source.written else 'shapes'
        folder = self.models / f'{source.synthetic}-{source.quantization}-{source.seed}-{kind}'
        if not (folder / 'config.json').is_file():
            self.made.append(folder)
            if source.written:
                self._write(source, folder)
            else:
                synthetic.describe(folder, source.synthetic, source.quantization, source.seed)
        return str(folder)

    def _write(self, source: ModelSource, folder: Path) -> None:
        """Write a checkpoint in a separate process, which frees the device when it ends."""
        synthetic.config(source.synthetic, source.quantization)
        command = [sys.executable, '-m', 'physai_decode.bench', '--synthetic', source.synthetic,
                   '--quantization', source.quantization, '--seed', str(source.seed),
                   '--write-checkpoint', str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            synthetic.forget(folder)
            raise OSError(f'no checkpoint: its writer {_failure(done.returncode)}; its last line: '
                          f'{_last_line(done.stdout)}')

    def forget_checkpoints(self) -> None:
        """Remove the folders with random weights that this run created."""
        for folder in self.made:
            synthetic.forget(folder)


def keep(result: Result, path: Path) -> None:
    """Write a result atomically."""
    part = path.with_suffix('.part')
    part.write_text(json.dumps(result, default=str))
    part.replace(path)


def _failure(code: int) -> str | None:
    """Describe the exit code of a process; None for success."""
    if code < 0:
        return f'was killed by {signal.Signals(-code).name}'
    return None if code == 0 else f'ended with code {code}'


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ['(empty)'])[-1][:300]


def _summary(result: Result) -> str:
    if result['status'] != 'done':
        return f'{result["status"]}: {result["error"]}'
    return ', '.join(
        f'{cell["context"]}: {cell["error"]}' if 'error' in cell else
        f'{cell["context"]}: {cell["itl_p50_s"] * 1e3:.3f} ms' for cell in result['contexts'])
