"""Where documents come from, the held-out split, and the token files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from train.tiny_run import run_config, write_model

from v4jax.errors import UserError
from v4jax.train.text import Corpus, Split, TextSource, load_corpora, split_documents, tokenise

BOS, EOS = 256, 257
DEEP, DIGITS = "[" * 100_000, '{"text": ' + "1" * 5000 + "}"
"""JSON on which Python's parser gives up in ways of its own."""


def encode_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def corpora(data: Path, out: Path, *, fraction: float = 0.3, vocab_size: int = 258) -> dict[Split, Corpus]:
    return tokenise(
        TextSource(str(data)), out, encode_bytes,
        vocab_size=vocab_size, bos=BOS, eos=EOS, held_out_fraction=fraction, key="bytes",
    )  # fmt: skip


def documents(corpus: Corpus) -> list[str]:
    cuts = np.split(np.asarray(corpus.tokens), corpus.offsets[1:-1])
    assert all(cut[0] == BOS and cut[-1] == EOS for cut in cuts)
    return [bytes(cut[1:-1].astype(np.uint8)).decode() for cut in cuts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    for n in range(30):
        (root / "deep" / f"{n}.txt").write_text(f"document {n}: naïve café\n" * (n + 1))
    (root / "a.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(20)))
    (root / "ignored.bin").write_bytes(b"\xff\xfe")
    (root / "empty.md").write_text("  \n")
    return root


def test_every_document_is_in_exactly_one_split(folder: Path, tmp_path: Path) -> None:
    found = corpora(folder, tmp_path / "out")
    train, held_out = documents(found["train"]), documents(found["held_out"])
    expected = [(folder / "deep" / f"{n}.txt").read_text() for n in range(30)] + [f"line {n}" for n in range(20)]
    assert sorted(train + held_out) == sorted(expected)
    assert 5 <= len(held_out) <= 25
    assert found["train"].tokens.dtype == np.uint32
    assert found["train"].text_bytes == sum(len(text.encode()) for text in train)
    assert found["train"].text_tokens == len(found["train"].tokens) - 2 * len(train)


def test_the_split_of_a_document_does_not_move_when_files_are_added(folder: Path, tmp_path: Path) -> None:
    before = set(documents(corpora(folder, tmp_path / "before")["held_out"]))
    (folder / "0_new.txt").write_text("something new\n")
    after = set(documents(corpora(folder, tmp_path / "after")["held_out"]))
    assert after - {"something new\n"} == before


def test_copies_of_a_text_do_not_straddle_the_split() -> None:
    texts = [f"text {n % 40}" for n in range(200)]
    is_held_out = split_documents(iter(texts), 0.5)
    sides = {text: {bool(out) for t, out in zip(texts, is_held_out, strict=True) if t == text} for text in texts}
    assert all(len(side) == 1 for side in sides.values())
    assert {True, False} == {next(iter(side)) for side in sides.values()}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_gets_a_document_at_any_fraction(fraction: float) -> None:
    is_held_out = split_documents(iter(["a", "b", "c"]), fraction)
    assert is_held_out.any()
    assert not is_held_out.all()


def test_a_lone_document_is_cut_at_line_ends_and_split(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line number {n}\n" for n in range(500)))
    found = corpora(book, tmp_path / "out")
    parts = documents(found["train"]) + documents(found["held_out"])
    assert all(re.fullmatch(r"(line number \d+\n)+", part) for part in parts)
    assert sum(map(len, parts)) == len(book.read_text())


def test_token_files_are_made_once_and_again_after_an_interruption(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = documents(corpora(folder, out)["train"])
    stamp = (out / "train.npy").stat().st_mtime_ns
    assert documents(corpora(folder, out)["train"]) == first
    assert (out / "train.npy").stat().st_mtime_ns == stamp
    (out / "data.json").unlink()
    (out / "train.npy").write_bytes(b"half")
    assert documents(corpora(folder, out)["train"]) == first


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 64


DAMAGED = {
    "empty": b"",
    "cut": b"\x93NUMPY",
    "open header": npy("{'descr': '<u4', 'fortran_order': False, 'shape': (3,"),
    "huge": npy(f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({1 << 56},)}}"),
    "scalar": npy("{'descr': '<u4', 'fortran_order': False, 'shape': ()}"),
    "archive": b"PK\x03\x04",
}


@pytest.mark.parametrize("name", ["train.npy", "held_out.offsets.npy"])
@pytest.mark.parametrize("content", [*DAMAGED.values(), None], ids=[*DAMAGED, "missing"])
def test_rejects_damaged_token_files(folder: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    corpora(folder, tmp_path / "data")
    (tmp_path / "data" / name).unlink()
    if content is not None:
        (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"data: {name}: not what data.json describes; remove the .*data, and"):
        corpora(folder, tmp_path / "data")


def test_all_damaged_token_files_of_a_split_are_named(folder: Path, tmp_path: Path) -> None:
    corpora(folder, tmp_path / "data")
    for name in ("train.npy", "train.offsets.npy"):
        (tmp_path / "data" / name).unlink()
    with pytest.raises(UserError, match=r"train\.npy and train\.offsets\.npy: not what .* same command makes it anew"):
        corpora(folder, tmp_path / "data")


@pytest.mark.parametrize("text", ["{", "[]", "{}", DEEP, DIGITS], ids=["open", "list", "empty", "deep", "digits"])
def test_a_damaged_summary_makes_the_token_files_again(folder: Path, tmp_path: Path, text: str) -> None:
    want = corpora(folder, tmp_path / "data")
    (tmp_path / "data" / "data.json").write_text(text)
    assert documents(corpora(folder, tmp_path / "data")["train"]) == documents(want["train"])


@pytest.mark.parametrize("counts", [None, [], {}, {"documents": 3, "tokens": "9", "text_bytes": 1, "text_tokens": 1}])
def test_a_summary_with_other_things_than_counts_makes_the_token_files_again(
    folder: Path, tmp_path: Path, counts: object
) -> None:
    want = corpora(folder, tmp_path / "data")
    summary = tmp_path / "data" / "data.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"train": counts}))
    assert documents(corpora(folder, tmp_path / "data")["train"]) == documents(want["train"])


def test_token_files_of_another_split_are_made_again(folder: Path, tmp_path: Path) -> None:
    few = corpora(folder, tmp_path / "out", fraction=0.1)["held_out"].num_documents
    assert corpora(folder, tmp_path / "out", fraction=0.6)["held_out"].num_documents > few


def test_the_standard_library_is_a_source() -> None:
    files = TextSource("stdlib").files
    assert any(file.name == "argparse.py" for file in files)
    assert not any("site-packages" in file.parts for file in files)


def test_a_glob_is_a_source(folder: Path) -> None:
    assert len(TextSource(str(folder / "**" / "1*.txt")).files) == 11


def test_rejects_ids_beyond_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gives id 257, the model's vocab_size is 200"):
        corpora(folder, tmp_path / "out", vocab_size=200)
    assert not (tmp_path / "out" / "data.json").exists()


@pytest.mark.parametrize("line", ["no json", '{"txt": 1}', '{"text": 1}', '"text"', DEEP, DIGITS], ids=lambda x: x[:12])
def test_rejects_a_jsonl_line_without_text(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: need an object with a string \"text\""):
        list(TextSource(str(file)).documents())


def test_rejects_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: the text has '.ud83d' at character 5, half of"):
        list(TextSource(str(tmp_path)).documents())


@pytest.mark.parametrize("before", [b"", b"a line\n" * 400_000, b"\xef\xbb\xbf"], ids=["short", "long", "marked"])
def test_rejects_a_file_that_is_not_utf8(tmp_path: Path, before: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(before + "naïve".encode("latin-1") + b"\n" * 5000)
    with pytest.raises(UserError, match=rf"a\.txt: not UTF-8 \(.* at byte {len(before) + 2}\)"):
        list(TextSource(str(tmp_path)).documents())


@pytest.mark.parametrize(("name", "text"), [("a.txt", "first"), ("a.jsonl", '{"text": "first"}\n')])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert list(TextSource(str(tmp_path)).documents()) == ["first"]


@pytest.mark.parametrize("data", ["no/such/place", "no/*.such"])
def test_rejects_data_that_names_nothing(data: str) -> None:
    with pytest.raises(UserError, match="--data: no text in"):
        TextSource(data)


def test_rejects_a_single_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one short line")
    with pytest.raises(UserError, match="got 1 different documents, need at least 2"):
        corpora(tmp_path / "a.txt", tmp_path / "out")


@pytest.mark.parametrize("fraction", [0.1, 1])
def test_rejects_files_without_a_document(tmp_path: Path, fraction: float) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"--data: no text in .*a\.txt; need at least one document"):
        corpora(tmp_path / "a.txt", tmp_path / "out", fraction=fraction)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_a_special_token_beyond_the_vocabulary_is_named(folder: Path, tmp_path: Path, key: str) -> None:
    model = write_model(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({key: 999}))
    with pytest.raises(UserError, match=rf"{key} of generation_config\.json .* is 999, the model's vocab_size is 258"):
        load_corpora(model, run_config(), str(folder), tmp_path / "out", 0.3)
