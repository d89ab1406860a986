"""What `bessemer up` registers, and what `prefect deploy` registers for teams with a server of their own."""

from pathlib import Path

import yaml
from prefect.flows import load_flow_from_entrypoint

from flows.deployments import bessemer, deployments


def test_the_file_of_the_prefect_cli_has_the_deployments_that_up_registers() -> None:
    written = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text("utf-8"))
    by_cli = {item["name"]: item for item in written["deployments"]}
    by_up = {item.name: item for item in deployments()}
    assert by_cli.keys() == by_up.keys()
    for name, item in by_cli.items():
        known = by_up[name]
        assert item["parameters"] == known.parameters
        assert item["description"] == known.description
        assert item["tags"] == known.tags
        assert load_flow_from_entrypoint(item["entrypoint"]).name == bessemer.name
