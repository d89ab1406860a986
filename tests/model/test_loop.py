"""The loop: normalisation over the whole step, the guard, checkpoints, stopping, going on."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.launch import LaunchConfig
from conf.shape import ShapeConfig
from model.batches import Batch
from model.engine import Engine, build_engine
from model.journal import Journal
from model.loop import (
    Diverged,
    LoopPlan,
    LoopState,
    Stopped,
    accumulate,
    resume_figures,
    train,
)
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
    **options: Any,
) -> LoopState:
    plan = LoopPlan(
        **options,
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


@pytest.mark.parametrize("is_asked", [True, False])
def test_where_the_same_bits_are_asked_for_no_kernel_of_a_step_only_warns(is_asked: bool) -> None:
    # On CUDA attention looks at this in its forward pass (which kernel) and backward (in which order).
    seen: list[tuple[bool, bool]] = []

    def note() -> None:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        seen.append((torch.are_deterministic_algorithms_enabled(), warns))

    def looking(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> Any:
        note()
        found = loss(model, batch, totals)
        found["loss"].register_hook(lambda _: note())
        return found

    torch.use_deterministic_algorithms(is_asked, warn_only=is_asked)
    try:
        accumulate(fresh_engine(), looking, batches(8)(0))
        note()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(is_asked, False), (is_asked, False), (is_asked, is_asked)]


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


def test_a_checkpoint_beside_training_holds_what_it_held_then(tmp_path: Path) -> None:
    for how in ("never", "always"):
        launch = LaunchConfig.model_validate({"checkpoints_beside": how, "checkpoints_kept": 6})
        run(tmp_path / how, fresh_engine(), checkpoint_steps=1, launch=launch)
    written = sorted((tmp_path / "never" / "checkpoints").rglob("*.safetensors"))
    # Six checkpoints of weights, optimizer and random numbers.
    assert len(written) == 6 * 3
    for path in written:
        other = tmp_path / "always" / path.relative_to(tmp_path / "never")
        assert other.read_bytes() == path.read_bytes(), other


def test_a_checkpoint_before_the_first_update_is_gone_on_from(tmp_path: Path) -> None:
    # Each step's gradients overflow: no optimizer has a state yet.
    engine = fp16_engine()
    assert engine.scale is not None
    engine.scale.value = 2.0**60
    run(tmp_path, engine, steps=2, checkpoint_steps=2)
    resumed = fp16_engine()
    assert run(tmp_path, resumed, steps=3).overflows == 3
    assert resumed.scale is not None
    assert resumed.scale.value == 2.0**57


def test_weights_alone_go_on_with_a_fresh_optimizer_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "six", fresh_engine(), checkpoint_steps=3, steps=3)
    shutil.copytree(tmp_path / "six", tmp_path / "strict")
    run(tmp_path / "strict", strict := fresh_engine())
    weights_alone = LaunchConfig(resume="weights")
    engine = fresh_engine()
    state = run(tmp_path / "six", engine, launch=weights_alone)
    assert resume_figures(state) == {"fresh_optimizer_step": 3}
    assert "goes on behind step 3" in capsys.readouterr().err
    # The same as three updates of a new optimizer, on the data of steps 3 to 5.
    truth = fresh_engine()
    run(tmp_path / "begun", truth, steps=3)
    anew = build_engine(truth.model, LaunchConfig(), Ranks(), UpdateRule())
    run(tmp_path / "anew", anew, steps=3, at=lambda step: batches(8)(step + 3))
    for name, weight in engine.model.state_dict().items():
        assert torch.equal(weight, anew.model.state_dict()[name]), name
    assert not torch.equal(engine.model.embedding.weight, strict.model.embedding.weight)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    run(tmp_path, fresh_engine(), checkpoint_steps=2)
    newest = tmp_path / "checkpoints" / "step_000000006"
    (newest / "optimizer" / "00000.safetensors").unlink()
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
        run(
            tmp_path,
            fresh_engine(ranks),
            at=stop_in_third,
            launch=LaunchConfig(checkpoints_beside="always"),
        )
    # Also one that is written beside is there before the job has ended.
    assert (tmp_path / "checkpoints" / "step_000000003").is_dir()
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


def with_spike(steps: set[int], size: float) -> Callable[[int], list[Batch]]:
    """Batches whose gradients are so many times larger at those steps: their total is smaller."""

    def at(step: int) -> list[Batch]:
        [batch] = batches(8)(step)
        share = size if step in steps else 1.0
        return [Batch(batch.tensors, {"tokens": batch.weights["tokens"] / share}, 1, batch.samples)]

    return at


def test_a_step_far_out_of_the_usual_is_left_out(tmp_path: Path) -> None:
    steps = {70, 72}
    guarded = run(
        tmp_path / "on", fresh_engine(), steps=75, at=with_spike(steps, 9), guard_sigmas=6.0
    )
    free = run(tmp_path / "off", fresh_engine(), steps=75, at=with_spike(steps, 9))
    assert (guarded.skipped, guarded.bad_in_row) == (2, 0)
    assert free.skipped == 0
    # What was left out tells nothing of what is usual.
    assert max(guarded.usual["loss"]) < 5
    assert len(guarded.usual["loss"]) == 73


def test_nothing_is_unusual_before_enough_steps_or_at_a_fresh_start(tmp_path: Path) -> None:
    early = run(
        tmp_path / "early", fresh_engine(), steps=40, at=with_spike({30}, 9), guard_sigmas=6.0
    )
    assert early.skipped == 0
    other_data = run(
        tmp_path / "fresh",
        fresh_engine(),
        steps=72,
        at=with_spike({70, 71}, 9),
        guard_sigmas=6.0,
        fresh_starts=frozenset({70}),
    )
    assert other_data.skipped == 0
    assert len(other_data.usual["loss"]) == 2


def test_unusual_steps_in_a_row_end_the_job_and_say_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"in a row; its samples were <step72>"):
        run(
            tmp_path,
            fresh_engine(),
            steps=80,
            at=with_spike({70, 71, 72}, 9),
            guard_sigmas=6.0,
            describe=lambda sample: f"<{sample}>",
        )


def fp16_engine() -> Engine:
    return build_engine(
        Transformer(SHAPE, 20, seed=3), LaunchConfig(), Ranks(), UpdateRule(precision="fp16")
    )


def test_gradients_too_large_for_float16_lower_the_scale_and_are_no_bad_steps(
    tmp_path: Path,
) -> None:
    engine = fp16_engine()
    assert engine.scale is not None
    engine.scale.value = 2.0**24
    state = run(tmp_path, engine, steps=20)
    halvings = math.log2(2.0**24 / engine.scale.value)
    assert state.overflows == halvings > 5
    assert (state.skipped, state.bad_in_row) == (0, 0)
    assert metrics(tmp_path)[-1]["loss_scale"] == engine.scale.value
    # The first updates came late; after that it is the same training.
    run(tmp_path / "wide", fresh_engine(), steps=20)
    wide = metrics(tmp_path / "wide")[-1]["loss"]
    assert metrics(tmp_path)[-1]["loss"] == pytest.approx(wide, abs=0.1)


def test_float16_goes_on_from_its_scale_to_the_same_bits(tmp_path: Path) -> None:
    unbroken, resumed = fp16_engine(), fp16_engine()
    run(tmp_path / "unbroken", unbroken)

    def break_at_five(step: int) -> list[Batch]:
        if step == 5:
            raise KeyboardInterrupt
        return batches(8)(step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", fp16_engine(), checkpoint_steps=2, at=break_at_five)
    run(tmp_path / "broken", resumed, checkpoint_steps=2)
    assert resumed.scale == unbroken.scale
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_recomputed_activations_change_no_bit(tmp_path: Path) -> None:
    kept = fresh_engine()
    again = build_engine(
        Transformer(SHAPE, 20, seed=3),
        LaunchConfig(checkpoint_activations=True),
        Ranks(),
        UpdateRule(),
    )
    run(tmp_path / "kept", kept, steps=3)
    run(tmp_path / "again", again, steps=3)
    for name, weight in kept.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Of the compiler's own looking around.
def test_compiled_blocks_give_the_same_losses_under_the_same_names(tmp_path: Path) -> None:
    plain, compiled = (
        build_engine(
            Transformer(SHAPE, 20, seed=3), LaunchConfig(compile=is_it), Ranks(), UpdateRule()
        )
        for is_it in (False, True)
    )
    run(tmp_path / "plain", plain, steps=4)
    run(tmp_path / "compiled", compiled, steps=4)
    assert set(compiled.whole().state_dict()) == set(plain.whole().state_dict())
    assert [m["loss"] for m in metrics(tmp_path / "compiled")] == pytest.approx(
        [m["loss"] for m in metrics(tmp_path / "plain")], rel=0, abs=1e-5
    )


def test_the_share_of_the_peak_is_flops_over_time(tmp_path: Path) -> None:
    run(tmp_path, fresh_engine(), flops_per_token=1e3, peak_flops=1e9)
    for line in metrics(tmp_path):
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 1e3 / 1e9)
        assert 0 <= line["data_wait_share"] < 1
        # A process with torch holds more than 64 MiB, and this machine has less than 2^44.
        assert 1 << 26 < line["peak_memory_bytes"] < 1 << 44


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
