"""The deployment, started by hand with the commands of docker-compose.yml, is used as a team uses it."""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.compose import ROOT, read
from tests.deploy.containers import Host, initialise_postgres, open_host
from tests.deploy.test_compose import SECRETS as REQUIRED

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("initdb", "redis-server", "setpriv"))),
        reason="needs root, and Postgres and Redis of the distribution",
    ),
]
SECRETS = {name: secrets.token_hex(12) for name in REQUIRED}
LONGEST_SECONDS = 1200.0
PAGE = (ROOT / "docs" / "operations.md").read_text("utf-8")
SECTION = PAGE.partition("## Backup and restore")[2].partition("A local home")[0]
COMMAND = re.compile(r"^ *(docker compose .+)$", re.MULTILINE)
RECIPE = """
seed: 0
launch: {threads: 1}
shape: {dim: 32, layers: 1, heads: 2, kv_heads: 1, context: 128}
stages:
  world: {warcs: 2, good_pages: 24, animals: 6, chats: 60, pairs: 60, held_pairs: 10}
  extract:
    sources: [{node: world, path: "crawl/*.warc.gz", domain: web}]
    bucket_bytes: 65536
  tokenizer: {from: {corpus: extract}, vocabulary: 300}
  tokenize: {from: {corpus: extract, tokenizer: tokenizer}}
  pretrain:
    from: {tokens: tokenize}
    tokens: 409600
    batch_tokens: 512
    held_tokens: 1000
    evaluate_every_steps: 0
    checkpoint_every_steps: 10
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The whole stack, brought up in the order that the Compose file asks for."""
    folder = tmp_path_factory.mktemp("host")
    folder.chmod(0o755)
    project = folder / "project"
    project.mkdir()
    (project / "tiny.yaml").write_text(RECIPE, "utf-8")
    spec = read({**SECRETS, "BESSEMER_PROJECT": str(project)})
    with open_host(folder, spec["services"]) as host:
        start_what_keeps(host)
        start_the_rest(host)
        yield host


def start_what_keeps(host: Host) -> None:
    initialise_postgres(host)
    host.start("postgres", "s3")
    host.wait("postgres", "s3")
    for once in ("buckets", "buckets"):
        host.run(once)  # what is done twice does no harm


def start_the_rest(host: Host) -> None:
    host.start("redis")
    host.wait("redis")
    for once in ("databases", "databases", "prefect-database"):
        host.run(once)
    host.start("prefect", "mlflow")
    host.wait("prefect", "mlflow")
    host.start("prefect-services")
    for once in ("deployments", "deployments"):
        host.run(once)
    host.start("worker-cpu", "watcher")
    host.wait("prefect-services", "worker-cpu", "watcher")


def ask(host: Host, path: str, body: Any = None) -> Any:
    """What Prefect's API answers."""
    url, user = f"http://127.0.0.1:4200/api/{path}", ("bessemer", SECRETS["PREFECT_PASSWORD"])
    method = "GET" if body is None else "POST"

    def call() -> httpx.Response:
        answer = httpx.request(method, url, json=body, auth=user, timeout=60)
        for _ in range(20):
            if answer.status_code < 500:
                break
            time.sleep(3)  # Postgres is away for a moment
            answer = httpx.request(method, url, json=body, auth=user, timeout=60)
        return answer

    return host.inside(call).raise_for_status().json()


def begin(host: Host, **parameters: Any) -> str:
    """Start a run as the page does; its id."""
    full = ask(host, "deployments/name/bessemer/full")
    asked = {"parameters": {**parameters, "part": "full"}}
    return ask(host, f"deployments/{full['id']}/create_flow_run", asked)["id"]


def wait_until(condition: Callable[[], Any], seconds: float = LONGEST_SECONDS) -> Any:
    started = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - started < seconds
        time.sleep(1)
    return found


