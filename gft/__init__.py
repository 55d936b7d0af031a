"""Gradient-free training: integer layers and the optimizer that flips their weights.

    from gft import FlipOptimizer, IntEmbedding, IntLinear
"""

from typing import Any

_HOMES = {"IntLinear": "gft.layers", "IntEmbedding": "gft.layers", "FlipOptimizer": "gft.optimizer"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that reading a config does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
