"""Pretraining: next-token loss on a mixture of token files. Worker: `python -m model.pretrain JOBFILE`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.contract import JobFile
from conf.pretrain import PretrainConfig, PretrainPlan
from model.batches import BLOCK_SAMPLES, Batch, Ints, MixPhase, Mixture, Windows, micro_batch_rows
from model.engine import Loss, build_engine
from model.head import label_loss
from model.journal import Journal
from model.loop import LoopPlan, LoopState, train
from model.optimizer import UpdateRule, learning_rate
from model.ranks import Ranks
from model.speed import Peak, device_peak
from model.transformer import AttentionMask, Noise, Transformer, token_logprobs
from model.weights import Checkpoints, load_model, save_model
from model.worker import identity_of_job, run
from storage.checkpoint import ReadWindows
from storage.tokens import TOKENIZER_FOLDER, TokenFiles

EVALUATION_TOKENS = 16_384
"""Held-out tokens in one forward pass."""


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
    held = HeldOut(files, settings, ranks)
    peak = device_peak(ranks.device, settings.precision, settings.launch.peak_tflops)
    state = train(
        engine,
        batch_at=samples.at,
        loss=pretrain_loss(settings),
        plan=loop_plan(settings, plan, samples, ranks.add([peak.flops])[0]),
        checkpoints=Checkpoints(job.state / "checkpoints", identity_of_job(job, settings), ranks),
        journal=journal,
        evaluate=lambda step: held.losses(engine.whole()),
    )
    trained = engine.whole()
    if ranks.is_first:
        tokenizer = files.folder / TOKENIZER_FOLDER
        save_model(job.files, trained, role="policy", tokenizer=tokenizer)
        samples.read_windows().write(job.files)
    return figures(state, settings, samples, plan) | speed_figures(
        state, settings, samples, peak, ranks
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
    ends = np.cumsum([steps for steps, _ in plan.phases]).tolist()
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
        checkpoint_seconds=settings.launch.checkpoint_seconds,
        evaluate_steps=settings.evaluate_every_steps if settings.held_tokens else 0,
        bad_steps=settings.bad_steps,
        guard_sigmas=settings.guard_sigmas,
        fresh_starts=frozenset(ends),
        flops_per_token=settings.shape.training_flops(samples.vocabulary, settings.row_tokens),
        peak_flops=peak_flops,
        describe=samples.described,
    )


def pretrain_loss(settings: PretrainConfig) -> Loss:
    """Mean negative log-probability of the step's labels, in nats per token."""

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        noise = Noise(settings.seed, batch["rows"]) if settings.shape.dropout else None
        hidden = model.hidden(batch["ids"], mask=_mask(batch, settings), noise=noise)
        if _has_fused_head(settings, hidden):
            nats = label_loss(
                model.head_weight, hidden, batch["labels"], is_compiled=settings.launch.compile
            )
        else:
            nats = -token_logprobs(model.head_weight, hidden, batch["labels"]).sum()
        # A step of which every row is excluded has no labels, and is no bad one.
        return {"loss": nats / max(totals["tokens"], 1)}

    return loss


def _has_fused_head(settings: PretrainConfig, hidden: Tensor) -> bool:
    """In float16 gradients that are not scaled yet would lose their small parts."""
    wish = settings.launch.fused_head
    return settings.precision != "fp16" and (wish == "on" or (wish == "auto" and hidden.is_cuda))


def _mask(batch: Batch, settings: PretrainConfig) -> AttentionMask | None:
    if not settings.is_document_masked:
        return None
    return AttentionMask(documents=batch["is_start"].cumsum(1))


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
        self.domains, self.rows = plan.domains, settings.batch_rows
        self.vocabulary = files.meta.vocabulary
        self._ends = [files.ends(name, "train") for name in plan.domains]
        self._excluded = self._numbers(settings.exclude)
        self._ranks, self._micro_batch, self._eos = ranks, micro_batch, files.meta.eos
        self._windows = [
            Windows(files.tokens(name, "train"), settings.row_tokens, files.meta.eos)
            for name in plan.domains
        ]
        self.mixture = Mixture(
            [len(windows) for windows in self._windows],
            [MixPhase(steps * self.rows, shares) for steps, shares in plan.phases],
            settings.seed,
        )

    def at(self, step: int) -> list[Batch]:
        """Micro-batches of update number `step`."""
        first = step * self.rows
        sources, windows = self.mixture.at(first, self.rows)
        rows = np.arange(self.rows)
        return [
            self._batch(first + own, sources[own], windows[own])
            for own in micro_batch_rows(
                rows, self._ranks.rank, self._ranks.world, self._micro_batch
            )
        ]

    def described(self, sample: str) -> str:
        """A sample with the documents it comes from, both counted from 0."""
        name, _, number = sample.rpartition("/")
        source = self.domains.index(name)
        first = int(number) * self._windows[source].context
        last = min(first + self._windows[source].context, int(self._ends[source][-1])) - 1
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

    def epochs(self) -> dict[str, float]:
        """How often the whole schedule reads each domain."""
        return {
            name: float(used) / len(windows)
            for name, used, windows in zip(
                self.domains, self.mixture.used, self._windows, strict=True
            )
            if len(windows)
        }

    def read_windows(self) -> ReadWindows:
        """Every window that the whole schedule trains on at least once."""
        read = [np.zeros(len(windows), np.bool_) for windows in self._windows]
        for first in range(0, self.mixture.samples, BLOCK_SAMPLES):
            count = min(BLOCK_SAMPLES, self.mixture.samples - first)
            sources, windows = self.mixture.at(first, count)
            for source in np.unique(sources):
                read[source][windows[sources == source]] = True
        for bits, excluded in zip(read, self._excluded, strict=True):
            bits[excluded[excluded < len(bits)]] = False
        packed = [np.packbits(bits, bitorder="little").tobytes() for bits in read]
        return ReadWindows(
            row_tokens=self._windows[0].context,
            domains={
                name: ReadWindows.pack(bits)
                for name, bits in zip(self.domains, packed, strict=True)
            },
        )

    def _batch(self, rows: Ints, sources: Ints, windows: Ints) -> Batch:
        width = self._windows[0].context
        ids = np.empty((len(rows), width), np.int64)
        labels = np.empty((len(rows), width), np.int64)
        for source in np.unique(sources):
            here = sources == source
            ids[here], labels[here] = self._windows[source].at(windows[here])
            if len(self._excluded[source]):
                labels[here & np.isin(windows, self._excluded[source])] = -1
        return Batch(
            tensors={
                "ids": torch.from_numpy(ids),
                "labels": torch.from_numpy(labels),
                "rows": torch.from_numpy(rows),
                "is_start": torch.from_numpy(ids == self._eos),
            },
            weights={"tokens": float((labels >= 0).sum())},
            tokens=ids.size,
            samples=[
                f"{self.domains[source]}/{window}"
                for source, window in zip(sources.tolist(), windows.tolist(), strict=True)
            ],
        )