def ended(host: Host, run: str, seconds: float = LONGEST_SECONDS) -> dict[str, Any]:
    """The state in which a run ends."""

    def state() -> Any:
        found = ask(host, f"flow_runs/{run}")["state"]
        return found if found["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

    return wait_until(state, seconds)


def status(host: Host, url: str, auth: tuple[str, str] | None = None) -> int:
    return host.inside(lambda: httpx.get(url, auth=auth, timeout=60).status_code)


def keys(host: Host, bucket: str) -> list[str]:
    """Names of the objects in a bucket."""
    listed = f"boto3.client('s3').list_objects_v2(Bucket='{bucket}').get('Contents', [])"
    script = f"import boto3; print(*[item['Key'] for item in {listed}], sep='\\n')"
    return host.run("buckets", ["python", "-c", script]).split()


def planned(host: Host, recipe: str) -> set[str]:
    """What a run would do with the stages of a recipe."""
    told = json.loads(host.run("worker-cpu", ["bessemer", "plan", recipe, "--json"]))
    return {stage["status"] for stage in told["stages"].values()}


def test_nothing_answers_without_its_password(host: Host) -> None:
    prefect, mlflow = "http://127.0.0.1:4200/api", "http://127.0.0.1:5000"
    asked = {
        f"{prefect}/admin/settings": "PREFECT_PASSWORD",
        f"{prefect}/metrics": "PREFECT_PASSWORD",
        f"{prefect}/deployments/name/bessemer/full": "PREFECT_PASSWORD",
        f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1": "MLFLOW_PASSWORD",
        f"{mlflow}/": "MLFLOW_PASSWORD",
    }
    for url, secret in asked.items():
        assert status(host, url) == 401
        assert status(host, url, ("bessemer", "wrong")) == 401
        assert status(host, url, ("bessemer", SECRETS[secret])) == 200
    assert status(host, f"{prefect}/ready") == status(host, f"{mlflow}/health") == 200
    shell = ["sh", "-c", "REDISCLI_AUTH= redis-cli ping 2>&1"]
    assert "NOAUTH" in host.run("redis", shell)
    for database, refusal in (("prefect", ""), ("mlflow", "permission denied")):
        shell = [
            "sh",
            "-c",
            f"PGUSER=prefect PGPASSWORD=$PREFECT_DATABASE_PASSWORD psql -c 'select 1' {database} 2>&1 || true",
        ]
        assert (refusal or "1 row") in host.run("databases", shell)


def test_a_run_goes_on_through_a_restart_of_postgres_and_ends_on_s3(host: Host) -> None:
    run = begin(host, recipe="tiny.yaml")
    cache = host.folder / "volumes" / "home" / "cache"
    wait_until(lambda: list(cache.glob("a*/**/logs/metrics.jsonl")))  # it trains
    host.stop("postgres")
    time.sleep(5)
    host.start("postgres")
    host.wait("postgres")
    state = ended(host, run)
    assert state["type"] == "COMPLETED", state
    assert sum(key.endswith("/record.json") for key in keys(host, "bessemer")) >= 5
    # Sent by a process of its own, which may end after the run.
    wait_until(lambda: any(key.endswith("/report.html") for key in keys(host, "mlflow")))
    again = begin(host, recipe="tiny.yaml")
    assert ended(host, again)["type"] == "COMPLETED"
    assert planned(host, "tiny.yaml") == {"hit"}


def test_a_run_that_fails_is_told(host: Host) -> None:
    heard: list[bytes] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:  # type: ignore[override]
            """Quiet."""

    with host.inside(lambda: HTTPServer(("127.0.0.1", 9099), Hook)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = "echo http://127.0.0.1:9099/hook | python /opt/bessemer/deploy/notify.py"
        notify = ["sh", "-c", script]
        for _ in range(2):  # said again, it replaces what it made
            host.run("worker-cpu", notify)
        run = begin(host, recipe="tiny.yaml", overrides=["tokenizer.vocabulary=1"])
        assert ended(host, run)["type"] == "FAILED"
        wait_until(lambda: heard)
        server.shutdown()
    assert len(heard) == 1
    assert "full of tiny.yaml ended as Failed" in json.loads(heard[0])["text"]


def test_all_comes_back_on_empty_volumes_as_the_page_says(host: Host, tmp_path: Path) -> None:
    run = begin(host, recipe="tiny.yaml")
    assert ended(host, run)["type"] == "COMPLETED"
    dump, pack, up, restore, unpack, _, verify = COMMAND.findall(SECTION)
    for line in (dump, pack):
        type_in(host, line, tmp_path)
    copies = host.inside(lambda: read_buckets(host))
    new = tmp_path / "new"
    new.mkdir()
    with open_host(new, host.services) as other:
        assert up.split()[4:] == ["postgres", "s3", "buckets", "processes"]
        start_what_keeps(other)
        other.inside(lambda: write_buckets(other, copies))
        for line in (restore, unpack):
            type_in(other, line, tmp_path)
        start_the_rest(other)
        assert " 0 damaged" in type_in(other, verify, tmp_path)
        assert ask(other, f"flow_runs/{run}")["state"]["type"] == "COMPLETED"
        assert planned(other, "tiny.yaml") == {"hit"}
        assert ended(other, begin(other, recipe="tiny.yaml"))["type"] == "COMPLETED"
        assert set(keys(other, "mlflow")) >= copies["mlflow"].keys()


def type_in(host: Host, line: str, backup: Path) -> str:
    """Run a line of the page; what it wrote."""
    found = re.fullmatch(r"docker compose (?:exec|run)(?: -\S+)* (\S+) (.+?)(?: ([<>] .+))?", line)
    assert found
    service, command, file = found.groups()
    typed = f"{shlex.join(host.command(service, shlex.split(command)))} {file or ''}"
    return subprocess.run(
        ["sh", "-euc", typed],
        env={**os.environ, "BACKUP": str(backup)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def client(host: Host) -> Any:
    import boto3

    names = host.services["buckets"]["environment"]
    return boto3.client(
        "s3",
        endpoint_url="http://127.0.0.1:7070",
        region_name=names["AWS_DEFAULT_REGION"],
        aws_access_key_id=names["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=names["AWS_SECRET_ACCESS_KEY"],
    )


def read_buckets(host: Host) -> dict[str, dict[str, bytes]]:
    """Bucket -> name -> content."""
    s3 = client(host)
    return {
        bucket["Name"]: {
            item["Key"]: s3.get_object(Bucket=bucket["Name"], Key=item["Key"])["Body"].read()
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"])
            for item in page.get("Contents", [])
        }
        for bucket in s3.list_buckets()["Buckets"]
    }


def write_buckets(host: Host, content: dict[str, dict[str, bytes]]) -> None:
    s3 = client(host)
    for bucket, items in content.items():
        for key, body in items.items():
            s3.put_object(Bucket=bucket, Key=key, Body=body)


def test_the_demo_runs_to_its_end(host: Host) -> None:
    run = begin(host, recipe="demo")
    state = ended(host, run, seconds=3500)
    assert state["type"] == "COMPLETED", state
    assert planned(host, "demo") == {"hit"}
    wait_until(lambda: sum(key.endswith("/report.html") for key in keys(host, "mlflow")) >= 2)
