"""Loading checkpoints from folders without torchvision, telling them apart, and the one-line errors of a wrong name."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lmmhooks.loading
from lmmhooks.errors import ModelError, PromptError
from lmmhooks.loading import identity, load
from tests.zoo import BOS, END, EOS, IMAGE, PAD, START, VIDEO, build, zoo

__all__ = ["zoo"]

_ANYRES: dict[str, Any] = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
IMAGE_PROCESSORS = {
    "llava": lambda: transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16),
    "llava_next": lambda: transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, **_ANYRES
    ),
    "llava_onevision": lambda: transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, **_ANYRES
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLImageProcessorPil(patch_size=4, size=_QWEN_SIZE),
    "qwen2_5_vl": lambda: transformers.Qwen2VLImageProcessorPil(patch_size=4, size=_QWEN_SIZE),
    "qwen3_vl": lambda: transformers.Qwen2VLImageProcessorPil(patch_size=4, size=_QWEN_SIZE),
    "internvl": lambda: transformers.GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}),
}
_QWEN_SIZE = {"shortest_edge": 64, "longest_edge": 4096}
#: What the stock processors of each family call the image in a prompt.
IMAGE_TOKEN = {"internvl": "<IMG_CONTEXT>"} | dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|image_pad|>")
SETTINGS = {
    "llava": {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "llava_next": {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "llava_onevision": {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
    },
    "internvl": {"image_seq_length": 4},
}


def save(name: str, model: Any, folder: Path) -> Path:
    """A checkpoint folder like those on the hub: weights, tokenizer, image processor, processor settings."""
    image = IMAGE_TOKEN.get(name, "<image>")
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, image: IMAGE, "<|video_pad|>": VIDEO, "<img>": START, "</img>": END}
    words |= {word: 8 + i for i, word in enumerate(("what", "is", "this", "?"))} | {"<unk>": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    extra = {"image_token": image, "video_token": "<|video_pad|>"}
    if name == "internvl":
        extra = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": image} | extra
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        extra_special_tokens=extra,
    ).save_pretrained(folder)
    IMAGE_PROCESSORS[name]().save_pretrained(folder)
    if name in SETTINGS:
        (folder / "processor_config.json").write_text(json.dumps(SETTINGS[name]))
    model.save_pretrained(folder)
    return folder


# Older transformers hand tensors to numpy's cumsum (InternVL), which newer numpy remarks upon.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_a_folder_loads_and_answers(zoo: Any, name: str, tmp_path: Path) -> None:
    original = zoo(name).model
    model, processor = load(save(name, original, tmp_path), device="cpu")
    assert type(model) is type(original)
    assert not model.training
    for key, value in original.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert processor.tokenizer.padding_side == "left"
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    images = [[Image.fromarray(pixels)], [Image.fromarray(pixels[:16])]]
    image = IMAGE_TOKEN.get(name, "<image>")
    texts = [f" {image} what is this ?", f" {image} what ?"]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    # Padding is on the left: every row ends in its prompt.
    assert (inputs["attention_mask"][:, -1] == 1).all()
    with torch.no_grad():
        answers = model.generate(**inputs, max_new_tokens=2)
    assert answers.shape[0] == 2


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there, so videos work")
def test_videos_without_torchvision_are_refused(zoo: Any, tmp_path: Path) -> None:
    _, processor = load(save("qwen2_5_vl", zoo("qwen2_5_vl").model, tmp_path))
    assert isinstance(processor, transformers.Qwen2_5_VLProcessor)
    with pytest.raises(PromptError, match="videos need torchvision"):
        processor(text="what", videos=[np.zeros((2, 8, 8, 3))])
    with pytest.raises(ModelError, match="without its video processor"):
        processor.save_pretrained(tmp_path / "again")


def test_identity_tells_checkpoints_apart(zoo: Any, tmp_path: Path) -> None:
    model = zoo("llava").model
    loaded, _ = load(save("llava", model, tmp_path / "mine"))
    first, again = identity(model), identity(loaded)
    assert again["name"] == "mine"
    assert {**again, "name": ""} == {**first, "name": ""}
    other = build("llava", seed=1).model
    assert identity(other)["fingerprint"] != first["fingerprint"]
    half = build("llava", dtype=torch.bfloat16).model
    assert identity(half)["fingerprint"] != first["fingerprint"]
    assert json.loads(json.dumps(first)) == first
    assert first["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-lava", r"no model 'tiny-lava': .*; did you mean 'tiny-llava'\?"),
        ("./nowhere", r"no model './nowhere': it is no folder, no hub id"),
        ("owner/such-model-is-nowhere", "cannot load owner/such-model-is-nowhere from the hub: .*connection"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_broken_folders(zoo: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model: it has no config\.json"):
        load(tmp_path)
    folder = save("llava", zoo("llava").model, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    check_one_line(folder, "cannot load .*model: .*; check that the folder is complete")
    (folder / "config.json").write_text("{not json")
    check_one_line(folder, "cannot load .*model: .*; check that the folder is complete")


def test_models_that_take_no_images(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    check_one_line(tmp_path, "model type 'llama' takes no images")


def test_remote_code_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "homemade", "auto_map": {"AutoConfig": "homemade.HomemadeConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "homemade.py").write_text("raise AssertionError('this code must never run')\n")
    check_one_line(tmp_path, "it runs code from its repository")


def check_one_line(folder: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_settings_reach_transformers(zoo: Any, tmp_path: Path) -> None:
    folder = save("llava", zoo("llava").model, tmp_path)
    model, _ = load(folder, dtype="bfloat16", attn_implementation="eager", device_map="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=r"device .* and device_map .* were both given"):
        load(folder, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match=r"unknown quantization 'bnb-4bits'; .* did you mean 'bnb-4bit'\?"):
        load(folder, quantization="bnb-4bits")


def test_bundled_models_without_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lmmhooks.loading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="part of lmmhooks_eval, which is not installed"):
        load("tiny-llava")
    spec = ModuleSpec("lmmhooks_eval", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(lmmhooks.loading, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="weights of tiny-llava are missing"):
        load("tiny-llava")


def test_saved_configurations_are_of_this_family(zoo: Any, tmp_path: Path) -> None:
    """Guards the fixture: what `save` writes is the family it says."""
    assert AutoConfig.from_pretrained(save("llava", zoo("llava").model, tmp_path)).model_type == "llava"
