"""Pretraining: next-token loss on a mixture of token files. Worker: `python -m model.pretrain JOBFILE`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from conf.contract import JobFile
from conf.pretrain import PretrainConfig, PretrainPlan
from model.batches import (
    BLOCK_SAMPLES,
    Batch,
    Ints,
    MixPhase,
    Mixture,
    Windows,
    first_labels,
    micro_batch_rows,
)
from model.curriculum import Curriculum
from model.engine import Loss, build_engine
from model.head import label_loss
from model.held_out import document_mask, window_losses
from model.journal import Journal
from model.looks import Looks
from model.loop import LoopPlan, LoopState, resume_figures, train
from model.noise import Noise
from model.optimizer import UpdateRule, learning_rate
from model.ranks import Ranks
from model.speed import Peak, device_peak, peak_memory
from model.transformer import Transformer, token_logprobs
from model.weights import Checkpoints, load_model, save_model
from model.worker import identity_of_job, run
from storage.checkpoint import ReadWindows
from storage.tokens import TOKENIZER_FOLDER, TokenFiles


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Train the job's model and write the policy; the figures of the result."""
    settings = PretrainConfig.model_validate(job.settings)
    files = TokenFiles(Path(job.inputs["tokens"]))
    plan = settings.plan({name: files.count(name, "train").tokens for name in files.domains})
    model = build_model(settings, files, job.inputs.get("policy"))
    engine = build_engine(model, job.launch, ranks, update_rule(settings))
    samples = Samples(files, settings, plan, ranks, job.launch.micro_batch)
    looks = Looks(files, settings, ranks, journal, job.state, job.files)

    def prepare(step: int) -> None:
        samples.curriculum.prepare(
            step,
            job.state,
            lambda windows: window_losses(engine.whole(), windows, settings, ranks),
            ranks,
        )

    def batches(step: int) -> list[Batch]:
        prepare(step)
        return samples.at(step)

    peak = device_peak(ranks.device, settings.precision, settings.launch.peak_tflops)
    state = train(
        engine,
        batch_at=batches,
        loss=pretrain_loss(settings),
        plan=loop_plan(settings, plan, samples, ranks.add([peak.flops])[0] * ranks.peers),
        checkpoints=Checkpoints(job.state / "checkpoints", identity_of_job(job, settings), ranks),
        journal=journal,
        evaluate=lambda step: looks.at(step, engine.whole()),
    )
    # A job that goes on from its last step has not ordered the windows yet.
    prepare(state.step)
    trained = engine.whole()
    seen = looks.restore(trained) if settings.keeps_best else state.evaluation
    if ranks.is_first:
        tokenizer = files.folder / TOKENIZER_FOLDER
        save_model(job.files, trained, role="policy", tokenizer=tokenizer)
        samples.read_windows(int(seen.get("kept_step", state.step))).write(job.files)
    return (
        figures(state, settings, samples)
        | seen
        | speed_figures(state, settings, samples, peak, ranks)
    )


def build_model(settings: PretrainConfig, files: TokenFiles, policy: str | None) -> Transformer:
    """A new model, or the policy in that `files` folder.

    Raises ValueError when the policy has another shape or vocabulary than the settings and the data.
    """
    vocabulary = files.meta.vocabulary
    if policy is None:
        return Transformer(settings.shape, vocabulary, seed=settings.seed)
    model = load_model(Path(policy))
    # Dropout is no part of the weights; continuing may choose it anew.
    if model.shape.model_copy(update={"dropout": settings.shape.dropout}) != settings.shape:
        raise ValueError(
            f"the policy to continue has shape {model.shape}, the settings say {settings.shape}; "
            f"give the settings the policy's shape"
        )
    if model.vocabulary != vocabulary:
        raise ValueError(
            f"the policy to continue has {model.vocabulary} token ids, the data {vocabulary}; "
            f"tokenize with the policy's tokenizer"
        )
    continued = Transformer(settings.shape, vocabulary)
    continued.load_state_dict(model.state_dict())
    return continued


def update_rule(settings: PretrainConfig) -> UpdateRule:
    """The settings' update rule."""
    return UpdateRule(
        weight_decay=settings.weight_decay,
        betas=(0.9, settings.beta2),
        clip_norm=settings.clip,
        precision=settings.precision,
        optimizer=settings.optimizer,
    )


