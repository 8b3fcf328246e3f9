"""Archives under faults: what is lost is said, by its place; held against GNU tar where that is installed."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from vlmamba.train import sources, tar_index
from vlmamba.train.errors import BrokenDataError
from vlmamba.train.records import read_llava
from vlmamba.train.sources import TarImages, ZipImages, open_source, read_image

GNU_TAR = shutil.which("tar")
needs_gnu_tar = pytest.mark.skipif(
    GNU_TAR is None or "GNU tar" not in subprocess.run([GNU_TAR, "--version"], capture_output=True, text=True).stdout,
    reason="GNU tar is not installed",
)


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def record(text: str = "<image>\na", **extra) -> bytes:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "b"}]
    return json.dumps({**extra, "conversations": turns}).encode()


def write_tar(path, entries, **options):
    """Entries are names with bytes, or with (type, target)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


HARD, SYMBOLIC = (lambda target: (tarfile.LNKTYPE, target)), (lambda target: (tarfile.SYMTYPE, target))


def contents(path) -> dict[str, bytes]:
    source = TarImages(path)
    return {name: source.read(number) for name, number in source.names.items()}


SMALL = [(f"{i}.{kind}", record() if kind == "json" else png()) for i in range(3) for kind in ("json", "png")]
LONG = "folder/" * 40 + "é" * 90 + ".png"


@pytest.mark.parametrize("writer", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_that_python_writes_are_read(tmp_path, writer):
    entries = [*SMALL, ("./a//b/../c.png", b"c"), ("f" * 120 + "/" + "n" * 99, b"x"), ("empty.png", b"")]
    if writer != tarfile.USTAR_FORMAT:
        entries.append((LONG, b"long"))
    write_tar(tmp_path / "a.tar", [*entries, ("0.png", b"again"), ("h.png", HARD(entries[-1][0]))], format=writer)
    want = {**{os.path.normpath(n): c for n, c in entries}, "0.png": b"again", "h.png": entries[-1][1]}
    assert contents(tmp_path / "a.tar") == want
    source = open_source(tmp_path / "a.tar")
    assert "./a/./c.png" in source and source["a//c.png"].read() == b"c"


@needs_gnu_tar
@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar", "v7", "oldgnu"])
def test_archives_that_gnu_tar_writes_are_read(tmp_path, kind):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, content in SMALL:
        (folder / name).write_bytes(content)
    os.link(folder / "0.png", folder / "7.png")
    (folder / "8.png").symlink_to("1.png")
    (folder / "sub" / "9.png").symlink_to("../0.png")
    wanted = {f"{i}.png" for i in (0, 1, 2, 7, 8)} | {"0.json", "1.json", "2.json", "sub/9.png"}
    if kind in ("gnu", "pax", "oldgnu"):
        name = "n" * 120 + "é.png"
        (folder / name).write_bytes(png("blue"))
        wanted |= {name}
    subprocess.run([GNU_TAR, "-cf", tmp_path / "a.tar", f"--format={kind}", "-C", folder, "."], check=True)
    found = contents(tmp_path / "a.tar")
    assert found == {name: (folder / name).read_bytes() for name in wanted}


def test_a_size_beyond_octal_digits_is_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"xyz")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")  # base 256, as GNU tar writes from 8 GiB on
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    assert contents(path) == {"a.png": b"xyz"}


def gnu_tar_lists(path) -> list[str] | None:
    """Names by GNU tar; None where it reports a fault."""
    run = subprocess.run([GNU_TAR, "-tf", path], capture_output=True, text=True)
    return run.stdout.split() if run.returncode == 0 else None


def names_or_none(path) -> list[str] | None:
    try:
        return [e.name for e in tar_index.tar_entries(io.FileIO(path))]
    except tar_index.TarError:
        return None


