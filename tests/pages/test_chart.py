"""What all charts have in common: numbers that JSON has, colours of paper."""

import json
import re
from pathlib import Path

import cap_hf.pages
from cap_hf.pages.chart import PAPER, Chart, axis, clean, colour, on_paper, tip


def test_numbers_that_json_does_not_have_become_none():
    values = clean({"a": [1.5, float("nan"), float("inf")], "b": (float("-inf"), "nan")})
    assert values == {"a": [1.5, None, None], "b": [None, "nan"]}
    json.dumps(values, allow_nan=False)


def test_a_whole_specification_fills_its_place():
    spec = Chart("a", "A", "", {"mark": "bar", "height": 50}).whole()
    assert (spec["width"], spec["height"], spec["mark"]) == ("container", 50, "bar")
    assert spec["config"]["background"] == "transparent"


def test_on_paper_there_are_colours_in_the_place_of_names():
    spec = on_paper(Chart("a", "A", "", {"mark": {"type": "bar", "color": "var(--c1)"}}).whole())
    assert spec["mark"]["color"] == PAPER["--c1"]
    assert "var(--" not in json.dumps(spec)
    assert spec["width"] == 720


def test_every_colour_is_one_of_the_page_in_all_its_settings():
    style = (Path(cap_hf.pages.__path__[0]) / "style.css").read_text()
    for name in PAPER:
        assert len(re.findall(rf"{name}: #", style)) == 3, name


def test_encodings():
    assert axis("x", "X", scale={"zero": True}) == {
        "field": "x",
        "type": "quantitative",
        "title": "X",
        "scale": {"zero": True},
    }
    assert colour("s")["sort"] is None
    assert tip(("a", "A"), ("b", "B", ".2f")) == [
        {"field": "a", "title": "A"},
        {"field": "b", "title": "B", "format": ".2f", "type": "quantitative"},
    ]
