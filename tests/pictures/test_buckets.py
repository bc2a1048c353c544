import io
import itertools
import random
import struct
import threading
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageOps, ImageStat

from lora.pictures import archive, buckets, photos

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
    [[fitted]] = buckets.prepared([path], [32])
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


def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG by hand, of kinds that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


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
    [[fitted]] = buckets.prepared([path], [64])
    assert min(fitted.getchannel("R").tobytes()) >= 250


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


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"])
def test_what_is_no_picture_or_of_a_kind_not_offered_is_refused(data, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"'a\.jpg' is damaged, or no JPEG, PNG") as error:
        buckets.read_picture(tmp_path / "a.jpg")
    assert str(tmp_path) not in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (60_000, 60_000)])
def test_a_hundred_megapixels_are_the_most_and_nothing_is_decoded_beyond(width, height, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(width, height, 8, 0, b""))
    with pytest.raises(ValueError, match=r"'bomb\.png'.* 100 megapixels"):
        buckets.read_picture(tmp_path / "bomb.png")


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
    [[fitted]] = buckets.prepared([path], [64], merged={own: (64, 64)})
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
    [fitted] = buckets.prepared([path], [256, 128])
    for image in fitted:
        assert difference(image, ImageOps.fit(Image.open(path), image.size, Image.Resampling.LANCZOS)) < 2


def test_pictures_come_in_order_and_the_same_on_any_number_of_threads(tmp_path):
    paths = [saved(photograph((100 + 40 * n, 300 - 20 * n)), tmp_path / f"{n}.jpg") for n in range(9)]
    one, four = ([[i.tobytes() for i in p] for p in buckets.prepared(paths, [64, 128], 16, n)] for n in (1, 4))
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
        list(buckets.prepared([good, tmp_path / "bad.png", good], [32]))


@pytest.mark.parametrize("name", ["dog6.zip", "backpack-nested.zip", "monster-toy.tar.gz", "red-cartoon-style.zip"])
def test_real_photographs_keep_their_colours_and_lose_nothing(name, photographs, tmp_path):
    found, _ = photos.pair(tmp_path, archive.unpack(photographs / name, tmp_path))
    for photo, [fitted] in zip(found, buckets.prepared([p.path for p in found], [512]), strict=True):
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
