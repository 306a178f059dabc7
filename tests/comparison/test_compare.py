"""Comparisons on the bundled model: what is read while it is led along an answer is what a plain forward has."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.inspect.maps.result import SPANS
from lmmhooks.prompting import build_inputs
from lmmhooks_eval.tasks import scenes

QUESTION = "What is in this image? Describe it in one sentence."
SYSTEM, VISUAL, INSTRUCTION, GENERATED = range(4)


@pytest.fixture(scope="module")
def loaded():
    return lmmhooks.load("tiny-llava", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    document = next(iter(scenes.read("scenes_vqa.jsonl")))
    return scenes.images(document)[0].convert("RGB")


@pytest.fixture(scope="module")
def compared(loaded, picture):
    methods = ["fastv(keep=16)", "vcd", "vcd(lazy=True)", "yes-offset(offset=0)", "reduction-identity"]
    return lmmhooks.compare(*loaded, picture, QUESTION, methods, max_new_tokens=12)


@pytest.fixture(scope="module")
def eager(loaded, picture, compared):
    """Attention and logits of the baseline's answer, by one eager forward of a model of its own."""
    model, processor = lmmhooks.load("tiny-llava", device="cpu", dtype=torch.float32, attn_implementation="eager")
    inputs = build_inputs(processor, [picture], QUESTION)
    answer = torch.tensor([compared.baseline.along.tokens])
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        out = model(**inputs, output_attentions=True)
    rows = torch.stack([layer[0, :, length - 1 : -1] for layer in out.attentions])  # [L, H, T, N]
    visual = inputs["input_ids"][0] == model.config.image_token_id
    return rows.permute(2, 0, 1, 3), out.logits[0, length - 1 : -1].log_softmax(dim=-1), visual, length


# One row of float32 attention, by another kernel.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_rows_are_those_of_an_eager_forward(compared, eager) -> None:
    rows, _, visual, length = eager
    trace = compared.baseline.along
    mean = rows.mean(dim=2)
    torch.testing.assert_close(trace.visual, mean[..., visual], **CLOSE)
    first = int(visual.nonzero()[0])
    torch.testing.assert_close(trace.shares[..., SYSTEM], mean[..., :first].sum(dim=-1), **CLOSE)
    torch.testing.assert_close(trace.shares[..., GENERATED], mean[..., length:].sum(dim=-1), **CLOSE)
    # A sink is favoured by heads, not by their mean; rows see one key more with every token.
    seen = length + torch.arange(len(rows))
    favoured = (rows[..., visual] > 5 / seen[:, None, None, None]).float().mean(dim=2)
    torch.testing.assert_close(trace.favoured, favoured, **CLOSE)


def test_probabilities_are_those_of_an_eager_forward(compared, eager) -> None:
    _, logp, _, _ = eager
    trace = compared.baseline.along
    tokens = torch.tensor(trace.tokens)
    # Twelve layers' worth of rounding in the logits.
    torch.testing.assert_close(trace.logp, logp.gather(1, tokens[:, None])[:, 0], rtol=1e-3, atol=1e-3)
    assert trace.rank.tolist() == [1] * len(tokens), "the baseline is greedy along its own answer"


def test_shares_sum_to_one(compared) -> None:
    for run in compared.runs:
        torch.testing.assert_close(run.along.shares.sum(dim=-1), torch.ones(run.along.shares.shape[:2]), **CLOSE)
        assert run.along.shares.shape[-1] == len(SPANS)


def test_reading_changes_no_answer(loaded, picture, compared) -> None:
    model, processor = loaded
    inputs = build_inputs(processor, [picture], QUESTION)
    with torch.inference_mode():
        plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert compared.baseline.along.tokens == tuple(plain.tolist())
    assert compared.baseline.text == processor.tokenizer.decode(plain, skip_special_tokens=True).strip()
    assert lmmhooks.comparison.compare is lmmhooks.compare


@pytest.mark.parametrize("place", [4, 5])
def test_a_method_without_strength_differs_nowhere(compared, place) -> None:
    baseline, run = compared.baseline, compared.runs[place]
    assert run.text == baseline.text
    for values in (run.difference.dlogp, run.difference.kl, run.difference.kl_reverse):
        assert not bool(values.any())
    assert run.difference.diverges_at is None
    assert torch.equal(run.along.visual, baseline.along.visual)
    assert torch.equal(run.along.shares, baseline.along.shares)


def test_removed_tokens_have_no_value_from_there_on(compared) -> None:
    run = compared.runs[1]
    kept = [layer.visual_kept[0] for layer in run.stats.layers]
    assert run.along.present.sum(dim=1).tolist() == kept
    gone = run.along.removed < len(kept)
    assert int(gone.sum()) == 64 - 16
    assert set(run.along.removed[gone].tolist()) == {kept.index(16)}
    assert torch.equal(run.along.maps.isnan().any(dim=0), gone)
    assert not bool(run.along.visual[:, kept.index(16) :, gone].nan_to_num(0.0).any())
    assert sum(cell for row in run.kept for cell in row) == 16


@pytest.mark.parametrize("place", [2, 3])
def test_branches_are_not_taken_for_the_answer(compared, place) -> None:
    """Contrasting changes probabilities, and nothing of where the prompt as given looks."""
    run = compared.runs[place]
    torch.testing.assert_close(run.along.visual, compared.baseline.along.visual, **CLOSE)
    assert bool(run.difference.dlogp.any())
    assert bool((run.difference.kl >= 0).all())


