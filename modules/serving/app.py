"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.cli.generate.streaming import drawn, stop_tokens
from modules.serving import schemas
from modules.serving.engine import Engine
from modules.serving.errors import ApiError, server_error
from modules.serving.gate import Gate, Limits
from modules.serving.job import Done, Event, Failed, Job, Piece
from modules.serving.prompts import Prompts
from modules.serving.replies import Reply
from modules.serving.schemas import ChatRequest, CompletionRequest

log = logging.getLogger("kivi.serve")


@dataclasses.dataclass(frozen=True)
class Served:
    """A model as it is offered.

    Attributes:
        name: by which requests ask for it.
        prompts: its tokens and lengths.
        max_seconds: for an answer.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    prompts: Prompts
    max_seconds: float

    def job(self, request: schemas.Request, prompt: list[int], max_tokens: int, emit: Callable[[Event], None]) -> Job:
        """What a request asks for."""
        temperature = 1.0 if request.temperature is None else request.temperature
        return Job(
            prompt,
            self.tokenizer,
            emit,
            max_tokens=max_tokens,
            choose=drawn(temperature, 1.0 if request.top_p is None else request.top_p, request.seed),
            ends=stop_tokens(self.model, self.tokenizer),
            stops=request.stops,
            seconds=self.max_seconds,
        )


def create_app(served: Served, limits: Limits) -> Gate:
    """The ASGI application; its lifespan starts and closes the engine."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        yield
        await run_in_threadpool(served.engine.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failure)
    created = int(time.time())

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = served.engine.alive
        return JSONResponse({"status": "ok" if alive else "down"}, 200 if alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        one = {"id": served.name, "object": "model", "created": created, "owned_by": "kivi"}
        return {"object": "list", "data": [one]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(served, request, body, served.prompts.of_chat)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(served, request, body, served.prompts.of_completion)

    return Gate(app, limits)


async def _answer(
    served: Served, request: Request, body: Any, tokens_of: Callable[[Any], tuple[list[int], int]]
) -> Response:
    if body.model != served.name:
        raise ApiError(
            404,
            f"there is no model {body.model[:100]!r} here; this is {served.name!r}.",
            param="model",
            code="model_not_found",
        )
    prompt, max_tokens = await run_in_threadpool(tokens_of, body)
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def emit(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(queue.put_nowait, event)

    job = served.job(body, prompt, max_tokens, emit)
    served.engine.submit(job)
    events = _events(request, job, queue)
    first = await anext(events, None)  # errors until here have a status of their own
    if isinstance(first, Failed):
        raise first.error
    reply = Reply(served.name, isinstance(body, ChatRequest))
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = _streamed(reply, job, first, events, with_usage)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    return await _whole(reply, job, first, events)


async def _events(request: Request, job: Job, queue: asyncio.Queue[Event]) -> AsyncGenerator[Event, None]:
    """The events of a job, to its end or until the client goes away, which frees its place."""
    gone = asyncio.create_task(_gone(request))
    try:
        while True:
            coming = asyncio.create_task(queue.get())
            await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return
            yield coming.result()
            if not isinstance(coming.result(), Piece):
                return
    finally:
        gone.cancel()
        job.cancelled = True
        _note(request, job)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _note(request: Request, job: Job) -> None:
    """What the log says of an answer: numbers alone."""
    first = "-" if job.first_token is None else f"{job.first_token - job.asked:.2f}s"
    request.scope["state"]["log"] = {
        "prompt": len(job.prompt), "cached": job.cached, "new": len(job.tokens), "first": first, "whole": job.ended
    }  # fmt: skip


async def _whole(reply: Reply, job: Job, first: Event | None, events: AsyncGenerator[Event, None]) -> Response:
    text: list[str] = []
    event = first
    async with contextlib.aclosing(events):
        while event is not None:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Done):
                return JSONResponse(reply.whole("".join(text), event.reason, job))
            text.append(event.text)
            event = await anext(events, None)
    return Response(status_code=499)  # nobody is there to read it


async def _streamed(
    reply: Reply, job: Job, first: Event | None, events: AsyncGenerator[Event, None], with_usage: bool
) -> AsyncIterator[str]:
    event = first
    async with contextlib.aclosing(events):
        if reply.chat:
            yield _line(reply.chunk("", first=True))
        while event is not None:
            if isinstance(event, Failed):
                yield _line(event.error.body())
                return
            if isinstance(event, Done):
                yield _line(reply.chunk(reason=event.reason))
                if with_usage:
                    yield _line(reply.usage_chunk(job))
                yield "data: [DONE]\n\n"
                return
            yield _line(reply.chunk(event.text))
            event = await anext(events, None)


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _json(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def _api_error(request: Request, error: Any) -> JSONResponse:
    return _json(error)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    param, message = schemas.where_and_why(error.errors())
    return _json(ApiError(400, message, param=param))


async def _http_error(request: Request, error: Any) -> JSONResponse:
    return _json(ApiError(error.status_code, str(error.detail)))


async def _failure(request: Request, error: Exception) -> JSONResponse:
    return _json(server_error("the server failed on this request; see its log."))
