"""Heads-guided intervention against its naive rendering."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.attention.heads_guided import HeadsGuided, share_among_heads
from tests.methods.boosts import generated, image_keys, naive_logits
from tests.reference.attention import dense_attention
from tests.reference.boosts import heads_guided
from tests.zoo import FAMILIES, build

# float32 through four layers in another summation order; largest difference seen is 4e-6.
TOLERANCE = 1e-5
STEPS = 3


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family):
    """The models group two query heads per key head: the mean runs over query heads."""
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, HeadsGuided(alpha=0.7, start=1, end=3)):
        answer, logits = generated(zoo, inputs, STEPS)
    edit = heads_guided(0.7, image_keys(zoo, inputs), inputs["input_ids"].shape[1], [1, 2])
    expected = naive_logits(zoo, inputs, edit, answer)
    plain = naive_logits(zoo, inputs, None, answer)
    assert (expected - plain).abs().amax(dim=(0, 2)).min() > 1e-2, "an edit that changes no step proves nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_what_is_added_is_the_same_in_every_head_and_falls_on_image_keys_only():
    scores = torch.randn(2, 4, 1, 6, generator=torch.Generator().manual_seed(0)) * 3
    # Four of these overflow when they are summed.
    scores[..., 5] = torch.finfo(torch.float32).min
    visual = torch.tensor([[False, True, True, False, False, False], [False] * 6])
    out = share_among_heads(scores.clone(), visual, 0.5)
    added = out - scores
    # The sum l + b is rounded, so b comes back to within a rounding of l.
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-6, rtol=0)
    torch.testing.assert_close(added[0, 0, 0, 1:3], 0.5 * scores[0, :, 0, 1:3].abs().mean(dim=0))
    untouched = ~visual[:, None, None].expand_as(out)
    assert torch.equal(out[untouched], scores[untouched])
    assert (out >= scores).all(), "the image can only gain against text"


def test_only_the_last_row_of_the_prompt_changes():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, HeadsGuided(start=0)):
            patched = zoo.model(**inputs).logits
    assert torch.equal(patched[:, :-1], plain[:, :-1])
    assert not torch.equal(patched[:, -1], plain[:, -1])


def test_a_row_without_image_is_predicted_as_if_nothing_were_attached():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2, images=[1, 0])
    _, plain = generated(zoo, inputs, STEPS)
    with lmmhooks.wrap(zoo.model, HeadsGuided(alpha=2.0, start=0)):
        _, patched = generated(zoo, inputs, STEPS)
    torch.testing.assert_close(patched[1], plain[1], atol=TOLERANCE, rtol=0)
    assert (patched[0] - plain[0]).abs().max() > 1e-2


def test_strength_zero_attaches_nothing():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, HeadsGuided(alpha=0.0)) as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


@pytest.mark.parametrize("partner", ["fastervlm(keep=5)", "random(keep=4)", "fastv(keep=4)", "vcd(beta=0.0)"])
def test_acts_beside_a_reduction_or_a_decoding_method(partner):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, partner):
        _, alone = generated(zoo, inputs, STEPS)
    with lmmhooks.wrap(zoo.model, partner, HeadsGuided(start=3, end=4)):
        _, both = generated(zoo, inputs, STEPS)
    assert both.isfinite().all()
    assert (both - alone)[:, 0].abs().amax(dim=1).min() > 1e-3


def test_after_a_reduction_the_edit_is_that_of_a_prompt_that_short():
    """Removed before the first layer, tokens leave no trace: the naive rendering runs on what is left."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with lmmhooks.wrap(zoo.model, "random(keep=4)", HeadsGuided(alpha=0.7, start=0, end=4)) as patch:
        answer, logits = generated(zoo, inputs, STEPS)
        kept = patch._runtime.last_state.stages[0].layout
        index = patch._runtime.last_state.stages[0].index[0].tolist()
    prompt = len(index)
    edit = heads_guided(0.7, [kept.visual[0, :prompt].nonzero().flatten().tolist()], prompt, range(4))
    core = zoo.model.model
    with torch.no_grad():
        features = core.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output[0]
        embeddings = core.get_input_embeddings()(inputs["input_ids"])[0]
        embeddings[inputs["input_ids"][0] == zoo.model.config.image_token_id] = features
        tokens = core.get_input_embeddings()(answer[0, :-1])
        short = torch.cat([embeddings[index], tokens])[None]
        with dense_attention(zoo.model, scores=edit):
            mask = torch.ones(short.shape[:2], dtype=torch.long)
            hidden = core.language_model(inputs_embeds=short, attention_mask=mask, use_cache=False).last_hidden_state
            expected = zoo.model.lm_head(hidden)[:, -STEPS:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_two_prompts_in_a_row_do_not_meet():
    zoo = build("llava")
    first, second = zoo.inputs(batch=2, seed=1), zoo.inputs(batch=1, seed=2)
    with lmmhooks.wrap(zoo.model, HeadsGuided(start=0)):
        generated(zoo, first, STEPS)
        _, after_another = generated(zoo, second, STEPS)
    with lmmhooks.wrap(zoo.model, HeadsGuided(start=0)):
        _, fresh = generated(zoo, second, STEPS)
    assert torch.equal(after_another, fresh)


class Depth:
    """All that the published layers depend on."""

    def __init__(self, num_layers):
        self.num_layers = num_layers


def test_published_layers_scale_with_depth():
    assert list(HeadsGuided().layers(Depth(32))) == list(range(5, 19))
    assert list(HeadsGuided().layers(Depth(28))) == list(range(4, 17))
    assert list(HeadsGuided(start=5, end=19).layers(Depth(28))) == list(range(5, 19))
    for depth in range(1, 100):
        HeadsGuided().check(Depth(depth))


@pytest.mark.parametrize(("settings", "name"), [({"start": 4}, "start"), ({"start": 2, "end": 2}, "end")])
def test_layers_outside_the_model_are_refused_at_wrap(settings, name):
    with pytest.raises(MethodError, match=f"heads-guided: {name}="):
        lmmhooks.wrap(build("llava").model, HeadsGuided(**settings))


def test_a_negative_strength_is_refused():
    with pytest.raises(MethodError, match="heads-guided: alpha="):
        HeadsGuided(alpha=-0.5)
