"""How does a coordinator's process start, serve and end? `python -m ollm_service.api.server`, set up by `OLLM_*` and `ollm.toml`.

Exit codes: 0 after SIGTERM or SIGINT, 1 when the database or the address cannot be had, 2 when a setting is wrong or unsafe.
"""

import os
import signal
import socket
import sys
from types import FrameType

import uvicorn

from ollm_service.api.app import create_app
from ollm_service.api.logs import log_to_stderr
from ollm_service.api.middleware import is_loopback, key_hashes
from ollm_service.bootstrap import build
from ollm_service.configuration import read_options
from ollm_service.coordinator.service import Service
from ollm_service.coordinator.upkeep import Upkeep
from ollm_service.core.errors import MisconfiguredService, OllmError
from ollm_service.core.precedence import OptionLayers
from ollm_service.settings import Settings

GRACE_SECONDS = 5
# A user who is told of a setting of this machine must not look for it on theirs.
OWNER = "the server's"


class Server(uvicorn.Server):
    """uvicorn, which says where it listens and tells long polls to end when the process is asked to."""

    def __init__(self, config: uvicorn.Config, *, url: str, service: Service) -> None:
        super().__init__(config)
        self._url = url
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        print(f"ollm_service listens on {self._url}", flush=True)  # noqa: T201 - for people, and for scripts that wait for it

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: answer what is under way and end.

        uvicorn's own would raise the signal again once it has ended, before our parts are closed.
        """
        del frame
        self._service.stopping.set()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def check_is_safe(settings: Settings) -> None:
    """Raises MisconfiguredService for a coordinator that anybody on the network could command."""
    if not key_hashes(settings.api_keys) and not is_loopback(settings.host):
        raise MisconfiguredService(
            f"OLLM_HOST is {settings.host}, which others can reach, and no API keys are set.",
            remedy="Set OLLM_API_KEYS, or listen on 127.0.0.1.",
        )


def bind(settings: Settings) -> socket.socket:
    """A bound socket; port 0 takes any free one. Raises AddressUnavailable when the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named as TCP, else asyncio leaves Nagle on, and an answer in two writes waits 40 ms for the delayed acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise AddressUnavailable(f"Cannot listen on {settings.host}:{settings.port}: {error.strerror or error}.") from error
    return bound


class AddressUnavailable(OllmError):
    """The address to listen on cannot be had."""

    code = "address_unavailable"


def serve(settings: Settings, options: OptionLayers) -> None:
    """Serve until SIGTERM or SIGINT. Raises MisconfiguredService, AddressUnavailable and DatabaseUnavailable at the start."""
    check_is_safe(settings)
    with bind(settings) as bound, build(settings, options) as service:
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        upkeep = Upkeep(service)
        upkeep.start()
        try:
            Server(config, url=_url(settings, bound), service=service).run(sockets=[bound])
        finally:
            service.stopping.set()
            upkeep.stop()


def _url(settings: Settings, bound: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{bound.getsockname()[1]}"


def main() -> int:
    """Run the process; the exit code."""
    log_to_stderr()
    try:
        serve(Settings.load(), read_options(os.environ, owner=OWNER))
    except OllmError as error:
        print(f"ollm-service: {error.message}" + (f" {error.remedy}" if error.remedy else ""), file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, MisconfiguredService) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
