"""Folders appear whole or not at all, and placing files spares the disk without endangering the source."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.disk import small_disk
from zconvert.checkpoint.folder import BASE_CARD, can_link, copy, copy_companions, free_space, new_folder, place
from zconvert.errors import UserError


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_folder_appears_with_all_its_files_and_missing_parents(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with new_folder(out) as folder:
        (folder / "x").write_text("x")
        assert not out.exists()
        assert folder.parent == out.parent
    assert (out / "x").read_text() == "x"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_failure_leaves_nothing_not_even_parents(tmp_path: Path, error: type[BaseException]) -> None:
    def fail_midway() -> None:
        with new_folder(tmp_path / "a" / "b" / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text("x")
            raise error

    with pytest.raises(error):
        fail_midway()
    assert os.listdir(tmp_path) == []


def test_parents_that_were_there_stay_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="oh"), new_folder(tmp_path / "a" / "b" / "out"):
        raise ValueError("oh")
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path / "a") == []


@pytest.mark.parametrize("kind", ["empty folder", "folder", "file", "dangling link"])
def test_an_existing_output_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if "folder" in kind:
        out.mkdir()
        if kind == "folder":
            (out / "x").write_text("x")
    elif kind == "file":
        out.write_text("x")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"), new_folder(out):
        pytest.fail("the body must not run")
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_comes_up_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def be_overtaken() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("x")
            (tmp_path / "out").mkdir()

    with pytest.raises(UserError, match="exists already"):
        be_overtaken()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


def test_a_parent_that_is_a_file_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError), new_folder(tmp_path / "file" / "out"):
        pytest.fail("the body must not run")


def test_a_full_disk_is_a_users_error_and_leaves_nothing(tiny_disk: Path) -> None:
    with pytest.raises(UserError, match="disk is full") as caught, new_folder(tiny_disk / "out") as folder:
        (folder / "big").write_bytes(bytes(1_000_000))
    assert "free" in str(caught.value.found)
    assert os.listdir(tiny_disk) == []


def test_a_full_disk_is_told_also_when_the_weights_library_meets_it(tiny_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="disk is full"), new_folder(tiny_disk / "out") as folder:
        save_file({"w": torch.zeros(500_000)}, folder / "w.safetensors")
    assert os.listdir(tiny_disk) == []


def test_a_folder_without_permission_is_a_users_error() -> None:
    with pytest.raises(UserError) as caught, new_folder(Path("/proc/zconvert-test/out")):
        pytest.fail("the body must not run")
    assert caught.value.fix


def test_placing_never_links_the_link_but_its_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "snapshot").symlink_to("blob")
    place(tmp_path / "snapshot", tmp_path / "placed")
    assert not (tmp_path / "placed").is_symlink()
    assert (tmp_path / "placed").read_text() == "weights"


def test_placing_costs_no_bytes_on_the_same_disk(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(os.urandom(100_000))
    place(tmp_path / "blob", tmp_path / "placed")
    linked = (tmp_path / "placed").stat().st_ino == (tmp_path / "blob").stat().st_ino
    assert linked or (tmp_path / "placed").read_bytes() == (tmp_path / "blob").read_bytes()  # by reflink


def test_placing_across_disks_copies(tmp_path: Path, tiny_disk: Path) -> None:
    (tmp_path / "blob").write_text("weights")
    place(tmp_path / "blob", tiny_disk / "placed")
    assert (tiny_disk / "placed").read_text() == "weights"
    assert (tiny_disk / "placed").stat().st_nlink == 1


def test_editing_a_copy_leaves_the_source_alone(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "snapshot").symlink_to("blob")
    copy(tmp_path / "snapshot", tmp_path / "copied")
    with (tmp_path / "copied").open("r+") as file:
        file.write("W")
    assert (tmp_path / "blob").read_text() == "weights"
    assert (tmp_path / "copied").read_text() == "Weights"


def test_each_way_of_placing_says_which_it_was(tmp_path: Path, tiny_disk: Path) -> None:
    (tmp_path / "blob").write_text("weights")
    placed = place(tmp_path / "blob", tmp_path / "placed")
    assert placed == ("link" if (tmp_path / "blob").stat().st_nlink == 2 else "reflink")
    assert place(tmp_path / "blob", tiny_disk / "placed") == copy(tmp_path / "blob", tiny_disk / "copied") == "copy"


@pytest.mark.parametrize("size", [0, 1, 4 * 2**20, 9_000_001])
def test_a_copy_is_whole_within_a_disk_and_across_disks(tmp_path: Path, size: int) -> None:
    (tmp_path / "blob").write_bytes(os.urandom(size))
    with small_disk(tmp_path / "other", "20m") as other:
        for folder in (tmp_path, other):
            copy(tmp_path / "blob", folder / "copied")
            assert (folder / "copied").read_bytes() == (tmp_path / "blob").read_bytes()


@pytest.mark.parametrize("size", [200_000, 300_000, 5_000_000])
def test_a_copy_that_does_not_fit_is_an_error_and_never_a_shorter_file(
    tmp_path: Path, tiny_disk: Path, size: int
) -> None:
    (tmp_path / "blob").write_bytes(os.urandom(size))
    if size < 256 * 1024:
        copy(tmp_path / "blob", tiny_disk / "copied")
        assert (tiny_disk / "copied").stat().st_size == size
    else:
        with pytest.raises(OSError, match="No space left"):
            copy(tmp_path / "blob", tiny_disk / "copied")


def test_links_are_foreseen_on_one_disk_only(tmp_path: Path, tiny_disk: Path) -> None:
    (tmp_path / "blob").write_text("weights")
    assert can_link(tmp_path / "blob", tmp_path / "not" / "there" / "yet")
    assert not can_link(tmp_path / "blob", tiny_disk / "not" / "there" / "yet")
    assert not can_link(tmp_path / "nothing", tmp_path)


def test_the_space_is_that_of_the_disk_the_folder_will_be_on(tiny_disk: Path) -> None:
    assert free_space(tiny_disk / "a" / "b") == 256 * 1024


@pytest.mark.parametrize("put", [place, copy])
def test_no_file_is_overwritten(tmp_path: Path, put: object) -> None:
    assert callable(put)
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        put(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "b"


def test_companions_are_what_belongs_beside_the_weights(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for name in (
        *("LICENSE", "NOTICE", "chat_template.jinja", "tokenizer.json", "config.json", "merges.txt", "code.py"),
        *("README.md", ".gitattributes", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
        *("consolidated.00.pth", "model.gguf", "training_args.bin", "trainer_state.json"),
        *("additional_chat_templates/rag.jinja", "original/params.json", "train_state/step-1/state.json"),
    ):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    out.mkdir()
    copy_companions(source, out, without={"config.json"})
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert found == {
        *("LICENSE", "NOTICE", "chat_template.jinja", "tokenizer.json", "merges.txt", "code.py"),
        *("additional_chat_templates/rag.jinja", BASE_CARD),
    }
    assert (out / BASE_CARD).read_text() == "README.md"


def test_a_companion_that_is_a_link_to_nothing_is_told_of_and_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "merges.txt").symlink_to("blobs/gone")
    with pytest.raises(UserError, match=r"merges\.txt cannot be read") as caught:
        copy_companions(tmp_path / "source", tmp_path)
    assert "blobs/gone" in str(caught.value.found)
