"""A run in the kernel of a notebook."""

import pytest

CODE = """
import tempfile, noether
digits = {"kind": "noether.examples.digits.Digits", "split": "val"}
noether.train({
    "run": {"name": "digits"},
    "model": {"kind": "noether.examples.digits.ConvNet", "width": 2},
    "data": {"train": {**digits, "split": "train"}},
    "optimizer": {"kind": "torch.optim.SGD", "lr": 0.1},
    "trainer": {"max_epochs": 2, "effective_batch_size": 8, "loss": "noether.examples.digits.cross_entropy"},
}, output=tempfile.mkdtemp())
"""


@pytest.mark.slow
def test_the_live_display_is_one_output_that_is_updated():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    outputs = [each["data"]["text/plain"] for each in notebook.cells[0].outputs if "data" in each]
    assert sum("samples/s" in text and "left" in text for text in outputs) == 1
    lines = "".join(each.get("text", "") for each in notebook.cells[0].outputs)
    assert lines.count("E2_U302_S2410") == 1
