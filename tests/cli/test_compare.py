"""`lmmhooks compare` as users run it, on an untrained model saved to a folder."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.cli.invoke import invoke
from tests.test_loading import save
from tests.zoo import build

CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("compare")
    save("llava", build("llava").model, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    Image.radial_gradient("L").convert("RGB").save(folder / "image.png")
    return str(folder / "model"), str(folder / "image.png")


def arguments(saved, *more: str) -> list[str]:
    model, image = saved
    return ["compare", "--model", model, "--image", image, "--prompt", "what is this", "--max-new-tokens", "3", *more]


def test_json_and_page(saved, tmp_path) -> None:
    page = tmp_path / "page.html"
    variants = ("--method", "uniform-grid(keep=4)", "--method", "uniform-grid(keep=4) + var(sink_dims='any', tau=2.6)")
    done = invoke(*arguments(saved, *variants, "--json", "--html", str(page)))
    assert done.status == 0, done.err
    runs = json.loads(done.out)["runs"]
    assert [run["name"].count("+") for run in runs] == [0, 0, 1]
    baseline, reduced, both = (run["stats"] for run in runs)
    assert baseline["flops_saved"] == 0
    assert reduced["average_visual"] == both["average_visual"] == 4
    runs = json.loads(done.out)["runs"]
    assert runs[0]["difference"] is None
    assert len(runs[1]["difference"]["dlogp"]) == len(runs[0]["along_baseline"]["tokens"])
    html = page.read_text()
    assert "uniform-grid(keep=4)" in html
    assert "data:image/png;base64," in html
    assert "http" not in html.replace("http://www.w3.org", "")


def test_a_method_that_answers_by_itself(saved) -> None:
    done = invoke(*arguments(saved, "--method", "mvp"))
    assert done.status == 0, done.err
    assert "several generations" in done.out


def test_table(saved) -> None:
    done = invoke(*arguments(saved, "--method", "vcd"))
    assert done.status == 0, done.err
    assert "baseline" in done.out
    assert "2.000" in done.out, "a second branch doubles the arithmetic of the prompt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--method": "varr"}, "did you mean 'var'"),
        ({"--method": "fastv(kep=4)"}, "did you mean 'keep'"),
        ({"--image": "nowhere.png"}, "nowhere.png"),
        ({"--prompt": "  "}, "prompt"),
        ({"--model": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_bad_input_is_one_line(saved, changes, message) -> None:
    given = arguments(saved, "--method", "fastv(keep=4)")
    for option, value in changes.items():
        given[given.index(option) + 1] = value
    done = invoke(*given)
    assert done.status == 2
    assert message in done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ")


def test_image_that_does_not_decode(saved, tmp_path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    given = arguments(saved, "--method", "vcd")
    given[given.index("--image") + 1] = str(broken)
    done = invoke(*given)
    assert done.status == 2
    assert "broken.png" in done.err