def loop_plan(
    settings: PretrainConfig, plan: PretrainPlan, samples: "Samples", peak_flops: float
) -> LoopPlan:
    """The settings' course; `peak_flops` is that of all devices together."""
    ends: list[int] = np.cumsum([steps for steps, _ in plan.phases]).tolist()
    return LoopPlan(
        steps=plan.steps,
        learning_rate=lambda step: learning_rate(
            step,
            schedule=settings.schedule,
            peak=settings.learning_rate,
            steps=plan.steps,
            warmup_steps=plan.warmup_steps,
            floor=settings.floor,
            stable_share=settings.stable,
            decay_share=settings.decay,
            cycle=settings.cycle,
            cosine_level=settings.cosine_level,
            stable_level=settings.stable_level,
        ),
        checkpoint_steps=settings.checkpoint_every_steps,
        launch=settings.launch,
        evaluate_steps=settings.evaluate_every_steps if settings.held_tokens else 0,
        bad_steps=settings.bad_steps,
        guard_sigmas=settings.guard_sigmas,
        patience=settings.stop_patience,
        least_gain=settings.stop_gain,
        fresh_starts=samples.curriculum.breaks(settings.row_tokens).union(ends),
        flops_per_token=settings.shape.training_flops(samples.vocabulary, settings.row_tokens),
        peak_flops=peak_flops,
        describe=samples.described,
    )


def pretrain_loss(settings: PretrainConfig) -> Loss:
    """Mean negative log-probability of the step's labels, in nats per token."""

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        noise = Noise(settings.seed, batch["rows"]) if settings.shape.dropout else None
        hidden = model.hidden(batch["ids"], mask=document_mask(batch, settings), noise=noise)
        if _has_fused_head(settings):
            nats = label_loss(
                model.head_weight, hidden, batch["labels"], is_compiled=settings.launch.compile
            )
        else:
            nats = -token_logprobs(model.head_weight, hidden, batch["labels"]).sum()
        # A step of which every row is excluded has no labels, and is no bad one.
        return {"loss": nats / max(totals["tokens"], 1)}

    return loss


def _has_fused_head(settings: PretrainConfig) -> bool:
    """In float16 gradients that are not scaled yet would lose their small parts."""
    return settings.launch.fused_head and settings.precision != "fp16"


