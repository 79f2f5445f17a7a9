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
Run cases one after another, each in a fresh process, and keep what each one gave in a file.

A result that is already in the folder is not measured again, so a run that was broken off goes on
where it stopped; a session that died, or that was broken off with its run, is tried again by the
next run, and its result keeps how it was lost.
"""

from collections.abc import Callable
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

Result = dict[str, Any]


class Runner:
    """
    Runs cases and keeps their results under ``out/sessions``.

    :param models: where folders with random weights are made.
    :param session_timeout_s: a session that takes longer is ended; it counts as died.
    :param budget_s: no session starts after this long, and none runs past it; 0 sets no limit.
    """

    def __init__(self, out: Path, models: Path, session_timeout_s: float = 3600.0,
                 budget_s: float = 0.0, progress: Callable[[str], None] = print) -> None:
        self.sessions = out / 'sessions'
        self.sessions.mkdir(parents=True, exist_ok=True)
        self.models = models
        self.made: list[Path] = []
        self.session_timeout_s = session_timeout_s
        self.end_s = time.monotonic() + budget_s if budget_s else float('inf')
        self.progress = progress

    def run(self, cases: Sequence[Case]) -> list[Result]:
        """Give one result a case, in their order; what can't run is a result that says why."""
        results = []
        for number, case in enumerate(cases, 1):
            self.progress(f'[{number}/{len(cases)}] {case.session or case.label}: {case.source}, '
                          f'contexts {" ".join(map(str, case.contexts))}')
            results.append(self._one(case))
            self.progress('  ' + _one_line(results[-1]))
        return results

    def _one(self, case):
        path, lost = self.sessions / f'{case.key()}.json', []
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept['status'] == 'done':
                self.progress(f'  already measured: {path.name}')
                return {**kept, 'kept': True}
            lost = kept.get('lost', []) + [kept['error']] * (kept['status'] == 'died')
        told = {'case': case.to_dict(), 'lost': lost}
        result = {**self._measure(case, path, told), **told}
        keep(result, path)
        return result

    def _measure(self, case, path, told):
        """Give what a session wrote, or why there is nothing; until then, that it was lost."""
        lacking = [name for name in case.requires if importlib.util.find_spec(name) is None]
        if lacking:
            return {'status': 'unavailable', 'contexts': [],
                    'error': f'not installed: {", ".join(lacking)} '
                             f'(pip install {" ".join(lacking)})'}
        left_s = min(self.session_timeout_s, self.end_s - time.monotonic())
        if left_s <= 0:
            return {'status': 'unavailable', 'contexts': [],
                    'error': 'not started: the time set by --budget-s is spent'}
        try:
            located = replace(case, source=replace(case.source, path=self._folder(case.source)))
        except (OSError, ValueError) as error:
            return {'status': 'unavailable', 'contexts': [], 'error': str(error)}
        case_path, seen_path, log_path = map(path.with_suffix, ('.case', '.seen', '.log'))
        case_path.write_text(json.dumps(located.to_dict()))
        seen_path.unlink(missing_ok=True)
        keep({'status': 'died', 'contexts': [], **told,
              'error': 'the session was broken off with its run'}, path)
        how = self._process(case_path, seen_path, log_path, left_s)
        case_path.unlink()
        if seen_path.is_file():
            result = json.loads(seen_path.read_text())
            seen_path.unlink()
            if how is None:
                log_path.unlink()
            else:                   # all was measured; it was timing kernels one by one
                result['contexts'][0]['kernels_error'] = f'the session {how}; see {log_path.name}'
            return result
        return {'status': 'died', 'contexts': [],
                'error': f'the session {how or "wrote nothing"}; {log_path.name} ends: '
                         f'{_last_line(log_path.read_text(errors="replace"))}'}

    def _process(self, case_path, result_path, log_path, timeout_s):
        """Run the session; give None where it ended well, else how it ended."""
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
                return f'was ended after {timeout_s:.0f} s'
            finally:                # also after Ctrl-C, of itself and of the compilers it started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                reader.join()
        return _how(code)

    def _forward(self, lines):
        for line in lines:
            self.progress(f'  {line.rstrip()}')

    def _folder(self, source):
        """Give the model's path; a folder of random weights is made where it is not there."""
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

    def _write(self, source, folder):
        """Write a checkpoint in a process of its own: it needs the device, and gives it back."""
        synthetic.config(source.synthetic, source.quantization)
        command = [sys.executable, '-m', 'physai_decode.bench', '--synthetic', source.synthetic,
                   '--quantization', source.quantization, '--seed', str(source.seed),
                   '--write-checkpoint', str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            synthetic.forget(folder)
            raise OSError(f'no checkpoint: its writer {_how(done.returncode)}; its last line: '
                          f'{_last_line(done.stdout)}')

    def forget_checkpoints(self) -> None:
        """Remove the folders with random weights that this run made: they count gigabytes."""
        for folder in self.made:
            synthetic.forget(folder)


def keep(result: Result, path: Path) -> None:
    """Write a result, whole or not at all."""
    part = path.with_suffix('.part')
    part.write_text(json.dumps(result, default=str))
    part.replace(path)


def _how(code):
    """Say how a process ended, None where it ended well."""
    if code < 0:
        return f'was ended by {signal.Signals(-code).name}'
    return None if code == 0 else f'ended with code {code}'


def _last_line(text):
    return (text.strip().splitlines() or ['(empty)'])[-1][:300]


def _one_line(result):
    if result['status'] != 'done':
        return f'{result["status"]}: {result["error"]}'
    said = [f'{cell["context"]}: ' + (f'{cell["itl_p50_s"] * 1e3:.3f} ms' if 'error' not in cell
                                      else cell['error']) for cell in result['contexts']]
    return ', '.join(said)
