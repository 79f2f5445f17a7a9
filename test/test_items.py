"""An answer's elements: the same however its text is cut, and none before it is complete."""

import json

from physai_decode.items import Item
from physai_decode.items import Items
import pytest


def given(*pieces) -> list[Item]:
    """Give all elements of an answer."""
    items = Items()
    return [item for piece in pieces for item in items.feed(piece)]


def elements(text) -> list[tuple]:
    """Give what is to come of a whole answer, by the library's own reading of it."""
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
