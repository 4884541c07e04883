"""Whether a text is Spanish, as far as a program without a dictionary can tell."""

from __future__ import annotations

import re

COMMON = (
    "el la los las un una unos unas lo al del de que y en por para con sin se su sus es son era eran fue fueron "
    "ser está están como más pero si ya muy también hay ha han había sobre entre hasta desde cuando donde porque "
    "este esta estos estas ese esa esto eso todo toda todos todas cada otro otra otros otras uno dos tres puede "
    "pueden tiene tienen hace hacen debe deben mi tu nos le les te o u e ni cual cuales quien qué cómo sea ante "
    "tras según durante mucho mucha muchos muchas gran él ella yo no sí me va da"
)  # fmt: skip
ENGLISH = (
    "the of and to is in that it for with as are on this by be an from can i you was were which they their its "
    "have has or at not what but your about more we our these those who when how been also used use one many"
)  # fmt: skip
LEAST_WORDS = 4
COMMON_SHARE = (0.25, 0.8)  # of all words: a sentence has words of both kinds
SHAPED_SHARE = 0.8  # of the words that are not common
DIFFERENT_SHARE = 0.6
ENGLISH_SHARE = 0.1
WORD = re.compile(r"[^\W\d_]+")
LETTERS = re.compile("[a-záéíóúüñ]{3,}")
VOWEL = re.compile("[aeiouáéíóú]")
FOREIGN = re.compile(
    r"[kw]|([bdfghjmpqstvxyz])\1|[^aeiouáéíóúü]{4}|[^aeiouáéíóúnrsldzjy]$"
)  # no Spanish word has these


def is_spanish(text: str, question: str = "") -> bool:
    """Common Spanish words, others in the shape of Spanish words, hardly an English one, and nothing over and over.

    Words of the question do not count: what is asked about keeps its name. A text may be cut anywhere, so a last word with
    nothing after it counts only where it is needed.
    """
    asked = WORD.findall(question.lower())
    words = [word for word in WORD.findall(text.lower()) if word not in asked]
    if len(words) > LEAST_WORDS and text[-1].isalpha():
        words.pop()
    count = len(words)
    if count < LEAST_WORDS or any(word == words[index + 1] for index, word in enumerate(words[:-1])):
        return False
    others = [word for word in words if word not in COMMON.split()]
    return (
        COMMON_SHARE[0] <= 1 - len(others) / count <= COMMON_SHARE[1]
        and sum(has_shape(word) for word in others) >= SHAPED_SHARE * len(others)
        and len(set(words)) >= DIFFERENT_SHARE * count
        and sum(word in ENGLISH.split() for word in words) <= ENGLISH_SHARE * count
    )


def has_shape(word: str) -> bool:
    """Whether a word of small letters could be Spanish by its letters, its vowels, its doubled letters and its end."""
    return bool(LETTERS.fullmatch(word) and VOWEL.search(word) and not FOREIGN.search(word))
