"""Who may talk to etcd: users whose token runs out, certificates and passwords that are renewed. Tier unit."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ciliate.kvstore import KvstoreError
from ciliate.lab.etcdserver import Etcd, any_binary

from .etcd_harness import Collected, opened, until, write


def etcdctl(server: Etcd, *arguments: str, words: str = "") -> None:
    program = any_binary().with_name("etcdctl")
    command = [str(program), f"--endpoints={server.address}", *arguments]
    environment = {"ETCDCTL_API": "3"}
    done = subprocess.run(command, env=environment, input=words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_a_user_logs_in_anew_when_the_token_runs_out_and_with_a_new_password(tmp_path: Path) -> None:
    with Etcd(tmp_path / "etcd-data", arguments=["--auth-token-ttl", "1"]) as server:
        etcdctl(server, "user", "add", "root:secret")
        etcdctl(server, "user", "grant-role", "root", "root")
        etcdctl(server, "auth", "enable")
        (tmp_path / "password").write_text("secret\n")
        user = {"username": "root", "password_file": str(tmp_path / "password")}
        async with opened(server, **user) as one, opened(server, "etcd3", **user) as two:
            watches = [Collected(store, "k/", 0) for store in (one, two)]
            for collected in watches:
                await collected.standing.wait()
            for number in range(2):
                leases = []
                for store in (one, two):
                    await store.put(f"k/{number}", b"")
                    leases.append(await store.lease(5))
                if number:
                    change = ("user", "passwd", "root", "--interactive=false")
                    etcdctl(server, "--user=root:secret", *change, words="changed\n")
                    (tmp_path / "password").write_text("changed\n")
                await asyncio.sleep(2.2)
                for lease in leases:
                    await lease.keep_alive()
            for store, collected in zip((one, two), watches, strict=True):
                await until(lambda seen=collected.events: len(seen) == 4)  # type: ignore[misc]
                assert (await store.status()).ok
                await collected.stop()
        with pytest.raises(KvstoreError, match="invalid user ID or password"):
            async with opened(server, username="root", password="wrong"):
                pass
        async with opened(server) as nobody:
            assert "set the options username and password" in (await nobody.status()).message
            with pytest.raises(KvstoreError, match="set the options username and password"):
                await nobody.get("k")


def certificates(directory: Path) -> None:
    """A CA, a certificate of a server at 127.0.0.1 and one of a client."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)

    def make(name: str, issuer: Any = None, issuer_key: Any = None) -> tuple[Any, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.subject if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        )
        if issuer is not None:
            usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        certificate = builder.sign(issuer_key or key, hashes.SHA256())
        (directory / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (directory / f"{name}.key").write_bytes(private)
        return certificate, key

    ca, ca_key = make("ca")
    for name in ("server", "client"):
        make(name, ca, ca_key)
    make("stranger-ca")


async def test_both_sides_show_certificates_and_take_up_new_ones(tmp_path: Path) -> None:
    certificates(tmp_path)
    arguments = [
        *("--cert-file", f"{tmp_path}/server.pem", "--key-file", f"{tmp_path}/server.key"),
        *("--trusted-ca-file", f"{tmp_path}/ca.pem", "--client-cert-auth"),
    ]
    with Etcd(tmp_path / "etcd-data", arguments=arguments, tls=True) as server:
        ours = {"cert_file": f"{tmp_path}/client.pem", "key_file": f"{tmp_path}/client.key"}
        async with opened(server, ca_file=f"{tmp_path}/ca.pem", **ours) as store:
            await store.put("k", b"v")
            assert (await store.status()).ok
        nothing = {"ca_file": f"{tmp_path}/ca.pem"}
        strange = {"ca_file": f"{tmp_path}/stranger-ca.pem", **ours}
        for provider in ("etcd", "etcd3"):
            for options, says in ((strange, "see ca_file"), (nothing, "see cert_file")):
                async with opened(server, provider, timeout=1.0, **options) as store:
                    with pytest.raises(KvstoreError, match=says):
                        await store.put("k", b"v")
        ours["ca_file"] = f"{tmp_path}/ca.pem"
        async with opened(server, **ours) as one, opened(server, "etcd3", **ours) as two:
            watches = [Collected(store, "k", 0) for store in (one, two)]
            for collected in watches:
                await collected.standing.wait()
            # everything anew on disk, and on the server; nobody restarts the clients
            await asyncio.to_thread(server.kill)
            certificates(tmp_path)
            await asyncio.to_thread(server.start)
            for store in (one, two):
                await write(store, "k", b"new")
            for collected in watches:
                await until(lambda seen=collected.events: len(seen) >= 2)  # type: ignore[misc]
                await collected.stop()
