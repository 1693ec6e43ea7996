"""Outputs are checked before the work: nothing is lost, and nothing fails at the end for want of a folder."""

import pytest

from scratch_gpt2.files import check_outputs


def test_an_input_is_never_an_output(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    (tmp_path / "link.json").symlink_to(rows)
    for output in (rows, tmp_path / "new" / ".." / "rows.json", tmp_path / "link.json"):
        with pytest.raises(
            ValueError, match="is an input of this command and would be replaced; choose another output"
        ):
            check_outputs([output], inputs=["some/data-set", rows], overwrite=True)
    with pytest.raises(ValueError, match="is an input of this command"):
        check_outputs(["absent.json"], inputs=["./absent.json"])  # the error about the missing file comes later


def test_a_file_of_a_model_that_is_read_is_never_an_output(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "scores.json"):
        (tmp_path / name).write_text("mine")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with pytest.raises(ValueError, match=f"{name} is an input of this command and would be replaced"):
            check_outputs([tmp_path / name], inputs=[str(tmp_path)], overwrite=True)
    check_outputs([tmp_path / "scores.json", tmp_path / "run.json"], inputs=[tmp_path], overwrite=True)


def test_an_existing_output_is_replaced_only_on_request(tmp_path):
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out.json exists; choose another name, or add --overwrite to replace"):
        check_outputs([tmp_path / "new.json", tmp_path / "out.json"])
    check_outputs([tmp_path / "out.json"], overwrite=True)
    assert (tmp_path / "out.json").read_text() == "mine"


def test_what_cannot_be_written_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        check_outputs([tmp_path], overwrite=True)
    with pytest.raises(
        NotADirectoryError, match=r"a.json cannot be written \(Not a directory\); choose another folder"
    ):
        check_outputs([tmp_path / "file" / "new" / "a.json"])
    with pytest.raises(OSError, match=r"/proc/a.json cannot be written \(.*\); choose another folder"):
        check_outputs(["/proc/a.json"])
    check_outputs([tmp_path / "new" / "folder" / "a.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
