"""An encoder to pretrain on this Python's own text: its tokenizer, its configuration, the text.

    python tools/docstring_pretraining.py --corpus DIR --out DIR

Reads the corpus that `tools/docstring_corpus.py` wrote and makes DIR/pretraining.txt, one document
a line: every docstring of the standard library and every paragraph of the language reference, but
nothing that holds a held-out text. DIR/encoder/ is a Hugging Face folder without weights, a BERT
configuration and a word-piece tokenizer made from that text. Needs the `text` extra. The text is
the same on every machine with the same version of Python; the tokenizer is not, as its library
breaks ties by chance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.demo.corpus import library_docstrings, normalise, pydoc_topics

SPECIAL_TOKENS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES: Final = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
WORDS_MIN: Final = 3


def main() -> int:
    """Write the text and the folder, and say what is in them."""
    parser = argparse.ArgumentParser(description="make an encoder and the text to pretrain it on")
    parser.add_argument("--corpus", type=Path, required=True, help="of docstring_corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="folder, made if missing")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens at most")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64, help="tokens of a sample at most")
    arguments = parser.parse_args()
    heldout = read_texts(arguments.corpus / "heldout.jsonl")
    train = read_texts(arguments.corpus / "train.jsonl")
    library = Path(sysconfig.get_paths()["stdlib"])
    lines = pretraining_lines([*train, *library_lines(library)], heldout)
    encoder = arguments.out / "encoder"
    encoder.mkdir(parents=True, exist_ok=True)
    text = arguments.out / "pretraining.txt"
    text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{text}: {len(lines)} documents, {text.stat().st_size} bytes")
    tokens = write_tokenizer(encoder, lines, vocabulary=arguments.vocabulary)
    config = configuration(
        tokens, layers=arguments.layers, width=arguments.width, context=arguments.context
    )
    (encoder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(f"{encoder}: {tokens} tokens, {arguments.layers} layers of width {arguments.width}")
    return 0


def read_texts(path: Path) -> list[str]:
    """The texts of a corpus file, in order."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def library_lines(library: Path) -> Iterator[str]:
    """Docstrings of every module, and the paragraphs of the language reference; one line each."""
    for docstring in library_docstrings(library):
        yield " ".join(normalise(docstring).split())
    for topic in pydoc_topics(library):
        for paragraph in normalise(topic).split("\n\n"):
            yield " ".join(paragraph.split())


def pretraining_lines(texts: Iterable[str], heldout: Sequence[str]) -> list[str]:
    """Distinct texts without those that hold a held-out one, in the order of their hashes.

    Whatever the case; joined by line ends, the result holds no held-out text either, because none
    has a line end.
    """
    first = {text.lower(): text for text in texts if len(text.split()) >= WORDS_MIN}
    hidden = [text.lower() for text in heldout]
    kept = [key for key in first if not any(text in key for text in hidden)]
    return [first[key] for key in sorted(kept, key=_digest)]


def write_tokenizer(folder: Path, lines: Sequence[str], *, vocabulary: int) -> int:
    """Make the word pieces and write the tokenizer's files; gives the number of tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import WordPieceTrainer

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ids
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    spelled = dict(zip(ROLES, SPECIAL_TOKENS, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(spelled, indent=1) + "\n")
    return int(tokenizer.get_vocab_size())


def configuration(
    tokens: int, *, layers: int, width: int, context: int
) -> dict[str, Any]:  # Any: JSON
    """A `config.json` of BERT with heads of 32 columns."""
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": tokens,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "intermediate_size": 4 * width,
        "max_position_embeddings": context,
        "pad_token_id": SPECIAL_TOKENS.index("[PAD]"),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
