"""How the inputs of a case are drawn, by name. All are float32."""

import numpy as np

from common.errors import UserError

EPS32 = float(np.finfo(np.float32).eps)


def draw(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` float32 values; UserError for an unknown kind."""
    normal = rng.standard_normal(count).astype(np.float32)
    if kind == "normal":
        return normal + np.float32(0.25)  # a mean that is not zero tells RMS from standard deviation
    if kind == "equal":
        return np.full(count, 0.3, np.float32)
    if kind == "zeros":
        return np.where(np.arange(count) % 2 == 0, np.float32(0.0), np.float32(-0.0))
    if kind == "tiny":
        return normal * np.float32(1e-18)
    if kind == "large":
        return normal * np.float32(1e15)
    if kind == "mixed magnitudes":
        return normal * np.float32(10.0) ** (np.arange(count) % 9 - 4).astype(np.float32)
    if kind == "wide":  # for pointwise functions: far beyond where exp overflows
        return np.linspace(-150, 150, count, dtype=np.float32)
    if kind in ("an infinity", "a NaN", "a minus infinity"):
        special = {"an infinity": np.inf, "a NaN": np.nan, "a minus infinity": -np.inf}[kind]
        normal[count // 2] = special
        return normal
    raise UserError(f"no way to draw values called {kind!r}")
