"""Why nothing can be delivered: one line when that begins, when the reason changes, and when it is over.

The SDK's exporters log every attempt, each in its own words. What they log while they export for a Watch is
material for its line, and for -v.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from .answering import Answer, Speech, what_answers

Protocol = Literal["grpc", "http/protobuf"]
_SDK_LOGGER = "opentelemetry.exporter.otlp.proto"
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
_SPEECH: dict[Protocol, Speech] = {"grpc": "HTTP/2", "http/protobuf": "HTTP/1.1"}
_SERVER: dict[Speech, str] = {"HTTP/2": "a gRPC (HTTP/2) server", "HTTP/1.1": "an HTTP/1.1 server"}
_REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED", 401, 403)
_NOT_HERE = (404, 405, 501)
# gRPC's own library makes other statuses as well, when there is no receiver.
_FROM_A_RECEIVER = (
    *("UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"),
    *("FAILED_PRECONDITION", "OUT_OF_RANGE", "DATA_LOSS", "ABORTED", "NOT_FOUND", "ALREADY_EXISTS"),
)
_TROUBLE = {
    "refused": "nobody listens there (connection refused)",
    "unreachable": "no connection can be made (no route to it, or a firewall)",
    "closes": "something takes connections there, and closes them",
    "silent": "something takes connections there, and says nothing",
}
_STEADY = 10  # failures of one kind, or whole deliveries, in a row, after which what was said before is news again
_TOO_LARGE = re.compile(r"(larger|bigger) than|too (large|big)|exceed.*(size|limit of [0-9]+ bytes)", re.IGNORECASE)
_LONGEST_REASON = 250
_SHORTEST_SECRET = 4
_MOST_KINDS = 16  # of failures that are told apart

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """What an attempt ended with. `code`: an HTTP status, or the name of a gRPC one; None without an answer.

    `said`: an HTTP receiver's own words. `retry_after_s`: for how long it asks to be left alone. `from_page`: an HTTP
    status that comes with a web page, or with nothing that says what it is, as no OTLP receiver's does.
    """

    code: int | str | None
    detail: str
    said: str = ""
    retry_after_s: float = 0.0
    from_page: bool = False

    @property
    def kind(self) -> str:
        """The same for the same trouble: a receiver's own word, or a library's without ports, times, addresses, ids."""
        if self.code in _FROM_A_RECEIVER:
            return str(self.code)
        return f"{self.code} " + _kind(self.detail)

    @property
    def of_size(self) -> bool:
        """Was the request too large? Often words alone say so, as with a Collector's 400; UNKNOWN: a proxy's 413."""
        if self.code in ("RESOURCE_EXHAUSTED", "OUT_OF_RANGE"):
            return bool(_TOO_LARGE.search(self.detail))
        if self.code == 400:
            return bool(_TOO_LARGE.search(self.said))
        return self.code == 413 or self.code == "UNKNOWN" and "413" in self.detail

    @property
    def of_data(self) -> bool:
        """Does the receiver say that it will never take this data? (OTLP specification, "Failures": "bad data".)"""
        return self.code == "INVALID_ARGUMENT" or self.code in (400, 422) and not self.from_page


@dataclass(frozen=True)
class Ended:
    """How an export ended. `rejected`: points or spans without which the receiver took it, and `message` why.

    `abandoned`: nobody has waited for its end.
    """

    delivered: bool
    failure: Failure | None = None
    rejected: int = 0
    message: str = ""
    abandoned: bool = False


def _kind(text: str) -> str:
    return " ".join(word for word in text.split() if not any(character.isdigit() for character in word))


@dataclass(frozen=True)
class Target:
    """Where a signal goes. `secrets`: what must not be printed. `variables`: names of the signal's, by their end."""

    signal: str
    protocol: Protocol
    url: SplitResult
    tls: bool
    secrets: Collection[str]
    variables: dict[str, str]

    @property
    def what(self) -> str:
        """The signal as the user knows it."""
        return "spans" if self.signal == "traces" else self.signal

    @property
    def shown(self) -> str:
        """The address as it may be printed."""
        host = self.url.netloc.rpartition("@")[2]
        over = "gRPC" if self.protocol == "grpc" else "HTTP"
        path = re.sub(r"[^/]{20,}", "***", self.url.path) if self.protocol != "grpc" else ""  # it may hold a token
        return f"{self.url.scheme}://{host}{path} over {over}"

    def without_secrets(self, text: str) -> str:
        """For whatever somebody else worded."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***").replace(repr(secret)[1:-1], "***")
        return text

    def answer(self) -> Answer | None:
        """Who answers there; None if a proxy, if any, would be asked instead."""
        proxied = any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXY_VARIABLES)
        if proxied or not self.url.hostname:
            return None
        port = self.url.port or (443 if self.tls or self.protocol == "grpc" else 80)
        return what_answers(self.url.hostname, port, _SPEECH[self.protocol])


def _of_code(target: Target, failure: Failure) -> str | None:
    """What a status says on its own."""
    code, detail = failure.code, failure.detail
    if code is None or isinstance(code, str) and code not in _FROM_A_RECEIVER:
        return None
    status = f"HTTP {code} {detail}".rstrip() if isinstance(code, int) else f"gRPC status {code}"
    if code in _REFUSALS:
        return f"it refuses the credentials ({status}); check {target.variables['HEADERS']}"
    if code == "UNIMPLEMENTED":
        return f"what answers there takes no OTLP {target.signal} ({status})"
    if code in _NOT_HERE:
        advice = ""
        if not target.url.path.endswith(f"/v1/{target.signal}"):
            advice = f"; {target.variables['ENDPOINT']} is taken as it is, and should end in /v1/{target.signal}"
        return f"no OTLP receiver is at this path ({status}){advice}"
    said = detail if isinstance(code, str) else failure.said
    answers = f"it answers {status}" + (f": {said}" if said else "")
    return answers + ("; what it refuses is dropped" if failure.of_data else "")


def _of_detail(target: Target, failure: Failure) -> str | None:
    """What only the library's words tell."""
    detail, variables, host = failure.detail, target.variables, target.url.hostname
    if target.protocol == "grpc" and "@" in target.url.netloc:
        return f"gRPC takes no user in {variables['ENDPOINT']}; use {variables['HEADERS']}"
    if re.search(r"metadata was invalid|in header value|Illegal header|Invalid metadata", detail):
        return f"{variables['HEADERS']} holds a character that no header may have"
    if re.search(r"NameResolutionError|\[Errno -[0-9]|errors resolving|DNS resolution failed", detail):
        return f"the name {host} does not resolve"
    if re.search(r"[Hh]ostname mismatch|Hostname Verification|not in peer certificate|IP address mismatch", detail):
        return f"its certificate is not for {host}"
    if found := re.search(r"CERTIFICATE_VERIFY_FAILED\W+(?:certificate verify failed: )?([\w -]+\w)", detail):
        return f"its certificate is not accepted: {found[1]} ({variables['CERTIFICATE']} names whom to trust)"
    if re.search(r"CERTIFICATE_REQUIRED", detail, re.IGNORECASE):
        return _no_client_certificate(target)
    return None


