"""The buckets that the deployment needs are made, also by an account that may see no others."""

import subprocess
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from tests.deploy.compose import ROOT
from tests.faults.faulty_s3 import client_of


@contextmanager
def s3_without_lists() -> Generator[str]:
    """The address of an S3 server that does not tell which buckets it has."""
    server = DomainDispatcherApplication(create_backend_app)

    def guarded(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"] == "/":
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code></Error>"]
        return server(environ, start_response)

    listening = make_server("127.0.0.1", 0, guarded, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
def test_the_buckets_that_are_missing_are_made_without_a_look_at_all(
    monkeypatch: pytest.MonkeyPatch, region: str
) -> None:
    with s3_without_lists() as address:
        for name, value in client_of(address).items():
            monkeypatch.setenv(name, value)
        s3: Any = boto3.client("s3", region_name="us-east-1")
        s3.create_bucket(Bucket="was-there")
        s3.put_object(Bucket="was-there", Key="kept", Body=b"1")
        monkeypatch.setenv("AWS_DEFAULT_REGION", region)
        command = [sys.executable, str(ROOT / "deploy" / "buckets.py")]
        subprocess.run(
            [*command, "s3://was-there/store", f"s3://new-{region}/artifacts"], check=True
        )
        assert s3.head_object(Bucket="was-there", Key="kept")
        place = s3.get_bucket_location(Bucket=f"new-{region}")["LocationConstraint"]
        assert place == (None if region == "us-east-1" else region)
