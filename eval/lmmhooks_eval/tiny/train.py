"""Train a bundled model from a seed: ``python -m lmmhooks_eval.tiny.train --model tiny-llava --seed 0 --out DIR``.

Two stages. The vision stage teaches the vision tower what and where things are, with the heads of `heads.py`. The joint
stage trains everything on answers alone (packed, see `packing.py`) and keeps the heads as an auxiliary loss. Vision
matrices are trained by Muon, everything else by AdamW. The weights of the last step are the result: no checkpoint is
ever picked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lmmhooks_eval.tiny import questions as ask
from lmmhooks_eval.tiny.adapters import ADAPTERS, Adapter, VisualStates, make_adapter
from lmmhooks_eval.tiny.batches import STAGES, Batch, PackedRows, PromptPacker, StepData, answer_loss, draw_scenes
from lmmhooks_eval.tiny.export import export_model
from lmmhooks_eval.tiny.heads import SceneTargets, VisionHeads
from lmmhooks_eval.tiny.packing import register_attention
from lmmhooks_eval.tiny.probes import absent_categories
from lmmhooks_eval.tiny.questions import Question, existence
from lmmhooks_eval.tiny.scenes import Scene

AUXILIARY_WEIGHT = 0.3
WARMUP_STEPS = 50
MONITOR_ENTROPY = (77, 77)
MONITOR_IMAGES = 96
LEARNING_RATES = {"vision": {"muon": 3e-3, "adamw": 1.5e-3}, "joint": {"muon": 1e-3, "adamw": 1e-3}}


@dataclass(frozen=True)
class Settings:
    """Everything that determines a training run.

    Parameters
    ----------
    model, seed
        Which bundled model; seed of weights and data.
    vision_steps, joint_steps
        Optimiser steps of the two stages.
    vision_batch, joint_batch
        Images per step.
    precision
        ``"bf16"`` (autocast, float32 master weights) or ``"fp32"``.
    """

    model: str
    seed: int = 0
    vision_steps: int = 1400
    joint_steps: int = 2000
    vision_batch: int = 64
    joint_batch: int = 16
    precision: str = "bf16"

    def steps(self, stage: str) -> int:
        """Steps of a stage."""
        return self.vision_steps if stage == "vision" else self.joint_steps

    def batch(self, stage: str) -> int:
        """Images per step of a stage."""
        return self.vision_batch if stage == "vision" else self.joint_batch


class Trainer:
    """One training run with its checkpoint.

    Parameters
    ----------
    settings
        What to train.
    out
        Folder for checkpoint, log and the finished model.
    device
        Where to train.
    workers
        Processes that render batches ahead; 0 renders in the training process.
    """

    def __init__(self, settings: Settings, out: Path, device: torch.device, workers: int = 0) -> None:
        torch.manual_seed(settings.seed)
        register_attention()
        self.settings, self.out, self.device, self.workers = settings, out, device, workers
        self.adapter = make_adapter(settings.model)
        self.adapter.use_training_attention()
        self.packer = PromptPacker(settings.model, self.adapter.tokenizer)
        self.heads = VisionHeads(self.adapter.patch_width, self.adapter.num_summaries)
        self.adapter.model.to(device)
        self.heads.to(device)
        self.stage, self.step = STAGES[0], 0
        self.earlier: list[dict[str, Any]] = []  # settings that earlier parts of a lengthened run were started with
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.optimisers = make_optimisers(self.adapter, self.heads, self.stage)
        out.mkdir(parents=True, exist_ok=True)

    def run(self, checkpoint_seconds: float = 120.0) -> None:
        """Train to the end, from wherever the run stands."""
        while True:
            self._run_stage(checkpoint_seconds)
            if self.stage == STAGES[-1]:
                break
            self.stage, self.step = STAGES[STAGES.index(self.stage) + 1], 0
            self.optimisers = make_optimisers(self.adapter, self.heads, self.stage)
            self.save_checkpoint()
        self.save_checkpoint()

    def _run_stage(self, checkpoint_seconds: float) -> None:
        settings, stage = self.settings, self.stage
        total = settings.steps(stage)
        data = StepData(stage, settings.seed, settings.batch(stage), self.packer)
        loader: Iterable[Batch] = DataLoader(
            data,
            batch_size=None,
            sampler=range(self.step, total),
            num_workers=self.workers,
            # Identity: batches hold NumPy arrays and scenes' targets that the default conversion would rebuild.
            collate_fn=_unchanged,
        )
        started = saved = time.monotonic()
        before = self.seconds[stage]
        averages: dict[str, float] = {}
        for batch in loader:
            measured = self._train_step(batch, total)
            for name, value in measured.items():
                averages[name] = averages.get(name, value) * 0.95 + value * 0.05
            self.step += 1
            now = time.monotonic()
            self.seconds[stage] = before + now - started
            if self.step % 50 == 0 or self.step == total:
                self.log({"averages": averages})
            if stage == "joint" and (self.step % 250 == 0 or self.step == total):
                self.log({"monitor": self.monitor()})
            if now - saved > checkpoint_seconds:
                self.save_checkpoint()
                saved = now

    def _train_step(self, batch: Batch, total: int) -> dict[str, float]:
        for kind, optimiser in self.optimisers.items():
            rate = LEARNING_RATES[self.stage][kind] * schedule(self.step, total)
            for group in optimiser.param_groups:
                group["lr"] = rate
        self.adapter.model.train()
        with self._autocast():
            loss, measured = self._loss(batch)
        loss.backward()
        parameters = [p for optimiser in self.optimisers.values() for g in optimiser.param_groups for p in g["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in self.optimisers.values():
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"gradient norm is {float(norm)} at {self.stage} step {self.step}; lower the rate")
        return {"loss": float(loss.detach()), "gradient": float(norm), **measured}

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        rows = batch.rows
        if rows is not None and not rows.has_image:
            loss = self._answer_loss(rows, None)
            return loss, {"text_only": float(loss.detach())}
        pixels = self.adapter.pixel_values(batch.images).to(self.device)
        visual = self.adapter.see(pixels)
        targets = SceneTargets(*(tensor.to(self.device) for tensor in vars(batch.targets).values()))
        auxiliary, measured = self.heads(visual, targets)
        if rows is None:
            return auxiliary, measured
        loss = self._answer_loss(rows, visual)
        return loss + AUXILIARY_WEIGHT * auxiliary, {"answers": float(loss.detach()), **measured}

    def _answer_loss(self, rows: PackedRows, visual: VisualStates | None) -> Tensor:
        states = self.adapter.packed_states(rows.ids.to(self.device), visual, rows.packing)
        return answer_loss(states, rows.labels.to(self.device), self.adapter.model.lm_head)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    @torch.no_grad()
    def monitor(self) -> dict[str, float]:
        """Accuracy on the first answer token over `MONITOR_IMAGES` scenes that training never sees.

        Returns
        -------
        dict
            ``recall`` (present categories), ``true_negatives_random``, ``true_negatives_in_theme`` and one entry per
            further question type, in [0, 1].
        """
        self.adapter.model.eval()
        scenes, images = draw_scenes(MONITOR_ENTROPY, MONITOR_IMAGES)
        right: dict[str, list[bool]] = {}
        for begin in range(0, len(scenes), 16):
            chunk = scenes[begin : begin + 16]
            rng = np.random.default_rng((*MONITOR_ENTROPY, len(scenes), begin))
            tagged = [monitor_questions(scene, rng) for scene in chunk]
            ids, labels, packing = self.packer.pack([[question for _, question in row] for row in tagged])
            with self._autocast():
                visual = self.adapter.see(self.adapter.pixel_values(images[begin : begin + 16]).to(self.device))
                states = self.adapter.packed_states(ids.to(self.device), visual, packing)
            for row, tags in enumerate(tagged):
                for (start, length), (tag, _) in zip(packing.slot_starts(), tags, strict=False):
                    at = start + int((labels[row, start : start + length] >= 0).int().argmax())
                    guess = self.adapter.model.lm_head(states[row, at].float()).argmax()
                    right.setdefault(tag, []).append(int(guess) == int(labels[row, at]))
        return {tag: round(float(np.mean(values)), 4) for tag, values in sorted(right.items())}

    def record(self) -> dict[str, Any]:
        """What a model card says about the run: settings, wall clock, hardware, versions and the last monitor."""
        settings = asdict(self.settings)
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
        if self.device.type == "cuda":
            hardware = torch.cuda.get_device_name(self.device)
        else:
            hardware = f"{torch.get_num_threads()} CPU thread(s), {torch.backends.cpu.get_cpu_capability()}"
        return {
            "command": f"python -m lmmhooks_eval.tiny.train {flags}",
            "settings": settings,
            "earlier": self.earlier,
            "minutes": {stage: round(seconds / 60, 1) for stage, seconds in self.seconds.items()},
            "parameters": sum(parameter.numel() for parameter in self.adapter.model.parameters()),
            "hardware": hardware,
            "torch": torch.__version__,
            "monitor": self.monitor(),
        }

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to ``log.jsonl`` and print it."""
        rounded = {
            key: {name: round(item, 4) if isinstance(item, float) else item for name, item in value.items()}
            if isinstance(value, dict)
            else value
            for key, value in entry.items()
        }
        line = json.dumps(
            {"stage": self.stage, "step": self.step, "minutes": round(self.seconds[self.stage] / 60, 2), **rounded}
        )
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save_checkpoint(self) -> None:
        """Write everything a resumed run needs; replaces the previous checkpoint in one step."""
        state = {
            "settings": asdict(self.settings),
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "earlier": self.earlier,
            "model": self.adapter.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
        }
        temporary = self.out / "checkpoint.pt.tmp"
        torch.save(state, temporary)
        temporary.replace(self.out / "checkpoint.pt")

    def load_checkpoint(self) -> None:
        """Continue from the folder's checkpoint.

        Resumed with the same settings, the run ends as if it had never stopped. Other numbers of steps are allowed and
        lay the learning rate schedule out anew from the current step; the settings so far are kept in `earlier`.

        Raises
        ------
        FileNotFoundError
            If there is none.
        ValueError
            If it belongs to another model or seed.
        """
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint to resume in {self.out}; start without --resume")
        state = torch.load(path, map_location=self.device, weights_only=True)
        for field in ("model", "seed"):
            theirs, ours = state["settings"][field], getattr(self.settings, field)
            if theirs != ours:
                raise ValueError(f"checkpoint in {self.out} has {field} {theirs!r}, asked for {ours!r}")
        self.adapter.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.earlier = state["earlier"]
        if state["settings"] != asdict(self.settings):
            self.earlier.append({"stage": self.stage, "until_step": self.step, "settings": state["settings"]})
        self.optimisers = make_optimisers(self.adapter, self.heads, self.stage)
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])


