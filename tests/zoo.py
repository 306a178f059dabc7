"""
Tiny models of every supported family, built in memory with random weights, and inputs that fit them.

The architectures are the real ones of transformers; only the sizes are small. Weights are drawn here instead of by
transformers' own initialisation, so that attention is far from uniform (otherwise a method that works and one that does
nothing look the same) and a seed gives the same model on every version.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationMixin,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from lmmhooks.compat import pixels_argument
from lmmhooks.family import VisionInputs

PAD, BOS, EOS, IMAGE, VIDEO, START, END = range(7)
FIRST_TEXT_ID = 8
VOCAB = 128
#: Text of the prompt before the first image, and separators between images.
PREFIX = 3

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
#: Any-resolution tiles of 16 x 16 pixels, up to 2 x 2 of them.
PINPOINTS = [[16, 32], [32, 16], [32, 32]]

#: Inputs with one entry per row; the others have one per image, tile or patch.
ROW_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass
class Media:
    """Encoder arguments of a batch, and the prompt ids that stand for each image or video."""

    kwargs: dict[str, Tensor] = field(default_factory=dict)
    runs: list[list[int]] = field(default_factory=list)


class Recipe:
    """How one family is configured, and which inputs its encoder takes."""

    patch: ClassVar[int] = 4
    has_video: ClassVar[bool] = False

    def config(self, text: dict[str, Any]) -> PreTrainedConfig:
        raise NotImplementedError

    def images(self, model: Any, counts: Sequence[int], generator: torch.Generator) -> Media:
        """Encoder inputs for ``counts[b]`` images in row b."""
        raise NotImplementedError

    def videos(self, model: Any, count: int, generator: torch.Generator) -> Media:
        raise NotImplementedError(f"{type(self).__name__} has no video inputs")


class Llava(Recipe):
    def config(self, text: dict[str, Any]) -> PreTrainedConfig:
        return LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=16, patch_size=4, **_TOWER),
            text_config=LlamaConfig(**text),
            image_token_index=IMAGE,
            vision_feature_layer=-2,
        )

    def images(self, model: Any, counts: Sequence[int], generator: torch.Generator) -> Media:
        pixels = torch.randn(sum(counts), 3, 16, 16, generator=generator)
        return Media({"pixel_values": pixels}, [[IMAGE] * 16] * sum(counts))


class AnyRes(Recipe):
    """Sizes (height, width) chosen so that tiles differ in number and unpadding removes rows, columns or nothing."""

    sizes: ClassVar[tuple[tuple[int, int], ...]] = ((32, 24), (12, 32), (32, 16), (20, 30))

    def image_kwargs(self, counts: Sequence[int]) -> dict[str, Tensor]:
        return {}

    def crops(self, model: Any, size: tuple[int, int], alone: bool) -> int:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return image_size_to_num_patches(size, model.config.image_grid_pinpoints, 16)

    def images(self, model: Any, counts: Sequence[int], generator: torch.Generator) -> Media:
        alone = [count == 1 for count in counts for _ in range(count)]
        sizes = [self.sizes[i % len(self.sizes)] for i in range(sum(counts))]
        crops = [self.crops(model, size, single) for size, single in zip(sizes, alone, strict=True)]
        pixels = torch.zeros(len(sizes), max(crops), 3, 16, 16)
        for image, num in enumerate(crops):
            pixels[image, :num] = torch.randn(num, 3, 16, 16, generator=generator)
        kwargs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)} | self.image_kwargs(counts)
        with torch.no_grad():
            features = model.model.get_image_features(**kwargs, return_dict=True).pooler_output
        return Media(kwargs, [[IMAGE] * len(entry) for entry in features])


class LlavaNext(AnyRes):
    def config(self, text: dict[str, Any]) -> PreTrainedConfig:
        return LlavaNextConfig(
            vision_config=CLIPVisionConfig(image_size=16, patch_size=4, **_TOWER),
            text_config=LlamaConfig(**text),
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            image_grid_pinpoints=PINPOINTS,
        )


class LlavaOnevision(AnyRes):
    """One image in a row is tiled, several are not; ``anyres_max_2`` makes a 2 x 2 mosaic too big, and shrinks it."""

    has_video: ClassVar[bool] = True

    def config(self, text: dict[str, Any]) -> PreTrainedConfig:
        return LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(image_size=16, patch_size=4, vision_use_head=False, **_TOWER),
            text_config=Qwen2Config(**text),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio="anyres_max_2",
        )

    def image_kwargs(self, counts: Sequence[int]) -> dict[str, Tensor]:
        return {"batch_num_images": torch.tensor([count for count in counts if count])}

    def crops(self, model: Any, size: tuple[int, int], alone: bool) -> int:
        return super().crops(model, size, alone) if alone else 1

    def videos(self, model: Any, count: int, generator: torch.Generator) -> Media:
        frames = 3
        pixels = torch.randn(count, frames, 3, 16, 16, generator=generator)
        # 4 x 4 patches pooled to 2 x 2 per frame, one newline feature at the end of the video.
        return Media({"pixel_values_videos": pixels}, [[VIDEO] * (frames * 4 + 1)] * count)


class Qwen2VL(Recipe):
    """Grids (frames, rows, columns) in patches; 6 x 10 patches are 3 x 5 tokens, which no 2 x 2 window divides."""

    has_video: ClassVar[bool] = True
    grids: ClassVar[tuple[tuple[int, int, int], ...]] = ((1, 6, 10), (1, 4, 6), (1, 8, 8))
    video_grid: ClassVar[tuple[int, int, int]] = (3, 4, 6)
    config_class: ClassVar[type] = Qwen2VLConfig
    mrope: ClassVar[dict[str, Any]] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

    def vision(self) -> dict[str, Any]:
        return {
            "depth": 4,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": self.patch,
        }

    def config(self, text: dict[str, Any]) -> PreTrainedConfig:
        text = {"rope_parameters": dict(self.mrope)} | text
        return self.config_class(
            vision_config=self.vision(),
            text_config=text,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )

    def _media(self, key: str, token: int, grids: list[tuple[int, int, int]], generator: torch.Generator) -> Media:
        patches = sum(math.prod(grid) for grid in grids)
        pixels = torch.randn(patches, 3 * 2 * self.patch**2, generator=generator)
        name = "pixel_values" if key == "image" else "pixel_values_videos"
        runs = [self.run(token, grid) for grid in grids]
        return Media({name: pixels, f"{key}_grid_thw": torch.tensor(grids)}, runs)

    def run(self, token: int, grid: tuple[int, int, int]) -> list[int]:
        return [START, *[token] * (math.prod(grid) // 4), END]

    def images(self, model: Any, counts: Sequence[int], generator: torch.Generator) -> Media:
        grids = [self.grids[i % len(self.grids)] for i in range(sum(counts))]
        return self._media("image", IMAGE, grids, generator)

    def videos(self, model: Any, count: int, generator: torch.Generator) -> Media:
        return self._media("video", VIDEO, [self.video_grid] * count, generator)


class Qwen2_5_VL(Qwen2VL):
    config_class: ClassVar[type] = Qwen2_5_VLConfig

    def vision(self) -> dict[str, Any]:
        return {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": self.patch,
            "out_hidden_size": 64,
            # 16 pixels are 2 x 2 merged tokens.
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
        }


class Qwen3VL(Qwen2VL):
    config_class: ClassVar[type] = Qwen3VLConfig
    mrope: ClassVar[dict[str, Any]] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }

    def vision(self) -> dict[str, Any]:
        return {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": self.patch,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
        }

    def config(self, text: dict[str, Any]) -> PreTrainedConfig:
        return super().config({"head_dim": 16} | text)

    def run(self, token: int, grid: tuple[int, int, int]) -> list[int]:
        frames, rows, cols = grid
        if token == IMAGE:
            return super().run(token, grid)
        # Every frame of a video stands alone, behind its time stamp.
        stamps = [FIRST_TEXT_ID + frame for frame in range(frames)]
        return [i for stamp in stamps for i in (stamp, *super(Qwen3VL, self).run(token, (1, rows, cols)))]


class InternVL(Recipe):
    """Tiles of 4 x 4 patches, shuffled to 2 x 2 tokens; images of one to three tiles."""

    def config(self, text: dict[str, Any]) -> PreTrainedConfig:
        return InternVLConfig(
            vision_config=InternVLVisionConfig(image_size=16, patch_size=4, **_TOWER),
            text_config=Qwen2Config(**text),
            image_token_id=IMAGE,
            image_seq_length=4,
            tie_word_embeddings=False,
        )

    def images(self, model: Any, counts: Sequence[int], generator: torch.Generator) -> Media:
        tiles = [(3, 1, 2)[i % 3] for i in range(sum(counts))]
        pixels = torch.randn(sum(tiles), 3, 16, 16, generator=generator)
        return Media({"pixel_values": pixels}, [[START, *[IMAGE] * (4 * num), END] for num in tiles])


_RECIPES: dict[str, Recipe] = {
    "llava": Llava(),
    "llava_next": LlavaNext(),
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen2_5_VL(),
    "qwen3_vl": Qwen3VL(),
    "internvl": InternVL(),
    "llava_onevision": LlavaOnevision(),
}
FAMILIES: tuple[str, ...] = tuple(_RECIPES)
VIDEO_FAMILIES: tuple[str, ...] = tuple(name for name, recipe in _RECIPES.items() if recipe.has_video)


@dataclass
class Zoo:
    """
    A tiny model and the inputs that fit it.

    Attributes
    ----------
    name
        Family, one of `FAMILIES`.
    model
        Random weights, evaluation mode.
    """

    name: str
    model: PreTrainedModel
    recipe: Recipe

    def inputs(
        self,
        batch: int = 1,
        images: int | Sequence[int] = 1,
        *,
        videos: int | Sequence[int] = 0,
        text: int | Sequence[int] | None = None,
        padding: str = "left",
        adjacent: bool = False,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """
        Inputs for ``model(**inputs)`` and ``model.generate(**inputs)``.

        Parameters
        ----------
        batch
            Rows.
        images, videos
            Per row, or one number for all rows; videos come after the images.
        text
            Instruction tokens per row; the default gives row b ``5 + 3 b``, so that padding is real.
        padding
            ``"left"`` or ``"right"``.
        adjacent
            No text between images.
        seed
            Of pixels and text.
        """
        generator = torch.Generator().manual_seed(seed)
        num_images, num_videos = _per_row(images, batch), _per_row(videos, batch)
        num_text = _per_row([5 + 3 * row for row in range(batch)] if text is None else text, batch)
        shown = self.recipe.images(self.model, num_images, generator) if sum(num_images) else Media()
        filmed = self.recipe.videos(self.model, sum(num_videos), generator) if sum(num_videos) else Media()

        def words(n: int) -> list[int]:
            return torch.randint(FIRST_TEXT_ID, VOCAB, (n,), generator=generator).tolist()

        rows = []
        image_runs, video_runs = iter(shown.runs), iter(filmed.runs)
        for n_images, n_videos, n_text in zip(num_images, num_videos, num_text, strict=True):
            row = [BOS, *words(PREFIX - 1)]
            for ordinal in range(n_images + n_videos):
                if ordinal and not adjacent:
                    row += words(2)
                row += next(image_runs if ordinal < n_images else video_runs)
            rows.append(row + words(n_text))
        length = max(map(len, rows))
        input_ids = torch.full((batch, length), PAD)
        attention_mask = torch.zeros(batch, length, dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if padding == "left" else slice(0, len(row))
            input_ids[index, place] = torch.tensor(row)
            attention_mask[index, place] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | shown.kwargs | filmed.kwargs
        if hasattr(self.model.model, "get_rope_index"):
            inputs["mm_token_type_ids"] = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
        dtype = self.model.dtype
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def row(self, inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """One row of a batch with images as a prompt of its own, without its padding; videos are not cut."""
        valid = inputs["attention_mask"][index].bool()
        out = {key: inputs[key][index : index + 1, valid] for key in ROW_KEYS if key in inputs}
        (call,) = encode(self, inputs)
        ends = torch.tensor(call.lengths()).cumsum(0).tolist()
        tokens = (inputs["input_ids"] == IMAGE).sum(dim=1).cumsum(0).tolist()
        first, last = (ends.index(tokens[i]) + 1 if i >= 0 and tokens[i] else 0 for i in (index - 1, index))
        for key, value in inputs.items():
            if key == "pixel_values" and "image_grid_thw" in inputs:
                patches = [0, *inputs["image_grid_thw"].prod(dim=1).cumsum(0).tolist()]
                out[key] = value[patches[first] : patches[last]]
            elif key == "batch_num_images":
                out[key] = torch.tensor([last - first])
            elif key not in ROW_KEYS:
                out[key] = value[first:last]
        return out


def build(
    family: str,
    *,
    attn: str = "sdpa",
    seed: int = 0,
    layers: int = 4,
    tower_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    **over: Any,
) -> Zoo:
    """
    A tiny model of a family.

    Parameters
    ----------
    family
        One of `FAMILIES`.
    attn
        Attention implementation.
    seed
        Of the weights.
    layers
        Decoder layers.
    tower_layers
        Vision layers, for towers that count them as ``num_hidden_layers``; None: the recipe's own number.
    dtype
        Of the weights.
    over
        Fields of the decoder's configuration to override.
    """
    recipe = _RECIPES[family]
    config = recipe.config(_TEXT | {"num_hidden_layers": layers} | over)
    if tower_layers is not None:
        config.vision_config.num_hidden_layers = tower_layers
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attn)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    # A model that may stop early or warns about a missing pad token makes every generate test say so.
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return Zoo(family, model.to(dtype).eval(), recipe)


def encode(model: Zoo, inputs: dict[str, Tensor]) -> list[VisionInputs]:
    """What the model's encoders make of the images and videos of some inputs, one entry per modality that is there."""
    core = model.model.model
    calls = []
    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels not in inputs:
            continue
        encoder = getattr(core, f"get_{modality}_features")
        parameters = inspect.signature(encoder).parameters
        kwargs = {name: inputs[name] for name in parameters if name in inputs and not name.startswith("pixel_values")}
        kwargs[pixels_argument(modality, parameters)] = inputs[pixels]
        with torch.no_grad():
            calls.append(VisionInputs(modality, kwargs, encoder(**kwargs, return_dict=True)))
    return calls


