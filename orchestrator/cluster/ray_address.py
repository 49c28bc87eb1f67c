"""Whether a Ray answers at an address, and whether it wants a token: asked within seconds, before Ray's own client is.

Ray's client repeats a warning for 20 to 40 s before it says that it cannot connect, some of its calls wait for a
quarter of an hour, and where a token is missing it says no more than that it cannot connect. So the question that it
starts with (`CheckAlive`, of Ray's control store) is asked here once, with a deadline.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, PlacementError
from orchestrator.config.schema import ClusterConfig

LOCAL = "local"  # Ray's word for a Ray of our own
TIMEOUT_S = 5.0
AUTH_MODE = "RAY_AUTH_MODE"
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
NO_RAY = "no Ray answers at"
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


class Unreachable(PlacementError):
    """No Ray answers at an address."""


def chosen_address(cluster: ClusterConfig) -> str:
    """Where a run's Ray is: `cluster.address`, else RAY_ADDRESS, else LOCAL. One that has to be guessed is refused."""
    address = cluster.address or os.environ.get("RAY_ADDRESS") or LOCAL
    if address == "auto":
        raise ConfigError(
            f"{set_by(cluster)}=auto may find somebody else's Ray; give its address, or none to start one"
        )
    return address


def set_by(cluster: ClusterConfig) -> str:
    """Which of the two the address is from, if there is one."""
    return "cluster.address" if cluster.address else "RAY_ADDRESS"


def refuse_unreachable(address: str, where: str, timeout_s: float = TIMEOUT_S) -> None:
    """Raises Unreachable if no Ray answers at `address`, and PlacementError if it does not take the token that this
    process would send, or none. `where` is what the address was set by."""
    import grpc

    target = address.removeprefix("ray://")
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise PlacementError(f"{where}={address} is no address of a Ray: write HOST:PORT, for example 10.0.0.1:6379")
    token = ray_token()
    sent = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CHECK_ALIVE)(b"", timeout=timeout_s, metadata=sent)
        except grpc.RpcError as error:
            _refuse(error, address, where, timeout_s, token)


def _refuse(error: Any, address: str, where: str, timeout_s: float, token: str | None) -> None:
    """A server that does not know the question is another service of Ray (`ray://`), and Ray's client will tell."""
    import grpc

    code = error.code()
    if code == grpc.StatusCode.UNAUTHENTICATED:
        raise PlacementError(f"the Ray at {address} ({where}) {_about_the_token(token)}") from None
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        raise Unreachable(f"{NO_RAY} {where}={address}: nothing was heard for {timeout_s:g} s") from None
    if code == grpc.StatusCode.UNAVAILABLE:
        reason = str(error.details()).rpartition(": ")[2].rstrip("]")
        raise Unreachable(
            f"{NO_RAY} {where}={address}: {reason}. Is it running (`ray start`), and is this its GCS port "
            f"(6379 if none was given)? Without an address Troupe starts a Ray of its own"
        ) from None


def _about_the_token(token: str | None) -> str:
    if os.environ.get(AUTH_MODE) != "token":
        return (
            f"wants a token, and none was sent: {AUTH_MODE} is not set. `export {AUTH_MODE}=token`, with the cluster's "
            f"token in ~/.ray/auth_token or at {TOKEN_PATH}. (`ray start` asks for tokens by itself where that file "
            f"exists, and any Ray that a program starts for itself makes it; `{AUTH_MODE}=disabled ray start ...` "
            "starts one that asks for none)"
        )
    if token is None:
        return f"wants a token, and there is none: put it into ~/.ray/auth_token, or name its file in {TOKEN_PATH}"
    return f"takes another token than the one in {_token_place()}; it must be the same on every machine"


def ray_token() -> str | None:
    """What Ray's client sends, from where it takes it."""
    if os.environ.get(AUTH_MODE) != "token":
        return None
    if TOKEN in os.environ:
        return os.environ[TOKEN].strip()
    try:
        return Path(_token_place()).expanduser().read_text().strip() or None
    except OSError:
        return None


def _token_place() -> str:
    return TOKEN if TOKEN in os.environ else os.environ.get(TOKEN_PATH) or "~/.ray/auth_token"