def _no_client_certificate(target: Target) -> str:
    variable = target.variables["CLIENT_CERTIFICATE"]
    return f"it closes connections after the TLS handshake; does it want a client's certificate ({variable})?"


def _of_answer(target: Target, answer: Answer) -> str | None:
    """What an answer tells that the exporter cannot work with; None if it is as it should be."""
    if answer.trouble and not answer.tls:
        return _TROUBLE[answer.trouble]
    if answer.banner:
        return f"a server of another kind answers there, with {answer.banner!r}"
    if answer.trouble and target.tls and not os.environ.get(target.variables["CLIENT_CERTIFICATE"]):
        return _no_client_certificate(target)
    wanted, variable = _SPEECH[target.protocol], target.variables["PROTOCOL"]
    server, advice = _SERVER[answer.speech] if answer.speech else "a server", []
    if answer.speech not in (wanted, None):
        if answer.speech == "HTTP/2":
            advice.append(f"for OTLP over gRPC set {variable}=grpc (usually port 4317)")
        else:
            advice.append(f"for OTLP over HTTP set {variable}=http/protobuf (usually port 4318)")
    if answer.tls != target.tls:
        server += " with TLS" if answer.tls else " without TLS"
        advice.append(f"write {'https' if answer.tls else 'http'}:// in {target.variables['ENDPOINT']}")
    return f"{server} answers there; {', and '.join(advice)}" if advice else None


