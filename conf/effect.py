"""Settings of effect: what a training did to a model, measured on the same documents and questions."""

from conf.settings import Settings, SourceSpec


class EffectConfig(Settings):
    """What else than the evaluations themselves is asked which of two answers is better."""

    functions: tuple[SourceSpec, ...] = ()
    """Python files with `score(answer) -> float`, as those of ppo; the answer with the larger sum wins. What
    they are given has no `reference`."""
