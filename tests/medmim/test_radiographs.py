"""Reading of radiographs: JPEG, PNG and DICOM files of every kind, and those that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless

from medmim.transforms import ScanError
from medmim.transforms.radiographs import LoadRadiographd, load_radiograph, radiograph_size

GREY = np.random.default_rng(3).integers(0, 256, (9, 14), dtype=np.uint8)
TURNS = {  # EXIF orientation: what a viewer makes of the stored rows
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).T,
    8: np.rot90,
}
LOSSLESS = {  # files that hold the same grey values
    "L": lambda grey: Image.fromarray(grey),
    "RGB": lambda grey: Image.fromarray(grey).convert("RGB"),
    "RGBA": lambda grey: Image.merge("RGBA", [*[Image.fromarray(grey)] * 3, Image.fromarray(255 - grey)]),
    "LA": lambda grey: Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)]),
    "P": lambda grey: palette(grey),
}


def palette(grey: np.ndarray, colour: tuple[int, int, int] | None = None) -> Image.Image:
    """Indices of another order than the greys they stand for; 17 stands for ``colour``, if given."""
    colours = np.repeat(255 - np.arange(256), 3).reshape(256, 3)
    colours[17] = colours[17] if colour is None else colour
    image = Image.fromarray(255 - grey).convert("L")
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


def write_dicom(path: Path, pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **tags) -> Path:
    """A computed radiograph; ``tags`` replace what stands in it, ``None`` leaves one out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    bits = pixels.itemsize * 8
    plain = {
        "SOPClassUID": ComputedRadiographyImageStorage,
        "SOPInstanceUID": "1.2.3",
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": tags.get("BitsStored", bits) - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes() if syntax == ExplicitVRLittleEndian else encapsulate([pixels.tobytes()]),
    }
    for key, value in (plain | tags).items():
        if value is not None:
            setattr(dataset, key, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def table(values: list[int], bits: int) -> Dataset:
    """A look-up table for stored values from 0."""
    dataset = Dataset()
    dataset.LUTDescriptor = [len(values), 0, bits]
    dataset.LUTData = np.array(values, dtype=np.uint16).tobytes()
    dataset["LUTData"].VR = "OW"
    dataset.ModalityLUTType = "US"
    return dataset


def refused(path: Path) -> str:
    """The one line that a faulty file gives, without its name."""
    with pytest.raises(ScanError) as caught:
        load_radiograph(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("mode", LOSSLESS)
def test_grey_values_of_8_bits_whatever_the_file(tmp_path, mode):
    path = tmp_path / "a.PNG"
    image = LOSSLESS[mode](GREY)
    assert image.mode == mode
    image.save(path)
    loaded = load_radiograph(path)
    np.testing.assert_allclose(loaded[0].numpy(), GREY / 255, atol=1e-6)
    assert tuple(loaded.shape) == (1, *radiograph_size(path))
    assert loaded.numpy().dtype == np.float32
    assert loaded.meta["filename_or_obj"] == str(path)


def test_one_bit(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "1"
    np.testing.assert_array_equal(load_radiograph(tmp_path / "a.png")[0].numpy(), (GREY > 100).astype(np.float32))


def test_16_bits_are_a_share_of_full_scale(tmp_path):
    pixels = np.array([[0, 1, 255, 256], [4095, 32767, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_allclose(load_radiograph(tmp_path / "a.png")[0].numpy(), pixels / 65535, rtol=1e-6)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["8 bits", "16 bits"])
def test_exif_orientation(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = GREY if kind == "8 bits" else GREY.astype(np.uint16) * 257
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    loaded = load_radiograph(tmp_path / "a.png")
    np.testing.assert_allclose(loaded[0].numpy(), TURNS[orientation](GREY) / 255, atol=1e-6)
    stored = radiograph_size(tmp_path / "a.png")
    assert tuple(loaded.shape[1:]) == (stored if orientation < 5 else stored[::-1])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg(tmp_path, mode):
    y, x = np.mgrid[:40, :56]
    smooth = (2 * x + 3 * y).astype(np.uint8)
    Image.fromarray(smooth).convert(mode).save(tmp_path / "a.jpeg", quality=95)
    np.testing.assert_allclose(load_radiograph(tmp_path / "a.jpeg")[0].numpy(), smooth / 255, atol=4 / 255)


@pytest.mark.parametrize("size", [(1, 2), (3, 50), (51, 1)])
@pytest.mark.parametrize("suffix", [".png", ".dcm"])
def test_odd_sizes(tmp_path, size, suffix):
    pixels = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
    path = tmp_path / f"a{suffix}"
    write_dicom(path, pixels) if suffix == ".dcm" else Image.fromarray(pixels).save(path)
    np.testing.assert_allclose(load_radiograph(path)[0].numpy(), pixels / 255, atol=1e-6)
    assert radiograph_size(path) == size


@pytest.mark.parametrize("spread", [8, 9])
def test_colours_are_refused_beyond_rounding(tmp_path, spread):
    colours = np.stack([GREY // 2 + 20] * 3, axis=-1)
    colours[4, 7, 2] += spread
    Image.fromarray(colours).save(tmp_path / "a.png")
    if spread == 8:
        np.testing.assert_allclose(load_radiograph(tmp_path / "a.png")[0].numpy(), colours[..., 0] / 255, atol=0.005)
    else:
        message = refused(tmp_path / "a.png")
        assert message.startswith("colours (channels differ by up to 9 of 255), expected a grey radiograph: save it")


def test_a_palette_with_colours_is_refused(tmp_path):
    grey = GREY.copy()
    grey[0, 0] = 255 - 17
    palette(grey, (238, 100, 238)).save(tmp_path / "a.png")
    assert refused(tmp_path / "a.png").startswith("palette with colours (channels differ by up to 138 of 255)")


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (Image.fromarray(GREY).convert("CMYK"), "pixels of kind CMYK, expected grey values: save it as grey"),
        (Image.fromarray(GREY.astype(np.float32)), "pixels of kind F, expected grey values: save it as grey"),
        (Image.fromarray(-7 * GREY.astype(np.int32)), f"grey values from -{7 * int(GREY.max())} to "),
        (Image.fromarray(np.full((5, 6), 51, np.uint8)), "constant image, each pixel is 0.2 of full scale: remove"),
    ],
    ids=["CMYK", "float", "negative", "constant"],
)
def test_other_pixels_are_refused(tmp_path, image, what):
    path = tmp_path / "a.png"  # what a file holds is not told by its name
    image.save(path, format="TIFF" if image.mode in "FI" else "JPEG", quality=100)
    assert refused(path).startswith(what)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".dcm"])
@pytest.mark.parametrize("how", ["empty", "garbage", "truncated", "missing"])
def test_unreadable_files(tmp_path, suffix, how):
    path = tmp_path / f"a{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (120, 130), dtype=np.uint8)
    write_dicom(path, pixels) if suffix == ".dcm" else Image.fromarray(pixels).save(path)
    content = {"empty": b"", "garbage": b"no image\n" * 40, "truncated": path.read_bytes()[:5000]}
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[how])
    message = refused(path)
    empty = how == "empty" and suffix != ".dcm"
    assert message.startswith("empty file (0 bytes): replace" if empty else "not readable (")
    assert message.endswith("replace or remove it" if empty else "): replace or remove the file")


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_dicom_of_stored_bits(tmp_path, kind, bits):
    dtype = np.uint8 if bits == 8 else np.uint16
    pixels = np.random.default_rng(bits).integers(0, 2**bits, (6, 7)).astype(dtype)
    path = write_dicom(tmp_path / "a.DCM", pixels, PhotometricInterpretation=kind, BitsStored=bits)
    share = pixels / (2**bits - 1)
    expected = 1 - share if kind == "MONOCHROME1" else share
    np.testing.assert_allclose(load_radiograph(path)[0].numpy(), expected, atol=1e-6)
    assert radiograph_size(path) == (6, 7)


def test_signed_pixels(tmp_path):
    pixels = np.array([[-2048, -1, 0], [1, 1000, 2047]], dtype=np.int16)
    path = write_dicom(tmp_path / "a.dcm", pixels, BitsStored=12)
    np.testing.assert_allclose(load_radiograph(path)[0].numpy(), (pixels + 2048) / 4095, atol=1e-6)


@pytest.mark.parametrize("slope", [2.0, -0.5])
def test_rescale_slope_and_intercept(tmp_path, slope):
    pixels = np.array([[0, 100, 1000], [2000, 4000, 4095]], dtype=np.uint16)
    tags = {"BitsStored": 12, "RescaleSlope": slope, "RescaleIntercept": -300}
    share = pixels / 4095
    path = write_dicom(tmp_path / "a.dcm", pixels, **tags)
    np.testing.assert_allclose(load_radiograph(path)[0].numpy(), share if slope > 0 else 1 - share, atol=1e-6)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_window(tmp_path, kind, rescaled):
    pixels = np.linspace(0, 4095, 42).astype(np.uint16).reshape(6, 7)
    tags = {"PhotometricInterpretation": kind, "BitsStored": 12}
    tags |= {"RescaleSlope": 2, "RescaleIntercept": -1000} if rescaled else {}
    values = pixels * 2.0 - 1000 if rescaled else pixels.astype(float)
    path = write_dicom(tmp_path / "a.dcm", pixels, WindowCenter=[1600, 9], WindowWidth=[801, 9], **tags)
    share = np.clip((values - 1599.5) / 800 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    assert {0, 1} < set(share.ravel().tolist())
    expected = 1 - share if kind == "MONOCHROME1" else share
    np.testing.assert_allclose(load_radiograph(path)[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("sequence", "bits"), [("VOILUTSequence", 10), ("ModalityLUTSequence", 16)])
def test_look_up_tables(tmp_path, sequence, bits):
    pixels = np.arange(4, dtype=np.uint8).reshape(2, 2)
    path = write_dicom(tmp_path / "a.dcm", pixels, **{sequence: [table([0, 600, 900, 1023], bits)]})
    np.testing.assert_allclose(load_radiograph(path)[0].numpy() * (2**bits - 1), [[0, 600], [900, 1023]], atol=0.01)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ({"NumberOfFrames": 2}, "MONOCHROME2, 2 frames"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR, 1 frames"),
        ({"PhotometricInterpretation": None, "PixelData": None, "Rows": None}, "no pixels, 1 frames"),
    ],
)
def test_dicom_that_is_no_radiograph(tmp_path, tags, found):
    path = write_dicom(tmp_path / "a.dcm", np.stack([GREY, GREY]), **tags)
    assert refused(path).startswith(f"DICOM with {found}: expected one frame of MONOCHROME1 or MONOCHROME2")


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelData": None}, "AttributeError"),
        ({"Rows": 400}, "ValueError"),
        ({"syntax": RLELossless}, "RuntimeError"),
        ({"RescaleSlope": "", "RescaleIntercept": ""}, "TypeError"),
    ],
    ids=["no pixels", "too few", "damaged", "no slope"],
)
def test_dicom_that_cannot_be_decoded(tmp_path, tags, reason):
    path = write_dicom(tmp_path / "a.dcm", GREY, **tags)
    assert refused(path).startswith(f"not readable ({reason} ")


def test_dicom_whose_decoder_is_not_installed(tmp_path, monkeypatch):
    decoder = get_decoder(JPEGLosslessSV1)
    monkeypatch.setattr(decoder, "_available", {})
    monkeypatch.setattr(decoder, "_unavailable", {"gdcm": ("gdcm",)})
    message = refused(write_dicom(tmp_path / "a.dcm", GREY, JPEGLosslessSV1))
    assert message.startswith("not readable (RuntimeError Unable to decompress 'JPEG Lossless")
    assert message.endswith("): install pylibjpeg or gdcm, decompress the file, or remove it")


def test_of_a_dictionary(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    data = {"image": str(tmp_path / "a.png"), "label": [1.0]}
    loaded = LoadRadiographd("image")(data)
    np.testing.assert_allclose(loaded["image"][0].numpy(), GREY / 255, atol=1e-6)
    assert loaded["label"] == [1.0]
    assert data["image"] == str(tmp_path / "a.png")  # untouched
