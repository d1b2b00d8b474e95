"""A frozen OPT with perceptual encoders as the service uses it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adapters.config import Task
from adapters.errors import MissingPart
from adapters.families.base import EncoderDims, OptDims
from service.backbone.base import TOKENIZER, Backbone, BackboneManifest, TokenizedText
from service.backbone.config import OptConfig
from service.backbone.opt import Opt


class OptBackbone(Backbone):
    """Answers questions and writes captions, of pictures, clips and sounds as far as there are encoders for them."""

    model: Opt

    def __init__(self, model: Opt, manifest: BackboneManifest, tokenizer: Any | None) -> None:
        super().__init__(model, manifest, tokenizer)
        self.config: OptConfig = model.config

    def dims(self) -> OptDims:
        """See Backbone."""
        language_model = self.config.language_model
        encoders = {name: EncoderDims(part.width, part.layers) for name, part in self.config.encoders.items()}
        return OptDims(language_model.width, language_model.layers, language_model.word_width, encoders)

    def head_tensors(self) -> dict[str, Tensor]:
        """See Backbone: none."""
        return {}

    def require(self, task: Task, *, heads: Sequence[str] = ()) -> None:
        """See Backbone. Which encoder is needed the adapter says, by its parts."""
        if task == "retrieval":
            raise MissingPart("a language model does not retrieve")
        if TOKENIZER not in self.parts:
            raise MissingPart(f"this backbone has no {TOKENIZER}, which {task} needs")

    def tokenize(self, text: str) -> TokenizedText:
        """The start token and the words of a text. Raises: MissingPart without a tokenizer."""
        words = self.words_of(text, add_special_tokens=False)
        return TokenizedText((self.config.special_ids.bos, *words.ids), words.unknown)

    def tokenize_answers(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Start token, words, end token of each candidate answer. Raises: MissingPart without a tokenizer."""
        ids = self.config.special_ids
        encoded = self.require_tokenizer()(list(texts), add_special_tokens=False)["input_ids"]
        return [(ids.bos, *words, ids.eos) for words in encoded]

    def question(self, text: str, answer_token: int | None) -> TokenizedText:
        """A question as eP-ALM puts it: with a question mark and the answer token behind it, or else the end token.

        Whatever the question ends in: a question mark more than it had is what the adapters were trained on.
        Raises: MissingPart without a tokenizer. Source: the authors' `train_vqa.py`.
        """
        if answer_token is None:
            tokens = self.tokenize(text)
            return TokenizedText((*tokens.ids, self.config.special_ids.eos), tokens.unknown)
        tokens = self.tokenize(f"{text}?")
        return TokenizedText((*tokens.ids, answer_token), tokens.unknown)

    def answer_token(self, text: str | None) -> int | None:
        """The id of an answer token, `</a>` say; None without a tokenizer, or without a text.

        One that the tokenizer does not know gets the id behind its last, as the authors add theirs without another row of
        embeddings. Raises: MissingPart where the language model has no such row.
        """
        if text is None or self.tokenizer is None:
            return None
        vocabulary = self.tokenizer.get_vocab()
        token: int = vocabulary.get(text, len(self.tokenizer))
        if token >= self.config.language_model.vocab_size:
            raise MissingPart(f"the language model has no row for {text!r}, which its tokenizer does not know")
        return token

    def special_tokens(self) -> frozenset[int]:
        """See Backbone."""
        return frozenset(self.config.special_ids.model_dump().values())
