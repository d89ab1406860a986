"""The loop: normalisation over the whole step, the guard, checkpoints, stopping, going on."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from conf.launch import LaunchConfig
from conf.shape import ShapeConfig
from model.batches import Batch
from model.engine import Engine, build_engine
from model.journal import Journal
from model.loop import Diverged, LoopPlan, LoopState, Stopped, train
from model.optimizer import UpdateRule
from model.ranks import Ranks
from model.transformer import Transformer, token_logprobs
from model.weights import Checkpoints, ForeignCheckpoint

SHAPE = ShapeConfig(dim=16, layers=1, heads=2, kv_heads=1, context=16)


def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, torch.Tensor]:
    logprobs = token_logprobs(model.head_weight, model.hidden(batch["ids"]), batch["labels"])
    return {"loss": -logprobs.sum() / totals["tokens"]}


def rows_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight rows whose numbers of labels differ much: 1 to 15."""
    source = torch.Generator().manual_seed(step)
    ids = torch.randint(20, (8, 16), generator=source)
    labels = ids.roll(-1, 1)
    for row in range(8):
        labels[row, 1 + 2 * row :] = -1
    return ids, labels


def batches(micro_batch: int) -> Callable[[int], list[Batch]]:
    def at(step: int) -> list[Batch]:
        ids, labels = rows_at(step)
        return [
            Batch(
                {"ids": i, "labels": part},
                {"tokens": float((part >= 0).sum())},
                i.numel(),
                [f"step{step}"],
            )
            for i, part in zip(ids.split(micro_batch), labels.split(micro_batch), strict=True)
        ]

    return at


def fresh_engine(ranks: Ranks | None = None) -> Engine:
    return build_engine(
        Transformer(SHAPE, 20, seed=3), LaunchConfig(), ranks or Ranks(), UpdateRule()
    )


def run(
    folder: Path,
    engine: Engine,
    *,
    steps: int = 6,
    at: Callable[[int], list[Batch]] | None = None,
    checkpoint_steps: int = 0,
    seed: int = 0,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> LoopState:
    plan = LoopPlan(
        steps=steps,
        learning_rate=lambda step: 1e-2,
        checkpoint_steps=checkpoint_steps,
        evaluate_steps=2 if evaluate else 0,
        bad_steps=3,
    )
    return train(
        engine,
        batch_at=at or batches(8),
        loss=loss,
        plan=plan,
        checkpoints=Checkpoints(folder / "checkpoints", {"seed": seed}, engine.ranks),
        journal=Journal(folder / "logs"),
        evaluate=evaluate,
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").open()]


def test_unequal_label_counts_are_normalised_by_the_whole_step(tmp_path: Path) -> None:
    engine = fresh_engine()
    run(tmp_path, engine, steps=1)
    model = Transformer(SHAPE, 20, seed=3)
    ids, labels = rows_at(0)
    logits = model.logits(model.hidden(ids))
    truth = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-1
    )
    [line] = metrics(tmp_path)
    assert line["loss"] == pytest.approx(truth.item(), rel=1e-6)
    truth.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_splitting_into_micro_batches_changes_only_rounding(
    tmp_path: Path, micro_batch: int
) -> None:
    run(tmp_path / "whole", fresh_engine())
    run(tmp_path / "split", fresh_engine(), at=batches(micro_batch))
    whole, split = metrics(tmp_path / "whole"), metrics(tmp_path / "split")
    assert [m["loss"] for m in split] == pytest.approx([m["loss"] for m in whole], abs=1e-6)


def test_going_on_from_a_checkpoint_gives_the_same_bits(tmp_path: Path) -> None:
    unbroken = fresh_engine()
    run(tmp_path / "unbroken", unbroken)

    def break_at_five(step: int) -> list[Batch]:
        if step == 5:
            raise KeyboardInterrupt
        return batches(8)(step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", fresh_engine(), checkpoint_steps=2, at=break_at_five)
    resumed = fresh_engine()
    run(tmp_path / "broken", resumed, checkpoint_steps=2)
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    # The replayed fifth step is logged once.
    assert [m["step"] for m in metrics(tmp_path / "broken")] == [1, 2, 3, 4, 5, 6]
    assert [m["loss"] for m in metrics(tmp_path / "broken")] == [
        m["loss"] for m in metrics(tmp_path / "unbroken")
    ]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    run(tmp_path, fresh_engine(), checkpoint_steps=2)
    newest = tmp_path / "checkpoints" / "step_000000006"
    (newest / "optimizer.safetensors").unlink()
    saved = Checkpoints(tmp_path / "checkpoints", {"seed": 0}, Ranks()).newest()
    assert saved is not None
    assert saved.step == 4


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, fresh_engine(), checkpoint_steps=1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000000005", "step_000000006"]


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, fresh_engine(), checkpoint_steps=2)
    with pytest.raises(ForeignCheckpoint, match="seed: 0 -> 1"):
        run(tmp_path, fresh_engine(), seed=1)


def test_a_request_to_stop_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    ranks = Ranks()

    def stop_in_third(step: int) -> list[Batch]:
        ranks.is_stopping = step == 2
        return batches(8)(step)

    with pytest.raises(Stopped, match="stopped after step 3 of 6"):
        run(tmp_path, fresh_engine(ranks), at=stop_in_third)
    assert run(tmp_path, fresh_engine()).step == 6
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def poisoned(steps: set[int]) -> Callable[[int], list[Batch]]:
    """Batches whose loss is not a number at those steps: a total of no tokens at all."""

    def at(step: int) -> list[Batch]:
        [batch] = batches(8)(step)
        if step in steps:
            return [Batch(batch.tensors, {"tokens": math.nan}, batch.tokens, batch.samples)]
        return [batch]

    return at


def test_a_bad_step_is_left_out_and_counted(tmp_path: Path) -> None:
    engine = fresh_engine()
    state = run(tmp_path, engine, at=poisoned({2, 4}))
    assert (state.skipped, state.bad_in_row) == (2, 0)
    assert all(weight.isfinite().all() for weight in engine.model.state_dict().values())
    assert "loss" not in metrics(tmp_path)[2]
    assert metrics(tmp_path)[2]["skipped"] == 1


def test_bad_steps_in_a_row_end_the_job_and_name_the_samples(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 5: loss nan.*in a row; its samples were step4"):
        run(tmp_path, fresh_engine(), at=poisoned({2, 3, 4}))


def test_evaluation_comes_before_the_first_and_after_the_last_step(tmp_path: Path) -> None:
    state = run(tmp_path, fresh_engine(), steps=5, evaluate=lambda step: {"held": float(step)})
    assert [m["step"] for m in metrics(tmp_path) if "held" in m] == [0, 2, 4, 5]
    assert state.evaluation == {"held": 5.0}


def test_progress_says_where_the_job_is(tmp_path: Path) -> None:
    run(tmp_path, fresh_engine())
    progress = json.loads((tmp_path / "logs" / "progress.json").read_text())
    assert (progress["step"], progress["total"], progress["unit"]) == (6, 6, "steps")


def test_the_plain_engine_refuses_several_processes() -> None:
    with pytest.raises(ValueError, match="engine plain runs in one process"):
        build_engine(Transformer(SHAPE, 20), LaunchConfig(), Ranks(0, 2), UpdateRule())
