"""Moving attention into a region: its cells, the loss, and the steps that lower the loss; see `ControlMLLM`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image as images
from scipy import ndimage
from torch import Tensor

__all__ = ["closeness", "distances", "region_loss", "sampled", "steered"]

#: Size to which the released code brings regions before it cuts out the middle, whatever the encoder takes.
REGION_SIDE = 224


def region_loss(attention: Tensor, weights: Tensor, alpha: float, epsilon: float = 0.0) -> Tensor:
    """
    How far attention is from lying in a region: ``alpha (1 - sum(A w) / (sum(A) + epsilon))^2``.

    Parameters
    ----------
    attention
        ``[n]`` over the visual tokens.
    weights
        ``[n]``: 1 inside the region and 0 outside, or `closeness`.
    alpha
        Factor; for weights of 0 and 1 the largest loss.
    epsilon
        Added to the sum of attention.
    """
    return alpha * (1 - (attention * weights).sum() / (attention.sum() + epsilon)) ** 2


def closeness(distance: Tensor, sigma: float) -> Tensor:
    """Density of a normal distribution around 0 at distances in [0, 1]: weights for points and scribbles."""
    return torch.exp(-(distance**2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)


def distances(mask: np.ndarray) -> np.ndarray:
    """
    Distance to the nearest True pixel, scaled so that the farthest is 255.

    Parameters
    ----------
    mask
        Bool ``[H, W]``, True somewhere.

    Returns
    -------
    ndarray
        uint8 ``[H, W]``. Exact Euclidean distances, where the released code takes OpenCV's approximation of them.
    """
    exact = ndimage.distance_transform_edt(~mask)
    return np.rint(exact * (255 / max(float(exact.max()), 1e-12))).astype(np.uint8)


def sampled(picture: np.ndarray, side: int) -> Tensor:
    """
    A region as the cells of LLaVA-1.5 see it, by picking pixels: resize, cut out the middle, resize.

    Parameters
    ----------
    picture
        ``[H, W]``: bool or float32, or uint8 that stands for [0, 1].
    side
        Cells along a side.

    Returns
    -------
    Tensor
        float32 ``[side, side]``.
    """
    image = images.fromarray(picture if picture.dtype == np.uint8 else picture.astype(np.float32))
    width, height = image.size
    short = min(width, height)
    scaled = (int(REGION_SIDE * width / short), int(REGION_SIDE * height / short))
    image = image.resize(scaled, images.Resampling.NEAREST)
    left, top = (round((length - REGION_SIDE) / 2) for length in scaled)
    image = image.crop((left, top, left + REGION_SIDE, top + REGION_SIDE))
    values = np.asarray(image.resize((side, side), images.Resampling.NEAREST), dtype=np.float32)
    return torch.from_numpy(values / 255 if picture.dtype == np.uint8 else values.copy())


def steered(
    loss_of: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    updates: int,
    lr: float,
    optimizer: str = "adam",
    beta: float = 1.0,
    accumulate: bool = False,
    early_stop: float | None = None,
) -> Tensor:
    """
    The offset after some gradient steps.

    Parameters
    ----------
    loss_of
        Offset to loss, differentiable.
    start
        ``[n, D]`` zeros, on the device of the optimisation.
    updates
        Gradient steps.
    lr
        Length of a step.
    optimizer
        ``"adam"`` (betas 0.9 and 0.999, epsilon 1e-3) or ``"sgd"``.
    beta
        Share of the newest offset in the moving average that is applied; 1 is no average.
    accumulate
        Whether what is applied adds up over steps.
    early_stop
        End once the loss has changed by more than this percentage of the first one, from the third on, or has risen.
        None: never.
    """
    offset = start.detach().clone().requires_grad_()
    maker = torch.optim.SGD([offset], lr=lr)
    if optimizer == "adam":
        maker = torch.optim.Adam([offset], lr=lr, eps=1e-3)  # type: ignore[assignment] # same use
    total, history = torch.zeros_like(start), offset
    losses: list[float] = []
    for _ in range(updates):
        current = beta * offset + (1 - beta) * history
        loss = loss_of(total + current)
        if accumulate:
            total = total + current.detach()
        losses.append(float(loss.detach()))
        changed = early_stop is not None and len(losses) > 2 and abs(losses[-1] / losses[0] - 1) * 100 > early_stop
        if changed or (early_stop is not None and len(losses) > 1 and losses[-1] > losses[-2]):
            break
        history = current.detach()
        [offset.grad] = torch.autograd.grad(loss, [offset])
        maker.step()
    return (total + beta * offset + (1 - beta) * history).detach()
