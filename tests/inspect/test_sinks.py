"""The whole diagnosis on models in which sinks were planted, and on models that have none."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files

import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.inspect import Criteria, sinks
from lmmhooks.methods.attention.var import Var
from lmmhooks.prompting import build_inputs
from tests.planted import MAGNET, MASSIVE, plant_text, planted, with_magnet
from tests.reference.attention import dense_attention, full_logits
from tests.zoo import FAMILIES, IMAGE, PREFIX, build

PATCHES = {"carried": [3, 12], "ignored": [7], "silent": [9]}
#: Positions of the patches that are sinks in the decoder, and of those whose features are outliers.
VISUAL = [PREFIX + patch for patch in (3, 9, 12)]
OUTLIERS = {PREFIX + 3: True, PREFIX + 7: False, PREFIX + 12: True}
JUDGED = range(2, 6)


def positions(layer, label="sink"):
    return [token.position for token in layer.tokens if token.label == label]


def text_of(length):
    return {"text": length}


@pytest.fixture(scope="module")
def zoo():
    return planted(**PATCHES)


@pytest.fixture(scope="module")
def report(zoo):
    return sinks(zoo.model, zoo.inputs(batch=2, text=[12, 20]))


def test_planted_sinks_are_found_and_nothing_else(report):
    assert set(report.channels.dims) == set(MASSIVE)
    assert report.channels.source == "measured"
    for sample in report.samples:
        for layer in sample.layers:
            assert layer.judged == (layer.layer in JUDGED)
            assert positions(layer) == ([0, *VISUAL] if layer.judged else [])
            assert layer.counts == ({"system": 1, "image": 3, "question": 0} if layer.judged else {})
        cells = {(token.row, token.column) for token in sample.layers[3].sinks if token.image == 0}
        assert cells == {(0, 3), (2, 1), (3, 0)}, "patches 3, 9 and 12 of a grid of four columns"


def test_encoder_outliers_and_their_overlap_with_sinks(report):
    for sample in report.samples:
        (image,) = sample.images
        assert {outlier.position: bool(outlier.layers) for outlier in image.outliers} == OUTLIERS
        assert all(outlier.norm > image.threshold > image.median for outlier in image.outliers)
        assert set(image.outliers[0].layers) == set(JUDGED)


def test_findings_say_it_in_words(report):
    text = "; ".join(report.samples[0].findings)
    assert "text sinks at position 0 (layers 2 to 5)" in text
    assert "3 of 16 visual tokens are sinks in layers 2 to 5" in text
    assert "of outlying norm: 3" in text
    assert "of these also sinks in the decoder: 2" in text


def test_numbers_equal_those_of_full_attention_matrices(zoo, report):
    inputs = zoo.inputs(batch=2, text=[12, 20])
    matrices, states = {}, {}

    def look(layer, weights, row, hidden):
        matrices[layer, row], states[layer, row] = weights, hidden
        return weights

    with dense_attention(zoo.model, look):
        full_logits(zoo.model, inputs)
    for row, sample in enumerate(report.samples):
        pad = inputs["input_ids"].shape[1] - sample.length
        for layer in sample.layers:
            matrix, hidden = matrices[layer.layer, row][:, pad:, pad:], states[layer.layer, row][pad:]
            image = (inputs["input_ids"][row, pad:] == IMAGE).nonzero().flatten().tolist()
            rows = [i for i in range(sample.length) if i > image[-1]]
            mass = {"system": 0.0, "image": 0.0, "question": 0.0}
            for h in range(matrix.shape[0]):
                for i in rows:
                    for j in range(i + 1):
                        where = "image" if j in image else "system" if j < image[0] else "question"
                        mass[where] += float(matrix[h, i, j]) / (matrix.shape[0] * len(rows))
            assert layer.mass == pytest.approx(mass, abs=1e-5)
            assert sum(layer.mass.values()) == pytest.approx(1, abs=1e-5)
            first = layer.top[0]
            assert abs(first.value) == pytest.approx(float(hidden.abs().max()), rel=1e-5)
            assert float(hidden[first.position, first.channel]) == pytest.approx(first.value, rel=1e-5)
            for token in layer.tokens:
                received = [float(matrix[:, i, token.position].mean()) for i in rows if i >= token.position]
                if token.received is None:
                    assert len(received) < 8
                else:
                    assert token.received == pytest.approx(sum(received) / len(received), abs=1e-5)
            if layer.judged:
                on_sinks = sum(float(matrix[:, i, j].mean()) for i in rows for j in VISUAL) / len(rows)
                assert layer.sink_mass["visual"] == pytest.approx(on_sinks, abs=1e-5)
                assert layer.visual_sink_share == pytest.approx(on_sinks / mass["image"], abs=1e-4)
                heads = 0
                for h in range(matrix.shape[0]):
                    for i in rows:
                        seen = sum(float(matrix[h, i, j]) for j in image)
                        share = sum(float(matrix[h, i, j]) for j in VISUAL) / (seen + 1e-6 * len(image))
                        heads += seen >= 0.2 and 1 - share >= 0.8
                assert layer.image_centric_heads == pytest.approx(heads / len(rows))


def close(one, other, path=""):
    """Nested values of two reports, numbers to float32 rounding of another batch shape."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            close(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, f"{path}/{i}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-5), path
    else:
        assert one == other, path


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_row_reports_what_it_reports_alone(zoo, padding):
    inputs = zoo.inputs(batch=2, text=[12, 20], padding=padding)
    both = sinks(zoo.model, inputs, sink_dims=MASSIVE).to_dict()["samples"]
    for row in range(2):
        (alone,) = sinks(zoo.model, zoo.row(inputs, row), sink_dims=MASSIVE).to_dict()["samples"]
        alone["sample"] = row
        close(both[row], alone)


