"""Random weights with which omitting any part of a model changes the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SPREAD = 3.0  # standard deviation of the logits
_NORMS = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")  # in lower case
_TABLES = ("wpe.weight", "position_embeddings.weight", "token_type_embeddings.weight")
_LAST_NORMS = ("model.norm.weight", "ln_f.weight")


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Set every parameter and persistent buffer to a random value that has an effect on the results."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    offset = 1.0 if "Gemma" in type(model).__name__ else 0.0  # Gemma stores norm weights minus one
    embeddings = _weight(model, "get_input_embeddings")
    tied = embeddings is not None and embeddings is _weight(model, "get_output_embeddings")
    small = 0.02 if tied else 0.1
    large = SPREAD / (small * embeddings.shape[1] ** 0.5) if tied else SPREAD
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor is embeddings or name.endswith(_TABLES):
                tensor.copy_(small * noise)
            elif name.lower().endswith(_NORMS):
                final = name.endswith(_LAST_NORMS)
                tensor.copy_((large if final else 1.0) * (1.0 + 0.3 * noise) - offset)
            elif tensor.ndim < 2 or name.endswith("bias"):
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(noise / _fan_in(name, tensor) ** 0.5)


def _weight(model: Any, method: str) -> Any:
    """The matrix of the module that a method returns, None in models without one."""
    try:
        return getattr(getattr(model, method)(), "weight", None)
    except NotImplementedError:
        return None


def _fan_in(name: str, tensor: torch.Tensor) -> int:
    """Inputs of a matrix: the last axis for Linear, the first for GPT-2, one of the two for experts."""
    if tensor.ndim == 3:  # some architectures transpose, but the hidden size is always the larger
        return min(tensor.shape[1:]) if "down_proj" in name else max(tensor.shape[1:])
    return tensor.shape[0] if name.startswith("transformer.h.") else tensor.shape[1]
