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
MkDocs hook: links from a page to a file outside docs/ lead to the repository.

On a forge, such links lead to the file itself, so the pages work in both places.
"""

import logging
import os
from pathlib import Path
import re
from typing import Any

_LINK = re.compile(r'(\]\()([^)\s#:]+)(?=[)#])')
_log = logging.getLogger('mkdocs.hooks.site_links')


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """
    Replace the links out of docs/ with URLs.

    A missing file is a warning, which fails a strict build.
    """
    root = Path(config['config_file_path']).parent
    docs = Path(config['docs_dir'])
    here = docs / Path(page.file.src_uri).parent

    def outward(match: 're.Match[str]') -> str:
        target = Path(os.path.normpath(here / match[2]))
        if target.is_relative_to(docs) and target != docs:
            return match[0]
        if not target.exists():
            _log.warning('%s links to %s, which is not there', page.file.src_uri, match[2])
        kind = 'tree' if target.is_dir() else 'blob'
        return f'{match[1]}{config["extra"]["repository"]}/{kind}/main/{target.relative_to(root)}'

    return _LINK.sub(outward, markdown)
