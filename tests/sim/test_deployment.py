"""A federation of separate processes: a SuperLink with TLS, and SuperNodes that prove who they are."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sim.environment import QUIET
from sim.local import run_local
from sim.processes import Family
from tests.sim.tiny import assert_same, overrides, tiny

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180.0
NODES = 2
ASKED = ("clients=2", "strategy=fedavg", "rounds=2")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def certify(folder: Path) -> None:
    """``ca.crt``, and ``server.pem`` with ``server.key``, signed by it for 127.0.0.1."""
    now, keys = datetime.datetime.now(datetime.UTC), {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    names = {name: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in keys}
    for name, file in (("ca", "ca.crt"), ("server", "server.pem")):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["ca"])
            .public_key(keys[name].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
            .sign(keys["ca"], hashes.SHA256())
        )
        (folder / file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        keys["server"].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )


def identify(folder: Path, name: str) -> None:
    """A SuperNode's key pair, as ``ssh-keygen -t ecdsa -b 384`` writes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    (folder / name).write_bytes(private)
    (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))


class Deployment:
    """The processes of a federation, on loopback; what they say goes to files in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.family, self.port = folder, Family(), free_port()
        certify(folder)
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )
        scripts = sysconfig.get_path("scripts")
        self.environment = {
            **os.environ, **QUIET, "FLWR_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "COLUMNS": "200",
            "PATH": os.pathsep.join([scripts, os.environ["PATH"]]), "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }  # fmt: skip
        self.start(
            "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth",
            "--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key",
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not self.listens():
            assert time.monotonic() < deadline, self.said("flower-superlink")
            time.sleep(0.2)

    def start(self, *command: str) -> subprocess.Popen[str]:
        log = (self.folder / f"{command[0]}.log").open("a")
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip
        log.close()
        self.family.adopt(process)
        return process

    def node(self, partition: int, key: str) -> subprocess.Popen[str]:
        return self.start(
            "flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--root-certificates", "ca.crt", "--port", str(free_port()),
            "--node-config", f"partition-id={partition}", "--auth-supernode-private-key", key,
        )  # fmt: skip

    def flwr(self, *arguments: str) -> str:
        """What a ``flwr`` command prints, whatever its status."""
        ended = subprocess.run(
            ["flwr", *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        return ended.stdout + ended.stderr

    def listens(self) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self.port)) == 0

    def said(self, command: str) -> str:
        return (self.folder / f"{command}.log").read_text()[-3000:]


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    folder = tmp_path / "lab"
    folder.mkdir()
    started = Deployment(folder)
    try:
        yield started
    finally:
        started.family.kill()


pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds the processes to end in /proc")]


def run(deployment: Deployment, output: Path, *asked: str) -> list[str]:
    """Write the run's settings down; the arguments of ``flwr`` that start it."""
    settings = deployment.folder / "run.toml"
    asked = tuple(overrides(*asked, "runtime=flower", f"output='{output}'", methods=["di"]))
    settings.write_text(f"overrides = {json.dumps(json.dumps(asked))}\n")
    return ["run", str(ROOT), "lab", "--stream", "-c", str(settings)]


def test_a_deployment_trains_to_the_weights_of_the_run_in_process(deployment: Deployment, tmp_path: Path) -> None:
    for name in ("first", "second", "stranger"):
        identify(deployment.folder, name)
    for name in ("first", "second"):
        assert "successfully" in deployment.flwr("supernode", "register", f"{name}.pub", "lab")
    deployment.node(0, "stranger")  # whose key nobody has registered
    for partition, name in enumerate(("first", "second")):
        deployment.node(partition, name)
    printed = deployment.flwr(*run(deployment, tmp_path / "deployed", *ASKED))
    told = f"{printed[-3000:]}\n{deployment.said('flower-superlink')}\n{deployment.said('flower-supernode')}"
    assert (tmp_path / "deployed" / "run.json").exists(), told
    assert json.loads((tmp_path / "deployed" / "run.json").read_text())["status"] == "finished", told
    run_local(tiny(tmp_path / "local", *ASKED, methods=["di"]))
    assert_same(tmp_path / "deployed", tmp_path / "local")
    listing = deployment.flwr("supernode", "list", "lab", "--format", "json")
    nodes = json.loads(listing[listing.index("{") :])["nodes"]
    assert [node["status"] for node in nodes] == ["online", "online"], listing


def test_a_node_that_disappears_is_left_out_by_name(deployment: Deployment, tmp_path: Path) -> None:
    """It is killed with all that it started while its client trains; the minimum of updates still holds."""
    nodes = []
    for partition, name in enumerate(("first", "second")):
        identify(deployment.folder, name)
        assert "successfully" in deployment.flwr("supernode", "register", f"{name}.pub", "lab")
        nodes.append(deployment.node(partition, name))
    folder = tmp_path / "deployed"
    asked = ("clients=2", "strategy=fedavg", "strategy.minimum_updates=1", "training.epochs=400")
    deployment.start("flwr", *run(deployment, folder, *asked))
    metrics, ended = folder / "metrics.jsonl", folder / "run.json"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and "training clients" in metrics.read_text()):
        assert time.monotonic() < deadline, deployment.said("flwr")
        time.sleep(0.2)
    os.killpg(nodes[1].pid, signal.SIGKILL)
    while json.loads(ended.read_text())["status"] == "running":
        assert time.monotonic() < deadline, deployment.said("flwr")
        time.sleep(0.5)
    told = json.loads(ended.read_text())
    assert told["status"] == "finished", told
    assert len(told["excluded"]) == 1 and "client 1, round 1, local training: the client failed" in told["excluded"][0]