def test_any_flipped_bit_of_a_header_or_of_the_end_is_an_error(tmp_path):
    """Python's tarfile takes most of them for the end of the archive, and says nothing."""
    whole = write_tar(tmp_path / "a.tar", SMALL).read_bytes()
    starts = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]
    assert len(starts) == 6
    names, silent = [name for name, _ in SMALL], 0
    for bit in range(512 * 8):
        data = bytearray(whole)
        data[starts[3] + bit // 8] ^= 1 << bit % 8
        (tmp_path / "b.tar").write_bytes(data)
        found = names_or_none(tmp_path / "b.tar")
        # In the checksum itself, a leading zero may become a space.
        assert found is None or (148 <= bit // 8 < 156 and found == names), bit
        if bit % 100 == 0:
            silent += len(tarfile.open(tmp_path / "b.tar").getnames()) < 6
    assert silent > 30
    end = starts[-1] + 1024
    for bit in range(0, (len(whole) - end) * 8, 61):
        data = bytearray(whole)
        data[end + bit // 8] ^= 1 << bit % 8
        (tmp_path / "b.tar").write_bytes(data)
        assert names_or_none(tmp_path / "b.tar") is None, bit


@needs_gnu_tar
def test_whatever_gnu_tar_reports_is_reported(tmp_path):
    whole = write_tar(tmp_path / "a.tar", SMALL).read_bytes()
    names = [name for name, _ in SMALL]
    assert gnu_tar_lists(tmp_path / "a.tar") == names_or_none(tmp_path / "a.tar") == names
    rng, reported = random.Random(1), 0
    for trial in range(120):
        data = bytearray(whole)
        if trial % 3 == 0:
            data[rng.randrange(7000)] ^= 1 << rng.randrange(8)
        elif trial % 3 == 1:
            data = data[: rng.randrange(0, 8000)]
        else:
            start = rng.randrange(5000)  # zeros up to the end would be an end, to anybody
            stop = min(start + rng.randrange(4000), 5700)
            data[start:stop] = bytes(stop - start)
        (tmp_path / "b.tar").write_bytes(data)
        theirs, ours = gnu_tar_lists(tmp_path / "b.tar"), names_or_none(tmp_path / "b.tar")
        assert ours in (None, names), "something was lost without a word"
        if theirs is None:
            reported += 1
            assert ours is None
    assert reported > 40


def test_a_truncated_tar_is_an_error(tmp_path):
    whole = write_tar(tmp_path / "a.tar", SMALL).read_bytes()
    end = len(whole) - 10_240 + (whole[-10_240:].rstrip(b"\0").__len__() + 511) // 512 * 512 + 1024
    for size in [*range(0, len(whole), 512), *range(1, 3000, 97)]:
        (tmp_path / "b.tar").write_bytes(whole[:size])
        if size < end:
            with pytest.raises(
                ValueError, match=r"b.tar is damaged or truncated, or not an uncompressed tar: .* at byte"
            ):
                read_llava(tmp_path / "b.tar", max_broken=0.9)
        else:
            assert len(read_llava(tmp_path / "b.tar")) == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: bytes(len(d)), "it is a tar without any file"),
        (
            lambda d: d[:3072] + bytes(1024) + d[4096:],
            "zeros where a header must be, and data after them, at byte 3,072",
        ),
        (lambda d: d[:3072] + bytes(len(d) - 3072) + b"\1", "data after them, at byte 3,072"),
        (lambda d: d + bytes(2 << 20), "bytes of zeros, more than the end of a tar has"),
        (lambda d: d[:7000] + b"\0" * 0, "the file ends|at byte"),
        (lambda d: b"no tar at all" * 100, "at byte 0"),
    ],
)
def test_zeros_and_other_bytes_in_a_tar_are_named_with_their_offset(tmp_path, spoil, message):
    whole = write_tar(tmp_path / "a.tar", SMALL).read_bytes()
    (tmp_path / "a.tar").write_bytes(spoil(whole))
    with pytest.raises(ValueError, match=rf"a.tar is damaged or truncated.*({message})"):
        read_llava(tmp_path / "a.tar", max_broken=0.9)


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (b"x", b"9 path=ab\n", "a pax header that is malformed"),
        (b"x", b"no number\n", "a pax header that is malformed"),
        (b"x", b"99 path=ab\n", "a pax header that is malformed"),
        (b"x", b"11 size=-5\n", "a pax header with '-5' for a size"),
        (b"x", b"22 GNU.sparse.major=1\n", "a sparse file"),
        (b"S", b"", "a sparse file"),
        (b"M", b"", "an entry of unknown type b'M'"),
        (b"L", b"name\0", "a header that extends the next one, which is missing"),
    ],
)
def test_entries_that_are_not_read_are_named(tmp_path, kind, body, message):
    info = tarfile.TarInfo("a.png")
    info.type, info.size = kind, len(body)
    header = info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(-(-len(body) // 512) * 512, b"\0")
    rest = b"" if kind == b"L" else write_tar(tmp_path / "r.tar", [("b.png", b"x")]).read_bytes()
    (tmp_path / "a.tar").write_bytes(header + (rest or bytes(1024)))
    with pytest.raises(ValueError, match=rf"a.tar is damaged .*{message}.* at byte"):
        open_source(tmp_path / "a.tar")


def test_random_damage_is_an_error_or_harms_no_name(tmp_path):
    """No exception of another kind, no endless loop."""
    path = tmp_path / "a.tar"
    whole = write_tar(
        path, [*SMALL, (LONG, b"x"), ("l.png", SYMBOLIC("0.png"))], format=tarfile.PAX_FORMAT
    ).read_bytes()
    names = names_or_none(path)
    rng = random.Random(2)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(data))
            data[start : start + rng.choice([1, 8, 600])] = rng.randbytes(rng.choice([1, 8, 600]))
        path.write_bytes(data)
        assert names_or_none(path) in (None, names)


def test_links_are_followed_within_the_archive(tmp_path):
    red, blue = png("red"), png("blue")
    entries = [
        ("a/0.png", red), ("a/0.json", record()),
        ("a/1.json", record()), ("a/1.png", HARD("a/0.png")),
        ("a/2.json", record()), ("a/2.png", SYMBOLIC("0.png")),
        ("b/3.json", record()), ("b/3.png", SYMBOLIC("../a/2.png")),
        ("b/4.json", HARD("a/0.json")), ("b/4.png", SYMBOLIC("later.png")),
        ("b/later.png", blue), ("b/later.json", record()),
        ("b/5.json", record()), ("b/5.png", HARD("b/3.png")),
    ]  # fmt: skip
    found = read_llava(write_tar(tmp_path / "s.tar", entries))
    colors = [read_image(r.images[0]).getpixel((0, 0)) for r in found]
    assert len(found) == found.n_with_image == 7
    assert sorted(colors) == [(0, 0, 255)] * 2 + [(255, 0, 0)] * 5
    assert found.location(0).endswith("s.tar, a/0.json")


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (HARD("gone.png"), "1.png is a link to gone.png, which does not come before it in the archive"),
        (HARD("2.png"), "1.png is a link to 2.png, which does not come before it"),
        (SYMBOLIC("gone.png"), "1.png is a link to gone.png, which is not in the archive"),
        (SYMBOLIC("/etc/passwd"), "1.png is a link to /etc/passwd, which is not in"),
        (SYMBOLIC("../../0.png"), r"1.png is a link to \.\./\.\./0.png, which is not in"),
        (SYMBOLIC("1.png"), "1.png is a link to 1.png, which is not in"),
        (SYMBOLIC("c.png"), "1.png is a link to c.png, which is not in"),
    ],
)
@pytest.mark.parametrize("text", ["<image>\na", "a"])
def test_a_link_to_nothing_is_the_fault_of_its_record(tmp_path, link, message, text):
    entries = [("0.json", record()), ("0.png", png()), ("1.json", record(text)), ("1.png", link), ("2.png", png()),
               ("2.json", record()), ("c.png", SYMBOLIC("d.png")), ("d.png", SYMBOLIC("c.png")),
               ("c.json", record("a")), ("d.json", record("a"))]  # fmt: skip
    path = write_tar(tmp_path / "s.tar", entries)
    found = read_llava(path, max_broken=0.9)
    assert [found.location(i)[-6:] for i in range(len(found))] == ["0.json", "2.json"]
    assert any(f"s.tar, 1.json: {message}".replace("\\", "") in reason for reason in found.broken)
    with pytest.raises(
        FileNotFoundError, match=f"no image 1.png in .*s.tar: it is {message.removeprefix('1.png is ')}"
    ):
        open_source(path)["1.png"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("1.json", record())], r".*got 1 marks \(1 in turn 0\) for 0 images"),
        ([("1.json", record("a", image="1.png"))], "it names '1.png', but the shard has no images for it"),
        ([("1.json", record("a")), ("1.heic", b"x")], "its image has an unsupported format: 1.heic"),
        ([("1.json", record("a")), ("1.eps", b"x")], "its image has an unsupported format: 1.eps"),
        ([("1.heic", b"x")], "an image without a .json beside it: 1.heic"),
        ([("1.json", record()), ("1.png", png()), ("1.jpg", png())], "it has several images, .*: 1.png, 1.jpg"),
        ([("1.json", b"[" * 100_000), ("1.png", png())], "not valid JSON: it is nested too deeply"),
        ([("1.json", record().replace(b"b", b"\xff")), ("1.png", png())], "not valid JSON: not UTF-8: byte 0xff"),
        ([("1.json", b" " * (17 << 20) + record()), ("1.png", png())], "it is larger than 16,777,216 bytes"),
    ],
)
def test_a_record_of_a_shard_without_its_image_is_broken(tmp_path, parts, message):
    good = [("0.json", record("a")), ("2.json", record()), ("2.png", png()), ("2.txt", b"notes")]
    path = write_tar(tmp_path / "s.tar", [*good[:1], *parts, *good[1:]])
    with pytest.raises(BrokenDataError, match=rf"1 of 3 records are broken.*s.tar, {parts[0][0]}: {message}"):
        read_llava(path)
    assert str(read_llava(path, max_broken=0.5)).startswith("2 records, 1 of them with an image; 1 more are broken")


