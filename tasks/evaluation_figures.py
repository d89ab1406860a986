"""What the rows of an evaluation come to: figures with n, interval and chance."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from conf.evaluate import EvaluateConfig
from storage.scores import Figure, centred, difference, macro_mean, mean
from storage.tokens import TokenFiles
from storage.world import World
from tasks.exams import Request, Task

if TYPE_CHECKING:
    from tasks.ngram import TokenArray

BASELINE_ORDERS = (2, 5)
NATS_PER_BIT = 0.6931471805599453

COSTS = (
    ("bits_per_byte", "bytes", NATS_PER_BIT),
    ("bits_per_character", "characters", NATS_PER_BIT),
    ("nats_per_token", "tokens", 1.0),
)
"""Figure, what it is per, and its unit in nats."""
BITS = "bits_per_byte/"
OVERFIT_SHARE = 0.1
"""Held-out bits per byte that training documents have to save for their domain to be warned about."""
PRIMARY = ("subject", "paradigm")
"""Sorts whose parts are named alone, and weigh alike in a macro mean."""
PROMPT, TASK, HELD = "prompt/", "task/", "held/"
"""How ids of the answers to fixed prompts, one's own tasks and held-out conversations begin; the others are
the world's."""

Rows = Sequence[dict[str, Any]]


def request_figures(requests: Sequence[Request], scored: Rows) -> dict[str, Figure]:
    """Accuracy of every group and of its parts; ties count as the share of a guess among them.

    Of each whole group also `/centred` (0 at chance), and where it has several subjects or paradigms
    `/macro`, in which each of them weighs alike.
    """
    hits: dict[str, list[float]] = {}
    chance: dict[str, list[float]] = {}
    primary: dict[str, set[str]] = {}
    for request, row in zip(requests, scored, strict=True):
        guess = 1 / len(request.continuations)
        for name, hit in _hits(request, row).items():
            own = [f"{name}/{tag}" for sort in PRIMARY for tag in request.tags.get(sort, ())]
            primary.setdefault(name, set()).update(own)
            others = [
                f"{name}/{sort}={tag}"
                for sort, tags in request.tags.items()
                if sort not in PRIMARY
                for tag in tags
            ]
            for key in (name, *own, *others):
                hits.setdefault(key, []).append(hit)
                chance.setdefault(key, []).append(guess)
    figures = {
        name: mean(values, chance=sum(chance[name]) / len(values)) for name, values in hits.items()
    }
    for name, parts in primary.items():
        group = name.removesuffix("/accuracy")
        figures[f"{group}/centred"] = centred(figures[name])
        if len(parts) > 1:
            each = [(hits[part], None) for part in sorted(parts)]
            figures[f"{group}/macro"] = macro_mean(each, chance=figures[name].chance)
    return figures


def pair_figures(pairs: Rows) -> dict[str, Figure]:
    """How often the chosen answer of a held-out pair is the likelier one, whole and per token."""
    hits: dict[str, list[float]] = {}
    for row in pairs:
        for name, hit in _pair_hits(row).items():
            hits.setdefault(name, []).append(hit)
    return {name: mean(values, chance=0.5) for name, values in hits.items()}


def _pair_hits(row: dict[str, Any]) -> dict[str, float]:
    gaps = {
        "pairs/accuracy": row["chosen"] - row["rejected"],
        "pairs_per_token/accuracy": row["chosen"] / row["chosen_tokens"]
        - row["rejected"] / row["rejected_tokens"],
    }
    return {name: (gap > 0) + (gap == 0) / 2 for name, gap in gaps.items()}


def trials(
    requests: Sequence[Request], scored: Rows, documents: Rows, pairs: Rows
) -> Iterator[dict[str, Any]]:
    """What accuracies of whole groups and held-out bits per byte of domains are means of, one by one."""
    for row in pairs:
        for name, hit in _pair_hits(row).items():
            yield {"figure": name, "id": row["id"], "value": hit, "weight": 1}
    for request, row in zip(requests, scored, strict=True):
        for name, hit in _hits(request, row).items():
            yield {"figure": name, "id": request.id, "value": hit, "weight": 1}
    held = [row for row in documents if row["split"] == "held"]
    for domain, rows in _by_domain(held).items():
        for number, (value, size) in enumerate(zip(*_bits(rows), strict=True)):
            if domain != "all":
                name = f"{BITS}{domain}"
                yield {"figure": name, "id": str(number), "value": value, "weight": size}


