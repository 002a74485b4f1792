"""Flower between machines: the link that carries messages, and both of its ends, each in a process of pplr's own.

Flower ships an app's code from whoever starts a run to the server and to every client, and runs it there. Here neither
end runs what is shipped: the server's app and the clients' are pplr's own, in processes that their owners start, which
take the tasks meant for them from the link. So no client runs a server's code, and what a client holds (its model, its
data, its optimizer) stays in memory from one message to the next.

Whoever starts runs, or says which nodes there are, shows the operator's token; whoever takes the server's tasks signs
with the same secret. This is the one module that touches what flwr does not promise to keep, so flwr is pinned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from pplr.runtimes.flower_settings import QUIET

os.environ |= QUIET  # read when flwr is imported

from flwr.app import Context, Error, Message
from flwr.cli.build import build_fab_from_files
from flwr.clientapp import ClientApp
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.runtime.tracing import RuntimeTracingInterceptor
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from pplr.errors import FederationError
from pplr.runtimes.address import LinkAddress
from pplr.storage import sha256_bytes

__all__ = ["Operator", "answer_messages", "link_errors", "serve_link", "server_grid"]

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_POLL_S = 0.2
_TASK_S = 60.0
_PATIENCE_S = 30.0
_BUSY = (502, 503, 504)
_APP = {
    "pyproject.toml": b"""[project]
name = "pplr-run"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "pplr"
[tool.flwr.app.components]
serverapp = "pplr_run:server"
clientapp = "pplr_run:client"
""",
    "pplr_run.py": b'raise RuntimeError("this is run by pplr server and pplr client alone")\n',
}
"""What a run ships: nothing that can be run."""


# -- the link ---------------------------------------------------------------------------------------------------


class _OperatorAlone(NoOpControlAuthnPlugin):
    """Lets whoever shows the operator's token start runs and say which nodes there are, and nobody else."""

    def __init__(self, secret: bytes) -> None:
        self._token = _token(secret)

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        shown = [value for _, value in metadata]
        if len(shown) != 1 or not hmac.compare_digest(str(shown[0]).encode(), self._token.encode()):
            return False, None
        return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        return None, None


def _token(secret: bytes) -> str:
    """Derive what is shown from what is kept: the secret itself signs, and never travels."""
    return hmac.new(secret, b"pplr operator", "sha256").hexdigest()


def serve_link(host: str, port: int, files: Path, secret_file: Path) -> None:
    """Serve a link until this process is told to end.

    It keeps nothing on disk: who may join is told to it anew, and a run that was under way goes on from the checkpoint
    of its operator. A link that remembered messages would hand out those of runs that nobody carries on, whose
    contents it has lost, and nodes would wait for them.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        files: Folder with ``ca.crt``, ``server/server.crt`` and ``server/server.key``.
        secret_file: Of the operator.
    """
    import uvicorn
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
    from flwr.superlink.main import create_app

    before = sys.argv
    sys.argv = [
        "flower-superlink",
        *("--host", host, "--port", str(port), "--database", FLWR_IN_MEMORY_DB_NAME, "--isolation", "process"),
        *("--ssl-ca-certfile", str(files / "ca.crt"), "--ssl-certfile", str(files / "server" / "server.crt")),
        *("--ssl-keyfile", str(files / "server" / "server.key"), "--enable-supernode-auth"),
        *("--disable-runtime-dependency-installation", "--superexec-auth-secret-file", str(secret_file)),
    ]
    try:
        config = _parse_superlink_lifespan_config()
    finally:
        sys.argv = before
    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = dataclasses.replace(config, authn_plugin=_OperatorAlone(secret_file.read_bytes()))
    uvicorn.run(
        create_app(config, SuperLinkLifespan),
        host=host,
        port=port,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        workers=1,
        access_log=False,
        log_level="warning",
    )


# -- the operator -----------------------------------------------------------------------------------------------


class _ShowToken:
    """Puts the operator's token on every request."""

    def __init__(self, secret: bytes) -> None:
        self._value = f"Bearer {_token(secret)}"

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        context.request.headers["authorization"] = self._value
        return call_next(context)


class Operator:
    """What an operator asks of a link.

    Args:
        link: With the operator's secret.
    """

    def __init__(self, link: LinkAddress) -> None:
        self._control = ControlHttpClient.from_server_address(
            server_address=link.address,
            insecure=False,
            root_certificates=link.ca_pem,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI"), _ShowToken(link.secret)],
        )

    def nodes(self) -> dict[bytes, int]:
        """List the registered nodes, by public key."""
        listed = self._control.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: node.node_id for node in listed if node.status != "unregistered"}

    def register(self, public_key_pem: bytes) -> None:
        """Let the holder of a key join."""
        self._control.RegisterNode(RegisterNodeRequest(public_key=public_key_pem))

    def unregister(self, node_id: int) -> None:
        """Let a node join no more; its messages are refused from now on."""
        self._control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start_run(self) -> int:
        """Open a run, and return its number."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a library that flwr uses
            content, _ = build_fab_from_files(_APP)
        fab = Fab(sha256_bytes(content), content, {})
        return int(self._control.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id)

    def close(self) -> None:
        """End the connection."""
        self._control.close()


def _runtime(address: str, ca_pem: bytes | None, *interceptors: Any) -> RuntimeHttpClient:
    """Connect to a runtime interface; without a certificate to a node's own, on loopback.

    Nothing is tried again by Flower: its way of doing so interrupts the whole process where a request is refused.
    """
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=ca_pem is None,
        root_certificates=ca_pem,
        interceptors=[RuntimeTracingInterceptor(), *interceptors],
        retry_invoker=None,
    )


class _Patience:
    """Asks again for half a minute while a link does not answer; a refusal counts at once.

    It stands where Flower's own stands, which never gives up, and interrupts the whole process at a refusal.
    """

    def invoke(self, ask: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Ask, and return the answer."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return ask(*arguments, **options)
            except httpx.TransportError:
                if time.monotonic() > until:
                    raise
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in _BUSY or time.monotonic() > until:
                    raise
            time.sleep(1.0)


def _heartbeat(client: RuntimeHttpClient) -> Callable[[], bool]:
    """Make what says that a task is being carried out; whoever is told otherwise notices it at the next request."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    return beat


