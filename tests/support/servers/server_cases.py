"""Settings of runs whose teacher or sampler is a stub server."""

from __future__ import annotations

from stub_server import StubServer


def served(role: str, stub: StubServer, **options: object) -> dict[str, object]:
    """role: "teacher" or "sampling"."""
    settings = {"url": stub.url, "model": "stub", "retries": 1, **options}
    own: dict[str, object] = {"teacher__path": ""} if role == "teacher" else {}
    return own | {f"{role}__server__{name}": value for name, value in settings.items()}
