"""Small movie reviews from a grammar: text to train on, pairs to judge by, and prompts to begin with.

A review is a neutral opening ("I watched this comedy last night with my sister.") and an opinion of one to three
sentences. Every sentence has a degree from -2 (terrible) to 2 (wonderful), and a review has their mean. Words alone do
not decide: "The plot was nice, but the music was dull." is negative, "never dull" is positive, and nice AND dull is
neither. Most reviews are lukewarm, as most films are.

    python examples/sentiment/reviews.py .demo/data

writes corpus.jsonl {"text"}, pairs.jsonl and pairs_heldout.jsonl {"prompt", "chosen", "rejected"}, prompts.jsonl and
prompts_heldout.jsonl {"prompt"}, and .demo/data.json when all of them are there. An opening is held out or not by a
hash of its text, so nothing that is trained on, in any stage, begins with a held-out prompt; and no opinion of a
held-out pair occurs in a pair that is trained on.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import vocabulary as words
from common import record_path, write_json, write_jsonl

TONES = {-2: 0.08, -1: 0.15, 0: 0.54, 1: 0.15, 2: 0.08}
"""How often a review of each tone is written."""


@dataclass(frozen=True)
class Opening:
    """A sentence that says what was watched, and nothing about how it was."""

    text: str
    genre: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept for tests: one in eight, by its hash."""
        return hashlib.sha256(self.text.encode()).digest()[0] % 8 == 0


@dataclass(frozen=True)
class Opinion:
    """What follows an opening, with the space before it, and the mean degree of its sentences, in [-2, 2]."""

    text: str
    degree: float