@contextlib.contextmanager
def link_errors(address: str) -> Iterator[None]:
    """Turn what goes wrong on the way to a link into an error that says what to do."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise FederationError(
            f"the link at {address} refuses ({error.response.status_code})",
            cure="Give the folders of the server that runs there; a revoked or foreign kit is not let in.",
        ) from error
    except httpx.HTTPError as error:
        raise FederationError(
            f"the link at {address} does not answer ({type(error).__name__})",
            cure="See to `pplr server`, then go on with --resume.",
        ) from error


@contextlib.contextmanager
def server_grid(link: LinkAddress, run_id: int) -> Iterator[tuple[Grid, Context]]:
    """Take the server's task of a run, and reach the nodes while inside.

    Raises:
        FederationError: It does not come within a minute.
    """
    signed = SuperExecAuthHttpInterceptor(master_secret=link.secret, protected_methods=_ACQUIRE)
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    asking = _runtime(link.address, link.ca_pem, version, signed)
    until = time.monotonic() + _TASK_S
    try:
        while True:  # tasks of runs whose operator was killed may come first
            told = asking.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if told.HasField("task") and told.token and told.task.run_id == run_id:
                break
            if time.monotonic() > until:
                raise FederationError(
                    f"the link did not hand out the run within {_TASK_S:.0f} s", cure="See to `pplr server`."
                )
            time.sleep(_POLL_S)
    finally:
        asking.close()
    grid = HttpGrid(runtime_api_address=link.address, root_certificates=link.ca_pem, token=told.token)
    grid._retry_invoker = _Patience()  # type: ignore[assignment]
    client = grid._runtime_client
    beating = HeartbeatSender(_heartbeat(client))
    beating.start()
    status, details = SubStatus.FAILED, "it did not end"
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        yield grid, context_from_proto(given.context)
        status, details = SubStatus.COMPLETED, ""
    except BaseException as error:
        details = str(error)
        raise
    finally:
        with contextlib.suppress(Exception):  # the link may be gone; what is raised already says more
            client.PushTaskOutput(PushTaskOutputRequest(context=None, sub_status=status, details=details))
        beating.stop()
        grid.close()


# -- a client ---------------------------------------------------------------------------------------------------


def answer_messages(
    address: str, secret: bytes, app: ClientApp, stopping: threading.Event, note: Callable[[str], None]
) -> None:
    """Take the messages that reach a node and answer them in this process, one after the other, until told to stop.

    Args:
        address: Of the node's own interface, on loopback.
        secret: Shared with the node, so that no other process of the machine takes its messages.
        app: Answers a message.
        stopping: Ends this.
        note: Told of every message that could not be answered, and why.
    """
    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE)
    asking = _runtime(address, None, RuntimeVersionHttpInterceptor(component_name="SuperExec"), signed)
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    try:
        while not stopping.is_set():
            try:
                told = asking.AcquireTask(request)
            except httpx.HTTPError as error:  # the node may be starting, or busy; if it has ended, somebody stops this
                note(f"this client's node does not answer ({type(error).__name__})")
                stopping.wait(1.0)
                continue
            if told.HasField("task") and told.token:
                _answer(address, told.token, app, note)
            else:
                stopping.wait(_POLL_S)
    finally:
        asking.close()


def _answer(address: str, token: str, app: ClientApp, note: Callable[[str], None]) -> None:
    version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    client = _runtime(address, None, version, RuntimeTokenHttpInterceptor(token))
    beating = HeartbeatSender(_heartbeat(client))
    beating.start()
    status, details = SubStatus.COMPLETED, ""
    context: Context | None = None
    try:
        message, context, _, _ = pull_task_input(client)
        try:
            reply = app(message=message, context=context)
        except Exception as error:  # the server is told, and decides
            status, details = SubStatus.FAILED, f"{type(error).__name__}: {error}"
            note(details)
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=details), reply_to=message)
        push_message(client, reply, context)
    except Exception as error:
        status, details = SubStatus.FAILED, f"{type(error).__name__}: {error}"
        note(f"a message could not be answered ({details})")
    finally:
        push_task_output(client=client, context=context, sub_status=status, details=details)
        beating.stop()
        client.close()
