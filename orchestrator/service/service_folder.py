"""How commands on this machine find the service of a folder of runs, and its token.

RUNS/.service/        0700, this user's
  token               made when a service first starts here, and kept
  service.json        the URL of the service that started last, and its process
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from actors.errors import ConfigError

FOLDER, TOKEN_FILE, ADDRESS_FILE = ".service", "token", "service.json"
TOKEN_VARIABLE, URL_VARIABLE = "TROUPE_TOKEN", "TROUPE_URL"


def service_folder(runs: Path) -> Path:
    """Made if it is not there. Raises ConfigError if others can look into it."""
    folder = runs / FOLDER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--runs {runs}: no folder can be made there: {error}") from None
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder} holds the service's token, and others can open it: `chmod 700 {folder}`")
    return folder


def token_of(runs: Path, file: Path | None) -> str:
    """The token of a service that is to start: that of `file`, else TROUPE_TOKEN, else the one kept with the runs,
    which is made if need be."""
    if file is not None:
        try:
            return file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {file} cannot be read: {error}") from None
    if TOKEN_VARIABLE in os.environ:
        return os.environ[TOKEN_VARIABLE].strip()
    return kept_token(service_folder(runs) / TOKEN_FILE, secrets.token_urlsafe(32))


def kept_token(file: Path, new: str) -> str:
    """The token in that file, which is made with `new` if it is not there: whole or not at all, whenever the process is
    killed. Of several processes that make it all get that of the first. Raises ConfigError if there is none in it."""
    if not file.exists():
        temporary = _temporary(file)
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                stream.write(new)
            _linked(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    token = file.read_text().strip()
    if not token:
        raise ConfigError(f"there is no token in {file}: end what was started with it, and delete the file")
    return token


def _linked(temporary: Path, file: Path) -> None:
    """Unlike a rename this replaces nothing. Where the file system has no hard links a rename must do: two processes
    that make the token at the same moment may have different ones there."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        pass
    except OSError:
        temporary.replace(file)


def write_whole(file: Path, content: Any) -> None:
    """As JSON: whole, or the file is as it was before."""
    temporary = _temporary(file)
    try:
        temporary.write_text(json.dumps(content, indent=2))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}-{secrets.token_hex(4)}")


def announce(runs: Path, url: str) -> None:
    """From now on commands find the service, which is this process, at this URL."""
    write_whole(service_folder(runs) / ADDRESS_FILE, {"url": url, "pid": os.getpid()})


def url_of_process(runs: Path, pid: int) -> str | None:
    """Of the service that process is; None until it takes connections, and if another service started after it."""
    said = json.loads(_text(runs / FOLDER / ADDRESS_FILE) or "{}")
    return said["url"] if said.get("pid") == pid else None


def found_service(runs: Path, url: str | None) -> tuple[str, str | None]:
    """(URL, token) for a client: `url`, else TROUPE_URL, else what is kept with the runs; the token from TROUPE_TOKEN,
    else what is kept. Raises ConfigError if there is no URL."""
    kept = runs / FOLDER
    token = os.environ.get(TOKEN_VARIABLE, "").strip() or _text(kept / TOKEN_FILE)
    url = url or os.environ.get(URL_VARIABLE)
    if url is None and (said := _text(kept / ADDRESS_FILE)):
        url = json.loads(said)["url"]
    if url is None:
        raise ConfigError(
            f"no service is known for the runs in {runs}: start one by `troupe serve --runs {runs}`, or say where it "
            f"is by --url or {URL_VARIABLE}, and its token in {TOKEN_VARIABLE}"
        )
    return url.rstrip("/"), token


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip() or None
    except OSError:
        return None
