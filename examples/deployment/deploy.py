"""A whole Flower deployment with TLS and node authentication: on this machine's loopback, or with nodes elsewhere.

    python examples/deployment/deploy.py                       # the digits app, four nodes
    python examples/deployment/deploy.py examples/hospitals --data path/to/folders \\
        --allow data.source=hospitals_app:load
    python examples/deployment/deploy.py --host fl.example.org --port 8000 --nodes 2

It makes certificates and keys, starts the processes, registers the nodes, runs the app and stops everything. Each
process has a home, a log and a state folder of its own below ``--folder``, as if it were another machine. With
``--host``, the name or address at which other machines reach this one, it starts the SuperLink only, writes a folder
for each node (``FOLDER/nodes/K``: the authority's certificate, the node's key, ``start.sh``) and waits until all of
them have been started on their machines; docs/hosts.md goes through it. The model lies in ``FOLDER/run`` in the end.
"""

from __future__ import annotations

import argparse
import datetime as dt
import ipaddress
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HERE = Path(__file__).parent
_RARELY = 4  # times as long between two looks for a run's end as a look takes
DIGITS = HERE.parent / "digits"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the nodes have secateur already
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds; Flower's own default is 1
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
}


def authority(folder: Path, hosts: tuple[str, ...] = ("localhost", "127.0.0.1")) -> Path:
    """Make a certificate authority and a server certificate for ``hosts``; return the authority's certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    now = dt.datetime.now(dt.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "secateur try-out CA")])

    def certificate(name: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(name).issuer_name(ca_name).public_key(public)
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(minutes=5))
        made = made.not_valid_after(now + dt.timedelta(days=30))
        return made.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)

    ca = certificate(ca_name, ca_key.public_key(), ca=True).add_extension(
        x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        ), critical=True,
    ).sign(ca_key, hashes.SHA256())  # fmt: skip
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    server = certificate(subject, key.public_key(), ca=False)
    server = server.add_extension(x509.SubjectAlternativeName(names), critical=False)
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(ca.public_bytes(pem))
    (folder / "server.pem").write_bytes(server.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    _private(folder / "server.key", key)
    return folder / "ca.crt"


def node_key(folder: Path, name: str) -> Path:
    """Make a node's key pair; return the private key's path, beside which ``.pub`` lies."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    ssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(*ssh))
    return _private(folder / name, key, serialization.PrivateFormat.OpenSSH)