def make_optimisers(adapter: Adapter, heads: nn.Module, stage: str) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of vision blocks, AdamW for the rest; the vision stage leaves the language model alone."""
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"training needs torch.optim.Muon, found torch {torch.__version__}; install torch>=2.9")
    trained = adapter.vision if stage == "vision" else adapter.model
    matrices = [p for p in adapter.vision_blocks.parameters() if p.ndim == 2]
    in_muon = {id(p) for p in matrices}
    rest = [p for p in [*trained.parameters(), *heads.parameters()] if id(p) not in in_muon]
    rates = LEARNING_RATES[stage]
    return {
        # The update is scaled to AdamW's root mean square, which makes the two rates comparable.
        "muon": torch.optim.Muon(matrices, lr=rates["muon"], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=rates["adamw"],
            betas=(0.9, 0.95),
        ),
    }


def schedule(step: int, total: int) -> float:
    """Learning rate factor in (0, 1]: linear warm-up, then cosine to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1.0 + math.cos(math.pi * step / total))


def monitor_questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, Question]]:
    """Tagged questions of one monitor scene, at most 14."""
    tagged = [("recall", existence(name, True)) for name in scene.present[:3]]
    for tag, split in (("true_negatives_random", "random"), ("true_negatives_in_theme", "adversarial")):
        tagged += [(tag, existence(name, False)) for name in absent_categories(scene, split, [], rng)[:2]]
    for question in (
        *ask.colour_questions(scene, rng, 2),
        *ask.attribute_questions(scene, rng, 2),
        *ask.count_questions(scene, rng, 1),
        *ask.side_questions(scene, rng, 1),
        *ask.relation_questions(scene, rng, 1),
    ):
        tagged.append((question.type, question))
    return tagged


