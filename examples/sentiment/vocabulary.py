"""The words of the reviews: whatever can be said, by part of speech and by degree from -2 (terrible) to 2 (wonderful).

Every adjective fits every aspect, so the grammar in `reviews` may put any beside any.
"""

from __future__ import annotations


def _list(text: str) -> tuple[str, ...]:
    """Words or phrases between commas, over several lines."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


# ---------------------------------------------------------------------------------------- what was watched, and how

GENRES = _list("comedy, drama, thriller, western, musical, mystery, romance, cartoon, documentary, fantasy, war film")
PEOPLE = _list(
    """sister, brother, mother, father, wife, husband, cousin, neighbor, teacher, boss, daughter, son, uncle, aunt,
    grandmother, best friend"""
)
TIMES = _list(
    """last night, last week, last month, this morning, on Friday, on Sunday, on a rainy day, on my birthday,
    in the afternoon, in March, in the summer, after work, after dinner, two days ago"""
)
PLACES = _list("at home, at the cinema, at school, at a festival, on a train, on a plane, in the park, in a hotel")
HEROES = _list(
    "doctor, farmer, detective, pilot, singer, cook, soldier, student, nurse, painter, thief, king, lawyer, robot"
)
DEEDS = _list(
    """loses everything, finds a map, falls in love, looks for a lost child, learns to dance, builds a house,
    wants to go home, hides from the police, comes back after ten years"""
)
TOWNS = _list(
    "in Paris, in London, in a small town, on an island, in the mountains, on a ship, in the desert, in the future"
)

# ------------------------------------------------------------------------------------------------ what is judged

ASPECT = _list(
    """plot, story, acting, music, camera work, dialogue, pace, ending, script, cast, humor, lighting, sound, editing,
    final scene, opening scene, villain, design, suspense, atmosphere"""
)
ASPECTS = _list("jokes, characters, costumes, effects, songs, fights, colors, sets, love scenes, surprises")
PLAYERS = _list("lead actor, lead actress, old man, young girl, villain, whole cast, narrator, child")
RIVALS = _list("the book, the first part, the old version, the trailer, most films of the year")

# ------------------------------------------------------------------------------------------------ how it is judged

ADJECTIVES = {
    2: _list("wonderful, brilliant, amazing, superb, perfect, stunning, fantastic, magnificent, marvelous, beautiful"),
    1: _list("good, nice, pleasant, clever, charming, solid, fresh, lively, decent, elegant"),
    0: _list("ordinary, usual, simple, average, familiar, normal, typical, plain"),
    -1: _list("weak, dull, slow, flat, bland, clumsy, messy, boring, poor, tired"),
    -2: _list("terrible, awful, horrible, dreadful, pathetic, ugly, painful, unbearable, disgusting, worthless"),
}
ADVERBS = {
    2: _list("absolutely, truly, simply, completely"),
    1: _list("quite, rather, pretty, a little"),
    0: _list("rather, quite, just, very"),
}
FELT = {
    2: _list("loved, adored, was amazed by"),
    1: _list("liked, enjoyed, smiled about"),
    0: _list("remember, thought about, talked about"),
    -1: _list("disliked, did not like, did not enjoy"),
    -2: _list("hated, could not stand, was disgusted by"),
}
THAN = {
    2: "far better than",
    1: "a little better than",
    0: "about the same as",
    -1: "a little worse than",
    -2: "far worse than",
}
CLOSINGS = {
    2: _list(
        """everyone should see this {genre}, it is the best {genre} of the year, I will watch it again and again,
        I give it ten stars, it made me very happy, my {person} clapped at the end"""
    ),
    1: _list(
        """it was worth the ticket, I would watch it again, I can recommend it to my {person}, I give it seven stars,
        it was a good evening"""
    ),
    0: _list(
        """it is one more {genre}, some people will like it and some will not, I give it five stars,
        I have no strong feelings about it, it lasted two hours"""
    ),
    -1: _list(
        """it was not worth the ticket, I would not watch it again, I cannot recommend it to my {person},
        I give it three stars, I expected more from a {genre}"""
    ),
    -2: _list(
        """nobody should see this {genre}, it is the worst {genre} of the year, I want my money back,
        I give it no stars, it made me very angry, my {person} left before the end"""
    ),
}
LEADS = _list("in my opinion, for me, honestly, to be fair, if you ask me")
