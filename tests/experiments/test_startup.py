"""experiments.startup: whole programs are timed, and their failures told."""

import pytest

from experiments import startup


def test_commands_are_timed_from_start_to_end():
    seconds, output = startup.timed_command(("-c", "import os; print(os.environ['SOME'])"), SOME="value")
    assert output == "value\n" and 0 < seconds < 60
    with pytest.raises(RuntimeError, match="ended with status 3: words"):
        startup.timed_command(("-c", "import sys; sys.exit(print('words', file=sys.stderr) or 3)"))
