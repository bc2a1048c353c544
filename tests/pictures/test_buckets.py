import io
import itertools
import random
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageOps, ImageStat

from lora.pictures import archive, buckets, photos, views
from lora.pictures.views import View

ROOT = Path(__file__).parents[2]
CORNERS = {"top left": "red", "top right": "lime", "bottom left": "blue", "bottom right": "white"}
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "HEIF"]


@pytest.fixture(autouse=True, scope="module")
def _heif() -> None:
    buckets.know_heif()  # to write such files here; the project opens them by itself


def corners(size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture whose four quarters differ, so that every turn and mirroring shows."""
    image = Image.new("RGB", size)
    draw, (w, h) = ImageDraw.Draw(image), (size[0] // 2, size[1] // 2)
    for colour, (x, y) in zip(CORNERS.values(), [(0, 0), (w, 0), (0, h), (w, h)], strict=True):
        draw.rectangle((x, y, x + w, y + h), colour)
    return image


def photograph(size: tuple[int, int]) -> Image.Image:
    """Something with soft and hard parts, the same every time."""
    clouds = Image.effect_noise((size[0] // 16, size[1] // 16), 200).resize(size, Image.Resampling.BICUBIC)
    image = Image.merge("RGB", [clouds, ImageOps.invert(clouds), ImageOps.mirror(clouds)])
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), "orange", "black", 3)
    return image


def difference(a: Image.Image, b: Image.Image) -> float:
    """Root mean square over all pixels and channels, of 255 levels."""
    assert (a.size, a.mode) == (b.size, b.mode)
    rms = ImageStat.Stat(ImageChops.difference(a, b)).rms
    return sum(rms) / len(rms)


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_comes_out_upright_turned_once(form, orientation, tmp_path):
    upright = corners()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> Pillow's transposition that makes it so
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(stored, tmp_path / "a.picture", format=form, exif=exif.tobytes())
    read = buckets.read_picture(path)
    with buckets.opened(path) as picture:
        assert picture.size == upright.size
    assert difference(read, upright) < 12
    [[fitted]] = views.prepared([View(path)], [32])
    assert difference(fitted, ImageOps.fit(upright, fitted.size)) < 16


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"])
def test_every_mode_becomes_rgb_of_the_same_look(mode, tmp_path):
    grey = mode in ("1", "L", "LA", "I;16", "I", "F")
    image = corners().convert("L").convert("RGB") if grey else corners()
    if mode == "1":
        image = image.convert("1").convert("RGB")
    if mode in ("I;16", "I", "F"):
        stored = image.convert("L").convert("I").point(lambda value: value * 257)
        stored = stored.convert("F").point(lambda value: value / 65535 + 0) if mode == "F" else stored.convert(mode)
    elif mode == "LAB":
        stored = ImageCms.profileToProfile(image, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB")
    else:
        stored = image.convert(mode)
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF" if mode in ("LAB", "I", "F") else "PNG"
    read = buckets.read_picture(saved(stored, tmp_path / "a", format=form))
    assert read.mode == "RGB"
    assert difference(read, image) < 12


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, more: bytes = b"") -> bytes:
    """A PNG by hand, of kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more
    return start + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


LONG = {
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_100_000))),
    "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"x" * 2_100_000)),
    "tEXt": chunk(b"tEXt", b"workflow\0" + b"x" * 2_100_000),
    "a bomb": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(90_000_000))),
    "longer packed than is looked at": chunk(b"iTXt", b"workflow\0\0\0\0\0" + b"x" * 2**23),
    "thirty texts": 30 * chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(10**6))),
    "a profile": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2_100_000))),
    "a profile that is a bomb": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(90_000_000))),
    "broken": chunk(b"iTXt", b"workflow\0\1\0\0\0no zlib"),
}


