"""The length of a text encoder's input; longer texts are shortened, with a warning."""

from __future__ import annotations

import bisect
import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from picardopt_3d.prompts import DIRECTIONS, TextPrompt

_NAMED = 3  # number of texts that one warning quotes


@dataclass(frozen=True, eq=False)
class TextContext:
    """The length of a text encoder's input.

    Longer texts are shortened by whole words at their end. A tokenizer's own truncation would not warn, and would cut
    the words for the view first, which come last.

    Attributes:
        tokenizer: A tokenizer of transformers.
        tokens: Number of tokens that the encoder reads, including those that begin and end a text.
        lower: Whether texts are first converted to lower case and stripped, as in DeepFloyd.
    """

    tokenizer: Any
    tokens: int
    lower: bool = False

    def shorten(self, prompt: TextPrompt) -> TextPrompt:
        """Returns the prompt with as much of its text as fits beside the words for the view.

        Every direction gets the same part of the prompt, so that its texts differ only in the words for the view.

        Args:
            prompt: The prompt.

        Raises:
            ValueError: The words for the view do not fit even without the prompt.
        """
        if prompt.views is not None:
            for name, text in zip(DIRECTIONS, prompt.views.texts(""), strict=True):
                if not self._fit([text]):
                    raise ValueError(
                        f"{name}={getattr(prompt.views, name)!r} is longer than the {self.tokens} tokens that the text "
                        "encoder reads, without the prompt: give fewer view words"
                    )
        text, rest = self._split(
            prompt.text, lambda part: dataclasses.replace(prompt, text=part).texts()
        )
        negative, negative_rest = self._split(prompt.negative, lambda part: (part,))
        note = "" if prompt.views is None else ", view words included"
        self._warn([("prompt", rest), ("negative prompt", negative_rest)], note)
        if not rest and not negative_rest:
            return prompt
        return dataclasses.replace(prompt, text=text, negative=negative)

    def tokenize(self, texts: Sequence[str]) -> Any:
        """Returns the tokens of texts, padded to the context; texts that are too long are shortened.

        Args:
            texts: Texts, `[batch]`.

        Returns:
            The tokenizer's output, with `input_ids` and `attention_mask`, each `[batch, tokens]`.
        """
        parts = [self._split(text, lambda part: (part,)) for text in texts]
        self._warn(
            [(f"text {text[:40]!r}", rest) for text, (_, rest) in zip(texts, parts, strict=True)]
        )
        return self.tokenizer(
            [self._clean(kept) for kept, _ in parts],
            padding="max_length",
            truncation=True,
            max_length=self.tokens,
            return_tensors="pt",
        )

    def _split(self, text: str, wrap: Callable[[str], Sequence[str]]) -> tuple[str, str]:
        """Returns the longest beginning of a text that fits, and the rest ("" if the whole text fits).

        Args:
            text: The text; it is split between two words or, if not even its first word fits, between two characters.
            wrap: Maps a beginning to the texts that the encoder will read.
        """
        if self._fit(wrap(text)):
            return text, ""
        ends = [0, *(word.end() for word in re.finditer(r"\S+", text))]
        first = ends[1] if len(ends) > 1 else len(text)
        if not self._fit(wrap(text[:first])):
            ends = list(range(first + 1))
        fitting = bisect.bisect_left(ends, True, key=lambda end: not self._fit(wrap(text[:end])))
        end = ends[max(0, fitting - 1)]
        return text[:end], text[end:].strip()

    def _fit(self, texts: Sequence[str]) -> bool:
        """Returns whether all texts fit."""
        rows = self.tokenizer([self._clean(text) for text in texts], verbose=False).input_ids
        return max(len(row) for row in rows) <= self.tokens

    def _clean(self, text: str) -> str:
        return text.lower().strip() if self.lower else text

    def _warn(self, left_out: Sequence[tuple[str, str]], note: str = "") -> None:
        """Warns once about everything that is left out; with several processes only the first one warns."""
        said = [f"{name} is left out: {rest!r}" for name, rest in left_out if rest]
        if not said or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
            return
        more = f"; and of {len(said) - _NAMED} more" if len(said) > _NAMED else ""
        warnings.warn(
            f"the text encoder reads {self.tokens} tokens{note}: the end of the "
            + "; of the ".join(said[:_NAMED])
            + more,
            stacklevel=3,
        )