def images_under_beams(zoo: Zoo, *counts: int) -> list[int]:
    """
    Images per row that beam search can be given, one instead of several where a version of transformers mixes them up.

    Older ``generate`` repeats images one by one, [A, A, B, B] for a row with A and B, unless a family sees to it. Where
    the tiles of a single image fare no better, the test is skipped.
    """
    inherited = type(zoo.model)._expand_inputs_for_generation is GenerationMixin._expand_inputs_for_generation
    if not inherited or hasattr(GenerationMixin, "_expand_multimodal_outputs"):
        return list(counts)
    single = [min(count, 1) for count in counts]
    if len(zoo.inputs(batch=len(single), images=single)["pixel_values"]) > sum(single):
        pytest.skip(f"this version of transformers mixes up the tiles of an image under beams ({zoo.name})")
    return single


@pytest.fixture(scope="session")
def zoo() -> Any:
    """`build`, keeping every model for the session: leave them as they were. Import it where it is used."""
    return cache(build)


@torch.no_grad()
def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of unit gain, attention inputs of a larger one; norms stay as they are."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            continue
        if "lambda" in name:  # layer scale: start well above the 0.1 at which a block hardly counts
            parameter.fill_(0.5)
            continue
        fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
        is_table = "embed" in name and "patch_embed" not in name  # word, position and class embeddings
        std = 0.5 if is_table else (0.1 if name.endswith("bias") else fan_in**-0.5)
        if any(part in name for part in ("q_proj", "k_proj", "qkv")):
            # Scores of standard deviation about 2: peaked, but no head looks at one token only.
            std *= 1.4
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _per_row(value: int | Sequence[int], batch: int) -> list[int]:
    numbers = [value] * batch if isinstance(value, int) else list(value)
    if len(numbers) != batch:
        raise ValueError(f"{len(numbers)} numbers for {batch} rows")
    return numbers
