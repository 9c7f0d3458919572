"""A study in the browser: pages to look at features and search them, each with a JSON twin. Needs the extra `web`."""

from difflex.web.app import make_app
from difflex.web.guard import LOCAL, new_token

__all__ = ["LOCAL", "make_app", "new_token"]
