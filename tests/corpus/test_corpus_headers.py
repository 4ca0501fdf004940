"""Class: safetensors files whose header or offsets are not what the format says."""

import json
import pickle
import struct
from pathlib import Path

import pytest
from corpus_cases import (
    WEIGHTS,
    accepted,
    every,
    hold,
    refused,
    third_tensors,
    with_bytes,
    with_header,
)
from safetensors.torch import save


def entry(shape: tuple[int, ...] = (2,), start: int = 0, end: int = 8, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def told(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def parts() -> tuple[dict, bytes]:
    """Return header and data of the good weights."""
    content = save(third_tensors())
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def edited(edit: object, data: object = lambda data: data):
    """Return what edits the good header, and the data."""

    def spoil(folder: Path) -> None:
        header, content = parts()
        edit(header)  # type: ignore[operator]
        with_header(json.dumps(header).encode(), data(content))(folder)  # type: ignore[operator]

    return spoil


def moved(by: tuple[int, int]):
    """Return what moves the ends of the first tensor's place in the file."""

    def edit(header: dict) -> None:
        place = next(iter(header.values()))["data_offsets"]
        place[0], place[1] = place[0] + by[0], place[1] + by[1]

    return edited(edit)


def twice_with_other_offsets(folder: Path) -> None:
    """A scanner that keeps the first and a loader that keeps the last see different tensors."""
    header, data = parts()
    first, second = list(header)[:2]
    swapped = {**header[first], "data_offsets": header[second]["data_offsets"]}
    text = json.dumps(header)[:-1] + f', "{first}": {json.dumps(swapped)}}}'
    with_header(text.encode(), data)(folder)


def padded(folder: Path) -> None:
    header, data = parts()
    with_header(json.dumps(header).encode() + b" " * 64, data)(folder)


def reversed_header(folder: Path) -> None:
    header, data = parts()
    with_header(json.dumps(dict(reversed(header.items()))).encode(), data)(folder)


def no_safetensors(word: str, content: bytes):
    return refused(word, with_bytes(WEIGHTS, content), WEIGHTS)


def no_header(word: str, header: bytes, data: bytes = bytes(8)):
    return refused(word, with_header(header, data), WEIGHTS)


CASES = {
    "st_empty_file": no_safetensors("in its 0 bytes but a safetensors file", b""),
    "st_short": no_safetensors("in its 2 bytes but a safetensors file", b"\x01\x02"),
    "st_header_2_63": no_safetensors("no header of at most", struct.pack("<Q", 2**63) + b"{}"),
    "st_header_past_end": no_safetensors("in its 10 bytes but", struct.pack("<Q", 100) + b"{}"),
    "st_header_101mb": no_safetensors(
        "no header of at most", struct.pack("<Q", 101_000_000) + bytes(101_000_000)
    ),
    "safetensors_is_zip_pickle": no_safetensors("a pickle (zip)", b"PK\x03\x04" + bytes(100)),
    "safetensors_is_pickle": no_safetensors(
        "a pickle but", pickle.dumps({"a": list(range(50))}, protocol=4)
    ),
    "st_is_html": no_safetensors("a web page", b"<!DOCTYPE html><html>not found</html>"),
    "st_is_gguf": no_safetensors("a GGUF file", b"GGUF" + b"\x03" * 40),
    "st_is_lfs_pointer": no_safetensors(
        "git lfs pull", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
    ),
    "st_header_no_json": no_header("header: line 1: not JSON", b"{not JSON"),
    "st_header_bad_utf8": no_header("header: not UTF-8 JSON", b"{\xff\xfe}"),
    "st_header_list": no_header("header is no JSON object", b"[1, 2]"),
    "st_empty_header": no_header("0 tensors, none of them LoRA", b"{}", b""),
    "st_not_lora": no_header("x: unknown but only", told(x=entry())),
    "st_duplicate_key": refused("given twice", twice_with_other_offsets, WEIGHTS),
    "st_deep_json": no_header("nested too deeply", b"[" * 100_000),
    "st_100k_tensors": no_header(
        "100000 tensors but at most 99999", told(**{f"t{i}": 0 for i in range(100_000)})
    ),
    "st_no_shape": no_header("x: no dtype or shape", told(x={"dtype": "F32"})),
    "st_negative_shape": no_header("x: no dtype or shape", told(x=entry((-2,)))),
    "st_huge_shape": no_header("damaged (", told(x=entry((2**40, 2**40)))),
    "st_unknown_dtype": no_header("damaged (", told(x=entry(dtype="F31"))),
    "st_overlap": no_header("damaged (", told(x=entry(), y=entry(start=4, end=12))),
    "st_hole": refused("damaged (", moved((4, 4)), WEIGHTS),
    "st_reversed": no_header("damaged (", told(x=entry(start=8, end=0))),
    "st_negative_offset": no_header("damaged (", told(x=entry(start=-8, end=0))),
    "st_out_of_range": no_header("damaged (", told(x=entry((20,), end=80))),
    "st_offset_size_mismatch": refused("damaged (", moved((0, -4)), WEIGHTS),
    "st_trailing_bytes": refused("damaged (", edited(lambda _: None, lambda d: d + b"x"), WEIGHTS),
    "st_cut_data": refused("damaged (", edited(lambda _: None, lambda d: d[:-1]), WEIGHTS),
    "st_bad_metadata": refused("damaged (", edited(lambda h: h.update(__metadata__=[1])), WEIGHTS),
    "ok_padded_header": accepted(padded),
    "ok_reversed_header": accepted(reversed_header),
    "ok_metadata": accepted(edited(lambda h: h.update(__metadata__={"format": "pt"}))),
}


@pytest.mark.timeout(60)
@every(CASES)
def test_headers(case, tmp_path):
    hold(case, tmp_path)
