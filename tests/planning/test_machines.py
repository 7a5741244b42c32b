"""The table of devices, and files of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from zconvert.errors import UserError
from zconvert.planning.machines import MACHINES, Machine, find_machine

MINE = """\
name: my-box
memory_gb: 48
bandwidth_gb_s: 864
bf16_tflops: 181
price_per_hour: 0.9
"""


def test_every_device_of_the_table_has_a_source_and_sane_facts() -> None:
    assert {"mi300x", "mi355x", "h100-80gb", "h200", "b200", "a100-80gb", "rtx4090", "rtx5090", "cpu"} == {*MACHINES}
    for machine in MACHINES.values():
        assert len(machine.source) > 20
        assert machine.link_gb_s >= machine.network_gb_s
        if machine.name != "cpu":
            assert 100 < machine.flops(2) / machine.bytes_per_second < 400
            assert machine.flops(4) < machine.flops(2)


@pytest.mark.parametrize(("text", "name"), [("H100", "h100-80gb"), ("MI300X", "mi300x"), ("4090", "rtx4090")])
def test_a_short_name_that_is_clear_will_do(text: str, name: str) -> None:
    assert find_machine(text).name == name


@pytest.mark.parametrize(("text", "near"), [("mi350x", "mi355x"), ("h-1000", "h100-80gb"), ("rtx4080", "rtx4090")])
def test_an_unknown_device_is_told_its_nearest_names(text: str, near: str) -> None:
    with pytest.raises(UserError, match="no machine is called") as raised:
        find_machine(text)
    assert near in str(raised.value.found)
    assert "b200" in str(raised.value.expected)


def test_a_file_describes_a_machine_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    machine = find_machine(str(path))
    assert machine == Machine(name="my-box", memory_gb=48, bandwidth_gb_s=864, bf16_tflops=181, price_per_hour=0.9)
    assert machine.flops(4) == 181e12 / 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("memory_gb: 0", "memory_gb (line 2) is 0: expected greater than 0"),
        ("memory_gb: -80", "memory_gb (line 2) is -80: expected greater than 0"),
        ("memory_gb: lots", "memory_gb (line 2) is 'lots': expected"),
        ("memory: 48", "memory (line 2) is not a known key, did you mean memory_gb?"),
        ("memory_gb: .inf", "memory_gb (line 2) is inf: expected a finite number"),
    ],
)
def test_wrong_facts_are_told_by_line(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE.replace("memory_gb: 48", line))
    with pytest.raises(UserError, match="not a valid machine") as raised:
        find_machine(str(path))
    assert told in str(raised.value.found)


def test_missing_facts_are_told_with_their_unit(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: my-box\n")
    with pytest.raises(UserError) as raised:
        find_machine(str(path))
    assert "bandwidth_gb_s is missing (reading its memory, GB/s)" in str(raised.value.found)


def test_a_file_that_is_not_there_is_told_and_not_called_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no machine file .*mine\.yaml") as raised:
        find_machine(str(tmp_path / "mine.yaml"))
    assert "docs/planning.md" in str(raised.value.fix)
