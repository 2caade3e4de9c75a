"""Resources: grid file < profile < flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from klab.grid import UserError
from klab.grid.schema.sections import Resources
from klab.harness.dispatch.profiles import configuration_file, profiles, resolve_resources

TEXT = """
profiles:
  big: {partition: gpu, gpus: 2, minutes: 60, setup: [module load cuda], sbatch: {mail-type: END, nice: 5}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(TEXT)
    return path


def test_precedence(file: Path) -> None:
    given = Resources(minutes=10, cpus=3, partition="cpu", sbatch={"nice": 1, "comment": "x"}, profile="big")
    found = resolve_resources(given, {"minutes": 7, "gpus": None}, file=file)
    assert (found.minutes, found.cpus, found.partition, found.gpus) == (7, 3, "gpu", 2)
    assert found.sbatch == {"nice": 5, "comment": "x", "mail-type": "END"}
    assert found.setup == ("module load cuda",)


def test_a_flag_chooses_the_profile(file: Path) -> None:
    assert resolve_resources(Resources(), profile="big", file=file).partition == "gpu"
    assert resolve_resources(Resources(), file=file).partition is None


def test_an_unknown_profile_names_the_known_ones(file: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'big'"):
        resolve_resources(Resources(), profile="bgi", file=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("profiles: {a: {partitoin: x}}", "partition"),
        ("profiles: {a: 3}", "not a mapping"),
        ("profile: {}", "profiles"),
        ("[", "line 1, column 2"),
        ("3", "not a mapping"),
        ("profiles: {a: {profile: b}}", "cannot name another"),
    ],
)
def test_mistakes_in_the_configuration_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        profiles(path)
    assert str(path) in str(caught.value)


def test_where_the_configuration_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KLAB_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert configuration_file() == tmp_path / "klab" / "config.yaml"
    assert profiles() == {}
    monkeypatch.setenv("KLAB_CONFIG", str(tmp_path / "mine.yaml"))
    assert configuration_file() == tmp_path / "mine.yaml"
