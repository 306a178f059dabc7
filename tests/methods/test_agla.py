"""AGLA against forwards of their own on masked pixels, and its matcher against gradients taken by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from transformers import BlipConfig, BlipForImageTextRetrieval

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.agla import Agla
from lmmhooks.methods.decoding.context import CLIP_MEAN, CLIP_STD
from lmmhooks.methods.decoding.relevance import BlipMatcher, caption, heat_map, hottest, num_hottest
from tests.methods.shown import MODES, SILENT, TOLERANCE, inputs_of
from tests.methods.test_cdpruner import word_tokenizer
from tests.reference.branch_features import image_runs, of_image, prompt_attention
from tests.reference.decoding import NaiveBranches, naive_generate
from tests.zoo import IMAGE, build

ALPHA, BETA, SIMILARITY = 2.0, 0.02, 1.0
BLACK = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)


def blurred(grid, size):
    """The released recipe, on any size."""
    grid = np.asarray(grid, dtype=float)
    grid = (grid - grid.min()) / (grid.max() - grid.min())
    factors = [long / short for long, short in zip(size, grid.shape, strict=True)]
    large = ndimage.zoom(grid, factors, order=3, mode="grid-constant", cval=0, grid_mode=True)
    soft = ndimage.gaussian_filter(np.clip(large, 0, 1), [0.02 * side for side in size])
    return (soft - soft.min()) / (soft.max() - soft.min())


def masked(crop, grid, similarity):
    """One crop ``[3, H, W]`` with everything black but the hottest pixels."""
    heat = blurred(grid, crop.shape[1:])
    ratio = min(1 - similarity / 2, 1 - 1e-5)
    threshold = sorted(heat.ravel().tolist(), reverse=True)[int(heat.size * ratio)]
    out = crop.clone()
    out[:, torch.from_numpy(heat < threshold)] = BLACK[:, None]
    return out


def masked_inputs(eager, inputs):
    """Inputs of LLaVA with every image masked by what the last prompt token attends to."""
    attention = prompt_attention(eager.model, inputs)
    out = []
    for row in range(2):
        for run in image_runs(inputs["input_ids"][row], inputs["attention_mask"][row], IMAGE):
            grid = of_image(attention, inputs["attention_mask"], row, run).mean(dim=0).view(4, 4)
            out.append(masked(inputs["pixel_values"][len(out)], grid, SIMILARITY))
    return {**inputs, "pixel_values": torch.stack(out)}


def combine(main, others, step):
    kept = main >= main.max() + np.log(BETA)
    return (main + ALPHA * others[0]).masked_fill(~kept, -torch.inf)


METHOD = Agla(alpha=ALPHA, beta=BETA, relevance="attention", similarity=SIMILARITY)


def test_equals_separate_forwards_at_prefill_and_decode():
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = inputs_of(zoo)
    others = [masked_inputs(eager, inputs)]
    share = (others[0]["pixel_values"] == BLACK[:, None, None]).float().mean()
    assert 0.3 < share < 0.7
    with lmmhooks.wrap(zoo.model, METHOD):
        out = zoo.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=SILENT, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    naive = NaiveBranches(zoo.model, inputs, others, combine)
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, naive.logits(answer[:, :step]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_generates_the_tokens_of_the_naive_rendering(mode):
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = inputs_of(zoo)
    torch.manual_seed(0)
    expected = naive_generate(
        zoo.model, inputs, [masked_inputs(eager, inputs)], combine, max_new_tokens=4, **MODES[mode]
    )
    with lmmhooks.wrap(zoo.model, METHOD):
        torch.manual_seed(0)
        out = zoo.model.generate(**inputs, max_new_tokens=4, **MODES[mode])
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], expected)


def test_lazy_branches_change_nothing():
    zoo = build("llava")
    inputs = inputs_of(zoo)
    answers = []
    for lazy in (False, True):
        with lmmhooks.wrap(zoo.model, Agla(beta=0.9, relevance="attention", lazy=lazy)) as patch:
            answers.append(zoo.model.generate(**inputs, max_new_tokens=8, do_sample=False))
            share = patch.stats.branch_steps
    assert torch.equal(*answers)
    assert share < 1, "a cut that never decides a step proves nothing"


def test_released_code_adds_the_original_behind_the_first_token():
    zoo = build("llava")
    inputs = inputs_of(zoo)
    arguments = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with lmmhooks.wrap(zoo.model, Agla(beta=0.0, relevance="attention", first_token_only=True)):
        released = zoo.model.generate(**inputs, **arguments)
    with lmmhooks.wrap(zoo.model, Agla(beta=0.0, relevance="attention")):
        intended = zoo.model.generate(**inputs, **arguments)
    assert torch.equal(released.logits[0], intended.logits[0])
    full = {**inputs, "input_ids": released.sequences[:, :-1]}
    full["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        plain = zoo.model(**full).logits[:, -1]
    torch.testing.assert_close(released.logits[1], 3 * plain, atol=TOLERANCE, rtol=0)


def test_heat_maps():
    grid = torch.rand(24, 24, generator=torch.Generator().manual_seed(0))
    heat = heat_map(grid, (384, 384))
    assert np.array_equal(heat.numpy(), blurred(grid.double().numpy(), (384, 384)))
    assert float(heat.min()) == 0
    assert float(heat.max()) == 1
    assert not heat_map(torch.ones(24, 24), (96, 96)).any(), "a constant map is no division by zero"
    for similarity, expected in ((0.0, 1 - 1e-5), (0.4, 0.8), (1.0, 0.5), (-1.0, 1 - 1e-5)):
        rank = num_hottest(384 * 384, similarity)
        assert rank == int(384 * 384 * expected)
        # The pixel of that rank stays too, and those as hot as it.
        assert int(hottest(heat, rank).sum()) >= rank + 1
        assert float(hottest(heat, rank).float().mean()) == pytest.approx(expected, abs=1e-4)


def test_captions():
    assert caption('Is there a "Red" cup; (left)?  ') == "is there a red cup left ?"
    assert caption(" ".join(["w"] * 60)) == " ".join(["w"] * 50)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A folder with a tiny BLIP matching model."""
    folder = tmp_path_factory.mktemp("blip")
    text = {
        "vocab_size": 200, "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 24, "projection_dim": 8,
        "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 198,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24,
        "patch_size": 4, "projection_dim": 8,
    }  # fmt: skip
    model = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    model.eval().save_pretrained(folder)
    word_tokenizer(10, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_the_matcher_weighs_attention_by_its_gradient(blip):
    matcher = BlipMatcher(str(blip), torch.device("cpu"))
    rgb = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(1))
    text = "w20 w31 w45"
    with torch.inference_mode():
        relevance, similarity = matcher.match(rgb, text, 1)
    # By finite differences of the attention of one layer, one entry at a time.
    model = BlipForImageTextRetrieval.from_pretrained(blip).double().eval()
    pixels = ((rgb - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None])[None].double()
    ids = torch.tensor([matcher.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        itc = model(input_ids=ids, pixel_values=pixels, use_itm_head=False).itm_score
        assert similarity == pytest.approx(float(itc), abs=1e-5)
        seen = model.vision_model(pixel_values=pixels).last_hidden_state
        ids[:, 0] = 199
        dropout = model.text_encoder.encoder.layer[1].crossattention.self.dropout
        attention = []

        def said(change=None):
            def hook(module, args, output):
                attention.append(output)
                return output if change is None else output + change

            handle = dropout.register_forward_hook(hook)
            out = model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
            handle.remove()
            return float(model.itm_head(out[:, 0])[0, 1])

        said()
        plain = attention[0]
        expected = torch.zeros(36, dtype=torch.double)
        heads, words = plain.shape[1], plain.shape[2]
        for head in range(heads):
            for word in range(1, words - 1):
                for patch in range(36):
                    step = torch.zeros_like(plain)
                    step[0, head, word, 1 + patch] = 1e-4
                    gradient = (said(step) - said(-step)) / 2e-4
                    expected[patch] += float(plain[0, head, word, 1 + patch]) * max(gradient, 0.0)
        expected /= heads * (words - 2)
    # float32 against central differences in double.
    torch.testing.assert_close(relevance.double().flatten(), expected, atol=1e-6, rtol=1e-3)
    assert float(relevance.max()) > 1e-5


def test_the_matcher_reads_the_question_and_leaves_a_note(blip):
    zoo = build("llava")
    processor = SimpleNamespace(tokenizer=word_tokenizer(0, unk_token="<unk>"))
    inputs = inputs_of(zoo)
    method = Agla(beta=0.0, matcher=str(blip), layer=1, similarity=SIMILARITY)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method, processor=processor) as patch:
        logits = zoo.model(**inputs, logits_to_keep=1).logits[:, -1]
        notes = patch.stats.notes
    texts = [note["text"] for note in notes]
    instruction = [inputs["input_ids"][row, -num:].tolist() for row, num in ((0, 5), (0, 5), (1, 8))]
    assert texts == [" ".join(f"w{i}" for i in ids) for ids in instruction]
    matcher = BlipMatcher(str(blip), torch.device("cpu"))
    changed = []
    for pixels, text in zip(inputs["pixel_values"], texts, strict=True):
        rgb = (pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]).clamp(0, 1)
        changed.append(masked(pixels, matcher.match(rgb, text, 1)[0], SIMILARITY))
    with torch.no_grad():
        plain, other = (
            zoo.model(**given).logits[:, -1] for given in (inputs, {**inputs, "pixel_values": torch.stack(changed)})
        )
    torch.testing.assert_close(logits, plain + 2 * other, atol=TOLERANCE, rtol=0)


