"""What a video shows, in words: captions out of a CSV, as OpenVid-1M has them, beside a source's videos.

A CSV has a header and a row a video; two of its columns, by default `video` and `caption`, are read. A video is named
as in its folder (`sub/clip.mp4`) or, where no two share it, by its file name alone.
"""

import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from jaxalign.data.clips import Source

FILE = "captions.csv"  # found by itself in a source's folder
MISSING_SHARE = 0.10  # of a CSV's rows may name videos that are not there: a download is rarely whole
SHOWN = 3  # names of a kind in a message


def read_csv(path: str | Path, video_column: str = "video", caption_column: str = "caption") -> dict[str, str]:
    """{video: caption} of a CSV. Raises, each a line: FileNotFoundError; ValueError for a file that is no such CSV,
    columns that are not there, a video named twice, and captions that are empty."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.captions='{path}': no such file; write the CSV whose rows are videos' captions")
    limit = csv.field_size_limit(2**24)  # a caption may be longer than Python's 128 KB only where a quote is open
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            for asked, field in ((video_column, "video_column"), (caption_column, "caption_column")):
                if asked not in (rows.fieldnames or ()):
                    has = ", ".join((rows.fieldnames or ["nothing"])[:8])
                    raise ValueError(
                        f"data.captions='{path}': no column {asked!r} (it has {has}); write --config.data.{field}=NAME"
                    )
            pairs = [((row[video_column] or "").strip(), (row[caption_column] or "").strip()) for row in rows]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"data.captions='{path}': not a CSV in UTF-8 ({error})") from None
    finally:
        csv.field_size_limit(limit)
    if not pairs:
        raise ValueError(f"data.captions='{path}': a header and no rows")
    for what, found in (
        ("rows without a video", [f"row {k}" for k, (video, _) in enumerate(pairs, 2) if not video]),
        ("videos with an empty caption", [video for video, caption in pairs if video and not caption]),
        ("videos named twice", [video for video, times in Counter(video for video, _ in pairs).items() if times > 1]),
    ):
        if found:
            raise ValueError(f"data.captions='{path}': {len(found)} {what} ({_some(found)}); mend the file")
    return dict(pairs)


def attach(source: Source, path: str | Path, video_column: str = "video", caption_column: str = "caption") -> Source:
    """The source with the captions of a CSV. Videos without a row are not used; notes say how many of each kind.

    Raises as `read_csv`, and ValueError when more than a tenth of the rows name videos that are not there.
    """
    rows = read_csv(path, video_column, caption_column)
    tails = Counter(PurePosixPath(item.name).name for item in source.items)

    def caption_of(name: str) -> str:
        tail = PurePosixPath(name).name
        return rows.get(name) or (rows.get(tail, "") if tails[tail] == 1 else "")

    found = tuple(caption_of(item.name) for item in source.items)
    there = {key for item in source.items for key in (item.name, PurePosixPath(item.name).name)}
    there |= {key for name, _ in source.skipped for key in (name, PurePosixPath(name).name)}  # they are listed already
    missing = [video for video in rows if video not in there]
    if len(missing) > MISSING_SHARE * len(rows):
        raise ValueError(
            f"data.captions='{path}': {len(missing)} of its {len(rows)} rows name videos that are not in "
            f"{source.name!r} ({_some(missing)}); at most one in ten may be missing"
        )
    unused = [item.name for item, caption in zip(source.items, found, strict=True) if not caption]
    if len(unused) == len(source.items):
        raise ValueError(f"data.captions='{path}': no row names a video of {source.name!r} ({_some(unused)})")
    items = tuple(
        item if caption else dataclasses.replace(item, split="unused")
        for item, caption in zip(source.items, found, strict=True)
    )
    notes = []
    if missing:
        notes.append(f"captions {path}: {len(missing)} of {len(rows)} rows name videos not there ({_some(missing)})")
    if unused:
        notes.append(f"captions {path}: {len(unused)} videos have no row and are not used ({_some(unused)})")
    return dataclasses.replace(source, items=items, captions=found, notes=(*source.notes, *notes))


def beside_of(spec: str) -> Path:
    """Where the captions of a source's folder would lie."""
    return Path(re.sub("^(folder|frames|array_record):", "", spec)).expanduser() / FILE


def captioned(source: Source, spec: str, path: str, video_column: str = "video", caption_column: str = "caption"):
    """The source of config.data.source = `spec` with captions for all videos that it uses: of the CSV `path`, else of
    captions.csv in its folder, else its own.

    Raises ValueError, one line, when there are none; and as `attach`.
    """
    beside = beside_of(spec)
    path = path or (str(beside) if beside.is_file() else "")
    if path:
        return attach(source, path, video_column, caption_column)
    used = [k for k, item in enumerate(source.items) if item.split != "unused"]
    without = [source.items[k].name for k in used if not (source.captions and source.captions[k])]
    if without:
        raise ValueError(
            f"data.source={source.name!r}: {len(without)} of its {len(used)} videos have no caption, but the student "
            f"is told by text; put {FILE} (columns {video_column}, {caption_column}) there, or train with "
            "--config.data.captions=FILE.csv"
        )
    return source


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
