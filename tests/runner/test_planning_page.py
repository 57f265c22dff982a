"""Are the examples on the planning page what planning, placement and the runner really do?"""

from scripts.write_planning_page import PAGE, page


def test_the_examples_are_what_happens() -> None:
    """Planned, placed and run again, they read the same; `make pages` writes them."""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text
    for outcome in ("Applied", "Fallback", "Generic", "Not executable", "Unplaceable"):
        assert f"### {outcome}\n" in text
