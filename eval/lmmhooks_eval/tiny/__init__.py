"""Bundled models and benchmark: tiny, really trained multimodal models and the scenes they were trained on."""

from __future__ import annotations

from lmmhooks_eval.tiny.loading import data_dir, load_model, load_processor, model_dir

__all__ = ["data_dir", "load_model", "load_processor", "model_dir"]
