"""The page and the JSON of a diagnosis."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace

import pytest
from PIL import Image

import lmmhooks
from lmmhooks.inspect import sinks
from lmmhooks.pages import areas, chart, picture_uri
from tests.comparison.made import comparison, run, trace
from tests.planted import MASSIVE, planted
from tests.zoo import build


@pytest.fixture(scope="module")
def report():
    zoo = planted(carried=[3], ignored=[7])
    return sinks(zoo.model, zoo.inputs(batch=2, text=[12, 20]), sink_dims=MASSIVE)


def test_page_is_self_contained_and_marks_the_cells(report, tmp_path):
    page = report.to_html(tmp_path / "page.html").read_text()
    assert "http" not in page
    assert "<script" not in page
    assert page.count('class="sink"') == 2, "one patch in each of two prompts"
    assert 'x="3" y="0" width="1" height="1" class="sink"' in page
    assert page.count('class="outlier"') == 4
    assert "Attention on sinks" in page


def test_a_page_without_visual_sinks_has_words_instead_of_plots(tmp_path):
    zoo = build("llava")
    page = sinks(zoo.model, zoo.inputs(text=20), sink_dims=()).to_html(tmp_path / "page.html").read_text()
    assert "No visual sinks: no visual token is one in any layer that was judged." in page
    assert "Attention on sinks" not in page
    assert "nothing to mark" in page


def test_text_of_tokens_and_models_is_escaped(report, tmp_path):
    layer = report.samples[0].layers[3]
    token = replace(layer.tokens[0], text="<img src=x>")
    layers = (*report.samples[0].layers[:2], replace(layer, tokens=(token,)))
    changed = replace(
        report, model={**report.model, "name": "<b>name"}, samples=(replace(report.samples[0], layers=layers),)
    )
    page = changed.to_html(tmp_path / "page.html").read_text()
    assert "<img src=x>" not in page
    assert "<b>name" not in page
    assert "&lt;img src=x&gt;" in page


def test_json_is_plain_and_indexed_by_layer(report, tmp_path):
    stored = json.loads(report.to_json(tmp_path / "report.json").read_text())
    assert stored == report.to_dict()
    assert "pictures" not in stored
    for sample in stored["samples"]:
        assert [layer["layer"] for layer in sample["layers"]] == list(range(6))
        assert sample["layers"][4]["tokens"][1]["row"] == 0
    assert stored["channels"]["dims"] == list(MASSIVE)
    assert stored["model"]["fingerprint"]


@pytest.mark.parametrize("write", ["to_html", "to_json"])
def test_a_place_that_cannot_be_written_is_named(report, tmp_path, write):
    with pytest.raises(lmmhooks.LmmhooksError, match="choose another place"):
        getattr(report, write)(tmp_path / "missing" / "file")


def test_pictures_are_those_of_the_crops():
    zoo = build("internvl")
    report = sinks(zoo.model, zoo.inputs(images=2, text=9), sink_dims=())
    assert [(p.image, p.crop, p.grid) for p in report.pictures] == [
        *((0, crop, (2, 2)) for crop in range(3)),
        (1, 0, (2, 2)),
    ]


def test_curves_stop_where_values_are_missing():
    drawn = chart("title", {"a": [None, 1.0, 2.0, None, 4.0], "b": [None] * 5})
    assert list(drawn.curves) == ["a"]
    assert [[(layer, value) for _, _, layer, value in run] for run in drawn.curves["a"]] == [
        [(1, 1.0), (2, 2.0)],
        [(4, 4.0)],
    ]
    assert drawn.curves["a"][1][0][:2] == (100.0, 0.0)
    assert chart("title", {"a": [None, None]}) is None
    assert chart("title", {"a": [0.0, None, 0.0]}) is None, "a curve at zero says nothing; words do"


def test_logarithmic_curves_span_whole_decades():
    drawn = chart("title", {"a": [0.5, 300.0, 0.0]}, log=True)
    assert [text for _, text in drawn.ticks] == ["0.1", "1000"]
    ((low, high),) = drawn.curves["a"]
    assert math.isclose(low[1], 50 - 50 * (math.log10(0.5) + 1) / 4)
    assert math.isclose(high[3], 300.0)


def test_curves_below_zero_have_a_line_there():
    drawn = chart("title", {"a": [-1.0, 3.0], "b": [0.0, 0.0]}, axis="token", first=1, names=["z", "a", "b"])
    assert drawn.zero == 37.5
    assert [text for _, text in drawn.ticks] == ["-1", "3", "0"]
    assert drawn.layers == (1, 2)
    assert drawn.tones["b"] == 2, "colours go by all names, of which some may be missing here"
    assert chart("title", {"a": [1.0, 3.0]}).zero is None


def test_areas_stack_up_to_the_whole():
    drawn = areas("title", {"low": [0.25, 0.5], "high": [0.75, 0.5]})
    low, mean = drawn.areas["low"]
    assert low == [(0, 37.5), (100, 25), (100, 50), (0, 50)]
    assert mean == 0.375
    high, _ = drawn.areas["high"]
    assert high == [(0, 0), (100, 0), (100, 25), (0, 37.5)]
    assert areas("title", {"all": [1.0]}).areas["all"][0] == [(0, 0), (100, 0), (100, 50), (0, 50)]


@pytest.mark.parametrize(("side", "kind"), [(64, "png"), (2000, "jpeg")])
def test_photographs_are_made_smaller(side, kind):
    noise = Image.effect_noise((side, side // 2), 80).convert("RGB")
    uri = picture_uri(noise)
    assert uri.startswith(f"data:image/{kind};base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as shown:
        assert shown.size == (min(side, 1024), min(side, 1024) // 2)
    assert noise.size == (side, side // 2), "the caller's image is left alone"


def test_an_answer_is_shown_above_the_sinks(report, tmp_path):
    led = trace(tokens=3, layers=6, side=4)
    answer = comparison([run("baseline", led, size=(32, 32))], (32, 32), prompt="Is it <b>here</b>?")
    page = report.to_html(tmp_path / "page.html", answer).read_text()
    assert page.index("Where it looks, token by token") < page.index("Attention sinks of the prompt")
    assert "Is it &lt;b&gt;here&lt;/b&gt;?" in page
    assert page.count("<script") == 2
    assert 'class="sink"' in page
