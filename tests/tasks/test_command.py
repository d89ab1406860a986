"""What is started for a job, and in which environment."""

import os
from pathlib import Path

import pytest

from conf.launch import LaunchConfig
from tasks.command import Placement, command, environment, threads_per_rank
from tasks.processes import cores, cuda_devices, take_cuda

JOB = Path("/attempt/state/job.json")
RANK = ["tasks.rank", "model.sft", str(JOB)]
CPU = Placement("cpu", threads=1)
CUDA = Placement("cuda", threads=4, devices=("2", "5"))


def words(launch: LaunchConfig, placement: Placement) -> list[str]:
    return command(launch, "model.sft", JOB, placement)[2:]


def test_one_plain_rank_needs_no_launcher() -> None:
    assert words(LaunchConfig(), CPU) == ["-m", *RANK]


def test_torchrun_starts_several_ranks_and_one_of_an_engine_with_ranks() -> None:
    two = words(LaunchConfig(engine="ddp", processes=2), CPU)
    assert two[1] == "torch.distributed.run"
    assert two[two.index("--nproc-per-node") + 1] == "2"
    assert two[-4:] == ["-m", *RANK]
    assert words(LaunchConfig(engine="ddp"), CPU)[1] == "torch.distributed.run"


def test_the_deepspeed_launcher_is_told_ranks_or_devices() -> None:
    launch = LaunchConfig(launcher="deepspeed", engine="zero2", processes=2)
    on_cpu, on_cuda = words(launch, CPU), words(launch, CUDA)
    assert on_cpu[on_cpu.index("--num_gpus") + 1] == "2"
    assert on_cuda[on_cuda.index("--include") + 1] == "localhost:2,5"
    assert on_cuda[-4:] == ["--module", *RANK]


def test_a_host_file_is_told_as_deepspeed_reads_it(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=8\ntwo slots=8\nthree slots=8\n", "utf-8")
    launch = LaunchConfig(
        launcher="deepspeed",
        engine="zero2",
        nodes=2,
        processes=2,
        hostfile=str(hosts),
        rendezvous="one:29500",
    )
    # The second node has devices 2 and 5 to itself; of the first it knows how many there are.
    found = command(launch, "model.sft", JOB, CUDA, 1)[3:]
    assert found == [
        *("deepspeed.launcher.runner", "--hostfile", str(hosts), "--include", "one:0,1@two:2,5"),
        *("--no_ssh", "--node_rank", "1", "--master_addr", "one", "--master_port", "29500"),
        *("--no_local_rank", "--module", *RANK),
    ]


def test_variables_for_devices_reach_the_ranks_and_others_are_refused() -> None:
    asked = {
        "NCCL_P2P_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
        "NCCL_DEBUG": "INFO",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    found = environment(LaunchConfig(environment=asked), CUDA)
    assert {name: found[name] for name in asked} == asked
    with pytest.raises(ValueError, match=r"environment\.HOME is not for the ranks to choose"):
        LaunchConfig(environment={"HOME": "/elsewhere"})


def test_a_cpu_job_sees_no_device_and_a_cuda_job_only_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    monkeypatch.setenv("RANK", "3")
    launch = LaunchConfig(engine="ddp", processes=2)
    on_cpu, on_cuda = environment(launch, CPU), environment(launch, CUDA)
    assert (on_cpu["CUDA_VISIBLE_DEVICES"], on_cpu["OMP_NUM_THREADS"]) == ("", "1")
    assert (on_cuda["CUDA_VISIBLE_DEVICES"], on_cuda["OMP_NUM_THREADS"]) == ("2,5", "4")
    # What a surrounding job says of itself is not true of this one.
    assert "RANK" not in on_cpu
    # Of one machine, ranks meet within it, whatever its name resolves to.
    assert on_cpu["GLOO_SOCKET_IFNAME"] == on_cuda["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_working_directory_is_not_searched_for_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wanted = environment(LaunchConfig(), CPU)
    assert wanted["PYTHONSAFEPATH"] == "1"
    assert wanted["PYTHONPATH"].split(os.pathsep)[1] == str(tmp_path)


def test_threads_are_shared_among_ranks_but_never_less_than_one() -> None:
    assert threads_per_rank(LaunchConfig(threads=3)) == 3
    assert threads_per_rank(LaunchConfig(processes=cores() + 1, engine="ddp")) == 1
    assert threads_per_rank(LaunchConfig()) == cores()


def test_more_devices_than_there_are_is_the_callers_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert cuda_devices() == []
    with pytest.raises(ValueError, match="wants 1 CUDA devices, this host offers 0"):
        take_cuda(1)
