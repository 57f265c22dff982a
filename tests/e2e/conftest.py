"""What do the end-to-end tests share? Migrated databases, and the logs of a fleet whose test failed."""

from collections.abc import Generator

import pytest

from tests.e2e.databases import fleet_database, migrated_copy, migrated_database
from tests.e2e.fleet import Fleet

__all__ = ["fleet_database", "migrated_copy", "migrated_database"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the ends of its fleet's logs."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Fleet):
                report.sections.append(("fleet", value.logs()))
    return report
