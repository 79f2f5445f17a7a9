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

"""The elements of an answer do not depend on how its text is split, and are always complete."""

import json

from fake_engine import FakeEngine
from fake_engine import say
from physai_decode.items import Item
from physai_decode.items import Items
from physai_decode.request import Form
from physai_decode.request import Request
from physai_decode.timing import ItemReport
import pytest
from worker_rig import maker
from worker_rig import Sink

PLAN = '{"plan": [{"go": "a^b"}, 12, "x"]}'
FORM = Form('json_schema', {'type': 'object'}, 'it')
make = pytest.fixture(maker)


def given(*pieces) -> list[Item]:
    """Return all elements of an answer."""
    items = Items()
    return [item for piece in pieces for item in items.feed(piece)]


def elements(text) -> list[tuple]:
    """Return the expected elements of a whole answer, as parsed by json."""
    value = json.loads(text)
    arrays = {'': value} if isinstance(value, list) else {
        '/' + name.replace('~', '~0').replace('/', '~1'): each for name, each in value.items()
        if isinstance(each, list)} if isinstance(value, dict) else {}
    return [(path, index, each) for path, array in arrays.items()
            for index, each in enumerate(array)]


ANSWERS = [
    '[]', '[ ]', '{}', '7', '"[1]"', 'null', '[[]]', '[{}]', '[""]', '[0]', '[-1.5e+3,22 , 3]',
    '[true,false,null]', '[ "a" ,\n{ "b" : [1, 2] } , [[3], 4] ]',
    r'["\"", "\\", "\\\"]", "\u005d\ud83d\ude00", "[{,", "]}"]',
    '["ä", "\U0001f600]", {"é": "],["}]',
    '{"plan": [{"action": "go", "to": "a, b"}, {"action": "stop"}]}',
    '{"why": "because [1, 2]", "plan": [1, 2], "rest": {"deep": [3]}, "more": ["x"], "n": 1}',
    r'{"a/b~c": [1], "\u0061": [2], "\"[": ["]"], "": [3]}',
    '[{"deep": [[[{"a": [1, 2]}]]]}, 1]']


@pytest.mark.parametrize('text', ANSWERS)
def test_elements_do_not_depend_on_the_split_of_the_text(text):
    """The text is split in two, in three, and into characters; empty pieces change nothing."""
    expected = elements(text)
    whole = given(text)
    assert [(path, index, json.loads(value)) for path, index, value in whole] == expected
    assert given(*text) == whole
    for one in range(len(text) + 1):
        for other in range(one, len(text) + 1):
            assert given(text[:one], text[one:other], '', text[other:]) == whole


@pytest.mark.parametrize('text', ANSWERS)
def test_truncated_answer_has_its_complete_elements(text):
    """They are the first elements of the whole answer, unchanged."""
    whole, before = given(text), 0
    for length in range(len(text) + 1):
        found = given(text[:length])
        assert found == whole[:len(found)]
        assert before <= len(found)
        before = len(found)


@pytest.mark.parametrize(('text', 'sign'), [
    ('[12, 3]', ','), ('[12]', ']'), ('[12 ]', ']'), ('[true]', ']'), ('["a" ]', '"'),
    ('[{"a": {}} ]', '}'), ('[[[]] ]', ']'), ('{"a": [{"b": 1}]}', '}')])
def test_element_is_complete_as_early_as_possible(text, sign):
    """A number or a literal ends with the next character, any other element with its own last."""
    items = Items()
    came = next(length for length, each in enumerate(text, 1) if items.feed(each))
    assert text[came - 1] == sign
    assert given(text[:came - 1]) == []


def test_element_keeps_the_text_of_the_model():
    """Numbers keep their digits, and a duplicate name stays."""
    text = '[ 1.00, {"a":1, "a":2}, 12345678901234567890123 ]'
    assert [item.text for item in given(text)] == [
        '1.00', '{"a":1, "a":2}', '12345678901234567890123']


def test_nesting_has_no_limit():
    """The parser counts the depth, and is not recursive."""
    deep = '[' * 100_000 + ']' * 100_000
    assert [item.text for item in given(f'[{deep}]')] == [deep]


def broken(text):
    """Say a text, then fail."""
    yield from say(text, end=False)
    raise RuntimeError('the engine broke')


def test_worker_reports_each_element_after_its_token(make):
    """The sink and the listener of the request receive it, and the report counts elements."""
    worker, sink = make(FakeEngine(lambda ids: say(PLAN), vocab_size=128), form=FORM)
    mine = Sink()
    report, text = sink.end(worker.submit(Request('go', client_id='me'), listener=mine))
    assert (report.finish_reason, text) == ('stop', PLAN)
    mine.end(report.request_id)
    found = [item for _, item in sink.items]
    assert [item for _, item in mine.items] == found
    assert [(item.path, item.index, item.value) for item in found] == [
        ('/plan', 0, '{"go": "a^b"}'), ('/plan', 1, '12'), ('/plan', 2, '"x"')]
    assert [text[:tokens][-1] for tokens, _ in sink.items] == ['}', ',', '"']
    assert {(item.request_id, item.client_id) for item in found} == {(1, 'me')}
    times = [report.ttft_ms, *(item.t_ms for item in found), report.total_ms]
    assert times == sorted(times)
    assert (report.items, report.first_item_ms) == (3, found[0].t_ms)


@pytest.mark.parametrize(('options', 'items'), [
    ({'response_format': {'type': 'json_object'}}, 3),
    ({'response_format': {'type': 'text'}}, None),
    ({'structured_outputs': {'choice': [PLAN, 'no']}}, None)])
def test_only_answers_constrained_to_json_have_elements(make, options, items):
    """The report of any other answer has no count of elements."""
    worker, sink = make(FakeEngine(lambda ids: say(PLAN), vocab_size=128))
    report, text = sink.end(worker.submit(Request('go', **options)))
    assert (report.finish_reason, text) == ('stop', PLAN)
    assert (report.items, len(sink.items)) == (items, items or 0)
    assert (report.first_item_ms is None) == (items is None)


@pytest.mark.parametrize(('said', 'limit', 'reason'), [
    (lambda text: broken(text[:-7]), 99, 'error'), (say, len(PLAN) - 7, 'length')])
def test_elements_before_an_error_or_a_limit_are_reported(make, said, limit, reason):
    """The 12 at the end is not complete, because another digit could follow."""
    worker, sink = make(FakeEngine(lambda ids: said(PLAN), vocab_size=128), form=FORM)
    report, text = sink.end(worker.submit(
        Request('go', sampling={'max_new_tokens': limit})))
    assert (report.finish_reason, text[-2:], report.items) == (reason, '12', 1)
    assert [item.value for _, item in sink.items] == ['{"go": "a^b"}']
    report, _ = sink.end(worker.submit(Request('go', sampling={'max_new_tokens': 2})))
    assert (report.items, report.first_item_ms) == (0, None)


def test_json_form_keeps_the_text_of_the_value():
    """The id is null if the client gave none."""
    text = ItemReport(7, '', 0, '/plan', 12.34567, '{"n": 1.00, "s": "\\u0000ä"}').to_json()
    assert text == ('{"request_id": 7, "id": null, "index": 0, "path": "/plan", "t_ms": 12.346, '
                    '"value": {"n": 1.00, "s": "\\u0000ä"}}')
    assert json.loads(text)['value'] == {'n': 1.0, 's': '\0ä'}
