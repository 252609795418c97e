"""TLS: contexts made from files, one connection as bytes in and bytes out, and what to say when it fails.

Opens no sockets. Certificates and the names in them are always verified, and nothing before TLS 1.2 is spoken; there
is no way to switch that off.

`Channel` is here because sockets wrapped by `ssl` hide what both ends must know: how much of a request has left,
whether bytes that wait say anything, and when nothing must be sent any more.
"""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from beaker_statestore.exceptions import ConfigurationError

__all__ = ["RECORD", "TLS", "Channel", "client_context", "explain", "is_refusal", "renew", "server_context", "weakness"]

#: Plain bytes in one record at most (RFC 8446, 5.1).
RECORD: Final = 16384
#: The largest file of certificates or keys; the bundles that systems come with have a quarter of a megabyte.
_LARGEST_FILE: Final = 4 * 1024 * 1024

_CERTIFICATE: Final = "certificate"
_KEY: Final = "private key"
_PEM: Final = {
    _CERTIFICATE: (b"-----BEGIN CERTIFICATE-----", b"-----BEGIN TRUSTED CERTIFICATE-----"),
    _KEY: (b"PRIVATE KEY-----",),
}

#: Alerts of a server that did not accept the client's certificate, or missed one (RFC 8446, 6.2).
_NONE_GIVEN: Final = "CERTIFICATE_REQUIRED"
_NOT_ACCEPTED: Final = {
    "ACCESS_DENIED": "it denies access",
    "BAD_CERTIFICATE": "it is damaged",
    "CERTIFICATE_EXPIRED": "it has expired",
    "CERTIFICATE_REVOKED": "it has been revoked",
    "CERTIFICATE_UNKNOWN": "for a reason it does not tell",
    "DECRYPT_ERROR": "the signature is wrong",
    "UNKNOWN_CA": "it does not trust the authority that signed it",
    "UNSUPPORTED_CERTIFICATE": "it is not one for clients",
}
#: X509_V_ERR_..., openssl/x509_vfy.h.
_NOT_YET_VALID, _EXPIRED, _WRONG_HOST, _WRONG_IP = 9, 10, 62, 64
_UNTRUSTED: Final = {2, 18, 19, 20, 21, 24, 27}
_WRONG_PURPOSE: Final = 26
_WEAKNESSES: Final = {
    _EXPIRED: "it, or one that signed it, has expired; renew it and send SIGHUP",
    _NOT_YET_VALID: "it, or one that signed it, is not valid yet; check this machine's clock",
    _WRONG_PURPOSE: "it is not one for servers (extendedKeyUsage); make it anew with serverAuth",
}


@dataclass(frozen=True, slots=True)
class TLS:
    """How a client speaks TLS to a server."""

    context: ssl.SSLContext
    #: What the server's certificate must be for; None: the host that is connected to.
    server_name: str | None = None

    def channel(self, host: str) -> Channel:
        """The client's end of a new connection to ``host``.

        :raises ConfigurationError: no certificate can be for that.
        """
        # What follows a % says through which of this machine's interfaces to go, and is in no certificate.
        name = (self.server_name or host).partition("%")[0]
        try:
            return Channel(self.context, server_name=name)
        except ValueError as error:  # UnicodeError included: a name that IDNA cannot encode
            raise ConfigurationError(
                f"{name!r} is no name that a certificate can be for ({error}): give a host name or an IP address, "
                "as server_name= if the address has another"
            ) from error


# -- contexts


