"""Whatever arrives, the readers give what they promise or a ValueError, and write only where they may.

A fixed number of examples, the same ones each time; HYPOTHESIS_EXAMPLES in the environment multiplies it.
"""

import functools
import io
import os
import tarfile
import tempfile
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lora.pictures import archive, buckets, limits, photos, views
from lora.pictures.views import View

MORE = int(os.environ.get("HYPOTHESIS_EXAMPLES", "1"))
MOST = 2**18


def budget(examples: int) -> Callable:
    return settings(
        max_examples=examples * MORE,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def a_zip(entries: list[tuple[str, bytes]]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name given twice
        for name, content in entries:
            info = zipfile.ZipInfo("x")
            info.filename = name  # as it is: the constructor would cut it at a NUL
            out.writestr(info, content)
    return data.getvalue()


def a_tar(entries: list[tuple[str, bytes]], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode, format=form) as out:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return data.getvalue()


MAKERS: dict[str, Callable[[list[tuple[str, bytes]]], bytes]] = {
    "zip": a_zip,
    "tar": a_tar,
    "gnu tar": functools.partial(a_tar, form=tarfile.GNU_FORMAT),
    "tar.gz": functools.partial(a_tar, mode="w:gz"),
}
SEEDS = {
    kind: make([("a.jpg", b"a" * 700), ("in/é.txt", b"b"), ("long" * 60 + ".png", os.urandom(0))])
    for kind, make in MAKERS.items()
}

Damage = tuple[float, int, bytes]
"""Where (a share of the length), how many bytes go, and what comes in their place."""
damages = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from([0, 0, 1, 1, 2, 4, 8, 100]),
        st.one_of(
            st.binary(max_size=4),
            st.sampled_from([b"\xff" * 4, bytes(9), b"\x7f\xff\xff\xff", b"7" * 11, b"PK\1\2", b"\x80" + b"\xff" * 9]),
        ),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


def damaged(data: bytes, damage: list[Damage]) -> bytes:
    for share, gone, put in damage:
        at = int(share * len(data))
        data = data[:at] + put + data[at + gone :]
    return data


def with_sums(tar: bytes) -> bytes:
    """A tar with every header's checksum made right again, so that what is wrong in a header is believed."""
    blocks = [tar[at : at + 512] for at in range(0, len(tar), 512)]
    for i, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block[:148]) + sum(block[156:]) + 8 * 32
            blocks[i] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


def unpacks_or_refuses(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as above:
        work = Path(above) / "run" / "work"
        (Path(above) / "upload").write_bytes(data)
        fault = "input_images: "
        try:
            files = archive.unpack(Path(above) / "upload", work)
            photos.pair(work, files)
        except ValueError as error:
            fault = str(error)
        assert fault.startswith("input_images: ")
        assert above not in fault
        found = [path for path in Path(above).rglob("*") if not path.is_dir() or path.is_symlink()]
        assert {path.relative_to(above).parts[:2] for path in found} <= {("upload",), ("run", "work")}
        assert not any(path.is_symlink() for path in found)
        written = [path for path in found if path.name != "upload"]
        assert len(written) <= limits.MAX_FILES
        assert sum(path.stat().st_size for path in written) <= MOST


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", MOST)
    monkeypatch.setattr(limits, "MAX_FILES", 10)
    monkeypatch.setattr(limits, "MAX_ENTRIES", 20)
    monkeypatch.setattr(limits, "RATIO_FROM", 2**14)


@pytest.mark.parametrize("kind", SEEDS)
@budget(60)
@given(damages, st.booleans())
def test_a_damaged_archive_unpacks_or_is_refused(kind, damage, mend):
    data = damaged(SEEDS[kind], damage)
    unpacks_or_refuses(with_sums(data) if mend else data)


parts = st.one_of(
    st.sampled_from(["..", ".", "", "a.jpg", "A.JPG", "a.txt", "a.jpg.txt", "__MACOSX", "C:", "~", "\0", "\\"]),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(["x" * 255, "é" * 200, "e\u0301.jpg", "é.jpg", "\u202egpj.exe", "-rf", "$(id).png", "a.png "]),
)  # fmt: skip
names = st.builds("".join, st.lists(st.one_of(parts, st.sampled_from(["/", "/", "\\", "//"])), min_size=1, max_size=8))


@pytest.mark.parametrize("kind", MAKERS)
@budget(60)
@given(st.lists(st.tuples(names, st.sampled_from([b"", b"caption", b"\xff", bytes(2**19)])), max_size=6))
def test_no_name_leads_out_of_the_folder(kind, entries):
    unpacks_or_refuses(MAKERS[kind](entries))


@pytest.mark.parametrize("flag", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@budget(20)
@given(names, names)
def test_no_link_is_ever_made_or_followed(flag, name, target):
    link = tarfile.TarInfo(name)
    link.type, link.linkname = flag, target
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as out:
        out.addfile(link)
        through = tarfile.TarInfo(f"{name}/a.jpg")
        through.size = 4
        out.addfile(through, io.BytesIO(b"evil"))
    unpacks_or_refuses(data.getvalue())


@budget(60)
@given(st.binary(max_size=2000), st.sampled_from([b"", b"PK\3\4", b"PK\5\6", b"\x1f\x8b\x08\0", SEEDS["tar"][:512]]))
def test_bytes_at_random_are_refused(data, start):
    unpacks_or_refuses(start + data)


@budget(60)
@given(st.one_of(st.binary(max_size=100), st.text().map(str.encode), st.text().map(lambda text: text.encode("utf-16"))))
def test_a_caption_of_any_bytes_is_text_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.jpg").touch()
        (Path(folder) / "a.txt").write_bytes(data)
        try:
            [photo], _ = photos.pair(Path(folder), [Path(folder) / "a.jpg", Path(folder) / "a.txt"])
        except ValueError as error:
            fault = str(error)
            assert "'a.txt'" in fault
        else:
            form = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            plain = "".join(c if unicodedata.category(c) != "Cc" else " " for c in data.decode(form))
            assert (photo.caption or "").split() == plain.split()


def pictures() -> dict[str, bytes]:
    buckets.know_heif()
    noise = Image.effect_noise((48, 40), 90)
    colour = Image.merge("RGB", [noise, ImageOps.mirror(noise), ImageOps.flip(noise)])
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = {}
    for form, mode in [
        ("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("WEBP", "RGBA"),
        ("AVIF", "RGB"), ("HEIF", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("GIF", "P"),
    ]:  # fmt: skip
        image = (
            noise.convert("I").convert(mode)
            if mode == "I;16"
            else colour.convert("L" if mode == "F" else mode).convert(mode)
        )
        data = io.BytesIO()
        options = {} if form in ("BMP", "GIF") else {"exif": exif.tobytes()}
        image.save(data, form, **options, **({"compression": "tiff_lzw"} if mode == "RGB" and form == "TIFF" else {}))
        seeds[f"{form} {mode}"] = data.getvalue()
    return seeds


PICTURES = pictures()


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is odd in a file
@pytest.mark.parametrize("kind", PICTURES)
@budget(50)
@given(damages)
def test_a_damaged_picture_is_read_or_refused(kind, damage):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.picture"
        path.write_bytes(damaged(PICTURES[kind], damage))
        try:
            [[fitted]] = views.prepared([View(path)], [32], threads=1)
        except ValueError as error:
            fault = str(error)
            assert "'a.picture'" in fault
            assert folder not in fault
        else:
            assert fitted.mode in ("RGB", "RGBA")
            assert fitted.width * fitted.height <= 32 * 32


@budget(100)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(16, 1024), st.sampled_from([8, 16, 32]))
def test_any_size_of_picture_has_a_bucket(width, height, resolution, step):
    resolution = max(resolution, step)
    wide, high = buckets.choose_bucket(width, height, resolution, step)
    assert wide % step == high % step == 0
    assert 0 < wide * high <= resolution**2
    assert max(wide, high) <= buckets.MAX_ASPECT * min(wide, high)
    several = buckets.buckets_for(width, height, [resolution, 2 * resolution], step)
    assert several[0] == (wide, high)
    assert all(buckets.cover(width, height, bucket) <= 1 for bucket in several[1:])
