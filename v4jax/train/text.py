"""Text to tokens: where documents come from, which are held out, and the token files of a run.

A corpus is tokenised once, in bounded memory, into `<split>.npy` (uint32, all documents end to end) beside
`<split>.offsets.npy` (int64, where each begins). `data.json` is written last: without it the files are made again.
"""

import dataclasses
import glob
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from v4jax.config import ModelConfig
from v4jax.errors import UserError
from v4jax.tokenizer import Tokenizer, find_lone_surrogate

Split = Literal["train", "held_out"]
Encode = Callable[[list[str]], Sequence[Sequence[int]]]
"""Texts to token ids, special tokens not added."""

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
SECTION_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 1 << 22
_LONE_DOCUMENT_SECTIONS = 20
_SHORTEST_SECTION = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """The tokens of one split, on disk.

    `tokens` is uint32 [N], mapped and not read; `offsets` int64 [documents + 1]. `text_bytes` counts the UTF-8 bytes
    that the tokens stand for, `text_tokens` the tokens without those added at the ends of documents.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    text_bytes: int
    text_tokens: int

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1


class TextSource:
    """The documents that a `--data` value names.

    Args:
        data: a file, a directory (searched for .txt .md .py .jsonl), a glob pattern, or `stdlib` for the source files
            of Python's own standard library, its tests excepted. A line of a .jsonl file is an object with a `text`
            field, and is a document; any other file is one, cut at line ends where longer than 2²⁰ characters.

    Raises:
        UserError: nothing matches, or a file has no readable text.
    """

    def __init__(self, data: str) -> None:
        self.data = data
        self.root, self.files = _find_files(data)

    def documents(self, section: int = SECTION_CHARACTERS) -> Iterator[str]:
        """The texts, in the order of the file names; empty ones are left out."""
        for path in self.files:
            yield from (text for text in _read(path, section) if text.strip())


def _find_files(data: str) -> tuple[Path, list[Path]]:
    if data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        files = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
        what = f"the standard library at {root}"
    elif Path(data).is_dir():
        root, what = Path(data), f"directory {data}"
        files = [path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    elif Path(data).is_file():
        root, what = Path(data).parent, data
        files = [Path(data)]
    else:
        root, what = Path(), f"pattern {data}"
        files = [path for path in map(Path, glob.glob(data, recursive=True)) if path.is_file()]
    if not files:
        raise UserError(f"--data: no text in {what}; need files ending in {' '.join(SUFFIXES)}, or the word stdlib")
    return root, sorted(files)


def _read(path: Path, section: int) -> Iterator[str]:
    try:
        with open(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            try:
                yield from _read_jsonl(path, file) if path.suffix == ".jsonl" else _read_sections(file, section)
            except UnicodeDecodeError as error:
                # The decoder counts from the start of the last bytes that it got.
                place = raw.tell() - len(error.object) + error.start
                raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {place}); convert or remove it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_jsonl(path: Path, file: io.TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, RecursionError, KeyError, TypeError):  # also too many digits, too deep nesting
            text = None
        if not isinstance(text, str):
            raise UserError(f'{path}, line {number}: need an object with a string "text", got {line.strip()[:60]!r}')
        if (lone := find_lone_surrogate(text)) is not None:
            raise UserError(
                f"{path}, line {number}: the text has {text[lone]!r} at character {lone}, half of a surrogate pair and "
                "no character; correct or remove it"
            )
        yield text


def _read_sections(file: io.TextIOWrapper, section: int) -> Iterator[str]:
    while text := file.read(section):
        yield text + file.readline(section)


# ---- held-out split --------------------------------------------------------------------------------------------------
def split_documents(texts: Iterator[str], fraction: float) -> np.ndarray:
    """Which documents are held out: bool [documents].

    A document's side depends on the hash of its text alone, so it is the same on every machine, does not move when
    files are added, and copies of one text never straddle the split. Each side gets at least one document, but with a
    fraction of 1 all are held out.

    Raises:
        UserError: fewer than two different documents, or none.
    """
    keys = np.fromiter((_hash(text) for text in texts), np.uint64)
    if fraction == 1 and len(keys):
        return np.ones(len(keys), bool)
    if len(np.unique(keys)) < 2:
        raise UserError(
            f"--data: got {len(np.unique(keys))} different documents, need at least 2 so that one can be held out; "
            "give more or longer files"
        )
    threshold = np.uint64(int(fraction * 2**64))
    return ((keys < threshold) | (keys == keys.min())) & (keys != keys.max())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


# ---- tokenising ------------------------------------------------------------------------------------------------------
def tokenise(
    source: TextSource,
    directory: Path,
    encode: Encode,
    *,
    vocab_size: int,
    bos: int | None,
    eos: int | None,
    held_out_fraction: float,
    key: str,
) -> dict[Split, Corpus]:
    """The corpora of a run, from the token files in `directory` where they are whole, else made there.

    Args:
        source: the text.
        directory: where the token files are; made if missing.
        encode: the tokenizer.
        vocab_size: ids must be below it.
        bos: put before every document, unless None.
        eos: put after every document, unless None.
        held_out_fraction: share of documents that is held out.
        key: stands for the tokenizer; files made with another one are made again.

    Raises:
        UserError: an id of `vocab_size` or more, or too few documents.
    """
    wanted = dict(data=source.data, tokenizer=key, bos=bos, eos=eos, held_out_fraction=held_out_fraction)
    done = directory / "data.json"
    if done.is_file():
        found = _read_summary(done)
        if all(found.get(name) == value for name, value in wanted.items()):
            return {split: _open(directory, split, found[split]) for split in ("train", "held_out")}
        done.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    texts, is_held_out = _plan(source, held_out_fraction)
    frame = _Frame([] if bos is None else [bos], [] if eos is None else [eos], vocab_size)
    with _Writer(directory, "train") as train, _Writer(directory, "held_out") as held_out:
        batch: list[tuple[str, _Writer]] = []
        for text, is_out in zip(texts(), is_held_out, strict=True):
            batch.append((text, held_out if is_out else train))
            if sum(len(text) for text, _ in batch[-64:]) > _BATCH_CHARACTERS or len(batch) == 64:
                _flush(batch, encode, frame)
        _flush(batch, encode, frame)
    summary: dict[str, Any] = wanted | {"train": train.counts(), "held_out": held_out.counts()}
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=1))
    os.replace(partial, done)
    return {split: _open(directory, split, summary[split]) for split in ("train", "held_out")}


def _read_summary(done: Path) -> dict[str, Any]:
    """What `data.json` says; nothing if it is damaged, so that the files are made again."""
    try:
        found = json.loads(done.read_text())
    except (ValueError, RecursionError):
        return {}
    is_whole = isinstance(found, dict) and all(_are_counts(found.get(split)) for split in ("train", "held_out"))
    return found if is_whole else {}


def _are_counts(found: Any) -> bool:
    names = ("documents", "tokens", "text_bytes", "text_tokens")
    return isinstance(found, dict) and all(type(found.get(name)) is int and found[name] >= 0 for name in names)


def _plan(source: TextSource, fraction: float) -> tuple[Callable[[], Iterator[str]], np.ndarray]:
    """The documents and their split; a lone document is cut into sections first."""
    section = SECTION_CHARACTERS
    first = list(_take(source.documents(), 2))
    if not first:
        raise UserError(f"--data: no text in {source.data}; need at least one document")
    if len(first) == 1:
        section = max(_SHORTEST_SECTION, len(first[0]) // _LONE_DOCUMENT_SECTIONS)
    return lambda: source.documents(section), split_documents(source.documents(section), fraction)


def _take(items: Iterator[str], count: int) -> Iterator[str]:
    return (item for _, item in zip(range(count), items, strict=False))


@dataclasses.dataclass(frozen=True, slots=True)
class _Frame:
    before: list[int]
    after: list[int]
    vocab_size: int


def _flush(batch: "list[tuple[str, _Writer]]", encode: Encode, frame: _Frame) -> None:
    for (text, writer), ids in zip(batch, encode([text for text, _ in batch]), strict=True):
        array = np.asarray([*frame.before, *ids, *frame.after], np.uint32)
        if array.size and int(array.max()) >= frame.vocab_size:
            raise UserError(
                f"the tokenizer gives id {int(array.max())}, the model's vocab_size is {frame.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )
        writer.append(array, text_bytes=len(text.encode()), text_tokens=len(ids))
    batch.clear()


class _Writer:
    """Appends documents to `<split>.npy`, whose header is completed at the end."""

    def __init__(self, directory: Path, split: Split) -> None:
        self._path = directory / f"{split}.npy"
        self._offsets_path = directory / f"{split}.offsets.npy"
        self._offsets = [0]
        self._text_bytes = self._text_tokens = 0

    def __enter__(self) -> "_Writer":
        self._file = open(self._path, "wb")
        self._header_size = self._write_header()
        return self

    def _write_header(self) -> int:
        # numpy pads this header so that a longer first axis fits in the same space.
        shape = (self._offsets[-1],)
        np.lib.format.write_array_header_1_0(self._file, dict(descr="<u4", fortran_order=False, shape=shape))
        return self._file.tell()

    def append(self, ids: np.ndarray, *, text_bytes: int, text_tokens: int) -> None:
        self._file.write(ids.astype("<u4").tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._text_bytes += text_bytes
        self._text_tokens += text_tokens

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                if self._write_header() != self._header_size:
                    raise RuntimeError(f"{self._path}: the header of {self._offsets[-1]} tokens does not fit")
        if kind is None:
            np.save(self._offsets_path, np.asarray(self._offsets, np.int64))

    def counts(self) -> dict[str, int]:
        return dict(
            documents=len(self._offsets) - 1,
            tokens=self._offsets[-1],
            text_bytes=self._text_bytes,
            text_tokens=self._text_tokens,
        )


def _open(directory: Path, split: Split, counts: dict[str, Any]) -> Corpus:
    files = [directory / f"{split}.npy", directory / f"{split}.offsets.npy"]
    # An empty file cannot be mapped.
    tokens = _load(files[0], np.uint32, counts["tokens"], mmap_mode="r" if counts["tokens"] else None)
    offsets = _load(files[1], np.int64, counts["documents"] + 1)
    if tokens is None or offsets is None:
        bad = [file.name for file, array in zip(files, (tokens, offsets), strict=True) if array is None]
        raise UserError(
            f"{directory}: {' and '.join(bad)}: not what data.json describes; remove the directory {directory}, and "
            "the same command makes it anew"
        )
    return Corpus(tokens, offsets, counts["text_bytes"], counts["text_tokens"])


def _load(file: Path, dtype: type, length: int, mmap_mode: Literal["r"] | None = None) -> np.ndarray | None:
    """The array of a file; None if the file is missing or damaged."""
    try:
        array = np.load(file, mmap_mode=mmap_mode)
    except Exception:  # NumPy lets through whatever its parsers raise for a damaged header
        return None
    is_whole = isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == (length,)
    return array if is_whole else None


def load_corpora(
    model: str | Path, config: ModelConfig, data: str, directory: Path, held_out_fraction: float
) -> dict[Split, Corpus]:
    """Both splits of a `--data` value, in tokens of the model directory's tokenizer: BOS, document, EOS.

    Raises:
        UserError: no text, no tokenizer, or one whose ids or special tokens lie beyond the model's vocabulary.
    """
    tokenizer = Tokenizer.from_directory(model)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{model}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else None
    for key, token in (("bos_token_id", bos), ("eos_token_id", eos)):
        if token is not None and token >= config.vocab_size:
            raise UserError(
                f"{model}: {key} of generation_config.json (or config.json) is {token}, the model's vocab_size is "
                f"{config.vocab_size}; correct it"
            )
    return tokenise(
        TextSource(data),
        directory,
        tokenizer.encode_batch,
        vocab_size=config.vocab_size,
        bos=bos,
        eos=eos,
        held_out_fraction=held_out_fraction,
        key=hashlib.sha256((Path(model) / "tokenizer.json").read_bytes()).hexdigest(),
    )
