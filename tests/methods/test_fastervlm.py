"""FasterVLM against full attention matrices of the vision tower and Python loops."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.fastervlm import FasterVLM
from tests.reference.reduction import best, keep_only, reduced_logits, tower_attention
from tests.zoo import FAMILIES, build

# float32 through four layers, batched against single rows; largest difference seen is 4e-6 on logits of about 3.
TOLERANCE = 2e-5


def read(zoo, inputs, spec):
    """State of the prompt after one forward."""
    with torch.no_grad(), lmmhooks.wrap(zoo.model, spec):
        zoo.model(**inputs)
        return find_runtime(zoo.model).last


def scores_of(state) -> torch.Tensor:
    """``[B, N]`` what the probe read, in coordinates of the prompt."""
    found = [v for memory in state._memory.values() for key, v in memory.items() if str(key).startswith("vision_")]
    (values,) = found
    return values


def naive_scores(zoo, inputs) -> list[torch.Tensor]:
    """Per attention call, a score per patch: full matrices of the layer, heads averaged."""
    family = resolve(zoo.model)
    seen: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad(), tower_attention(zoo.model, seen):
        zoo.model(**inputs)
    layer = max(i for i in family.full_attention_vision_layers if i <= family.feature_layer)
    means = [weights.mean(dim=1) for weights in seen[layer]]
    return [mean[:, 0, 1:] if family.has_cls else mean.mean(dim=1) for mean in means]


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_next", "qwen2_vl"])
def test_scores_are_the_head_mean_of_the_class_row_or_of_what_is_received(family):
    """Where one patch or one merged block is a token, its score can be written down without any of our code."""
    zoo = build(family)
    inputs = zoo.inputs(batch=1)
    per_patch = naive_scores(zoo, inputs)
    state = read(zoo, inputs, "fastervlm(keep=3)")
    (span,) = state.layout.spans
    tokens = span.tokens
    if family == "llava":
        expected = per_patch[0][0]
    elif family == "internvl":
        expected = per_patch[0].view(-1, 2, 2, 2, 2).mean(dim=(2, 4)).flatten()
    elif family == "qwen2_vl":
        expected = torch.cat([patches.flatten() for patches in per_patch]).view(-1, 4).mean(dim=1)
    else:
        cells = zip(tokens.crop.tolist(), tokens.row.tolist(), tokens.col.tolist(), strict=True)
        nan = torch.tensor(float("nan"))
        expected = torch.stack([per_patch[0][k, r * 4 + c] if k >= 0 else nan for k, r, c in cells])
    # One layer in another order of summation.
    torch.testing.assert_close(scores_of(state)[0, span.positions], expected, atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_crop_keeps_its_best_in_raster_order(family):
    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    method = FasterVLM(keep=3, keep_per="crop")
    state = read(zoo, inputs, method)
    values = scores_of(state)
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(
            **inputs,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    renumber = not resolve(zoo.model).mrope
    for row in range(2):
        shift = int((inputs["attention_mask"][row] == 0).sum())
        visual, stay = set(), []
        for span in state.layout.spans_of(row):
            visual |= {int(p) - shift for p in span.positions}
            for crop in range(len(span.tokens.grids)):
                place = span.positions[span.tokens.crop == crop].tolist()
                stay += best({p - shift: float(values[row, p]) for p in place}, 3)
        cuts = {0: (keep_only(visual, sorted(stay)), renumber)}
        expected = reduced_logits(eager.model, inputs, row, cuts, answer[:, :-1])[-3:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], expected, atol=TOLERANCE, rtol=0)


def test_heads_may_be_permuted():
    """The mean over heads forgets their order: swapping the tower's heads changes nothing."""
    zoo, other = build("llava"), build("llava")
    inputs = zoo.inputs(batch=1)
    expected = read(zoo, inputs, "fastervlm(keep=5)").stages[0].index
    heads = 4
    with torch.no_grad():
        for layer in resolve(other.model).vision_layers:
            attention = layer.self_attn
            order = torch.arange(32).view(heads, -1).flip(0).flatten()
            for name in ("q_proj", "k_proj", "v_proj"):
                projection = getattr(attention, name)
                projection.weight.copy_(projection.weight[order].clone())
                projection.bias.copy_(projection.bias[order].clone())
            attention.out_proj.weight.copy_(attention.out_proj.weight[:, order].clone())
    assert torch.equal(read(other, inputs, "fastervlm(keep=5)").stages[0].index, expected)


def test_the_layer_is_the_one_whose_output_the_projector_reads():
    def probe(family, **settings):
        return FasterVLM(keep=4, **settings).probes(resolve(build(family).model))[0]

    assert (probe("llava").signal, probe("llava").layer) == ("vision_cls", 1), "hidden_states[-2] of three layers"
    assert probe("llava", layer=0).layer == 0
    assert (probe("llava_onevision").signal, probe("llava_onevision").layer) == ("vision_received", 2)
    assert (probe("qwen2_5_vl").signal, probe("qwen2_5_vl").layer) == ("vision_received", 3)


@pytest.mark.parametrize(("family", "layer", "reason"), [("llava", 3, "layers 0 to 2"), ("qwen2_5_vl", 2, "windows")])
def test_layers_that_cannot_rank_are_refused_at_wrap(family, layer, reason):
    with pytest.raises(lmmhooks.MethodError, match=reason):
        lmmhooks.wrap(build(family).model, FasterVLM(keep=4, layer=layer))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_beams_of_a_prompt_keep_the_same_tokens(attn):
    zoo = build("qwen2_5_vl", attn=attn)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, "fastervlm(keep=4)"):
        zoo.model.generate(**inputs, num_beams=3, max_new_tokens=2)
        beams = find_runtime(zoo.model).last.stages[0].index
    alone = read(zoo, inputs, "fastervlm(keep=4)").stages[0].index
    assert torch.equal(beams[:, : alone.shape[1]], alone.repeat_interleave(3, dim=0))
