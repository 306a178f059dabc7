"""
Steering methods the slow way: one forward without cache over prompt and answer, hooks on MLPs, one position at a time.

Causality makes it the same computation as prefill and decode steps. Nothing here is shared with the methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import full_logits
from tests.zoo import IMAGE, VIDEO

#: (layer, MLP input [N, D], MLP output [N, D], row of the batch) -> new output [N, D]
MlpEdit = Callable[[int, Tensor, Tensor, int], Tensor]
#: (layer, output [B, N, D]) -> None
LayerRead = Callable[[int, Tensor], None]
#: normed output [B, N, D] -> [B, N, D]
NormEdit = Callable[[Tensor], Tensor]


@contextmanager
def hooked(model: Any, mlp: MlpEdit | None = None, read: LayerRead | None = None, norm: NormEdit | None = None):  # type: ignore[no-untyped-def]
    """Run the decoder with plain forward hooks."""
    text = model.model.language_model
    handles = []
    for number, layer in enumerate(text.layers):

        def edit(module: Any, args: Any, output: Tensor, number: int = number) -> Tensor | None:
            if mlp is None:
                return None
            return torch.stack([mlp(number, args[0][row], output[row], row) for row in range(len(output))])

        def show(module: Any, args: Any, output: Tensor, number: int = number) -> None:
            if read is not None:
                read(number, output)

        handles += [layer.mlp.register_forward_hook(edit), layer.register_forward_hook(show)]
    if norm is not None:
        handles.append(text.norm.register_forward_hook(lambda module, args, output: norm(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_states(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Output of every decoder layer at the last position of a prompt of one row, ``[D]`` each."""
    found: dict[int, Tensor] = {}
    with torch.no_grad(), hooked(model, read=lambda layer, output: found.__setitem__(layer, output[0, -1])):
        model(**inputs, use_cache=False)
    return [found[layer] for layer in range(len(found))]


def without_image(model: Any, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt of one row with its images taken out, and what the configuration says opens and closes them."""
    marks = {getattr(model.config, name, None) for name in ("vision_start_token_id", "vision_end_token_id")}
    ids = [i for i in row["input_ids"][0].tolist() if i not in marks | {IMAGE, VIDEO}]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def vista_direction(zoo: Any, inputs: dict[str, Tensor], row: int) -> list[Tensor] | None:
    """Steering vector of every layer for one row; None for a row without image."""
    if IMAGE not in inputs["input_ids"][row]:
        return None
    one = zoo.row(inputs, row)
    seen, blind = last_states(zoo.model, one), last_states(zoo.model, without_image(zoo.model, one))
    return [a - b for a, b in zip(seen, blind, strict=True)]


def vista_mlp(directions: list[list[Tensor] | None], lam: float) -> MlpEdit:
    """Every MLP output turned towards its layer's vector, one position at a time."""

    def edit(layer: int, inputs: Tensor, outputs: Tensor, row: int) -> Tensor:
        vectors = directions[row]
        if vectors is None:
            return outputs
        v = vectors[layer]
        turned = []
        for x in outputs:
            cos = float(x @ -v / (x.norm() * v.norm()))
            s = 1 + max(0.0, cos)
            y = x / x.norm() + lam * s * v / v.norm()
            turned.append(x.norm() * y / y.norm())
        return torch.stack(turned)

    return edit


def vista_logits(
    zoo: Any, inputs: dict[str, Tensor], answer: Tensor, lam: float, gamma: float, layers: tuple[int, ...]
) -> Tensor:
    """Logits ``[B, N, vocabulary]`` of steered forwards, mixed with those of every late layer by itself."""
    directions = [vista_direction(zoo, inputs, row) for row in range(len(answer))]
    states: dict[int, Tensor] = {}
    with hooked(zoo.model, mlp=vista_mlp(directions, lam), read=states.__setitem__):
        logits = full_logits(zoo.model, inputs, answer)
    for row, vectors in enumerate(directions):
        if vectors is not None:
            late = [zoo.model.lm_head(states[layer][row]) for layer in layers]
            logits[row] = (1 - gamma) * logits[row] + gamma * sum(late) / len(late)
    return logits.detach()


def visual_embeddings(zoo: Any, inputs: dict[str, Tensor], images: str = "last") -> list[Tensor | None]:
    """What the decoder is given at the visual tokens of each row: of its last image, or of all of them."""
    found: list[Tensor] = []
    text = zoo.model.model.language_model
    handle = text.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        zoo.model(**inputs)
    handle.remove()
    out: list[Tensor | None] = []
    for ids, embeddings in zip(inputs["input_ids"].tolist(), found[0], strict=True):
        runs: list[list[int]] = []
        for i, token in enumerate(ids):
            if token == IMAGE:
                runs = [*runs, [i]] if not i or ids[i - 1] != IMAGE else [*runs[:-1], [*runs[-1], i]]
        places = runs[-1:] if images == "last" else runs
        out.append(embeddings[[i for run in places for i in run]] if places else None)
    return out


def memvr_rows(
    model: Any, prompt_ids: Tensor, features: list[Tensor | None], start: int, end: int, threshold: float, ratio: float
) -> tuple[MlpEdit, LayerRead, list[tuple[int, int, int]]]:
    """
    Edits of MLPs and readings of layers for `hooked`, and a list that collects ``(row, span, layer)`` of injections.

    The spans of a row are what one forward of generation sees: its prompt, then every later position by itself.
    ``features`` holds the visual embeddings ``[V, D]`` of each row.
    """
    text = model.model.language_model
    length = prompt_ids.shape[1]
    injected: dict[tuple[int, int], int] = {}
    log: list[tuple[int, int, int]] = []

    def spans(row: int, total: int) -> list[list[int]]:
        prompt = [i for i in range(length) if int(prompt_ids[row, i]) != 0]
        return [prompt] + [[i] for i in range(length, total)]

    def read(layer: int, output: Tensor) -> None:
        if layer == 0:
            injected.clear()
        if not start < layer < end:
            return
        for row in range(len(output)):
            if features[row] is None:
                continue
            for number, span in enumerate(spans(row, output.shape[1])):
                if (row, number) in injected:
                    continue
                logits = model.lm_head(text.norm.forward(output[row, span[-1]])).tolist()
                best = sorted(logits, reverse=True)[:10]
                total = sum(math.exp(z - best[0]) for z in best)
                shares = [math.exp(z - best[0]) / total for z in best]
                if -sum(p * math.log(p) for p in shares) / math.log(len(best)) > threshold:
                    injected[row, number] = layer + 1
                    log.append((row, number, layer + 1))

    def edit(layer: int, inputs: Tensor, outputs: Tensor, row: int) -> Tensor:
        outputs = outputs.clone()
        for number, span in enumerate(spans(row, len(outputs))):
            if injected.get((row, number)) != layer:
                continue
            z = features[row]
            assert z is not None
            mlp = text.layers[layer].mlp
            w1 = z * mlp.up_proj.weight.abs().mean() / z.abs().mean()
            w2 = z.T * mlp.down_proj.weight.abs().mean() / z.abs().mean()
            f = outputs[span]
            a = torch.stack([(inputs[i] @ w1.T) @ w2.T for i in span])
            a = a * f.abs().mean() / a.abs().mean()
            outputs[span] = (1 - ratio) * f + ratio * a
        return outputs

    return edit, read, log
