"""Which parts of a model, other than layers, can be brought by themselves: a layer's experts, and the vocabulary matrices?"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def experts_of(root: nn.Module, layer: str) -> dict[str, nn.Module]:
    """The modules of a layer that hold all of its experts stacked, by their names in `root`.

    Such a module says `num_experts`, has that many entries in the first dimension of each of its tensors, matrices among them,
    and no parts with tensors of their own. A router is none: its matrix has one row an expert.
    """
    found = root.get_submodule(layer).named_modules(prefix=layer)
    return {name: child for name, child in found if _is_stacked(child)}


def _is_stacked(module: nn.Module) -> bool:
    count: Any = getattr(module, "num_experts", None)
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    is_whole = len(own) == len(list(module.parameters())) == len(module._parameters) and not list(module.buffers())
    return (
        isinstance(count, int)
        and is_whole
        and all(parameter.ndim >= 2 and parameter.shape[0] == count for parameter in own)
        and any(parameter.ndim == 3 for parameter in own)
    )


def input_embedding(module: PreTrainedModel) -> nn.Embedding | None:
    """What looks up the vectors of tokens, where the model says so and it is an embedding of torch's kind."""
    try:
        found = module.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Embedding) else None


def output_head(module: PreTrainedModel) -> nn.Linear | None:
    """What makes logits of hidden states, where that is a linear map."""
    found: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    return found if isinstance(found, nn.Linear) else None


def vocabulary_keys(module: PreTrainedModel) -> list[str]:
    """The names of the matrices [V, H] with a row for each token: of the input embedding, and of the head if it has its own."""
    ends = [end.weight for end in (input_embedding(module), output_head(module)) if end is not None]
    return [key for key, parameter in module.named_parameters() if any(parameter is weight for weight in ends)]