def client_context(*, ca: str | None = None, cert: str | None = None, key: str | None = None) -> ssl.SSLContext:
    """What a client trusts, and who it is. All files are PEM and are read now.

    :param ca: the certificates to trust, an authority's or a server's own; None: those the system trusts.
    :param cert: the client's certificate, and those between it and an authority that the server trusts.
    :param key: the private key that fits it; None: it is in the same file.
    :raises ConfigurationError: a file is wrong; the message says which and why.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificates and host names
    _harden(context)
    # A common name is no host name (RFC 9525, 6.3).
    context.hostname_checks_common_name = False
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, "ca=", ca)
    if cert is not None:
        _identify(context, ("cert=", cert), ("key=", key))
    elif key is not None:
        raise ConfigurationError("key= is given and cert= is not: give the certificate that the key belongs to")
    return context


def server_context(cert: str, key: str | None = None, ca: str | None = None) -> ssl.SSLContext:
    """Who a server is, and which clients it accepts. All files are PEM and are read now.

    :param cert: its certificate, and those between it and an authority that clients trust.
    :param key: the private key that fits it; None: it is in the same file.
    :param ca: the certificates to trust, if clients must show one that these have signed; None: none is asked for.
    :raises ConfigurationError: a file is wrong; the message says which and why.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    # A client that keeps connections has no use for tickets, and those of TLS 1.3 make idle ones look as if there
    # was an answer to nothing.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    _identify(context, ("--tls-cert", cert), ("--tls-key", key))
    if ca is not None:
        _trust(context, "--tls-ca", ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def renew(context: ssl.SSLContext, cert: str, key: str | None = None) -> None:
    """Have the server of `server_context` show new connections what is in its files now.

    :raises ConfigurationError: a file is wrong; then it goes on showing what it had.
    """
    server_context(cert, key)
    _identify(context, ("--tls-cert", cert), ("--tls-key", key))


def weakness(cert: str, key: str | None = None) -> str | None:
    """Why no client will accept the certificate that `server_context` took, as far as can be told here; None: fine.

    Whom clients trust, and by which name they call, is not known here.

    :raises ConfigurationError: a file is wrong.
    """
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    _trust(trusting, "--tls-cert", cert)
    server = Channel(server_context(cert, key), server_side=True)
    client = Channel(trusting)
    client.receive()
    server.receive(client.outgoing())
    client.receive(server.outgoing())
    if not isinstance(client.error, ssl.SSLCertVerificationError):
        return None
    return _WEAKNESSES.get(client.error.verify_code, client.error.verify_message)


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION


def _trust(context: ssl.SSLContext, option: str, path: str) -> None:
    _check_file(option, path, _CERTIFICATE)
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ValueError) as error:
        raise _unreadable(option, path, _CERTIFICATE, error) from error
    # Who names an authority that another one has signed trusts that one and not the other.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _identify(context: ssl.SSLContext, cert: tuple[str, str], key: tuple[str, str | None]) -> None:
    """Have ``context`` show a certificate; both come with the option that names them."""
    option, path = cert
    _check_file(option, path, _CERTIFICATE)
    key_option, key_path = key[0], key[1] or path
    if key[1] is None and not _holds(path, _KEY):
        raise ConfigurationError(f"{path!r} ({option}) holds no private key: give its file as {key_option}")
    _check_file(key_option, key_path, _KEY)

    def encrypted() -> str:
        # Without this, OpenSSL would ask at the terminal.
        raise ConfigurationError(
            f"the private key in {key_path!r} ({key_option}) needs a passphrase: store it without one, for this "
            f"process alone to read (openssl pkey -in {key_path} -out FILE)"
        )

    try:
        context.load_cert_chain(path, key_path, password=encrypted)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise ConfigurationError(
                f"the private key in {key_path!r} ({key_option}) does not fit the certificate in {path!r} ({option}): "
                "give the one that the certificate was made for"
            ) from error
        raise ConfigurationError(
            f"cannot use the certificate in {path!r} ({option}) with the private key in {key_path!r} ({key_option}): "
            f"{_reason(error)}; make them anew"
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(option, path, _CERTIFICATE, error) from error


def _check_file(option: str, path: str, content: str) -> None:
    """Check that ``path`` can be read and may hold ``content``: OpenSSL's own errors do not name the file."""
    try:
        found = _holds(path, content)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise _unreadable(option, path, content, error) from error
    if not found:
        raise ConfigurationError(
            f"{path!r} ({option}) holds no {content} in PEM, the form that begins with -----BEGIN: convert it with "
            "openssl, or give another file"
        )


def _holds(path: str, content: str) -> bool:
    if Path(path).exists() and not Path(path).is_file():
        raise OSError("it is no file")  # opening a pipe could wait for ever
    with Path(path).open("rb") as file:
        data = file.read(_LARGEST_FILE)
    return any(mark in data for mark in _PEM[content])


def _unreadable(option: str, path: str, content: str, error: Exception) -> ConfigurationError:
    if isinstance(error, FileNotFoundError):
        return ConfigurationError(f"there is no file {path!r} ({option}): give the path of a {content} in PEM")
    if isinstance(error, PermissionError):
        return ConfigurationError(f"may not read {path!r} ({option}): let the user of this process read it")
    why = _reason(error) if isinstance(error, ssl.SSLError) else error
    return ConfigurationError(f"cannot read {path!r} ({option}): {why}; give the path of a {content} in PEM")


# -- one connection


class Channel:
    """One end of a connection, as bytes: the peer's go into `receive`, and what `outgoing` answers goes to the peer.

    The handshake needs nothing but that both are done until `established`; a client begins with ``receive()``.
    """

    def __init__(self, context: ssl.SSLContext, *, server_side: bool = False, server_name: str | None = None) -> None:
        """:param server_name: for a client: what the server's certificate must be for."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_name
        )
        #: The handshake is done, as far as this end can tell.
        self.established = False
        #: The peer has said that nothing more will come.
        self.ended = False
        #: What broke the channel. It comes to light behind all that was good before it.
        self.error: ssl.SSLError | None = None

    def receive(self, data: bytes = b"") -> bytes:
        """The plain text in what has come, ``data`` last. See `ended` and `error` then."""
        if self.ended or self.error is not None:
            return b""
        self._incoming.write(data)
        parts = []
        try:
            if not self.established:
                self._ssl.do_handshake()
                self.established = True
            while part := self._ssl.read(RECORD):
                parts.append(part)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        except ssl.SSLError as error:
            self.error = error
        return b"".join(parts)

    def send(self, data: bytes | memoryview) -> None:
        """Encrypt ``data``, each `RECORD` bytes of it into one record, for `outgoing` to answer.

        :raises ssl.SSLError: the channel is broken.
        """
        view = memoryview(data)
        for start in range(0, len(view), RECORD):
            self._ssl.write(view[start : start + RECORD])

    def outgoing(self) -> bytes:
        """What the peer is to be sent now, in this order. It is answered once."""
        return self._outgoing.read()

    def end(self) -> None:
        """Tell the peer that nothing more will come: `outgoing` answers the alert. Needed before an end in order."""
        with contextlib.suppress(ssl.SSLError):  # it wants to read the peer's, too, which nobody waits for
            self._ssl.unwrap()


# -- what went wrong


def is_refusal(error: Exception) -> bool:
    """Whether ``error`` is a server's word that it has not accepted this client, and so has carried out nothing.

    In TLS 1.3 it may come when the client has already sent its first request.
    """
    return isinstance(error, ssl.SSLError) and _alert(error) in (_NONE_GIVEN, "HANDSHAKE_FAILURE", *_NOT_ACCEPTED)


def explain(error: Exception) -> str:
    """What went wrong between a client and a server, as the client sees it, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_certificate(error)
    if not isinstance(error, ssl.SSLError):
        return f"{error}: see the server's log, and whether it speaks TLS at this port"
    alert = _alert(error)
    if alert == _NONE_GIVEN:
        return "the server demands a certificate of its clients: give one as cert= and key="
    if alert == "HANDSHAKE_FAILURE":
        return "the server refuses: see its log, and whether it demands a certificate of its clients (cert= and key=)"
    if alert in _NOT_ACCEPTED:
        return (
            f"the server does not accept our certificate ({_NOT_ACCEPTED[alert]}): give as cert= one that is valid, "
            "for clients, and signed by the authority that the server was given as --tls-ca"
        )
    if alert == "PROTOCOL_VERSION" or error.reason == "UNSUPPORTED_PROTOCOL":
        return "the server speaks no TLS that is safe: it needs version 1.2 or 1.3"
    if error.reason in _NO_TLS:
        return "what answers does not speak TLS: check the port, and that the server was given a certificate"
    return f"{_reason(error)}: see the server's log"


#: What OpenSSL calls bytes that are no TLS, by its version and by what they look like.
_NO_TLS: Final = {
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
    "UNEXPECTED_MESSAGE",
    "WRONG_VERSION_NUMBER",
}


def _explain_certificate(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code in (_WRONG_HOST, _WRONG_IP):
        return (
            f"the server's certificate is for others ({error.verify_message.rstrip('.')}): connect by a name that is "
            "among its subjectAltNames, or give one of them as server_name="
        )
    if code == _EXPIRED:
        return "the server's certificate, or one that signed it, has expired: renew it"
    if code == _NOT_YET_VALID:
        return "the server's certificate, or one that signed it, is not valid yet: check the clocks of both machines"
    if code in _UNTRUSTED:
        return (
            f"nobody whom we trust has signed the server's certificate ({error.verify_message}): give the certificate "
            "of the authority that did as ca="
        )
    return f"the server's certificate is not good ({error.verify_message}): make it anew"


def _alert(error: ssl.SSLError) -> str:
    """The name of the alert that ``error`` is about; empty if it is about none."""
    # TLSV1_ALERT_..., SSLV3_ALERT_...: the version is the one that the alert was first in.
    return (error.reason or "").partition("_ALERT_")[2]


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
