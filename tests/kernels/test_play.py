"""python -m kernels.play: what it shows is what flip does."""

from pathlib import Path

import pytest

from kernels import play
from kernels.limits import RULES
from kernels.update_rule import UpdateRule


@pytest.mark.parametrize("bits", [1, 2, 6])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_shown_and_agrees_with_flip(rule, bits):
    for seed in range(3):
        assert len(play.steps(UpdateRule(rule, bits, ortho_tile=4, topk_tile=4), 0.3, seed)) == 8


def test_a_matrix_by_hand(capsys):
    """Weights that move do so by one unit, against their votes, and are among the largest of their tile."""
    play.main(["flip"])
    blocks = [part.splitlines() for part in capsys.readouterr().out.split("\n\n")]
    matrices = [[line.replace("|", "").split() for line in block] for block in blocks if "  |  " in "".join(block[:1])]
    before, votes, scores, _, moves, after = (m for m in matrices if len(m) == play.OUT)
    assert scores == votes  # of the rule gain
    chosen = 0
    for r in range(play.OUT):
        for c in range(play.IN):
            move = 0 if moves[r][c] == "." else int(moves[r][c])
            chosen += move != 0
            assert int(before[r][c]) + move == int(after[r][c])
            assert move * int(votes[r][c]) <= 0
            if move:
                tile = range(c // 4 * 4, c // 4 * 4 + 4)
                others = [abs(int(votes[i][j])) for i in range(4) for j in tile if moves[i][j] == "."
                          and abs(int(before[i][j]) - (1 if int(votes[i][j]) > 0 else -1)) <= 3]  # fmt: skip
                assert abs(int(votes[r][c])) >= max(others)
    assert chosen == 3 + 4  # 0.23 of 16, rounded down and up


def test_mistakes(capsys):
    with pytest.raises(SystemExit):
        play.main(["flip", "--k", "2"])
    assert "a share is from 0 to 1" in capsys.readouterr().err


def test_the_documentation_shows_what_it_prints(capsys):
    play.main(["flip"])
    text = capsys.readouterr().out
    page = Path(__file__).resolve().parents[2].joinpath("docs", "kernels.md").read_text()
    for line in text[text.index("3. Votes") : text.index("8. The new")].splitlines():
        assert line.strip() in page
