"""Every hook that the tables of HOOKS.md name exists, in the installed frameworks and in noether."""

import os
import re
from pathlib import Path

import noether
from noether.core.callbacks import CallbackBase

TEXT = (Path(noether.__file__).parent / "integrations" / "HOOKS.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|")]


def hooks():
    """Return the hooks of each framework by name."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    from ignite.engine import Events
    from lightning.pytorch import Callback
    from transformers import TrainerCallback

    ignite = {event.name for event in Events}
    return {
        "Lightning": vars(Callback),
        "Keras": vars(keras.callbacks.Callback),
        "transformers": vars(TrainerCallback),
        "Ignite": ignite,
    }


def test_hooks_of_the_first_table_exist():
    known = hooks()
    heading = next(row for row in ROWS if row[0] == "here")
    frameworks = [next(name for name in known if name in cell) for cell in heading[1:5]]
    rows = ROWS[ROWS.index(heading) + 2 :][:6]
    assert len(rows) == 6
    for event, *columns, method in rows:
        assert hasattr(noether, re.search(r"`(\w+)`", event)[1])
        assert hasattr(CallbackBase, method.strip("`"))
        for framework, cell in zip(frameworks, columns, strict=True):
            for hook in re.findall(r"`(\w+)`", cell):
                assert hook in known[framework], (framework, hook)


def test_hooks_of_the_second_table_exist():
    known = hooks()
    start = next(number for number, row in enumerate(ROWS) if row == ["hook", "write"])
    rows = [row for row in ROWS[start + 2 :] if re.match("|".join(known), row[0])]
    assert len(rows) == 10
    for names, _ in rows:
        for framework, cell in re.findall(r"(Lightning|Keras|transformers|Ignite)((?:,? `\w+`)+)", names):
            for hook in re.findall(r"`(\w+)`", cell):
                assert hook in known[framework], (framework, hook)
