"""How is the database brought to this version? A program of its own: `python -m ollm_service.cli.schema`.

The command line runs it as a process, since it needs the whole of the service, which every other command starts faster without.
Exit codes: 0 when the schema is current, 1 when the database cannot be reached, 2 when a setting is wrong.
"""

import sys

from ollm_service.bootstrap import upgrade
from ollm_service.cli.output import exit_code, report
from ollm_service.core.errors import OllmError
from ollm_service.settings import Settings


def main() -> int:
    """Upgrade; the exit code."""
    try:
        upgrade(Settings.load())
    except OllmError as error:
        report(error, as_json=False)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
