"""Which files of a repository are fetched, whatever the hub lists?"""

import pytest

from workers.download.choice import HubFile, chosen, missing

WHOLE = {"config.json", "model.safetensors", "tokenizer.json"}


def names(*listed: str) -> list[str]:
    """Those of these that are fetched."""
    return [file.name for file in chosen(HubFile(name=name, size=1) for name in listed)]


@pytest.mark.parametrize(
    "name",
    [
        *("../evil.safetensors", "/etc/x.safetensors", "gds_export/../../x.raw", "a\\..\\x.safetensors", "./config.json"),
        *("pytorch_model.bin", "model.pt", "MODEL.PKL", "gds_export/w.pt", "gds_export/load.py", "gds_export/.hidden/x"),
        *("modeling_x.py", "README.md", ".gitattributes", "original/model.safetensors", "config.json/x", "x\n.safetensors"),
        *("adapter_config.json", "tokenizer.json.bak", "gds_export//x", ""),
    ],
)
def test_what_is_not_on_the_list_is_never_fetched(name: str) -> None:
    """Nor what leads out of the folder, could run code, or hides."""
    assert names(name) == []


def test_a_second_copy_of_the_weights_is_left_where_there_is_a_first() -> None:
    """Alone it is fetched, since it may be all there is."""
    assert names("consolidated.safetensors", "model.safetensors") == ["model.safetensors"]
    index = "model.safetensors.index.json"
    assert names("consolidated-00001.safetensors", index, "model-00001-of-00001.safetensors") == sorted(
        [index, "model-00001-of-00001.safetensors"]
    )
    assert names("consolidated.safetensors") == ["consolidated.safetensors"]


@pytest.mark.parametrize(
    ("held", "config", "lacking"),
    [
        (WHOLE, {}, []),
        (WHOLE - {"config.json"}, None, ["config.json"]),
        (WHOLE - {"model.safetensors"}, {}, ["safetensors weights (others are never loaded)"]),
        (WHOLE - {"tokenizer.json"}, {}, ["a tokenizer"]),
        (WHOLE - {"tokenizer.json"} | {"vocab.json"}, {}, ["a tokenizer"]),
        (WHOLE - {"tokenizer.json"} | {"vocab.json", "merges.txt"}, {}, []),
        (WHOLE, {"audio_config": {"a": 1}}, ["a processor, which its audio_config asks for"]),
        (WHOLE | {"preprocessor_config.json"}, {"vision_config": {"a": 1}}, []),
        (WHOLE - {"model.safetensors"} | {"a.safetensors"}, {}, ["model.safetensors or model.safetensors.index.json"]),
    ],
)
def test_a_whole_model_has_everything_that_it_is_loaded_with(
    held: set[str], config: dict[str, object] | None, lacking: list[str]
) -> None:
    """Configuration, weights, a tokenizer, and a processor where it sees or hears."""
    assert missing(held, config, None) == lacking