class Samples:
    """The rows of every step, as micro-batches of this rank."""

    def __init__(
        self,
        files: TokenFiles,
        settings: PretrainConfig,
        plan: PretrainPlan,
        ranks: Ranks,
        micro_batch: int,
    ) -> None:
        self.domains, self.rows, self._context = (
            plan.domains,
            settings.batch_rows,
            settings.row_tokens,
        )
        self.vocabulary = files.meta.vocabulary
        self._ends = [files.ends(name, "train") for name in plan.domains]
        self._excluded = self._numbers(settings.exclude)
        self._ranks, self._micro_batch, self._eos = ranks, micro_batch, files.meta.eos
        self._is_document_masked = settings.is_document_masked
        self._windows = [
            Windows(files.tokens(name, "train"), self._context, files.meta.eos)
            for name in plan.domains
        ]
        self.curriculum = Curriculum(
            settings.curriculum,
            files,
            dict(zip(plan.domains, self._windows, strict=True)),
            steps=plan.steps,
            rows=self.rows,
            seed=settings.seed,
        )
        self.mixture = Mixture(
            [len(windows) for windows in self._windows],
            [MixPhase(steps * self.rows, shares) for steps, shares in plan.phases],
            settings.seed,
        )

    def at(self, step: int) -> list[Batch]:
        """Micro-batches of update number `step`."""
        first = step * self.rows
        sources, windows = self._drawn(first, self.rows)
        rows = np.arange(self.rows)
        return [
            self._batch(step, first + own, sources[own], windows[own])
            for own in micro_batch_rows(
                rows, self._ranks.rank, self._ranks.world, self._micro_batch
            )
        ]

    def described(self, sample: str) -> str:
        """A sample with the documents it comes from, both counted from 0."""
        name, _, number = sample.rpartition("/")
        source = self.domains.index(name)
        first = int(number) * self._context
        last = min(first + self._context, int(self._ends[source][-1])) - 1
        begin, end = np.searchsorted(self._ends[source], [first, last], side="right").tolist()
        documents = f"document {begin}" if begin == end else f"documents {begin} to {end}"
        return f"{sample} ({documents})"

    def _numbers(self, excluded: Sequence[str]) -> list[Ints]:
        """Windows of each domain that train nothing."""
        found: dict[str, list[int]] = {name: [] for name in self.domains}
        for sample in excluded:
            name, _, number = sample.rpartition("/")
            if name not in found:
                raise ValueError(
                    f"exclude names sample {sample!r}, and there is no domain {name!r}; the data has "
                    f"{', '.join(self.domains)}"
                )
            found[name].append(int(number))
        return [np.array(numbers, np.int64) for numbers in found.values()]

    def epochs(self, steps: int) -> dict[str, float]:
        """How often so many steps read each domain."""
        used = np.zeros(len(self.domains), np.int64)
        for sources, _ in self._blocks(steps):
            used += np.bincount(sources, minlength=len(used))
        return {
            name: float(count) / len(windows)
            for name, count, windows in zip(self.domains, used, self._windows, strict=True)
            if len(windows)
        }

    def read_windows(self, steps: int) -> ReadWindows:
        """Every window that so many steps train on at least once."""
        read = [np.zeros(len(windows), np.bool_) for windows in self._windows]
        for sources, windows in self._blocks(steps):
            for source in np.unique(sources):
                read[source][windows[sources == source]] = True
        for bits, excluded in zip(read, self._excluded, strict=True):
            bits[excluded[excluded < len(bits)]] = False
        packed = [np.packbits(bits, bitorder="little").tobytes() for bits in read]
        return ReadWindows(
            row_tokens=self._context,
            domains={
                name: ReadWindows.pack(bits)
                for name, bits in zip(self.domains, packed, strict=True)
            },
        )

    def _blocks(self, steps: int) -> Iterator[tuple[Ints, Ints]]:
        """Domains and windows of all samples of so many steps."""
        count = steps * self.rows
        for first in range(0, count, BLOCK_SAMPLES):
            yield self._drawn(first, min(BLOCK_SAMPLES, count - first))

    def _drawn(self, first: int, count: int) -> tuple[Ints, Ints]:
        sources, windows = self.mixture.at(first, count)
        numbers = np.arange(first, first + count)
        return sources, self.curriculum.choose(numbers, sources, windows)

    def _batch(self, step: int, rows: Ints, sources: Ints, windows: Ints) -> Batch:
        stored = np.empty((len(rows), self._context + 1), self._windows[0].tokens.dtype)
        counts = np.empty(len(rows), np.int64)
        for source in np.flatnonzero(np.bincount(sources)):
            here = sources == source
            stored[here] = self._windows[source].rows(windows[here])
            counts[here] = self._windows[source].labels(windows[here])
            if len(self._excluded[source]):
                counts[here & np.isin(windows, self._excluded[source])] = 0
        row = stored.astype(np.int64)
        ids, labels = row[:, :-1], first_labels(row[:, 1:], counts)
        frequent = self.curriculum.without_rare(step, labels)
        trained = counts.sum() if frequent is labels else (frequent >= 0).sum()
        width = self.curriculum.row_tokens(step, self._context)
        pieces = self._context // width
        numbers = (rows[:, None] * pieces + np.arange(pieces)).reshape(-1)
        tensors = {"ids": ids, "labels": frequent}
        if self._is_document_masked:
            tensors["is_start"] = stored[:, :-1] == self._eos
        return Batch(
            tensors={
                name: torch.from_numpy(array.reshape(-1, width)) for name, array in tensors.items()
            }
            | {"rows": torch.from_numpy(numbers)},
            weights={"tokens": float(trained)},
            tokens=ids.size,
            samples=SampleNames(self.domains, sources, windows),
        )


@dataclass(frozen=True, eq=False)
class SampleNames(Sequence[str]):
    """Names of a batch's rows, such as `web/812`; they are put together when somebody asks."""

    domains: Sequence[str]
    sources: Ints
    windows: Ints

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return SampleNames(self.domains, self.sources[place], self.windows[place])
        return f"{self.domains[self.sources[place]]}/{self.windows[place]}"


def figures(state: LoopState, settings: PretrainConfig, samples: Samples) -> dict[str, Any]:
    """What the record keeps of the training."""
    parameters = settings.shape.parameters(samples.vocabulary)
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "parameters": parameters,
        "embedding_share": settings.shape.embedding_share(samples.vocabulary),
        "tokens_per_parameter": state.tokens / parameters,
        "epochs": samples.epochs(state.step),
        "loss": state.figures["loss"],
        "skipped_steps": state.skipped,
        **({"overflows": state.overflows} if settings.precision == "fp16" else {}),
        **resume_figures(state),
    }


def speed_figures(
    state: LoopState, settings: PretrainConfig, samples: Samples, peak: Peak, ranks: Ranks
) -> dict[str, Any]:
    """How fast it was, against what the machine could do."""
    speed = state.tokens / state.seconds
    needed = settings.shape.training_flops(samples.vocabulary, settings.row_tokens) * speed
    found: dict[str, Any] = {"seconds": state.seconds, "tokens_per_second": speed}
    if peak.flops:
        found["mfu"] = needed / (peak.flops * ranks.processes)
    memory = peak_memory(ranks.device)
    return found | {
        "peak_flops": peak.flops, "peak_source": peak.source, "peak_memory_bytes": memory,
    }  # fmt: skip


if __name__ == "__main__":
    main()
