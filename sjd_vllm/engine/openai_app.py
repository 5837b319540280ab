"""vLLM's own server as an ASGI application of this process: its engine and its routes, without a port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI


@asynccontextmanager
async def openai_app(arguments: Sequence[str]) -> AsyncIterator[tuple[FastAPI, Any]]:
    """The application and vLLM's EngineClient, as `vllm serve` with these arguments would have them.

    The engine runs until the context is left. Routes of plugins are there if the variable VLLM_PLUGINS names them.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from sjd_vllm.plugin import register

    register()  # before the flags are made
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    args.model = args.model_tag or args.model
    validate_parsed_serve_args(args)
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        async with app.router.lifespan_context(app):
            yield app, engine
