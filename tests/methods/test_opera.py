"""The over-trust penalty and retrospection against a rendering without cache, one candidate at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import lmmhooks
from lmmhooks.engines.beams import top_candidates
from lmmhooks.errors import MethodError, ModelError, PromptError
from lmmhooks.methods.decoding.opera import Opera, column_products, mode, over_trust
from tests.reference.opera import Settings, opera
from tests.zoo import END, EOS, IMAGE, START, VIDEO, VOCAB, build, images_under_beams

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
# float32 through four layers in other batches; largest difference seen is 8e-6.
TOLERANCE = 5e-5
# Behind the tenth token penalties are float16 numbers of order 1: a product between two of them may fall either way.
ROUNDING = 2e-3
BEAMS = 2
#: Attention of the tiny models is spread over some forty tokens: this scale keeps products within float16.
ACTING = Opera(scale_factor=30.0, num_attn_candidates=4, penalty_weights=5.0, threshold=None)
RETURNING = Opera(scale_factor=24.0, num_attn_candidates=3, penalty_weights=2.0, threshold=1)


def speaking(name, **kwargs):
    """A tiny model that never says a token which stands for something visual: a naive forward would look for it."""
    zoo = build(name, **kwargs)
    visual = torch.zeros(zoo.model.lm_head.out_features)
    visual[[IMAGE, VIDEO, START, END]] = -50
    zoo.model.lm_head.register_forward_hook(lambda module, args, output: output + visual)
    return zoo


def search(zoo, inputs, method, new=12, beams=BEAMS, **kwargs):
    with lmmhooks.wrap(zoo.model, method):
        return zoo.model.generate(
            **inputs,
            max_new_tokens=new,
            num_beams=beams,
            do_sample=False,
            num_return_sequences=beams,
            output_scores=True,
            return_dict_in_generate=True,
            **kwargs,
        )


def naive(eager, inputs, method, new=12, beams=BEAMS):
    settings = Settings(
        image_tokens=(IMAGE,),
        num_beams=beams,
        max_new_tokens=new,
        eos=EOS,
        scale_factor=method.scale_factor,
        threshold=float("inf") if method.threshold is None else method.threshold,
        candidates=method.num_attn_candidates,
        weight=method.penalty_weights,
    )
    return opera(eager.model, inputs, settings)


def compare(out, expected, inputs, row, beams=BEAMS):
    """The row-th sample of an output against the naive search: sequences equal, scores within tolerance."""
    rows = slice(row * beams, (row + 1) * beams)
    answers = out.sequences[rows, inputs["input_ids"].shape[1] :].tolist()
    for answer, tokens in zip(answers, expected.answers, strict=True):
        assert answer[: len(tokens)] == tokens
    torch.testing.assert_close(out.sequences_scores[rows], torch.tensor(expected.values), atol=ROUNDING, rtol=0)
    for step, scores in enumerate(expected.scores):
        # What must not be chosen lies near -1000, where float32 numbers are 6e-5 apart.
        low = scores < -900
        assert torch.equal(out.scores[step][rows] < -900, low)
        seen = out.scores[step][rows].masked_fill(low, 0)
        atol = TOLERANCE if step < 10 else ROUNDING
        torch.testing.assert_close(seen, scores.masked_fill(low, 0), atol=atol, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_penalties_are_those_of_full_attention_matrices(name):
    zoo, eager = speaking(name), speaking(name, attn="eager")
    inputs = zoo.inputs(batch=2, images=images_under_beams(zoo, 2, 1))
    out = search(zoo, inputs, ACTING)
    plain = search(zoo, inputs, Opera(penalty_weights=0, threshold=None))
    assert not torch.equal(out.sequences, plain.sequences)
    for row in range(2):
        compare(out, naive(eager, zoo.row(inputs, row), ACTING), inputs, row)


#: Prompts whose search goes back, in one sample or in both: of two images in the first row, and of one.
SEEDS = {"llava": (8, 7), "qwen3_vl": (4, 4), "internvl": (6, 6)}


@pytest.mark.parametrize(("name", "seeds"), SEEDS.items())
def test_every_sample_goes_back_where_its_own_attention_says_so(name, seeds):
    zoo, eager = speaking(name), speaking(name, attn="eager")
    images = images_under_beams(zoo, 2, 1)
    inputs = zoo.inputs(batch=2, images=images, seed=seeds[images == [1, 1]])
    out = search(zoo, inputs, RETURNING, new=20, beams=2)
    taken = []
    for row in range(2):
        expected = naive(eager, zoo.row(inputs, row), RETURNING, new=20, beams=2)
        compare(out, expected, inputs, row, beams=2)
        taken.append(expected.rollbacks)
        assert all(position >= 10 for _, position in expected.rollbacks)
    assert any(taken), "no sample went back: the test shows nothing"


def test_a_sample_alone_goes_the_way_it_goes_in_a_batch():
    zoo = speaking("llava")
    inputs = zoo.inputs(batch=3, images=[2, 1, 1], seed=8)
    out = search(zoo, inputs, RETURNING, new=20, beams=2)
    length = inputs["input_ids"].shape[1]
    for row in range(3):
        own = zoo.row(inputs, row)
        one = search(zoo, own, RETURNING, new=20, beams=2)
        answers = out.sequences[2 * row : 2 * row + 2, length:].tolist()
        for whole, alone in zip(answers, one.sequences[:, own["input_ids"].shape[1] :].tolist(), strict=True):
            assert whole[: len(alone)] == alone


@pytest.mark.parametrize("name", FAMILIES)
def test_without_penalty_and_with_all_candidates_it_is_plain_beam_search(name):
    zoo = speaking(name)
    inputs = zoo.inputs(batch=2, images=images_under_beams(zoo, 2, 1))
    plain = search(zoo, inputs, "decoding-identity", output_logits=True)
    out = search(zoo, inputs, Opera(penalty_weights=0, threshold=10**6, num_attn_candidates=VOCAB), output_logits=True)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.beam_indices, plain.beam_indices)
    torch.testing.assert_close(out.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=0)
    for field in ("logits", "scores"):
        torch.testing.assert_close(torch.stack(out[field]), torch.stack(plain[field]), atol=5e-5, rtol=0)


def test_one_candidate_cannot_change_a_token_inside_a_beam():
    zoo = speaking("qwen3_vl")
    inputs = zoo.inputs(batch=2)
    method = Opera(scale_factor=24.0, num_attn_candidates=1, penalty_weights=5.0, threshold=None)
    out = search(zoo, inputs, method, beams=2)
    greedy = zoo.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    # The first beam follows its one candidate; the others began with a token nobody wanted.
    assert torch.equal(out.sequences[::2][:, : greedy.shape[1]], greedy)


def test_rows_without_an_image_are_searched_as_without_a_method():
    zoo = speaking("llava")
    inputs = zoo.inputs(batch=3, images=[1, 0, 1])
    plain = search(zoo, inputs, "decoding-identity")
    out = search(zoo, inputs, ACTING)
    assert torch.equal(out.sequences[BEAMS : 2 * BEAMS], plain.sequences[BEAMS : 2 * BEAMS])
    assert not torch.equal(out.sequences_scores, plain.sequences_scores)
    text = zoo.inputs(batch=2, images=0)
    assert torch.equal(search(zoo, text, ACTING).sequences, search(zoo, text, "decoding-identity").sequences)


def test_strength_zero_is_the_model_itself_in_every_mode():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    before = sorted(vars(zoo.model))
    with lmmhooks.wrap(zoo.model, Opera(penalty_weights=0, threshold=None)):
        assert sorted(vars(zoo.model)) == before
        zoo.model.generate(**inputs, max_new_tokens=2, do_sample=True)
    with lmmhooks.wrap(zoo.model, "opera") as patch:
        assert "generate" in vars(zoo.model)
        with patch.disabled():
            zoo.model.generate(**inputs, max_new_tokens=2, do_sample=True)
    assert sorted(vars(zoo.model)) == before


@pytest.mark.parametrize(
    "others",
    [
        ["fastervlm(keep=4)"],
        ["var(sink_dims='any', tau=2.6, rho=0.3)"],
        ["fastv(keep=4)"],
        ["vista(lam=0.5)", "vhr"],
    ],
)
def test_it_composes_with_what_shortens_prompts_and_edits_attention(others):
    zoo = speaking("qwen2_5_vl")
    inputs = zoo.inputs(batch=2, images=[2, 1], seed=6)
    method = dataclasses.replace(RETURNING, penalty_weights=0.0, num_attn_candidates=VOCAB)
    never = dataclasses.replace(method, threshold=10**6)
    with lmmhooks.wrap(zoo.model, *others):
        plain = search(zoo, inputs, "decoding-identity", new=16, beams=2)
        out = search(zoo, inputs, never, new=16, beams=2)
        acting = search(zoo, inputs, RETURNING, new=20, beams=2)
        # What goes back reads its answer again: the same path as the row alone.
        one = zoo.row(inputs, 0)
        alone = search(zoo, one, RETURNING, new=20, beams=2)
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(out.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=0)
    for whole, own in zip(acting.sequences[:2].tolist(), alone.sequences.tolist(), strict=True):
        own = own[one["input_ids"].shape[1] :]
        assert whole[inputs["input_ids"].shape[1] :][: len(own)] == own


def test_processors_and_stopping_criteria_of_the_caller_are_heard():
    zoo = speaking("llava")
    inputs = zoo.inputs(batch=2, seed=3)
    lengths: list[int] = []

    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.append(input_ids.shape[0])
            return scores.index_fill(1, torch.tensor([34, 36]), -float("inf"))

    class Enough(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= inputs["input_ids"].shape[1] + 6)

    out = search(
        zoo,
        inputs,
        ACTING,
        logits_processor=LogitsProcessorList([Ban()]),
        stopping_criteria=StoppingCriteriaList([Enough()]),
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] == 6
    assert not torch.isin(new, torch.tensor([34, 36])).any()
    assert set(lengths) == {2 * BEAMS}


def test_a_step_is_one_forward_of_the_candidates_and_no_more():
    zoo = speaking("llava")
    inputs = zoo.inputs(batch=2)
    shapes = []
    zoo.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    search(zoo, inputs, ACTING, new=12, min_new_tokens=12)
    # The prompt, then all candidates of a step at once; what was chosen is not read a second time.
    assert shapes[0] == (2 * BEAMS, inputs["input_ids"].shape[1])
    assert shapes[1:].count((2 * BEAMS, 4)) == 12
    # A step whose choice had not been read, an ending beam among the candidates, may need one more.
    assert len(shapes) - 13 <= 2


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({}, "asks for greedy search; pass num_beams=5"),
        ({"do_sample": True}, "asks for sample; pass num_beams=5"),
        ({"num_beams": 3, "do_sample": True}, "asks for beam sample"),
        ({"num_beams": 3, "use_cache": False}, "use_cache=False"),
        ({"num_beams": 3, "cache_implementation": "static"}, "cache_implementation='static'"),
        ({"num_beams": 3, "stop_strings": ["a"]}, "StopStringCriteria"),
        ({"num_beams": 3, "output_attentions": True}, "output_attentions is not available"),
        ({"num_beams": 3, "custom_generate": lambda model: None}, "leave custom_generate out"),
        ({"num_beams": 3, "streamer": "a streamer"}, "leave streamer out"),
    ],
)
def test_calls_it_cannot_serve_are_refused_before_anything_runs(kwargs, said):
    zoo = build("llava")
    ran = []
    zoo.model.model.vision_tower.register_forward_pre_hook(lambda module, args: ran.append(1))
    with lmmhooks.wrap(zoo.model, "opera"), pytest.raises(PromptError, match=said):
        zoo.model.generate(**zoo.inputs(), **kwargs)
    assert not ran


def test_models_and_methods_it_cannot_stand_beside_are_refused():
    zoo = build("llava")
    for other, why in (
        ("vcd", "next-token logits"),
        ("tvc(trigger='every', every=2, bridge=(20, 21))", "newest token"),
        ("look-m", "every head keeps"),
        ("cmai(focus_layer=1)", "remembers every token"),
        ("memvr", "once per forward"),
    ):
        with pytest.raises(MethodError, match=why):
            lmmhooks.wrap(zoo.model, "opera", other)
    zoo.model.set_attn_implementation("flex_attention")
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        lmmhooks.wrap(zoo.model, "opera")


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_factor": 0},
        {"threshold": -1},
        {"num_attn_candidates": 0},
        {"penalty_weights": -0.1},
        {"window_size": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        Opera(**settings)


def test_running_products_are_the_products_of_columns():
    torch.manual_seed(0)
    weights = torch.rand(2, 9, 9).tril() + torch.eye(9)
    trail = torch.zeros(2, 0, dtype=torch.float64)
    for n in range(1, 10):
        trail = column_products(trail, weights[:, None, n - 1, :n], 50.0)[:, 0]
    direct = torch.stack([(50 * weights[:, j:, j].double()).prod(dim=1) for j in range(9)], dim=1)
    torch.testing.assert_close(trail.exp(), direct, rtol=1e-12, atol=0)


def test_products_that_float16_cannot_hold_vanish_or_are_infinite():
    products = torch.tensor([[2e-1, 1e-1], [1e20, 1e21], [3.0, 30.0]], dtype=torch.float64).log()
    score, column = over_trust(products)
    assert score.tolist()[:2] == [0.0, float("inf")]
    # Equal after rounding: the earlier column; 30 units are 3e-6 to three digits.
    assert column.tolist() == [0, 0, 1]
    assert score[2] == torch.tensor(3e-6).half().float()


def test_mode_is_the_smallest_of_the_most_frequent():
    values = torch.tensor([[4, 2, 4, 2, 1], [9, 9, 1, 1, 1], [5, 3, 4, 6, 7]])
    assert mode(values).tolist() == [2, 1, 3]


def test_candidates_are_the_most_likely_and_equals_go_by_their_id():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_candidates(logits, 3).tolist() == [[1, 3, 2], [0, 1, 2]]
    assert top_candidates(logits, 99).tolist()[0] == [1, 3, 2, 4, 5, 0]


def test_decoding_goes_back_behind_the_token_all_beams_have_pointed_at():
    method = Opera(threshold=3, num_attn_candidates=2)
    pointing = torch.tensor([[*range(10), 11, 12, 12, 12, 12]] * 2)
    assert method.retrospect(pointing, {}) == 13
    assert method.retrospect(pointing[:, :-1], {}) is None, "three records are not more than three"
    apart = pointing.clone()
    apart[1, -3] = 0
    assert method.retrospect(apart, {}) is None, "every beam has to point at it"
    assert method.retrospect(pointing, {13: 2}) == 12, "worn out: the position before"
    assert method.retrospect(pointing, {13: 2, 12: 2}) is None
    early = torch.where(pointing == 12, 9, pointing)
    assert method.retrospect(early, {}) is None, "columns before the tenth send nobody back"
    assert Opera(threshold=3, window_size=13).retrospect(pointing, {}) is None
    assert Opera(threshold=None).retrospect(pointing, {}) is None


def test_a_fast_preset_and_the_first_ten_tokens():
    assert lmmhooks.method("opera", preset="fast").num_attn_candidates == 1
    attention = torch.full((1, 2, 10), 0.5)
    image = torch.tensor([[0.25, 0.5]])
    trail = torch.zeros(1, 9, dtype=torch.float64)
    assert Opera(penalty_weights=2.0).judge(attention, image, trail).penalty.tolist() == [[-0.5, -1.0]]
    longer = Opera().judge(torch.full((1, 2, 11), 0.5), image, torch.zeros(1, 10, dtype=torch.float64))
    assert (longer.penalty > 0).all()
