"""How does one get a large model with known answers? The demo model, deepened: it computes the same, and has to be moved.

Between its layers come others whose output projections are zero, so that they add nothing, and the feed-forward part of its own
is padded with zeros. Run `python scripts/deepen_demo_model.py FOLDER [--layers 12] [--width 16384]`: 1536 bytes for each of both.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "models" / "sum-chat"


@torch.no_grad()
def deepen(folder: Path, *, layers: int = 12, width: int = 16_384, seed: int = 20, source_folder: Path = DEMO_MODEL) -> Path:
    """Save the demo model, or another Llama, with so many layers, each with so wide a feed-forward part, in `folder`.

    Raises ValueError for fewer or narrower layers than that model has.
    """
    source = LlamaForCausalLM.from_pretrained(source_folder)
    config: Any = LlamaConfig.from_pretrained(source_folder)
    own, own_width = config.num_hidden_layers, config.intermediate_size
    if layers < own or width < own_width:
        raise ValueError(f"the model in {source_folder} has {own} layers of width {own_width} itself")
    config.num_hidden_layers, config.intermediate_size = layers, width
    torch.manual_seed(seed)
    target = LlamaForCausalLM(config)
    # Its own layers lie as far apart as they can, so that what comes from disk lies between them.
    places = [round(number * (layers - 1) / max(1, own - 1)) for number in range(own)]
    for place, layer in enumerate(target.model.layers):
        if place in places:
            weights = source.model.layers[places.index(place)].state_dict()
            layer.load_state_dict({name: _padded(weights[name], like) for name, like in layer.state_dict().items()})
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    target.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight)
    target.model.norm.weight.copy_(source.model.norm.weight)
    target.generation_config = source.generation_config
    target.save_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source_folder)
    tokenizer.save_pretrained(folder)
    return folder


def _padded(weight: Tensor, like: Tensor) -> Tensor:
    """The weight in the upper left corner of zeros."""
    if weight.shape == like.shape:
        return weight
    padded = torch.zeros_like(like)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return padded


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=16_384)
    given = parser.parse_args()
    made = deepen(given.folder, layers=given.layers, width=given.width)
    print(f"{made}: {sum(file.stat().st_size for file in made.glob('*.safetensors')):,} bytes of weights")
