"""Splits captions into words like COCO's caption evaluation, without Java.

COCO's server splits captions by Stanford's PTBTokenizer (`-preserveLines -lowerCase`) and drops punctuation. This
module implements the rules that captions need. tests/evaluation/caption_sample.json has the Java program's results.
"""

import re

_PUNCTUATION = frozenset(("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00b4": "'"})
# COCO's list of dropped punctuation has these in upper case, but they are lower case by then, so they stay as words.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ABBREVIATIONS = "mr|mrs|ms|dr|st|jr|sr|vs|etc|mt|ave|co|corp|inc|ltd|gen|col|sgt|prof|rev|gov|sen|dept|ft"
_TOKEN = re.compile(
    r"https?://\S+|[\w.]+@[\w.]+\w"
    r"|(?:[^\W\d_]\.){2,}"  # u.s.
    rf"|(?:{_ABBREVIATIONS})\.(?=\s+\S)"
    r"|\d+(?:[.,:/]\d+)+"  # 1,000 and 5:30
    r"|'n'|'(?:s|d|m|ll|re|ve|em|til|tis|twas|\d\ds?)(?!\w)"
    r"|[^\W\d]+\.[^\W\d]+"  # a full stop without a space after it
    r"|\w+(?:[-/]\w+)*(?:'\w+)*(?:-\w+)*"
    r"|\.{2,}|-{2,}|[!?]{2,}|\S"
)
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|d|m|ll|re|ve))$")
_JOINED = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "lemme": "lem me",
    "gimme": "gim me",
    "wanna": "wan na",
}


def ptb_words(text: str) -> str:
    """Return a caption as lower-case words and single spaces, with clitics split off (`man 's`) and no punctuation."""
    words: list[str] = []
    for token in _TOKEN.findall(text.translate(_QUOTES).lower()):
        clitics: list[str] = []
        while found := _CLITIC.fullmatch(token):
            token, clitic = found.groups()
            clitics.insert(0, clitic)
        if token in _JOINED:
            words += _JOINED[token].split()
        elif token not in _PUNCTUATION and token.strip(".-"):
            words.append(_BRACKETS.get(token, token))
        words += clitics
    return " ".join(words)
