import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from infimed.contracts import DataFault, UserError
from infimed.processing import dicom
from infimed.processing.dicom import CT_WINDOWS, decode_dicom, is_dicom, read_image_file

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = np.arange(-1024, 3072, dtype=np.int16).reshape(64, 64)


def _shipped(name: str) -> bytes:
    return (FILES / name).read_bytes()


def _file(pixels: np.ndarray, **attributes: object) -> bytes:
    """Write a small DICOM file of [H, W], [H, W, 3] or, with NumberOfFrames, [F, H, W]; attributes overwrite any default."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid(entropy_srcs=["fixed"])
    is_colour = pixels.ndim == 3 and "NumberOfFrames" not in attributes
    dataset.Rows, dataset.Columns = pixels.shape[:2] if is_colour else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if is_colour else 1
    dataset.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    for name, value in attributes.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _item(**attributes: object) -> Dataset:
    item = Dataset()
    for name, value in attributes.items():
        setattr(item, name, value)
    return item


def _table(values: list[int], *, first: int, bits: int) -> Dataset:
    item = _item(LUTDescriptor=[len(values), first, bits])
    item.add_new("LUTData", "US", values)
    return item


def _grey(data: bytes, **options: object) -> np.ndarray:
    """Decode and return one of the three equal channels."""
    image = decode_dicom(data, **options)
    assert image.dtype == torch.uint8
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    return image[0].numpy()


def _rgb(data: bytes, **options: object) -> np.ndarray:
    return decode_dicom(data, **options).permute(1, 2, 0).numpy()


def test_pydicom_is_imported_only_when_a_dicom_is_read():
    code = "import sys, infimed.processing.dicom; sys.exit('pydicom' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_rescale_then_lung_window_gives_the_shades_of_hand_arithmetic():
    stored = np.array([[0, 75, 150, 225]], np.uint16)  # -1350, -600, 150 and 900 HU; the lung window spans -1350 ... 150
    shades = _grey(_file(stored, Modality="CT", RescaleSlope=10, RescaleIntercept=-1350), window="lung")
    assert shades.tolist() == [[0, 128, 255, 255]]


@pytest.mark.parametrize("name", CT_WINDOWS)
def test_a_named_window_is_its_centre_and_width(name):
    data = _file(RAMP, Modality="CT", RescaleSlope=1, RescaleIntercept=0)
    centre, width = CT_WINDOWS[name]
    shades = _grey(data, window=name)
    assert np.array_equal(shades, _grey(data, window=(centre, width)))
    assert not shades[centre - width / 2 > RAMP].any()
    assert (shades[centre + width / 2 < RAMP] == 255).all()
    assert abs(int(shades[centre == RAMP][0]) - 127.5) <= 255 / width + 0.5  # within a unit and a rounding


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_files_window_functions_are_pydicoms_own(function):
    attributes = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": 0, "WindowCenter": 300, "WindowWidth": 1500}
    data = _file(RAMP, **attributes, VOILUTFunction=function)
    dataset = pydicom.dcmread(io.BytesIO(data))
    reference = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)  # in -32768 ... 32767
    assert np.abs(_grey(data) - (reference + 32768) / 65535 * 255).max() <= 0.51


def test_the_first_of_several_windows_counts():
    one = _file(RAMP, WindowCenter=40, WindowWidth=80)
    assert np.array_equal(_grey(_file(RAMP, WindowCenter=[40, 600], WindowWidth=[80, 2800])), _grey(one))


def test_an_empty_window_is_as_none():
    assert np.array_equal(_grey(_file(RAMP, WindowCenter=None, WindowWidth=None)), _grey(_file(RAMP)))


def test_the_callers_window_beats_the_files():
    assert np.array_equal(_grey(_file(RAMP, WindowCenter=40, WindowWidth=80), window=(600, 2800)), _grey(_file(RAMP), window=(600, 2800)))


def test_without_a_window_values_stretch_from_darkest_to_brightest():
    assert _grey(_file(np.array([[100, 200], [300, 500]], np.uint16))).tolist() == [[0, 64], [128, 255]]


def test_a_voi_table_comes_before_the_files_window():
    table = _table([0, 1000, 3000, 4095], first=10, bits=12)
    data = _file(np.array([[0, 10, 11, 12, 13, 99]], np.uint16), VOILUTSequence=[table], WindowCenter=40, WindowWidth=80)
    assert _grey(data).tolist() == [[0, 0, 62, 187, 255, 255]]


def test_a_table_of_8_bits_may_have_more_than_256_entries():
    table = _table([index // 4 for index in range(1024)], first=0, bits=8)
    assert _grey(_file(np.array([[0, 511, 1023]], np.uint16), VOILUTSequence=[table])).tolist() == [[0, 127, 255]]


def test_a_modality_table_is_applied_before_the_window():
    table = _table([0, 50, 100, 1000], first=0, bits=16)
    table.ModalityLUTType = "US"
    data = _file(np.array([[0, 1, 2, 3]], np.uint16), ModalityLUTSequence=[table], WindowCenter=50.5, WindowWidth=101)
    assert _grey(data).tolist() == [[0, 128, 255, 255]]


@pytest.mark.parametrize("attributes", [{}, {"WindowCenter": 40, "WindowWidth": 80}])
def test_monochrome1_is_the_negative_of_monochrome2(attributes):
    negative = _grey(_file(RAMP, PhotometricInterpretation="MONOCHROME1", **attributes))
    assert np.abs(255 - negative.astype(int) - _grey(_file(RAMP, **attributes))).max() <= 1  # halves round to even


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_stretch_the_rest(photometric):
    stored = np.array([[-2000, 0, 100, 100]], np.int16)
    shades = _grey(_file(stored, PixelPaddingValue=-2000, PhotometricInterpretation=photometric))
    assert shades.tolist() == [[0, 0, 255, 255] if photometric == "MONOCHROME2" else [0, 255, 0, 0]]


def test_a_frame_is_picked_by_its_number_and_must_exist():
    frames = np.stack([RAMP, RAMP[::-1], RAMP.T])
    data = _file(frames, NumberOfFrames=3)
    for frame in range(3):
        assert np.array_equal(_grey(data, frame=frame), _grey(_file(np.ascontiguousarray(frames[frame]))))
    for frame in (3, -1):
        with pytest.raises(DataFault, match=f"no_such_frame: frame {frame} of a file with 3"):
            decode_dicom(data, frame=frame)


def test_an_enhanced_file_takes_rescale_and_window_from_its_groups():
    def groups(intercept: int, centre: int) -> Dataset:
        rescale = _item(RescaleSlope=1, RescaleIntercept=intercept, RescaleType="HU")
        return _item(PixelValueTransformationSequence=[rescale], FrameVOILUTSequence=[_item(WindowCenter=centre, WindowWidth=100)])

    shared = _item(FrameVOILUTSequence=[_item(WindowCenter=9999, WindowWidth=1)])  # a frame's own group wins
    data = _file(
        np.stack([RAMP, RAMP]),
        NumberOfFrames=2,
        Modality="CT",
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[groups(0, 100), groups(-1000, 500)],
    )
    assert np.array_equal(_grey(data, frame=0), _grey(_file(RAMP), window=(100, 100)))
    assert np.array_equal(_grey(data, frame=1), _grey(_file(RAMP), window=(1500, 100)))
    assert np.array_equal(_grey(data, frame=1, window="brain"), _grey(_file(RAMP), window=(1040, 80)))


@pytest.mark.parametrize("planar", [0, 1])
def test_rgb_is_as_stored(planar):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stored = np.ascontiguousarray(pixels.transpose(2, 0, 1)) if planar else pixels
    assert np.array_equal(_rgb(_file(pixels, PlanarConfiguration=planar, PixelData=stored.tobytes())), pixels)


def test_16_bit_colour_keeps_its_upper_bits():
    pixels = np.array([[[0, 256, 65535]]], np.uint16)
    assert _rgb(_file(pixels)).tolist() == [[[0, 1, 255]]]


def test_ybr_becomes_rgb():
    red_in_ybr = np.array([[[76, 85, 255]]], np.uint8).repeat(2, axis=1)
    assert np.abs(_rgb(_file(red_in_ybr, PhotometricInterpretation="YBR_FULL")).astype(int) - [254, 0, 0]).max() <= 2


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_gives_its_colours(bits):
    tables = {}
    for colour, values in (("Red", [0, 255]), ("Green", [128, 64]), ("Blue", [255, 0])):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, bits]
        scaled = np.array(values, np.uint16) * 257 if bits == 16 else np.array(values, np.uint8)
        tables[f"{colour}PaletteColorLookupTableData"] = scaled.tobytes()
    data = _file(np.array([[0, 1]], np.uint8), PhotometricInterpretation="PALETTE COLOR", **tables)
    assert _rgb(data).tolist() == [[[0, 128, 255], [255, 64, 0]]]


@pytest.mark.parametrize("name", ["RLE", "bigendian", "expb", "implicit"])
def test_every_encoding_of_pydicoms_mr_file_shows_the_same(name):
    assert np.array_equal(_grey(_shipped(f"MR_small_{name}.dcm")), _grey(_shipped("MR_small.dcm")))


@pytest.mark.parametrize("name", ["jp2klossless", "jpeg_ls_lossless"])
def test_compressed_files_decode_where_pylibjpeg_is_installed(name):
    pytest.importorskip("pylibjpeg")
    assert np.array_equal(_grey(_shipped(f"MR_small_{name}.dcm")), _grey(_shipped("MR_small.dcm")))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("CT_small.dcm", (128, 128)),
        ("examples_overlay.dcm", (300, 484)),
        ("examples_palette.dcm", (350, 800)),
        ("examples_rgb_color.dcm", (240, 320)),
        ("image_dfl.dcm", (512, 512)),
        ("liver_1frame.dcm", (512, 512)),
        ("rtdose.dcm", (10, 10)),
        ("SC_rgb_rle_16bit_2frame.dcm", (100, 100)),
        ("SC_ybr_full_422_uncompressed.dcm", (100, 100)),
    ],
)
def test_pydicoms_files_show_dark_and_bright(name, shape):
    image = decode_dicom(_shipped(name))
    assert image.shape == (3, *shape)
    assert image.min() < 10
    assert image.max() > 245


def test_pydicoms_palette_file_is_not_grey():
    image = _rgb(_shipped("examples_palette.dcm")).astype(int)
    assert np.abs(image[..., 0] - image[..., 2]).max() > 150


def test_a_syntax_without_decoder_names_the_fix():
    data = _shipped("SC_rgb_small_odd_jpeg.dcm")
    decoder = get_decoder(JPEGBaseline8Bit)
    before = dict(decoder._available)
    decoder._available.clear()
    try:
        with pytest.raises(DataFault, match=r"missing_decoder.*JPEG Baseline.*pip install pylibjpeg"):
            decode_dicom(data)
    finally:
        decoder._available.update(before)


@pytest.mark.parametrize("name", ["rtplan.dcm", "test-SR.dcm", "waveform_ecg.dcm", "DICOMDIR"])
def test_an_object_without_pixels_is_a_fault(name):
    folder = "dicomdirtests/" if name == "DICOMDIR" else ""
    with pytest.raises(DataFault, match="no_pixel_data"):
        decode_dicom(_shipped(folder + name))


def test_an_oversized_picture_is_refused_before_its_pixels_are_read():
    with pytest.raises(DataFault, match="image_too_large: 60000 x 60000"):
        decode_dicom(_file(RAMP, Rows=60_000, Columns=60_000))


def test_a_deflated_file_is_inflated_within_a_limit(monkeypatch):
    data = _shipped("image_dfl.dcm")
    assert decode_dicom(data).shape == (3, 512, 512)
    monkeypatch.setattr(dicom, "_MAX_INFLATED_BYTES", 200_000)  # it holds 512 x 512 bytes and a header
    with pytest.raises(DataFault, match=r"image_too_large.*deflated"):
        decode_dicom(data)


def test_a_truncated_or_malformed_file_is_undecodable():
    whole = _shipped("MR_small.dcm")
    for data in (whole[:-1000], whole[:200], b"\0" * 128 + b"DICM", _shipped("badVR.dcm"), b"no DICOM at all"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of what it then raises
            with pytest.raises(DataFault) as caught:
                decode_dicom(data)
        assert caught.value.reason in ("undecodable_image", "no_pixel_data")
        assert "\n" not in caught.value.detail


@pytest.mark.parametrize("attributes", [{"Modality": "MR", "RescaleSlope": 1, "RescaleIntercept": 0}, {"Modality": "CT"}])
def test_a_named_window_is_for_hounsfield_units_only(attributes):
    with pytest.raises(DataFault, match=r"not_hounsfield.*lung"):
        decode_dicom(_file(RAMP, **attributes), window="lung")


def test_a_window_that_does_not_exist_is_the_users_mistake():
    with pytest.raises(UserError, match=r"window='lungs', expected one of brain.*did you mean 'lung'"):
        decode_dicom(_file(RAMP), window="lungs")
    for window in ((40, 0), (40,)):
        with pytest.raises(UserError, match=r"expected \(centre, width\)"):
            decode_dicom(_file(RAMP), window=window)


def test_read_image_file_knows_dicom_from_the_rest():
    buffer = io.BytesIO()
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(buffer, "PNG")
    assert not is_dicom(buffer.getvalue())
    assert np.array_equal(read_image_file(buffer.getvalue(), window="lung").permute(1, 2, 0).numpy(), pixels)
    data = _file(RAMP)
    assert is_dicom(data)
    assert np.array_equal(read_image_file(data, window=(40, 80))[0].numpy(), _grey(data, window=(40, 80)))
