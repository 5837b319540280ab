"""Flags and config: every documented way to ask for sjd gives the same engine, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from sjd_vllm.config import FIRST_GUESS_NAMES, GUMBEL, REDRAFT_NAMES, ConfigError, SJDConfig
from sjd_vllm.core import FIRST_GUESS_NAMES as CORE_FIRST_GUESS_NAMES
from sjd_vllm.core import GUMBEL as CORE_GUMBEL
from sjd_vllm.core import REDRAFT_NAMES as CORE_REDRAFT_NAMES
from sjd_vllm.plugin import register
from tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("plugin"))


def config_of(args: EngineArgs) -> Any:
    args.skip_tokenizer_init = True
    return args.create_engine_config()


def parse(model: Path, *flags: str) -> EngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(model), *flags]))


@pytest.mark.parametrize(
    "flags",
    [
        ["--speculative-model=[sjd]", "--num-speculative-tokens", "12"],
        ["--speculative-model", "sjd", "--num-speculative-tokens", "12"],
        ["--spec-method", "sjd", "--spec-tokens", "12"],
        ["--speculative-config", '{"method": "sjd", "num_speculative_tokens": 12}'],
        ["--speculative-config.method", "sjd", "--speculative-config.num_speculative_tokens", "12"],
    ],
)
def test_every_spelling_gives_the_same_engine(model: Path, flags: list[str]) -> None:
    config = config_of(parse(model, *flags))
    assert config.additional_config["sjd"] == SJDConfig(num_speculative_tokens=12).to_mapping()
    assert config.speculative_config.num_speculative_tokens == 12
    assert config.parallel_config.worker_cls == "sjd_vllm.engine.worker.SJDCPUWorker"
    assert config.scheduler_config.scheduler_cls == "sjd_vllm.engine.scheduler.SJDScheduler"
    assert not config.use_v2_model_runner


def test_strategies_travel_in_the_config(model: Path) -> None:
    given = {"method": "sjd", "num_speculative_tokens": 0, "redraft": "reuse", "first_guess": "left_probs"}
    config = config_of(EngineArgs(model=str(model), speculative_config=given))
    expected = SJDConfig(num_speculative_tokens=0, redraft="reuse", first_guess="left_probs")
    assert config.additional_config["sjd"] == expected.to_mapping()


@pytest.mark.parametrize(
    ("binding", "settings", "expected"),
    [
        ("nobind", {}, "uni"),
        ("nobind", {"distributed_executor_backend": "mp"}, "mp"),
        ("nobind", {"tensor_parallel_size": 2}, "mp"),
        ("auto", {}, "mp"),
    ],
)
def test_a_worker_that_is_alone_runs_in_the_engines_process(
    model: Path, monkeypatch: pytest.MonkeyPatch, binding: str, settings: dict[str, Any], expected: str
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    config = config_of(EngineArgs(model=str(model), speculative_config={"method": "sjd"}, **settings))
    assert config.parallel_config.distributed_executor_backend == expected


def test_other_engines_are_left_alone(model: Path) -> None:
    config = config_of(EngineArgs(model=str(model)))
    assert "sjd" not in config.additional_config
    assert config.speculative_config is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_speculative_tokens": 129}, "0 to 128"),
        ({"num_speculative_tokens": -1}, "0 to 128"),
        ({"redrafts": "coupled"}, "Did you mean 'redraft'"),
        ({"redraft": "resampel"}, "Did you mean 'resample'"),
        ({"first_guess": "left"}, "first_guess must be one of"),
        ({"first_guess": "left_probs"}, "gumbel makes its first drafts uniform"),
        ({"adaptive_window": "yes"}, "true or false"),
        ({"reuse_threshold": 0}, "above 0"),
    ],
)
def test_bad_settings_are_refused(model: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(EngineArgs(model=str(model), speculative_config={"method": "sjd", **given}))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"scheduling_policy": "priority"}, "scheduling_policy"),
        ({"worker_cls": "my.Worker"}, "worker_cls"),
        ({"scheduler_cls": "my.Scheduler"}, "scheduler_cls"),
        ({"async_scheduling": True}, "async_scheduling"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
    ],
)
def test_unsupported_engine_settings_are_refused(model: Path, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config_of(EngineArgs(model=str(model), speculative_config={"method": "sjd"}, **settings))


def test_registering_twice_patches_once() -> None:
    before = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is before


def test_the_config_knows_the_strategies_of_the_core() -> None:
    """The config must not import torch, so it names them itself."""
    assert set(REDRAFT_NAMES) == {GUMBEL, *CORE_REDRAFT_NAMES}
    assert GUMBEL == CORE_GUMBEL
    assert set(FIRST_GUESS_NAMES) == set(CORE_FIRST_GUESS_NAMES)
