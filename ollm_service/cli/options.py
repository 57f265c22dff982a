"""Which flags say how a model runs and how it generates? One for each field of RuntimeConfig and GenerationConfig.

The flags are made from the fields, so that none can be forgotten. What was not given stays open, for the environment, a file or
the service to say; `default` or `any` closes it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from typing import Annotated, Any, get_args

import typer

from ollm_service.core.errors import InvalidOption, shown
from ollm_service.core.labels import ANY
from ollm_service.core.options import (
    CPU_OFFLOAD_POLICIES,
    EXACT_LAYERS,
    KV_ADAPTATION_MODES,
    KV_LIFECYCLES,
    SELECTOR_PROFILES,
    GenerationConfig,
    KVCacheStrategy,
    RuntimeConfig,
)
from ollm_service.core.plan import BackendId
from ollm_service.core.precedence import TO_THE_DEFAULT

HELP: Mapping[str, str] = {
    "device": "Device to run on, such as cpu or cuda:0.",
    "backend": f"Backend: {', '.join(BackendId)}.",
    "adapter_dir": "Folder of an adapter.",
    "draft_model": "Small model with the same tokenizer that guesses tokens.",
    "multimodal": "Take images or sounds, too.",
    "use_specialization": "Use the model family's passes.",
    "use_cache": "Let the KV cache live in files.",
    "kv_cache_strategy": f"Where past keys and values live: {', '.join(KVCacheStrategy)}.",
    "strategy_selector_profile": f"What to aim at: {', '.join(SELECTOR_PROFILES)}.",
    "kv_cache_lifecycle": f"How long KV files live: {', '.join(KV_LIFECYCLES)}.",
    "kv_cache_adaptation_mode": f"Change the strategy while running: {', '.join(KV_ADAPTATION_MODES)}.",
    "kv_cache_window_tokens": "Tokens of a bounded KV window.",
    "dense_projection_chunk_rows": "Rows of one chunk of the MLP.",
    "offload_cpu_layers": "Layers to keep in host memory.",
    "offload_cpu_policy": f"Which layers those are: {', '.join(CPU_OFFLOAD_POLICIES)}, or by number, such as {EXACT_LAYERS}.",
    "offload_gpu_layers": "Layers to pin on the GPU first.",
    "max_new_tokens": "Most tokens of an answer.",
    "temperature": "0 takes the best token always.",
    "top_p": "Sample from the likeliest tokens of this much probability.",
    "top_k": "Sample from this many likeliest tokens.",
    "seed": "Seed of sampling.",
    "stop": "Text that ends an answer; up to four times.",
}
# `--stop ""` is to stop what `default` is to the others, since an answer may end at that very word.
CLEARING_WORDS = (TO_THE_DEFAULT, ANY)
CLEARING = (*CLEARING_WORDS, [""])
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the flags of one command say, by the option; None: its default, whatever is set elsewhere."""

    runtime: Mapping[str, Any]
    generation: Mapping[str, Any]


def takes_choices(*, generation: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags, and its parameter `choices` what they say. Raises InvalidOption for a wrong one."""
    kinds = (RuntimeConfig, GenerationConfig) if generation else (RuntimeConfig,)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **given: Any) -> None:
            choices = Choices(runtime=_pick(RuntimeConfig, given), generation=_pick(GenerationConfig, given))
            command(*args, choices=choices, **given)

        own = inspect.signature(command, eval_str=True)
        parameters = [parameter for parameter in own.parameters.values() if parameter.name != "choices"]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        parameters += [_parameter(item, kind) for kind in kinds for item in fields(kind)]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        setattr(run, "__signature__", own.replace(parameters=parameters))  # noqa: B010 - functions declare no such attribute
        return run

    return decorate


def seconds_in(text: str | None) -> float | None:
    """A duration in seconds: `90`, `90s`, `15m`, `2h`, `1d`. Raises InvalidOption."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([smhd]?)", text.strip())
    if found is None or float(found[1]) == 0:
        raise InvalidOption("--deadline", f"`{text}` is not a duration", allowed=["90s", "15m", "2h", "1d"])
    return float(found[1]) * _SECONDS[found[2]]


def _parameter(item: Field[Any], kind: type) -> inspect.Parameter:
    panel = "How the model runs" if kind is RuntimeConfig else "How it generates"
    wanted: Any = next(iter(arg for arg in get_args(item.type) if arg is not type(None)), item.type)
    flag = f"--{item.name.replace('_', '-')}"
    if item.name == "stop":
        wanted = list[str]
    elif wanted is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--').removeprefix('use-')}"
    as_number = {int: ("<int>", _whole), float: ("<float>", _number)}
    metavar, parser = as_number.get(wanted, (None, None))
    option = typer.Option(flag, help=HELP[item.name], rich_help_panel=panel, show_default=False, metavar=metavar, parser=parser)
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[wanted | None, option])


def _whole(text: str) -> Any:
    """What a flag that takes a whole number was given. Raises ValueError for what is neither one nor a word for the default."""
    return text if text in CLEARING_WORDS else _parsed(int, text, "a whole number")


def _number(text: str) -> Any:
    return text if text in CLEARING_WORDS else _parsed(float, text, "a number")


def _parsed(kind: type, text: str, what: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"`{shown(text)}` is not {what}") from error


def _pick(kind: type[RuntimeConfig] | type[GenerationConfig], given: dict[str, Any]) -> dict[str, Any]:
    """Take a kind's options out of what was given; a flag that was not used leaves its option open. Raises InvalidOption."""
    taken = {item.name: given.pop(item.name, None) for item in fields(kind)}
    chosen = {name: None if value in CLEARING else value for name, value in taken.items() if value is not None}
    kind.from_dict(chosen)
    return chosen
