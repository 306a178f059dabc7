"""Controls of decoding methods: each against the definition it states, on the methods it is a control of."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.apc_only import ApcOnly
from lmmhooks.methods.decoding.base import DecodingMethod
from lmmhooks.methods.decoding.controls import ControlOf
from lmmhooks.methods.decoding.equal_branch import EqualBranch
from lmmhooks.methods.decoding.olm import Olm, hesitates
from lmmhooks.methods.decoding.pba import Pba
from lmmhooks.methods.decoding.placebo_image import PlaceboImage, draw_picture
from lmmhooks.methods.decoding.sign_flip import SignFlip, flipped
from lmmhooks.methods.decoding.temperature import Temperature
from lmmhooks.methods.decoding.yes_offset import YesOffset
from lmmhooks.prompting import build_inputs
from tests.conformance.table import ROWS
from tests.methods.readings import FAMILIES, MODES, STEPS, TOLERANCE, check_logits, check_tokens, composes
from tests.reference.decoding import changed_inputs, edited_inputs, generator_of, noised_inputs, vcd
from tests.zoo import build

SPECS = [
    "temperature(of='ritual(beta=0.0)')",
    "equal-branch(of='vcd(beta=0.0)')",
    "sign-flip(of='vcd(beta=0.0)')",
    "placebo-image(of='vcd(beta=0.0)')",
    "pba(suffix=[11, 12])",
    "yes-offset(yes=11, offset=2.0)",
]


def logits_of(zoo, inputs, method, **kwargs):
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method, **kwargs):
        return zoo.model(**inputs, logits_to_keep=1).logits[:, -1]


def tokens_of(zoo, inputs, method, **kwargs):
    torch.manual_seed(0)
    with lmmhooks.wrap(zoo.model, method):
        return zoo.model.generate(**inputs, max_new_tokens=STEPS, **kwargs)


@pytest.mark.parametrize("spec", SPECS)
def test_composes(spec):
    zoo = build("llava")
    composes(zoo, zoo.inputs(batch=2), spec)


# -- apc-only ----------------------------------------------------------------------------------------------------------


def test_the_cut_alone_is_greedy_decoding_under_greedy_and_a_cut_distribution_under_sampling():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    plain = zoo.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(tokens_of(zoo, inputs, ApcOnly(), do_sample=False), plain)
    assert torch.equal(tokens_of(zoo, inputs, ApcOnly(beta=1.0), do_sample=True), plain)
    with torch.no_grad():
        raw = zoo.model(**inputs, logits_to_keep=1).logits[:, -1]
    out = logits_of(zoo, inputs, ApcOnly(beta=0.3))
    assert torch.equal(out.isfinite(), raw >= raw.amax(-1, keepdim=True) + math.log(0.3))
    assert torch.equal(out[out.isfinite()], raw[out.isfinite()])
    assert ApcOnly(beta=0.0).is_identity


# -- temperature, equal-branch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of", "scale"), [("ritual(alpha=3.0, beta=0.1)", 4.0), ("vcd(alpha=2.0, beta=0.1)", 1.0)])
def test_temperature_is_that_of_the_sum_of_weights_on_top_of_the_cut(of, scale):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    cut = logits_of(zoo, inputs, ApcOnly(beta=0.1))
    # Sums of up to four equal numbers are rounded as many times.
    torch.testing.assert_close(logits_of(zoo, inputs, Temperature(of=of)), scale * cut, atol=1e-5, rtol=0)
    expected = tokens_of(zoo, inputs, ApcOnly(beta=0.1), do_sample=True, top_k=0, temperature=1 / scale)
    assert torch.equal(tokens_of(zoo, inputs, Temperature(of=of), do_sample=True, top_k=0), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_branches_are_the_temperature_control_the_long_way(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(2, 1))
    for of in ("ritual(beta=0.05)", "vcd(beta=0.05)", "m3id(lam=1.0, beta=0.05)"):
        expected = logits_of(zoo, inputs, Temperature(of=of))
        torch.testing.assert_close(logits_of(zoo, inputs, EqualBranch(of=of)), expected, atol=TOLERANCE, rtol=0)


def test_equal_branches_run_and_the_temperature_control_runs_none():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    for method, branches in ((EqualBranch(of="icd(disturbance=[11], vcd_alpha=1.0)"), 3), (Temperature(), 1)):
        with lmmhooks.wrap(zoo.model, method) as patch:
            zoo.model.generate(**inputs, max_new_tokens=2)
            assert patch.stats.branches == branches


def test_equal_branches_of_a_sharpening_method_leave_greedy_decoding_alone():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    plain = zoo.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(tokens_of(zoo, inputs, EqualBranch(of="ritual"), do_sample=False), plain)


# -- sign-flip ---------------------------------------------------------------------------------------------------------


def test_signs_of_branches_flip_and_the_sum_of_weights_stays():
    assert flipped([2.0, -1.0]) == [0.0, 1.0]
    assert flipped([1.0, 3.0]) == [7.0, -3.0]
    per_row = flipped([torch.tensor([[2.0], [1.0]]), torch.tensor([[-1.0], [0.0]])])
    assert [weight.tolist() for weight in per_row] == [[[0.0], [1.0]], [[1.0], [0.0]]]
    for weights in ([2.0, -1.0], [1.0, 3.0], [4.5, -1.5, -1.0]):
        assert sum(flipped(weights)) == pytest.approx(sum(weights))
        assert flipped(flipped(weights)) == pytest.approx(weights)


@pytest.mark.parametrize("mode", MODES)
def test_flipped_vcd_pushes_towards_the_noised_image(mode):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    # (1 + a; -a) flipped is (1 - a; a): VCD with the strength -a.
    others = [noised_inputs(zoo, inputs)]
    check_tokens(zoo, inputs, SignFlip(of="vcd(alpha=0.5, beta=0.02)"), others, vcd(-0.5, 0.02), mode)


def test_what_is_no_weighted_sum_has_no_signs():
    zoo = build("llava")
    with pytest.raises(MethodError, match="no weighted sum"):
        lmmhooks.wrap(zoo.model, SignFlip(of="inter(answer_prefix=1)"))


# -- placebo-image -----------------------------------------------------------------------------------------------------


def normalised(rgb):
    from lmmhooks.methods.decoding.context import CLIP_MEAN, CLIP_STD

    return (rgb - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_branches_show_a_picture_of_the_seed(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(2, 1))

    def placebo(image):
        picture = draw_picture(*image.shape[-2:], generator_of(image, 5, "noised"))
        return normalised(picture).expand(image.shape)

    others = [changed_inputs(zoo, inputs, placebo)]
    check_logits(zoo, inputs, PlaceboImage(of="vcd(alpha=0.5, beta=0.02)", seed=5), others, vcd(0.5, 0.02))


def test_branches_show_a_file_also_where_the_method_leaves_the_image_out(tmp_path):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    Image.radial_gradient("L").convert("RGB").resize((16, 16)).save(tmp_path / "other.png")
    values = torch.frombuffer(bytearray(Image.open(tmp_path / "other.png").tobytes()), dtype=torch.uint8)
    picture = normalised(values.view(16, 16, 3).permute(2, 0, 1) / 255)
    others = [changed_inputs(zoo, inputs, lambda image: picture.expand(image.shape))]
    method = PlaceboImage(of="m3id(lam=0.5, beta=0.02)", image=str(tmp_path / "other.png"))

    def combine(main, others, step):
        return vcd(math.exp(0.5 * (step + 1)) - 1, 0.02)(main, others, step)

    check_logits(zoo, inputs, method, others, combine)


def test_a_picture_is_drawn_from_its_generator():
    one, same, other = (draw_picture(20, 30, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == (3, 20, 30)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0 <= float(one.min()) < float(one.max()) <= 1
    with pytest.raises(PromptError, match="does not exist"):
        PlaceboImage(image="nowhere.png")


# -- controls of yes/no answers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def loaded(request):
    return lmmhooks.load(request.param, dtype="float32")


def picture():
    return Image.radial_gradient("L").resize((112, 112)).convert("RGB")


def test_doubt_is_told_by_both_probabilities():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.1, 0.2], [0.05, 0.05, 0.9], [0.1, 0.5, 0.4]])
    assert hesitates(probabilities.log(), [0], [1], 0.2, 0.5).tolist() == [True, False, False, True]
    # Spellings add up.
    assert hesitates(probabilities.log(), [0, 2], [1], 0.2, 0.5).tolist() == [True, False, False, True]


def test_olm_answers_yes_in_doubt_and_what_the_model_says_otherwise():
    main = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.05, 0.05, 0.9], [0.3, 0.5, 0.2]]).log()
    out = Olm(yes=0, no=1).combine(main, [], 0, None)
    assert out.argmax(dim=-1).tolist() == [0, 1, 2, 0]
    assert torch.equal(out[1:3], main[1:3])
    # Sampling too: nothing but Yes is left.
    assert out.isfinite().sum(dim=-1).tolist() == [1, 3, 3, 1]


def test_olm_and_yes_offset_find_the_answers_of_the_tokenizer(loaded):
    model, processor = loaded
    inputs = build_inputs(processor, [picture()], "Is there a cup in the image?")
    # With and without the blank before them; the bundled models answer with it, LLaMA's tokenizer always writes it.
    words = ("Yes", " Yes", "No")
    yes, spaced_yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words)
    with torch.no_grad():
        plain = model(**inputs, logits_to_keep=1).logits[0, -1]
        with lmmhooks.wrap(model, "yes-offset(offset=-3.0)", processor=processor):
            shifted = model(**inputs, logits_to_keep=1).logits[0, -1]
        with lmmhooks.wrap(model, "olm(threshold=0.0, margin=1.0)", processor=processor):
            forced = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
    for token in (yes, spaced_yes):
        assert float(shifted[token] - plain[token]) == pytest.approx(-3.0, abs=1e-5)
    assert float(shifted[no]) == float(plain[no])
    assert int(forced) in (yes, spaced_yes)


def test_only_the_first_token_is_offset():
    main = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    method = YesOffset(yes=4, offset=1.5)
    first = method.combine(main, [], 0, None)
    assert (first - main).nonzero().tolist() == [[0, 4], [1, 4]]
    assert torch.equal(method.combine(main, [], 1, None), main)
    assert YesOffset(offset=0.0).is_identity
    assert Olm(margin=0.0).is_identity


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_the_main_rows_read_the_suffix(family, mode):
    """One block of rows, and the answer is that of the plain model to the longer prompt."""
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(2, 1))
    longer = edited_inputs(inputs, lambda row: [*row, 11, 12, 13])
    arguments = {"max_new_tokens": STEPS, **MODES[mode]}
    torch.manual_seed(0)
    expected = zoo.model.generate(**longer, **arguments)[:, longer["input_ids"].shape[1] :]
    with lmmhooks.wrap(zoo.model, Pba(suffix=(11, 12, 13))) as patch:
        torch.manual_seed(0)
        out = zoo.model.generate(**inputs, **arguments)
        assert patch.stats.branches == 1
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], expected)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat(1, 1))


def test_the_suffix_stands_before_what_opens_the_answer(loaded):
    model, processor = loaded
    question = "Is there a cup in the image?"
    longer = f"{question} Answer the question using a single word or phrase. Answer yes whenever possible."
    with torch.no_grad():
        plain = model(**build_inputs(processor, [picture()], longer), logits_to_keep=1).logits[:, -1]
        with lmmhooks.wrap(model, "pba", processor=processor):
            out = model(**build_inputs(processor, [picture()], question), logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(out, plain, atol=TOLERANCE, rtol=0)


# -- whatever the method -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["temperature", "equal-branch", "sign-flip", "placebo-image"])
@pytest.mark.parametrize("name", [name for name, cls in lmmhooks.methods("decoding").items() if name in ROWS])
def test_every_method_with_branches_has_its_controls(name, control):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    method = lmmhooks.methods.resolve(ROWS[name].spec)
    weighted = getattr(type(method), "combine", None) is DecodingMethod.combine
    try:
        branches = isinstance(method, DecodingMethod) and method.branches(resolve(zoo.model))
        applies = branches and not isinstance(method, ControlOf) and (weighted or control != "sign-flip")
        spec = {control: {"of": ROWS[name].spec}}
        if not applies:
            with pytest.raises(MethodError, match=r"no decoding method with branches|has no branches|no weighted sum"):
                lmmhooks.wrap(zoo.model, spec)
            return
        with lmmhooks.wrap(zoo.model, spec):
            tokens = zoo.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, num_beams=2, do_sample=False)
        assert tokens.shape == (2, inputs["input_ids"].shape[1] + 2)
    finally:
        lmmhooks.unwrap(zoo.model)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_control_is_written_down_with_the_method_it_controls():
    method = lmmhooks.methods.resolve("sign-flip(of='vcd(alpha=0.5, seed=0)')")
    assert method.settings() == {"of": "vcd(alpha=0.5)"}
    assert lmmhooks.methods.resolve(method.spec()) == method
    assert EqualBranch(of="vcd(alpha=0.0, beta=0.0)").is_identity


@pytest.mark.parametrize(
    ("build_method", "reason"),
    [
        (lambda: Temperature(of="var"), "is no decoding method with branches"),
        (lambda: SignFlip(of="equal-branch"), "is no decoding method with branches"),
        (lambda: EqualBranch(of="rituals"), "did you mean 'ritual'"),
        (lambda: ApcOnly(beta=1.5), "apc-only: beta="),
        (lambda: Olm(threshold=2.0), "olm: threshold="),
        (lambda: Olm(margin=-1.0), "olm: margin="),
        (lambda: Olm(yes=""), "olm: yes="),
        (lambda: Olm(yes="No"), "olm: no="),
        (lambda: YesOffset(offset=math.inf), "yes-offset: offset="),
        (lambda: Pba(suffix=(1.5,)), "pba: suffix="),
        (lambda: PlaceboImage(seed=-1), "placebo-image: seed="),
    ],
)
def test_bad_settings_are_refused(build_method, reason):
    with pytest.raises(MethodError, match=reason):
        build_method()


@pytest.mark.parametrize("spec", ["equal-branch(of='apc-only')", "temperature(of='vcd(alpha=0.0)')"])
def test_a_method_without_branches_has_no_such_control(spec):
    with pytest.raises(MethodError, match="has no branches"):
        lmmhooks.wrap(build("llava").model, spec)


@pytest.mark.parametrize("spec", ["olm", "yes-offset", "pba"])
def test_words_need_a_processor(spec):
    with pytest.raises(MethodError, match="needs the model's tokenizer"):
        lmmhooks.wrap(build("llava").model, spec)
