"""Gradient-free training: integer layers and the optimizer that flips their weights.

    from gft import FlipOptimizer, IntEmbedding, IntLinear
"""

from importlib.util import find_spec
from pathlib import Path

# Hugging Face publishes another package called kernels, which Python may find first.
_found, _ours = find_spec("kernels"), Path(__file__).resolve().parent.with_name("kernels")
_place = Path((_found.submodule_search_locations or [_found.origin])[0]).resolve() if _found else None
if _place != _ours:
    raise ImportError(
        f"gft needs nanoGFT's own package kernels, {_ours}, but Python finds {_place or 'none'}. If that is Hugging "
        "Face's package, `pip uninstall kernels` or use a separate environment; if it is your own, rename it"
    )

from gft.convert import convert  # noqa: E402
from gft.layers import Delta, IntEmbedding, IntLinear, int_layers  # noqa: E402
from gft.optimizer import FlipOptimizer  # noqa: E402

__all__ = ["Delta", "FlipOptimizer", "IntEmbedding", "IntLinear", "convert", "int_layers"]
