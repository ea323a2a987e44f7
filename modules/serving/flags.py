"""An endpoint on this machine that speaks OpenAI's API, over a quantized KV cache.

/v1/chat/completions, /v1/completions, both streamed or not, /v1/models and /health. Answers are made together; the packed caches of past
conversations are kept, so that a next turn feeds only what is new. Ctrl-C and SIGTERM end it, once the answers being made are there
or --grace-seconds have passed.

Examples:
  kivi serve path/to/model
  kivi serve path/to/model --port 9000 --cache-memory 4GB --k-bits 4 --v-bits 4
  KIVI_API_KEY=secret kivi serve path/to/model --host 0.0.0.0
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os

from modules.cli.command import argument, check_least, flag_of
from modules.cli.generate.flags import RunFlags
from modules.cli.sizes import parse_bytes
from modules.cli.source import MODEL_HELP

DESCRIPTION = (__doc__ or "").strip()
KEY_VARIABLE = "KIVI_API_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(RunFlags):
    """The command line."""

    model: str = argument(help=MODEL_HELP, positional=True)
    gguf_file: str | None = argument(None, "a GGUF file in the folder MODEL")
    model_name: str | None = argument(None, "by which clients ask for it; None: the last part of MODEL")
    host: str = argument("127.0.0.1", "address to listen on; other than this machine's own it needs a key")
    port: int = argument(8000, "to listen on; 0 takes a free one")
    api_key: str | None = argument(None, f"that clients must know; None: the variable {KEY_VARIABLE}, if it is set")
    max_new_tokens: int = argument(1024, "longest answer, also of a chat that names no limit (tokens)")
    max_context: int | None = argument(None, "of a prompt and its answer (tokens); None: the model's")
    max_batch: int = argument(8, "answers that are made together")
    max_waiting: int = argument(64, "requests that may wait for their turn")
    max_body: str = argument("4MB", "largest request")
    max_seconds: float = argument(300.0, "for a request to come in, and for an answer, waiting included (seconds)")
    grace_seconds: float = argument(10.0, "for answers being made, once the server is to end (seconds)")
    cache_memory: str = argument("1GB", "for caches of past conversations; 0B keeps none")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_batch", "max_waiting"):
            check_least(getattr(self, name), 1, flag_of(name))
        if self.max_context is not None:
            check_least(self.max_context, 2, "--max-context")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be from 0 to 65535; got {self.port}.")
        if not 0 < self.max_seconds < float("inf"):
            raise ValueError(f"--max-seconds must be above 0; got {self.max_seconds}.")
        if not 0 <= self.grace_seconds < float("inf"):
            raise ValueError(f"--grace-seconds must be 0 or above; got {self.grace_seconds}.")
        check_least(self.body_bytes, 1, "--max-body")
        parse_bytes(self.cache_memory, "--cache-memory")
        if self.key == "":
            raise ValueError(f"--api-key and {KEY_VARIABLE} must not be empty.")
        if not is_loopback(self.host) and self.key is None:
            raise ValueError(
                f"--host {self.host} can be reached from other machines: set {KEY_VARIABLE} or give --api-key, or listen on "
                "127.0.0.1."
            )

    @property
    def key(self) -> str | None:
        """The key that clients must know; None for none."""
        return os.environ.get(KEY_VARIABLE) if self.api_key is None else self.api_key

    @property
    def body_bytes(self) -> int:
        """Largest request, in bytes."""
        return parse_bytes(self.max_body, "--max-body")

    @property
    def cache_bytes(self) -> int:
        """Of past conversations."""
        return parse_bytes(self.cache_memory, "--cache-memory")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than localhost may mean any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


COMMAND = Serve
