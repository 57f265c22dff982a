"""How are models seen, and fetched from the hub, over HTTP?"""

from typing import Annotated

from fastapi import APIRouter, Query, Response, status

from ollm_service.api.model_shapes import (
    DownloadsBody,
    ModelDetailBody,
    ModelsBody,
    PullBody,
    model_detail_body,
    models_body,
    pull_body,
)
from ollm_service.api.openapi import body_of, failures
from ollm_service.api.requests import PullRequest, parse_body
from ollm_service.api.routes.access import DownloadId, RawBody, ServiceHere
from ollm_service.api.shapes import DownloadBody, download_body
from ollm_service.coordinator.models import held_models, pull, show_model, telling_downloads

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models", operation_id="listModels", summary="List models", responses=failures(401, 503))
def list_models(service: ServiceHere) -> ModelsBody:
    """The models that workers have, refused ones with the reason, the aliases that are always known, and what is on its way."""
    downloads = telling_downloads(service.store.downloads.list())
    return models_body(held_models(service.fleet.fresh().workers), downloads)


@router.post(
    "/models/pull",
    operation_id="pullModel",
    summary="Have a worker fetch a model",
    status_code=status.HTTP_202_ACCEPTED,
    openapi_extra=body_of(PullRequest),
    responses=failures(400, 401, 404, 409, 413, 503),
)
def pull_model(service: ServiceHere, raw: RawBody, response: Response) -> PullBody:
    """Ask for a model of the hub; a worker that its operator allows it fetches it. Asking twice changes nothing.

    Where it is there already, the answer is 200 and names who has it.
    """
    body, _ = parse_body(PullRequest, raw)
    pulled = pull(service, body.model, body.worker)
    if pulled.download is None:
        response.status_code = status.HTTP_200_OK
    else:
        response.headers["location"] = f"/v1/downloads/{pulled.download.download_id}"
    return pull_body(pulled)


@router.get("/models/{model:path}", operation_id="getModel", summary="Show a model", responses=failures(400, 401, 404, 503))
def get_model(service: ServiceHere, model: str) -> ModelDetailBody:
    """Everything of the model that an alias, a hub id, a path or a folder's name means: each digest, and what a plan needs."""
    return model_detail_body(show_model(service, model))


@router.get("/downloads", operation_id="listDownloads", summary="List downloads", responses=failures(401, 503))
def list_downloads(
    service: ServiceHere, model: Annotated[str | None, Query(description="Only of this `org/name[@revision]`.")] = None
) -> DownloadsBody:
    """Downloads of the last week, the newest first."""
    return DownloadsBody(data=[download_body(download) for download in service.store.downloads.list(reference=model)])


@router.get("/downloads/{download_id}", operation_id="getDownload", summary="Show a download", responses=failures(401, 404, 503))
def get_download(service: ServiceHere, download_id: DownloadId) -> DownloadBody:
    """How far one download is."""
    return download_body(service.store.downloads.get(download_id))
