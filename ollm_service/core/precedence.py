"""Of all that a request, the environment and a file say about an option, what counts? The first of them that says anything.

The order is request, environment, `ollm.toml`, default, and it holds for each option by itself. A null goes back to the default
whatever comes later in that order; so does the word `default`, since neither the environment nor TOML has a null. For `stop`,
which may be any text, an empty list does that. Client and coordinator ask here; workers get what has been resolved.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, TypeVar, get_args

from ollm_service.core.errors import InvalidOption, MisconfiguredService, shown
from ollm_service.core.options import GenerationConfig, RuntimeConfig

Config = TypeVar("Config", RuntimeConfig, GenerationConfig)

SECTIONS: Mapping[str, type[RuntimeConfig] | type[GenerationConfig]] = {
    "runtime": RuntimeConfig,
    "generation": GenerationConfig,
}
TO_THE_DEFAULT = "default"
_FREE_TEXT = "stop"
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one place says about one option; None: its default. `origin` is where an operator would change that."""

    value: Any
    origin: str


Layer = Mapping[str, Said]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionLayers:
    """What a machine says where a request says nothing. An earlier layer wins over a later one."""

    runtime: tuple[Layer, ...] = ()
    generation: tuple[Layer, ...] = ()

    def runtime_config(self, request: Mapping[str, Any]) -> RuntimeConfig:
        """The runtime options that count. Raises InvalidOption."""
        return _resolve(RuntimeConfig, request, self.runtime)

    def generation_config(self, request: Mapping[str, Any]) -> GenerationConfig:
        """The generation options that count. Raises InvalidOption."""
        return _resolve(GenerationConfig, request, self.generation)

    def to_send(self, runtime: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A request's options with this machine's beneath, for a service to fill in what is still open.

        Where this machine says something, raises InvalidOption for what contradicts it; else the service judges.
        """
        if any(self.runtime):
            self.runtime_config(runtime)
            runtime = merged(runtime, self.runtime)
        if any(self.generation):
            self.generation_config(generation)
            generation = merged(generation, self.generation)
        return dict(runtime), dict(generation)


def merged(request: Mapping[str, Any], layers: Sequence[Layer]) -> dict[str, Any]:
    """What is said of each option by the first that says anything; a null stays, so that nobody after it is heard."""
    found = {name: _cleared(name, value) for name, value in request.items()}
    for layer in layers:
        for name, said in layer.items():
            found.setdefault(name, said.value)
    return found


def layer_of(section: str, values: Mapping[str, Any], origin: Callable[[str], str]) -> Layer:
    """A layer from the values of one section. `origin` says where the option of a name stands.

    Raises MisconfiguredService, naming that place, for a name that is no option and for a value that is none of its.
    """
    kind = SECTIONS[section]
    names = [item.name for item in fields(kind)]
    layer = {}
    for name, value in values.items():
        if name not in names:
            raise MisconfiguredService(f"{origin(shown(name))} is not an option. Allowed: {', '.join(names)}.")
        said = Said(value=_cleared(name, value), origin=origin(name))
        try:
            kind.from_dict({name: said.value})
        except InvalidOption as wrong:
            raise MisconfiguredService(f"{said.origin}: {_problem(wrong)}.") from wrong
        layer[name] = said
    return layer


def from_texts(section: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """The values that texts, such as those of environment variables, stand for; an empty text says nothing.

    A text that is no value of its option stays one, for `layer_of` to refuse.
    """
    kinds = {item.name: _kind(item.type) for item in fields(SECTIONS[section])}
    return {name: _from_text(name, kinds.get(name, str), text.strip()) for name, text in texts.items() if text.strip()}


def check_together(layers: OptionLayers) -> OptionLayers:
    """The same. Raises MisconfiguredService where they contradict each other, so that no request could be carried out."""
    try:
        layers.runtime_config({})
        layers.generation_config({})
    except InvalidOption as wrong:
        raise MisconfiguredService(wrong.message) from wrong
    return layers


def _resolve(kind: type[Config], request: Mapping[str, Any], layers: Sequence[Layer]) -> Config:
    asked = {name: _cleared(name, value) for name, value in request.items()}
    alone = kind.from_dict(asked)
    if not any(layers):
        return alone
    try:
        return kind.from_dict(merged(asked, layers))
    except InvalidOption as conflict:
        origins: dict[str, str] = {}
        for layer in layers:
            for name, said in layer.items():
                if name not in asked and said.value is not None:
                    origins.setdefault(name, said.origin)
        elsewhere = ", ".join(f"{name} by {origin}" for name, origin in origins.items())
        problem = f"{_problem(conflict)}; not the request but this sets {elsewhere}"
        raise InvalidOption(conflict.param or "", problem) from conflict


def _problem(wrong: InvalidOption) -> str:
    return wrong.message.removeprefix(f"{wrong.param}: ").removesuffix(".")


def _cleared(name: str, value: Any) -> Any:
    return None if value == TO_THE_DEFAULT and name != _FREE_TEXT else value


def _kind(annotation: Any) -> Any:
    return next((kind for kind in get_args(annotation) if kind is not NoneType), annotation)


def _from_text(name: str, kind: Any, text: str) -> Any:
    if text == "null":
        return None
    if kind is bool:
        return _BOOLEANS.get(text.lower(), text)
    try:
        if name == _FREE_TEXT and text.startswith("["):
            return json.loads(text)
        return kind(text) if kind in (int, float) else text
    except (ValueError, RecursionError):
        return text
