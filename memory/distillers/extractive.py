"""The built-in distiller: picks the words and the one detail that tell an exchange apart; deterministic, no model.

Core: every word is the exchange's own. What is deleted is what says little: function words, repetitions, then the
words of least value, until the budget is met; what stays keeps its order, the user's words in the first sentence and
the answer's in the second. Value of a term = weight * tf / (tf + 3/2), a little less the later it first occurs; the
weight grows with the word's length and is lower for what nearly every exchange with a coding agent says.

Budget: tokens are allotted by what there is to say. The record grows with the exchange's size to the power 0.4, and an
exchange that changed files gets three times that of one that did not.

Statistics of the exchange alone are used, so that a record depends on no other exchange and on no order.
Measured in benchmarks/recall_quality.py; the constants of `Weights` were chosen on its tuning half of queries, but see
its headnote on what that half does not guard against.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from workbench.memory.distillers._words import CHATTER, FUNCTION
from workbench.memory.rooms import assign_rooms
from workbench.memory.tokens import count_tokens
from workbench.memory.types import Distilled, Exchange, Failed

_CHARS_PER_TOKEN = 4.3
_MAX_WORD_CHARS = 48
_MAX_LEXICON = 500_000
_MAX_OPENING_WORDS = 12

# Words, and between them the marks that end a clause. Scripts that write no blanks are cut into groups of four.
_MARK = r"[.!?:;,](?=\s)|\n|[()|]"
_TOKEN = re.compile(rf"\w++(?:['’-]\w++)*+|{_MARK}")
_WIDE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WIDE_TOKEN = re.compile(rf"[{_WIDE}]{{1,4}}|[^\W{_WIDE}]++(?:['’-][^\W{_WIDE}]++)*+|{_MARK}")
_IS_WIDE = re.compile(f"[{_WIDE}]")
_MARKS = frozenset(".!?:;,\n()|")
_TAG = re.compile(r"</?[A-Za-z][^<>\n]{0,200}>")
_URL = re.compile(r"\bhttps?://\S+")
_HASH = re.compile(r"(?=[a-f-]*\d)[0-9a-f]{7,}|[0-9a-f]{8}-[0-9a-f-]{27}")
_CODED = re.compile(r"[_\d]|[a-z][A-Z]")

_CODE_SPAN = re.compile(r"`([^`\n]{3,60})`")
_OPTION = re.compile(r"--[a-z][\w-]+")
# Each is a literal to look for, which is many times faster than one alternation.
_ERRORS = [
    re.compile(rf"{name}\b(?::[ \t]?|[ \t])[^\n`]{{8,80}}") for name in ("rror", "xception", "panic", "FAIL", "fatal")
]
# In the development corpus 95 % of the answers with these words changed files, and 74 % of those that did have them.
_WORK_DONE = re.compile(
    r"\b(?:[Ll]et me|I'll|I've|I have|[Nn]ow)(?: now| also| I)?"
    r" (?:add|updat|fix|creat|writ|implement|edit|remov|chang|renam|refactor|replac)(?:e|ed|te|ten|d)?\b"
)
_MIN_ERROR_CHARS = 14
_MIN_DETAIL_TOKENS = 7.0
_MAX_CONCEPTS = 8  # of the terms of most value; the most frequent of them names the room
_BREAK = re.compile(r"[.;,](?=\s|$)|\s+[-–—(]\s?")


@dataclass(frozen=True, slots=True)
class Weights:
    """Chosen on the tuning half of the development queries.

    Args:
        least, scale, exponent: budget in tokens = max(least, scale * (tokens of the exchange) ** exponent).
        changed_files: the budget of an exchange that changed files is so many times larger.
        chatter, number: weights of words that every exchange says, and of words that begin with a digit.
        length: exponent of (letters / 8) in the weight of a word, letters counted up to 12.
        half: the term frequency at which a term has half its value.
        late: what a term loses if it first occurs at the end.
        detail_share: the most of the budget that the context may take.
    """

    least: float = 16.0
    scale: float = 2.1
    exponent: float = 0.4
    changed_files: float = 3.0
    chatter: float = 0.7
    number: float = 0.5
    length: float = 0.5
    half: float = 1.5
    late: float = 0.4
    detail_share: float = 0.35


class Extractive:
    """The distiller "extractive/1"."""

    name = "extractive/1"

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = weights or Weights()
        self._lexicon = _Lexicon(self.weights)

    def distil(self, exchanges: Iterable[Exchange]) -> Iterator[tuple[Exchange, Distilled | Failed]]:
        """Yields a record for every exchange, in their order; Failed only where there is no word at all."""
        for exchange in exchanges:
            yield exchange, self.distil_one(exchange)

    def distil_one(self, exchange: Exchange) -> Distilled | Failed:
        """The record of one exchange."""
        if not exchange.text.strip():
            return Failed("the exchange holds no words")
        texts = _tokens(exchange.user_text), _tokens(exchange.assistant_text)
        counts = Counter(texts[0])
        counts.update(texts[1])
        values, words = self._values(counts)
        ranked = sorted(values, key=values.__getitem__, reverse=True)
        budget = self._budget(exchange)
        context, covered = self._context(exchange, values, words, ranked, budget)
        lexicon = self._lexicon
        left = budget - count_tokens(context)
        chosen: set[str] = set()
        for key in ranked:
            if left < 1:
                break
            tokens = lexicon[words[key]][2]
            if tokens <= left and key not in covered:
                left -= tokens
                chosen.add(key)
        written = {word: key for word in counts if (key := lexicon[word][0]) in chosen}
        core = _core(written, len(chosen), texts)
        if not core:
            core = _opening(exchange.text, budget)
            context = "" if context in core else context
        telling = [words[key] for key in ranked[:_MAX_CONCEPTS] if not _is_chatter(words[key].lower(), key)]
        concepts = sorted(telling, key=counts.__getitem__, reverse=True)
        return Distilled(core, context, assign_rooms(exchange, concepts))

    def _budget(self, exchange: Exchange) -> float:
        w = self.weights
        size = (len(exchange.user_text) + len(exchange.assistant_text)) / _CHARS_PER_TOKEN
        factor = w.changed_files if _changed_files(exchange) else 1.0
        return min(size, max(w.least, w.scale * size**w.exponent * factor))

    def _values(self, counts: Counter[str]) -> tuple[dict[str, float], dict[str, str]]:
        """Key → value and key → word as first written, both in the order of the text."""
        lexicon = self._lexicon
        if len(lexicon) > _MAX_LEXICON:
            lexicon.clear()
        frequency: dict[str, int] = {}
        words: dict[str, str] = {}
        for word, count in counts.items():
            key, weight, _ = lexicon[word]
            if not weight:
                continue
            if key in frequency:
                frequency[key] += count
            else:
                frequency[key] = count
                words[key] = word
        half, slope = self.weights.half, self.weights.late / (len(words) or 1)
        values = {
            key: lexicon[words[key]][1] * n / (n + half) * (1.0 - slope * rank)
            for rank, (key, n) in enumerate(frequency.items())
        }
        return values, words

    def _context(
        self, exchange: Exchange, values: dict[str, float], words: dict[str, str], ranked: list[str], budget: float
    ) -> tuple[str, set[str]]:
        """The detail whose words are worth most for their tokens, else the best name or number; and their keys."""
        best, best_worth, best_keys = "", 0.0, set[str]()
        limit = max(_MIN_DETAIL_TOKENS, budget * self.weights.detail_share)
        lexicon = self._lexicon
        for detail, factor in _details(exchange, limit * _CHARS_PER_TOKEN * 1.5).items():
            keys = dict.fromkeys(lexicon[word][0] for word in _tokens(detail))  # ordered: the sum is the same each time
            worth = factor * sum(values.get(key, 0.0) for key in keys)
            if worth <= best_worth:
                continue
            tokens = count_tokens(detail)
            worth /= tokens**0.5
            if worth > best_worth and tokens <= limit:
                best, best_worth, best_keys = detail, worth, set(keys)
        if not best:
            coded = next((key for key in ranked if _CODED.search(words[key]) and lexicon[words[key]][2] <= limit), None)
            if coded:
                return words[coded], {coded}
        return best, best_keys


class _Lexicon(dict[str, tuple[str, float, int]]):
    """Word as written → (key, weight, tokens); the weight of what is never kept is 0."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def __missing__(self, word: str) -> tuple[str, float, int]:
        low = word.lower().replace("’", "'")
        key = stem(low)
        entry = self[word] = (key, self._weigh(word, low, key), count_tokens(f" {word}"))
        return entry

    def _weigh(self, word: str, low: str, key: str) -> float:
        if (
            low in FUNCTION
            or word in _MARKS
            or (len(low) == 1 and low.isascii())
            or len(low) > _MAX_WORD_CHARS
            or _HASH.fullmatch(low)
        ):
            return 0.0
        if _is_chatter(low, key):
            return self._weights.chatter * (min(len(low), 12) / 8) ** self._weights.length
        kind = self._weights.number if word[0].isdigit() else 1.0
        return kind * (min(len(low), 12) / 8) ** self._weights.length


