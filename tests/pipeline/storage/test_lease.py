"""One machine at a time works on a run at a URL."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy

from pipeline.errors import RequestError, WorkError
from pipeline.storage.lease import LEASE, Lease, holding
from pipeline.storage.objects import Objects


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OAPL_LEASE_S", "0.2")


@pytest.mark.parametrize("url", ["s3", "memory://bucket/leased"])
def test_a_second_machine_is_refused_while_the_first_lives(bucket: str, url: str, tmp_path: Path) -> None:
    url = bucket if url == "s3" else url
    said: list[str] = []
    with holding(url, tmp_path / "one", said.append) as lease:
        with (
            pytest.raises(RequestError, match=f"^{url}: .* is at work on this run; wait for it$"),
            holding(url, tmp_path / "two", said.append),
        ):
            pass
        with holding(url, tmp_path / "one", said.append):  # a step of the same machine
            time.sleep(0.5)
        time.sleep(0.5)
        lease.check()
        assert json.loads(Objects(url).read(LEASE))["machine"] is not None  # still held
    assert len(said) == 1 and said[0].endswith("was at work on this run; looking whether it still is")
    with holding(url, tmp_path / "two", said.append):
        assert len(said) == 1  # it was given back, so nobody waits


def test_a_dead_machine_is_followed_and_a_late_one_stops(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = Lease(bucket, "a" * 32)
    dead.take(print)
    with holding(bucket, tmp_path / "two", print):
        assert "looking whether it still is" in capsys.readouterr().out
        dead.check()
        dead.renew()
        with pytest.raises(WorkError, match="has taken this run over, and this machine stops") as caught:
            dead.check()
        assert "\n" not in str(caught.value)
        dead.release()  # gives back nothing that is another's
        assert json.loads(Objects(bucket).read(LEASE))["machine"] == (tmp_path / "two/.machine").read_text()
        proxy.fault_of = lambda method, path: "lost answer" if method == "PUT" else None
        time.sleep(0.5)  # a store that does not answer for a while costs nothing
        proxy.fault_of = lambda method, path: None
    with holding(bucket, tmp_path / "three", print):
        pass