def test_a_given_map(tmp_path):
    grid = np.random.default_rng(0).random((6, 6))
    np.save(tmp_path / "map.npy", grid)
    zoo = build("llava")
    inputs = inputs_of(zoo)
    method = Agla(beta=0.0, relevance=str(tmp_path / "map.npy"), similarity=SIMILARITY)
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, method):
            logits = zoo.model(**inputs, logits_to_keep=1).logits[:, -1]
        pixels = torch.stack([masked(image, grid, SIMILARITY) for image in inputs["pixel_values"]])
        plain, other = (zoo.model(**given).logits[:, -1] for given in (inputs, {**inputs, "pixel_values": pixels}))
    torch.testing.assert_close(logits, plain + 2 * other, atol=TOLERANCE, rtol=0)


def test_bad_settings_are_refused(tmp_path, blip):
    model = build("llava").model
    for settings in (
        {"alpha": -1},
        {"relevance": "gradients"},
        {"relevance": "attention", "matcher": "somewhere"},
        {"similarity": 2.0},
        {"layer": -1},
    ):
        with pytest.raises(MethodError, match=list(settings)[-1]):
            Agla(**settings)
    with pytest.raises(MethodError, match="matcher=None"):
        lmmhooks.wrap(model, "agla")
    with pytest.raises(MethodError, match="no checkpoint folder"):
        lmmhooks.wrap(model, Agla(matcher=str(tmp_path)))
    with pytest.raises(MethodError, match="text layers are 0 to 2"):
        lmmhooks.wrap(model, Agla(matcher=str(blip)))
    with pytest.raises(MethodError, match="does not exist"):
        lmmhooks.wrap(model, Agla(relevance="nowhere.npy"))
