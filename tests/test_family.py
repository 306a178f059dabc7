"""Families find the real modules, and place visual tokens where the pixels they show are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lmmhooks import families
from lmmhooks.errors import ModelError, PromptError
from lmmhooks.family import Family, resolve, supported, uses_attention_interface
from lmmhooks.layout import build_layout
from lmmhooks.vision import VisionInputs
from tests.zoo import FAMILIES, IMAGE, VIDEO, VIDEO_FAMILIES, VOCAB, Zoo, encode, zoo

__all__ = ["zoo"]


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_the_ones_that_run(zoo: Any, name: str) -> None:
    """Every module a family names is called by a forward, the right number of times and in the right order."""
    model = zoo(name)
    family = resolve(model.model)
    assert family.name == name
    assert type(family) is supported()[name]
    layers = [family.attention_of(layer) for layer in family.layers]
    tower = [family.attention_of(layer) for layer in family.vision_layers]
    assert all(uses_attention_interface(module) for module in layers + tower)
    parts = [family.vision, *tower, family.text_model, *layers, family.norm, family.lm_head]
    if family.projector is not None:
        parts.insert(1 + len(tower), family.projector)
    inputs = model.inputs()
    called: list[nn.Module] = []
    handles = [part.register_forward_hook(lambda module, args, out: called.append(module)) for part in parts]
    with torch.no_grad():
        model.model(**inputs)
    for handle in handles:
        handle.remove()
    assert [module for module in called if module in layers] == layers
    assert [module for module in called if module in tower] == tower
    assert all(called.count(part) == 1 for part in parts)
    assert family.num_layers == 4
    assert (family.num_heads, family.num_kv_heads, family.hidden_size) == (4, 2, 64)
    assert family.image_token_id == IMAGE
    assert family.video_token_id == (VIDEO if name in VIDEO_FAMILIES else None)


def test_facts_that_differ_between_families(zoo: Any) -> None:
    facts = {name: resolve(zoo(name).model).describe() for name in FAMILIES}
    assert json.loads(json.dumps(facts)) == facts
    assert {name for name, fact in facts.items() if fact["cls"]} == {"llava", "llava_next", "internvl"}
    assert {name for name, fact in facts.items() if fact["mrope"]} == {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
    deepstack = {name: fact["deepstack_layers"] for name, fact in facts.items()}
    assert deepstack == {**dict.fromkeys(FAMILIES, 0), "qwen3_vl": 2}
    assert {name for name, fact in facts.items() if fact["window_attention"]} == {"qwen2_5_vl"}
    assert facts["qwen2_5_vl"]["full_attention_vision_layers"] == [1, 3]
    assert facts["qwen2_vl"]["full_attention_vision_layers"] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_layer_is_the_last_that_matters(zoo: Any, name: str) -> None:
    """Noise before a layer reaches the features if and only if the projector reads that layer or a later one."""
    model = zoo(name)
    family = resolve(model.model)
    inputs = model.inputs()
    (plain,) = encode(model, inputs)
    for index, layer in enumerate(family.vision_layers):
        handle = layer.register_forward_pre_hook(lambda module, args: (args[0] + torch.rand_like(args[0]), *args[1:]))
        (noisy,) = encode(model, inputs)
        handle.remove()
        same = torch.equal(torch.cat(list(plain.output.pooler_output)), torch.cat(list(noisy.output.pooler_output)))
        assert same == (index > family.feature_layer)


# -- geometry ----------------------------------------------------------------------------------------------------------


class Change:
    """
    What changing some pixels changes: which visual tokens, and which positions of the vision tower.

    The tower's attention is silenced, so that a position depends on its own pixels only and the tokens that change are
    exactly those that show the changed pixels.
    """

    def __init__(self, model: Zoo, modality: str, before: dict[str, Any], after: dict[str, Any]) -> None:
        self.family = resolve(model.model)
        states: list[torch.Tensor] = []
        last = self.family.vision_layers[self.family.feature_layer]
        handles = [last.register_forward_hook(lambda module, args, out: states.append(out))]
        for layer in self.family.vision_layers:
            handles.append(self.family.attention_of(layer).register_forward_hook(_silence))
        first, second = encode(model, before), encode(model, after)
        for handle in handles:
            handle.remove()
        build_layout(before["input_ids"], before["attention_mask"], self.family, first)
        which = [call.modality for call in first].index(modality)
        self.vision = first[which]
        outputs = (self.vision.output.pooler_output, second[which].output.pooler_output)
        entries = [(b - a).norm(dim=-1) for a, b in zip(*outputs, strict=True)]
        # Newlines that are appended after the encoder (older transformers) change as little as those inside.
        counts = self.family.token_counts(self.vision)
        missing = [count - len(entry) for count, entry in zip(counts, entries, strict=True)]
        entries = [torch.nn.functional.pad(entry, (0, num)) for num, entry in zip(missing, entries, strict=True)]
        self.tokens, start = [], 0
        assert self.vision.entries_per_image is not None
        for size in self.vision.entries_per_image:
            self.tokens.append(torch.cat(entries[start : start + size]))
            start += size
        patches = (states[len(first) + which] - states[which]).norm(dim=-1)
        self.patches = patches[..., 1:] if self.family.has_cls else patches

    def places(self, image: int) -> dict[tuple[int, int, int], float]:
        """Crop, row and column of the tokens of an image that changed, and by how much."""
        tokens, change = self.family.image_tokens(self.vision, image, len(self.tokens[image])), self.tokens[image]
        # The same from the tower's own positions, an independent way to the same tokens.
        # Towers that see packed patches have no crops: theirs is one.
        patches = self.patches if self.patches.ndim == 2 else self.patches[None]
        scores = self.family.tower_to_tokens([patches[..., None]], self.vision)[image][:, 0]
        assert torch.equal(scores.isnan(), tokens.crop < 0)
        assert torch.equal(scores.nan_to_num() > 0, change > 0)
        assert change[tokens.crop < 0].sum() == 0
        cells = zip(tokens.crop.tolist(), tokens.row.tolist(), tokens.col.tolist(), strict=True)
        return {cell: amount for cell, amount in zip(cells, change.tolist(), strict=True) if amount > 0}

    def only(self, image: int) -> tuple[int, int, int]:
        """The one place that changed, in an image where there is one and in a call where no other image changed."""
        assert all(tokens.max() == 0 for other, tokens in enumerate(self.tokens) if other != image)
        (place,) = self.places(image)
        return place


def _silence(module: nn.Module, args: Any, out: Any) -> Any:
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)


def with_noise(pixels: torch.Tensor, seed: int = 5) -> torch.Tensor:
    """Pixels far from those drawn for the inputs."""
    return 3 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("row", range(4))
def test_llava_places(zoo: Any, row: int) -> None:
    model = zoo("llava")
    before = model.inputs(2, [1, 2])
    for col in range(4):
        after = dict(before, pixel_values=before["pixel_values"].clone())
        block = after["pixel_values"][2, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        block.copy_(with_noise(block))
        assert Change(model, "image", before, after).only(2) == (0, row, col)


@pytest.mark.parametrize("tile", range(3))
def test_internvl_places(zoo: Any, tile: int) -> None:
    model = zoo("internvl")
    before = model.inputs(2, [1, 1])  # three tiles, one tile
    for row in range(2):
        for col in range(2):
            after = dict(before, pixel_values=before["pixel_values"].clone())
            block = after["pixel_values"][tile, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
            block.copy_(with_noise(block))
            change = Change(model, "image", before, after)
            assert change.only(0) == (tile, row, col)
    assert change.family.crops_of(change.vision) == [3, 1]


def qwen_inputs(model: Zoo, arrays: list[Any]) -> dict[str, Any]:
    """Inputs from real pixels, through the family's own image processor (24 x 40 pixels are 3 x 5 tokens)."""
    size = {"shortest_edge": 64, "longest_edge": 4096}
    processor = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    pixels = processor(arrays, return_tensors="pt")
    inputs = model.inputs(1, len(arrays))
    assert torch.equal(pixels["image_grid_thw"], inputs["image_grid_thw"])
    return {**inputs, "pixel_values": pixels["pixel_values"]}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_places_in_real_pixels(zoo: Any, name: str) -> None:
    model = zoo(name)
    rng = torch.Generator().manual_seed(3)
    # Their sizes in pixels are those of the zoo's first two grids.
    arrays = [
        torch.randint(90, 110, size, generator=rng, dtype=torch.uint8).numpy() for size in ((24, 40, 3), (16, 24, 3))
    ]
    before = qwen_inputs(model, arrays)
    for image, (rows, cols) in enumerate(((3, 5), (2, 3))):
        for row in range(rows):
            for col in range(cols):
                marked = [array.copy() for array in arrays]
                block = marked[image][8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
                block[:] = torch.randint(0, 255, block.shape, generator=rng, dtype=torch.uint8).numpy()
                assert Change(model, "image", before, qwen_inputs(model, marked)).only(image) == (0, row, col)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_video_places(zoo: Any, name: str) -> None:
    """Pixel rows of a video are ordered frame by frame like those of images, which the test above checks in pixels."""
    model = zoo(name)
    before = model.inputs(2, [1, 0], videos=[1, 1])
    for frame in range(3):
        for token in (0, 1, 4, 5):
            after = dict(before, pixel_values_videos=before["pixel_values_videos"].clone())
            # The second video starts at patch 72; a frame has 24 patches, a token 4.
            block = after["pixel_values_videos"][72 + 24 * frame + 4 * token :][:4]
            block.copy_(with_noise(block))
            change = Change(model, "video", before, after)
            assert change.only(1) == (frame, token // 3, token % 3)


def anyres_inputs(model: Zoo, arrays: list[Any]) -> dict[str, Any]:
    """Inputs from real pixels through the family's own processor; sizes are the zoo's, so its prompts fit."""
    pinpoints = model.model.config.image_grid_pinpoints
    if model.name == "llava_next":
        processor: Any = transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
        )
    else:
        processor = transformers.LlavaOnevisionImageProcessorPil(
            size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
        )
    # One image per row: alone, so that OneVision tiles it too.
    pixels = processor([[array] for array in arrays], return_tensors="pt")
    inputs = model.inputs(len(arrays), 1)
    assert pixels["image_sizes"].tolist() == inputs["image_sizes"].tolist()
    return {**inputs, "pixel_values": pixels["pixel_values"]}


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_anyres_places_in_real_pixels(zoo: Any, name: str) -> None:
    """
    Three shapes: 32 x 24 is padded to 2 x 2 tiles by 4 columns left and right (a cell each), 12 x 32 to 1 x 2 tiles by
    2 rows above and below, 32 x 16 fills 2 x 1 tiles exactly. OneVision shrinks the first mosaic, 8 x 6 cells to 6 x 4.
    """
    model = zoo(name)
    rng = torch.Generator().manual_seed(4)
    sizes = ((32, 24), (12, 32), (32, 16))
    offsets = ((0, 4), (2, 0), (0, 0))
    mosaics = ((2, 2), (1, 2), (2, 1))
    arrays = [torch.randint(90, 110, (*size, 3), generator=rng, dtype=torch.uint8).numpy() for size in sizes]
    before = anyres_inputs(model, arrays)
    for image, ((height, width), (top, left), (_, tile_columns)) in enumerate(
        zip(sizes, offsets, mosaics, strict=True)
    ):
        shrunk = name == "llava_onevision" and image == 0
        for y in range(-top % 4, height - 3, 4):
            for x in range(-left % 4, width - 3, 4):
                marked = [array.copy() for array in arrays]
                block = marked[image][y : y + 4, x : x + 4]
                block[:] = torch.randint(0, 255, block.shape, generator=rng, dtype=torch.uint8).numpy()
                change = Change(model, "image", before, anyres_inputs(model, marked))
                cells = {
                    ((crop - 1) // tile_columns * 4 + row, (crop - 1) % tile_columns * 4 + col)
                    for crop, row, col in change.places(image)
                    if crop > 0
                }
                cell_row, cell_col = (y + top) // 4, (x + left) // 4
                if shrunk:
                    # An interpolated token is sampled between cells: its place is one of those it mixes.
                    assert cells
                    assert all(abs(row - cell_row) <= 1 and abs(col - cell_col) <= 1 for row, col in cells)
                else:
                    assert cells == {(cell_row, cell_col)}
        for row in range(4):
            for col in range(4):
                # The base shows the whole image on 4 x 4 cells, whatever its shape; resizing smears over cell borders.
                marked = [array.copy() for array in arrays]
                rows, cols = height // 4, width // 4
                block = marked[image][rows * row : rows * (row + 1), cols * col : cols * (col + 1)]
                block[:] = torch.randint(0, 255, block.shape, generator=rng, dtype=torch.uint8).numpy()
                places = Change(model, "image", before, anyres_inputs(model, marked)).places(image)
                base = {place: amount for place, amount in places.items() if place[0] == 0}
                assert max(base, key=base.__getitem__) == (0, row, col)


@pytest.mark.parametrize(("name", "count"), [("llava_next", 4), ("llava_onevision", 4), ("llava_onevision", 2)])
def test_anyres_tokens_come_from_the_cell_that_weighs_most(zoo: Any, name: str, count: int) -> None:
    """Packing one-hot features shows from which cells a token is mixed; its place must be the heaviest of them."""
    model = zoo(name)
    family = resolve(model.model)
    inputs = model.inputs(1 if count == 2 else count, count if count == 2 else 1)
    (vision,) = encode(model, inputs)
    lengths = vision.lengths()
    for image, crops in enumerate(family.crops_of(vision)):
        tokens = family.image_tokens(vision, image, lengths[image])
        assert tokens.grids == ((4, 4),) * crops
        one_hot = torch.eye(crops * 16, dtype=torch.float64).view(crops, 16, -1)
        newline = torch.full((crops * 16,), torch.nan, dtype=torch.float64)
        mixed = family._pack([one_hot], vision, [image], newline)[0]
        assert torch.equal(mixed.isnan().any(dim=1), tokens.crop < 0)
        real = tokens.crop >= 0
        chosen = tokens.crop[real] * 16 + tokens.row[real] * 4 + tokens.col[real]
        weight = mixed[real].gather(1, chosen[:, None]).squeeze(1)
        # Ties are common (a token half-way between cells); equal up to the rounding of the interpolation.
        torch.testing.assert_close(weight, mixed[real].amax(dim=1), atol=1e-6, rtol=0)


def test_onevision_video_places(zoo: Any) -> None:
    model = zoo("llava_onevision")
    before = model.inputs(1, 0, videos=2)
    for frame in range(3):
        for row in range(2):
            for col in range(2):
                after = dict(before, pixel_values_videos=before["pixel_values_videos"].clone())
                block = after["pixel_values_videos"][1, frame, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
                block.copy_(with_noise(block))
                change = Change(model, "video", before, after)
                assert change.only(1) == (frame, row, col)
                assert change.family.crops_of(change.vision) == [3, 3]


def test_cls_as_a_visual_token(zoo: Any) -> None:
    """LLaVA models with the "full" strategy keep CLS as first token of the image; it shows no place."""
    family = resolve(zoo("llava").model)
    output = transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=[torch.zeros(17, 64)])
    vision = VisionInputs("image", {"vision_feature_select_strategy": "full"}, output)
    tokens = family.image_tokens(vision, 0, 17)
    assert tokens.crop.tolist() == [-1] + [0] * 16
    (features,) = family.tower_to_tokens([torch.arange(32.0).view(1, 16, 2)], vision)
    assert features[0].isnan().all()
    assert features[1:].flatten().tolist() == list(range(32))


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_token_counts_are_refused(zoo: Any, name: str) -> None:
    model = zoo(name)
    (vision,) = encode(model, model.inputs())
    with pytest.raises(PromptError, match="image 0 has 1003 tokens in the prompt"):
        resolve(model.model).image_tokens(vision, 0, 1003)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_features_without_their_arguments_have_no_place(zoo: Any, name: str) -> None:
    """A user may encode images earlier and hand the features over; then nobody knows the sizes."""
    model = zoo(name)
    inputs = model.inputs()
    (vision,) = encode(model, inputs)
    bare = VisionInputs("image", {}, vision.output)
    layout = build_layout(inputs["input_ids"], inputs["attention_mask"], resolve(model.model), [bare])
    assert (layout.spans[0].tokens.row == -1).all()
    assert layout.spans[0].tokens.grids == ()


# -- other models ------------------------------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=_TEXT,
        vision_config={**_VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_generic_resolution_of_a_family_without_a_file() -> None:
    """Gemma 3 pools 4 x 4 patches to 2 x 2 tokens; nothing here knows it."""
    model = gemma3()
    family = resolve(model)
    assert type(family) is Family
    assert family.layers is model.model.language_model.layers
    assert family.vision is model.model.vision_tower
    assert len(family.vision_layers) == 2
    assert family.projector is model.model.multi_modal_projector
    output = model.model.get_image_features(torch.randn(2, 3, 16, 16), return_dict=True)
    vision = VisionInputs("image", {}, output)
    ids = torch.tensor([[1, *[IMAGE] * 4, 9], [1, *[IMAGE] * 4, 9]])
    layout = build_layout(ids, None, family, [vision])
    assert [span.source for span in layout.spans] == [0, 1]
    assert layout.spans[1].tokens.grids == ((2, 2),)
    assert layout.spans[1].tokens.row.tolist() == [0, 0, 1, 1]
    with pytest.raises(ModelError, match="how model type 'gemma3' turns 16 patches into 4 visual tokens is not known"):
        family.tower_to_tokens([torch.zeros(2, 16, 1)], vision)


def test_token_counts_that_only_look_square_have_no_place() -> None:
    family = resolve(gemma3())
    output = transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=torch.zeros(1, 9, 32))
    # 3 x 3 does not divide the tower's 4 x 4 patches.
    assert family.image_tokens(VisionInputs("image", {}, output), 0, 9).grids == ()


def refusal(model: Any) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_models_without_visual_tokens_are_refused() -> None:
    assert "expected a transformers model, got Linear" in refusal(nn.Linear(2, 2))
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT))
    assert "LlamaForCausalLM (model type 'llama') cannot be used: it takes no images; supported" in refusal(text)
    encoder_decoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    assert "encoder-decoder model" in refusal(encoder_decoder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer = transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config={**small, "image_size": 16, "patch_size": 8},
            qformer_config={**small, "vocab_size": VOCAB},
            text_config={"model_type": "opt", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1,
                         "num_attention_heads": 2, "ffn_dim": 16, "word_embed_proj_dim": 16},
        )
    )  # fmt: skip
    assert "Q-Former" in refusal(qformer)
    mllama = transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(
            vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
                           "attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 32,
                           "intermediate_layers_indices": [0], "max_num_tiles": 1,
                           "supported_aspect_ratios": [[1, 1]]},
            text_config={**_TEXT, "cross_attention_layers": [1]},
        )
    )  # fmt: skip
    assert "CrossAttention" in refusal(mllama)


