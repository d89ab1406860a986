"""Which checkpoint a name stands for, and its tokenizer."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.runs import Home, RunRecord, find_artifact
from storage.checkpoint import CONFIG, TOKENIZER
from storage.tokenizer import META_FILE, MODEL_FILE, SPECIAL_TOKENS, ChatTokenizer, TokenizerMeta

BEST_FIRST = ("ppo", "dpo", "sft", "adopt", "pretrain")
"""Which stage's policy is served when none is named."""


@dataclass(frozen=True)
class Served:
    """A checkpoint under the name that requests call it by."""

    name: str
    folder: Path
    """The `files` of a policy, or a Hugging Face folder."""
    tokenizer: ChatTokenizer


def find_served(names: list[str], home: Home) -> list[Served]:
    """The checkpoints that are named, `ARTIFACT` or `NAME=ARTIFACT`; the newest run's best without any.

    Raises ValueError for what is no language model, and for two of one name.
    """
    served = [_find(name, home) for name in names or [_newest(home)]]
    if len({item.name for item in served}) < len(served):
        raise ValueError(
            f"two checkpoints are called alike ({', '.join(item.name for item in served)}); give "
            "them names: NAME=ARTIFACT"
        )
    return served


def _find(named: str, home: Home) -> Served:
    name, _, artifact = named.rpartition("=")
    folder = Path(artifact)
    if not (folder / CONFIG).is_file():
        folder = _stored(artifact, home)
    if (folder / TOKENIZER).is_dir():
        tokenizer = ChatTokenizer(folder / TOKENIZER)
    else:
        tokenizer = _exported_tokenizer(folder)
    return Served(name or Path(artifact).name, folder.absolute(), tokenizer)


def _stored(artifact: str, home: Home) -> Path:
    store = home.used_store()
    record = find_artifact(artifact, home, store)
    is_export = record.kind == "export"
    if record.kind != "policy" and not is_export:
        raise ValueError(
            f"{artifact} is a {record.kind}; name a policy (pretrain, sft, dpo, ppo) or an export"
        )
    path = store.find(record.fingerprint)
    if path is None:
        raise ValueError(f"{artifact}: the artifact is damaged; `bessemer run` rebuilds it")
    if is_export and not (path / "files" / CONFIG).is_file():
        raise ValueError(f"{artifact} is an export for llama.cpp; name its policy, or a target=hf")
    return path / "files"


def _newest(home: Home) -> str:
    """The fingerprint of the newest run's policy that went through most."""
    for run in home.records():
        if found := _policies(run):
            return f"{found[0][1]}={found[0][2]}"
    raise ValueError(
        "no run has made a model yet; `bessemer run demo` makes the first, or name one"
    )


def _policies(run: RunRecord) -> list[tuple[int, str, str]]:
    return sorted(
        (BEST_FIRST.index(stage.stage), stage.node, stage.fingerprint)
        for stage in run.stages.values()
        if stage.stage in BEST_FIRST and stage.status in ("hit", "built") and stage.fingerprint
    )


def _exported_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer of a Hugging Face folder that has the marks of a conversation.

    Raises ValueError for another one.
    """
    if not (folder / MODEL_FILE).is_file():
        raise ValueError(
            f"{folder} has no {MODEL_FILE}; take the model into a recipe by the stage adopt, whose tokenizer "
            "reads older forms too, and serve that"
        )
    content = (folder / MODEL_FILE).read_bytes()
    parsed: dict[str, Any] = json.loads(content)
    ids: dict[str, int] = {token["content"]: token["id"] for token in parsed["added_tokens"]}
    missing = {SPECIAL_TOKENS["im_start"], SPECIAL_TOKENS["im_end"]} - ids.keys()
    if missing:
        raise ValueError(
            f"{folder / MODEL_FILE} has no {' and no '.join(sorted(missing))}; take the model into a "
            "recipe by the stage adopt, which adds them, and serve that"
        )
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
    generation = folder / "generation_config.json"
    if generation.is_file():
        config |= json.loads(generation.read_text("utf-8"))
    end, ends = ids[SPECIAL_TOKENS["im_end"]], config.get("eos_token_id")
    others = [token for token in (ends if isinstance(ends, list) else [ends]) if token != end]
    pad = config.get("pad_token_id")
    meta = TokenizerMeta(
        vocabulary=int(config["vocab_size"]),
        special={
            "pad": end if pad is None else int(pad),
            "eos": next((int(token) for token in others if token is not None), end),
            "im_start": ids[SPECIAL_TOKENS["im_start"]],
            "im_end": end,
        },
        digest=hashlib.sha256(content).hexdigest(),
        pretokenizer="other",
    )
    with tempfile.TemporaryDirectory() as both:
        (Path(both) / MODEL_FILE).write_bytes(content)
        (Path(both) / META_FILE).write_text(meta.model_dump_json(), "utf-8")
        return ChatTokenizer(Path(both))
