"""The page of planted faults is what the command writes, and says what is wrong with each."""

import pytest
from faults_table import FAULTS, PAGE, text


def test_the_page_is_what_the_command_writes():
    assert PAGE.read_text() == text(), "run `make faults`"


@pytest.mark.parametrize("suite", FAULTS)
def test_each_fault_has_a_name_of_its_own_and_a_sentence(suite):
    names = [name for name, _, _ in FAULTS[suite]]
    assert len(set(names)) == len(names)
    assert [name for name, fault, _ in FAULTS[suite] if not fault.endswith(".") or "|" in fault] == []
