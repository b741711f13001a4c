"""Files: whole or not at all; tensors: what went in comes out, and nothing in a file is executed."""

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from redan.errors import UserError
from redan.files import write_atomically
from redan.tensors import load_tensors, save_tensors


def refused(action: Callable[[], object]) -> str:
    """The one line that it is refused with."""
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and message
    return message


@pytest.mark.parametrize("content", [b"", b"text\n", bytes(range(256)) * 5000])
def test_a_file_holds_what_was_written(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "new" / "folders" / "file"
    write_atomically(path, content)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_file_can_be_read_by_all_and_written_by_its_owner(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_an_old_file_is_replaced_whole_and_its_readers_keep_theirs(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"long old content")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"long old content"
    assert path.read_bytes() == b"new"


class Full:
    """A disk that is full: each of its operations fails, as the system has it."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("operation", ["fdopen", "fsync", "chmod", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with monkeypatch.context() as context:
        context.setattr(os, operation, Full())
        message = refused(lambda: write_atomically(path, b"new"))
    assert message == f"cannot write {path}: No space left on device"
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_atomically(path, b"old")
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for operation in ("fsync", "replace"):
        real = getattr(os, operation)

        def noted(*arguments: Any, name: str = operation, real: Callable[..., None] = real) -> None:
            order.append(name)
            real(*arguments)

        monkeypatch.setattr(os, operation, noted)
    write_atomically(tmp_path / "file", b"x")
    assert order == ["fsync", "replace"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert refused(lambda: write_atomically(tmp_path / "file" / "below", b"")).startswith("cannot write")
    assert "Is a directory" in refused(lambda: write_atomically(tmp_path / "folder", b""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


# Tensors.


def round_trip(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Save, load, compare bit for bit; the metadata that came back."""
    save_tensors(path, tensors, metadata)
    read, found = load_tensors(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
    return found


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(DTYPES),
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
)
def test_any_tensor_comes_back(tmp_path: Path, shape: list[int], dtype: torch.dtype, name: str) -> None:
    tensor = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    round_trip(tmp_path / "file", {name: tensor})


def test_special_values_come_back(tmp_path: Path) -> None:
    values = torch.tensor([float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38])
    round_trip(tmp_path / "file", {"float": values, "scalar": torch.tensor(3), "true": torch.tensor(True)})
    assert load_tensors(tmp_path / "file")[0]["float"].signbit().tolist() == [False, True, True, False, False]


def test_shared_and_strided_memory_and_gradients_come_back(tmp_path: Path) -> None:
    base = torch.arange(120.0).view(2, 3, 4, 5)
    layout = base.to(memory_format=torch.channels_last)
    leaf = torch.ones(3, requires_grad=True)
    tensors = {
        "base": base,
        "same": base,
        "view": base[0],
        "transposed": base.transpose(1, 3),
        "every second": base[:, :, ::2],
        "expanded": torch.ones(1).expand(5),
        "channels last": layout,
        "pixels": torch.ones(4, 3, 1, 1).to(memory_format=torch.channels_last),
        "leaf": leaf,
    }
    round_trip(tmp_path / "file", tensors)
    assert not load_tensors(tmp_path / "file")[0]["leaf"].requires_grad
    assert layout.is_contiguous(memory_format=torch.channels_last) and leaf.requires_grad


def test_what_is_loaded_does_not_change_the_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", {"x": torch.zeros(3)})
    load_tensors(tmp_path / "file")[0]["x"].add_(1)
    assert torch.equal(load_tensors(tmp_path / "file")[0]["x"], torch.zeros(3))


def test_metadata_come_back(tmp_path: Path) -> None:
    metadata = {"epoch": 3, "best": None, "names": ["ß", "\n"], "nested": {"share": 0.1}, "flag": True}
    assert round_trip(tmp_path / "file", {"x": torch.zeros(1)}, metadata) == metadata
    assert round_trip(tmp_path / "file", {"x": torch.zeros(1)}) == {}
    assert round_trip(tmp_path / "file", {}) == {}


def test_a_file_of_another_program_has_no_metadata(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "file")
    tensors, metadata = load_tensors(tmp_path / "file")
    assert torch.equal(tensors["x"], torch.ones(2)) and metadata == {}


def test_tensors_are_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    save_tensors(path, {"x": torch.zeros(3)})
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", Full())
        assert "No space left" in refused(lambda: save_tensors(path, {"x": torch.ones(3)}))
    assert torch.equal(load_tensors(path)[0]["x"], torch.zeros(3)) and list(tmp_path.iterdir()) == [path]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tensors(path, {"x": torch.arange(4), "y": torch.ones(2, 2)}, {"epoch": 1})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refused(lambda: load_tensors(path))
        assert str(path) in message and "damaged or not a safetensors file" in message


def header(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"garbage" * 20,
        header(b"{}")[:-1],
        header(b"[1, 2]"),
        header(b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'),
        header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + b"12345",
        header(b'{"x": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}') + b"1234",
        header(b'{"__metadata__": {"redan": "{"}}'),
        (2**62).to_bytes(8, "little"),
    ],
)
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert "damaged or not a safetensors file" in refused(lambda: load_tensors(tmp_path / "file"))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_no_bytes_give_a_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(header(content))
    try:
        assert load_tensors(tmp_path / "file") == ({}, {})
    except UserError:
        return
    assert isinstance(json.loads(content), dict)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refused(lambda: load_tensors(tmp_path / "none")) == f"there is no {tmp_path / 'none'}"
    assert str(tmp_path) in refused(lambda: load_tensors(tmp_path))


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_loading_executes_nothing(tmp_path: Path) -> None:
    path, crater = tmp_path / "weights.safetensors", tmp_path / "crater"
    path.write_bytes(pickle.dumps(Bomb(crater)))
    refused(lambda: load_tensors(path))
    torch.save({"x": Bomb(crater)}, path)
    refused(lambda: load_tensors(path))
    assert not crater.exists()
    pickle.loads(pickle.dumps(Bomb(crater)))
    assert crater.exists()  # it would have gone off
