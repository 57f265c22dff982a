"""What answers on HTTP? The FastAPI app: its routes, its errors, and what every request passes first."""

from functools import partial

from fastapi import FastAPI

from ollm_service import __version__
from ollm_service.api.errors import install_error_responses
from ollm_service.api.middleware import BodyLimit, Doorkeeper, RequestLog, key_hashes
from ollm_service.api.openapi import describe
from ollm_service.api.routes import fleet, health, jobs, models, plans
from ollm_service.coordinator.service import Service


def create_app(service: Service) -> FastAPI:
    """The app of one coordinator. It neither starts nor closes the service."""
    app = FastAPI(
        title="ollm_service",
        version=__version__,
        summary="Durable offline LLM jobs across mixed machines.",
        description="See what will run where and why, before it runs. Every error has a code and a remedy.",
        redoc_url=None,
    )
    app.state.service = service
    for module in (jobs, plans, fleet, models, health):
        app.include_router(module.router)
    install_error_responses(app)
    app.openapi = partial(describe, app)  # type: ignore[method-assign]  # FastAPI's documented way to extend its document
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, most_bytes=service.settings.max_body_bytes)
    app.add_middleware(Doorkeeper, key_hashes=key_hashes(service.settings.api_keys))
    app.add_middleware(RequestLog)
    return app
