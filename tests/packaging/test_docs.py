"""What README and docs say is what the code does."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lmmhooks
from lmmhooks.bench.prompts import make_prompt
from lmmhooks.bench.shapes import build_model
from lmmhooks.cost import average_visual, solve_cut, visual_schedule
from lmmhooks.engines.runtime import find_runtime

ROOT = Path(__file__).resolve().parents[2]
GOTCHAS = ROOT / "docs" / "gotchas"
PAGES = sorted(page for page in ROOT.rglob("*.md") if not any(part.startswith(".venv") for part in page.parts))


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_up_to_date(builder, capsys) -> None:
    assert builder.main(["--check"]) == 0, capsys.readouterr().out


def test_cells_tell_all_from_some_from_refused(builder) -> None:
    every = dict.fromkeys(builder.MODES, "yes")
    assert builder._cell(every) == "all"
    assert builder._cell({**every, "beams": "refused: why"}) == "prefill, decode, padded batch, two images, sampling"
    assert builder._cell(dict.fromkeys(builder.MODES, "refused: no CLS token")) == "refused: no CLS token"
    refused = {**dict.fromkeys(builder.MODES[1:], "refused: call patch.answer"), "prefill": "yes", "answer": "yes"}
    assert builder._cell(refused) == "prefill, answer"
    assert builder._cell({}) == "not tested"


def test_support_matrix_covers_every_method_and_family(builder) -> None:
    matrix = json.loads((ROOT / "lmmhooks" / "support.json").read_text())
    assert set(matrix) == set(lmmhooks.methods()), "run `make support`"
    families = {frozenset(row) for row in matrix.values()}
    assert len(families) == 1, "every method was tried on every family"
    assert {mode for row in matrix.values() for modes in row.values() for mode in modes} == {*builder.MODES, "answer"}


def test_result_files_say_where_they_come_from() -> None:
    files = list((ROOT / "docs" / "benchmarks").glob("*.json"))
    assert files
    for file in files:
        record = json.loads(file.read_text())
        environment = record["environment"]
        assert environment["commit"], file.name
        assert environment["device_name"], file.name
        assert {"torch", "transformers", "lmmhooks"} <= set(environment["versions"]), file.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_commands_of_the_readme_exist() -> None:
    from lmmhooks.cli.app import COMMANDS

    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:^|`)lmmhooks ([a-z]+)", text, re.MULTILINE))
    assert named <= set(COMMANDS)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = text + (ROOT / "CONTRIBUTING.md").read_text()
    for line in re.findall(r"(?:^|`)make ([a-z -]+?)(?:`|\s+#|$)", pages, re.MULTILINE):
        assert set(line.split()) <= targets, line


def test_the_example_of_the_readme_runs(capsys, tmp_path) -> None:
    """As it stands there, with the bundled model, the settings the README names for it, and one of its own images."""
    (block, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    image = sorted((ROOT / "eval" / "lmmhooks_eval" / "tiny" / "data" / "images").iterdir())[0]
    code = block.replace('"llava-hf/llava-1.5-7b-hf"', '"tiny-llava"').replace('"photo.jpg"', repr(str(image)))
    code = code.replace("keep=128", "keep=16").replace('"var"', "\"var(sink_dims='any')\"")
    assert all(code.count(text) == 1 for text in ("tiny-llava", "keep=16", "sink_dims", str(image)))
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    assert find_runtime(model) is None


@pytest.fixture(scope="module")
def model():
    return build_model("test-shape")


def _inputs_embeds(model, inputs) -> None:
    with lmmhooks.wrap(model, "fastv(keep=16)"):
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))


def _static_cache(model, inputs) -> None:
    with lmmhooks.wrap(model, "fastv(keep=16)"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def _foreign_cache(model, inputs) -> None:
    cache = model(**inputs, use_cache=True).past_key_values
    with lmmhooks.wrap(model, "fastv(keep=16)"):
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


def _no_sink_channels(model, inputs) -> None:
    lmmhooks.wrap(model, "var")


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("inputs-embeds", _inputs_embeds),
        ("static-cache", _static_cache),
        ("foreign-cache", _foreign_cache),
        ("no-sink-channels", _no_sink_channels),
    ],
)
def test_symptoms_are_what_users_see(page, wrong, model) -> None:
    text = (GOTCHAS / f"{page}.md").read_text()
    (symptom,) = re.findall(r"```text\n(.*?)\n```", text, re.DOTALL)
    inputs = make_prompt(model, text=64).inputs
    with pytest.raises(lmmhooks.LmmhooksError) as raised, torch.no_grad():
        wrong(model, inputs)
    lmmhooks.unwrap(model)
    assert str(raised.value).startswith(symptom)


def test_one_eager_layer_is_not_causal() -> None:
    """The page's claim about transformers, so that it goes away when transformers changes."""
    model = build_model("test-shape")
    ids = torch.arange(5, 17)[None]
    other = ids.clone()
    other[0, -1] = 50

    def causal() -> bool:
        with torch.no_grad():
            return torch.equal(model(input_ids=ids).logits[:, :-1], model(input_ids=other).logits[:, :-1])

    assert causal()
    attention = model.model.language_model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "eager"
    assert not causal()


def test_sdpa_returns_no_weights(model) -> None:
    with torch.no_grad():
        assert model(input_ids=torch.arange(5, 10)[None], output_attentions=True).attentions == ()


def test_budget_page_matches_the_cost_model() -> None:
    text = (GOTCHAS / "budgets.md").read_text()
    for label, kept in (("192", (180, 196)), ("128", (114, 132)), ("64", (48, 68))):
        fastv, dart = (average_visual(visual_schedule(32, 576, {2: count})) for count in kept)
        assert f"| {label} | {fastv:.1f} |" in text
        assert f"| {dart:.1f} | {label} |" in text
    assert f"576 tokens in two layers, {solve_cut(192, 576, 32, 2)} in thirty" in text
