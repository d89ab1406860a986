"""Where and how the jobs of torch stages run. Nothing here changes what is computed, but for
`resume=weights`, which says so in the log and in the result."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from conf.settings import Settings
from conf.shape import ShapeConfig

DEEPSPEED_ENGINES = ("zero1", "zero2", "zero3")
"""Engines that need DeepSpeed."""

DEEPSPEED_SECTIONS = ("zero_optimization", "comms_logger", "flops_profiler", "wall_clock_breakdown")
"""Sections of DeepSpeed's JSON that pass through; what the others choose is told by our settings."""
ZERO_KEYS_OF_OURS = ("stage", "offload_optimizer", "offload_param", "zero_hpz_partition_size")
OFFLOADING_ENGINES = {
    "none": ("plain", "ddp", "fsdp", *DEEPSPEED_ENGINES),
    "optimizer": DEEPSPEED_ENGINES,
    "parameters": ("fsdp", "zero3"),
}
"""Engines that keep it in the host's memory."""

VARIABLES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "CUBLAS_", "OMP_", "KMP_")
"""How the names of variables begin that may be set for the ranks."""
SLURM_OPTIONS_OF_OURS = (
    "nodes",
    "ntasks-per-node",
    "output",
    "error",
    "open-mode",
    "requeue",
    "signal",
)


