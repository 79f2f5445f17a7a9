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
The HTTP server: OpenAI's API for the node's model, and its figures for Prometheus.

The server runs an event loop in its own thread, and does not depend on ROS. Its libraries are an
optional extra of the package, so they are imported only when a server starts.
"""

from collections.abc import Callable
import os
from typing import TYPE_CHECKING

from physai_decode.config import HttpConfig
from physai_decode.host import Host
from physai_decode.pip_command import install

if TYPE_CHECKING:
    from physai_decode.http.server import HttpServer

KEY_VARIABLE = 'PHYSAI_DECODE_API_KEY'      # of the environment


class HttpError(RuntimeError):
    """The server can't start; the message says why and what to do."""


def start_server(host: Host, config: HttpConfig, note: Callable[[str, BaseException], None],
              errors: Callable[[], int]) -> 'HttpServer':
    """
    Serve the host's model on a port until the server is closed.

    :param note: called with the source of an unexpected error and the error.
    :param errors: returns the count of callback errors, for /metrics.
    :raises HttpError: a library is missing, the API key is invalid, or the port can't be opened.
    """
    try:
        from physai_decode.http.server import HttpServer
    except ImportError as error:
        raise HttpError(
            f'http.port is {config.port}, and {error}: '
            f'{install("uvicorn", "prometheus_client")}, or set http.port to 0') from error
    key = os.environ.get(KEY_VARIABLE, '')
    if not (key.isascii() and key.isprintable()) or ' ' in key:
        raise HttpError(f'{KEY_VARIABLE} has characters that a header cannot contain: use '
                        'printable ASCII without spaces')
    return HttpServer(host, config, key, note, errors)
