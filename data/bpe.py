"""Byte-pair encoding, the training half: which pairs of tokens to join, learned from a text.

The text is cut into words by PATTERN, and a word into bytes. Then, again and again, the most frequent pair of
neighbours becomes one token everywhere. No token crosses a word's edge, so that equal words are counted once, and a
join touches only the words that hold the pair: their pair counts are updated, the rest stay. Candidates wait in a heap;
an entry whose count has changed since is put back with the new one.

Encoding is tiktoken's: it joins the neighbours of lowest rank first, which repeats the joins in the order of
training. So `merges` are the ranks from 256 on, and the text is cut here as it is there.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable

# A run of letters, of up to three digits or of other signs, each with the space before it; and white space, of which
# the last one is left to the next word. Runs end at 64 so that no text, however odd, makes a word slow to encode.
PATTERN = r" ?[\p{L}\p{M}]{1,64}| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"

Pair = tuple[int, int]


def train_bpe(pieces: Iterable[str], vocab_size: int) -> list[bytes]:
    """The byte strings of a vocabulary learned from a text, in rank order: the 256 bytes, then the joined tokens.

    The text comes in `pieces`, cut where words end.
    Equal counts go to the lower pair of ids, so the result is a function of the text. It is shorter than `vocab_size`
    where no pair is left that occurs twice.
    """
    import regex

    vocabulary = [bytes([byte]) for byte in range(256)]
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(regex.findall(PATTERN, piece))
    words = [list(word.encode("utf-8")) for word in counts]
    frequency = list(counts.values())
    pair_count: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += frequency[index]
            holders[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    while len(vocabulary) < vocab_size and heap:
        negative, pair = heapq.heappop(heap)
        if -negative != pair_count[pair]:
            if pair_count[pair] > 1:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        if -negative < 2:
            break
        new = len(vocabulary)
        vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
        risen: set[Pair] = set()
        for index in holders.pop(pair):
            before = words[index]
            after = _join(before, pair, new)
            for old_pair in zip(before, before[1:]):
                pair_count[old_pair] -= frequency[index]
            for new_pair in zip(after, after[1:]):
                pair_count[new_pair] += frequency[index]
                if new in new_pair:
                    holders[new_pair].add(index)
                    risen.add(new_pair)
            words[index] = after
        for new_pair in risen:
            heapq.heappush(heap, (-pair_count[new_pair], new_pair))
    return vocabulary


def _join(word: list[int], pair: Pair, new: int) -> list[int]:
    """`word` with each occurrence of `pair`, from the left, replaced by the one token `new`."""
    joined = []
    position = 0
    while position < len(word):
        if position + 1 < len(word) and word[position] == pair[0] and word[position + 1] == pair[1]:
            joined.append(new)
            position += 2
        else:
            joined.append(word[position])
            position += 1
    return joined
