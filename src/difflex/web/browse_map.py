"""The addresses of the map of a dictionary."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response

from difflex.web.answers import MapAnswer
from difflex.web.catalogue import Catalogue
from difflex.web.mapping import COLOURS
from difflex.web.pages import Pages

BYTES = "application/octet-stream"


def add_map(app: FastAPI, catalogue: Catalogue, pages: Pages) -> None:
    """Add the page of a map and its data."""

    @app.get("/api/dictionaries/{site}/{label}/map")
    def map_data(site: str, label: str) -> MapAnswer:
        """The map of a dictionary, or how much of it is computed: the first request begins it, and it is kept in memory."""
        return catalogue.map(catalogue.find(site, label))

    @app.get("/api/dictionaries/{site}/{label}/map/places", response_class=Response)
    def places(site: str, label: str) -> Response:
        """The places of all features on the map: two little-endian uint16 for each, x and y; 65535 for one without neighbours."""
        return Response(catalogue.maps.places(catalogue.find(site, label)).tobytes(), media_type=BYTES)

    @app.get("/api/dictionaries/{site}/{label}/map/colours/{column}", response_class=Response)
    def colours(site: str, label: str, column: str) -> Response:
        """A byte for each feature: from 0 to 254 on the scale of a column, or the number of its concept in the legend.

        255 says that there is no value; the number after the last of the legend is of any other concept.
        """
        return Response(catalogue.map_colours(catalogue.find(site, label), column), media_type=BYTES)

    @app.get("/map/{site}/{label}", include_in_schema=False)
    def map_page(site: str, label: str, colour: str = "", feature: int = -1) -> Response:
        ref = catalogue.find(site, label)
        answer = catalogue.map(ref)
        return pages.render(
            "map.html",
            title=f"Map of {ref}",
            map=answer,
            colours=COLOURS,
            colour=colour if colour in COLOURS else COLOURS[0],
            concepts=catalogue.concepts(ref),
            marked=feature,
        )
