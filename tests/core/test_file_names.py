"""Names of files that are made of metric keys: injective, legal on every system, and read back."""

import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from noether.core.callbacks import BestCheckpointCallback, EMACallback
from noether.core.declarations import DeclarationError, check_declarations
from noether.core.file_names import (
    best_pointer,
    describe_name,
    escape_name,
    escape_path,
    find_name,
    unescape_name,
)
from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.stored_weights import name_in_tags
from noether.effects.checkpoints.manifest import NAME
from noether.effects.disk.files import TEMPORARY_PREFIX

# Keys as people write them, and short ones of the characters that have a meaning in names.
TEXTS = (
    st.text(max_size=30) | st.text(alphabet="aB1./%=-2F tolerance", max_size=10) | st.text(min_size=40, max_size=140)
)
LARGEST = 2**63 - 1
LONGEST_TAG = str(TrainingIteration(epoch=LARGEST, update=LARGEST, sample=LARGEST))
ILLEGAL = re.compile(r'[<>:"/\\|?*\x00-\x1f]|[. ]\Z')
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|\Z)", re.IGNORECASE | re.ASCII)


def is_legal(name):
    """Whether Linux, macOS and Windows take the name, and none of them changes it."""
    return not (ILLEGAL.search(name) or DEVICE.match(name)) and name.isascii() and 0 < len(name) <= 255


@settings(max_examples=150)
@example("a.b", "a/b").via("a slash becomes a dot")
@example("1/2", "1.2").via("a dot between digits stays")
@example("a/", "a.").via("a name that ends in a dot loses it")
@example("a%2Fb", "a/b").via("an escape is escaped")
@example("é", unicodedata.normalize("NFD", "é")).via("one character, or a letter and an accent")
@example("x/tolerance=3", "x").via("the key ends as a pointer does")
@example("a" * 200, "a" * 201).via("shortened")
@given(TEXTS, TEXTS)
def test_no_two_texts_have_one_name(first, second):
    names = [
        (escape_name(text), best_pointer(text), best_pointer(text, 3), escape_path(text)) for text in (first, second)
    ]
    assert (first == second) is any(map(str.__eq__, *names)) is all(map(str.__eq__, *names))
    assert not {best_pointer(first)} & {best_pointer(second, 3)}


@settings(max_examples=150)
@example("\ud800").via("half of a surrogate pair")
@example("a\x00b\n").via("controls")
@given(TEXTS)
def test_a_name_is_legal_everywhere_and_reads_back(text):
    name = escape_name(text)
    assert unescape_name(name) == (None if "%-" in name else text)
    longest = [best_pointer(text, LARGEST), f"{LONGEST_TAG}.{name_in_tags(text)}.{LARGEST}"]
    assert all(NAME.fullmatch(each) and is_legal(f"{TEMPORARY_PREFIX}{each}.json") for each in longest)
    assert all(is_legal(f"{part}.safetensors") and part not in ("", "..") for part in escape_path(text).split("/"))


@settings(max_examples=100)
@given(st.text())
def test_any_text_is_read_as_a_name_or_refused(text):
    found = unescape_name(text)
    assert found is None or escape_name(found) == text


@settings(max_examples=50)
@given(st.lists(TEXTS.filter(bool), min_size=1, max_size=4, unique=True))
def test_a_pointer_is_found_by_the_key_and_by_its_file_name(keys):
    files = {best_pointer(key, tolerance): (key, tolerance) for key in keys for tolerance in (None, 3)}
    for name, (key, tolerance) in files.items():
        assert find_name(name, files) == name
        written = f"best_model.{key}" if tolerance is None else f"best_model.{key}.tolerance={tolerance}"
        assert find_name(written, files) == name or written in files


@pytest.mark.parametrize(
    ("key", "pointer"),
    [
        ("val/accuracy", "best_model.val.accuracy"),
        ("loss/online/total/E1", "best_model.loss.online.total.E1"),
        ("val/accuracy/slow/ema=0.999", "best_model.val.accuracy.slow.ema=0.999"),
        ("val/recall@10", "best_model.val.recall%4010"),
        ("val/f1 (macro)", "best_model.val.f1%20%28macro%29"),
        ("val/Genauigkeit ü", "best_model.val.Genauigkeit%20%C3%BC"),
    ],
)
def test_a_pointer_stays_readable(key, pointer):
    assert BestCheckpointCallback(every_n_epochs=1, metric_key=key, mode="higher").pointer == pointer
    shown = f"{pointer} (best_model.{key})" if "%" in pointer else pointer
    assert describe_name(pointer) == shown


def test_keys_that_differ_in_case_are_refused_because_a_file_system_may_ignore_it():
    both = [BestCheckpointCallback(every_n_epochs=1, metric_key=key, mode="higher") for key in ("val/F1", "val/f1")]
    with pytest.raises(DeclarationError, match=r"both produce .*; remove one, or watch another metric_key"):
        check_declarations(both, TrainState(), Run())


def test_the_name_of_an_average_is_part_of_tags_as_before():
    ema = EMACallback(every_n_epochs=1, target_factors=(0.999, 1e-5), id="slow")
    assert [name_in_tags(name.removeprefix("weights/")) for name in ema.produces] == [
        "slow.ema=0.999",
        "slow.ema=1e-05",
    ]
