"""The tables of inputs that `script.docs` writes into pages."""

import pytest

from script import docs, signature

PAGE = "before\n<!-- inputs: train.py train{names} -->\nanything\n<!-- /inputs -->\nbehind\n"


def test_a_table_without_names_has_every_input_with_what_it_may_be() -> None:
    rows = docs.with_tables(PAGE.format(names="")).splitlines()
    inputs = signature.read(docs.ROOT / "train.py", "train").inputs
    assert [row.split("`")[1] for row in rows[4:-2]] == list(inputs)
    assert rows[0] == "before"
    assert rows[-1] == "behind"
    assert any(row.startswith("| `batch_size` | a whole number from 1 to 8 | `1` |") for row in rows)
    assert any(row.startswith("| `hf_token` | a secret | empty |") for row in rows)
    assert any(row.startswith("| `input_images` | a file or an https address | required |") for row in rows)


def test_names_choose_the_rows_and_their_order() -> None:
    rows = docs.with_tables(PAGE.format(names=" seed hf_private")).splitlines()[2:-2]
    assert rows[:2] == ["| input | default | meaning |", "| --- | --- | --- |"]
    assert [row.split(" | ")[:2] for row in rows[2:]] == [["| `seed`", "empty"], ["| `hf_private`", "`true`"]]


def test_a_name_that_is_no_input_is_refused() -> None:
    with pytest.raises(KeyError, match="nothing"):
        docs.with_tables(PAGE.format(names=" nothing"))


def test_a_bar_in_a_description_does_not_end_its_cell() -> None:
    [row] = docs.with_tables(PAGE.format(names=" layers_to_optimize_regex")).splitlines()[4:-2]
    assert r"(7\|12\|16\|20)" in row


def test_tables_that_are_written_stay_as_they_are() -> None:
    once = docs.with_tables(PAGE.format(names=""))
    assert docs.with_tables(once) == once
