"""VisionZip against loops: the class token, dominant tokens, and what is added up in contextual ones."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.visionzip import VisionZip, contextual_features, target_places
from tests.methods.tower_readings import FAMILIES, check, merges_patches, per_crop, token_features
from tests.reference import tower_reducers as naive
from tests.zoo import build


@pytest.mark.parametrize(
    "settings",
    [
        {"contextual": 0.5},
        {"contextual": 1, "contextual_merge": "mean", "keep_cls": False},
        {"contextual": 0},
        {"contextual": 0, "keep_cls": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, settings):
    # Less than any image has: tiles of InternVL have four tokens, the second image of Qwen six.
    keep = 2 if family == "internvl" else 5
    layer = resolve(build(family).model).feature_layer
    contextual = settings["contextual"]
    contextual = round(contextual * keep) if isinstance(contextual, float) else contextual

    def rule(crop):
        joins = settings.get("keep_cls", True) and merges_patches(family)
        return naive.visionzip(
            crop.salient(layer),
            crop.keys(layer),
            token_features(crop, family, layer),
            crop.output[layer][0] if joins else None,
            keep - contextual,
            contextual,
            settings.get("contextual_merge") == "mean",
        )

    check(family, VisionZip(keep=keep, keep_per="crop", **settings), per_crop(rule))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_dominant", "num_contextual"), [(54, 10), (27, 5), (1, 1), (20, 79)])
@pytest.mark.parametrize("average", [False, True])
def test_merging_equals_loops_on_random_features(num_dominant, num_contextual, average):
    size = 100
    features, keys, attention = draw(2, size, 6), draw(2, size, 4, 3, seed=1), draw(2, size, seed=2)
    dominant = attention.sort(dim=1, descending=True).indices[:, :num_dominant].sort(dim=1).values
    for g in range(2):
        rest = [i for i in range(size) if i not in dominant[g].tolist()]
        targets = torch.tensor([[rest[place] for place in target_places(len(rest), num_contextual)]])
        merged = contextual_features(
            features[g : g + 1], keys[g : g + 1].mean(dim=2), dominant[g : g + 1], targets, average
        )
        expected = naive.visionzip(
            attention[g].tolist(), keys[g], features[g], None, num_dominant, num_contextual, average
        )
        slots, values = zip(*expected[num_dominant:], strict=True)
        assert targets[0].tolist() == list(slots)
        # float32 sums in another order.
        torch.testing.assert_close(merged[0], torch.stack(values), atol=1e-5, rtol=0)


def test_targets_are_every_nth_token_that_is_not_dominant():
    assert target_places(523, 10) == list(range(0, 520, 52))
    assert target_places(7, 5) == [0, 1, 2, 3, 4]
    assert target_places(3, 5) == [0, 1, 2]
    assert target_places(9, 0) == []


def test_a_target_that_nothing_resembles_is_itself_and_ties_go_to_the_first():
    features = torch.arange(4.0)[None, :, None]
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])
    none = torch.empty(1, 0, dtype=torch.long)
    merged = contextual_features(features, metric, none, torch.tensor([[0, 1]]))
    # Token 2 goes to 0; token 3 is as near to 0 as to 1, and goes to 0.
    assert merged[0, :, 0].tolist() == [0 + (2 + 3) / 2, 1.0]
    assert contextual_features(features, metric, none, torch.tensor([[0, 1]]), average=True)[0, 0, 0] == 5 / 3


@pytest.mark.parametrize(("keep", "split"), [(192, (162, 30)), (128, (108, 20)), (64, (54, 10)), (32, (27, 5))])
def test_the_published_split(keep, split):
    num_contextual = VisionZip(keep=keep)._num_contextual(keep)
    assert (keep - num_contextual, num_contextual) == split


def test_at_least_one_token_stays_dominant():
    assert VisionZip(keep=3, contextual=9)._num_contextual(3) == 2
    assert VisionZip(keep=1, contextual=0.9)._num_contextual(1) == 0


def test_the_class_token_comes_first_and_is_the_projected_state_of_its_layer():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    seen = []
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "visionzip(keep=4)"):
        hook = zoo.model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        zoo.model(**inputs)
        hook.remove()
        start = int(find_runtime(zoo.model).last.layout.spans[0].start)
    with torch.no_grad():
        states = zoo.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        expected = zoo.model.model.multi_modal_projector(states[0, 0])
    torch.testing.assert_close(seen[0][0, start], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_an_image_stays_untouched(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, "visionzip(keep=10000, keep_per='crop')" if family != "llava" else
                           "visionzip(keep=16)"):  # fmt: skip
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_projectors_of_several_layers_take_no_single_features():
    zoo = build("llava")
    zoo.model.config.vision_feature_layer = [-3, -2]
    signals = [probe.signal for probe in VisionZip(keep=4).probes(resolve(zoo.model))]
    assert signals == ["vision_cls", "vision_keys"], "states are merged behind the projector, without the class token"


@pytest.mark.parametrize(
    "settings", [{"contextual": 1.0}, {"contextual": -1}, {"contextual": True}, {"contextual_merge": "sum"}]
)
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("visionzip", keep=4, **settings)
