"""How is the command run where it is not in PATH? `python -m ollm_service.cli`."""

from ollm_service.cli.app import main

if __name__ == "__main__":
    main()
