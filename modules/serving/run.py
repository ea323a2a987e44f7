"""What `kivi serve` does."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from fastapi.concurrency import run_in_threadpool
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.cli.generate.loading import load_for
from modules.cli.generate.warm import warm_up
from modules.cli.status import OK
from modules.serving.app import Served, create_app
from modules.serving.engine import Engine
from modules.serving.flags import Serve
from modules.serving.gate import LOOPBACK, Limits
from modules.serving.prompts import Prompts

_FAREWELL = 5  # seconds in which answers that the grace ended are told so
_SPARE = 32  # connections beside those of requests that run or wait


def run(command: Serve) -> None:
    """Load the model and serve it until Ctrl-C or SIGTERM; the latter is an end like any other, with status 0."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("kivi.serve").setLevel(logging.INFO)
    model, tokenizer = load_for(command, command.model, gguf_file=command.gguf_file)
    warm_up(model, model.create_kivi_cache())
    signal.signal(signal.SIGTERM, _end)  # uvicorn raises the signal again once it has ended
    Server(served_by(command, model, tokenizer), command).run()


def _end(*_: Any) -> NoReturn:
    raise SystemExit(OK)


def served_by(command: Serve, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Served:
    """A model that is loaded, as a command offers it.

    Raises:
        ValueError: for a model of unknown context.
    """
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or command.max_context
    if context is None:
        raise ValueError("the model's config says no max_position_embeddings; give --max-context.")
    context = min(context, command.max_context or context)
    return Served(
        name=command.model_name or Path(command.model).name,
        model=model,
        tokenizer=tokenizer,
        engine=Engine(
            model, max_batch=command.max_batch, max_waiting=command.max_waiting, cache_memory=command.cache_bytes
        ),
        prompts=Prompts(tokenizer, context, config.vocab_size, command.max_new_tokens),
        max_seconds=command.max_seconds,
    )


class Server(uvicorn.Server):
    """uvicorn with the settings of a command; says where it listens once it does."""

    def __init__(self, served: Served, command: Serve) -> None:
        self.served, self.grace = served, command.grace_seconds
        hosts = LOOPBACK if command.key is None else None
        config = uvicorn.Config(
            create_app(served, Limits(command.key, command.body_bytes, command.max_seconds, hosts)),
            host=command.host,
            port=command.port,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            limit_concurrency=command.max_batch + command.max_waiting + _SPARE,
            timeout_graceful_shutdown=math.ceil(command.grace_seconds) + _FAREWELL,
        )
        super().__init__(config)

    async def startup(self, sockets: list | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        for address in self.addresses:
            logging.getLogger("kivi.serve").info("listening on http://%s:%d/v1; Ctrl-C ends it", *address)

    async def shutdown(self, sockets: list | None = None) -> None:
        """As uvicorn's; answers that the grace is too short for end with an error that says so, rather than cut off."""
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self.grace)
        await run_in_threadpool(self.served.engine.close)

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Hosts and ports that it listens on."""
        if not self.started:
            return []
        return [socket.getsockname()[:2] for server in self.servers for socket in server.sockets]
