"""INTER against separate forwards with and without either player, and the properties of Harsanyi dividends."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.inter import Inter, candidates, interaction, variance
from tests.methods.readings import FAMILIES, MODES, check_logits, check_tokens, composes
from tests.reference.decoding import edited_inputs, without_image
from tests.zoo import build

SETTINGS = {"k": 12, "beta": 0.001, "tau": 0.5, "alpha": 1.5}
TAIL = 2


def naive(alpha, k, beta, tau, prior="dividend"):
    """The steps of the sheet, token by token."""

    def combine(main, others, step):
        both, image, question, neither = (logits.log_softmax(-1).tolist() for logits in (main, *others))
        dividend = [a - b - c + d for a, b, c, d in zip(both, image, question, neither, strict=True)]
        ranked = sorted(range(len(main)), key=lambda token: -float(main[token]))
        cut = float(main.max()) + (math.log(beta) if beta else -math.inf)
        chosen = [token for token in (ranked[:k] if k else ranked) if float(main[token]) >= cut]
        mean = sum(dividend[token] for token in chosen) / len(chosen)
        spread = sum((dividend[token] - mean) ** 2 for token in chosen) / len(chosen)
        if spread <= tau:
            return main
        if prior == "softmax":
            total = math.log(sum(math.exp(dividend[token]) for token in chosen))
            dividend = [value - total for value in dividend]
        out = torch.full_like(main, -math.inf)
        for token in chosen:
            out[token] = main[token] + alpha * dividend[token]
        return out

    return combine


def readings(zoo, inputs):
    """The prompt without question, without image, and without both."""
    visual = resolve(zoo.model).visual_ids

    def unasked(row):
        last = max(place for place, token in enumerate(row) if token in visual)
        return row[: last + 1] + row[-TAIL:]

    image = edited_inputs(inputs, unasked)
    return [image, without_image(inputs, visual), without_image(image, visual)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prior", ["dividend", "softmax"])
def test_equals_separate_forwards(family, prior):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(2, 1))
    method = Inter(**SETTINGS, prior=prior, answer_prefix=TAIL)
    check_logits(zoo, inputs, method, readings(zoo, inputs), naive(**SETTINGS, prior=prior))


@pytest.mark.parametrize("mode", MODES)
def test_generates_the_tokens_of_the_naive_rendering(mode):
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    check_tokens(zoo, inputs, Inter(**SETTINGS, answer_prefix=TAIL), readings(zoo, inputs), naive(**SETTINGS), mode)


def test_composes():
    zoo = build("llava")
    composes(zoo, zoo.inputs(batch=2), "inter(k=0, answer_prefix=2)")


def test_steps_below_the_gate_are_the_model_s_own():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, Inter(tau=1e6, answer_prefix=1)):
            out = zoo.model(**inputs).logits[:, -1]
    # The same numbers from a batch of another size.
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=0)
    assert Inter(tau=math.inf, answer_prefix=1).is_identity


def test_strength_zero_leaves_the_candidates():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, Inter(alpha=0.0, k=5, answer_prefix=1)):
            out = zoo.model(**inputs).logits[:, -1]
    assert out.isfinite().sum(dim=1).tolist() == [5, 5]
    torch.testing.assert_close(out[out.isfinite()], plain[out.isfinite()], atol=1e-5, rtol=0)


def test_an_image_that_is_ignored_has_no_interaction():
    main, image = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    method = Inter(k=6, answer_prefix=1)
    # Without the image nothing changes: question alone says what both say, nothing what the image alone says.
    out = method.combine(main, [image, main, image], 0, None)
    # The dividend is rounding, so its variance is about 1e-15 and may open the gate of 0: the candidates stay.
    kept = out.isfinite()
    torch.testing.assert_close(out[kept], main[kept], atol=1e-5, rtol=0)
    assert bool((kept | ~candidates(main, 6, 0.0)).all())


def test_exchanging_the_presence_of_a_player_changes_the_sign():
    both, image, question, neither = torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(0))
    expected = -interaction(both, image, question, neither)
    torch.testing.assert_close(interaction(question, neither, both, image), expected)
    torch.testing.assert_close(interaction(image, both, neither, question), expected)


def test_candidates_and_their_variance():
    main = torch.tensor([[3.0, 2.0, 2.0, -5.0], [0.0, 9.0, 1.0, 2.0]])
    assert candidates(main, 2, 0.0).tolist() == [[True, True, True, False], [False, True, False, True]]
    assert candidates(main, 0, 0.5).tolist() == [[True, False, False, False], [False, True, False, False]]
    assert candidates(main, 0, 0.0).all()
    among = candidates(main, 2, 0.0)
    values = torch.tensor([[1.0, 2.0, 6.0, 99.0], [99.0, 1.0, 99.0, 3.0]])
    torch.testing.assert_close(variance(values, among), torch.tensor([[14 / 3], [1.0]]))
    assert variance(values, candidates(main, 1, 0.0)).tolist() == [[0.0], [0.0]]


def test_the_question_of_a_chat_prompt_goes_and_the_template_stays():
    for name in ("tiny-llava", "tiny-qwen"):
        model, processor = lmmhooks.load(name)
        content = [{"type": "image"}, {"type": "text", "text": "Is there a cup in the image?"}]
        message = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(message, add_generation_prompt=True)
        row = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        family = resolve(model)
        context = BranchContext(family, processor)
        method = Inter()
        image, _, neither = method.branches(family)
        out = method.edit_tokens(row, image, context)
        assert processor.tokenizer.decode(out) == text.replace("Is there a cup in the image?", "")
        bare = row[~torch.isin(row, torch.tensor(family.visual_ids))]
        kept = out[~torch.isin(out, torch.tensor(family.visual_ids))]
        assert torch.equal(method.edit_tokens(bare, neither, context), kept)


@pytest.mark.parametrize(
    "settings", [{"alpha": -1}, {"k": -1}, {"tau": -0.1}, {"prior": "log"}, {"answer_prefix": 0}, {"beta": 1.1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=f"inter: {next(iter(settings))}="):
        Inter(**settings)


def test_the_question_is_told_from_the_template_by_a_processor_only():
    with pytest.raises(MethodError, match="needs the model's tokenizer"):
        lmmhooks.wrap(build("llava").model, "inter")
