"""The documentation's site: built from the pages as they are, and refused where a link leads nowhere."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
make_site = importlib.import_module("make_site")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source") / "site", tmp_path_factory.mktemp("target")
    make_site.prepare(ROOT, source)
    assert make_site.build(source, target) == 0
    return target


def test_every_page_is_in_it_and_in_its_contents(site):
    names = {place.removesuffix(".md") + ".html" for place in make_site.pages(ROOT).values()}
    assert len(names) > 60
    assert [name for name in sorted(names) if not (site / name).is_file()] == []
    linked = set(re.findall(r'href="([\w/.-]+\.html)', (site / "index.html").read_text()))
    assert names - linked - {"index.html"} == set()


def test_code_and_drawings_are_what_they_are_in_the_repository(site):
    stack = (site / "reference" / "stack.html").read_text()
    assert 'class="highlight-python' in stack
    assert "```" not in stack
    assert 'class="mermaid"' in (site / "explanation" / "architecture.html").read_text()
    assert 'src="../_images/dashboard.png"' in (site / "how-to" / "monitor.html").read_text()


def test_links_that_leave_it_lead_to_the_repository(site):
    page = (site / "how-to" / "vllm-versions.html").read_text()
    assert re.search(r'href="https://[^"]+/blob/main/tools/compat\.py"', page)
    assert re.search(
        r'href="\.\./backends/kvbm_remote\.html"', (site / "reference" / "remote.html").read_text()
    )


@pytest.mark.parametrize("link", ["nowhere.md", "other.md#nothing", "#nothing"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, link, capfd):
    source = tmp_path / "source"
    source.mkdir()
    (source / "other.md").write_text("# Other\n")
    contents = "\n```{toctree}\nother\n```\n"
    (source / "index.md").write_text(f"# Pages\n\n[This](other.md#other) is there.\n{contents}")
    assert make_site.build(source, tmp_path / "sound") == 0
    (source / "index.md").write_text(f"# Pages\n\n[This]({link}) is not.\n{contents}")
    capfd.readouterr()
    assert make_site.build(source, tmp_path / "broken") != 0
    assert link.strip("#").removesuffix(".md").split("#")[-1] in capfd.readouterr().err
