"""
Choices by diversity and coverage the slow way: Python loops over floats, full matrices, everything anew at every step.

A function takes vectors of one group of visual tokens and returns the tokens that stay, in the order chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Matrix = list[list[float]]


def cosines(ones: Tensor, others: Tensor) -> Matrix:
    """Cosine of every pair; a vector of zeros is similar to nothing."""
    out = []
    for one in ones.double():
        row = []
        for other in others.double():
            lengths = float(one.norm() * other.norm())
            exact = 1.0 if torch.equal(one, other) else float(one @ other) / (lengths or 1.0)
            row.append(exact if lengths else 0.0)
        out.append(row)
    return out


def first_largest(values: dict[int, float]) -> int:
    """Key of the largest value; the lower key wins a tie."""
    return min(values, key=lambda key: (-values[key], key))


def divprune(vectors: Tensor, num_keep: int) -> list[int]:
    """Largest second smallest distance first, then largest distance to those chosen."""
    n = len(vectors)
    similar = cosines(vectors, vectors)
    distance = [[1 - similar[i][j] for j in range(n)] for i in range(n)]
    chosen: list[int] = []
    while len(chosen) < num_keep:
        scores = {}
        for j in range(n):
            if j not in chosen:
                column = [distance[i][j] for i in (chosen or range(n))]
                scores[j] = min(column) if chosen else sorted(column)[1]
        chosen.append(first_largest(scores))
    return chosen


def spanning(kernel: Matrix, num_keep: int) -> list[int]:
    """Greedy maximum of the determinant, every determinant computed anew."""
    matrix = torch.tensor(kernel, dtype=torch.double)
    chosen: list[int] = []
    while len(chosen) < num_keep:
        scores = {}
        for j in range(len(kernel)):
            if j not in chosen:
                part = torch.tensor([*chosen, j])
                scores[j] = float(torch.linalg.slogdet(matrix[part][:, part]).logabsdet)
        chosen.append(first_largest(scores))
    return chosen


def scaled(relevance: dict[int, float]) -> dict[int, float]:
    """Min-max over everything given."""
    low, high = min(relevance.values()), max(relevance.values())
    return {key: (value - low + 1e-6) / (high - low) for key, value in relevance.items()}


def cdpruner(vectors: Tensor, relevance: Sequence[float], num_keep: int) -> list[int]:
    similar = cosines(vectors, vectors)
    n = len(vectors)
    return spanning([[relevance[i] * similar[i][j] * relevance[j] for j in range(n)] for i in range(n)], num_keep)


def cover(rows: Matrix, num_keep: int, factor: Sequence[float], offset: Sequence[float]) -> list[int]:
    """Largest gain over all rows, times a factor, plus an offset."""
    size = len(factor)
    best = [0.0] * len(rows)
    chosen: list[int] = []
    while len(chosen) < num_keep:
        gains = {}
        for j in range(size):
            if j not in chosen:
                gains[j] = sum(max(0.0, row[j] - seen) for row, seen in zip(rows, best, strict=True))
        winner = first_largest({j: gain * factor[j] + offset[j] for j, gain in gains.items()})
        chosen.append(winner)
        best = [max(seen, row[winner]) for row, seen in zip(rows, best, strict=True)]
    return chosen


def scope(features: Tensor, saliency: Sequence[float], num_keep: int, alpha: float, add: bool) -> list[int]:
    weight = [value**alpha for value in saliency]
    ones, zeros = [1.0] * len(weight), [0.0] * len(weight)
    factor, offset = (ones, weight) if add else (weight, zeros)
    return cover(cosines(features, features), num_keep, factor, offset)


def mmtok(words: Tensor, vectors: Tensor, features: Tensor, num_keep: int, alpha: float) -> list[int]:
    n = len(vectors)

    def soft(row: list[float], temperature: float, count: int) -> list[float]:
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) / count for power in powers]

    rows = [soft(row, 0.02, len(words)) for row in cosines(words, vectors)]
    rows += [[alpha * value for value in soft(row, 0.2, n)] for row in cosines(features, features)]
    return cover(rows, num_keep, [1.0] * n, [0.0] * n)


def holov(vectors: Tensor, attention: Sequence[float], chunks: list[list[int]], num_keep: int) -> list[int]:
    scores = []
    for members in chunks:
        n = len(members)
        if n <= 1:
            scores.append(sum(attention[i] for i in members) / n)
            continue
        similar = cosines(vectors[members], vectors[members])
        variance = []
        for i in range(n):
            row = [0.0 if i == j else similar[i][j] for j in range(n)]
            mean = sum(row) / (n - 1)
            variance.append(sum((value - mean) ** 2 for value in row) / (n - 1))
        attended = [1000 * attention[i] for i in members]
        scale = (sum(attended) / n) / (sum(variance) / n + 1e-6)
        scores.append(sum(a + 0.09 * v * scale for a, v in zip(attended, variance, strict=True)) / n)
    weight = [score / (sum(scores) + 1e-6) for score in scores]
    share = [math.floor(w * num_keep) for w in weight]
    for chunk in sorted(range(len(chunks)), key=lambda c: (-weight[c], c))[: num_keep - sum(share)]:
        share[chunk] += 1

    def falling(members: list[int]) -> list[int]:
        return sorted(members, key=lambda i: (-attention[i], i))

    kept = [i for members, count in zip(chunks, share, strict=True) for i in falling(members)[:count]]
    spare = [i for i in falling(list(range(len(vectors)))) if i not in kept]
    kept += spare[: num_keep - len(kept)]
    return [i for members in chunks for i in falling(members) if i in kept]


def vmtc(
    features: Tensor, attention: Sequence[float], num_primary: int, num_clusters: int, iterations: int = 10
) -> list[tuple[int, Tensor | None]]:
    """Tokens that stay, ascending, each with the mean it stands for, None for itself."""
    falling = sorted(range(len(features)), key=lambda i: (-attention[i], i))
    primary, rest = falling[:num_primary], sorted(falling[num_primary:])
    unit = {i: features[i].double() / features[i].double().norm() for i in rest}
    centres = [unit[first_largest({i: attention[i] for i in rest})]]
    seeds = [first_largest({i: attention[i] for i in rest})]
    while len(centres) < num_clusters:
        far = {i: -max(float(unit[i] @ centre) for centre in centres) for i in rest if i not in seeds}
        seeds.append(first_largest(far))
        centres.append(unit[seeds[-1]])

    def members() -> list[list[int]]:
        found: list[list[int]] = [[] for _ in centres]
        for i in rest:
            found[first_largest({c: float(unit[i] @ centre) for c, centre in enumerate(centres)})].append(i)
        return found

    for _ in range(iterations):
        for c, inside in enumerate(members()):
            if inside:
                mean = torch.stack([unit[i] for i in inside]).mean(dim=0)
                centres[c] = mean / mean.norm()
    out: dict[int, Tensor | None] = dict.fromkeys(primary)
    for inside in members():
        if inside:
            mass = sum(attention[i] for i in inside)
            mean = torch.stack([features[i].double() * (attention[i] / mass) for i in inside]).sum(dim=0)
            out[first_largest({i: attention[i] for i in inside})] = mean.float()
    return sorted(out.items(), key=lambda item: item[0])


def pool(
    features: Tensor, grid: tuple[int, int], shape: tuple[int, int], largest: bool = False
) -> list[tuple[int, Tensor]]:
    """Per cell, the token at the floor of its mean row and column, and the cell's mean or maximum."""
    (rows, cols), (down, across) = grid, shape
    out = []
    for i in range(down):
        for j in range(across):
            inside_rows = range(math.floor(i * rows / down), math.ceil((i + 1) * rows / down))
            inside_cols = range(math.floor(j * cols / across), math.ceil((j + 1) * cols / across))
            cell = torch.stack([features[r * cols + c] for r in inside_rows for c in inside_cols])
            row = math.floor(sum(inside_rows) / len(inside_rows))
            col = math.floor(sum(inside_cols) / len(inside_cols))
            out.append((row * cols + col, cell.amax(dim=0) if largest else cell.mean(dim=0)))
    return out
