"""Small quadratic problems and their solutions, by NumPy alone."""

import numpy as np
import torch


def fisher_of(kind: str, size: int, rng: np.random.Generator, damp: float = 1e-3) -> np.ndarray:
    """A damped Fisher: of independent gradients, or of gradients that mostly move together."""
    samples = rng.standard_normal((2 * size, size))
    if kind == "correlated":
        samples = samples * 0.1 + rng.standard_normal((2 * size, 1)) * rng.standard_normal(size)
    if kind == "identity":
        return np.eye(size)
    return samples.T @ samples / len(samples) + damp * np.eye(size)


def constrained_minimum(weights: np.ndarray, fisher: np.ndarray, removed: list[int]) -> tuple[np.ndarray, float]:
    """min (v - w)^T F (v - w) / 2 over v with v = 0 on `removed`, by its optimality system with multipliers."""
    size, count = len(weights), len(removed)
    system = np.zeros((size + count, size + count))
    system[:size, :size] = fisher
    for row, entry in enumerate(removed):
        system[entry, size + row] = system[size + row, entry] = 1.0
    right = np.concatenate([np.zeros(size), -weights[removed]])
    change = np.linalg.solve(system, right)[:size]
    pruned = weights + change
    pruned[removed] = 0.0
    return pruned, float(change @ fisher @ change) / 2


def inverse_of(matrices: torch.Tensor) -> torch.Tensor:
    """Return the inverses by NumPy: the library that PyTorch brings hangs on some new processors."""
    return torch.from_numpy(np.linalg.inv(matrices.numpy()))
