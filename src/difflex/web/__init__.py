"""A study in the browser: pages to look at features, search them and paint with them, each with a JSON twin. Extra: `web`."""

from difflex.web.app import make_app
from difflex.web.client import Client
from difflex.web.export import export_html
from difflex.web.guard import LOCAL, new_token
from difflex.web.studio import Studio

__all__ = ["LOCAL", "Client", "Studio", "export_html", "make_app", "new_token"]
