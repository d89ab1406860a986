"""What training is expected to cost, and what a budget buys, as tables for people."""

from rich.table import Table

from flows.budget import Answer
from flows.costs import TOKENS_PER_PARAMETER, Costs
from flows.plan import Planned
from flows.show import human_bytes, table_of


def costs_table(planned: list[Planned]) -> Table | None:
    """What the training stages are expected to cost."""
    rows = [_costs_row(item, item.costs) for item in planned if item.costs]
    if not rows:
        return None
    columns = ["node", "parameters", "steps", "tokens", "FLOPs", "memory at the peak", "time"]
    return table_of("training, as expected", columns, rows)


def _costs_row(item: Planned, costs: Costs) -> list[str]:
    ratio = "at most"
    if item.stage == "pretrain":
        per_parameter = costs.tokens_per_parameter
        ratio = f"{per_parameter:.3g} a parameter; {TOKENS_PER_PARAMETER} is the balance"
    warmup = f", {costs.warmup_steps:,} of warm-up" if costs.warmup_steps else ""
    parts = costs.memory.named() if costs.memory else {}
    memory = " + ".join(f"{name} {human_bytes(size)}" for name, size in parts.items())
    total = human_bytes(costs.memory.total) if costs.memory else ""
    later = "with its data"
    return [
        item.node,
        f"{human_count(costs.parameters)} ({costs.embedding_share:.0%} embeddings)",
        f"{costs.steps:,}{warmup}" if costs.steps else later,
        f"{human_count(costs.tokens)} ({ratio})" if costs.tokens else later,
        human_count(costs.flops) if costs.flops else later,
        f"{total} = {memory}",
        _time(costs, later),
    ]


def _time(costs: Costs, later: str) -> str:
    if costs.seconds:
        return f"{human_time(costs.seconds)} ({costs.rate_source})"
    return costs.rate_source if costs.flops else later


def budget_table(lines: list[Answer]) -> Table:
    """The answer to a question about budgets."""
    rows = [[line.what, f"{human_count(line.value)} {line.unit}", line.rule] for line in lines]
    return table_of("budget", ["", "", "by"], rows)


def human_count(number: float) -> str:
    """A count as people say it: 91.65M, 1.2e+18."""
    for limit, unit in ((1e15, ""), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g}{unit}" if unit else f"{number:.3g}"
    return f"{number:,.4g}"


def human_time(seconds: float) -> str:
    """A duration as people say it."""
    for limit, unit in ((2 * 86_400, "days"), (2 * 3600, "h"), (2 * 60, "min")):
        if seconds >= limit:
            return f"{seconds / (limit / 2):,.1f} {unit}"
    return f"{seconds:,.0f} s"
