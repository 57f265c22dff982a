"""How does a person at a terminal use the service? The command `ollm-service`, a thin user of the client."""

from ollm_service.cli.app import main

__all__ = ["main"]
