"""Readers of the many suite's tasks on two texts.

Both texts of a pair are of one split, and its document names where both are from.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from icm_ray.suites.many.sources import PASSAGE_WORDS, Part, days, drawn, plain_words, split_of
from icm_ray.suites.text.sources import STEM_LETTERS, Candidate, Synset, modules, passages

DEFINITION_WORDS = range(2, 15)
"""Longer ones cost tokens, and a pair has two."""
PER_PARENT = 6
"""Children of one noun that are paired, so that none is known by heart."""
GENERATIONS = 3
"""A kind of a kind of a noun is one too."""
LEAST_CHAIN = 4
"""Nouns from `entity` down; what is nearer to it is near to everything."""
SPREAD = 8
"""Strata of a similarity between 0 and 1."""
FAR_LINES = 20
NEAR_SPEECHES = 6
LONGEST_GAP = 15
"""Two dates are up to 2 to this power days apart, as often near as far."""


def entry(synset: Synset) -> str:
    """Return a synset as a dictionary shows it."""
    return f"{synset.lemma}: {synset.definition}"


def short(synsets: Part) -> Part:
    """Return the synsets whose definition is short."""
    return {
        offset: synset
        for offset, synset in synsets.items()
        if len(synset.definition.split()) in DEFINITION_WORDS
    }


def kind_candidates(nouns: Part, classes: Sequence[str]) -> Iterator[Candidate]:
    """Yield two nouns: the first a kind of the second, above it, or beside it under a third."""
    nouns = short(nouns)
    for parent, children in _families(nouns).items():
        children = sorted(children, key=lambda offset: drawn("child", offset))[:PER_PARENT]
        for place, child in enumerate(children):
            label = drawn("kind", child) % 3
            other = children[place - 1] if label == 2 else parent
            if child != other:
                one, two = (other, child) if label == 1 else (child, other)
                yield _pair(entry(nouns[one]), entry(nouns[two]), label, (one, two), classes)


def fit_candidates(nouns: Part, classes: Sequence[str]) -> Iterator[Candidate]:
    """Yield a noun with its definition, or with that of another kind of the same thing."""
    nouns = short(nouns)
    for children in _families(nouns).values():
        for place, child in enumerate(children):
            label = drawn("fits", child) % 2
            other = children[place - 1] if label == 0 else child
            apart = not set(nouns[child].lemmas) & set(nouns[other].lemmas)
            if label == 1 or apart:
                texts = nouns[child].lemma, nouns[other].definition
                yield _pair(*texts, label, dict.fromkeys((child, other)), classes)


def _families(nouns: Part) -> dict[str, list[str]]:
    """Return the kinds of each noun that are of its split, and no closer to another such noun."""
    families: dict[str, list[str]] = defaultdict(list)
    for offset in nouns:
        for parent in _chain(nouns, offset)[:GENERATIONS]:
            if parent in nouns and split_of(parent) == split_of(offset):
                families[parent].append(offset)
                break
    return families


def opposite_candidates(adjectives: Part, classes: Sequence[str]) -> Iterator[Candidate]:
    """Yield two adjectives that mean the same, the opposite, or have nothing to do with each other.

    A head, the adjectives about it and those about its opposite are one document.
    """
    clusters = defaultdict(list)
    for offset, head in adjectives.items():
        near = [target for mark, target in head.pointers if mark == "&"]
        against = [target for mark, target in head.pointers if mark == "!"]
        for other in near:
            clusters[min([offset, *against[:1]])].append((offset, other, 0))
        if against and near:
            clusters[min(offset, against[0])] += [(other, against[0], 1) for other in near]
    names = sorted(clusters, key=lambda name: drawn("cluster", name))
    by_split = defaultdict(list)
    for name in names:
        by_split[split_of(f"adj {name}")].append(name)
    for own in by_split.values():
        for name, following in pairwise(own):
            for number, (one, two, label) in enumerate(clusters[name]):
                documents = [f"adj {name}"]
                if drawn("apart", one, two) % 3 == 0:
                    label, far = 2, clusters[following]
                    two = far[number % len(far)][1]
                    documents.append(f"adj {following}")
                if {one, two} <= set(adjectives):
                    texts = [entry(adjectives[offset]) for offset in (one, two)]
                    yield _pair(texts[0], texts[1], label, documents, classes)


def nearness_candidates(nouns: Part) -> Iterator[Candidate]:
    """Yield two nouns with how far down their nearest common hypernym lies: Wu-Palmer's measure."""
    chains = {offset: [offset, *_chain(nouns, offset)] for offset in short(nouns)}
    chains = {offset: chain for offset, chain in chains.items() if len(chain) >= LEAST_CHAIN}
    below: dict[tuple[str, str], list[str]] = defaultdict(list)
    for offset, chain in chains.items():
        for above in chain:
            below[split_of(offset), above].append(offset)
    for offset, chain in chains.items():
        others = below[split_of(offset), chain[drawn("up", offset) % len(chain)]]
        other = others[drawn("other", offset) % len(others)]
        common = [above for above in chain if above in chains[other]]
        if other != offset and common:
            shared = len(chain) - chain.index(common[0])
            value = 2 * shared / (len(chain) + len(chains[other]))
            texts = entry(nouns[offset]), entry(nouns[other])
            stratum = str(int(value * SPREAD))
            yield Candidate(texts[0], round(value, 3), f"{offset}+{other}", stratum, pair=texts[1])


