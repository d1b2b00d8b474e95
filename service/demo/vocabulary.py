"""The demo's tokenizer: a WordPiece vocabulary of whole words, with BLIP's two extra tokens at its end."""

from pathlib import Path

from transformers import BertTokenizer

from service.demo.wording import words

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DECODE_TOKEN = "[DEC]"  # opens a generated answer
ENCODE_TOKEN = "[ENC]"  # opens a text read together with a picture
MAX_TEXT_TOKENS = 64


def vocabulary() -> list[str]:
    """Every token in the order of its id."""
    return [*BERT_TOKENS, "?", ",", ".", *"0123456789", *words(), DECODE_TOKEN, ENCODE_TOKEN]


def build_tokenizer(folder: str | Path) -> None:
    """Writes a folder that `AutoTokenizer.from_pretrained` loads without a network."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        do_lower_case=True,
        bos_token=DECODE_TOKEN,
        additional_special_tokens=[ENCODE_TOKEN],
        model_max_length=MAX_TEXT_TOKENS,
    )
    tokenizer.save_pretrained(folder)
