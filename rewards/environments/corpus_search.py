"""Search in a corpus of the user's, as a tool: an index in memory, no network.

Source of the ranking: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009), eq. 3.15,
with the inverse document frequency of Lucene, which is never negative.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import ConfigError

_WORD = re.compile(r"\w+")
K1, B = 1.2, 0.75  # saturation of a word's count; how far a passage's length counts


class CorpusSearch:
    """Its method `search` is the tool. `corpus`: a file .jsonl or .parquet with a column `text` and perhaps `title`, or
    .txt with an empty line between passages. It must be readable on each node that runs environments."""

    def __init__(self, corpus: str, results: int = 3, max_passage_chars: int = 1000) -> None:
        if results < 1 or max_passage_chars < 1:
            raise ConfigError(
                f"search: results={results}, max_passage_chars={max_passage_chars}; both must be positive"
            )
        self._passages = read_corpus(Path(corpus).expanduser())
        self._index = Index(self._passages)
        self._results, self._max_chars = results, max_passage_chars

    def reset(self, **row: Any) -> None:
        """The corpus is the same for all episodes."""

    def search(self, query: str) -> str:
        """Search for passages that contain the words of a query.

        Args:
            query: A few words.

        Returns:
            The passages that fit best, best first.
        """
        best = self._index.best(query, self._results)
        passages = [self._passages[place][: self._max_chars] for place in best]
        return "\n\n".join(f"[{rank}] {text}" for rank, text in enumerate(passages, 1)) or "nothing was found"


class Index:
    """For each word, in which passages it stands, and how often."""

    def __init__(self, passages: Sequence[str]) -> None:
        counts = [Counter(words(passage)) for passage in passages]
        lengths = np.array([sum(each.values()) for each in counts], np.float64)
        # By how much a passage's length discounts the count of a word in it. [passages]
        self._discounts = K1 * (1 - B + B * lengths / max(float(lengths.mean()), 1.0)) if len(counts) else lengths
        places: dict[str, list[int]] = {}
        for place, each in enumerate(counts):
            for word in each:
                places.setdefault(word, []).append(place)
        self._places = {word: np.array(each) for word, each in places.items()}
        self._counts = {word: np.array([counts[place][word] for place in each]) for word, each in places.items()}

    def best(self, query: str, most: int) -> list[int]:
        """The passages that have a word of the query, best first; of equals the earlier."""
        scores = np.zeros(len(self._discounts))
        for word in set(words(query)) & self._places.keys():
            places, counts = self._places[word], self._counts[word]
            frequency = np.log1p((len(scores) - len(places) + 0.5) / (len(places) + 0.5))
            scores[places] += frequency * counts * (K1 + 1) / (counts + self._discounts[places])
        order = np.argsort(-scores, kind="stable")[:most]
        return [int(place) for place in order if scores[place] > 0]


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def read_corpus(path: Path) -> list[str]:
    """Raises ConfigError, with what was expected."""
    try:
        if path.suffix == ".txt":
            passages = [part.strip() for part in path.read_text().split("\n\n") if part.strip()]
        elif path.suffix == ".jsonl":
            passages = [_passage(json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
        elif path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            passages = [_passage(row) for row in parquet.read_table(path).to_pylist()]
        else:
            raise ConfigError(f"search: corpus={path} is none of .jsonl, .parquet, .txt")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"search: corpus={path} cannot be read: {type(error).__name__}: {error}") from None
    if not passages:
        raise ConfigError(f"search: corpus={path} has no passage")
    return passages


def _passage(row: Any) -> str:
    if not isinstance(row, dict) or "text" not in row:
        raise ValueError(f"each row needs a column `text`; one is {str(row)[:80]}")
    title: Any = row.get("title")
    return f"{title}: {row['text']}" if title else str(row["text"])
