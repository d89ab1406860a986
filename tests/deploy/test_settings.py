"""What a deployment says by environment variables."""

from pathlib import Path

import pytest

from flows.runs import Home
from flows.services import ServiceError, ensure_prefect, up


def test_the_store_of_a_deployment_is_used_where_a_recipe_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    monkeypatch.setenv("BESSEMER_STORE", str(tmp_path / "shared"))
    assert home.store().root == tmp_path / "shared"
    assert home.store({"store": {"url": None}}).root == tmp_path / "shared"
    named = {"store": {"url": str(tmp_path / "own")}}
    assert home.store(named).root == tmp_path / "own"
    monkeypatch.delenv("BESSEMER_STORE")
    assert home.store().root == tmp_path / "home" / "store"


def test_where_others_see_to_the_services_none_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESSEMER_SERVICES", "external")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ServiceError, match="set PREFECT_API_URL"):
        ensure_prefect(Home(tmp_path / "home"))
    assert up(Home(tmp_path / "home")) == []
    assert not (tmp_path / "home").exists()
