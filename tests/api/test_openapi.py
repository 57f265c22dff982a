"""Is the API's description complete and true?"""

import json
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient


def document_of(http: TestClient) -> dict[str, Any]:
    """The OpenAPI document."""
    document: dict[str, Any] = http.get("/openapi.json").json()
    return document


def test_every_operation_has_an_id_a_tag_and_a_summary(http: TestClient) -> None:
    """Ids are unique, and tags are those that are described."""
    document = document_of(http)
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)
    tags = {tag["name"] for tag in document["tags"]}
    assert all(operation["summary"] and set(operation["tags"]) <= tags for operation in operations)


def test_every_reference_points_at_something(http: TestClient) -> None:
    """The bodies that endpoints parse themselves are in the document, too."""
    document = document_of(http)
    text = json.dumps(document)
    for part in text.split('"$ref": "')[1:]:
        name = part.partition('"')[0].removeprefix("#/components/schemas/")
        assert name in document["components"]["schemas"]
    assert "HTTPValidationError" not in text
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/JobRequest"}


def test_errors_are_described_as_they_are(http: TestClient) -> None:
    """Every documented error answer is the envelope, and the health endpoints need no key."""
    document = document_of(http)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (path, status)
    assert document["paths"]["/healthz"]["get"]["security"] == []


def test_the_page_about_the_api_names_every_endpoint(http: TestClient) -> None:
    """Method and path, in the table at its top, and no other."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    told = {line.split("`")[1] for line in page.splitlines() if line.startswith(("| `GET /", "| `POST /"))}
    document = document_of(http)
    assert told == {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