class HeldOut:
    """Held-out documents of each domain, whole ones up to a number of tokens, split over the ranks."""

    def __init__(self, files: TokenFiles, settings: PretrainConfig, ranks: Ranks) -> None:
        self._settings, self._ranks = settings, ranks
        self._domains: dict[str, tuple[Windows, int]] = {}
        for name in files.domains:
            ends = files.ends(name, "held").astype(np.int64)
            documents = int(np.searchsorted(ends, settings.held_tokens, side="right"))
            if documents:
                tokens = files.tokens(name, "held")[: ends[documents - 1]]
                size = int(files.text_bytes(name)[:documents].sum())
                windows = Windows(tokens, settings.row_tokens, files.meta.eos)
                self._domains[name] = (windows, size)

    @torch.no_grad()
    def losses(self, model: Transformer) -> dict[str, float]:
        """Nats per token and bits per byte of each domain; the eos of each document counts as a token."""
        found: dict[str, float] = {}
        for name, (windows, size) in self._domains.items():
            [nats] = self._ranks.add([self._nats(model, windows)])
            found[f"held_loss/{name}"] = nats / len(windows.tokens)
            if size:
                found[f"held_bits_per_byte/{name}"] = nats / math.log(2) / size
        return found

    def _nats(self, model: Transformer, windows: Windows) -> float:
        own = np.arange(len(windows))[self._ranks.rank :: self._ranks.world]
        at_once = max(1, EVALUATION_TOKENS // windows.context)
        nats = 0.0
        for start in range(0, len(own), at_once):
            ids, labels = windows.at(own[start : start + at_once])
            is_start = torch.from_numpy(ids == windows.eos)
            batch = Batch(
                {"ids": torch.from_numpy(ids), "is_start": is_start}, weights={}, tokens=ids.size
            ).to(self._ranks.device)
            hidden = model.hidden(batch["ids"], mask=_mask(batch, self._settings))
            wanted = torch.from_numpy(labels).to(self._ranks.device)
            nats -= token_logprobs(model.head_weight, hidden, wanted).double().sum().item()
        return nats


def figures(
    state: LoopState, settings: PretrainConfig, samples: Samples, plan: PretrainPlan
) -> dict[str, Any]:
    """What the record keeps of the training."""
    parameters = settings.shape.parameters(samples.vocabulary)
    return {
        "steps": plan.steps,
        "tokens": state.tokens,
        "parameters": parameters,
        "embedding_share": settings.shape.embedding_share(samples.vocabulary),
        "tokens_per_parameter": state.tokens / parameters,
        "epochs": samples.epochs(),
        "loss": state.figures["loss"],
        "skipped_steps": state.skipped,
        **({"overflows": state.overflows} if settings.precision == "fp16" else {}),
        **state.evaluation,
    }


def speed_figures(
    state: LoopState, settings: PretrainConfig, samples: Samples, peak: Peak, ranks: Ranks
) -> dict[str, Any]:
    """How fast it was, against what the machine could do."""
    speed = state.tokens / state.seconds
    needed = settings.shape.training_flops(samples.vocabulary, settings.row_tokens) * speed
    found: dict[str, Any] = {"seconds": state.seconds, "tokens_per_second": speed}
    if peak.flops:
        found["mfu"] = needed / (peak.flops * ranks.world)
    found |= {"peak_flops": peak.flops, "peak_source": peak.source}
    if ranks.device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(ranks.device)
    return found


if __name__ == "__main__":
    main()