def _chain(nouns: Part, offset: str) -> list[str]:
    """Return the first hypernyms of a noun, the nearest first."""
    chain: list[str] = []
    while offset in nouns and nouns[offset].parents:
        offset = nouns[offset].parents[0]
        chain.append(offset)
    return chain


def rhyme_candidates(
    dictionary: Path, parts: Mapping[str, Part], classes: Sequence[str]
) -> Iterator[Candidate]:
    """Yield two words that rhyme, or end with the same letters and do not."""
    rhymes, endings = defaultdict(list), defaultdict(list)
    known, sounds = plain_words(parts), {}
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, _, phones = line.partition("  ")
        word = word.lower()
        if word in known and (sound := re.search(r"[A-Z]+1\b(?!.*1\b).*", phones)):
            sounds[word] = re.sub(r"\d", "", sound[0])
            split = split_of(word[:STEM_LETTERS])
            rhymes[split, sounds[word]].append(word)
            endings[split, word[-2:]].append(word)
    for word, sound in sounds.items():
        label = drawn("rhyme", word) % 2
        split = split_of(word[:STEM_LETTERS])
        same = rhymes[split, sound] if label else endings[split, word[-2:]]
        others = [
            other
            for other in same
            if (sounds[other] == sound) == bool(label)
            and not word.endswith(other)
            and not other.endswith(word)
        ]
        if others:
            other = others[drawn("other", word) % len(others)]
            documents = dict.fromkeys((word[:STEM_LETTERS], other[:STEM_LETTERS]))
            yield _pair(word, other, label, documents, classes)


def order_candidates(classes: Sequence[str]) -> Iterator[Candidate]:
    """Yield two dates in words with which of them is the earlier one."""
    known = dict(days())
    first = min(known).toordinal()
    for day, text in known.items():
        reach = 2 ** (1 + drawn("reach", day) % LONGEST_GAP)
        gap = 1 + drawn("gap", day) % reach
        label = drawn("earlier", day) % 2
        number = day.toordinal() - first + (gap if label == 0 else -gap)
        other = type(day).fromordinal(max(first + number, 1))
        if other in known and split_of(other.isoformat()) == split_of(day.isoformat()):
            documents = (day.isoformat(), other.isoformat())
            yield _pair(text, known[other], label, documents, classes)


def follow_candidates(library: Path, classes: Sequence[str]) -> Iterator[Candidate]:
    """Yield two lines of one module, of which the second comes next, or elsewhere."""
    for document, lines in modules(library):
        for place, (line, following) in enumerate(pairwise(lines)):
            label = drawn("follows", document, place) % 2
            if label == 0:
                other = drawn("line", document, place) % len(lines)
                if abs(other - place) < FAR_LINES:
                    continue
                following = lines[other]
            yield _pair(line, following, label, [document], classes)


def continue_candidates(speeches: Path, classes: Sequence[str]) -> Iterator[Candidate]:
    """Yield two passages, of which the second goes on with the first, or is of a speech near it."""
    texts = {document: own for document, _, own in passages(speeches, PASSAGE_WORDS)}
    by_split = defaultdict(list)
    for document in texts:
        by_split[split_of(document)].append(document)
    for own in by_split.values():
        for number, document in enumerate(own):
            near = [*own[max(0, number - NEAR_SPEECHES // 2) : number], *own[number + 1 :]]
            for place, (text, following) in enumerate(pairwise(texts[document])):
                label, documents = drawn("continues", document, place) % 2, [document]
                if label == 0:
                    other = near[drawn("speech", document, place) % min(len(near), NEAR_SPEECHES)]
                    following = texts[other][drawn("text", document, place) % len(texts[other])]
                    documents.append(other)
                yield _pair(text, following, label, documents, classes)


def _pair(
    text: str, pair: str, label: int, documents: Iterable[str], classes: Sequence[str]
) -> Candidate:
    return Candidate(text, label, "+".join(documents), classes[label], pair=pair)
