"""Does the documentation of the protocol still show the table of states?"""

from pathlib import Path

from ollm_service.core.lifecycle import diagram

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"


def test_the_diagram_is_drawn_from_the_table() -> None:
    """The Mermaid block in docs/protocol.md is what `core.lifecycle.diagram()` prints."""
    assert f"```mermaid\n{diagram()}\n```" in PROTOCOL.read_text()
