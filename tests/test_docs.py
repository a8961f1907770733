"""The pages that are no part of the site, and the links that lead out of it: by their form."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# Addresses that stand in a page as what to type, not as where to read on.
LOCAL = ("http://127.0.0.1", "http://HOST")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_out_is_https_and_a_paper_is_linked_by_its_own_number(page):
    text = page.read_text()
    for address in re.findall(r"https?://[^\s)>\"'`]+", text):
        assert address.startswith(("https://", *LOCAL)), address
    for shown, linked in re.findall(r"\[arXiv ([^\]]+)\]\(https://arxiv\.org/abs/([^)]+)\)", text):
        assert shown == linked
    for number in re.findall(r"arXiv[: ]([\d.]+\d)", text):
        assert re.fullmatch(r"\d{4}\.\d{5}", number), number


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT])
def test_a_file_that_a_page_outside_the_site_names_is_there(page):
    text = page.read_text()
    named = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    named += re.findall(r"`((?:docs|tests|examples|benchmarks)/[\w./-]+\w)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_cites_papers_as_the_references_do():
    cited = re.findall(r"(\d{4}),\s+arXiv\s+([\d.]+\d)", (ROOT / "README.md").read_text())
    references = (ROOT / "docs" / "references.md").read_text()
    known = re.findall(r", (\d{4})\. \[arXiv ([^\]]+)\]", references)
    assert len(cited) == len(known) == 9
    assert {(number, year) for year, number in cited} == {(n, y) for y, n in known}