def explain(target: Target, failure: Failure, ask: bool = True) -> str:
    """The reason, as the user needs it. `ask`: connect to find out who answers, if the failure alone does not tell."""
    reason = _of_code(target, failure) or _of_detail(target, failure)
    if reason is None and ask and (answer := target.answer()):
        reason = _of_answer(target, answer)
    if reason is None and (failure.code == "DEADLINE_EXCEEDED" or "Read timed out" in failure.detail):
        reason = f"it does not answer in time ({target.variables['TIMEOUT']})"
    if reason is None:
        cause = re.search(r"Caused by (.*)\)$", failure.detail)
        reason = (f"gRPC status {failure.code}: " if failure.code else "") + (cause[1] if cause else failure.detail)
    return _short(reason)


def _short(text: str) -> str:
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


@dataclass
class _Attempt:
    """An export under way, and what is known of it. `over`: nobody waits for its end any more."""

    watch: Watch
    failure: Failure | None = None
    rejected: int = 0
    message: str = ""
    over: bool = False


class Watch:
    """Watches over the exports of one signal. Its methods may be called from any thread."""

    def __init__(self, target: Target | None) -> None:
        """Without a target it leaves everything as it is: the exporter is not of this project's choice."""
        self._target = target
        self._lock = threading.Lock()
        self._under_way: list[_Attempt] = []
        self._explained: dict[str, str] = {}  # since the last delivery: kinds of failures, and their reasons
        self._last_kind, self._in_a_row = "", 0
        self._rejections: set[str] = set()  # kinds of messages that were said
        self._whole_in_a_row = 0
        self._ending = self._over = False
        if target:
            _capture()

    @property
    def knows(self) -> bool:
        """Can it know why an export failed?"""
        return self._target is not None

    def attend(self, export: Callable[[], object], success: object) -> Ended:
        """Calls `export`, and returns how that ended. To be told once that is known to matter: see tell()."""
        if self._target is None:
            return Ended(export() == success)
        attempt = _exporting.attempt = _Attempt(self)
        self._under_way.append(attempt)
        try:
            delivered = export() == success
        except NotDelivered:
            delivered = False
        finally:
            _exporting.attempt = None
            self._under_way.remove(attempt)
        if delivered:
            return Ended(True, None, attempt.rejected, attempt.message)
        return Ended(False, attempt.failure or Failure(None, "the exporter does not say why"))

    def tell(self, ended: Ended) -> None:
        """Says what is new about how exports end."""
        if self._target is None or ended.abandoned:
            return
        if ended.failure:
            self._explain(self._target, ended.failure)
        else:
            self._delivered(self._target)
            self._tell_rejected(self._target, ended)

    def _tell_rejected(self, target: Target, ended: Ended) -> None:
        if not ended.rejected and not ended.message:
            self._whole_in_a_row += 1
            if self._whole_in_a_row >= _STEADY:
                self._rejections.clear()
            return
        self._whole_in_a_row = 0
        kind = _kind(ended.message)
        if kind in self._rejections or len(self._rejections) >= _MOST_KINDS:
            return
        if not self._over:
            what = f"{ended.rejected} {'spans' if target.signal == 'traces' else 'data points'}"
            said = _short(target.without_secrets(ended.message)) or "it does not say why"
            refuses = f"refuses {what} for good, which are dropped" if ended.rejected else "takes all, and warns"
            _log.warning("%s: %s %s: %s", target.what, target.shown, refuses, said)
        self._rejections.add(kind)

    def note(self, failure: Failure) -> None:
        """An attempt of this thread has failed; another one may follow."""
        if (attempt := _exporting.attempt) and self._target:
            without_secrets = self._target.without_secrets
            detail, said = without_secrets(failure.detail), without_secrets(failure.said)
            attempt.failure = replace(failure, detail=detail, said=said)

    def note_record(self, record: logging.LogRecord) -> None:
        """What the SDK logs when an attempt of this thread has failed: it is for -v."""
        attempt = _exporting.attempt
        assert self._target and attempt
        if attempt.over:
            return
        _log.debug("%s", self._target.without_secrets(record.getMessage()))
        if attempt.failure is None:
            self.note(Failure(None, record.getMessage()))
        if self._ending and attempt.failure:  # later there may be no time to ask who answers
            self._explain(self._target, attempt.failure)

    def _delivered(self, target: Target) -> None:
        with self._lock:
            if self._explained and not self._over:
                _log.warning("%s are delivered again to %s", target.what, target.shown)
            self._explained.clear()

    def _explain(self, target: Target, failure: Failure) -> None:
        kind = failure.kind
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if kind == self._last_kind else 1
            self._last_kind = kind
            if kind in self._explained:
                if self._in_a_row >= _STEADY:
                    self._explained = {kind: self._explained[kind]}
                return
            if len(self._explained) >= _MOST_KINDS:
                return
        reason = explain(target, failure)  # without the lock: it may take a while
        with self._lock:
            if not self._over and reason not in self._explained.values():
                _log.warning("%s cannot be delivered to %s: %s", target.what, target.shown, reason)
            self._explained[kind] = reason

    def ending(self) -> None:
        """The agent is about to end: any failed attempt may be the last."""
        self._ending = True

    def let_go(self) -> None:
        """What is under way is of no interest any more: something else takes its place."""
        for attempt in list(self._under_way):
            attempt.over = True

    def conclude(self) -> None:
        """The agent ends now: an export that is still under way has failed. Nothing is said later."""
        with self._lock:
            self._over = True
            left = [attempt for attempt in self._under_way if not attempt.over]
            if self._target and left and not self._explained:
                failure = left[-1].failure or Failure(None, "there was no answer until the agent ended")
                reason = explain(self._target, failure, ask=False)
                _log.warning("%s could not be delivered to %s: %s", self._target.what, self._target.shown, reason)


