"""A recipe becomes a typed graph; each kind of mistake is named with its place and its mend."""

from pathlib import Path
from typing import Any

import pytest

from conf.mistakes import RecipeError
from flows.graph import Graph, build_graph, check_selection, load_graph
from tests.flows.conftest import Place


def test_nodes_follow_what_they_read(place: Place) -> None:
    graph = load_graph(str(place.recipe), [], base=place.folder)
    assert list(graph.nodes) == ["mine", "coarse", "fine", "other", "blend"]
    assert graph.nodes["blend"].upstream == ["fine", "other"]
    assert graph.ancestors(["fine"]) == {"mine", "coarse", "fine"}
    assert graph.descendants(["coarse"]) == {"coarse", "fine", "blend"}


def test_a_node_may_stand_before_what_it_reads(place: Place) -> None:
    text = "stages:\n  late: {uses: smelt, from: {ore: mine}}\n  mine: {sources: [{path: raw}]}"
    place.recipe.write_text(text, "utf-8")
    assert list(load_graph(str(place.recipe), [], base=place.folder).nodes) == ["mine", "late"]


def test_seed_is_filled_in_unless_the_node_has_its_own(place: Place) -> None:
    graph = load_graph(str(place.recipe), ["seed=7", "fine.seed=1"], base=place.folder)
    seeds = [getattr(graph.nodes[name].settings, "seed", None) for name in ("coarse", "fine")]
    assert seeds == [7, 1]


def test_a_source_of_a_node_is_an_edge(place: Place) -> None:
    text = "stages:\n  a: {uses: mine, sources: [{path: raw}]}\n  mine: {sources: [{node: a, path: '*'}]}"
    place.recipe.write_text(text, "utf-8")
    assert load_graph(str(place.recipe), [], base=place.folder).nodes["mine"].upstream == ["a"]


def test_all_mistakes_are_told_together(place: Place) -> None:
    overrides = ["coarse.haet=1", "fine.heat=3", "blend.from={}", "other.from.ore=mime", "nod.a=1"]
    with pytest.raises(RecipeError) as caught:
        load_graph(str(place.recipe), overrides, base=place.folder)
    assert sorted(mistake.place for mistake in caught.value.mistakes) == [
        "nod.a=1",
        "stages.blend.from.ores",
        "stages.coarse.haet",
        "stages.fine.heat",
        "stages.other.from.ore",
    ]


MINE = {"sources": [{"path": "raw"}]}
OWN_STAGES: list[tuple[str, dict[str, Any], str, str]] = [
    ("no nodes", {}, "stages", "add nodes under `stages`"),
    ("unknown stage", {"smlet": {}}, "stages.smlet", "did you mean 'smelt'?"),
    ("unknown uses", {"a": {"uses": "mien", **MINE}}, "stages.a", "did you mean 'mine'?"),
    ("missing input", {"mine": MINE, "smelt": {}}, "stages.smelt.from.ore", "makes one: mine"),
    (
        "nobody makes the input",
        {"smelt": {}},
        "stages.smelt.from.ore",
        "add a node for it",
    ),
    (
        "unknown input",
        {"mine": MINE, "smelt": {"from": {"ore": "mine", "oar": "mine"}}},
        "stages.smelt.from.oar",
        "did you mean 'ore'?",
    ),
    (
        "unknown node",
        {"mine": MINE, "smelt": {"from": {"ore": "mien"}}},
        "stages.smelt.from.ore",
        "did you mean 'mine'?",
    ),
    (
        "wrong kind",
        {
            "mine": MINE,
            "blend": {"from": {"ores": {"a": "mine"}}},
            "smelt": {"from": {"ore": "blend"}},
        },
        "stages.smelt.from.ore",
        "a Steel, an Ore is read here",
    ),
    (
        "one where several are read",
        {"mine": MINE, "blend": {"from": {"ores": "mine"}}},
        "stages.blend.from.ores",
        "{KEY: NODE, ...}",
    ),
    (
        "several where one is read",
        {"mine": MINE, "smelt": {"from": {"ore": {"a": "mine"}}}},
        "stages.smelt.from.ore",
        "write ore: NODE",
    ),
    ("from is no mapping", {"mine": {**MINE, "from": "x"}}, "stages.mine.from", "no mapping"),
    (
        "a node's name is a number",
        {"mine": MINE, "smelt": {"from": {"ore": 3}}},
        "stages.smelt.from.ore",
        "give a node's name",
    ),
    (
        "cycle",
        {
            "a": {"uses": "smelt", "from": {"ore": "b"}},
            "b": {"uses": "smelt", "from": {"ore": "a"}},
        },
        "stages.a.from",
        "a <- b <- a",
    ),
    (
        "unknown key",
        {"mine": MINE, "smelt": {"from": {"ore": "mine"}, "haet": 1}},
        "stages.smelt.haet",
        "did you mean 'heat'?",
    ),
    (
        "unknown key of a source",
        {"mine": {"sources": [{"path": "raw", "domian": "x"}]}},
        "stages.mine.sources.0.domian",
        "did you mean 'domain'?",
    ),
    (
        "out of range",
        {"mine": MINE, "smelt": {"from": {"ore": "mine"}, "heat": 1.5}},
        "stages.smelt.heat",
        "less than or equal to 1",
    ),
    (
        "wrong type",
        {"mine": MINE, "smelt": {"from": {"ore": "mine"}, "seed": "many"}},
        "stages.smelt.seed",
        "valid integer",
    ),
    ("missing setting", {"mine": {}}, "stages.mine.sources", "is missing"),
    (
        "source without files",
        {"mine": {"sources": [{"path": "row/*.txt"}]}},
        "stages.mine.sources[0].path",
        "no file matches 'row/*.txt'",
    ),
    (
        "source of an unknown node",
        {"mine": {"sources": [{"node": "wrold", "path": "*"}]}},
        "stages.mine.sources[0].node",
        "there is no node 'wrold'",
    ),
    ("pin is no name", {"mine": {**MINE, "pin": 3}}, "stages.mine.pin", "RUN:NODE"),
    (
        "too large a vocabulary",
        {"mine": MINE, "tokenizer": {"from": {"ore": "mine"}, "vocabulary": 70_000}},
        "stages.tokenizer.vocabulary",
        "65536 or less",
    ),
]


