"""What does the chaos test share with the end-to-end tests? Its migrated database."""

from tests.e2e.databases import migrated_copy, migrated_database

__all__ = ["migrated_copy", "migrated_database"]