def test_models_whose_attention_cannot_be_reached_are_refused(zoo: Any) -> None:
    model = gemma3()

    class PlainAttention(nn.Module):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            return hidden_states, None

    model.model.language_model.layers[1].self_attn = PlainAttention()
    assert "PlainAttention of Gemma3ForConditionalGeneration does not use transformers' AttentionInterface" in refusal(
        model
    )
    model.model.language_model.layers[1].self_attn = nn.Identity()
    assert "decoder layer 1: layer Gemma3DecoderLayer holds no attention module" in refusal(model)

    class Unsupported(transformers.LlavaForConditionalGeneration):
        _supports_attention_backend = False

    class FromItsRepository(transformers.LlavaForConditionalGeneration):
        _auto_class = "AutoModelForImageTextToText"

    config = zoo("llava").model.config
    assert "its attention does not go through transformers' AttentionInterface" in refusal(Unsupported(config))
    assert "it runs code from its repository" in refusal(FromItsRepository(config))


def test_the_bare_module_without_a_head_is_refused(zoo: Any) -> None:
    assert "it has no language head" in refusal(zoo("llava").model.model)


def test_missing_parts_are_named() -> None:
    model = gemma3()
    del model.model.vision_tower
    message = refusal(model)
    assert "Gemma3ForConditionalGeneration has no vision tower: Gemma3Model has no vision_tower or visual or" in message
    assert "supported model types are internvl, llava" in message


# -- plug-ins ----------------------------------------------------------------------------------------------------------


class Gemma3Family(Family):
    model_types = ("gemma3",)


class Point:
    """An entry point as importlib.metadata hands it out."""

    def __init__(self, name: str, loads: Any) -> None:
        self.name, self.value, self._loads = name, f"{name}:family", loads

    def load(self) -> Any:
        if isinstance(self._loads, Exception):
            raise self._loads
        return self._loads


def test_plug_ins_are_found_and_failing_ones_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Point("broken", ImportError("no module named 'torch_scatter'"))
    monkeypatch.setattr(families, "entry_points", lambda group: [broken, Point("good", Gemma3Family)])
    assert type(resolve(gemma3())) is Gemma3Family
    assert set(supported()) == {*FAMILIES, "gemma3"}
    monkeypatch.setattr(families, "entry_points", lambda group: [broken, Point("wrong", dict)])
    assert set(supported()) == set(FAMILIES)
    model = gemma3()
    del model.model.vision_tower
    message = refusal(model)
    assert "plug-in 'broken' failed to load: ImportError: no module named 'torch_scatter'" in message
    assert "plug-in 'wrong' failed to load: TypeError: wrong:family is not a Family class with model_types" in message
