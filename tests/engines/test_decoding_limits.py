"""What the decoding engine leaves behind (nothing), what it refuses (in one line), and its cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import lmmhooks
from lmmhooks.engines.branch_cache import BranchCache
from lmmhooks.engines.lazy_branches import LazyBranches
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.identity import DecodingIdentity
from lmmhooks.methods.decoding.vcd import Vcd
from lmmhooks.methods.decoding.view import StepView
from lmmhooks.vision import VisionInputs
from tests.zoo import FAMILIES, VIDEO_FAMILIES, build


@dataclass(frozen=True)
class Broken(DecodingMethod):
    """Fails in the middle of a forward when asked to."""

    id: ClassVar[str] = "test-broken"
    shape: bool = False

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("smaller", image="pixels")] if self.shape else [Branch("none", image="none")]

    def transform_pixels(
        self, pixels: Tensor, branch: Branch, generator: torch.Generator, context: BranchContext
    ) -> Tensor:
        return pixels[..., 1:]

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        raise RuntimeError("on purpose")


def traces(model: Any) -> list[tuple[str, int, int, tuple[str, ...]]]:
    """Per module: its hooks and instance attributes."""
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), tuple(sorted(vars(module))))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_removal_leaves_no_trace_and_the_same_logits(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        # transformers installs hooks of its own on the first request of hidden states.
        before = zoo.model(**inputs, output_hidden_states=True).logits
        seen = traces(zoo.model)
        patch = lmmhooks.wrap(zoo.model, Vcd(beta=0.1))
        zoo.model.generate(**inputs, max_new_tokens=2)
        with patch.disabled():
            assert torch.equal(zoo.model(**inputs).logits, before)
        patch.remove()
        assert traces(zoo.model) == seen
        assert torch.equal(zoo.model(**inputs).logits, before)


def test_removal_after_a_failure_inside_the_forward():
    zoo = build("llava")
    inputs = zoo.inputs()
    zoo.model(**inputs)  # transformers installs hooks of its own on the first forward
    seen = traces(zoo.model)
    with lmmhooks.wrap(zoo.model, Broken()), pytest.raises(RuntimeError, match="on purpose"):
        zoo.model(**inputs)
    assert traces(zoo.model) == seen
    with lmmhooks.wrap(zoo.model, Vcd()) as patch:
        with pytest.raises(PromptError):
            zoo.model(input_ids=inputs["input_ids"][:, :3])
        assert zoo.model(**inputs).logits.shape[0] == 1
        assert patch.stats.branches == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_is_bit_identical(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    arguments = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = zoo.model.generate(**inputs, **arguments)
    with lmmhooks.wrap(zoo.model, DecodingIdentity()) as patch:
        assert any("branches" in line for line in patch.attached)
        out = zoo.model.generate(**inputs, **arguments)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    with lmmhooks.wrap(zoo.model, DecodingIdentity(stacked=True)) as patch:
        out = zoo.model.generate(**inputs, **arguments)
        assert patch.stats.branches == 2
    # The same numbers, summed in another order in a batch of another size: float32 through four layers.
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), atol=1e-5, rtol=0)


def test_strength_zero_attaches_nothing():
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, Vcd(alpha=0.0, beta=0.0)) as patch:
        assert patch.attached == []


def test_half_precision_noise_is_drawn_before_the_cast():
    zoo = build("llava", dtype=torch.bfloat16)
    inputs = zoo.inputs()
    with lmmhooks.wrap(zoo.model, Vcd(beta=0.1)), torch.no_grad():
        out = zoo.model.generate(**inputs, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        logits = zoo.model(**inputs, logits_to_keep=1).logits
    assert logits.dtype == torch.float32
    assert out.logits[0].isfinite().any()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_prompts_without_an_image_are_refused_by_methods_that_contrast_images(lazy):
    """Lazy branches too refuse at once, not when they are needed first."""
    zoo = build("llava")
    method = Vcd(beta=1.0, lazy=lazy)
    text = zoo.inputs(images=0)
    with lmmhooks.wrap(zoo.model, method), pytest.raises(PromptError, match="row 0 of 1 has none"):
        zoo.model.generate(**text, max_new_tokens=1)
    mixed = zoo.inputs(batch=2, images=(1, 0))
    with lmmhooks.wrap(zoo.model, method), pytest.raises(PromptError, match="row 1 of 2 has none"):
        zoo.model.generate(**mixed, max_new_tokens=1)


def test_lazy_branches_continue_only_what_they_read():
    zoo = build("llava")
    inputs = zoo.inputs()
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, Vcd(beta=0.5)):
            cache = zoo.model(**inputs).past_key_values
        with lmmhooks.wrap(zoo.model, Vcd(beta=0.5, lazy=True)), pytest.raises(PromptError, match="lazy=True"):
            zoo.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)
        with lmmhooks.wrap(zoo.model, Vcd(beta=0.5)), pytest.raises(PromptError, match="not read under this patch"):
            zoo.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


def test_image_tokens_without_an_image():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs()
    del inputs["pixel_values"], inputs["image_grid_thw"]
    with lmmhooks.wrap(zoo.model, Vcd()), pytest.raises(PromptError, match="no image was given"):
        zoo.model.generate(**inputs, max_new_tokens=1)


def test_arguments_that_cannot_be_honoured():
    zoo = build("llava")
    inputs = zoo.inputs()
    features = {"image": zoo.model.model.get_image_features(inputs["pixel_values"], return_dict=True)}
    without_pixels = {key: value for key, value in inputs.items() if key != "pixel_values"}
    static = StaticCache(config=zoo.model.config.get_text_config(), max_cache_len=64)
    other = DynamicCache()
    other.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    refused = {
        "labels": inputs | {"labels": inputs["input_ids"]},
        "static": inputs | {"past_key_values": static},
        "not read under": {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": other},
        "pass pixel_values instead": without_pixels | {"mm_encoder_outputs": features},
        "inputs_embeds": {"inputs_embeds": torch.zeros(1, 4, 64)},
        "attention_mask": inputs | {"attention_mask": torch.ones(1, 1, 4, 4)},
        "without input_ids": {"attention_mask": inputs["attention_mask"]},
    }
    with lmmhooks.wrap(zoo.model, Vcd()):
        for text, arguments in refused.items():
            with pytest.raises(PromptError, match="(?i)" + text) as caught:
                zoo.model(**arguments)
            assert "\n" not in str(caught.value)


def test_static_cache_of_generate_is_refused():
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, Vcd()), pytest.raises(PromptError, match="leave cache_implementation"):
        zoo.model.generate(**zoo.inputs(), max_new_tokens=2, cache_implementation="static")


def test_transforms_that_change_the_shape_and_second_methods_are_refused():
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, Broken(shape=True)), pytest.raises(MethodError, match="must keep the shape"):
        zoo.model(**zoo.inputs())
    with pytest.raises(MethodError, match="next-token logits"):
        lmmhooks.wrap(zoo.model, Vcd(), DecodingIdentity())


def test_several_positions_of_prompts_of_different_lengths_are_refused():
    @dataclass(frozen=True)
    class Texts(Broken):
        id: ClassVar[str] = "test-texts"

    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, Texts()), pytest.raises(PromptError, match="logits_to_keep=3"):
        zoo.model(**zoo.inputs(), logits_to_keep=3)


# -- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_unpacking_pixels_is_undone_by_packing(family):
    zoo = build(family)
    parts = resolve(zoo.model)
    calls = [("image", zoo.inputs(batch=2, images=(2, 1)))]
    if family in VIDEO_FAMILIES:
        calls.append(("video", zoo.inputs(images=0, videos=2)))
    for modality, inputs in calls:
        empty = type("Output", (), {"pooler_output": []})()
        vision = VisionInputs(modality, inputs, empty)
        images = parts.unpack_pixels(vision)
        assert all(image.ndim == 4 and image.shape[1] == 3 for image in images)
        before = inputs[vision.pixels_name].clone()
        assert torch.equal(parts.pack_pixels(images, vision), before)
        changed = parts.pack_pixels([image + 1 for image in images], vision)
        assert torch.equal(inputs[vision.pixels_name], before)
        # Padding (crops an image does not have) stays zero.
        assert torch.equal(changed[before != 0], before[before != 0] + 1)


def test_unpacked_patches_are_the_image_the_processor_packed():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    zoo = build("qwen2_5_vl")
    size = zoo.recipe.patch
    processor = Qwen2VLImageProcessorPil(
        patch_size=size, merge_size=2, do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False
    )
    picture = torch.rand(4 * size, 6 * size, 3, generator=torch.Generator().manual_seed(0)).numpy()
    packed = processor([picture], input_data_format="channels_last", return_tensors="pt")
    vision = VisionInputs("image", dict(packed), type("Output", (), {"pooler_output": []})())
    parts = resolve(zoo.model)
    (image,) = parts.unpack_pixels(vision)
    assert image.shape == (1, 3, 4 * size, 6 * size)
    torch.testing.assert_close(image[0].permute(1, 2, 0), torch.tensor(picture))
    assert torch.equal(parts.pack_pixels([image], vision), packed["pixel_values"])


# -- cache -----------------------------------------------------------------------------------------------------------


def filled(branches: int, rows: int, length: int) -> BranchCache:
    """Row r of branch j holds ``10 j + r`` everywhere."""
    mask = torch.ones(branches * rows, length, dtype=torch.bool)
    mask[0, 0] = False
    marks = torch.tensor([10.0 * branch + row for branch in range(branches) for row in range(rows)])
    cache = BranchCache(DynamicCache(), branches, mask, marks.long())
    states = marks[:, None, None, None].expand(-1, 2, length, 4)
    cache.update(states, states, 0)
    cache.prompt_read()
    return cache


class Notes:
    """A follower that remembers what it was told."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.gone: list[int] = []

    def select(self, rows: Tensor) -> None:
        self.rows.append(rows.tolist())

    def crop(self, num_gone: int) -> None:
        self.gone.append(num_gone)


