"""Readers of text: windows, masked windows, labelled texts, tagged words, conversations."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.chats import LEARNT_ROLE
from p2ptrain.data.samples import WindowSamples
from p2ptrain.data.streams import BLOCK_BYTES
from p2ptrain.errors import BundleError, DataError
from p2ptrain.training.feed import Samples
from p2ptrain.training.sampling import training_windows
from tests.data_cases import CONTEXT, manifest_for, opened, text_model, write_lines

IGNORED = -100
MASKS = {
    "input_ids": (("sequence",), "int64"),
    "attention_mask": (("sequence",), "float32"),
    "token_type_ids": (("sequence",), "int64"),
}
SENTENCE = "the quick brown fox jumps over a lazy dog and runs away from it all day long"
WORDS = SENTENCE.split()


def drawn(samples: Samples, count: int = 4) -> tuple[np.ndarray, ...]:
    feed = samples.training(seed=1, step=1, first_sample=0, count=count)
    return (*feed.inputs, feed.labels)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A word-piece tokenizer with the special tokens of BERT, written into `tmp_path`."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        [" ".join(WORDS)] * 3,
        trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return made


def file_model(path: Path, kind: str, **changes: object) -> Manifest:
    """A model with the tokenizer that lies in `path`."""
    content = (path / "tokenizer.json").read_bytes()
    return text_model(
        kind,
        **{
            "tokenizer": "tokenizer.json",
            "tokenizer_digest": hashlib.sha256(content).hexdigest(),
            "vocabulary": 60,
            "special_tokens": {"pad": 0, "unknown": 1, "cls": 2, "sep": 3, "mask": 4},
            **changes,
        },
    )


# Windows.


def test_text_file_is_mapped_and_gives_the_windows_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(200))
    (tmp_path / "text").write_bytes(content)
    data = opened(text_model("windows"), tmp_path / "text")
    assert data.description == "190 bytes of text; 10 held out"
    assert isinstance(data.samples, WindowSamples)
    assert isinstance(data.samples.training_tokens, np.memmap)
    inputs, labels = drawn(data.samples)
    tokens = np.frombuffer(content[:190], np.uint8)
    made = training_windows(tokens, seed=1, step=1, first_sample=0, count=4, context=CONTEXT)
    np.testing.assert_array_equal(inputs, made.inputs)
    np.testing.assert_array_equal(labels, made.labels)
    assert inputs.dtype == labels.dtype == np.int64
    held = data.samples.heldout(sample_count=2, first_sample=0, count=2).inputs[0]
    assert held[:, 0].tolist() == [190, 191]
    assert not (tmp_path / "cache").exists(), "a text of bytes is its own tokens"


def test_text_of_any_bytes_is_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00" * 50)
    assert opened(text_model("windows"), tmp_path / "text").description.startswith("141 bytes")


def test_folder_is_its_text_files_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "z.txt").write_text("second" * 5)
    (folder / "a.md").write_text("first" * 5)
    (folder / "skipped.bin").write_bytes(b"\0")
    (folder / ".hidden.txt").write_text("no")
    (folder / "empty.txt").write_text("")
    data = opened(text_model("windows"), folder)
    assert isinstance(data.samples, WindowSamples)
    whole = data.samples.training_tokens.tobytes() + data.samples.heldout_tokens.tobytes()
    assert whole == b"first" * 5 + b"second" * 5
    assert isinstance(data.samples.training_tokens, np.memmap)


def test_link_that_leads_back_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("once" * 10)
    (folder / "again").symlink_to(folder)
    assert opened(text_model("windows"), folder).description == "31 bytes of text; 9 held out"


def test_table_gives_its_texts_line_by_line(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three\nfour five"}])
    data = opened(text_model("windows"), lines, heldout=lines)
    assert isinstance(data.samples, WindowSamples)
    assert data.samples.training_tokens.tobytes() == b"one two\nthree\nfour five\n"
    (tmp_path / "a.csv").write_text('id,body\n1,"one, two"\n2,"three ""x""\nfour"\n')
    path = tmp_path / "a.csv"
    data = opened(text_model("windows"), path, heldout=path, text_field="body")
    assert isinstance(data.samples, WindowSamples)
    assert data.samples.training_tokens.tobytes() == b'one, two\nthree "x"\nfour\n'


def test_tokenised_text_is_written_once_and_mapped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS) for _ in range(4000)))
    assert text.stat().st_size > 3 * BLOCK_BYTES
    data = opened(file_model(tmp_path, "windows"), text)
    assert isinstance(data.samples, WindowSamples)
    whole = np.concatenate([data.samples.training_tokens, data.samples.heldout_tokens])
    expected = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    np.testing.assert_array_equal(whole, expected)
    assert isinstance(data.samples.training_tokens, np.memmap)
    (entry,) = (tmp_path / "cache").iterdir()
    written = (entry / "tokens.bin").stat().st_mtime_ns
    again = opened(file_model(tmp_path, "windows"), text)
    assert again.training_digest == data.training_digest
    assert (entry / "tokens.bin").stat().st_mtime_ns == written


def test_damaged_cache_is_made_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 20))
    before = drawn(opened(file_model(tmp_path, "windows"), text).samples)
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "tokens.bin").write_bytes(b"xx")
    after = drawn(opened(file_model(tmp_path, "windows"), text).samples)
    np.testing.assert_array_equal(after[0], before[0])


def test_masked_windows_hide_tokens_between_cls_and_sep(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 20))
    manifest = file_model(tmp_path, "masked-windows", inputs=MASKS, mask_probability=0.3)
    ids, mask, types, labels = drawn(opened(manifest, text).samples, 16)
    assert (mask == 1).all()
    assert mask.dtype == np.float32
    assert (types == 0).all()
    assert (ids[:, 0] == 2).all()
    assert (ids[:, -1] == 3).all()
    assert (labels[:, [0, -1]] == IGNORED).all()
    predicted = labels != IGNORED
    assert predicted.any(axis=1).all()
    assert (ids[predicted] == 4).any()
    held = [opened(manifest, text).samples.heldout(sample_count=4, first_sample=0, count=4)] * 2
    np.testing.assert_array_equal(held[0].labels, held[1].labels)


def test_masked_windows_need_a_mask_token(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(200))
    with pytest.raises(BundleError, match="without a mask token"):
        opened(text_model("masked-windows", mask_probability=0.1), tmp_path / "text")


def test_digests_cover_content_field_tokenizer_and_split(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    record = {"text": "one two three four five", "other": "one two three four five"}
    lines = write_lines(tmp_path / "a.jsonl", [record] * 10)
    more = write_lines(tmp_path / "b.jsonl", [record] * 11)
    plain, with_file = text_model("windows"), file_model(tmp_path, "windows")
    found = [
        opened(plain, lines),
        opened(plain, more),
        opened(plain, lines, text_field="other"),
        opened(with_file, lines),
        opened(plain, lines, heldout=more),
    ]
    assert len({data.training_digest for data in found}) == len(found)
    assert len({data.heldout_digest for data in found}) == len(found)
    assert len({data.samples.digest for data in found}) == len(found)
    assert opened(plain, lines).training_digest == found[0].training_digest


def test_text_that_is_written_to_while_in_use_is_noticed(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(200))
    samples = opened(text_model("windows"), text).samples
    text.write_bytes(bytes(20))
    with pytest.raises(DataError, match="has changed while it is in use"):
        drawn(samples)
    text.unlink()
    with pytest.raises(DataError, match="no such file"):
        drawn(samples)


# Texts.


def test_texts_are_padded_and_cut_and_labelled(tmp_path: Path) -> None:
    records = [{"text": "abc", "label": 0}, {"text": "a text too long", "label": 2}] * 10
    lines = write_lines(tmp_path / "a.jsonl", records)
    manifest = text_model(inputs=MASKS, special_tokens={"pad": 7})
    data = opened(manifest, lines)
    assert data.description == "20 texts, 3 classes; 1 held out"
    ids, mask, types, labels = drawn(data.samples, 19)
    assert ids.shape == mask.shape == types.shape == (19, CONTEXT)
    assert labels.shape == (19,)
    for row in range(19):
        text = records[0 if labels[row] == 0 else 1]["text"].encode()[:CONTEXT]
        assert ids[row].tolist() == [*text, *[7] * (CONTEXT - len(text))]
        assert mask[row].tolist() == [1.0] * len(text) + [0.0] * (CONTEXT - len(text))


def test_texts_are_framed_by_the_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.csv").write_text(
        "label,text\n" + "\n".join(f"{i % 3},{' '.join(WORDS[i % 9 :])}" for i in range(40))
    )
    ids, labels = drawn(opened(file_model(tmp_path, "texts"), tmp_path / "a.csv").samples, 16)
    assert (ids[:, 0] == 2).all()
    assert (ids[:, -1] == 3).all(), "a text that is cut keeps its last special token"
    assert set(labels.tolist()) <= {0, 1, 2}


def test_records_of_both_parts_are_disjoint_and_all(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": f"{i:03}", "label": 0} for i in range(100)])
    samples = opened(text_model(), lines, minibatch_size=5).samples
    trained = [
        samples.training(seed=3, step=step, first_sample=0, count=5).inputs[0]
        for step in range(1, 20)
    ]
    held = samples.heldout(sample_count=5, first_sample=0, count=5).inputs[0]
    numbers = [int(bytes(row[:3].astype(np.uint8))) for row in np.concatenate([*trained, held])]
    assert sorted(numbers) == list(range(100))


def test_words_as_labels_are_classes_in_sorted_order_and_it_says_so(tmp_path: Path) -> None:
    records = [{"text": label, "label": label} for label in ("sad", "glad", "mad")] * 5
    lines = write_lines(tmp_path / "a.jsonl", records)
    few = write_lines(tmp_path / "b.jsonl", records[:1])
    assert opened(text_model(), lines, heldout=few).notes
    data = opened(text_model(), lines, heldout=few)
    assert data.notes == ("classes by name, in order: 0 glad, 1 mad, 2 sad",)
    ids, labels = drawn(data.samples, 15)
    names = ["glad", "mad", "sad"]
    for row in range(15):
        assert bytes(ids[row].astype(np.uint8)).rstrip(b"\0").decode() == names[labels[row]]
    assert data.samples.heldout(sample_count=1, first_sample=0, count=1).labels.tolist() == [2]


def test_class_names_of_the_bundle_decide(tmp_path: Path) -> None:
    lines = write_lines(
        tmp_path / "a.jsonl", [{"text": "x", "label": "no"}, {"text": "y", "label": 0}] * 4
    )
    data = opened(text_model(classes=2, class_names=("yes", "no")), lines)
    assert data.notes == ()
    ids, labels = drawn(data.samples, 7)
    assert labels.tolist() == [1 if row[0] == ord("x") else 0 for row in ids]


@pytest.mark.parametrize(
    ("labels", "loss", "classes", "value", "expected"),
    [
        (((), "float32"), "mse", 0, 2.5, 2.5),
        ((("1",), "float32"), "mse", 0, "2.5", [2.5]),
        ((("2",), "float32"), "l1", 0, [1, -2], [1.0, -2.0]),
        ((("3",), "float32"), "bce", 3, 1, [0.0, 1.0, 0.0]),
        ((("3",), "float32"), "bce", 3, [1, 0, 1], [1.0, 0.0, 1.0]),
        (((), "float32"), "bce", 2, True, 1.0),
    ],
)
def test_labels_take_the_shape_of_the_port(
    tmp_path: Path, labels: object, loss: str, classes: int, value: object, expected: object
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x", "label": value}] * 2)
    manifest = text_model(labels=labels, loss=loss, classes=classes)
    found = drawn(opened(manifest, lines).samples, 1)[-1]
    assert found.dtype == np.float32
    assert found[0].tolist() == expected


# Words.


def test_word_labels_lie_at_first_bytes(tmp_path: Path) -> None:
    record = {"words": ["ab", "c", "defghi"], "tags": [1, 0, 2]}
    lines = write_lines(tmp_path / "a.jsonl", [record] * 2)
    ids, labels = drawn(opened(text_model("words"), lines).samples, 1)
    assert bytes(ids[0].astype(np.uint8)) == b"ab c def"
    assert labels[0].tolist() == [1, -100, -100, 0, -100, 2, -100, -100]


def test_word_labels_lie_at_first_sub_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"tokens": ["dogfox", "day"], "ner": ["B", "O"]}
    lines = write_lines(tmp_path / "a.jsonl", [record] * 2)
    manifest = file_model(tmp_path, "words", inputs=MASKS, classes=2, class_names=("O", "B"))
    options = {"text_field": "tokens", "label_field": "ner"}
    ids, mask, _, labels = drawn(opened(manifest, lines, **options).samples, 1)
    origins = tokenizer.encode(record["tokens"], is_pretokenized=True).word_ids
    assert mask[0].sum() == min(len(origins), CONTEXT)
    first = [origins.index(word) for word in (0, 1)]
    assert labels[0, first].tolist() == [1, 0]
    assert (np.delete(labels[0], first) == IGNORED).all()
    assert ids[0, 0] == 2


# Conversations.


def chat(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_conversation_teaches_what_the_assistant_says(tmp_path: Path) -> None:
    turns = (("user", "hi"), ("assistant", "hello you"), ("user", "bye"), ("assistant", "ok"))
    lines = write_lines(tmp_path / "a.jsonl", [chat(*turns)] * 3)
    data = opened(text_model("windows"), lines)
    assert data.description.startswith("3 conversations, ")
    inputs, labels = drawn(data.samples, 40)
    rendered = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    learnt = np.zeros(len(rendered), bool)
    for role, text in turns:
        if role == LEARNT_ROLE:
            begin = rendered.index(f"{role}\n{text}") + len(role) + 1
            learnt[begin : begin + len(f"{text}<|im_end|>")] = True
    windows = {
        start: learnt[start + 1 : start + 1 + CONTEXT] for start in range(0, len(rendered), CONTEXT)
    }
    expected = {
        (rendered[start : start + CONTEXT][: len(counted)], tuple(counted))
        for start, counted in windows.items()
        if counted.any()
    }
    found = set()
    for row in range(40):
        counted = labels[row] != IGNORED
        text = bytes(inputs[row].astype(np.uint8)).rstrip(b"\0").decode()
        found.add((text, tuple(counted[: len(text)])))
        place = rendered.index(text)
        after = rendered.encode()[place + 1 : place + 1 + CONTEXT]
        assert all(labels[row, i] == after[i] for i in range(CONTEXT) if counted[i])
    assert found == expected


def test_conversation_shorter_than_the_context_is_padded(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [chat(("assistant", "x"))] * 2)
    manifest = manifest_for(
        "windows",
        inputs={"input_ids": (("64",), "int64"), "attention_mask": (("64",), "int64")},
        labels=(("64",), "int64"), tokenizer="bytes", vocabulary=256, context=64,
    )  # fmt: skip
    ids, mask, labels = drawn(opened(manifest, lines).samples, 1)
    length = len("<|im_start|>assistant\nx<|im_end|>\n") - 1
    assert mask[0].tolist() == [1] * length + [0] * (64 - length)
    assert bytes(labels[0][labels[0] != IGNORED].astype(np.uint8)) == b"x<|im_end|>"
    assert (ids[0, length:] == 0).all()
