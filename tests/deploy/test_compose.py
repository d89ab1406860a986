"""The Compose file and the Dockerfile, as far as they can be judged without Docker."""

import configparser
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from flows.services import QUIET
from tests.deploy.compose import EXAMPLE, FILE, ROOT, read, variables

SECRETS = {
    name: f"{name.lower()}-abc123"
    for name in re.findall(r"^(\w+)=$", EXAMPLE.read_text("utf-8"), re.MULTILINE)
}
"""The variables that .env.example leaves empty."""


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return read(SECRETS)["services"]


def built(services: dict[str, Any]) -> set[str]:
    return {spec["image"] for spec in services.values() if "build" in spec}


def runs_once(spec: dict[str, Any]) -> bool:
    return spec["restart"].startswith("on-failure")


def test_the_file_fits_the_schema_of_compose() -> None:
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    checked = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_every_variable_is_explained_and_no_secret_has_a_default() -> None:
    told = set(re.findall(r"^(?:# )?(\w+)=", EXAMPLE.read_text("utf-8"), re.MULTILINE))
    assert told == variables().keys()
    named = {name for name in told if re.search("PASSWORD|SECRET|ACCESS", name)}
    assert named == SECRETS.keys()
    assert {how for name in SECRETS for how in variables()[name]} == {":?"}
    for missing in SECRETS:
        with pytest.raises(KeyError, match=f"{missing}: fill in .env"):
            read({**SECRETS, missing: ""})


def test_filled_in_passwords_are_not_committed() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


def test_each_password_goes_only_where_it_is_used(services: dict[str, Any]) -> None:
    def holders(name: str) -> set[str]:
        return {of for of, spec in services.items() if SECRETS[name] in yaml.safe_dump(spec)}

    server = {"prefect", "prefect-services", "prefect-database"}
    workers = {"worker-cpu", "worker-gpu", "watcher", "deployments"}
    assert holders("POSTGRES_PASSWORD") == {"postgres", "databases"}
    assert holders("PREFECT_DATABASE_PASSWORD") == {"databases", *server}
    assert holders("MLFLOW_DATABASE_PASSWORD") == {"databases", "mlflow"}
    assert holders("REDIS_PASSWORD") == {"redis", *server}
    assert holders("PREFECT_PASSWORD") == {*server, *workers}
    assert holders("MLFLOW_PASSWORD") == {"mlflow", *workers}
    assert holders("MLFLOW_SECRET_KEY") == {"mlflow"}
    assert holders("S3_SECRET_KEY") == {"s3", "buckets", "mlflow", *workers}
    for spec in services.values():  # every process of the host reads the commands of all
        assert not any(secret in str(spec.get("command")) for secret in SECRETS.values())


def test_images_are_pinned_or_built_here(services: dict[str, Any]) -> None:
    for spec in services.values():
        _, _, tag = spec["image"].partition(":")
        assert spec["image"] in built(services) or re.fullmatch(r"v?\d+\.\d+[\w.-]*", tag)
    for base in re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE):
        assert base == "base" or re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)


def test_services_are_watched_and_come_back(services: dict[str, Any]) -> None:
    for spec in services.values():
        assert runs_once(spec) or (spec["restart"] == "unless-stopped" and "healthcheck" in spec)
        for needed, how in spec.get("depends_on", {}).items():
            once = runs_once(services[needed])
            assert how["condition"] == (
                "service_completed_successfully" if once else "service_healthy"
            )


def test_nothing_listens_beyond_loopback_unless_asked(services: dict[str, Any]) -> None:
    ports = {name: spec["ports"] for name, spec in services.items() if "ports" in spec}
    assert ports == {"prefect": ["127.0.0.1:4200:4200"], "mlflow": ["127.0.0.1:5000:5000"]}
    asked = read({**SECRETS, "BESSEMER_BIND": "10.0.0.5"})["services"]
    assert asked["prefect"]["ports"] == ["10.0.0.5:4200:4200"]


def test_containers_have_no_rights_that_they_do_not_need(services: dict[str, Any]) -> None:
    for name, spec in services.items():
        assert spec["read_only"]
        assert spec["cap_drop"] == ["ALL"]
        assert spec["security_opt"] == ["no-new-privileges:true"]
        assert spec.get("user") != "root" or name == "volumes"
        assert spec.get("cap_add", []) == (["CHOWN"] if name == "volumes" else [])
    users = re.findall(r"^USER (\S+)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert users == ["10001:10001"] * 2  # at the end of both images


def test_volumes_are_named_and_used(services: dict[str, Any]) -> None:
    used = {v.split(":")[0] for spec in services.values() for v in spec.get("volumes", ())}
    named = {volume for volume in used if not volume.startswith(".")}
    assert named == read(SECRETS)["volumes"].keys()
    for bound in used - named - {"./project"}:
        assert (ROOT / bound).is_file()


def test_telemetry_is_off_wherever_something_could_call_home(services: dict[str, Any]) -> None:
    for spec in services.values():
        if spec["image"] in built(services) and spec.get("environment"):
            telling = {"PREFECT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_AUTH_CONFIG_PATH"}
            if telling & spec["environment"].keys():
                assert spec["environment"].items() >= QUIET.items()
    image = (ROOT / "Dockerfile").read_text("utf-8")
    assert all(f"{name}={value}" in image for name, value in QUIET.items())


def test_what_the_images_and_mounts_need_is_there(services: dict[str, Any]) -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert {name for line in copied for name in line.split()} == let_in
    assert all((ROOT / name).exists() for name in let_in)
    settings = configparser.ConfigParser()
    settings.read(ROOT / "deploy" / "mlflow-auth.ini")
    assert settings["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert "password" not in settings["mlflow"]["database_uri"]
