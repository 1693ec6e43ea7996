"""A client of servers with OpenAI's chat completions API: many requests at once, and retries."""

import asyncio
import logging
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2

OLLAMA = "http://localhost:11434/v1"
FIRST_DELAY, MAX_DELAY = 1.0, 60.0  # seconds between two attempts
MAX_FAILURES_IN_A_ROW = 10  # transient ones; then the server is considered gone
MAX_EQUAL_REFUSALS = 3  # before any reply; then every other request would be refused too
RETRIED_STATUSES = {408, 409, 425, 429}  # and 5xx
ADAPTABLE_STATUSES = {400, 422}  # how servers refuse a parameter

Messages = list[dict[str, str]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """A model on a server, and how patiently to ask it.

    Args:
        base_url: address of the API. `/v1` and `/chat/completions` are appended where they are missing.
        timeout: seconds for one whole request.
        retries: further attempts for one request, after 1, 2, 4 ... seconds (each shortened at random by up to half),
            or after the seconds in the server's Retry-After header, at most 60.
        max_tokens: maximum length of a reply, including what a reasoning model writes before its answer.

    Raises:
        ValueError: for an address without http(s), numbers out of range, or a key that no HTTP header can hold.
    """

    model: str
    base_url: str = OLLAMA
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 5
    max_tokens: int = 16

    def __post_init__(self):
        if not re.match(r"https?://[^/\s]", self.base_url):
            raise ValueError(f"base_url is {self.base_url!r} but must be an address such as {OLLAMA}.")
        if self.timeout <= 0 or self.retries < 0 or self.max_tokens < 1:
            raise ValueError(
                f"timeout {self.timeout}, retries {self.retries} and max_tokens {self.max_tokens} must be above 0, "
                "at least 0 and at least 1."
            )
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("The API key contains characters that are not allowed in an HTTP header; copy it again.")

    @property
    def completions_url(self) -> str:
        address = urlsplit(self.base_url)
        path = address.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
        return address._replace(path=path).geturl()


@dataclass(frozen=True)
class ChatReply:
    """`cut_off`: the reply reached the maximum length."""

    text: str
    cut_off: bool


class RequestFailure(Exception):
    """A request without a reply; `transient` if a later attempt may succeed."""

    def __init__(self, reason: str, transient: bool):
        super().__init__(reason)
        self.transient = transient


async def request_all(
    endpoint: Endpoint,
    requests: Mapping[int, Messages],
    *,
    concurrency: int,
    answered_before: bool = False,
    on_reply: Callable[[int, ChatReply], None],
    on_done: Callable[[], object],
) -> dict[int, str]:
    """Send the requests, `concurrency` at a time, and call `on_reply(number, reply)` for each reply.

    `on_done` is called after each request, whether or not it has a reply. `answered_before` says that the server has
    replied to requests of this kind in an earlier run.

    Returns:
        By number of the request, why it has no reply.

    Raises:
        ConnectionError: no server answers, or 10 requests in a row failed for a transient reason.
        PermissionError: the server refuses the API key.
        FileNotFoundError: the server does not know the model or the address.
        ValueError: the server refuses the first 3 requests for the same reason.
    """
    failures: dict[int, str] = {}
    counter = FailureCounter(answered_before)
    queue = iter(requests.items())

    async def work() -> None:
        for number, messages in queue:
            try:
                reply = await client.ask(messages)
            except RequestFailure as failure:
                failures[number] = str(failure)
                counter.count(failure)
            else:
                counter.reset()
                on_reply(number, reply)
            on_done()

    # Local servers ignore the key, but some expect the header.
    headers = {"authorization": f"Bearer {endpoint.api_key or 'none'}"}
    async with httpx2.AsyncClient(headers=headers, timeout=endpoint.timeout, follow_redirects=True) as http:
        client = ChatClient(http, endpoint)
        await asyncio.gather(*(work() for _ in range(concurrency)))
    return failures


class FailureCounter:
    """Ends the run when the remaining requests would fail as well."""

    def __init__(self, answered: bool):
        self.answered = answered
        self.transient = 0
        self.refusals: list[str] = []

    def reset(self) -> None:
        self.answered, self.transient = True, 0

    def count(self, failure: RequestFailure) -> None:
        if failure.transient:
            self.transient += 1
            if self.transient >= MAX_FAILURES_IN_A_ROW:
                raise ConnectionError(
                    f"{self.transient} requests in a row failed, the last one with: {failure}; finished rows are "
                    "kept, run the same command again to continue."
                ) from None
            return
        self.refusals.append(re.sub(r"\d+", "0", str(failure)))  # lengths and request numbers differ
        if not self.answered and self.refusals.count(self.refusals[-1]) >= MAX_EQUAL_REFUSALS:
            raise ValueError(
                f"The server refuses every request: {failure}; change the options and run again."
            ) from None


class ChatClient:
    """Sends requests to one endpoint and retries them."""

    def __init__(self, http: httpx2.AsyncClient, endpoint: Endpoint):
        self.http, self.endpoint = http, endpoint
        self.answered = False
        # OpenAI's newer models refuse `max_tokens`, which older servers know alone.
        self.options: dict[str, float] = {"max_completion_tokens": endpoint.max_tokens, "temperature": 0.0}

    async def ask(self, messages: Messages) -> ChatReply:
        """Raises RequestFailure, and OSError for what ends the whole run."""
        attempt = 0
        while True:
            options = self.options
            try:
                return await self.post(messages, options)
            except (httpx2.HTTPError, ValueError, TimeoutError) as error:
                self.raise_if_hopeless(error)
                status = http_status(error)
                if status in ADAPTABLE_STATUSES and self.adapt(options, error.response.text):  # type: ignore[union-attr]
                    continue
                transient = status is None or status >= 500 or status in RETRIED_STATUSES
                if not transient or attempt == self.endpoint.retries:
                    raise RequestFailure(self.explain(error), transient) from error
                await asyncio.sleep(delay(error, attempt))
                attempt += 1

    async def post(self, messages: Messages, options: dict[str, float]) -> ChatReply:
        body = {"model": self.endpoint.model, "messages": messages, **options, "stream": False}
        async with asyncio.timeout(self.endpoint.timeout):  # that of httpx2 is for each part of an answer
            response = await self.http.post(self.endpoint.completions_url, json=body)
        response.raise_for_status()
        try:
            completion = response.json()
            choice = completion["choices"][0]
            text, reason = choice["message"].get("content") or "", choice.get("finish_reason")
            used = (completion.get("usage") or {}).get("completion_tokens") or 0
        except (ValueError, TypeError, AttributeError, IndexError, KeyError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise ValueError("the answer is not a chat completion")
        self.answered = True
        if isinstance(used, int) and used > self.endpoint.max_tokens and "max_completion_tokens" in self.options:
            self.use_max_tokens()  # Ollama ignores the parameter: https://github.com/ollama/ollama/issues/7125
        return ChatReply(self.redact(text), cut_off=reason == "length")

    def adapt(self, refused: dict[str, float], message: str) -> bool:
        """Replace the parameter that a refusal names. Returns whether the request is worth sending again."""
        if refused is not self.options:
            return True  # another request has found out meanwhile
        if "max_completion_tokens" in self.options and re.search("max_(completion_)?tokens", message):
            self.use_max_tokens()
        elif "temperature" in self.options and "temperature" in message:
            logger.warning("The server refuses temperature 0: its replies are sampled.")
            self.options = {name: value for name, value in self.options.items() if name != "temperature"}
        else:
            return False
        return True

    def use_max_tokens(self) -> None:
        self.options = {
            "max_tokens" if name == "max_completion_tokens" else name: value for name, value in self.options.items()
        }

    def raise_if_hopeless(self, error: Exception) -> None:
        """Raise OSError for what every other request would meet too."""
        address, status = self.endpoint.base_url, http_status(error)
        if isinstance(error, httpx2.ConnectError) and not self.answered:
            raise ConnectionError(
                f"No server answers at {address} ({error}); start one, or give its --base_url."
            ) from error
        if status in (401, 403):
            raise PermissionError(
                f"{address} refuses the API key (HTTP {status}); put the right one into the environment variable "
                "that --api_key_env names."
            ) from error
        if status == 404:
            raise FileNotFoundError(
                f"{address} does not know the model {self.endpoint.model!r} ({self.explain(error)})."
            ) from error

    def explain(self, error: Exception) -> str:
        if isinstance(error, TimeoutError | httpx2.TimeoutException):
            return f"no complete answer within {self.endpoint.timeout:g} seconds"
        if status := http_status(error):
            message = " ".join(error.response.text.split())[:200]  # type: ignore[attr-defined]
            return self.redact(f"HTTP {status}: {message or 'no message'}")
        if isinstance(error, ValueError):
            return "the answer is not a chat completion"
        return self.redact(f"{type(error).__name__}: {error}")

    def redact(self, text: str) -> str:
        """The text without the API key, which some servers send back, and without commands to the terminal."""
        if self.endpoint.api_key:
            text = text.replace(self.endpoint.api_key, "***")
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def http_status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else None


def delay(error: Exception, attempt: int) -> float:
    """Seconds until the next attempt: those of the Retry-After header, otherwise exponential back-off."""
    if isinstance(error, httpx2.HTTPStatusError):
        seconds = error.response.headers.get("Retry-After", "")
        if re.fullmatch(r"[0-9]{1,9}", seconds):
            return min(float(seconds), MAX_DELAY)
    return min(FIRST_DELAY * 2**attempt, MAX_DELAY) * random.uniform(0.5, 1.0)