def _unchanged(batch: Any) -> Any:
    return batch


def _arguments() -> argparse.Namespace:
    defaults = Settings("")
    parser = argparse.ArgumentParser(description="Train a bundled tiny model from a seed.")
    parser.add_argument("--model", required=True, choices=sorted(ADAPTERS))
    parser.add_argument("--out", required=True, type=Path, help="folder for checkpoint, log and the finished model")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--vision-steps", type=int, default=defaults.vision_steps)
    parser.add_argument("--joint-steps", type=int, default=defaults.joint_steps)
    parser.add_argument("--vision-batch", type=int, default=defaults.vision_batch, help="images per step")
    parser.add_argument("--joint-batch", type=int, default=defaults.joint_batch, help="images per step")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=defaults.precision)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--workers", type=int, default=0, help="processes that render batches ahead")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    return parser.parse_args()


def main() -> None:
    """Command line entry."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    trainer = Trainer(settings, arguments.out, torch.device(arguments.device), arguments.workers)
    if arguments.resume:
        trainer.load_checkpoint()
    trainer.log({"settings": asdict(settings), "device": str(trainer.device)})
    trainer.run()
    folder = arguments.out / "model"
    export_model(settings.model, trainer.adapter.model, trainer.adapter.tokenizer, folder)
    (folder / "training.json").write_text(json.dumps(trainer.record(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
