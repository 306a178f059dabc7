"""DAMRO against separate passes that read only the outliers, and what its selection must satisfy."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.branches import PromptStacker
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.damro import Damro, outlier_tokens
from lmmhooks.vision import ImageTokens
from tests.methods.shown import FAMILIES, MODES, check_logits, check_tokens
from tests.methods.tower_readings import images_of
from tests.reference.branch_features import NaiveRows, changed, contrast, image_runs, replaced
from tests.zoo import IMAGE, build

ALPHA, BETA, K = 1.0, 0.02, 3
METHOD = Damro(alpha=ALPHA, beta=BETA, topk=K)


def scores(crop, family, wide):
    """Class-token attention per token in the layer that the projector reads, or attention received."""
    layer = {"llava": 1, "llava_next": 1, "internvl": 2}.get(family, 3)
    if not crop.has_cls:
        return crop.salient(layer)
    q, k = crop.q[layer], crop.k[layer]
    if wide:
        # All heads as one: scores add up before the softmax, and the scale is that of the full width.
        raw = torch.stack([(q[:, 0] * k[:, j]).sum() for j in range(k.shape[1])]) / (q.shape[0] * q.shape[2]) ** 0.5
        weights = raw.softmax(0)
    else:
        weights = crop.weights(layer)[:, 0].mean(dim=0)
    return [float(weights[[1 + patch for patch in patches]].mean()) for patches in crop.patches]


def rendering(family, k=K, wide=True):
    def render(eager, inputs):
        changes = []
        for row in range(2):
            runs = image_runs(inputs["input_ids"][row], inputs["attention_mask"][row], IMAGE)
            shown = {}
            for run, crops in zip(runs, images_of(eager, inputs, row), strict=True):
                overview = crops[-1] if family == "internvl" else crops[0]
                values = scores(overview, family, wide)
                best = sorted(range(len(values)), key=lambda j: -values[j])[:k]
                show = [overview.numbers[j] for j in best]
                newlines = sorted(set(run) - {number for crop in crops for number in crop.numbers})
                shown[run[0]] = show + (newlines[:1] if len(crops) > 1 else [])
            changes.append(replaced(shown, {number for run in runs for number in run}))
        return NaiveRows(
            eager.model, inputs, [changed(eager.model, inputs, changes)], contrast([1 + ALPHA, -ALPHA], BETA)
        )

    return render


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_passes_at_prefill_and_decode(family):
    check_logits(family, METHOD, rendering(family))


def test_attention_per_head():
    check_logits("llava", Damro(alpha=ALPHA, beta=BETA, topk=K, per_head_mean=True), rendering("llava", wide=False))


def test_a_single_outlier():
    check_logits("qwen2_5_vl", Damro(alpha=ALPHA, beta=BETA, topk=1), rendering("qwen2_5_vl", k=1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    check_tokens(family, METHOD, rendering(family), mode)


@pytest.mark.parametrize(("family", "extra"), [("llava", 0), ("llava_next", 1), ("qwen2_5_vl", 0)])
def test_length_of_the_negative_branch(family, extra, monkeypatch):
    zoo = build(family)
    inputs = zoo.inputs()
    stacked = []
    stack = PromptStacker.stack
    monkeypatch.setattr(PromptStacker, "stack", lambda *a, **k: stacked.append(stack(*a, **k)) or stacked[-1])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, METHOD):
        zoo.model(**inputs)
    visual = int((inputs["input_ids"] == IMAGE).sum())
    main, branch = stacked[0].mask.sum(dim=1).tolist()
    assert branch == main - visual + K + extra


def test_order_and_ties():
    tokens = ImageTokens.raster([(2, 3)])
    attention = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.0, 0.1])
    assert outlier_tokens(attention, tokens, 4).tolist() == [1, 3, 2, 0]
    assert outlier_tokens(attention, tokens, 9).tolist() == [1, 3, 2, 0, 5, 4]
    assert outlier_tokens(attention + 7, tokens, 4).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_other_methods_act_on_the_main_rows_alone(family, lazy):
    """What the negative branch shows has no place in the image, so there is nothing of it to keep or to look for."""
    zoo = build(family)
    inputs = zoo.inputs()
    below = "fastervlm(keep=4)"
    logits = []
    with torch.no_grad():
        for methods in ((below,), (METHOD,), (), (below, Damro(alpha=ALPHA, beta=1e-30, topk=K, lazy=lazy))):
            if methods:
                with lmmhooks.wrap(zoo.model, *methods):
                    logits.append(zoo.model(**inputs, logits_to_keep=1).logits[:, -1])
            else:
                logits.append(zoo.model(**inputs).logits[:, -1])
    reduced, contrasted, plain, both = logits
    negative = ((1 + ALPHA) * plain - contrasted) / ALPHA
    kept = contrasted.isfinite()
    expected = (1 + ALPHA) * reduced - ALPHA * negative
    torch.testing.assert_close(both[kept], expected[kept], atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"alpha": -1}, {"topk": 0}, {"topk": 1.5}, {"layer": 99}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        lmmhooks.wrap(build("llava").model, Damro(**settings))
