"""Which prompt rows a probe reads, and where values per image go in the prompt."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.probing import Readings, place
from lmmhooks.engines.state import select_rows
from lmmhooks.family import resolve
from lmmhooks.layout import build_layout
from lmmhooks.methods.attention.fix_imbalance import FixImbalance
from tests.zoo import FAMILIES, build, encode


def layout_of(zoo, inputs):
    return build_layout(inputs["input_ids"], inputs["attention_mask"], resolve(zoo.model), encode(zoo, inputs))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_last_rows_of_a_selection_are_counted_per_sample(padding):
    zoo = build("llava")
    layout = layout_of(zoo, zoo.inputs(batch=2, text=[4, 9], padding=padding))
    chosen = select_rows(layout, "instruction:6")
    for sample, expected in ((0, 4), (1, 6)):
        rows = layout.instruction[sample].nonzero().flatten()[-6:]
        assert len(rows) == expected
        assert torch.equal(chosen[sample].nonzero().flatten(), rows)


def test_an_unknown_selection_is_refused():
    zoo = build("llava")
    with pytest.raises(lmmhooks.PromptError, match="no row selection is called 'first'"):
        select_rows(layout_of(zoo, zoo.inputs()), "first:3")


def test_values_per_image_stand_at_its_tokens():
    zoo = build("llava")
    layout = layout_of(zoo, zoo.inputs(batch=2, images=[2, 1]))
    values = [torch.arange(32.0).view(16, 2) + 100 * image for image in range(3)]
    full = place(layout, {"image": values})
    for image, span in enumerate(layout.spans):
        assert torch.equal(full[span.sample, span.positions], values[image])
    assert torch.equal(full.isnan(), ~layout.visual[..., None].expand(-1, -1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_output_projection_takes_the_heads_of_every_layer(family):
    resolved = resolve(build(family).model)
    for layer in resolved.layers:
        assert resolved.output_projection_of(layer).out_features == resolved.hidden_size


def test_a_layer_without_output_projection_is_refused():
    layer = torch.nn.Module()
    layer.SelfAttention = type("SelfAttention", (torch.nn.Module,), {})()
    with pytest.raises(lmmhooks.ModelError, match="has no output projection"):
        lmmhooks.Family.output_projection_of(layer)


@pytest.mark.parametrize("family", ["internvl", "llava_next", "qwen2_vl"])
def test_a_signal_that_two_kinds_of_method_want_is_read_once(family, monkeypatch):
    """Noted twice it would be twice as long, and the scores of one image those of another."""
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    feature = resolve(zoo.model).feature_layer
    seen: list[tuple[str, torch.Tensor]] = []
    values = Readings.values

    def noting(self, probe, state, stage):
        seen.append((probe.name, values(self, probe, state, state.stages[0])))
        return values(self, probe, state, stage)

    monkeypatch.setattr(Readings, "values", noting)
    method = FixImbalance(gamma=1.0, global_layer=feature)
    for spec in ([method], ["fastervlm(keep=3)", method], [method, "fastervlm(keep=3)"]):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, *spec):
            zoo.model(**inputs)
    (name, alone), *others = [entry for entry in seen if entry[0].endswith(f"[{feature}]")]
    assert len(others) == 4, "the method and the reducer, twice"
    for other, reading in others:
        assert other == name
        torch.testing.assert_close(reading, alone, equal_nan=True)
