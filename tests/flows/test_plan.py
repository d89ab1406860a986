"""The recipes that come with Bessemer are sound, and a plan tells what training will cost."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from conf.compose import recipes
from flows.costs import costs_of, device_memory, measured_peak
from flows.forecast import costs_table
from flows.graph import load_graph
from flows.lookup import Lookup
from flows.plan import contract, plan
from flows.preparation import PARTS, Request, prepare
from flows.runs import Home
from storage.record import Record
from storage.tokens import SplitCount, Tokens, TokensMeta, write_meta
from tasks.processes import cuda_devices

NEEDS_DATA = ("standard", "small", "baby_llama2", "zero_chatgpt")
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


def test_the_parts_of_the_demo_follow_each_other(tmp_path: Path) -> None:
    def selected(part: str) -> set[str]:
        request = Request("demo", part=part)
        return set(prepare(request, Home(tmp_path), base=tmp_path, appends=False).selected)

    corpus, pretraining, alignment, evaluation = map(selected, PARTS)
    assert {"world", "tokenize"} <= corpus
    assert pretraining - corpus == {"pretrain"}
    assert {"sft", "dpo", "ppo"} <= alignment - pretraining
    assert not any(name.startswith("evaluate") for name in alignment)
    assert {"evaluate_ppo", "export", "ppo", "audit"} <= evaluation


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
    expected = told["pretrain"]["expected"]
    # 2,000,000 tokens in steps of 2,048: 976.6; 5 % of 977 are 48.85. Attention is 12 x 3 x 128 x 128
    # a token beyond the 6 of each weight.
    assert expected["parameters"] == parameters
    assert expected["embedding_share"] == pytest.approx(128_000 / parameters)
    assert (expected["steps"], expected["warmup_steps"]) == (977, 49)
    assert expected["tokens"] == 977 * 2048
    assert expected["flops"] == 977 * 2048 * (6 * parameters + 12 * 3 * 128 * 128)
    assert expected["weights_bytes"] == expected["gradients_bytes"] == 4 * parameters
    assert expected["optimizer_bytes"] == 8 * parameters
    assert expected["seconds"] > 0
    # The stages after it train the same model; PPO holds two more and trains two.
    assert {told[name]["expected"]["parameters"] for name in ("sft", "reward", "dpo", "ppo")} == {
        parameters
    }
    assert told["ppo"]["expected"]["weights_bytes"] == 16 * parameters
    assert told["sft"]["expected"]["steps"] == 400


def test_a_stated_peak_decides_the_time_and_a_model_of_embeddings_is_warned_about(
    tmp_path: Path,
) -> None:
    overrides = ["tokenizer.vocabulary=32000", "pretrain.tokens=2048000"]
    execution = prepare(Request("demo", overrides), Home(tmp_path), base=tmp_path, appends=False)
    [told] = [x for x in plan(execution, tmp_path, peak_flops=1e12) if x.node == "pretrain"]
    assert told.costs is not None
    # One device at 65 % of the peak, which is what a CPU reaches, or 40 % of an accelerator's.
    share = 0.4 if cuda_devices() else 0.65
    assert told.costs.seconds == pytest.approx(told.costs.flops / (share * 1e12))
    # 32,000 x 128 = 4,096,000 embeddings beside 3 blocks of 181,504 and a norm of 128: 88 %
    table = costs_table([told])
    assert table is not None
    shown = Console(width=200, file=io.StringIO(), record=True)
    shown.print(table)
    text = shown.export_text()
    # Steps of 2,048: 1,000, of which 5 % warm up.
    assert "1,000, 50 of warm-up" in text
    assert "of the stated 1e+12 FLOP/s" in " ".join(text.split())
    [warning] = told.costs.warnings
    assert "88% of the parameters are embeddings" in warning


def test_looks_at_held_out_text_take_their_time(tmp_path: Path) -> None:
    def flops(every: int) -> float:
        overrides = ["tokenizer.vocabulary=1000", "pretrain.tokens=2048000", "pretrain.phases=[]",
                     "pretrain.held_tokens=3000", f"pretrain.evaluate_every_steps={every}"]  # fmt: skip
        home = Home(tmp_path)
        known = prepare(Request("demo", overrides), home, base=tmp_path, appends=False).lookup
        lookup = Lookup(known.graph, known.store, tmp_path, known.hashes, False)
        record = Record(fingerprint="0", kind="tokens", stage="tokenize", digest="", identity={})
        (tmp_path / "tokens" / "record.json").write_text(record.model_dump_json(), "utf-8")
        lookup.artifacts["tokenize"] = Tokens(tmp_path / "tokens")
        costs = costs_of(lookup, lookup.graph.nodes["pretrain"], [], peak_flops=1e12)
        assert costs is not None
        return costs.flops

    train = SplitCount(tokens=900_000, documents=1, bytes=1)
    held = {
        name: SplitCount(tokens=n, documents=1, bytes=1) for name, n in (("a", 5000), ("b", 400))
    }
    (tmp_path / "tokens" / "files").mkdir(parents=True)
    meta = TokensMeta(
        eos=1, vocabulary=1000, tokenizer_digest="",
        domains={name: {"train": train, "held": split} for name, split in held.items()},
    )  # fmt: skip
    write_meta(tmp_path / "tokens" / "files", meta)
    # 1,000 steps of 2,048 tokens; 3,000 + 400 held-out ones before the first step and every 300, the last
    # at the end: 5 looks, and to read a token is a third of training on it.
    without = flops(0)
    assert flops(300) / without == pytest.approx(1 + 5 * 3400 / 3 / 2_048_000)


def test_a_cpu_is_measured_in_the_precision_that_is_asked_for() -> None:
    peaks = {measured_peak(precision) for precision in ("fp32", "bf16")}
    assert len(peaks) == 2
    assert min(peaks) > 1e7


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


def test_corrections_of_low_rank_need_next_to_no_optimizer(tmp_path: Path) -> None:
    def sft(*overrides: str) -> dict[str, float]:
        request = Request("demo", ["tokenizer.vocabulary=1000", *overrides])
        execution = prepare(request, Home(tmp_path), base=tmp_path, appends=False)
        [told] = [item for item in plan(execution, tmp_path) if item.node == "sft"]
        return told.expected

    whole, low = sft(), sft("sft.lora.rank=4")
    assert low["weights_bytes"] == whole["weights_bytes"]
    # Shape tiny, 3 blocks: query and output 128 x 128, key and value 128 x 64, three of 128 x 344;
    # 3 x 4 x (2 x 256 + 2 x 192 + 3 x 472) = 27,744 numbers learn, 8 bytes of moments each.
    assert low["optimizer_bytes"] == pytest.approx(8 * 27_744)


def test_processes_of_all_nodes_share_the_work_and_those_of_one_model_its_rows(
    tmp_path: Path,
) -> None:
    def pretrain(*overrides: str) -> dict[str, float]:
        base = ["launch.peak_tflops=1", "pretrain.held_tokens=0", "pretrain.batch_tokens=65536"]
        request = Request("demo", [*base, *overrides])
        execution = prepare(request, Home(tmp_path), base=tmp_path, appends=False)
        [told] = [item for item in plan(execution, tmp_path) if item.node == "pretrain"]
        return told.expected

    nodes = ["launch.engine=ddp", "launch.processes=2", "launch.nodes=2"]
    nodes.append("launch.rendezvous=127.0.0.1:29500")
    one, four, staged = pretrain(), pretrain(*nodes), pretrain(*nodes, "launch.pipeline_stages=2")
    assert four["seconds"] == pytest.approx(one["seconds"] / 4)
    assert four["activations_bytes"] < staged["activations_bytes"] < one["activations_bytes"]


def test_what_does_not_fit_a_device_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf '81559\\n100\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    assert device_memory() == 100 << 20
    request = Request("demo", ["tokenizer.vocabulary=1000", "launch.device=cuda"])
    execution = prepare(request, Home(tmp_path), base=tmp_path, appends=False)
    [told] = [item for item in plan(execution, tmp_path) if item.node == "pretrain"]
    assert told.costs is not None
    assert (
        "GB of the 0.1 GB of a device: lower pretrain.launch.micro_batch" in told.costs.warnings[0]
    )
    assert told.costs.seconds == 0
