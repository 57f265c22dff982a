"""Which commands look at the fleet's models, and have one fetched from the hub?"""

import threading
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from ollm_service.cli.output import (
    FAILED,
    AsJson,
    bytes_in_words,
    print_facts,
    print_json,
    print_json_lines,
    print_table,
    say,
    tell,
)
from ollm_service.client import Client, Download
from ollm_service.core.downloading import DownloadState
from ollm_service.core.errors import printable

LOOK_SECONDS = 1.0
SHORT_DIGEST = 12

models = typer.Typer(help="List, show and fetch models.")


@models.callback(invoke_without_command=True)
def _models(context: typer.Context, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        list_models(as_json=as_json)


@models.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models that a job may name, those that are refused with the reason, and those that are on their way."""
    with Client() as client:
        found = client.models()
    if as_json:
        print_json_lines(model.raw for model in found)
        return
    print_table(
        ("MODEL", "DIGEST", "KIND", "ARCHITECTURE", "DTYPE", "SIZE", "LAYERS", "ON", "REMARK"),
        [
            (
                model.id,
                (model.raw.get("digest") or "")[:SHORT_DIGEST],
                model.raw.get("kind"),
                model.raw.get("architecture"),
                model.raw.get("dtype"),
                bytes_in_words(model.raw.get("weight_bytes")),
                model.raw.get("layer_count"),
                ", ".join(model.raw.get("nodes") or ()),
                _remark(model.raw),
            )
            for model in found
        ],
    )


@models.command("show")
def show_model(
    name: Annotated[
        str, typer.Argument(metavar="MODEL", help="Alias, hub id, path:folder or a folder's name.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Show all that is known of one model: who has it, its figures, and what a plan for it would need."""
    with Client() as client:
        raw = client.model(name).raw
    if as_json:
        print_json(raw)
        return
    profile, needs = raw.get("profile") or {}, raw.get("requirements") or {}
    print_facts(
        {
            "model": raw["id"],
            "in the catalog as": raw.get("alias"),
            "repository": raw.get("repo_id"),
            "digest": raw.get("digest"),
            "on": ", ".join(raw.get("nodes") or ()) or "no worker",
            "refused": raw.get("unsafe_because"),
            **_figures(profile),
            "a plan runs on": (raw.get("plan") or {}).get("backend_id"),
            "why": (raw.get("plan") or {}).get("reason"),
            "passes": ", ".join((raw.get("plan") or {}).get("specialization_pass_ids") or ()),
            "it needs": _needs(needs),
            "it waits for": raw.get("condition"),
            "no plan": raw.get("problem"),
        }
    )
    variants = raw.get("variants") or []
    if len(variants) > 1:
        say("")
        print_table(
            ("DIGEST", "SIZE", "DTYPE", "ON", "REMARK"),
            [
                (
                    (variant.get("digest") or "")[:SHORT_DIGEST],
                    bytes_in_words(variant.get("weight_bytes")),
                    variant.get("dtype"),
                    ", ".join(variant.get("nodes") or ()),
                    _remark(variant),
                )
                for variant in variants
            ],
        )
    for download in raw.get("downloads") or ():
        say(f"download  {printable(in_words(download))}")


@models.command("pull")
def pull(
    name: Annotated[
        str, typer.Argument(metavar="MODEL", help="Alias, or hub id org/name or org/name@revision.", show_default=False)
    ],
    worker: Annotated[str | None, typer.Option(help="A node's name or a worker's id; else any one that may.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the download to its end; exits 1 where it fails.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have a worker fetch a model from the hub. Asking again changes nothing."""
    with Client() as client:
        asked = client.pull(name, worker)
        download = asked.download
        if download is not None and wait:
            download = _follow(client, download, quiet=as_json)
    if as_json:
        print_json({**asked.raw, "download": None if download is None else download.raw})
    elif download is None:
        say(f"{asked.model} is on {', '.join(asked.held_by)} already.")
    else:
        say(f"{download.id}: {printable(in_words(download.raw))}")
    if wait and download is not None and download.state is DownloadState.FAILED:
        raise typer.Exit(FAILED)


def in_words(download: Mapping[str, Any]) -> str:
    """How far a download is: `org/name: 3.1 GiB of 15.0 GiB, on attic`."""
    node = download.get("node") or download.get("target")
    where = f", on {node}" if node else ""
    reason = f" ({download['reason']})" if download.get("reason") else ""
    state = download.get("state")
    if state == DownloadState.FAILED:
        return f"{download['model']}: failed{where}: {download.get('reason')}"
    if state == DownloadState.QUEUED:
        return f"{download['model']}: waits for a worker{where}{reason}"
    if state == DownloadState.DONE:
        return f"{download['model']}: done{where}"
    total = download.get("bytes_total")
    of = f" of {bytes_in_words(total)}" if total is not None else ""
    return f"{download['model']}: {bytes_in_words(download.get('bytes_done'))}{of}{where}{reason}"


def _follow(client: Client, download: Download, *, quiet: bool) -> Download:
    """Look again and again until it has ended, and say what is new."""
    pause, told = threading.Event(), ""
    while not download.state.is_final:
        words = in_words(download.raw)
        if not quiet and words != told:
            tell(printable(words))
        told = words
        pause.wait(LOOK_SECONDS)
        download = client.download(download.id)
    return download


def _remark(model: Mapping[str, Any]) -> str:
    remarks = []
    if model.get("unsafe_because"):
        remarks.append(f"refused: {model['unsafe_because']}")
    elif not model.get("nodes") and not model.get("downloads"):
        remarks.append(f"no worker has it yet ({model.get('repo_id')})")
    downloads: Iterable[Mapping[str, Any]] = model.get("downloads") or ()
    return "; ".join([*remarks, *(in_words(download) for download in downloads)])


def _figures(profile: Mapping[str, Any]) -> dict[str, object]:
    """A profile's figures that a user would ask for."""
    if not profile:
        return {}
    layers = profile.get("layer_bytes") or ()
    return {
        "folder": profile.get("path"),
        "architecture": profile.get("architecture"),
        "family": profile.get("family"),
        "kind": profile.get("kind"),
        "modalities": ", ".join(profile.get("modalities") or ()),
        "dtype": profile.get("dtype"),
        "weights": bytes_in_words(profile.get("weight_bytes")),
        "parameters": f"{profile.get('parameter_count') or 0:,}",
        "layers": f"{profile.get('layer_count')}" + (f", {bytes_in_words(max(layers))} at most" if layers else ""),
        "experts": _experts(profile),
        "KV cache": f"{bytes_in_words(profile.get('kv_bytes_per_token'))} a token",
        "sliding window": profile.get("sliding_window"),
        "context": f"{profile['max_context_tokens']:,} tokens" if profile.get("max_context_tokens") else None,
        "chat template": "yes" if profile.get("has_chat_template") else "no",
    }


def _experts(profile: Mapping[str, Any]) -> str | None:
    count = profile.get("expert_count")
    return f"{count}, {profile.get('experts_per_token')} a token" if count else None


def _needs(needs: Mapping[str, Any]) -> str:
    """What a plan requires of a worker."""
    words = [
        f"memory of {bytes_in_words(needs['memory_bytes'])}" if needs.get("memory_bytes") else None,
        f"or {bytes_in_words(needs['offloaded_bytes'])} with layers off the device"
        if needs.get("offloaded_bytes") and needs["offloaded_bytes"] != needs.get("memory_bytes")
        else None,
        f"{needs['dtype']}" if needs.get("dtype") else None,
        f"the right to download {needs['download']}" if needs.get("download") else None,
    ]
    return ", ".join(word for word in words if word)