def test_random_states_have_no_sinks_and_the_report_says_so():
    zoo = build("llava", layers=6)
    report = sinks(zoo.model, zoo.inputs(**text_of(20)))
    (sample,) = report.samples
    assert report.channels.dims == ()
    assert not any(layer.sinks for layer in sample.layers)
    assert all(layer.visual_sink_share is None and layer.sink_mass == {} for layer in sample.layers)
    assert any(finding.startswith("no visual sinks") for finding in sample.findings)
    assert any(finding.startswith("no text sinks") for finding in sample.findings)
    assert "no outliers among the vision features" in sample.findings
    assert "no sink channels" in report.channels.sentence


def test_a_threshold_alone_labels_nothing_a_sink():
    """All visual tokens beyond the threshold of ordinary channels, as trained small models have them."""
    zoo = build("llava", layers=6)
    report = sinks(zoo.model, zoo.inputs(**text_of(20)), sink_dims=range(64), criteria=Criteria(tau=1.0))
    for layer in report.samples[0].layers[2:]:
        assert len(positions(layer, "unconfirmed")) > 16
        # D5 may agree somewhere by chance; a sink needs it.
        assert all("D5" in token.detectors for token in layer.sinks)


def test_prefix_sinks_only():
    zoo = planted()
    (sample,) = sinks(zoo.model, zoo.inputs(**text_of(20))).samples
    assert all(positions(layer) == [0] for layer in sample.layers if layer.judged)
    assert any(finding.startswith("no visual sinks") for finding in sample.findings)


def test_sinks_without_known_channels_need_two_detectors(zoo):
    (sample,) = sinks(zoo.model, zoo.inputs(**text_of(20)), sink_dims=()).samples
    for layer in sample.layers[2:5]:
        assert positions(layer) == [0, *VISUAL] or positions(layer) == VISUAL
        assert all(len(set(token.detectors) & {"D3", "D4", "D5", "D6"}) >= 2 for token in layer.sinks)


def test_the_magnet_is_named_and_is_no_sink():
    zoo = plant_text(build("llava", layers=6), first=False, magnet=True)
    inputs = with_magnet(zoo.inputs(batch=2, text=[14, 20]), -12)
    report = sinks(zoo.model, inputs, processor=Words())
    for sample in report.samples:
        (magnet,) = sample.magnets
        assert magnet.position == sample.length - 12
        assert magnet.text == f"word{MAGNET}"
        assert magnet.received > 0.3
        assert any("'word77'" in finding for finding in sample.findings)
        assert sample.head_received[magnet.position] > 0.5
        for layer in sample.layers[2:]:
            assert magnet.position in positions(layer, "attention only")


class Words:
    """A processor that only knows how tokens are spelled."""

    chat_template = None

    class tokenizer:
        @staticmethod
        def decode(ids):
            return f"word{ids[0]}"


@pytest.mark.parametrize("rows", [8, "all"])
def test_probe_rows(zoo, rows):
    (sample,) = sinks(zoo.model, zoo.inputs(**text_of(20)), sink_dims=MASSIVE, probe_rows=rows).samples
    assert sample.probe_rows == (8 if rows == 8 else sample.length)
    assert positions(sample.layers[3]) == [0, *VISUAL]


def test_keys_that_few_rows_see_are_not_judged_by_attention(zoo):
    (sample,) = sinks(zoo.model, zoo.inputs(**text_of(5)), sink_dims=MASSIVE).samples
    assert all(token.received is None for layer in sample.layers for token in layer.tokens)
    assert any("attention is no evidence here" in finding for finding in sample.findings)
    assert positions(sample.layers[3]) == [0, *VISUAL], "massive activations agree with the score"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_and_is_left_as_it_was(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1], text=[9, 14])
    with torch.no_grad():
        before = zoo.model(**inputs).logits
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in zoo.model.modules())
        report = sinks(zoo.model, inputs)
        assert torch.equal(zoo.model(**inputs).logits, before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in zoo.model.modules()) == hooks
    json.dumps(report.to_dict(), allow_nan=False)
    assert [len(sample.images) for sample in report.samples] == [2, 1]
    for sample in report.samples:
        assert sum(image.tokens for image in sample.images) <= sample.segments["image"]
        assert all(layer.judged == (layer.layer >= 2) for layer in sample.layers)
        for layer in sample.layers:
            assert sum(layer.mass.values()) == pytest.approx(1, abs=1e-5)
            assert sum(layer.cosine_histogram) == sample.length