class _Exporting(threading.local):
    attempt: _Attempt | None = None


_exporting = _Exporting()


class NotDelivered(Exception):
    """Raised for an answer that the SDK would take as success, or would ask for again in vain."""


def note_failure(failure: Failure) -> None:
    """A request of this thread had no answer, or this one."""
    if _exporting.attempt:
        _exporting.attempt.watch.note(failure)


def note_partial_success(response: Any) -> None:
    """What OTLP's answer to a request of this thread says of points or spans that it was taken without."""
    partial = response.partial_success
    if attempt := _exporting.attempt:
        attempt.rejected = (
            partial.rejected_spans if hasattr(partial, "rejected_spans") else partial.rejected_data_points
        )
        attempt.message = partial.error_message


def _seconds(response: Any) -> float:
    """Retry-After, unless it is a date."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "")))
    except ValueError:
        return 0.0


def check_response(response: Any, said: str = "") -> None:
    """Notes why the answer of an HTTP server is no delivery; raises NotDelivered if the SDK would take it for one.

    `said`: what its body says to people. The SDK takes all statuses from 200 to 399 as success. A receiver never
    redirects a POST, nor sends a web page.
    """
    status, detail = response.status_code, str(response.reason or "")
    content_type = response.headers.get("Content-Type", "").lower()
    if 300 <= status < 400:
        to = urlsplit(response.headers.get("Location", ""))
        where = to._replace(netloc=to.netloc.rpartition("@")[2], query="", fragment="").geturl()
        detail += f", a redirect to {where}: is a login in between?"
    elif status < 300:
        if "html" not in content_type or response.content.lstrip()[:1] != b"<":
            return
        detail += " with a web page: is a login in between?"
    note_failure(Failure(status, detail, said, _seconds(response), not content_type or "html" in content_type))
    if status < 400:
        raise NotDelivered(f"HTTP {status} {detail}")


class _Captured(logging.Handler):
    """Takes what the SDK's exporters log for a Watch, and passes on the rest."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Without the handler's lock, as asking a server may take a while."""
        if _exporting.attempt:
            _exporting.attempt.watch.note_record(record)
        else:
            logging.getLogger().handle(record)
        return True


def _capture() -> None:
    logger = logging.getLogger(_SDK_LOGGER)
    logger.propagate = False
    logger.handlers = [_Captured()]
    # It drops a record that is like the last one, also when it is about another signal.
    logging.getLogger(f"{_SDK_LOGGER}.grpc.exporter").filters.clear()