def test_difference_is_that_of_the_two_distributions(compared) -> None:
    baseline, run = compared.baseline.along, compared.runs[1]
    for t, token in enumerate(baseline.tokens):
        p, q = baseline.distribution[t], run.along.distribution[t]
        assert float(run.difference.dlogp[t]) == pytest.approx(float(q[token] - p[token]), abs=1e-6)
        assert float(run.difference.kl[t]) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5)
        assert float(run.difference.kl_reverse[t]) == pytest.approx(float((q.exp() * (q - p)).sum()), abs=1e-5)


def test_an_answer_of_its_own_is_followed_too(compared) -> None:
    for run in compared.runs:
        spoken = "".join(run.own.texts).strip()
        assert spoken == run.text
        assert (run.own is run.along) == (run.own.tokens == compared.baseline.along.tokens)
        if run.own is not run.along:
            same = next(i for i, (a, b) in enumerate(zip(run.own.tokens, run.along.tokens, strict=False)) if a != b)
            assert run.difference.diverges_at == same


def test_json_holds_every_number(compared) -> None:
    stored = json.loads(json.dumps(compared.to_dict(), allow_nan=False))
    run = stored["runs"][1]
    trace = run["along_baseline"]
    assert len(trace["tokens"]) == len(trace["shares"]) == len(trace["maps"]) == len(compared.baseline.along.tokens)
    assert len(trace["shares"][0]) == len(trace["entropy"][0]) == len(run["visual_share"])
    assert sum(layer is not None for layer in trace["removed_before_layer"]) == 64 - 16
    assert run["difference"]["dlogp_sum"] == pytest.approx(sum(run["difference"]["dlogp"]), rel=1e-4)
    assert run["difference"]["kl_baseline_variant"][0] >= 0
    assert all(len(token["top"]) == 5 for token in trace["tokens"])
    assert stored["runs"][0]["difference"] is None


def test_yes_no_questions_have_a_margin(loaded, picture) -> None:
    model, processor = loaded
    result = lmmhooks.compare(model, processor, picture, "Is there a car in the image?", ["yes-offset(offset=2.5)"])
    baseline, shifted = result.runs
    # The offset raises one of the two logits, by that much.
    assert shifted.margin - baseline.margin == pytest.approx(2.5, abs=1e-4)
    assert (baseline.margin > 0) == (baseline.text.lower().startswith("yes"))


def test_other_questions_have_none(compared) -> None:
    assert all(run.margin is None for run in compared.runs)


def test_methods_that_answer_by_themselves(loaded, picture, tmp_path) -> None:
    result = lmmhooks.compare(
        *loaded, picture, "Is there a car in the image?", ["mvp", "carve(read_layers=(4, 5))"], max_new_tokens=4
    )
    for run in result.runs[1:]:
        assert run.text
        assert run.along is None
        assert run.passes > 1
        assert "several generations" in run.note
        assert run.total_ms >= run.first_token_ms > 0
    carve = result.runs[2]
    assert carve.looked_at, "it made pictures"
    html = result.to_html(tmp_path / "page.html").read_text()
    assert html.count(f"that {carve.name} answered about") == len(carve.looked_at)


def test_beam_methods_say_why_they_are_not_led(loaded, picture) -> None:
    result = lmmhooks.compare(*loaded, picture, QUESTION, ["opera"], num_beams=3, max_new_tokens=5)
    assert result.baseline.along is not None
    assert result.runs[1].text
    assert result.runs[1].along is None
    assert "beam" in result.runs[1].note


def test_a_compressed_cache_is_read_where_it_can_be(loaded, picture) -> None:
    result = lmmhooks.compare(*loaded, picture, QUESTION, ["look-m"], max_new_tokens=4)
    trace = result.runs[1].along
    assert not bool(trace.shares[0].isnan().any()), "the prompt is read whole"
    assert bool(trace.shares[1:].isnan().any()), "entries of a compressed cache are not the tokens of the prompt"
    assert not bool(result.runs[1].difference.dlogp.isnan().any())
    json.dumps(result.to_dict(), allow_nan=False)


def test_without_an_image(loaded, tmp_path) -> None:
    result = lmmhooks.compare(*loaded, None, "What is a car?", ["reduction-identity"], max_new_tokens=3)
    assert result.image is None
    assert result.runs[1].cells == ()
    assert result.baseline.along.visual.shape[-1] == 0
    assert result.baseline.image_map is None
    assert result.to_html(tmp_path / "page.html").exists()
    json.dumps(result.to_dict(), allow_nan=False)


def test_several_images_have_maps_of_their_own(loaded, picture) -> None:
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((200, 112))
    result = lmmhooks.compare(*loaded, [picture, other], QUESTION, [], max_new_tokens=3)
    trace = result.baseline.along
    assert trace.images.tolist() == [0] * 64 + [1] * 64
    for image, cells in enumerate(result.baseline.cells):
        mine = trace.maps[:, trace.images == image]
        torch.testing.assert_close(mine.sum(dim=1), torch.ones(len(mine)), **CLOSE)
        assert (cells.rows, cells.columns) == (8, 8)
        torch.testing.assert_close(cells.spread(trace.maps[0]).flatten().float(), mine[0], **CLOSE)
    assert result.baseline.cells[1].geometry.size == (200, 112)


def test_a_wrapped_model_has_no_baseline(loaded, picture) -> None:
    model, processor = loaded
    with lmmhooks.wrap(model, "attention-identity"), pytest.raises(lmmhooks.MethodError, match="already wrapped"):
        lmmhooks.compare(model, processor, picture, QUESTION, [])