def test_deepstack_layers_are_not_judged(monkeypatch):
    zoo = build("qwen3_vl", layers=6)

    def with_three(model):
        family = resolve(model)
        family.deepstack_layers = 3
        return family

    monkeypatch.setattr("lmmhooks.inspect.diagnosis.resolve", with_three)
    (sample,) = sinks(zoo.model, zoo.inputs(**text_of(20)), sink_dims=()).samples
    assert [layer.judged for layer in sample.layers] == [False] * 3 + [True] * 3


def test_a_wrapped_model_is_read_without_its_patch_and_keeps_it(zoo):
    inputs = zoo.inputs(**text_of(20))
    plain = sinks(zoo.model, inputs, sink_dims=MASSIVE).to_dict()
    with lmmhooks.wrap(zoo.model, "fastv(keep=4)"), torch.no_grad():
        patched = zoo.model(**inputs).logits
        assert sinks(zoo.model, inputs, sink_dims=MASSIVE).to_dict() == plain
        assert torch.equal(zoo.model(**inputs).logits, patched)


def test_a_generation_under_way_goes_on():
    """M-RoPE models remember the offset of the last prompt on the module."""
    zoo = build("qwen2_5_vl")
    inputs, other = zoo.inputs(**text_of(9)), zoo.inputs(images=2, **text_of(12))
    with torch.no_grad():
        token = inputs["input_ids"][:, -1:]
        first = zoo.model(**inputs, use_cache=True)
        expected = zoo.model(input_ids=token, past_key_values=first.past_key_values).logits
        again = zoo.model(**inputs, use_cache=True)
        sinks(zoo.model, other)
        assert torch.equal(zoo.model(input_ids=token, past_key_values=again.past_key_values).logits, expected)


def test_text_without_image(zoo):
    (sample,) = sinks(zoo.model, zoo.inputs(images=0, **text_of(20)), sink_dims=MASSIVE).samples
    assert sample.segments["image"] == 0
    assert "no image in this prompt" in sample.findings
    assert all(layer.image_centric_heads is None for layer in sample.layers)
    assert positions(sample.layers[3]) == [0]


def test_published_channels_are_compared_with_the_measured_ones(zoo, monkeypatch):
    monkeypatch.setattr(Var, "defaults_for", lambda family: {"sink_dims": (1, 2)})
    report = sinks(zoo.model, zoo.inputs(**text_of(12)))
    assert report.channels.published == (1, 2)
    assert "not the published 1, 2" in report.channels.sentence


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sink_dims": (64,)}, r"sink_dims is \(64,\); channels of this model lie in \[0, 64\)"),
        ({"probe_rows": 0}, "probe_rows is 0"),
        ({"probe_rows": "some"}, "probe_rows is 'some'"),
        ({"rho": -1.0}, "rho is -1"),
        ({"min_visual": 2.0}, "min_visual 2"),
    ],
)
def test_bad_settings_are_refused(zoo, settings, message):
    with pytest.raises(lmmhooks.MethodError, match=message):
        sinks(zoo.model, zoo.inputs(), **settings)


def test_a_prompt_that_ends_with_its_image_is_refused(zoo):
    with pytest.raises(lmmhooks.PromptError, match="no text after its image"):
        sinks(zoo.model, zoo.inputs(**text_of(0)), sink_dims=())


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen"])
def test_bundled_models_have_what_the_docs_say(name):
    model, processor = lmmhooks.load(name)
    image = min((files("lmmhooks_eval") / "tiny" / "data" / "images").iterdir(), key=lambda path: path.name)
    question = "What is in this image? Describe it in one sentence."
    inputs = build_inputs(processor, [str(image)], question, model.device, model.dtype)
    report = sinks(model, inputs, processor)
    (sample,) = report.samples
    assert report.channels.dims == report.channels.visual_dims == ()
    assert {"no outliers among the vision features", "no stop-word magnets"} <= set(sample.findings)
    seen = [token for layer in sample.layers for token in layer.tokens]
    assert {token.label for token in seen} == {"unconfirmed", "attention only"}
    doubted = [token for token in seen if token.label == "unconfirmed"]
    assert all(token.detectors == ("D4",) and 0 < token.position <= 4 for token in doubted)
    assert all(token.text is not None and token.received < 0.03 for token in doubted)


def test_settings_are_part_of_the_report(report):
    assert report.settings == {**asdict(Criteria(tau=2.5)), "probe_rows": 32, "rho": 0.8, "min_visual": 0.2}