def test_files_that_macos_and_old_tars_add_are_no_records(tmp_path):
    litter = [("._0.json", b"\0\5"), ("._0.png", b"\0\5"), ("._1.png", b"x"), ("PaxHeaders.7/0.json", b"x"),
              ("__MACOSX/0.png", b"x")]  # fmt: skip
    folder = tmp_path / "shards"
    folder.mkdir()
    path = write_tar(folder / "s.tar", [*litter, ("0.json", record()), ("0.png", png())])
    (folder / "._s.tar").write_bytes(b"\0\5")
    assert len(read_llava(path)) == len(read_llava(folder)) == 1
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, content in [*litter, ("0.png", png())]:
            file.writestr(name, content)
    assert list(ZipImages(tmp_path / "a.zip").names) == ["0.png"]


def write_zip(path, entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("folder/", b"")
        for name, content in entries:
            file.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_is_read_by_its_directory(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("a.png", b"first"), ("./sub/é.png", b"x" * 1000), ("a.png", b"second")])
    source = ZipImages(path)
    assert {name: source[name].read() for name in source.names} == {"a.png": b"second", "sub/é.png": b"x" * 1000}
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file, file.open("a.png", "w", force_zip64=True) as entry:
        entry.write(b"in zip64")
    assert ZipImages(tmp_path / "b.zip")["a.png"].read() == b"in zip64"


