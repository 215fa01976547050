"""Tells a weights file's format by its content, and says in words what other things people save as `.pth`."""

import struct
import zipfile
from pathlib import Path

TORCH_ZIP = "torch zip"
TORCH_LEGACY = "torch legacy"
TORCHSCRIPT = "torchscript"
TORCH = (TORCH_ZIP, TORCH_LEGACY, TORCHSCRIPT)  # what torch_file reads
SAFETENSORS = "safetensors"
SAFETENSORS_INDEX = "safetensors index"
NPZ = "npz"


def kind(path: str | Path) -> str:
    """Format of a weights file: one of the constants of this module; only the first bytes are read.

    Raises FileNotFoundError, IsADirectoryError, or ValueError that says what the file is instead.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".bin", ".safetensors"))
        inside += sorted(p.name for p in path.iterdir() if p.name.endswith(".safetensors.index.json"))
        found = f"; it holds {', '.join(inside[:6])}" if inside else ""
        raise IsADirectoryError(f"{path}: a folder, but a weights file is wanted{found}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes); download it again")
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()

    if head.startswith(b"PK"):
        return _zip_kind(path)
    # Eight bytes of header length, then JSON. Asked before PyTorch, because a length may begin with pickle's 0x80; no
    # pickle has the zeros of a length behind it.
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":
        return SAFETENSORS
    if head[:1] == b"\x80":
        return TORCH_LEGACY
    if text.startswith(b"{") and path.name.endswith(".json"):
        return SAFETENSORS_INDEX
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{path}: a web page (HTML) saved under a weights file's name; open the link in a browser, "
            "accept what it asks for and download the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` there")
    if head[257:262] == b"ustar":
        raise ValueError(
            f"{path}: a tar archive (a download, or PyTorch's format of before 2017); unpack it, or load it "
            "with torch and save it again with torch.save"
        )
    if head.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path}: gzip-compressed; unpack it first (gunzip)")
    raise ValueError(f"{path}: neither a PyTorch nor a safetensors file (it starts with {head[:12]!r}, {size} bytes)")


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error) as error:
        raise ValueError(
            f"{path}: truncated or damaged: it starts like a PyTorch zip file but its directory at the end "
            f"cannot be read ({error}); download it again"
        ) from error
    tails = {name.split("/", 1)[-1] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        return NPZ
    if "data.pkl" not in tails:
        raise ValueError(f"{path}: a zip archive, but not one that torch.save made (no data.pkl in it), nor NumPy's")
    script = "constants.pkl" in tails or any(tail.startswith("code/") for tail in tails)
    return TORCHSCRIPT if script else TORCH_ZIP