def sentence(text: str) -> str:
    """`text` with a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."


# ------------------------------------------------------------------------------------------------------ openings


def opening(rng: random.Random) -> Opening:
    """An opening of any kind."""
    genre, place, town = rng.choice(words.GENRES), rng.choice(words.PLACES), rng.choice(words.TOWNS)
    person, other = rng.sample(words.PEOPLE, 2)
    time, hero, deed = rng.choice(words.TIMES), rng.choice(words.HEROES), rng.choice(words.DEEDS)
    templates = [
        f"I watched this {genre} {time} with my {person}",
        f"I saw this {genre} {place} {time}",
        f"my {person} and I watched this {genre} {place}",
        f"my {person} showed me this {genre} {time}",
        f"{time} I went to see a {genre} with my {person} and my {other}",
        f"this is a {genre} about a {hero} who {deed}",
        f"this {genre} tells the story of a {hero} and a {rng.choice(words.HEROES)} {town}",
        f"this {genre} follows a {hero} who {deed} {town}",
    ]
    return Opening(sentence(rng.choice(templates)), genre)


def openings(rng: random.Random, *, held_out: bool) -> Iterator[Opening]:
    """Endless openings of one side of the split; they may repeat."""
    while True:
        drawn = opening(rng)
        if drawn.held_out == held_out:
            yield drawn


# ------------------------------------------------------------------------------------------------------ sentences


class Writer:
    """Writes sentences about one film: its genre stays, and no aspect is judged twice."""

    def __init__(self, rng: random.Random, genre: str) -> None:
        self.rng = rng
        self.genre = genre
        was = [(f"the {aspect}", "was") for aspect in words.ASPECT]
        were = [(f"the {aspect}", "were") for aspect in words.ASPECTS]
        self._aspects = iter(rng.sample(was + were, len(was) + len(were)))

    def clause(self, degree: int) -> str:
        """What one aspect was like: "the plot was rather dull", "the jokes were not good"."""
        rng = self.rng
        subject = " ".join(next(self._aspects))
        if abs(degree) == 1 and rng.random() < 0.2:
            return f"{subject} {rng.choice(['not', 'never'])} {rng.choice(words.ADJECTIVES[-degree])}"
        adverb = rng.choice(words.ADVERBS[abs(degree)]) + " " if rng.random() < 0.5 else ""
        return f"{subject} {adverb}{rng.choice(words.ADJECTIVES[degree])}"

    def statement(self, degree: int) -> str:
        """One clause, perhaps with a word before it."""
        lead = self.rng.choice(words.LEADS) + ", " if self.rng.random() < 0.3 else ""
        return lead + self.clause(degree)

    def concession(self, degree: int) -> str:
        """One clause against another: what is granted does not count, the main clause does."""
        granted, main = self.clause(-1 if degree > 0 else 1), self.clause(degree)
        return f"although {granted}, {main}" if self.rng.random() < 0.5 else f"{granted}, but {main}"

    def two(self, degree: int) -> str:
        """Two clauses side by side; for a degree of 0, one of them may be good and the other bad."""
        first = second = degree
        if degree == 0:
            first = self.rng.choice([-1, 0, 0, 1])
            second = -first
        return f"{self.clause(first)} and {self.clause(second)}"

    def feeling(self, degree: int) -> str:
        """What it did to people."""
        who = self.rng.choice(["I", "I", f"my {self.rng.choice(words.PEOPLE)}"])
        return f"{who} {self.rng.choice(words.FELT[degree])} {next(self._aspects)[0]}"

    def performance(self, degree: int) -> str:
        """How somebody played."""
        how = self.rng.choice(words.ADJECTIVES[degree])
        article = "an" if how[0] in "aeiou" else "a"
        return f"the {self.rng.choice(words.PLAYERS)} gave {article} {how} performance"

    def comparison(self, degree: int) -> str:
        """Against the book, the trailer, or another film."""
        rival = self.rng.choice([*words.RIVALS, f"the last {self.genre} I saw"])
        return f"{self.rng.choice(['it', 'this one'])} was {words.THAN[degree]} {rival}"

    def closing(self, degree: int) -> str:
        """A last word."""
        return self.rng.choice(words.CLOSINGS[degree]).format(genre=self.genre, person=self.rng.choice(words.PEOPLE))

    def any(self, degree: int, *, last: bool) -> str:
        """A sentence of any kind; closings stand last."""
        if degree != 0 and self.rng.random() < 0.2:
            return self.concession(degree)
        if last and self.rng.random() < 0.6:
            return self.closing(degree)
        kinds: list[Callable[[int], str]] = [self.statement, self.two, self.feeling, self.performance, self.comparison]
        return self.rng.choices(kinds, [4, 2, 2, 2, 1])[0](degree)


def opinion(rng: random.Random, genre: str, tone: int) -> Opinion:
    """One to three sentences: the first has the tone, a later one may be a step nearer to the middle."""
    writer = Writer(rng, genre)
    count = rng.choices([1, 2, 3], [1, 3, 1])[0]
    nearer = tone - (tone > 0) + (tone < 0)
    degrees = [tone, *(tone if rng.random() < 0.85 else nearer for _ in range(count - 1))]
    texts = [writer.any(degree, last=0 < index == count - 1) for index, degree in enumerate(degrees)]
    return Opinion("".join(" " + sentence(text) for text in texts), sum(degrees) / count)


# ------------------------------------------------------------------------------------------------------ data sets


def corpus(seed: int, count: int) -> list[str]:
    """`count` reviews to learn the language from; their openings are not held out."""
    rng = random.Random(f"corpus {seed}")
    starts = openings(rng, held_out=False)
    tones = rng.choices(list(TONES), list(TONES.values()), k=count)
    return [start.text + opinion(rng, start.genre, tone).text for tone, start in zip(tones, starts, strict=False)]


def pairs(seed: int, count: int, *, held_out: bool, avoid: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """`count` preference pairs, {"prompt", "chosen", "rejected"}: the chosen is better by 1.5 degrees or more.

    Tones are drawn evenly, so there is good against weak, wonderful against terrible, and either against lukewarm: a
    reward learned from them knows degrees. Opinions in `avoid` do not occur.
    """
    rng = random.Random(f"pairs {seed} {held_out}")
    found: list[dict[str, str]] = []
    for start in openings(rng, held_out=held_out):
        drawn = [opinion(rng, start.genre, tone) for tone in rng.sample(list(TONES), 2)]
        rejected, chosen = sorted(drawn, key=lambda opinion: opinion.degree)
        if chosen.degree - rejected.degree >= 1 and not avoid & {chosen.text, rejected.text}:
            found.append({"prompt": start.text, "chosen": chosen.text, "rejected": rejected.text})
        if len(found) == count:
            break
    return found


def prompts(seed: int, count: int, *, held_out: bool) -> list[str]:
    """`count` different openings."""
    found: dict[str, None] = {}
    for start in openings(random.Random(f"prompts {seed} {held_out}"), held_out=held_out):
        found[start.text] = None
        if len(found) == count:
            break
    return list(found)


def main(
    output: Annotated[Path, typer.Argument(help="Directory to write the five files to.")],
    reviews: Annotated[int, typer.Option(help="Reviews in corpus.jsonl.")] = 12_000,
    train_pairs: Annotated[int, typer.Option(help="Pairs in pairs.jsonl.")] = 4_000,
    heldout_pairs: Annotated[int, typer.Option(help="Pairs in pairs_heldout.jsonl.")] = 400,
    train_prompts: Annotated[int, typer.Option(help="Openings in prompts.jsonl.")] = 2_000,
    heldout_prompts: Annotated[int, typer.Option(help="Openings in prompts_heldout.jsonl.")] = 128,
    seed: Annotated[int, typer.Option(help="The same seed writes the same files.")] = 0,
) -> None:
    """Writes the data of the three stages."""
    began = time.monotonic()
    record_path(output).unlink(missing_ok=True)
    training = pairs(seed, train_pairs, held_out=False)
    seen = frozenset(pair[side] for pair in training for side in ("chosen", "rejected"))
    write_jsonl(output / "corpus.jsonl", ({"text": text} for text in corpus(seed, reviews)))
    write_jsonl(output / "pairs.jsonl", training)
    write_jsonl(output / "pairs_heldout.jsonl", pairs(seed, heldout_pairs, held_out=True, avoid=seen))
    for name, count, held in (("prompts", train_prompts, False), ("prompts_heldout", heldout_prompts, True)):
        write_jsonl(output / f"{name}.jsonl", ({"prompt": text} for text in prompts(seed, count, held_out=held)))
    write_json(record_path(output), {"reviews": reviews, "seconds": time.monotonic() - began})


if __name__ == "__main__":
    typer.run(main)
