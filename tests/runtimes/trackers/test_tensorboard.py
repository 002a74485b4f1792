"""TensorBoard's event files, read by its own reader."""

from __future__ import annotations

import pytest

from pplr.runtimes.trackers import make_trackers
from pplr.testing.trackers import TrackerContract
from tests.runtimes.trackers.reading import event_reader, tensorboard_points

pytest.importorskip("tensorboard")


class TestTensorBoard(TrackerContract):
    name = "tensorboard"

    def read(self, folder):
        return tensorboard_points(folder)

    def settings(self, folder):
        (told,) = event_reader(folder).Tensors("config")
        return told.tensor_proto.string_val[0].decode()


def test_a_file_that_a_kill_cut_off_is_read_up_to_there(tmp_path):
    contract = TestTensorBoard()
    first = contract.opened(tmp_path)
    first.write(1, {"loss/mean": 1.5})
    first.write(2, {"loss/mean": 1.25})
    first.close("failed")
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert contract.read(tmp_path) == {"loss/mean": [(1, 1.5)]}
    second = contract.opened(tmp_path)
    second.write(1, {"loss/mean": 1.5})
    second.write(2, {"loss/mean": 1.25})
    second.close("finished")
    assert contract.read(tmp_path) == {"loss/mean": [(1, 1.5), (2, 1.25)]}


def test_settings_stand_in_one_cell_each(tmp_path):
    contract = TestTensorBoard()
    contract.opened(tmp_path).close("finished")
    rows = contract.settings(tmp_path).splitlines()
    assert rows[-1] == r"| backbone.prompt.instruction | a \| b c |"


def test_a_disk_that_refuses_is_known_at_once(tmp_path):
    (tracker,) = make_trackers(["tensorboard"])
    tracker.open(tmp_path, {})
    tracker._writer._writer.close()
    tracker._writer._writer = open("/dev/full", "wb")  # noqa: PTH123, SIM115
    with pytest.raises(OSError, match="No space left"):
        tracker.write(1, {"loss/mean": 1.5})
    with pytest.raises(OSError, match="No space left"):
        tracker.close("failed")
