"""The training loop on a handful of steps: it learns, resumes exactly, and exports a loadable folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lmmhooks_eval.tiny.export import export_model
from lmmhooks_eval.tiny.models import MODELS
from lmmhooks_eval.tiny.train import Settings, Trainer, schedule

CPU = torch.device("cpu")


def settings(name: str, seed: int = 0, joint_steps: int = 3) -> Settings:
    return Settings(
        name, seed, vision_steps=2, joint_steps=joint_steps, vision_batch=2, joint_batch=2, precision="fp32"
    )


@pytest.mark.parametrize("name", MODELS)
def test_run_trains_every_part_and_exports(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmmhooks_eval.tiny.train.MONITOR_IMAGES", 2)
    trainer = Trainer(settings(name), tmp_path, CPU)
    before = {key: value.clone() for key, value in trainer.adapter.model.state_dict().items()}
    trainer.run()
    after = trainer.adapter.model.state_dict()
    unchanged = {key for key, value in before.items() if torch.equal(value, after[key])}
    # CLIP's final norm feeds only the pooled output, which LLaVA does not use.
    assert all("post_layernorm" in key or "position_ids" in key for key in unchanged)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"vision", "joint"}
    assert "true_negatives_in_theme" in lines[-1]["monitor"]

    export_model(name, trainer.adapter.model, trainer.adapter.tokenizer, tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert loaded.config._attn_implementation == "sdpa"
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, after[key].bfloat16().float(), atol=0, rtol=0)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmmhooks_eval.tiny.train.MONITOR_IMAGES", 2)
    straight = Trainer(settings("tiny-llava"), tmp_path / "straight", CPU)
    straight.run()

    class Interrupted(Exception):
        pass

    broken = Trainer(settings("tiny-llava"), tmp_path / "broken", CPU)
    steps = 0
    original = broken._train_step

    def stop_in_the_joint_stage(*arguments: object) -> dict[str, float]:
        nonlocal steps
        if steps == 4:
            raise Interrupted
        steps += 1
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(broken, "_train_step", stop_in_the_joint_stage)
    with pytest.raises(Interrupted):
        broken.run(checkpoint_seconds=0.0)
    resumed = Trainer(settings("tiny-llava"), tmp_path / "broken", CPU)
    resumed.load_checkpoint()
    assert (resumed.stage, resumed.step) == ("joint", 2)
    resumed.run()
    for key, value in straight.adapter.model.state_dict().items():
        assert torch.equal(value, resumed.adapter.model.state_dict()[key]), key


def test_lengthening_a_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmmhooks_eval.tiny.train.MONITOR_IMAGES", 2)
    Trainer(settings("tiny-llava", joint_steps=1), tmp_path, CPU).run()
    longer = Trainer(settings("tiny-llava", joint_steps=2), tmp_path, CPU)
    longer.load_checkpoint()
    longer.run()
    (part,) = longer.record()["earlier"]
    assert (part["stage"], part["until_step"], part["settings"]["joint_steps"]) == ("joint", 1, 1)


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume"):
        Trainer(settings("tiny-llava"), tmp_path, CPU).load_checkpoint()
    Trainer(settings("tiny-llava"), tmp_path, CPU).save_checkpoint()
    with pytest.raises(ValueError, match="has seed 0, asked for 1"):
        Trainer(settings("tiny-llava", seed=1), tmp_path, CPU).load_checkpoint()


def test_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [schedule(step, 1000) for step in range(1000)]
    assert rates[0] < 0.03
    assert max(rates) > 0.98
    assert rates[-1] < 1e-4
