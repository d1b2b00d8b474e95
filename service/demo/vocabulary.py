"""The demo's tokenizers, of whole words: WordPiece with BLIP's two extra tokens, and one for the language model."""

import re
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from service.demo.corpus import ANSWER, END, phrases
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


def build_language_tokenizer(folder: str | Path) -> None:
    """The same for the language model: the special tokens of OPT at their own ids, and the answer token."""
    special = ["<s>", "<pad>", END, "<unk>", ANSWER]
    found = {word for phrase in phrases() for word in re.findall(r"[a-z]+|[?.,]", re.sub("<.*?>", " ", phrase))}
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(found)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[ANSWER],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