@pytest.mark.parametrize("what", LONG)
@pytest.mark.parametrize("after", [False, True])
def test_a_png_is_read_whatever_texts_and_profiles_it_carries(what, after, tmp_path):
    levels = [0, 80, 160, 255]
    data = png(4, 1, 8, 0, b"\0" + bytes(levels), b"" if after else LONG[what])
    if after:
        data = data[:-12] + LONG[what] + data[-12:]
    (tmp_path / "a.png").write_bytes(data)
    assert [buckets.read_picture(tmp_path / "a.png").getpixel((at, 0)) for at in range(4)] == [(v,) * 3 for v in levels]
    (tmp_path / "cut.png").write_bytes(data[: data.index(b"IDAT") + 6])
    with pytest.raises(ValueError, match=r"'cut\.png'"):
        buckets.read_picture(tmp_path / "cut.png")


def test_a_long_profile_is_used_all_the_same(tmp_path):
    profile = linear_profile() + bytes(1_500_000)
    path = saved(Image.new("RGB", (8, 8), (64, 64, 64)), tmp_path / "a.png", icc_profile=profile)
    assert buckets.read_picture(path).getpixel((4, 4)) == pytest.approx((137,) * 3, abs=2)


@pytest.mark.parametrize(
    ("depth", "colour", "levels", "transparent"),
    [
        (16, 0, [0, 0x2000, 0x8000, 0xFFFF], 0x8000),
        (16, 0, [0, 0x2000, 0x8000, 0xFFFF], 0),
        (16, 2, [0, 0x2000, 0x8000, 0xFFFF], 0x8000),
        (8, 0, [0, 32, 128, 255], 128),
        (2, 0, [0, 1, 2, 3], 2),
        (4, 0, [0, 3, 9, 15], 3),
    ],
)
def test_one_colour_of_a_png_may_be_transparent_at_any_depth(depth, colour, levels, transparent, tmp_path):
    channels = 3 if colour == 2 else 1
    values = [level for level in levels for _ in range(channels)]
    if depth == 16:
        row = struct.pack(f">{len(values)}H", *values)
    else:
        row = int("".join(f"{value:0{depth}b}" for value in values).ljust(32, "0"), 2).to_bytes(4, "big")
    tRNS = chunk(b"tRNS", struct.pack(f">{channels}H", *[transparent] * channels))
    (tmp_path / "a.png").write_bytes(png(4, 1, depth, colour, b"\0" + row[: 4 * channels * depth // 8], tRNS))
    read = buckets.read_picture(tmp_path / "a.png")
    top = 2**depth - 1
    expected = [255 if level == transparent else round(255 * level / top) for level in levels]
    assert [read.getpixel((at, 0))[0] for at in range(4)] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_sixteen_bits_a_channel_keep_their_brightness(colour, channels, tmp_path):
    """Not clipped to white at 255, as a plain conversion of 16-bit greys does."""
    levels = [0, 0x2000, 0x8000, 0xFFFF]
    rows = b"\0" + b"".join(struct.pack(">H", 0xFFFF if i == 3 else level) for level in levels for i in range(channels))
    (tmp_path / "a.png").write_bytes(png(4, 1, 16, colour, rows))
    read = buckets.read_picture(tmp_path / "a.png")
    for at, level in enumerate(levels):
        assert all(abs(value - level / 257) <= 1 for value in read.getpixel((at, 0)))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF"])
def test_what_is_transparent_becomes_white_whatever_colour_lies_beneath(form, tmp_path):
    image = corners().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 48, 32))
    options = {"lossless": True} if form == "WEBP" else {}
    read = buckets.read_picture(saved(image, tmp_path / "a", format=form, **options))
    assert read.getpixel((10, 10)) == (255, 255, 255)
    assert read.getpixel((80, 10)) == (0, 255, 0)


def test_half_transparent_is_half_white_and_edges_get_no_dark_rim_when_made_smaller(tmp_path):
    image = Image.new("RGBA", (2048, 2048), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 1001, 2048))
    image.paste((255, 0, 0, 128), (0, 0, 2048, 512))
    path = saved(image, tmp_path / "a.png")
    assert buckets.read_picture(path).getpixel((2000, 100)) == pytest.approx((255, 127, 127), abs=1)
    [[fitted]] = views.prepared([View(path)], [64])
    assert min(fitted.getchannel("R").tobytes()) >= 250


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("empty", ["black", "transparent"])
def test_of_an_animated_picture_the_first_frame_that_is_not_blank_is_read(form, empty, tmp_path):
    blank = Image.new("RGBA", (96, 64), (0, 0, 0, 255 if empty == "black" else 0))
    frames = [blank, Image.new("RGBA", (96, 64), (0, 0, 0, 255)), corners().convert("RGBA")]
    options = {"lossless": True} if form == "WEBP" else {"disposal": 2} if form == "GIF" else {}
    path = saved(
        frames[0], tmp_path / "a", format=form, save_all=True, append_images=frames[1:], duration=99, **options
    )
    with buckets.opened(path) as picture:
        assert picture.frame == picture.frames >= 2  # writers join frames that are the same
        assert difference(picture.decode((96, 64)), corners()) < 12
    assert difference(buckets.read_picture(path), corners()) < 12