def _hits(request: Request, row: dict[str, Any]) -> dict[str, float]:
    """Whether the right continuation won under each reading; a share of it where several did."""
    hits: dict[str, float] = {}
    for name, values in _readings(request, row).items():
        winners = [index for index, value in enumerate(values) if value == max(values)]
        hits[name] = (request.right in winners) / len(winners)
    return hits


def _readings(request: Request, row: dict[str, Any]) -> dict[str, list[float]]:
    """Scores of the continuations under each reading: as they are, and per byte for whole options."""
    logprobs: list[float] = row["logprobs"]
    if not request.is_whole:
        return {f"{request.group}/accuracy": logprobs}
    lengths = [len(text.encode()) for text in request.continuations]
    return {
        f"{request.group}/accuracy": [v / n for v, n in zip(logprobs, lengths, strict=True)],
        f"{request.group}_sum/accuracy": logprobs,
    }


def document_figures(rows: Rows) -> dict[str, Figure]:
    """What held-out documents cost, by domain and of all, with a document bootstrap; and the watch on
    over-fitting, where training documents were scored too.

    Per byte, character and token the mean weighs documents by their length; per document all weigh
    alike. `macro` weighs domains alike. `overfit/..` is held-out minus training, in bits per byte.
    """
    held = [row for row in rows if row["split"] == "held"]
    figures = _costs(held)
    if train := [row for row in rows if row["split"] == "train"]:
        figures |= {
            f"train/{name}": figure for name, figure in _costs(train).items() if BITS in name
        }
        for domain, chosen in _by_domain(held).items():
            of_train = _by_domain(train).get(domain, [])
            if of_train:
                figures[f"overfit/{domain}"] = difference(
                    _bits(chosen), _bits(of_train), unit="bits/byte"
                )
    return figures


def overfitted(figures: Mapping[str, Figure]) -> list[str]:
    """Domains whose training documents are predicted better than chance allows, by a tenth or more."""
    found: list[str] = []
    for name, figure in figures.items():
        domain = name.removeprefix("overfit/")
        if domain not in (name, "all") and figure.low > 0:
            held = figures[f"{BITS}{domain}"].value
            if figure.value >= OVERFIT_SHARE * held:
                found.append(domain)
    return sorted(found)


def _costs(rows: Rows) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    by_domain = _by_domain(rows)
    for domain, chosen in by_domain.items():
        for name, sizes, nats in COSTS:
            values, weights = _per(chosen, sizes, nats)
            unit = name.replace("_per_", "/")
            figures[f"{name}/{domain}"] = mean(values, weights=weights, unit=unit)
        figures[f"nats_per_document/{domain}"] = mean(
            [row["nats"] for row in chosen], unit="nats/document"
        )
    if len(by_domain) > 2:
        each = [_bits(chosen) for domain, chosen in by_domain.items() if domain != "all"]
        figures[f"{BITS}macro"] = macro_mean(each, unit="bits/byte")
    return figures