def _changed_files(exchange: Exchange) -> bool:
    """From the tool calls; where the log tells of none, from the answer's words ("let me add", "I've updated")."""
    if any(file.action in ("modified", "created", "deleted") for file in exchange.files):
        return True
    return not exchange.tools and _WORK_DONE.search(exchange.assistant_text) is not None


def _is_chatter(low: str, key: str) -> bool:
    return low in CHATTER or key in CHATTER


def stem(low: str) -> str:
    """A light stem of a lower-case English word, so that "commits", "committed" and "committing" count as one."""
    low = low.removesuffix("'s")
    for suffix in ("ings", "ing", "edly", "ies", "ied", "es", "ed", "ly", "s"):
        if low.endswith(suffix) and len(low) - len(suffix) >= 3:
            low = low[: -len(suffix)]
            break
    if len(low) > 3 and low[-1] in "ey":
        low = low[:-1]
    if len(low) > 3 and low[-1] == low[-2] and low[-1] not in "ls":
        low = low[:-1]
    return low


def _tokens(text: str) -> list[str]:
    """Words and clause marks; tags and addresses are left out."""
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "://" in text:
        text = _URL.sub(" ", text)
    wide = not text.isascii() and _IS_WIDE.search(text)
    return (_WIDE_TOKEN if wide else _TOKEN).findall(text)


