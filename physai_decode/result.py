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
The result of a request as a JSON object in the format of OpenAI's ``chat.completion``.

Fields that OpenAI does not define are under ``physai``: the node's finish reason and message, and
every figure of the request.
"""

from dataclasses import asdict
import time
from typing import Any

from physai_decode.config import SERVER
from physai_decode.timing import RequestReport

COMPLETE = ('stop', 'tool_calls')               # the finish reasons of a complete answer
ANSWERED = ('stop', 'length', 'tool_calls')     # those that OpenAI defines; others become null


def chat_completion(report: RequestReport, text: str, model: str,
                    created_s: float | None = None) -> dict[str, Any]:
    """
    Return the result of a request, which may have been refused; unknown figures are None.

    :param text: the whole answer; empty for a refused request.
    :param model: the name of the model, as in ``model.path``.
    :param created_s: Unix time in seconds; None for now.
    """
    figures = asdict(report)
    reasoning, reason = figures.pop('reasoning'), report.finish_reason
    del figures['tool_calls']
    pieces = report.engine == SERVER            # output_tokens counts pieces of text, not tokens
    prompt, output = report.prompt_tokens, report.server_tokens if pieces else report.output_tokens
    return {
        'id': figures.pop('client_id') or None, 'object': 'chat.completion',
        'created': int(time.time() if created_s is None else created_s), 'model': model,
        'choices': [{
            'index': 0,
            'message': {'role': 'assistant', 'content': text,
                        'reasoning_content': reasoning or None,
                        'tool_calls': [call.to_json() for call in report.tool_calls]},
            'finish_reason': reason if reason in ANSWERED else None}],
        'usage': {
            'prompt_tokens': prompt, 'completion_tokens': output,
            'total_tokens': None if prompt is None or output is None else prompt + output,
            'prompt_tokens_details': {'cached_tokens': report.cached_tokens},
            'completion_tokens_details': {
                'reasoning_tokens': None if pieces else report.reasoning_tokens}},
        'physai': figures}