def test_a_zip_of_more_files_than_the_old_directory_counts_is_read(tmp_path):
    path = write_zip(tmp_path / "a.zip", [(f"{i}.png", b"") for i in range(65_540)], zipfile.ZIP_STORED)
    assert len(ZipImages(path).names) == 65_540
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\6\6") + 32
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"its directory has 65,541 of 65,540 files"):
        ZipImages(path)


def test_any_flipped_bit_of_a_zip_is_an_error_or_harmless(tmp_path):
    entries = [(f"{i}.png", os.urandom(0) + bytes([i]) * 40) for i in range(4)]
    whole = write_zip(tmp_path / "a.zip", entries).read_bytes()
    said = 0
    for bit in range(len(whole) * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.zip").write_bytes(data)
        try:
            source = ZipImages(tmp_path / "a.zip")
            for name, content in entries:
                if name in source:
                    assert source[name].read() == content
                else:  # its name in the directory is another now: said where it is asked for
                    with pytest.raises(FileNotFoundError, match="no image"):
                        source[name]
                    said += 1
        except ValueError as e:
            assert "a.zip" in str(e)
            said += 1
    assert said > 1000


def test_a_truncated_zip_is_an_error(tmp_path):
    whole = write_zip(tmp_path / "a.zip", [(f"{i}.png", b"x" * 40) for i in range(4)]).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "a.zip").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a.zip is damaged or truncated, or not a zip"):
            ZipImages(tmp_path / "a.zip")


def test_a_file_that_inflates_too_much_is_refused_by_the_directory_and_by_the_stream(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", [("bomb.png", bytes(5000)), ("a.png", png())])
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 4000)
    source = ZipImages(path)
    with pytest.raises(FileNotFoundError, match="bomb.png in .*: it is too large: 5,000 bytes, and at most 4,000 are"):
        source["bomb.png"]
    assert source["a.png"].read() == png()
    (tmp_path / "d.jsonl").write_bytes(record(image="bomb.png"))
    with pytest.raises(BrokenDataError, match="d.jsonl, line 1: no image bomb.png .*too large"):
        read_llava(tmp_path / "d.jsonl", path)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4) + 24  # of the second file's entry: its size
    assert struct.unpack_from("<I", data, at) == (5000,)
    struct.pack_into("<I", data, at, 100)  # a lie
    path.write_bytes(data)
    with pytest.raises(ValueError, match="bomb.png in .* is damaged: it does not have the 100 bytes"):
        ZipImages(path)["bomb.png"].read()
    tar = write_tar(tmp_path / "a.tar", [("bomb.png", bytes(5000)), ("a.png", png())])
    assert "bomb.png" not in open_source(tar) and "a.png" in open_source(tar)


def test_an_encrypted_file_of_a_zip_is_its_own_fault(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("a.png", png()), ("b.png", png())])
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    data[at + 8] |= 1
    path.write_bytes(data)
    source = ZipImages(path)
    assert source["b.png"].read() == png()
    with pytest.raises(FileNotFoundError, match="no image a.png .*: it is encrypted, or neither stored nor deflated"):
        source["a.png"]
    assert zlib.crc32(png()) in np.asarray(source.entries)
