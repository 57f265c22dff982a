"""Does the first of request, environment, file and default that says anything about an option count, and is it told who did?"""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm_service.core.errors import InvalidOption, MisconfiguredService
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.precedence import Layer, OptionLayers, check_together, from_texts, layer_of, merged

VALUES: Mapping[str, st.SearchStrategy[Any]] = {
    "backend": st.sampled_from(["optimized-native", "transformers-generic", None]),
    "strategy_selector_profile": st.sampled_from(["latency", "capacity", None]),
    "use_cache": st.sampled_from([True, False, None]),
    "dense_projection_chunk_rows": st.sampled_from([1, 2, None]),
}
SPOKEN = st.fixed_dictionaries({}, optional=VALUES)


def runtime_layer(place: str, **values: Any) -> Layer:
    """What one place says of the runtime."""
    return layer_of("runtime", values, lambda name: f"{place} {name}")


def layers(environment: Mapping[str, Any], file: Mapping[str, Any]) -> OptionLayers:
    """A machine whose environment and file say this of the runtime."""
    return OptionLayers(runtime=(runtime_layer("environment", **environment), runtime_layer("file", **file)))


@given(request=SPOKEN, environment=SPOKEN, file=SPOKEN)
def test_each_option_is_what_the_first_that_names_it_says(
    request: dict[str, Any], environment: dict[str, Any], file: dict[str, Any]
) -> None:
    """Request before environment before file before default, each option by itself; a null is the default."""
    resolved = layers(environment, file).runtime_config(request)
    for name in RuntimeConfig.__dataclass_fields__:
        first = next((place[name] for place in (request, environment, file) if name in place), None)
        assert getattr(resolved, name) == (getattr(RuntimeConfig(), name) if first is None else first)


@given(request=SPOKEN, ours=SPOKEN, theirs=SPOKEN)
def test_a_client_may_resolve_its_part_and_the_service_the_rest(
    request: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """What a client sends resolves, at the service, to what all the places in one row would."""
    sent, _ = layers(ours, {}).to_send(request, {})
    assert layers(theirs, {}).runtime_config(sent) == layers(ours, theirs).runtime_config(request)


def test_the_word_default_is_a_null_where_there_is_none() -> None:
    """In any place, and for every option but `stop`, which may be any text and has the empty list."""
    assert layers({"device": "default"}, {"device": "cpu"}).runtime_config({}) == RuntimeConfig()
    assert layers({"device": "cpu"}, {}).runtime_config({"device": "default"}) == RuntimeConfig()
    beneath = layer_of("generation", {"stop": ["x"], "top_k": 3}, str)
    stopping = OptionLayers(generation=(beneath,))
    assert stopping.generation_config({"stop": "default", "top_k": "default"}) == GenerationConfig(stop=("default",))
    assert stopping.generation_config({"stop": []}) == GenerationConfig(top_k=3)


def test_a_null_silences_all_that_come_after() -> None:
    """It travels with the request, so that no service fills in what its user cleared."""
    assert merged({"device": None}, [runtime_layer("file", device="cpu")]) == {"device": None}
    assert layers({"device": None}, {"device": "cpu"}).to_send({}, {}) == ({"device": None}, {})


def test_where_nothing_is_said_a_request_goes_as_it_is() -> None:
    """A client without settings leaves every judgement to the service."""
    assert OptionLayers().to_send({"magic": 1}, {"n": 2}) == ({"magic": 1}, {"n": 2})


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("magic", 1, "here magic is not an option. Allowed: device, backend, "),
        ("device", "gpu", "here device: `gpu` is not known. Allowed: cpu, cuda, cuda:N, mps."),
        ("offload_cpu_layers", "many", "here offload_cpu_layers: must be a whole number, not many."),
    ],
)
def test_a_layer_refuses_what_no_request_could_say(name: str, value: Any, problem: str) -> None:
    """The refusal names the place and what is allowed there."""
    with pytest.raises(MisconfiguredService) as refusal:
        runtime_layer("here", **{name: value})
    assert problem in refusal.value.message


def test_a_conflict_with_what_the_request_did_not_say_names_its_place() -> None:
    """The user learns which setting is in the way, and one that was overridden is not blamed."""
    machine = layers({"device": "cpu", "backend": "transformers-generic"}, {"use_cache": False})
    with pytest.raises(InvalidOption) as refusal:
        machine.runtime_config({"offload_cpu_layers": 2, "backend": None})
    assert refusal.value.message == (
        "offload_cpu_layers: has no meaning on device `cpu`; "
        "not the request but this sets device by environment device, use_cache by file use_cache."
    )
    assert machine.runtime_config({"offload_cpu_layers": 2, "device": None}).offload_cpu_layers == 2


def test_a_request_that_is_wrong_by_itself_is_told_so_alone() -> None:
    """Nobody else is blamed for it."""
    with pytest.raises(InvalidOption) as refusal:
        layers({"device": "cpu"}, {}).runtime_config({"backend": "magic"})
    assert "environment" not in refusal.value.message


def test_layers_that_contradict_each_other_are_refused_at_once() -> None:
    """No request could be carried out with them."""
    with pytest.raises(MisconfiguredService, match=r"offload_cpu_layers by file offload_cpu_layers"):
        check_together(layers({"offload_gpu_layers": 1}, {"offload_cpu_layers": 1}))


@pytest.mark.parametrize(
    ("section", "name", "text", "value"),
    [
        ("runtime", "offload_cpu_layers", " 4 ", 4),
        ("runtime", "use_cache", "false", False),
        ("runtime", "multimodal", "1", True),
        ("runtime", "multimodal", "maybe", "maybe"),
        ("runtime", "device", "cuda:0", "cuda:0"),
        ("runtime", "device", "null", None),
        ("runtime", "adapter_dir", "7", "7"),
        ("generation", "temperature", "0.5", 0.5),
        ("generation", "top_k", "1.5", "1.5"),
        ("generation", "stop", "7", "7"),
        ("generation", "stop", '["a", "b"]', ["a", "b"]),
        ("generation", "stop", "[a", "[a"),
    ],
)
def test_texts_stand_for_values_of_their_options(section: str, name: str, text: str, value: Any) -> None:
    """An environment has only texts; one that stands for no value stays, to be refused by name."""
    assert from_texts(section, {name: text}) == {name: value}


def test_an_empty_text_says_nothing() -> None:
    """As an environment file passes on a variable that was left open."""
    assert from_texts("runtime", {"device": "", "backend": " "}) == {}
