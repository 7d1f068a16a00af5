"""How well what was read agrees with what was asked for. Case does not count anywhere."""

from collections import Counter
from collections.abc import Sequence

EPSILON = 1e-8


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: the fewest insertions, deletions and replacements that turn `a` into `b`."""
    return _distances(a, b)[-1][-1]


def _distances(a: str, b: str) -> list[list[int]]:
    """Entry i, j: the distance of the first i letters of `a` from the first j of `b`."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        rows.append([i])
        for j, y in enumerate(b, 1):
            rows[i].append(min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (x != y)))
    return rows


def ned_similarity(a: str, b: str) -> float:
    """1 - ED(a, b) / max(|a|, |b|), in [0, 1]; two empty texts are equal."""
    return 1 - edit_distance(a.lower(), b.lower()) / max(len(a), len(b), 1)


def letter_scores(target: str, read: str) -> list[float]:
    """Each target letter's share of what was read right: 1 where a shortest edit script keeps the letter, 0 where it replaces or deletes
    it, and 1 less for each letter inserted after it (before the first: charged to the first). Spaces count as letters.

    Their mean is (kept - inserted) / |target|, at most 1: the NED similarity where nothing is inserted."""
    a, b = target.lower(), read.lower()
    rows = _distances(a, b)
    scores, i, j = [0.0] * len(a), len(a), len(b)
    while i or j:
        if i and j and rows[i][j] == rows[i - 1][j - 1] + (a[i - 1] != b[j - 1]):
            i, j = i - 1, j - 1
            scores[i] += a[i] == b[j]
        elif i and rows[i][j] == rows[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
            scores[max(i - 1, 0)] -= 1
    return scores


def word_accuracy(targets: Sequence[str], read: Sequence[str]) -> float:
    """Share of the target words that were read, each reading counted once; 1 where nothing was asked for."""
    want, got = Counter(word.lower() for word in targets), Counter(word.lower() for word in read)
    return (want & got).total() / want.total() if want else 1.0


def comp(targets: Sequence[str], found: Sequence[tuple[str, float]]) -> float:
    """Completeness: the mean over target words of the confidence with which exactly that word was read, 0 where it was not.

        Comp = 1/N sum_g 1{g in P} min_{i: p_i = g} s_i          VAR-RL (arXiv 2601.02256); the minimum discourages repeats

    `found` are (word, confidence in [0, 1]). In [0, 1]."""
    best = [[s for word, s in found if word.lower() == target.lower()] for target in targets]
    return sum(min(scores) for scores in best if scores) / len(targets)


def sim(targets: Sequence[str], found: Sequence[tuple[str, float]]) -> float:
    """Similarity: the mean over target words of likeness times confidence of the likest word that was read.

        Sim = 1/N sum_g LD(g, p_i*) s_i*,  i* = argmax_i LD(g, p_i),  LD(x, y) = 1 - ED(x, y) / (max(|x|, |y|) + eps)

    VAR-RL (arXiv 2601.02256). Ties go to the word read first. In [0, 1]; 0 where nothing was read."""
    if not found:
        return 0.0
    total = 0.0
    for target in targets:
        likeness = [1 - edit_distance(target.lower(), word.lower()) / (max(len(target), len(word)) + EPSILON) for word, _ in found]
        i = max(range(len(found)), key=likeness.__getitem__)
        total += likeness[i] * found[i][1]
    return total / len(targets)


def pen(targets: Sequence[str], found: Sequence[tuple[str, float]], lambda_: float) -> float:
    """Penalty for letters that are missing or too many, whatever their order.

        Pen = lambda BagDist(concat P, concat G) / (|concat P| + |concat G|)

    VAR-RL (arXiv 2601.02256). BagDist is the size of the multiset difference, both ways. In [0, lambda]: lambda where nothing was read."""
    want, got = Counter("".join(targets).lower()), Counter("".join(word for word, _ in found).lower())
    return lambda_ * ((want - got) + (got - want)).total() / (want + got).total()


def paper_reward(targets: Sequence[str], found: Sequence[tuple[str, float]], lambda_: float = 0.6) -> float:
    """VAR-RL's text reward, R = Comp + Sim - Pen, in [-lambda, 2]. `targets` hold at least one word; `found` are (word, confidence).

    Where nothing was read: Comp = Sim = 0 and Pen = lambda (the paper leaves it open)."""
    return comp(targets, found) + sim(targets, found) - pen(targets, found, lambda_)
