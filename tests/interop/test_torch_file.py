"""PyTorch files in both formats: torch's own arrays, read lazily; and what people hand over by mistake."""

import collections
import io
import pickle
import struct
import sys
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxalign.interop import restricted_pickle, torch_file
from jaxalign.interop.dtypes import TORCH_STORAGE

torch = pytest.importorskip("torch")


def save(value, path, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def as_numpy(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype is torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def same(array, tensor):
    wanted = as_numpy(tensor)
    assert array.dtype == wanted.dtype and array.shape == wanted.shape
    assert array.tobytes() == wanted.tobytes()  # bytes: NaN payloads and signed zeros count too


def every_kind():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    tensors = {
        str(dtype): (torch.randn(3, 5, generator=generator) * 50).to(dtype)
        for dtype in (
            *(
                torch.float64,
                torch.float32,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int32,
                torch.int16,
            ),
            *(torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
        )
    }
    tensors |= {
        "whole": base,
        "rows": base[2:4],  # an offset into a shared storage
        "turned": base.T,
        "steps": base[:, ::3],
        "expanded": base[0, :1].expand(4),  # stride 0
        "permuted": torch.randn(2, 3, 4, generator=generator).permute(2, 0, 1),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    return tensors


@pytest.mark.parametrize("lazy", [False, True], ids=["arrays", "lazy"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_equals_torch(tmp_path, legacy, lazy):
    tensors = every_kind()
    arrays = torch_file.read(save(tensors, tmp_path / "w.pth", legacy), lazy=lazy)
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        same(arrays[name], tensor)


def test_dtypes_without_a_typed_storage(tmp_path):
    tensors = {
        "a": torch.tensor([1, 60000], dtype=torch.uint16),
        "b": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    }
    arrays = torch_file.read(save(tensors, tmp_path / "w.pth"))
    for name, tensor in tensors.items():
        same(arrays[name], tensor)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_state_dict_with_metadata(tmp_path, legacy):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    state = module.state_dict()
    assert state._metadata  # set by BUILD on the OrderedDict
    arrays = torch_file.read(save(state, tmp_path / "w.pth", legacy))
    assert list(arrays) == list(state)
    for name in state:
        same(arrays[name], state[name])


def test_containers_become_dotted_names(tmp_path):
    value = {
        "a": torch.ones(1),
        "b": {"c": torch.ones(2), "d": [torch.ones(3), (torch.ones(4), 5)]},
        "size": torch.Size([2, 3]),
        "text": "x",
        "none": None,
        0: torch.ones(5),
    }
    arrays = torch_file.read(save(value, tmp_path / "w.pth"))
    assert {name: array.size for name, array in arrays.items()} == {
        "a": 1,
        "b.c": 2,
        "b.d.0": 3,
        "b.d.1.0": 4,
        "0": 5,
    }


def test_legacy_view_of_a_storage(tmp_path):
    """Files of before 2017 store a slice of a storage as a view of its root."""
    numbers = np.arange(6, dtype="<f4")

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, str) and value == "view":
                return ("storage", torch.FloatStorage, "17", "cpu", 6, ("18", 2, 3))
            return None

    class Reduced:
        def __reduce__(self):
            return torch._utils._rebuild_tensor, ("view", 1, (2,), (1,))

    main = io.BytesIO()
    Pickler(main, 2).dump({"w": Reduced()})
    head = [pickle.dumps(v, 2) for v in (torch_file._LEGACY_MAGIC, torch_file._LEGACY_PROTOCOL, {})]
    tail = pickle.dumps(["17"], 2) + struct.pack("<q", 6) + numbers.tobytes()
    (tmp_path / "w.pth").write_bytes(b"".join(head) + main.getvalue() + tail)
    assert torch_file.read(tmp_path / "w.pth")["w"].tolist() == [3.0, 4.0]


def test_big_endian_zip(tmp_path):
    tensors = {k: v for k, v in every_kind().items() if k != "torch.bfloat16"} | {"half": torch.ones(3).bfloat16()}
    source = save(tensors, tmp_path / "little.pth")
    records = {}
    with zipfile.ZipFile(source) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    # what a big-endian machine would have written: every number of every storage swapped
    widths = {}

    class Sizes(pickle.Unpickler):
        def find_class(self, module, name):
            if name.endswith("Storage"):
                dtype = TORCH_STORAGE[name]
                return dtype.itemsize // (2 if dtype.kind == "c" else 1)
            return lambda *a: None if name != "OrderedDict" else collections.OrderedDict()

        def persistent_load(self, pid):
            widths[pid[2]] = pid[1]

    prefix = next(iter(records)).split("/")[0]
    Sizes(io.BytesIO(records[f"{prefix}/data.pkl"])).load()
    with zipfile.ZipFile(tmp_path / "big.pth", "w") as archive:
        for name, data in records.items():
            key = name.removeprefix(f"{prefix}/data/")
            if key in widths:
                data = np.frombuffer(data, f"u{widths[key]}").byteswap().tobytes()
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    arrays = torch_file.read(tmp_path / "big.pth")
    for name, tensor in tensors.items():
        same(arrays[name], tensor)


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be written there")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_bytes_are_read_only_when_asked(tmp_path, legacy):
    path = save({"a": torch.full((1000,), 1.25), "b": torch.full((1000,), 2.5)}, tmp_path / "w.pth", legacy)
    arrays = torch_file.read(path, lazy=True)
    data = path.read_bytes().replace(np.full(1000, 2.5, "f4").tobytes(), np.full(1000, 7.5, "f4").tobytes())
    with path.open("r+b") as file:
        file.write(data)
    assert set(arrays["a"]) == {1.25} and set(arrays["b"]) == {7.5}  # b was not read before it was looked at
    assert not arrays["b"].flags.writeable
    with pytest.raises(KeyError, match="did you mean 'a'"):
        arrays["a "]


def test_parts_need_a_key(tmp_path):
    value = {
        "state_dict": {"w": torch.ones(1), "b": torch.ones(2)},
        "ema": {"shadow.x": {"w": torch.ones(3)}},
        "epoch": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]},
    }
    path = save(value, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"which of its parts is meant\? 'state_dict' \(2 tensors\), 'ema.shadow.x' \(1 tensor\)"
    ):
        torch_file.read(path)
    assert torch_file.parts(path) == ["state_dict", "ema.shadow.x", "optimizer.state.0"]
    assert list(torch_file.read(path, key="state_dict")) == ["w", "b"]
    assert torch_file.read(path, key="ema.shadow.x")["w"].size == 3  # a name with a dot of its own
    with pytest.raises(ValueError, match="no part 'model'; it has 'state_dict'"):
        torch_file.read(path, key="model")
    with pytest.raises(ValueError, match="no tensors"):
        torch_file.read(path, key="epoch")
    only = save({"net": {"student": {"w": torch.ones(1), "b": torch.ones(2)}}, "epoch": 3}, tmp_path / "only.pth")
    assert list(torch_file.read(only)) == ["w", "b"]


def test_single_tensor(tmp_path):
    assert torch_file.read(save(torch.arange(3), tmp_path / "w.pth"))[""].tolist() == [0, 1, 2]


def test_container_that_holds_itself(tmp_path):
    value = {"w": torch.ones(1)}
    value["again"] = value
    with pytest.raises(ValueError, match="holds itself"):
        torch_file.read(save(value, tmp_path / "w.pth"))


def _cut(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncated(tmp_path, legacy, keep):
    path = save({f"w{i}": torch.randn(100) for i in range(30)}, tmp_path / "w.pth", legacy)
    _cut(path, keep)
    with pytest.raises(ValueError, match=r"w\.pth: truncated or damaged"):
        torch_file.read(path)


def _zip(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_wrong_files(tmp_path):
    path = tmp_path / "w.pth"
    safetensors = pytest.importorskip("safetensors.numpy")

    def refuses(pattern, error=ValueError):
        with pytest.raises(error, match=pattern):
            torch_file.read(path)

    refuses("no such file", FileNotFoundError)
    path.write_bytes(b"")
    refuses(r"empty \(0 bytes\)")
    path.write_bytes(b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>")
    refuses("web page")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuses("git lfs pull")
    safetensors.save_file({"w": np.ones(3)}, path)
    refuses("a safetensors file, not a PyTorch one")
    path.write_bytes(b"\x1f\x8b" + bytes(20))
    refuses("gzip")
    path.write_bytes(b"hello there, this is text")
    refuses("neither a PyTorch nor a safetensors file")
    path.write_bytes(pickle.dumps({"w": [1.0]}))
    refuses("a pickle, but not one that torch.save made")
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    refuses("tar archive")
    _zip(path, {"a.txt": b"x"})
    refuses("not one that torch.save made")
    _zip(path, {"a.npy": b"x"})
    refuses("a npz file, not a PyTorch one")
    _zip(path, {"x/data.pkl": b"\x80\x02}.", "x/constants.pkl": b"\x80\x02}.", "x/code/y.py": b""})
    refuses("a TorchScript archive whose data.pkl holds no module")
    _zip(path, {"x/constants.pkl": b"\x80\x02).", "x/code/y.py": b""})
    refuses("not one that torch.save made")
    save({"w": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    _zip(path, entries, zipfile.ZIP_DEFLATED)
    refuses("compressed")
    _zip(path, {name: data for name, data in entries.items() if not name.endswith("data/0")})
    refuses("no record data/0")
    _zip(path, {name: data[:-4] if name.endswith("data/0") else data for name, data in entries.items()})
    refuses("shorter than its 3 elements")
    path.unlink()
    path.mkdir()
    (path / "model.safetensors").touch()
    refuses(r"a folder.*it holds model\.safetensors", IsADirectoryError)


class Scripted(torch.nn.Module):
    """Attributes of every kind that TorchScript's pickler writes its own way, none of which is a weight."""

    def __init__(self):
        super().__init__()
        self.conv3d = torch.nn.Conv3d(1, 2, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False)
        self.bn = torch.nn.BatchNorm3d(2, eps=1e-3)
        self.fc = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1).half())
        self.register_buffer("mean", torch.arange(6.0).reshape(2, 3).T)
        self.names, self.sizes, self.rates = ["a", "b"], [1, 2], {"x": 0.5}
        self.flags, self.floats, self.none, self.pair = [True, False], [0.5, 2.0], None, (1, "y")

    def forward(self, x: torch.Tensor, scaled: bool = False):
        return self.bn(self.conv3d(x)), self.names, self.sizes, self.rates, self.flags, self.floats, self.pair


@pytest.mark.parametrize("lazy", [False, True], ids=["arrays", "lazy"])
def test_torchscript_gives_the_state_dict(tmp_path, lazy):
    torch.manual_seed(0)
    module = Scripted().eval()
    torch.jit.script(module).save(str(tmp_path / "w.pt"))
    state = torch.jit.load(str(tmp_path / "w.pt")).state_dict()
    arrays = torch_file.read(tmp_path / "w.pt", lazy=lazy)
    assert set(arrays) == set(state) == set(module.state_dict()) and len(state) == 11
    for name, tensor in state.items():
        same(arrays[name], tensor)
    assert set(torch_file.read(tmp_path / "w.pt", key="fc.2")) == {"weight", "bias"}
    traced = torch.jit.trace(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1, 2))
    traced.save(str(tmp_path / "t.pt"))
    same(torch_file.read(tmp_path / "t.pt")["0.weight"], traced.state_dict()["0.weight"])
    _cut(tmp_path / "w.pt", 0.5)
    with pytest.raises(ValueError, match="truncated or damaged"):
        torch_file.read(tmp_path / "w.pt")


def test_tensor_beyond_its_storage(tmp_path):
    path = save({"w": torch.arange(4.0)}, tmp_path / "w.pth", legacy=True)
    data = path.read_bytes()
    size = b"K\x04\x85"  # the size (4,)
    assert data.count(size) == 1
    path.write_bytes(data.replace(size, b"K\x05\x85"))
    with pytest.raises(ValueError, match="reaches beyond its storage of 16 bytes"):
        torch_file.read(path)


# ---- files that nobody's torch.save wrote: ValueError for each, and the process lives --------------------------------


def _number(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _tuple(*items):
    return b"(" + b"".join(items) + b"t"


def _tensor(length, offset=0, size=(1,), stride=(1,), kind="FloatStorage", key=None, view=b""):
    """The program that makes a tensor of storage '0'."""
    of = _tuple(_text("storage"), f"ctorch\n{kind}\n".encode(), key or _text("0"), _text("cpu"), _number(length), view)
    sizes = (_tuple(*map(_number, numbers)) for numbers in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor\n" + _tuple(of + b"Q", _number(offset), *sizes) + b"R"


def _dict(*values, setitem=b"s"):
    items = (_text(f"w{k}") + value + setitem for k, value in enumerate(values))
    return b"\x80\x02}" + b"".join(items) + b"."


def _write(path, program, keys=("0",), legacy=True):
    """A file whose only storage has one float."""
    if legacy:
        head = [pickle.dumps(v, 2) for v in (torch_file._LEGACY_MAGIC, torch_file._LEGACY_PROTOCOL, {})]
        keys = keys if isinstance(keys, bytes) else pickle.dumps(list(keys), 2)
        path.write_bytes(b"".join(head) + program + keys + struct.pack("<qf", 1, 2.5))
    else:
        _zip(path, {"a/data.pkl": program, "a/data/0": struct.pack("<f", 2.5)})
    return path


FAR = 200_000_000
OF_LEGACY = {"two kinds", "a view beyond", "no view"}  # zip files: each within its record, and there are no views
NESTED_LISTS = b"\x80\x02]" + b"]" * 5000 + b"a" * 5000 + b"."
MANY_TIMES = b"]q\x00" + b"".join(b"0](h%ch%ceq%c" % (k, k, k + 1) for k in range(60))
HOSTILE = {
    "two lengths": _dict(_tensor(FAR, size=(2,), stride=(FAR - 1,)), _tensor(1)),
    "two lengths, the short one first": _dict(_tensor(1), _tensor(FAR, size=(2,), stride=(FAR - 1,))),
    "two kinds": _dict(_tensor(1, kind="DoubleStorage"), _tensor(1, kind="ByteStorage")),
    "a view beyond": _dict(_tensor(1, view=_tuple(_text("v"), _number(1), _number(2**70)))),
    "no view": _dict(_tensor(1, view=_number(3))),
    "a key that is no text": _dict(_tensor(1, key=_number(0))),
    "offset < 0": _dict(_tensor(1, offset=-1)),
    "stride < 0": _dict(_tensor(1, size=(2,), stride=(-1,))),
    "sizes < 0": _dict(_tensor(1, size=(-2, -3), stride=(1, 1))),
    "length < 0": _dict(_tensor(-1, size=(0,))),
    "a size that overflows": _dict(_tensor(1, size=(2**32, 2**32), stride=(0, 0))),
    "a size that fills the memory": _dict(_tensor(1, size=(2**40,), stride=(0,))),
    "nothing of a size that overflows": _dict(_tensor(1, size=(0, 2**70), stride=(1, 1))),
    "100 axes": _dict(_tensor(1, size=(1,) * 100, stride=(1,) * 100)),
    "a long number": b"\x80\x02}\x8b" + struct.pack("<i", 10_000) + b"\x7f" * 10_000 + _tensor(1) + b"s.",
    "nested tuples": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
    "one tuple many times": b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.",
    "a list many times in a key": _dict(_tensor(1, key=MANY_TIMES)),
    "nested tuples, one by one": b"\x80\x04})\x94" + b"0h\x00\x85q\x00" * 200 + b"K\x01s.",
    "nested sizes": b"\x80\x02})" + b"q\x000ctorch\nSize\n]h\x00a\x85R" * 200 + b"K\x01s.",
    "nested lists": NESTED_LISTS,
    "a list of itself": b"\x80\x02]q\x00(" + b"h\x00" * 300 + b"e.",
    "a list of lists of one tensor": b"\x80\x02]"
    + _tensor(1)
    + b"a"
    + b"".join(b"q%c](h%ch%ch%ce" % (k, k, k, k) for k in range(60))
    + b".",
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("which", HOSTILE)
def test_hostile_tensors_are_refused(tmp_path, which, legacy):
    if not legacy and which in OF_LEGACY:
        return
    path = _write(tmp_path / "w.pth", HOSTILE[which], legacy=legacy)
    for reading in (torch_file.parts, torch_file.read):
        with pytest.raises(ValueError, match=r"w\.pth: truncated or damaged"):
            reading(path)


def test_harmless_oddities_are_read(tmp_path):
    """Strides that are never walked; storages of nothing under one key."""
    program = _dict(_tensor(1, size=(1, 1), stride=(2**80, 2**62)), _tensor(1, size=(0, 2), stride=(2**70, 1)))
    for legacy in (False, True):
        found = torch_file.read(_write(tmp_path / "w.pth", program, legacy=legacy))
        assert found["w0"].tolist() == [[2.5]] and found["w1"].shape == (0, 2)
    nothing = torch.zeros(0)
    save({"a": nothing, "b": nothing.view(torch.int64)}, tmp_path / "w.pth", legacy=True)
    assert {n: a.dtype.name for n, a in torch_file.read(tmp_path / "w.pth").items()} == {"a": "float32", "b": "int64"}


@pytest.mark.parametrize("keys", [[["0"]], [0], ["0", "0"], ["1"], [], "0", NESTED_LISTS], ids=str)
def test_odd_lists_of_storages(tmp_path, keys):
    keys = keys if isinstance(keys, bytes) else pickle.dumps(keys, 2)
    with pytest.raises(ValueError, match=r"w\.pth: truncated or damaged"):
        torch_file.read(_write(tmp_path / "w.pth", _dict(_tensor(1)), keys))


def test_the_bound_is_asked_where_the_view_is_built(tmp_path):
    """Whatever went wrong before: as_strided never looks beyond the bytes that there are."""
    storage = restricted_pickle.Storage("0", np.dtype("f4"), FAR)
    tensor = restricted_pickle.Tensor(storage, np.dtype("f4"), 0, (2,), (FAR - 1,))
    build = torch_file._view(tensor, lambda key: (np.zeros(4, np.uint8), False), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: damaged: a tensor ends beyond its storage 0"):
        build()


def test_odd_zip_directories(tmp_path):
    path = save({"w": torch.ones(3)}, tmp_path / "w.pth")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 255  # a version of the format that does not exist
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"w\.pth: truncated or damaged"):
        torch_file.read(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "torchscript"])
def test_changed_bytes(tmp_path, kind):
    """Small files with some bytes changed: read, or ValueError."""
    tensors = {"w": torch.ones(2, 3), "t": torch.ones(2, 3).T, "half": torch.ones(2).half(), "parts": {"n": 1}}
    path = tmp_path / "w.pth"
    if kind == "torchscript":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    else:
        save(tensors, path, kind == "legacy")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    records = {}
    if kind != "legacy":
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
    program = next((name for name in records if name.endswith("data.pkl")), None)

    def changed(data):
        data = bytearray(data)
        for _ in range(random.integers(1, 4)):
            data[random.integers(len(data))] = random.choice(
                [0, 1, 127, 255, *b"QRt(.sKa\x85\x86", random.integers(256)]
            )
        return bytes(data)

    refused = 0
    for step in range(100):
        if kind != "legacy" and step % 2:  # the pickle, with a checksum that is right
            _zip(path, records | {program: changed(records[program])})
        else:
            path.write_bytes(changed(whole))
        for reading in (torch_file.parts, torch_file.read):
            try:
                reading(path)
            except ValueError:
                refused += 1
    assert refused > 30
