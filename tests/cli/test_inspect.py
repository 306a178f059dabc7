"""`lmmhooks inspect` as users run it, on an untrained model saved to a folder."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.cli.invoke import invoke
from tests.cli.test_compare import CHAT
from tests.test_loading import save
from tests.zoo import build


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inspect")
    save("llava", build("llava").model, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    Image.radial_gradient("L").convert("RGB").save(folder / "image.png")
    prompt = "what is this what is this what is this"
    return ["inspect", "--model", str(folder / "model"), "--image", str(folder / "image.png"), "--prompt", prompt]


def test_table(given) -> None:
    done = invoke(*given)
    assert done.status == 0, done.err
    assert "no sink channels" in done.out
    assert "- no visual sinks" in done.out
    assert "heads on image" in done.out


def test_json_and_page(given, tmp_path) -> None:
    page = tmp_path / "page.html"
    done = invoke(
        *given, "--json", "--html", str(page), "--sink-dims", "3,5", "--probe-rows", "all", "--max-new-tokens", "3"
    )
    assert done.status == 0, done.err
    said = json.loads(done.out)
    assert len(said["answer"]["along_baseline"]["maps"]) == said["answer"]["num_tokens"] <= 3
    report = said["sinks"]
    assert report["channels"]["dims"] == [3, 5]
    assert report["channels"]["source"] == "given"
    (sample,) = report["samples"]
    assert sample["probe_rows"] == sample["length"]
    html = page.read_text()
    assert "data:image/png;base64," in html
    assert "Where it looks, token by token" in html


def test_a_prompt_without_image(given) -> None:
    text = [part for i, part in enumerate(given) if part != "--image" and given[i - 1] != "--image"]
    done = invoke(*text)
    assert done.status == 0, done.err
    assert "no image in this prompt" in done.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--image": "nowhere.png"}, "nowhere.png"),
        ({"--sink-dims": "1415;2533"}, "give whole numbers"),
        ({"--sink-dims": "4096"}, "channels of this model lie in [0, 64)"),
        ({"--probe-rows": "0"}, "probe_rows is 0"),
        ({"--prompt": " "}, "prompt is empty"),
    ],
)
def test_bad_input_is_one_line(given, changes, message) -> None:
    arguments = list(given)
    for option, value in changes.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    done = invoke(*arguments)
    assert done.status == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1 or done.err.strip().splitlines()[-1].startswith("error: ")
