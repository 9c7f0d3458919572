"""Answers of the studio as they come: a JSON object on each line, until the work is done or the reader has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from difflex.web.studio import Event, Studio, Work

LINES = "application/x-ndjson"


def stream(studio: Studio, client: str, work: Work) -> StreamingResponse:
    """Queue work and return the answer with its events; when the reader goes away, the work is cancelled."""
    events, loop = asyncio.Queue[Event | None](), asyncio.get_running_loop()

    def send(event: Event | None) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    job = studio.submit(client, work, send)

    async def lines() -> AsyncIterator[str]:
        try:
            while (event := await events.get()) is not None:
                yield json.dumps(event) + "\n"
        finally:
            job.cancel()

    return StreamingResponse(lines(), media_type=LINES, headers={"cache-control": "no-store"})