def _private(
    path: Path, key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.TraditionalOpenSSL,
) -> Path:  # fmt: skip
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return path


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Deployment:
    """SuperLink and SuperNodes as child processes; all are stopped at the end of the ``with`` block.

    Args:
        folder: of certificates, keys, logs and homes.
        port: of the SuperLink; None: a free one.
        host: the name or address at which nodes reach the SuperLink. Any but loopback's lets it listen everywhere.
    """

    def __init__(self, folder: Path, port: int | None = None, host: str = "127.0.0.1") -> None:
        self.folder, self.host, self.local = folder.absolute(), host, "127.0.0.1"
        self.ca = authority(self.folder / "certificates", tuple(dict.fromkeys((host, "localhost", "127.0.0.1"))))
        self.port = port or free_port()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise SystemExit(f"port {self.port} is in use: stop what listens there, or give another with --port")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.nodes: dict[str, str] = {}

    def __enter__(self) -> Self:
        """Start the SuperLink."""
        self.start_superlink()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop everything."""
        for name in list(self.processes):
            self.stop(name)

    def _home(self, name: str) -> dict[str, str]:
        home = self.folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        homes = {"FLWR_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
        return {**os.environ, **QUIET, **homes, "PATH": path}

    def _start(self, name: str, *command: str) -> None:
        full = [str(Path(sysconfig.get_path("scripts")) / command[0]), *command[1:]]
        print("$", " ".join(repr(part) if " " in part else part for part in command), flush=True)
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command_of(name, full),
                env=self._home(name),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def command_of(self, name: str, command: list[str]) -> list[str]:
        """Return the command that starts a process here; a network of its own, for example, would stand before it."""
        del name
        return command

    def log(self, name: str) -> Path:
        """Return a process's log."""
        return self.folder / f"{name}.log"

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it listens."""
        place = self.folder / "certificates"
        self._start(
            "superlink", "flower-superlink", "--host", "127.0.0.1" if self.host == "127.0.0.1" else "0.0.0.0",  # noqa: S104 -- other machines are to reach it
            "--port", str(self.port), "--enable-supernode-auth",
            "--ssl-ca-certfile", str(self.ca), "--ssl-certfile", str(place / "server.pem"),
            "--ssl-keyfile", str(place / "server.key"), "--disable-runtime-dependency-installation",
            "--database", str(self.folder / "superlink.db"),  # without it a restart forgets the nodes
        )  # fmt: skip
        end = time.monotonic() + 60
        with socket.socket() as probe:
            while probe.connect_ex((self.local, self.port)) != 0:
                if self.processes["superlink"].poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the SuperLink did not start; see {self.log('superlink')}")
                time.sleep(0.2)
        connection = f'address = "{self.local}:{self.port}"\nroot-certificates = "{self.ca}"\n'
        config = Path(self._home("cli")["FLWR_HOME"]) / "config.toml"
        config.write_text(f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{connection}')

    def start_node(self, name: str, config: str, *, register: bool = True, ca: Path | None = None) -> None:
        """Start a SuperNode with a node configuration; its key is made and registered the first time.

        A node that was killed is started again only when the SuperLink has noticed: Flower 1.41 lets a second session
        of a key in no sooner, and a SuperNode that was turned away once does not ask again.
        """
        key = self.folder / "keys" / name
        if not key.exists():
            node_key(key.parent, name)
            if register:
                self.register(name)
        elif name in self.nodes:
            while self.online(name):
                time.sleep(2)
        self._start(name, *self.node_command(str(ca or self.ca), str(key), config), "--port", str(free_port()))

    def node_command(self, ca: str, key: str, config: str) -> list[str]:
        """Return the command that starts a node."""
        return [
            "python", "-m", "secateur.flower.supernode", "--superlink", f"{self.host}:{self.port}",
            "--root-certificates", ca, "--auth-supernode-private-key", key, "--node-config", config,
        ]  # fmt: skip

    def register(self, name: str) -> None:
        """Let the SuperLink know a node's public key."""
        public = self.folder / "keys" / f"{name}.pub"
        self.nodes[name] = str(self._told("supernode", "register", str(public), "here")["node-id"])

    def pack_node(self, name: str, config: str) -> Path:
        """Write a folder with all that another machine needs to be a node, and register it; return the folder."""
        folder = self.folder / "nodes" / name
        key = self.folder / "keys" / name
        if not key.exists():
            node_key(key.parent, name)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.ca, folder / "ca.crt")
        shutil.copy(key, folder / "key")  # with its permissions
        command = shlex.join(self.node_command("ca.crt", "key", config))
        quiet = "".join(f"export {key}={value}\n" for key, value in QUIET.items())
        (folder / "start.sh").write_text(
            f"#!/bin/sh\n# starts this node; what is said behind start.sh is given to flower-supernode\n"
            f'cd "$(dirname "$0")" || exit 1\n{quiet}exec {command} "$@"\n'
        )
        self.register(name)
        return folder

    def wait_for_nodes(self, seconds: float) -> None:
        """Wait until all registered nodes are online.

        Raises:
            SystemExit: some are not within these seconds.
        """
        end = time.monotonic() + seconds
        while missing := [name for name in self.nodes if not self.online(name)]:
            if time.monotonic() > end:
                raise SystemExit(
                    f"not online within {seconds:g} s: {', '.join(missing)}. Is {self.host}:{self.port} reachable from "
                    f"there, and start.sh running? See {self.log('superlink')}"
                )
            time.sleep(2)

    def online(self, name: str) -> bool:
        """Return whether the SuperLink takes a node for connected; it notices a killed one within a minute."""
        listed = self._told("supernode", "list", "here")["nodes"]
        return any(str(node["node-id"]) == self.nodes.get(name) and node["status"] == "online" for node in listed)

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a process and all that it started; ``SIGKILL`` gives it no time for anything."""
        process = self.processes.pop(name)
        for sign in (how, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
            except ProcessLookupError:
                break
            if sign is not signal.SIGKILL:
                end = time.monotonic() + 10
                while process.poll() is None and time.monotonic() < end:
                    time.sleep(0.1)
        process.wait(30)

    def flwr(self, *command: str) -> str:
        """Run a ``flwr`` command; return what it prints."""
        done = subprocess.run(
            [str(Path(sysconfig.get_path("scripts")) / "flwr"), *command],
            env=self._home("cli"), capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"flwr {' '.join(command)} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def _told(self, *command: str) -> dict[str, Any]:
        """Run a ``flwr`` command that answers in JSON, after whatever else it prints."""
        out = self.flwr(*command, "--format", "json")
        return dict(json.loads(out[out.index("{") :]))

    def submit(self, app: Path, **settings: str | float) -> str:
        """Start an app's run; return its number."""
        shown = " ".join(f"{k}={json.dumps(v)}" for k, v in settings.items())
        print("$ flwr run", app, "--run-config", repr(shown), flush=True)
        return str(self._told("run", str(app), "here", "--run-config", shown)["run-id"])

    def status(self, run: str) -> str:
        """Return a run's status as Flower words it, such as ``finished:completed``."""
        return str(self._told("list", "here", "--run-id", run)["runs"][0]["status"])

    def wait(self, run: str, seconds: float = 3600.0) -> str:
        """Wait for a run's end, showing secateur's lines as they come; return its status.

        Each look starts two ``flwr`` commands, which take seconds of this machine's time; it looks the more rarely, the
        longer they take, so that the run is not what has to wait.
        """
        end, shown = time.monotonic() + seconds, 0
        while (begun := time.monotonic()) < end:
            status = self.status(run)
            lines = [line for line in self.flwr("log", run, "here", "--show").splitlines() if "secateur: " in line]
            for line in lines[shown:]:
                print(line.partition("secateur: ")[2], flush=True)
            shown = len(lines)
            if status.startswith("finished"):
                return status
            time.sleep(_RARELY * (time.monotonic() - begun))
        raise SystemExit(f"run {run} did not end within {seconds:g} s; see the logs in {self.folder}")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("app", nargs="?", type=Path, default=DIGITS, help="a Flower app; default: examples/digits")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/deployment"))
    parser.add_argument("--port", type=int, help="of the SuperLink; default: a free one")
    parser.add_argument(
        "--host", help="the name or address of this machine for nodes elsewhere, which start themselves"
    )
    parser.add_argument("--wait", type=float, default=3600.0, help="with --host: seconds for all nodes to be started")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with one folder a node: 0, 1, ...; with --host: of each node's own machine; "
        "default: the app's own data",
    )
    parser.add_argument("--allow", help="what of the app's own the nodes trust, such as data.source=hospitals_app:load")
    parser.add_argument("--set", dest="settings", help="in place of the app's set, such as 'rounds=3 seed=1'")
    given = parser.parse_args()
    with Deployment(given.folder, given.port, given.host or "127.0.0.1") as here:
        for k in range(given.nodes):
            config = f'partition-id={k} state="{"state" if given.host else here.folder / "state" / str(k)}"'
            if given.data:
                config += f' data="{given.data if given.host else (given.data / str(k)).absolute()}"'
            if given.allow:
                config += f' allow="{given.allow}"'
            if given.host:
                print(
                    f"node {k}: copy {here.pack_node(str(k), config)} to its machine, and run there: sh start.sh",
                    flush=True,
                )
            else:
                here.start_node(f"node{k}", config)
        if given.host:
            print(f"waiting for {given.nodes} nodes at {here.host}:{here.port}", flush=True)
            here.wait_for_nodes(given.wait)
        more = {"set": given.settings} if given.settings else {}
        run = here.submit(given.app, out=str(here.folder / "run"), **more)
        status = here.wait(run)
    print(f"{status}; logs and the run folder are in {here.folder}")
    return 0 if status == "finished:completed" else 1


if __name__ == "__main__":
    sys.exit(main())
