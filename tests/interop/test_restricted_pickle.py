"""Hostile pickles: each must be refused by name before anything has run. The canary file tells."""

import copyreg
import io
import os
import pickle
import struct
import zipfile

import pytest

from jaxalign.interop import restricted_pickle, torch_file

# ---- a tiny assembler ------------------------------------------------------------------------------------

PROTO2, PROTO4, STOP, MARK, REDUCE, POP = b"\x80\x02", b"\x80\x04", b".", b"(", b"R", b"0"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def call(module: str, attribute: str, *arguments: str) -> bytes:
    return PROTO2 + name(module, attribute) + tuple_of(*map(text, arguments)) + REDUCE + STOP


class _Reduces:
    """What people call a malicious pickle: an object whose __reduce__ names a function to call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(canary) -> str:
    return f"touch {canary}"


# Programs that plain pickle runs: the canary proves that the ammunition is live.
LIVE = {
    "os.system": lambda c: call("os", "system", touch(c)),
    "posix.system": lambda c: call("posix", "system", touch(c)),
    "subprocess.getoutput": lambda c: call("subprocess", "getoutput", touch(c)),
    "builtins.eval": lambda c: call("builtins", "eval", f"open({str(c)!r}, 'w')"),
    "builtins.exec": lambda c: call("builtins", "exec", f"open({str(c)!r}, 'w')"),
    "__builtin__.eval": lambda c: call("__builtin__", "eval", f"open({str(c)!r}, 'w')"),
    "builtins.open": lambda c: call("builtins", "open", str(c), "w"),
    "runpy._run_code": lambda c: (
        PROTO2
        + name("runpy", "_run_code")
        + tuple_of(
            name("builtins", "compile") + tuple_of(*map(text, (f"open({str(c)!r}, 'w')", "x", "exec"))) + REDUCE,
            b"}",
        )
        + REDUCE
        + STOP
    ),
    "importlib.import_module": lambda c: (
        PROTO2
        + name("builtins", "getattr")
        + tuple_of(
            name("importlib", "import_module") + tuple_of(text("os")) + REDUCE,
            text("system"),
        )
        + REDUCE
        + tuple_of(text(touch(c)))
        + REDUCE
        + STOP
    ),
    "os.system by __reduce__, protocol 0": lambda c: pickle.dumps(_Reduces(os.system, touch(c)), 0),
    "os.system by __reduce__, protocol 5": lambda c: pickle.dumps(_Reduces(os.system, touch(c)), 5),
    "dotted jaxalign.interop.sniff.zipfile.os.system": lambda c: (
        # STACK_GLOBAL walks the attributes of a dotted name
        PROTO4
        + text("jaxalign.interop.sniff")
        + text("zipfile.os.system")
        + b"\x93"
        + tuple_of(text(touch(c)))
        + REDUCE
        + STOP
    ),
    "INST os.system": lambda c: PROTO2 + MARK + text(touch(c)) + b"ios\nsystem\n" + STOP,
    "OBJ subprocess.Popen": lambda c: (
        PROTO2 + MARK + name("subprocess", "Popen") + MARK + text("touch") + text(str(c)) + b"l" + b"o" + STOP
    ),
    "NEWOBJ io.FileIO": lambda c: (
        # io.FileIO.__new__ opens nothing; its __init__, found by a dotted name, does
        PROTO4
        + text("io")
        + text("FileIO.__init__")
        + b"\x93"
        + tuple_of(name("io", "FileIO") + b")" + b"\x81", text(str(c)), text("w"))
        + REDUCE
        + STOP
    ),
    "NEWOBJ_EX functools.partial": lambda c: (
        PROTO4
        + name("functools", "partial")
        + tuple_of(name("os", "system"), text(touch(c)))
        + b"}"
        + b"\x92"
        + b")"
        + REDUCE
        + STOP
    ),
    "hidden STACK_GLOBAL": lambda c: (
        # the latest two strings are allowed ones, but they are popped: only find_class sees through it
        PROTO4
        + text("os")
        + text("system")
        + text("collections")
        + text("OrderedDict")
        + POP
        + POP
        + b"\x93"
        + tuple_of(text(touch(c)))
        + REDUCE
        + STOP
    ),
    "EXT1": lambda c: PROTO2 + b"\x82" + bytes([_EXTENSION]) + tuple_of(text(touch(c))) + REDUCE + STOP,
}
_EXTENSION = 241

# Programs whose harm a canary does not show, or that need another system: refused by name all the same.
OTHERS = {
    "nt.system": lambda c: call("nt", "system", touch(c)),
    "subprocess.Popen": lambda c: call("subprocess", "Popen", touch(c)),
    "builtins.getattr": lambda c: call("builtins", "getattr", "x", "__class__"),
    "builtins.__import__": lambda c: call("builtins", "__import__", "os"),
    "ctypes.CDLL": lambda c: call("ctypes", "CDLL", "libc.so.6"),
    "shutil.rmtree": lambda c: call("shutil", "rmtree", str(c)),
    "pickle.loads": lambda c: call("pickle", "loads", "cos\nsystem\n."),
    "marshal.loads": lambda c: call("marshal", "loads", "x"),
    "numpy.load": lambda c: call("numpy", "load", str(c)),
    "numpy.core.multiarray._reconstruct": lambda c: call("numpy.core.multiarray", "_reconstruct", "x"),
    "numpy.testing._private.utils.runstring": lambda c: call("numpy.testing._private.utils", "runstring", "1"),
    "torch.load": lambda c: call("torch", "load", str(c)),
    "torch.hub.load": lambda c: call("torch.hub", "load", "a/b", "c"),
    "torch._utils.os.system": lambda c: (
        PROTO4 + text("torch._utils") + text("os.system") + b"\x93" + tuple_of(text(touch(c))) + REDUCE + STOP
    ),
    "torch._utils._rebuild_tensor_v2.__globals__": lambda c: (
        PROTO4 + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93" + STOP
    ),
    "torch.nn.modules.linear.Linear": lambda c: PROTO2 + name("torch.nn.modules.linear", "Linear") + STOP,
    "argparse.Namespace": lambda c: PROTO2 + name("argparse", "Namespace") + b")" + b"\x81" + STOP,
    "setting the state": lambda c: PROTO2 + name("torch._utils", "_rebuild_tensor_v2") + b"}" + b"b" + STOP,
    "NEWOBJ": lambda c: PROTO2 + name("collections", "OrderedDict") + b")" + b"\x81" + STOP,
    "EXT4": lambda c: PROTO2 + b"\x84" + struct.pack("<i", _EXTENSION) + STOP,
    "PERSID": lambda c: b"Pos.system\n.",
    "'module', which is not a storage": lambda c: PROTO2 + tuple_of(*map(text, ("module", "a", "b", "c", "d"))) + b"Q.",
    "7, which is not a storage": lambda c: PROTO2 + b"K\x07Q.",
}

EXPECTED = {
    "importlib.import_module": "builtins.getattr",
    "runpy._run_code": r"runpy\._run_code",
    "os.system by __reduce__, protocol 0": r"posix\.system|nt\.system",
    "os.system by __reduce__, protocol 5": r"posix\.system|nt\.system",
    "INST os.system": r"os\.system",
    "OBJ subprocess.Popen": r"subprocess\.Popen",
    "NEWOBJ io.FileIO": r"io\.FileIO\.__init__",
    "NEWOBJ_EX functools.partial": r"functools\.partial",
    "hidden STACK_GLOBAL": r"os\.system",
    "dotted jaxalign.interop.sniff.zipfile.os.system": r"jaxalign\.interop\.sniff\.zipfile\.os\.system",
}


def as_zip(program: bytes, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
    return path


def as_torchscript(program: bytes, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/constants.pkl", PROTO2 + b")" + STOP)
        archive.writestr("archive/code/__torch__.py", "import os\nos.abort()\n")
    return path


def as_legacy(program: bytes, path):
    parts = [pickle.dumps(part, 2) for part in (torch_file._LEGACY_MAGIC, torch_file._LEGACY_PROTOCOL, {})]
    path.write_bytes(b"".join(parts) + program + pickle.dumps([], 2))
    return path


@pytest.fixture
def extension():
    """A process where os.system was registered and unpickled once: EXT1 then finds it in a cache."""
    copyreg.add_extension("os", "system", _EXTENSION)
    pickle.loads(PROTO2 + b"\x82" + bytes([_EXTENSION]) + STOP)
    yield
    copyreg.remove_extension("os", "system", _EXTENSION)


@pytest.mark.parametrize("which", LIVE)
def test_payload_is_live(which, tmp_path, extension):
    canary = tmp_path / "canary"
    program = LIVE[which](canary)
    try:
        result = pickle.loads(program)
        if hasattr(result, "wait"):
            result.wait()
    except Exception as error:  # some programs fail after they have done their harm
        print(error)
    assert canary.exists()


@pytest.mark.parametrize("wrap", [as_zip, as_legacy, as_torchscript], ids=["zip", "legacy", "torchscript"])
@pytest.mark.parametrize(("table", "which"), [(t, w) for t in ("LIVE", "OTHERS") for w in globals()[t]])
def test_refused_by_name(table, which, wrap, tmp_path, extension):
    canary = tmp_path / "canary"
    program = globals()[table][which](canary)
    path = wrap(program, tmp_path / "weights.pth")
    wanted = EXPECTED.get(which, which) if table == "LIVE" else which
    wanted = rf"weights\.pth: refused: its pickle wants .*{wanted}"
    if wrap is as_torchscript and which == "NEWOBJ":  # an opcode of its own, which finds no type but one
        wanted = r"weights\.pth: truncated or damaged"
    with pytest.raises(ValueError, match=wanted):
        torch_file.read(path)
    assert not canary.exists()


SCRIPTED = name("__torch__.a.b", "C")
MADE = SCRIPTED + b")" + b"\x81"


def test_torchscript_objects_are_bags_of_attributes(tmp_path):
    """Whatever the class is called, nothing is imported, and only in a TorchScript archive."""
    canary = tmp_path / "canary"
    for module, attribute in (("__torch__.os", "system"), ("__torch__", "eval"), ("__torch__.torch.nn", "__init__")):
        program = PROTO2 + name(module, attribute) + b")\x81}" + text("w") + b"K\x05sb" + STOP
        tree = restricted_pickle.load(io.BytesIO(program), script=True)
        assert type(tree) is restricted_pickle.Attributes and tree == {"w": 5}
        with pytest.raises(ValueError, match=r"its pickle wants __torch__"):
            torch_file.read(as_zip(program, tmp_path / "w.pth"))
    with pytest.raises(AttributeError):
        tree.anything = 1  # no __dict__ to poison
    refused = {
        r"__torch__\.a\.b\.C\.__class__": PROTO4 + text("__torch__.a.b") + text("C.__class__") + b"\x93" + STOP,
        r"__torch__\.a-b\.C": PROTO2 + name("__torch__.a-b", "C") + STOP,
        r"__torch__x\.C": PROTO2 + name("__torch__x", "C") + STOP,
        r"torch\.jit\._pickle\.build_tensor_from_id": PROTO2 + name("torch.jit._pickle", "build_tensor_from_id") + STOP,
        r"torch\.jit\._recursive\.x": PROTO2 + name("torch.jit._recursive", "x") + STOP,
        r"os\.system": PROTO2 + MADE + b"}" + text("w") + name("os", "system") + b"sb" + STOP,
        "made with arguments": PROTO2 + SCRIPTED + tuple_of(text(touch(canary))) + b"\x81" + STOP,
        "made with argument": PROTO2 + SCRIPTED + tuple_of(text("x")) + REDUCE + STOP,
        "a state of its own": PROTO2 + MADE + tuple_of(b"N", b"}") + b"b" + STOP,
        "a state of its own making": PROTO2 + MADE + b"}K\x01K\x02sb" + STOP,
        r"the opcode INST": PROTO2 + MARK + b"i__torch__\nC\n" + STOP,
        r"the opcode OBJ": PROTO2 + MARK + SCRIPTED + b"o" + STOP,
        r"the opcode NEWOBJ_EX": PROTO4 + SCRIPTED + b")}\x92" + STOP,
    }
    for wanted, program in refused.items():
        with pytest.raises(restricted_pickle.Refused, match=wanted):
            restricted_pickle.load(io.BytesIO(program), script=True)
    for program in (
        PROTO2 + name("torch", "Size") + b")\x81" + STOP,  # NEWOBJ of what is no type
        PROTO2 + SCRIPTED + b"}b" + STOP,  # BUILD on the class itself
        PROTO2 + MADE + b"K\x01a" + STOP,  # APPEND to a bag
    ):
        with pytest.raises(restricted_pickle.Damaged):
            restricted_pickle.load(io.BytesIO(program), script=True)
    assert not canary.exists() and not vars(restricted_pickle.Attributes).keys() & {"w", "anything"}


def test_bare_malicious_pickle_is_refused(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "weights.pth").write_bytes(LIVE["os.system"](canary))
    with pytest.raises(ValueError, match=r"refused: its pickle wants os\.system"):
        torch_file.read(tmp_path / "weights.pth")
    assert not canary.exists()


def test_nothing_in_the_table_of_names_is_a_real_object():
    for target in (restricted_pickle._GLOBALS | restricted_pickle._SCRIPT_GLOBALS).values():
        assert isinstance(target, restricted_pickle._Inert)
        with pytest.raises(restricted_pickle.Refused):
            target.__setstate__({})
        with pytest.raises(AttributeError):
            target.anything = 1  # no __dict__ to poison


@pytest.mark.parametrize(
    "program",
    [
        PROTO2 + b"r\xff\xff\xff\xff.",  # memo index 4294967295: would allocate gigabytes
        PROTO2 + b"}q\x00",  # no STOP
        PROTO2 + b"X\xff\xff\xff\x7fabc.",  # a string that is longer than the file
        PROTO2 + b"K\x01K\x02\x86R.",  # REDUCE of a tuple
        PROTO2 + b"0.",  # POP of nothing
        PROTO2 + name("torch._utils", "_rebuild_tensor_v2") + b")R.",  # too few arguments
        b"",
    ],
)
def test_malformed_programs_are_damaged(program):
    with pytest.raises(restricted_pickle.Damaged):
        restricted_pickle.load(io.BytesIO(program))


def test_plain_values_are_read():
    value = {"a": [1, 2.5, None, True, "x", (1, (2, 3), -(2**40))], "b": {}, "c": {1: 2**100}}
    for protocol in range(6):
        stream = io.BytesIO(pickle.dumps(value, protocol) + b"rest")
        assert restricted_pickle.load(stream) == value
        assert stream.read() == b"rest"
