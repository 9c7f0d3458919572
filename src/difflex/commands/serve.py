"""`difflex serve`: a study in the browser."""

import ipaddress
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.flags import StudyImagesCommand, number
from difflex.commands.inputs import load_study_model, open_study
from difflex.errors import BadInput, MissingExtra
from difflex.study import Study

if TYPE_CHECKING:
    from difflex.web import Studio

__all__ = ["ServeCommand"]

PORT = 8765
"""The default port; if it is taken, the next free one."""
TRIED = 20


@final
@dataclass(frozen=True, kw_only=True)
class ServeCommand(StudyImagesCommand):
    """Open a study in the browser: look at features where they fire, search them, and paint with them.

    The server listens on this machine alone. With --host of another address it demands a token, which it prints.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books (difflex collect), finished or growing; a file of difflex pack."""
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """The address to listen on; 0.0.0.0 for all of this machine."""
    port: Annotated[int | None, number(0, 65535), arg(help_behavior_hint="(default: 8765, or the next free one)")] = None
    """The port to listen on; 0 for any free one."""
    open: FlagCreatePairsOff[bool] = False
    """Open the page in the browser of this machine."""

    against: Annotated[Path | None, arg(metavar="STUDY")] = None
    """Another study, as of another model, whose dictionaries can be compared with those of this one."""

    def __call__(self) -> None:
        study = open_study(self.study, self)
        against = None if self.against is None else Study.open(self.against)
        try:
            import uvicorn

            from difflex.web import LOCAL, make_app, new_token
        except ModuleNotFoundError as error:
            raise MissingExtra.of(error.name or "fastapi", "web", "difflex serve") from error
        listening = _listen(self.host, self.port)
        address, port, *_ = listening.getsockname()
        is_local = ipaddress.ip_address(address).is_loopback
        token = None if is_local else new_token()
        hosts = LOCAL if is_local else (*LOCAL, *_names(self.host, address))
        name = f"[{address}]" if ":" in address else address
        url = f"http://{socket.gethostname() if ipaddress.ip_address(address).is_unspecified else name}:{port}/"
        print(f"{study.folder}: {url}{f'?token={token}' if token else ''}  (stop with Ctrl+C)", flush=True)
        if self.open:
            import webbrowser

            webbrowser.open(url + (f"?token={token}" if token else ""))
        config = uvicorn.Config(
            make_app(study, self.studio(study), hosts, token, against),
            log_level="warning",
            server_header=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,  # who waits for an image does not keep the server from ending
        )
        uvicorn.Server(config).run(sockets=[listening])

    def studio(self, study: Study) -> "Studio":
        """Return a queue for the model of an opened study, which is loaded for the first request."""
        from difflex.web import Studio

        def load():
            from difflex.web.model import PipelineFunctions, StudyModel

            pipe = load_study_model(study, self)
            functions = PipelineFunctions(pipe.shots, pipe.generate, pipe.harvest_with_images, pipe.at, pipe.sites()[0].site)
            return StudyModel(study, functions)

        def choices():
            from difflex.web.model import paint_choices

            return paint_choices(study)

        return Studio(load, choices)


def _listen(host: str, port: int | None) -> socket.socket:
    """Return a listening socket; without a port on the first free one of a few."""
    ports = range(PORT, PORT + TRIED) if port is None else [port]
    try:
        addresses = [socket.getaddrinfo(host, tried, type=socket.SOCK_STREAM)[0] for tried in ports]
    except socket.gaierror as error:
        raise BadInput(f"--host {host} is no address of this machine ({error.strerror}). Leave it out, or give one.") from error
    for tried, (family, _, _, _, address) in zip(ports, addresses, strict=True):
        try:
            # What comes from now on waits until the server is ready.
            listening = socket.create_server(address, family=family)
        except OSError as error:
            if tried == ports[-1]:
                where = f"port {tried}" if port is not None else f"ports {ports[0]} to {tried}"
                raise BadInput(f"{host}, {where}: {error.strerror}. Name a free one with --port, or 0 for any.") from error
        else:
            # Connections inherit it. Without it the body of an answer waits 40 ms until its headers are acknowledged.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return listening
    raise AssertionError("some port was tried")


def _names(host: str, address: str) -> tuple[str, ...]:
    """Return what this machine may be called in requests: what was given, its name, and its addresses."""
    names = {host, address, socket.gethostname(), socket.getfqdn()}
    with suppress(OSError):
        names |= {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    return tuple(sorted(names))
