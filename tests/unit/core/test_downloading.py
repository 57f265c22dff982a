"""What has to be fetched for a reference, and where will it lie?"""

from pathlib import PurePosixPath

import pytest

from ollm_service.core.catalog import CATALOG
from ollm_service.core.downloading import DownloadState, HubModel, hub_model
from ollm_service.core.errors import InvalidReference
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.planning import plan
from ollm_service.core.requirements import requirements_of

LLAMA = CATALOG["llama3-1B-chat"].repo_id


@pytest.mark.parametrize(
    ("reference", "repo_id", "revision", "folder"),
    [
        ("org/name", "org/name", None, "org--name"),
        (" hf:org/name ", "org/name", None, "org--name"),
        ("org/name@v1/rc", "org/name", "v1/rc", "org--name--v1--rc"),
        ("llama3-1B-chat", LLAMA, None, "llama3-1B-chat"),
        ("llama3-1B-chat@v1", LLAMA, "v1", "llama3-1B-chat"),
        (LLAMA, LLAMA, None, "llama3-1B-chat"),
        (f"{LLAMA}@v1", LLAMA, "v1", f"{LLAMA.replace('/', '--')}--v1"),
    ],
)
def test_a_reference_names_a_repository_and_a_folder(reference: str, repo_id: str, revision: str | None, folder: str) -> None:
    """The same that a plan for it asks for, in the folder where it is looked for afterwards."""
    model = hub_model(reference)
    assert model == HubModel(repo_id=repo_id, revision=revision, folder=folder)
    planned = plan(reference, [], RuntimeConfig())
    assert planned.plan.resolved_model.model_path == PurePosixPath(folder)
    assert requirements_of(planned.plan, None, RuntimeConfig()).download == model.reference


@pytest.mark.parametrize("reference", ["path:x", "./x", "tiny", "s3://x/y", "org/name@sha256:abcdef", "models/x", "hf:.."])
def test_what_is_not_on_the_hub_is_refused(reference: str) -> None:
    """Paths, names of folders, digests, and what would lie in a folder that means something else."""
    with pytest.raises(InvalidReference):
        hub_model(reference)


def test_a_download_ends_done_or_failed() -> None:
    """And in no other way."""
    assert [state for state in DownloadState if state.is_final] == [DownloadState.DONE, DownloadState.FAILED]
