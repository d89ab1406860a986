"""The recipes that come with Bessemer are sound, and a plan tells what training will cost."""

from pathlib import Path

import pytest

from conf.compose import recipes
from flows.graph import load_graph
from flows.plan import contract, plan
from flows.preparation import Request, prepare
from flows.runs import Home

NEEDS_DATA = ("standard", "small")
"""Recipes that name no data of their own."""


@pytest.mark.parametrize("name", [name for name in recipes() if name not in NEEDS_DATA])
def test_every_recipe_that_brings_its_data_is_sound(name: str, tmp_path: Path) -> None:
    graph = load_graph(name, [], base=tmp_path)
    assert {node.flow for node in graph.nodes.values()} == {
        "corpus",
        "pretraining",
        "alignment",
        "evaluation",
    }


def test_a_plan_of_the_demo_in_an_empty_home_misses_everything(tmp_path: Path) -> None:
    request = Request("demo", ["tokenizer.vocabulary=1000", "pretrain.tokens=2000000"])
    execution = prepare(request, Home(tmp_path), base=tmp_path, appends=False)
    told = contract(execution, plan(execution, tmp_path))["stages"]
    assert {stage["status"] for stage in told.values()} == {"miss"}
    assert told["world"]["why"] == "never built"
    assert told["extract"]["why"] == "waits for world"
    # shape tiny: a block has 128 x 32 x (2 x 4 + 2 x 2) = 49,152 in attention, 3 x 128 x 344 =
    # 132,096 in its feed-forward and 2 x 128 in norms; 3 blocks, 1,000 x 128 embeddings, a last norm.
    parameters = 3 * (49_152 + 132_096 + 256) + 128_000 + 128
    assert told["pretrain"]["expected"] == {
        "parameters": parameters,
        "memory_bytes": 16 * parameters,
        "tokens": 2_000_000,
        "flops": 6 * parameters * 2_000_000,
    }


def test_the_controls_share_the_demo_and_leave_one_thing_out(tmp_path: Path) -> None:
    demo = load_graph("demo", ["dpo.max_steps=7"], base=tmp_path).nodes
    controls = load_graph("demo_controls", ["dpo.max_steps=7"], base=tmp_path).nodes
    assert {name: controls[name] for name in demo} == demo

    def left_out(control: str, node: str) -> set[str]:
        mine, its = controls[control].settings.identity(), demo[node].settings.identity()
        return {key for key in mine if mine[key] != its[key]}

    assert left_out("dpo_plain", "dpo") == {"rpo_alpha"}
    assert left_out("ppo_without_kl", "ppo") == {"kl_coef"}
    assert left_out("reward_shuffled", "reward") == {"shuffle_labels"}
    assert left_out("pretrain_untrained", "pretrain") == {"tokens", "learning_rate", "warmup"}
    assert left_out("decontaminate_without_dedup", "decontaminate") == set()
    assert left_out("evaluate_untrained", "evaluate_pretrain") == {"has_baselines"}
    assert left_out("evaluate_dpo_plain", "evaluate_dpo") == set()
    assert left_out("evaluate_ppo_without_kl", "evaluate_ppo") == set()
