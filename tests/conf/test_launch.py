"""Launch settings: presets, and what passes through to DeepSpeed."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from conf.launch import DEEPSPEED_ENGINES, LaunchConfig
from conf.pretrain import PretrainConfig
from model.optimizer import UpdateRule
from model.zero import zero_options

PRESETS = sorted((Path(__file__).resolve().parents[2] / "conf" / "launch").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid_and_has_a_launcher_for_its_engine(path: Path) -> None:
    launch = LaunchConfig.model_validate(yaml.safe_load(path.read_text("utf-8")))
    assert launch.launcher != "deepspeed" or launch.engine in DEEPSPEED_ENGINES
    assert (launch.engine == "plain") == (launch.processes == 1)


def test_nothing_of_the_launch_is_identity() -> None:
    compiled = LaunchConfig(compile=True, engine="fsdp", processes=2, fused_head=False)
    assert PretrainConfig(launch=compiled).identity() == PretrainConfig().identity()


def test_options_of_deepspeed_pass_through_beside_ours() -> None:
    launch = LaunchConfig(
        engine="zero3", deepspeed={"zero_optimization": {"sub_group_size": 10**6}}
    )
    found = zero_options(launch, UpdateRule(clip_norm=0.5))
    assert found["zero_optimization"] == {"sub_group_size": 10**6, "stage": 3}
    assert found["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fp16": {"enabled": True}}, "deepspeed.fp16 is chosen by our own settings"),
        ({"zero_optimization": {"stage": 1}}, "the stage is chosen by engine"),
        ({"zero_optimization": {"offload_param": {}}}, "what is offloaded by offload"),
    ],
)
def test_what_would_contradict_our_settings_is_refused(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        LaunchConfig(deepspeed=options)


def test_what_is_offloaded_is_told_to_deepspeed() -> None:
    found = zero_options(LaunchConfig(engine="zero3", offload="parameters"), UpdateRule())
    devices = {
        name: found["zero_optimization"][name]["device"]
        for name in ("offload_optimizer", "offload_param")
    }
    assert devices == {"offload_optimizer": "cpu", "offload_param": "cpu"}


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"engine": "ddp", "offload": "optimizer"}, "use engine=zero1 or zero2 or zero3"),
        ({"engine": "zero2", "offload": "parameters"}, "use engine=fsdp or zero3"),
        ({"engine": "fsdp", "adamw": "deepspeed"}, "use adamw=torch, or engine=zero1"),
        ({"launcher": "deepspeed", "engine": "zero1", "nodes": 2}, "a host file and nodes=2"),
        ({"hostfile": "hosts"}, "go together under launcher=deepspeed"),
    ],
)
def test_what_an_engine_does_not_offer_is_refused(launch: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LaunchConfig.model_validate(launch)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"optimizer": "muon", "launch": {"engine": "zero2"}},
            "use launch.engine=fsdp or optimizer=adamw",
        ),
        ({"exclude": ["web"]}, "should match pattern"),
        ({"cycle": 1.5}, "less than or equal to 1.25"),
    ],
)
def test_pretraining_refuses_what_cannot_be(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate(settings)