@pytest.mark.parametrize(
    ("stages", "at", "words"), [row[1:] for row in OWN_STAGES], ids=[r[0] for r in OWN_STAGES]
)
def test_each_mistake_names_its_place_and_mend(
    place: Place, stages: dict[str, Any], at: str, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        build_graph("tiny", {"stages": stages}, base=place.folder)
    assert [mistake.place for mistake in caught.value.mistakes] == [at]
    assert words in str(caught.value)


def test_a_wrong_node_behind_an_option_is_guessed(place: Place) -> None:
    graph = load_graph(str(place.recipe), [], base=place.folder)
    with pytest.raises(RecipeError, match="did you mean 'fine'"):
        check_selection(graph, {"until": ["fien"]})


# What follows are mistakes about the real stages.

DATA = {"sources": [{"path": "raw"}]}
POLICY: dict[str, Any] = {
    "extract": DATA,
    "tokenizer": {"from": {"corpus": "extract"}, "vocabulary": 512},
    "tokenize": {"from": {"corpus": "extract", "tokenizer": "tokenizer"}},
    "pretrain": {"from": {"tokens": "tokenize"}},
    "chats": DATA,
}


def real_graph(folder: Path, stages: dict[str, Any], **top: Any) -> Graph:
    (folder / "raw").mkdir()
    (folder / "raw" / "a.jsonl").write_text("{}", "utf-8")
    return build_graph("real", {"stages": {**POLICY, **stages}, **top}, base=folder)


def test_real_stages_form_the_four_flows(tmp_path: Path) -> None:
    graph = real_graph(
        tmp_path, {"sft": {"from": {"policy": "pretrain", "conversations": "chats"}}}
    )
    flows = {name: node.flow for name, node in graph.nodes.items()}
    assert flows == {
        "extract": "corpus",
        "tokenizer": "corpus",
        "tokenize": "corpus",
        "pretrain": "pretraining",
        "chats": "alignment",
        "sft": "alignment",
    }


def test_shape_and_launch_reach_the_stages_that_have_them(tmp_path: Path) -> None:
    stages = {"pretrain": {"from": {"tokens": "tokenize"}, "launch": {"processes": 3}}}
    launch = {"engine": "ddp", "processes": 2}
    graph = real_graph(tmp_path, stages, shape={"dim": 64}, launch=launch)
    settings: Any = graph.nodes["pretrain"].settings
    assert settings.shape.dim == 64
    assert (settings.launch.engine, settings.launch.processes) == ("ddp", 3)


REAL: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    (
        "a reward model where a policy is read",
        {
            "pairs": DATA,
            "reward": {"from": {"policy": "pretrain", "preferences": "pairs"}},
            "sft": {"from": {"policy": "reward", "conversations": "chats"}},
        },
        {},
        "stages.sft.from.policy",
        "a reward model scores answers and cannot write them",
    ),
    (
        "two tokenizers",
        {
            "tokenizer2": {"uses": "tokenizer", "from": {"corpus": "extract"}},
            "tokenize2": {
                "uses": "tokenize",
                "from": {"corpus": "extract", "tokenizer": "tokenizer2"},
            },
            "more": {"uses": "pretrain", "from": {"tokens": "tokenize2", "policy": "pretrain"}},
        },
        {},
        "stages.more.from",
        "policy was made with tokenizer",
    ),
    (
        "questions asked that sft has learnt",
        {
            "chats": DATA,
            "sft": {"from": {"policy": "pretrain", "conversations": "chats"}},
            "pairs": {"from": {"policy": "sft", "conversations": "chats"}, "prompts": "withheld"},
        },
        {},
        "stages.pairs.withheld_share",
        "it withholds 0; give sft withheld_share: 0.25, or prompts: all",
    ),
    (
        "context longer than the model's",
        {"sft": {"from": {"policy": "pretrain", "conversations": "chats"}, "context": 512}},
        {"shape": {"context": 128}},
        "stages.sft.context",
        "512 tokens are more than the model's context of 128",
    ),
    (
        "answers as long as the context",
        {"pairs": DATA, "reward": {"from": {"policy": "pretrain", "preferences": "pairs"}}},
        {"shape": {"context": 256}},
        "stages.reward.max_new_tokens",
        "answers of 256 tokens leave a prompt no room in a context of 256; give reward.max_new_tokens=128",
    ),
    (
        "sampled answers of a gate as long as the context",
        {
            "pairs": DATA,
            "dpo": {"from": {"policy": "pretrain", "preferences": "pairs"}, "gate_answers": 8},
        },
        {"shape": {"context": 128}},
        "stages.dpo.max_new_tokens",
        "give dpo.max_new_tokens=64, or a shape with a longer context",
    ),
    (
        "PPO without a reward",
        {"ppo": {"from": {"policy": "pretrain", "conversations": "chats"}}},
        {},
        "stages.ppo.from",
        "ppo has nothing that gives a reward; name the input reward in `from`, or set functions",
    ),
    (
        "looks at a truth that is not there",
        {
            "ppo": {
                "from": {"policy": "pretrain", "conversations": "chats"},
                "functions": [{"path": "raw/a.jsonl"}],
                "truth_every_iterations": 5,
            }
        },
        {},
        "stages.ppo.from",
        "the node has none; name exactly one of the input world, truth_functions, and a judge",
    ),
    (
        "a judge as the truth that is not looked at",
        {
            "ppo": {
                "from": {"policy": "pretrain", "conversations": "chats"},
                "functions": [{"path": "raw/a.jsonl"}],
                "judge": {"model": "m", "is_truth": True},
            }
        },
        {},
        "stages.ppo",
        "the truth of judge is never looked at with truth_every_iterations=0; set that to 5",
    ),
    (
        "an update that processes cannot share",
        {
            "sft": {
                "from": {"policy": "pretrain", "conversations": "chats"},
                "launch": {"engine": "ddp", "processes": 3},
            }
        },
        {},
        "stages.sft.batch_rows",
        "32 rows of an update cannot be shared by 3 processes; give sft batch_rows: 33, or other",
    ),
    (
        "a gate that looks at pairs of which none are held out",
        {
            "pairs": {**DATA, "held_share": 0},
            "dpo": {"from": {"policy": "pretrain", "preferences": "pairs"}, "on_gate": "keep_best"},
        },
        {},
        "stages.dpo.on_gate",
        "looks at what pairs holds out, which is nothing; give pairs held_share: 0.05",
    ),
    (
        "a curve over weights that pretraining does not keep",
        {"evaluate": {"from": {"policy": "pretrain"}, "has_curve": True}},
        {},
        "stages.evaluate.has_curve",
        "pretrain keeps none of them; give pretrain kept_looks: 1, or has_curve: false",
    ),
    (
        "a curve over weights that only pretraining keeps",
        {
            "sft": {"from": {"policy": "pretrain", "conversations": "chats"}},
            "evaluate": {"from": {"policy": "sft"}, "has_curve": True},
        },
        {},
        "stages.evaluate.has_curve",
        "sft keeps none of them; name the policy of a pretrain node with kept_looks: 1",
    ),
    (
        "own answers without questions",
        {"pairs": {**DATA, "from": {"policy": "pretrain"}}},
        {},
        "stages.pairs.from",
        "only one of the inputs policy and conversations, own answers need both; name both",
    ),
    (
        "a ranking by a reward model that is not there",
        {
            "pairs": {
                "from": {"policy": "pretrain", "conversations": "chats"},
                "rank_by": "reward",
                "answers": 4,
            }
        },
        {},
        "stages.pairs.from",
        "rank_by=reward and no input reward; name the input in `from` and set rank_by=reward",
    ),
    (
        "heads that processes cannot share",
        {"sft": {"from": {"policy": "pretrain", "conversations": "chats"}}},
        {
            "shape": {"kv_heads": 1},
            "launch": {"engine": "fsdp", "processes": 2, "tensor_parallel": 2},
        },
        "stages.sft.launch",
        "tensor_parallel=2 does not divide shape.kv_heads=1; use a divisor of all",
    ),
    (
        "more pipeline stages than layers",
        {},
        {"launch": {"engine": "ddp", "processes": 4, "pipeline_stages": 4}},
        "stages.pretrain.launch",
        "pipeline_stages=4 is more than shape.layers=3",
    ),
    (
        "vocabulary beyond 16 bits",
        {"tokenizer": {"from": {"corpus": "extract"}, "vocabulary": 100_000}},
        {},
        "stages.tokenizer.vocabulary",
        "vocabulary: 65536 or less",
    ),
    (
        "vocabulary beyond 16 bits of one of two",
        {
            "tokenizer": {"from": {"corpus": "extract"}, "vocabulary": 100_000},
            "tokenize": {
                "from": {"corpus": "extract", "tokenizer": "tokenizer"},
                "dtype": "uint32",
            },
            "narrow": {"uses": "tokenize", "from": {"corpus": "extract", "tokenizer": "tokenizer"}},
        },
        {},
        "stages.tokenizer.vocabulary",
        "narrow dtype: uint32",
    ),
    (
        "GGUF of a tokenizer that llama.cpp does not have",
        {
            "tokenizer": {"from": {"corpus": "extract"}, "algorithm": "wordpiece"},
            "export": {"from": {"policy": "pretrain"}, "target": "gguf"},
        },
        {},
        "stages.export.target",
        "give target: hf, or tokenizer algorithm: bpe",
    ),
    (
        "plain engine on two processes",
        {},
        {"launch": {"processes": 2}},
        "stages.pretrain.launch",
        "choose engine: ddp",
    ),
    (
        "DDP under the launcher of DeepSpeed",
        {},
        {"launch": {"engine": "ddp", "launcher": "deepspeed", "processes": 2}},
        "stages.pretrain.launch",
        "choose launcher: torchrun",
    ),
    (
        "heads that do not divide the width",
        {},
        {"shape": {"dim": 100, "heads": 3, "kv_heads": 1}},
        "stages.pretrain.shape",
        "dim=100 is not a multiple of heads=3",
    ),
]


def test_data_on_s3_are_looked_for_when_they_are_read(tmp_path: Path) -> None:
    stages = {"extract": {"sources": [{"path": "s3://bucket/crawl/*.warc.gz"}]}}
    assert "extract" in real_graph(tmp_path, stages).nodes


def test_wide_ids_allow_a_large_vocabulary(tmp_path: Path) -> None:
    wide = {
        "tokenizer": {"from": {"corpus": "extract"}, "vocabulary": 100_000},
        "tokenize": {"from": {"corpus": "extract", "tokenizer": "tokenizer"}, "dtype": "uint32"},
    }
    assert "tokenize" in real_graph(tmp_path, wide).nodes


@pytest.mark.parametrize(
    ("stages", "top", "at", "words"), [row[1:] for row in REAL], ids=[row[0] for row in REAL]
)
def test_each_mistake_about_real_stages_names_its_place(
    tmp_path: Path, stages: dict[str, Any], top: dict[str, Any], at: str, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        real_graph(tmp_path, stages, **top)
    assert at in [mistake.place for mistake in caught.value.mistakes]
    assert words in str(caught.value)