def _details(exchange: Exchange, longest: float) -> dict[str, float]:
    """Candidates for the context, verbatim, with a factor for their kind: errors, options, code spans.

    Args:
        longest: in characters.
    """
    found: dict[str, float] = {}
    for text in (exchange.user_text, exchange.assistant_text):
        for pattern in _ERRORS:
            for match in pattern.finditer(text):
                start = match.start()
                while start and text[start - 1].isalnum():
                    start -= 1
                error = _BREAK.split(text[start : match.end()], maxsplit=1)[0].rstrip()
                if _MIN_ERROR_CHARS <= len(error) <= longest:
                    found.setdefault(error, 1.3)
        for match in _OPTION.finditer(text):
            before = text[match.start() - 1 : match.start()]
            if len(match.group()) <= longest and not (before.isalnum() or before in ("-", "_")):
                found.setdefault(match.group(), 1.0)
        for span in _CODE_SPAN.findall(text):
            if len(span) <= longest:
                found.setdefault(span.strip(), 1.1 if _CODED.search(span) or "/" in span or " " in span else 0.9)
    found.pop("", None)
    return found


def _core(written: dict[str, str], num_terms: int, texts: tuple[list[str], list[str]]) -> str:
    """The chosen terms as they stand in as few clauses as hold them all, in the order of the text.

    Args:
        written: word as written → key of its term.
    """
    clauses: list[dict[str, str]] = []
    answer_from = 0
    relevant = written.keys() | _MARKS
    for tokens in texts:
        answer_from = len(clauses)
        clause: dict[str, str] = {}
        for token in [token for token in tokens if token in relevant]:
            if token in written:
                clause.setdefault(written[token], token)
            elif clause:
                clauses.append(clause)
                clause = {}
        if clause:
            clauses.append(clause)
    taken = _cover(num_terms, clauses)
    asked = [word for i, words in taken if i < answer_from for word in words]
    answered = [word for i, words in taken if i >= answer_from for word in words]
    return ". ".join(" ".join(words) for words in (asked, answered) if words)


def _cover(num_terms: int, clauses: list[dict[str, str]]) -> list[tuple[int, list[str]]]:
    """Greedy set cover: (clause number, the words taken from it) in order, until every term is taken once."""
    taken: list[tuple[int, list[str]]] = []
    seen: set[str] = set()
    heap = [(-len(clause), i) for i, clause in enumerate(clauses)]
    heapify(heap)
    while heap and len(seen) < num_terms:
        _, i = heappop(heap)
        fresh = clauses[i].keys() - seen
        if heap and fresh and -len(fresh) > heap[0][0]:
            heappush(heap, (-len(fresh), i))
        elif fresh:
            taken.append((i, [word for key, word in clauses[i].items() if key in fresh]))
            seen |= fresh
    return sorted(taken)


def _opening(text: str, budget: float) -> str:
    """The first words of a text that has none worth choosing ("ok, do it")."""
    words = text.split()
    letters = re.search(r"[^\W\d_]{2,20}", words[0])
    if len(words[0]) > _MAX_WORD_CHARS and letters:
        return letters.group()
    kept = words[0]
    for word in words[1:_MAX_OPENING_WORDS]:
        if count_tokens(f"{kept} {word}") > budget:
            break
        kept = f"{kept} {word}"
    return kept