class LaunchConfig(Settings):
    """One job: which launcher starts how many processes, on what, with which engine."""

    launcher: Literal["torchrun", "deepspeed", "slurm"] = "torchrun"
    """Program that starts the ranks; `slurm` submits a batch job, follows it, and starts torchrun on its
    nodes, which see the store's folder under the same path."""
    engine: Literal["plain", "ddp", "fsdp", "zero1", "zero2", "zero3"] = "plain"
    """How weights and optimizer state are spread: nothing (`plain`, one process; `ddp`), all (`fsdp`,
    torch's; `zero3`, DeepSpeed's), optimizer state (`zero1`), that and gradients (`zero2`)."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Ranks on each node."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Machines. Under torchrun the run's own is the first; on each other one somebody starts the command
    that its log names, `python -m tasks.node ...`, with the store's folder under the same path."""
    hostfile: str = ""
    """DeepSpeed's list of machines, a line `HOST slots=N` each, of which the first `nodes` are taken under its
    launcher: the run's own first, the others by ssh without a password, with the store's folder and this
    program under the same paths."""
    rendezvous: Annotated[str, Field(pattern=r"^([\w.:-]+:\d+)?$")] = ""
    """HOST:PORT at which the first node can be reached; needed for several nodes under torchrun, and where
    the first line of `hostfile` is not what the others call it."""
    slurm: dict[str, str | int] = Field(default_factory=dict[str, str | int])
    """Options of sbatch without their dashes, e.g. `{partition: gpu, gres: "gpu:8", time: "24:00:00"}`."""
    environment: dict[str, str] = Field(default_factory=dict[str, str])
    """Variables for the ranks, of NCCL, gloo, torch and CUDA alone, e.g. `{NCCL_P2P_DISABLE: "1",
    NCCL_IB_DISABLE: "1", PYTORCH_CUDA_ALLOC_CONF: "expandable_segments:True"}`."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Processes that share every matrix of the blocks, each a part of the heads and of the feed-forward
    width, with engine fsdp, which spreads the parts over the others; `processes` is a multiple."""
    pipeline_stages: Annotated[int, Field(ge=1)] = 1
    """Processes that have some blocks of the model each, through which the micro-batches of a step pass,
    with engine ddp; `processes` is a multiple, and micro_batch should leave several micro-batches."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What stays in the host's memory, where the update is made then, for models that the device cannot
    hold: `optimizer` its state (zero1, zero2, zero3), `parameters` also the weights (zero3, fsdp)."""
    adamw: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW makes the update; `deepspeed`'s, for its engines, is FusedAdam, or CPUAdam where
    optimizer state is offloaded, which a compiler makes at the first start (minutes)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where a device is found."""
    deepspeed: dict[str, Any] = Field(default_factory=dict[str, Any])
    """DeepSpeed's own options beside ours, in the words of its JSON, e.g. `{zero_optimization:
    {reduce_bucket_size: 50000000, overlap_comm: true}}`."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per rank; 0 divides the cores among the ranks."""
    micro_batch: Annotated[int, Field(ge=0)] = 0
    """Sequences per forward pass and rank; 0 takes the whole batch of the rank at once."""
    attention: Literal["sdpa", "flash", "eager"] = "sdpa"
    """`sdpa`: torch's fused kernels, FlashAttention among them on CUDA; `flash`: the same, and documents
    that do not see one another without a mask (CUDA from the A100 on, bf16 or fp16; on a CPU `sdpa` has none
    either); `eager`: the definition, slow and large, to check them against."""
    compile: bool = False
    """Whether blocks and head run as code that torch.compile makes; costs a minute at the start (with
    `tensor_parallel` for each block), and needs a C++ compiler on CPU."""
    checkpoint_activations: bool = False
    """Whether a block's activations are computed again for the backward pass instead of being kept: a
    third more computing for a fraction of the memory."""
    fused_head: bool = True
    """Whether pretraining takes loss and gradient of the output head together, piece by piece, so that
    the logits of a batch never exist at once; not in fp16, where small gradients would be lost."""
    is_deterministic: bool = True
    """Whether CUDA takes kernels that give the same bits every time, so that a resumed job ends like an
    unbroken one; a few are slower. On CPU all are."""
    peak_tflops: Annotated[float, Field(ge=0)] = 0.0
    """Peak of one device in 10^12 FLOP/s, to which `mfu` refers; 0 takes the data sheet's of a known
    accelerator, and measures a CPU."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest time between two checkpoints, besides those that the stage's settings ask for."""
    checkpoints_kept: Annotated[int, Field(ge=1)] = 2
    """The newest so many checkpoints stay until the job has ended; where a disk has damaged one, the one
    before it is gone on from."""
    checkpoints_beside: Literal["auto", "always", "never"] = "auto"
    """Whether pretraining, SFT, reward and DPO go on while a thread writes a copy of weights and optimizer
    state, which takes 12 bytes a parameter of the host's memory; `auto` where CUDA computes."""
    resume: Literal["strict", "weights"] = "strict"
    """What a job that was cut off goes on with: `strict` with all that it had, so that it ends like an unbroken
    one; `weights` at the same step with its weights, and an optimizer that begins anew, which is for when its
    state is suspected. Weights of another run are continued by giving pretrain a `policy`."""
    deadline_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Job is ended after this long; 0 for never. What was reached stays resumable."""
    stall_seconds: Annotated[float, Field(ge=0)] = 1800.0
    """Job is ended when its progress stands still for this long; 0 for never."""
    orphan_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long a job whose follower is gone goes on; 0 for ever."""
    grace_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Time between asking a job to stop (it checkpoints) and killing it."""

    @property
    def ranks(self) -> int:
        """All processes of the job."""
        return self.processes * self.nodes

    @property
    def model_processes(self) -> int:
        """Processes that compute one model together, on the same data."""
        return self.tensor_parallel * self.pipeline_stages

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.tensor_parallel > 1 and self.engine != "fsdp":
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} does not run on engine={self.engine}; use "
                f"engine=fsdp"
            )
        if self.pipeline_stages > 1 and self.engine != "ddp":
            raise ValueError(
                f"pipeline_stages={self.pipeline_stages} does not run on engine={self.engine}; use "
                f"engine=ddp"
            )
        if self.engine not in (able := OFFLOADING_ENGINES[self.offload]):
            raise ValueError(
                f"offload={self.offload} does not run on engine={self.engine}; use engine="
                f"{' or '.join(able)}"
            )
        if self.adamw == "deepspeed" and self.engine not in DEEPSPEED_ENGINES:
            raise ValueError(
                f"adamw=deepspeed does not run on engine={self.engine}; use adamw=torch, or engine="
                f"{' or '.join(DEEPSPEED_ENGINES)}"
            )
        if self.ranks % self.model_processes:
            raise ValueError(
                f"{self.ranks} processes are no multiple of the {self.model_processes} that compute one "
                f"model; use processes={self.model_processes} or a multiple"
            )
        if bool(self.hostfile) != (self.launcher == "deepspeed" and self.nodes > 1):
            raise ValueError(
                f"hostfile={self.hostfile!r} with launcher={self.launcher} and nodes={self.nodes}: a host file "
                f"and nodes=2 or more go together under launcher=deepspeed, and nowhere else"
            )
        if self.nodes > 1 and self.launcher == "torchrun" and not self.rendezvous:
            raise ValueError(
                f"nodes={self.nodes} need a place to meet; set rendezvous to HOST:PORT of the first node"
            )
        return self

    def refuse_shape(self, shape: ShapeConfig) -> None:
        """Raises ValueError for a model that cannot be shared among that many processes."""
        for name, count in (
            ("heads", shape.heads), ("kv_heads", shape.kv_heads), ("ffn_width", shape.ffn_width)
        ):  # fmt: skip
            if count % self.tensor_parallel:
                raise ValueError(
                    f"tensor_parallel={self.tensor_parallel} does not divide shape.{name}={count}; use a "
                    f"divisor of all of heads, kv_heads and ffn_width"
                )
        if self.pipeline_stages > shape.layers:
            raise ValueError(
                f"pipeline_stages={self.pipeline_stages} is more than shape.layers={shape.layers}; use no "
                f"more stages than layers"
            )

    @field_validator("environment")
    @classmethod
    def _is_of_the_devices(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if not name.startswith(VARIABLES):
                raise ValueError(
                    f"environment.{name} is not for the ranks to choose; variables begin with "
                    f"{', '.join(VARIABLES)}"
                )
        return variables

    @field_validator("slurm")
    @classmethod
    def _leaves_ours(cls, options: dict[str, str | int]) -> dict[str, str | int]:
        if ours := sorted(set(options) & set(SLURM_OPTIONS_OF_OURS)):
            raise ValueError(
                f"slurm.{ours[0]} is chosen by our own settings (nodes, the job's log, ...); leave it out"
            )
        return options

    @field_validator("deepspeed")
    @classmethod
    def _passes_through(cls, options: dict[str, Any]) -> dict[str, Any]:
        if others := sorted(set(options) - set(DEEPSPEED_SECTIONS)):
            raise ValueError(
                f"deepspeed.{others[0]} is chosen by our own settings (engine, precision, clip, "
                f"micro_batch, ...) or not offered; {', '.join(DEEPSPEED_SECTIONS)} pass through"
            )
        zero = options.get("zero_optimization", {})
        if ours := sorted(set(zero) & set(ZERO_KEYS_OF_OURS)):
            raise ValueError(
                f"deepspeed.zero_optimization.{ours[0]} does not pass through; the stage is chosen by "
                f"engine, and what is offloaded by offload"
            )
        return options
