"""A CLIP model on disk, for methods that score images with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

__all__ = ["tiny_clip"]


def tiny_clip(folder: Path) -> dict[str, str]:
    """Write a tiny CLIP with random weights and a tokenizer of single letters; returns the setting that names it."""
    if Version(transformers.__version__) < Version("5.20"):
        pytest.skip("older transformers load image processors from a folder with torchvision alone")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "?</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=20)
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = CLIPTextConfig(**shared, vocab_size=len(words), max_position_embeddings=20, eos_token_id=len(words) - 1)
    vision = CLIPVisionConfig(**shared, image_size=28, patch_size=4)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return {"clip": str(folder)}