def _by_domain(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Rows of every domain, and as `all` of all; empty without a row."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["domain"]):
        found.setdefault(row["domain"], []).append(row)
    return {**found, "all": list(rows)} if rows else {}


def _per(rows: Rows, sizes: str, nats: float) -> tuple[list[float], list[float]]:
    """Cost per byte, character or token of each document, and its weight in the mean."""
    return [row["nats"] / nats / row[sizes] for row in rows], [row[sizes] for row in rows]


def _bits(rows: Rows) -> tuple[list[float], list[float]]:
    return _per(rows, "bytes", NATS_PER_BIT)


def baseline_figures(
    files: TokenFiles,
    training: "TokenArray",
    settings: EvaluateConfig,
    report: Callable[[float, float, str], None],
) -> dict[str, Figure]:
    """The same held-out documents under counting models of the training tokens, and under `xz -9`."""
    import numpy as np

    from tasks.ngram import KneserNey, xz_bits_per_byte

    rows: list[dict[str, Any]] = []
    documents = {
        domain: files.held_documents(domain, settings.held_documents) for domain in files.domains
    }
    for done, order in enumerate(BASELINE_ORDERS):
        report(done, len(BASELINE_ORDERS), "baselines")
        model = KneserNey(training, order=order, vocabulary=files.meta.vocabulary)
        for domain, chosen in documents.items():
            for ids, size in chosen:
                nats = model.nats(np.concatenate([[files.meta.eos], ids])).sum()
                characters = len(files.tokenizer.decode(ids.tolist()))
                rows.append(
                    {"domain": domain, "nats": nats, "bytes": size, "characters": characters,
                     "tokens": len(ids), "n": order}
                )  # fmt: skip
    figures = {
        f"{order}-gram/{name}": figure
        for order in BASELINE_ORDERS
        for name, figure in _costs([row for row in rows if row["n"] == order]).items()
    }
    for domain, chosen in documents.items():
        if chosen:
            texts = [files.tokenizer.decode(ids.tolist()).encode() for ids, _ in chosen]
            bits = xz_bits_per_byte(texts)
            figures[f"xz/bits_per_byte/{domain}"] = Figure(
                value=bits, n=len(texts), low=bits, high=bits, unit="bits/byte"
            )
    return figures


def world_figures(answers: Rows, world: World | None) -> dict[str, Figure]:
    """What the world says of the answers to its questions; samples of one question are one cluster."""
    if world is None:
        return {}
    judged: dict[str, list[float]] = {}
    clusters: list[str] = []
    for row in answers:
        if row["id"].startswith((PROMPT, TASK, HELD)):
            continue
        verdict = world.judge(row["id"], row["answer"], ended=row["is_ended"])
        row["judgement"] = asdict(verdict)
        clusters.append(row["id"].split("#")[0])
        for name, value in row["judgement"].items():
            judged.setdefault(f"world/{name}", []).append(float(value))
        for name, value in _told(row).items():
            judged.setdefault(f"world/{name}", []).append(value)
    return {name: mean(values, clusters=clusters) for name, values in judged.items()}


def held_figures(answers: Rows) -> dict[str, Figure]:
    """Of the answers to the first questions of held-out conversations."""
    found: dict[str, list[float]] = {}
    for row in answers:
        if row["id"].startswith(HELD):
            for name, value in {"ended": float(row["is_ended"]), **_told(row)}.items():
                found.setdefault(f"{HELD}{name}", []).append(value)
    return {name: mean(values) for name, values in found.items()}


def _told(row: Mapping[str, Any]) -> dict[str, float]:
    """What the worker said of an answer: its length, and where they were asked the reference and a reward
    model."""
    names = {"answer_tokens": "tokens", "kl": "kl", "reward_model": "reward_model"}
    return {name: float(row[key]) for name, key in names.items() if key in row}


def writing_figures(answers: Rows, tasks: Sequence[Task]) -> dict[str, Figure]:
    """How varied the answers to prompts and free tasks are, and how like their references those are."""
    from tasks.text_metrics import likeness, variety

    told = [row for row in answers if row["id"].startswith((PROMPT, TASK))]
    if not told:
        return {}
    texts = {row["id"]: row["answer"] for row in told}
    spread = variety([row["answer"] for row in told], [row["is_ended"] for row in told])
    figures = {f"writing/{name}": figure for name, figure in spread.items()}
    for name in sorted({task.name for task in tasks}):
        chosen = [task for task in tasks if task.name == name]
        found = likeness([texts[TASK + t.id] for t in chosen], [t.references for t in chosen])
        figures |= {f"own_{name}/{metric}": figure for metric, figure in found.items()}
    return figures