def held(cache: BranchCache) -> list[int]:
    keys = cache.layers[0].keys[:, 0, 0, 0].long().tolist()
    assert cache.next_position.tolist() == keys
    return keys


def test_row_operations_of_the_cache_act_on_every_branch():
    cache = filled(2, 3, 5)
    cache.follower = follower = Notes()
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert held(cache) == [2, 2, 0, 12, 12, 10]
    assert cache.mask[:, 0].tolist() == [True, True, False, True, True, True]
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert held(cache) == [2, 0, 12, 10]
    cache.batch_repeat_interleave(2)
    assert held(cache) == [2, 2, 0, 0, 12, 12, 10, 10]
    assert follower.rows == [[2, 2, 0], [1, 2], [0, 0, 1, 1]]


def test_positions_and_mask_follow_the_cache_when_it_is_cropped():
    cache = filled(2, 2, 5)
    cache.follower = follower = Notes()
    new = torch.zeros(4, 2, 3, 4)
    cache.update(new, new, 0)
    mask, positions = cache.continuation(2)
    assert mask.shape == (4, 5 + 3 + 2)
    assert positions.tolist() == [[3, 4], [4, 5], [13, 14], [14, 15]]
    cache.crop(-2)
    mask, positions = cache.continuation(1)
    assert mask.shape == (4, 5 + 1 + 1)
    assert positions.tolist() == [[1], [2], [11], [12]]
    assert follower.gone == [2]


