"""What may a user import? The client, the option types and the plan; each is loaded when first asked for.

The root stays free of imports, so that `workers.runner`, which needs `ollm_service.core` alone, runs where only torch and
transformers are installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ollm_service.client import Client as Client
    from ollm_service.core.options import GenerationConfig as GenerationConfig
    from ollm_service.core.options import RuntimeConfig as RuntimeConfig
    from ollm_service.core.plan import RuntimePlan as RuntimePlan

__version__ = "0.1.0"
__all__ = ["Client", "GenerationConfig", "RuntimeConfig", "RuntimePlan", "__version__"]

_HOMES = {
    "Client": "ollm_service.client",
    "GenerationConfig": "ollm_service.core.options",
    "RuntimeConfig": "ollm_service.core.options",
    "RuntimePlan": "ollm_service.core.plan",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
