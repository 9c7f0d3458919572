"""Images that are inside the page."""

import base64
import io

from PIL import Image

__all__ = ["address"]


def address(image: Image.Image) -> str:
    """`image` as an address that holds it."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
