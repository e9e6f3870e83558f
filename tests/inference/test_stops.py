import random

import pytest

from lalia.inference.stops import StopStrings


def by_hand(text: str, stops: list[str]) -> str:
    """What passes: read characters until some stop string ends there; the longest of those is cut off."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


def in_pieces(text: str, stops: list[str], generator: random.Random, longest: int) -> str:
    matcher, passed, position = StopStrings(stops), "", 0
    while position < len(text):
        size = generator.randint(1, longest)
        piece, stopped = matcher.push(text[position : position + size])
        passed += piece
        if stopped:
            return passed
        position += size
    return passed + matcher.flush()


@pytest.mark.parametrize("longest", [1, 2, 7])
def test_pieces_of_any_size_equal_reading_by_hand(longest):
    generator = random.Random(longest)
    ended = 0
    for _ in range(1500):
        text = "".join(generator.choices("abc", k=generator.randint(0, 20)))
        stops = ["".join(generator.choices("abc", k=generator.randint(1, 5))) for _ in range(generator.randint(1, 4))]
        expected = by_hand(text, stops)
        assert in_pieces(text, stops, generator, longest) == expected, (text, stops)
        ended += expected != text
    assert 300 < ended < 1400  # both cases were met


def test_holds_back_only_what_may_become_a_stop_string():
    matcher = StopStrings(["\nUSER:", "END"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("US") == ("", False)
    assert matcher.push("A E") == ("\nUSA ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.flush() == "EN"


def test_without_stop_strings_everything_passes():
    assert StopStrings([]).push("text") == ("text", False)
