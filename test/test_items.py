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

"""An answer's elements: the same however its text is cut, and none before it is complete."""

import json

from fake_engine import FakeEngine
from fake_engine import say
from physai_decode.items import Item
from physai_decode.items import Items
from physai_decode.request import Form
from physai_decode.request import Request
from physai_decode.timing import ItemReport
import pytest
from worker_rig import making
from worker_rig import Sink

PLAN = '{"plan": [{"go": "a^b"}, 12, "x"]}'
FORM = Form('json_schema', {'type': 'object'}, 'it')


def given(*pieces) -> list[Item]:
    """Return all elements of an answer."""
    items = Items()
    return [item for piece in pieces for item in items.feed(piece)]


def elements(text) -> list[tuple]:
    """Return what is to come of a whole answer, by the library's own reading of it."""
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
def test_every_split(text):
    """In two, in three, and character by character; empty pieces change nothing."""
    expected = elements(text)
    whole = given(text)
    assert [(path, index, json.loads(value)) for path, index, value in whole] == expected
    assert given(*text) == whole
    for one in range(len(text) + 1):
        for other in range(one, len(text) + 1):
            assert given(text[:one], text[one:other], '', text[other:]) == whole


@pytest.mark.parametrize('text', ANSWERS)
def test_a_cut_answer_gives_the_elements_that_are_complete(text):
    """A beginning of an answer gives a beginning of its elements, each as it will stay."""
    whole, before = given(text), 0
    for length in range(len(text) + 1):
        found = given(text[:length])
        assert found == whole[:len(found)]
        assert before <= len(found)
        before = len(found)


@pytest.mark.parametrize(('text', 'sign'), [
    ('[12, 3]', ','), ('[12]', ']'), ('[12 ]', ']'), ('[true]', ']'), ('["a" ]', '"'),
    ('[{"a": {}} ]', '}'), ('[[[]] ]', ']'), ('{"a": [{"b": 1}]}', '}')])
def test_an_element_comes_at_once(text, sign):
    """A number and a word wait for what follows, all else for nothing."""
    items = Items()
    came = next(length for length, each in enumerate(text, 1) if items.feed(each))
    assert text[came - 1] == sign
    assert given(text[:came - 1]) == []


def test_an_element_is_as_it_was_written():
    """Numbers keep their digits; a name that comes twice is not lost."""
    text = '[ 1.00, {"a":1, "a":2}, 12345678901234567890123 ]'
    assert [item.text for item in given(text)] == [
        '1.00', '{"a":1, "a":2}', '12345678901234567890123']


def test_nesting_has_no_limit():
    """It counts, and calls nothing within itself."""
    deep = '[' * 100_000 + ']' * 100_000
    assert [item.text for item in given(f'[{deep}]')] == [deep]


def broken(text):
    """Say a text, then fail."""
    yield from say(text, end=False)
    raise RuntimeError('the engine broke')


def test_the_worker_gives_each_element_after_its_token():
    """To the sink and to the request's own listener; the end counts them."""
    with making() as make:
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
def test_only_what_is_json_by_its_form_has_elements(options, items):
    """Of any other answer the end says that there could be none."""
    with making() as make:
        worker, sink = make(FakeEngine(lambda ids: say(PLAN), vocab_size=128))
        report, text = sink.end(worker.submit(Request('go', **options)))
        assert (report.finish_reason, text) == ('stop', PLAN)
        assert (report.items, len(sink.items)) == (items, items or 0)
        assert (report.first_item_ms is None) == (items is None)


@pytest.mark.parametrize(('said', 'limit', 'reason'), [
    (lambda text: broken(text[:-7]), 99, 'error'), (say, len(PLAN) - 7, 'length')])
def test_what_was_given_before_a_fault_stays_given(said, limit, reason):
    """Twelve is not complete: it might have become a hundred and twenty."""
    with making() as make:
        worker, sink = make(FakeEngine(lambda ids: said(PLAN), vocab_size=128), form=FORM)
        report, text = sink.end(worker.submit(
            Request('go', sampling={'max_new_tokens': limit})))
        assert (report.finish_reason, text[-2:], report.items) == (reason, '12', 1)
        assert [item.value for _, item in sink.items] == ['{"go": "a^b"}']
        report, _ = sink.end(worker.submit(Request('go', sampling={'max_new_tokens': 2})))
        assert (report.items, report.first_item_ms) == (0, None)


def test_the_json_form_has_the_value_as_it_was_written():
    """And no id where the client gave none."""
    text = ItemReport(7, '', 0, '/plan', 12.34567, '{"n": 1.00, "s": "\\u0000ä"}').to_json()
    assert text == ('{"request_id": 7, "id": null, "index": 0, "path": "/plan", "t_ms": 12.346, '
                    '"value": {"n": 1.00, "s": "\\u0000ä"}}')
    assert json.loads(text)['value'] == {'n': 1.0, 's': '\0ä'}
