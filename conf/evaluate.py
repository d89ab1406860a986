"""Settings of the evaluate stage."""

from typing import Annotated, Literal

from pydantic import Field

from conf.launch import LaunchConfig
from conf.settings import RUNTIME, Settings, SourceSpec


class EvaluateConfig(Settings):
    """What a checkpoint is asked, and how its answers are scored."""

    exams: tuple[SourceSpec, ...] = ()
    """Questions as CSV in the layout of C-Eval, CMMLU or MMLU, one file a subject."""
    examples: tuple[SourceSpec, ...] = ()
    """Worked questions of the same subjects (the `dev` files) for the few-shot prompt."""
    shots: Annotated[int, Field(ge=0)] = 5
    """Worked examples before a question; fewer where the context would not hold them."""
    prompt: Literal["ceval", "cmmlu", "mmlu", "plain"] = "ceval"
    """Wording of an exam prompt, as its authors published it; its hash is kept with the scores. `plain` asks
    the bare question."""
    scoring: tuple[Literal["letter", "option"], ...] = ("letter", "option")
    """`letter` compares the letters of the options, `option` the whole options (cloze), per byte."""
    questions_per_subject: Annotated[int, Field(ge=0)] = 0
    """First questions of each subject that are asked; 0 for all."""
    minimal_pairs: tuple[SourceSpec, ...] = ()
    """JSON lines with `sentence_good` and `sentence_bad`, as BLiMP and ZhoBLiMP have them."""
    pairs_per_paradigm: Annotated[int, Field(ge=0)] = 0
    """First pairs of each paradigm that are compared; 0 for all."""
    own_tasks: tuple[SourceSpec, ...] = ()
    """JSON lines of your own, a file a task: `prompt` with `options` and `answer` (place from 0, letter or
    text) is scored as a choice, `prompt` with `references` is answered and compared (BLEU, ROUGE)."""
    held_documents: Annotated[int, Field(ge=0)] = 0
    """Held-out documents of each domain that are scored, spread evenly; 0 for all."""
    train_documents: Annotated[int, Field(ge=0)] = 0
    """Training documents of each domain that are scored beside them, spread evenly: how much better they
    are predicted is the watch on over-fitting. 0 for none."""
    stride: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Step between the windows of a long document, as a share of the context."""
    has_baselines: bool = False
    """Whether n-gram models of the tokens that pretraining has read and `xz -9` are measured beside."""
    has_curve: bool = False
    """Whether the weights that pretraining kept on its way (`pretrain.kept_looks`) are measured too."""
    prompts: tuple[str, ...] = ()
    """Questions that every checkpoint answers, shown side by side in the report."""
    held_questions: Annotated[int, Field(ge=0)] = 64
    """First questions of held-out conversations, spread evenly, that are answered where the input
    `conversations` is named; 0 for all. Every checkpoint gives one greedy answer."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Answers to each of the world's held-out questions; the fixed prompts get one greedy answer."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of the world's questions."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer in tokens; one that reaches it counts as not ended."""
    is_chat: bool = True
    """Whether prompts are put as a conversation (after SFT) or as plain text to be continued."""
    batch: Annotated[int, Field(ge=1), RUNTIME] = 64
    """Sequences scored or generated together."""
    seed: int = 0
    """Seed of the sampling."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs."""