def test_the_original_cache_sees_the_same_layers():
    zoo = build("llava")
    own = DynamicCache(config=zoo.model.config.get_text_config())
    with lmmhooks.wrap(zoo.model, Vcd(beta=0.1)), torch.no_grad():
        out = zoo.model(**zoo.inputs(), past_key_values=own, use_cache=True)
    assert own.get_seq_length() == out.past_key_values.get_seq_length() > 0
    assert math.isfinite(float(own.layers[0].keys.sum()))


def test_lazy_branches_read_what_the_surviving_rows_read():
    """Rows swap and entries go while tokens wait, before and after the branches read the prompt."""
    fed: list[list[list[int]]] = []

    def read(prompt: dict[str, Any], logits_to_keep: Any) -> tuple[Tensor, BranchCache]:
        assert torch.equal(prompt["input_ids"], tokens)
        return torch.zeros(2, 1, 8), filled(1, 2, 5)

    def go_on(new: Tensor, cache: BranchCache, logits_to_keep: Any) -> tuple[Tensor, BranchCache]:
        fed.append(new.tolist())
        states = torch.zeros(2, 2, new.shape[1], 4)
        cache.update(states, states, 0)
        return torch.ones(2, logits_to_keep, 8), cache

    tokens = torch.tensor([[1, 2], [3, 4]])
    lazy = LazyBranches({"input_ids": tokens}, 2, read, go_on)
    lazy.push(torch.tensor([[10], [20]]))
    lazy.select(torch.tensor([1, 0]))
    lazy.push(torch.tensor([[21, 22], [11, 12]]))
    lazy.crop(1)
    assert lazy.catch_up(1).shape == (2, 1, 8)
    assert fed == [[[20, 21], [10, 11]]]
    assert held(lazy.cache) == [1, 0], "rows that swapped before the prompt was read stay swapped"
    lazy.push(torch.tensor([[23], [13]]))
    lazy.select(torch.tensor([1, 1]))
    lazy.crop(2)
    assert held(lazy.cache) == [0, 0]
    assert lazy.queue.shape == (2, 0)
    assert lazy.cache.get_seq_length() == 5 + 2 - 1
