"""Who asked, over HTTP? Routes, schemas and shapes; the decisions are the coordinator's."""