def test_only_the_first_frame_of_a_film_is_read(tmp_path):
    first, second = corners(), Image.new("RGB", (96, 64), "black")
    for form in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):  # MPO: a JPEG of several frames, as many phones make
        path = saved(first, tmp_path / form, format=form, save_all=True, append_images=[second])
        assert difference(buckets.read_picture(path), first) < 12


def swapped_profile() -> bytes:
    """sRGB's own profile with red and blue changed places, and another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ").replace(
        "sRGB".encode("utf-16-be"), "BGRs".encode("utf-16-be")
    )  # fmt: skip


def curved(profile: bytes, *tags: bytes) -> bytes:
    """A profile whose tone curves are replaced by gamma 1 (ICC.1:2022, 10.6: a curve without entries)."""
    data = bytearray(profile)
    for at in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12):
        if data[at : at + 4] in tags:
            start = int.from_bytes(data[at + 4 : at + 8], "big")
            data[start : start + 12] = b"curv" + bytes(8)
    return bytes(data)


def linear_profile() -> bytes:
    """Linear light, under sRGB's own name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert "sRGB".encode("utf-16-be") in profile
    return curved(profile, b"rTRC", b"gTRC", b"bTRC")


def grey_profile() -> bytes:
    """Linear greys, by hand: a white point and a curve are all that one needs (ICC.1:2022, 8.4.4)."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + bytes(78)
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": white, b"kTRC": b"curv" + bytes(8)}
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s12s4s", at + len(body), b"\0\0\0\0", 0x02400000, b"mntr", b"GRAY", b"XYZ ", bytes(12), b"acsp"
    )
    return (head + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48))[:128] + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_profile_is_known_by_its_curves_and_not_by_its_name(mode, tmp_path):
    """A grey of 64 in linear light is one of 137 in sRGB."""
    stored = Image.new("RGB", (8, 8), (64, 64, 64))
    stored = stored.quantize(2) if mode == "P" else stored.convert(mode)
    path = saved(stored, tmp_path / "a.png", icc_profile=linear_profile())
    assert buckets.read_picture(path).getpixel((4, 4)) == pytest.approx((137,) * 3, abs=2)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB"])
def test_a_grey_profile_counts_with_and_without_alpha(mode, tmp_path):
    stored = Image.new("L", (8, 8), 64).convert(mode)
    if mode == "LA":
        stored.putalpha(Image.linear_gradient("L").resize((8, 8)).point(lambda level: 255 * (level > 128)))
    read = buckets.read_picture(saved(stored, tmp_path / "a.png", icc_profile=grey_profile()))
    assert read.getpixel((4, 7)) == pytest.approx((137,) * 3, abs=2)
    assert read.getpixel((4, 0)) == ((255,) * 3 if mode == "LA" else read.getpixel((4, 7)))


def test_an_rgb_profile_counts_for_greys(tmp_path):
    path = saved(Image.new("L", (8, 8), 64), tmp_path / "a.jpg", icc_profile=linear_profile(), quality=100)
    assert buckets.read_picture(path).getpixel((4, 4)) == pytest.approx((137,) * 3, abs=2)


@pytest.mark.parametrize("form", FORMATS)
def test_an_embedded_profile_is_converted_to_srgb(form, tmp_path):
    path = saved(corners(), tmp_path / "a", format=form, icc_profile=swapped_profile())
    red, green, blue = corners().split()
    assert difference(buckets.read_picture(path), Image.merge("RGB", (blue, green, red))) < 12


def test_a_profile_is_converted_under_transparency_and_in_palettes_too(tmp_path):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    for name, stored in (("rgba", image), ("palette", image.quantize())):
        read = buckets.read_picture(saved(stored, tmp_path / name, format="PNG", icc_profile=swapped_profile()))
        assert read.getpixel((10, 10)) == (255, 255, 255)
        assert read.getpixel((50, 10)) == pytest.approx((0, 0, 255), abs=2)


@pytest.mark.parametrize("profile", [b"no profile", swapped_profile()[:200], swapped_profile()])
def test_a_profile_that_is_broken_or_of_another_kind_is_ignored(profile, tmp_path):
    grey = Image.new("L", (8, 8), 128)
    read = buckets.read_picture(saved(grey, tmp_path / "a.png", icc_profile=profile))
    assert read.getpixel((4, 4)) == (128, 128, 128)


@pytest.mark.parametrize(("value", "level"), [(1, 255), (128, 128), (65535, 255)])
def test_the_white_of_a_tiff_of_32_bits_is_the_first_that_nothing_exceeds(value, level, tmp_path):
    Image.new("I", (8, 8), value).save(tmp_path / "a.tif")
    assert buckets.read_picture(tmp_path / "a.tif").getpixel((0, 0)) == (level,) * 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_does_not_cost_the_picture(tmp_path):
    path = saved(corners(), tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert difference(buckets.read_picture(path), corners()) < 12


@pytest.mark.parametrize("form", [*FORMATS, "GIF", "BMP"])
def test_a_cut_picture_is_refused_by_name(form, tmp_path):
    data = io.BytesIO()
    photograph((200, 160)).save(data, form)
    for share in (0.02, 0.5, 0.9):
        (tmp_path / "cut.jpg").write_bytes(data.getvalue()[: int(len(data.getvalue()) * share)])
        with pytest.raises(ValueError, match=r"'cut\.jpg'"):
            buckets.read_picture(tmp_path / "cut.jpg")


@pytest.mark.parametrize("data", [b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"])
def test_what_is_no_picture_or_of_a_kind_not_offered_is_refused(data, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"'a\.jpg' is damaged, or no JPEG, PNG") as error:
        buckets.read_picture(tmp_path / "a.jpg")
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty, a file of 0 bytes"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "is a film whatever its name says"),
        (b"PK\3\4 more", "is a zip archive whatever its name says"),
    ],
    ids=["empty", "film", "zip"],
)
def test_what_is_called_a_picture_is_told_for_what_it_is(data, what, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=rf"'a\.jpg' {what}"):
        buckets.read_picture(tmp_path / "a.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (60_000, 60_000)])
def test_a_hundred_megapixels_are_the_most_and_nothing_is_decoded_beyond(width, height, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(width, height, 8, 0, b""))
    with pytest.raises(ValueError, match=r"'bomb\.png'.* 100 megapixels"):
        buckets.read_picture(tmp_path / "bomb.png")


def with_header(path: Path, width: int, height: int) -> Path:
    """The JPEG with another size in its header (ITU T.81, B.2.2)."""
    data = path.read_bytes()
    at = data.index(b"\xff\xc0") + 5
    path.write_bytes(data[:at] + struct.pack(">HH", height, width) + data[at + 4 :])
    return path


@pytest.mark.filterwarnings("error")
def test_a_jpeg_of_a_phone_with_108_or_200_megapixels_is_read_at_a_fraction(tmp_path):
    path = saved(Image.linear_gradient("L").resize((12_000, 9_000)), tmp_path / "phone.jpg", quality=30)
    with buckets.opened(path) as picture:
        assert picture.size == (12_000, 9_000)
        assert picture.decode((512, 512)).size == (1_500, 1_125)
    with buckets.opened(with_header(path, 16_320, 12_240)) as picture:
        assert picture.size == (16_320, 12_240)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_megapixels_than_that_say_so_in_plain_words(tmp_path):
    with_header(saved(corners(), tmp_path / "a.jpg"), 20_000, 20_000)
    with pytest.raises(ValueError, match=r"'a\.jpg'.*20000 x 20000 is over 256 megapixels: make it smaller"):
        buckets.read_picture(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(png(12_000, 9_000, 8, 0, b""))
    with pytest.raises(ValueError, match=r"'b\.png'.*is over 100 megapixels: save it as JPEG or make it smaller"):
        buckets.read_picture(tmp_path / "b.png")


ODD = """
import io, sys
from pathlib import Path
from PIL import Image
from lora.pictures import survey
folder = Path(sys.argv[1])
noise = Image.merge("RGB", [Image.effect_noise((300, 200), 90)] * 3)
noise.save(folder / "exif.jpg", exif=b"Exif\\0\\0MM\\0*\\xff\\xff\\xff\\xff garbage")
noise.save(folder / "tags.tif", tiffinfo={65000: b"x" * 99, 270: "a"})
data = (folder / "tags.tif").read_bytes()
(folder / "tags.tif").write_bytes(data.replace(b"\\xe8\\xfd\\x07\\x00\\x63", b"\\xe8\\xfd\\x07\\x00\\xff", 1))
palette = noise.quantize(8)
palette.save(folder / "palette.png", transparency=bytes([0, 128] + [255] * 6))
data = io.BytesIO()
noise.save(data, "JPEG")
(folder / "ends.jpg").write_bytes(data.getvalue()[:-2] + b"\\xff\\x00garbage")
Image.new("RGB", (300, 200)).save(data, "PNG")
looks = survey.look_at({path.name: path for path in folder.iterdir()})
print(len(looks), file=sys.stdout)
"""


def test_odd_metadata_put_nothing_on_the_terminal(tmp_path):
    ran = subprocess.run([sys.executable, "-c", ODD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("4", "")


@pytest.mark.filterwarnings("error")
def test_what_is_allowed_is_opened_without_a_warning(tmp_path):
    Image.new("1", (10_000, 9_900)).save(tmp_path / "large.png")
    with buckets.opened(tmp_path / "large.png") as picture:
        assert picture.size == (10_000, 9_900)


SIZES = [
    (1, 1),
    (64, 64),
    (1000, 1000),
    (4032, 3024),
    (3000, 2000),
    (1920, 1080),
    (2560, 1080),
    (8000, 200),
    (700, 699),
]


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024, 1000])
def test_a_bucket_keeps_the_area_the_step_and_as_much_of_the_picture_as_any_other(resolution):
    """Against every pair of sides there is."""
    sides = range(16, 4 * resolution, 16)
    every = [(w, h) for w, h in itertools.product(sides, sides) if 0.95 * resolution**2 <= w * h <= resolution**2]

    def kept(size: tuple[int, int], bucket: tuple[int, int]) -> float:
        return min(size[0] / bucket[0], size[1] / bucket[1]) ** 2 * bucket[0] * bucket[1] / (size[0] * size[1])

    for size in SIZES:
        w, h = bucket = buckets.choose_bucket(*size, resolution)
        assert w % 16 == h % 16 == 0
        assert max(w, h) <= buckets.MAX_ASPECT * min(w, h)
        assert (0.95 if resolution > 64 else 0.7) * resolution**2 <= w * h <= resolution**2
        possible = [b for b in every if max(b) <= buckets.MAX_ASPECT * min(b)]
        assert kept(size, bucket) >= max(kept(size, b) for b in possible) - 1e-9
        assert buckets.choose_bucket(*size[::-1], resolution) == (h, w)


def test_usual_shapes_get_usual_buckets():
    chosen = {size: buckets.choose_bucket(*size, 1024) for size in SIZES}
    assert chosen[1000, 1000] == chosen[700, 699] == (1024, 1024)
    assert chosen[4032, 3024] == (1168, 880)
    assert chosen[1920, 1080] == (1360, 768)
    assert chosen[8000, 200] == (2048, 512)
    assert buckets.choose_bucket(3, 4, 64) == (48, 80)


def test_a_picture_trains_only_where_it_need_not_be_enlarged_and_once_in_any_case():
    resolutions = [1024, 512, 768]
    assert buckets.buckets_for(2000, 2000, resolutions) == [(512, 512), (768, 768), (1024, 1024)]
    assert buckets.buckets_for(1024, 1024, resolutions) == [(512, 512), (768, 768), (1024, 1024)]
    assert buckets.buckets_for(1023, 1024, resolutions) == [(512, 512), (768, 768)]
    assert buckets.buckets_for(100, 100, resolutions) == [(512, 512)]


def test_from_768_on_the_steps_are_of_64_and_no_shape_loses_a_tenth():
    for resolution, step in ((512, 16), (752, 16), (768, 64), (1024, 64), (2048, 64)):
        for aspect in (1 + hundredth / 100 for hundredth in range(300)):
            [bucket] = buckets.buckets_for(round(4000 * aspect), 4000, [resolution])
            assert not any(side % step for side in bucket)
            assert buckets.kept(round(4000 * aspect), 4000, bucket) > 0.9


def cropped_freely(count: int) -> list[tuple[int, int]]:
    rng = random.Random(1)
    return [(rng.randint(1100, 3000), rng.randint(1100, 3000)) for _ in range(count)]


PHONE = [(4032, 3024)] * 6 + [(3024, 4032)] * 3 + [(4032, 2268), (1080, 1920), (2000, 2000)]


@pytest.mark.parametrize(
    ("pictures", "resolutions", "before", "after"),
    [
        (PHONE, [512, 768, 1024], 15, 10),
        (cropped_freely(20), [1024], 11, 9),
        (cropped_freely(20), [512, 768, 1024], 37, 16),
    ],
)
def test_the_nearest_sizes_are_merged_towards_nine_while_no_picture_loses_over_a_quarter(
    pictures, resolutions, before, after
):
    merged = buckets.merge(pictures, resolutions)
    own = {bucket for size in pictures for bucket in buckets.buckets_for(*size, resolutions)}
    chosen = [buckets.buckets_for(*size, resolutions, merged=merged) for size in pictures]
    assert (len(own), len({bucket for several in chosen for bucket in several})) == (before, after)
    assert not set(merged) & set(merged.values()), "what is given up takes nothing"
    for gone, stays in merged.items():
        assert stays[0] * stays[1] == pytest.approx(gone[0] * gone[1], rel=0.1), "of one resolution"
    for size, several in zip(pictures, chosen, strict=True):
        assert all(buckets.cover(*size, bucket) <= 1 for bucket in several[1:])
        assert all(buckets.kept(*size, bucket) > 0.74 for bucket in several)


def test_few_sizes_stay_as_they_are_and_a_rare_one_gives_way_to_a_usual_one():
    assert buckets.merge(PHONE, [512]) == buckets.merge(PHONE, [1024]) == {}
    rare, usual = (buckets.choose_bucket(*size, 512) for size in ((4032, 2700), PHONE[0]))
    assert buckets.merge([*PHONE[:9], (4032, 2700)], [512], most=2) == {rare: usual}
    far = (4032, 2016)
    assert buckets.merge([*PHONE[:9], far], [512], most=2) == {}, "it would lose a third"


def test_pictures_are_prepared_in_the_sizes_that_are_left(tmp_path):
    path = saved(photograph((140, 100)), tmp_path / "a.png")
    [own] = buckets.buckets_for(140, 100, [64])
    [[fitted]] = views.prepared([View(path)], [64], merged={own: (64, 64)})
    assert own != fitted.size == (64, 64)


@pytest.mark.parametrize("size", [(900, 700), (700, 900), (513, 512), (3000, 80), (80, 3000), (40, 40)])
def test_fitting_is_pillows_own_fit(size):
    image = photograph((max(16, size[0]), max(16, size[1])))
    for target in [(512, 512), (256, 128), (48, 80)]:
        fitted = buckets.fit_to(image, target)
        assert fitted.size == target
        assert difference(fitted, ImageOps.fit(image, target, Image.Resampling.LANCZOS)) < 1.5


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1300, 900), (900, 1300), (530, 530)])
def test_the_short_cut_for_large_pictures_is_not_seen(form, size, tmp_path):
    path = saved(photograph(size), tmp_path / "a", format=form, **({"quality": 95} if form == "JPEG" else {}))
    [fitted] = views.prepared([View(path)], [256, 128])
    for image in fitted:
        assert difference(image, ImageOps.fit(Image.open(path), image.size, Image.Resampling.LANCZOS)) < 2


def test_pictures_come_in_order_and_the_same_on_any_number_of_threads(tmp_path):
    paths = [saved(photograph((100 + 40 * n, 300 - 20 * n)), tmp_path / f"{n}.jpg") for n in range(9)]
    one, four = (
        [[i.tobytes() for i in p] for p in views.prepared([View(path) for path in paths], [64, 128], 16, n)]
        for n in (1, 4)
    )
    assert one == four
    assert [len(found) for found in one] == [
        len(buckets.buckets_for(100 + 40 * n, 300 - 20 * n, [64, 128])) for n in range(9)
    ]


def test_no_more_is_under_way_than_threads_and_stopping_early_begins_nothing_new():
    begun, asked = [], []

    def items():
        for item in range(100):
            asked.append(item)
            yield item

    results = buckets.in_threads(lambda item: begun.append(item) or item, items(), threads=3)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(asked) <= 5 + 3
    before = threading.active_count()
    results.close()
    assert len(begun) <= 5 + 3
    assert threading.active_count() <= before - 3


def test_a_picture_that_fails_in_a_thread_is_named(tmp_path):
    good = saved(corners(), tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(good.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"'bad\.png'"):
        list(views.prepared([View(good), View(tmp_path / "bad.png"), View(good)], [32]))


@pytest.mark.parametrize("name", ["dog6.zip", "backpack-nested.zip", "monster-toy.tar.gz", "red-cartoon-style.zip"])
def test_real_photographs_keep_their_colours_and_lose_nothing(name, photographs, tmp_path):
    found, _ = photos.pair(tmp_path, archive.unpack(photographs / name, tmp_path))
    for photo, [fitted] in zip(found, views.prepared([View(p.path) for p in found], [512]), strict=True):
        whole = Image.open(photo.path)
        assert whole.width == whole.height  # so the bucket holds all of it
        assert difference(fitted, whole.convert("RGB").resize((512, 512), Image.Resampling.LANCZOS)) < 2


def test_a_picture_that_is_looked_at_small_is_decoded_small_and_not_smaller_than_that(tmp_path):
    path = saved(Image.linear_gradient("L").resize((4000, 1000)).convert("RGB"), tmp_path / "a.jpg", format="JPEG")
    small, whole = buckets.read_picture(path, 200_000), buckets.read_picture(path)
    assert whole.size == (4000, 1000)
    assert small.size == (2000, 500)  # at a half: a quarter has too few
    assert small.width / small.height == pytest.approx(4, rel=0.01)
    assert buckets.read_picture(path, 10**9).size == whole.size
