"""python -m kernels.play: what it shows is what flip does."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import play
from kernels.limits import RULES
from kernels.update_rule import UpdateRule

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("words, said", [
    (["--k", "2"], "a share is from 0 to 1"), (["--seed", "9" * 23], "from 0 to 2^64 - 1"),
    (["--pause"], "standard input has ended"),
])  # fmt: skip
def test_mistakes(words, said, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit):
        play.main(["flip", *words])
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "kernels.play", "flip"], stdout=full, stderr=subprocess.PIPE,
                              env=os.environ | {"PYTHONUNBUFFERED": ""}, cwd=ROOT, text=True, check=False)  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_documentation_shows_what_it_prints(capsys):
    play.main(["flip"])
    text = capsys.readouterr().out
    page = ROOT.joinpath("docs", "kernels.md").read_text()
    for line in text[text.index("3. Votes") : text.index("8. The new")].splitlines():
        assert line.strip() in page
