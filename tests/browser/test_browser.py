"""The witness itself: a page that does what ours must not do is seen to do it."""

from __future__ import annotations

from pathlib import Path

from visiting import Open


def test_a_bad_page_is_seen_to_be_bad(open_page: Open, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><title>bad</title><img src="other.png"><img src="data:image/gif;base64,R0lGODlhAQABAAAAADs=">'
        '<div style="width: 2000px">wide</div><script>console.error("said"); throw new Error("raised")</script>'
    )
    visit = open_page(page.as_uri(), width=390)
    assert visit.overflow > 1500
    assert visit.requests == [page.as_uri(), (tmp_path / "other.png").as_uri()]
    assert any("said" in error for error in visit.errors) and any("raised" in error for error in visit.errors)


def test_a_good_page_is_seen_to_be_good(open_page: Open, tmp_path: Path) -> None:
    page = tmp_path / "good.html"
    page.write_text("<!doctype html><title>good</title><p>Nothing wrong here.")
    visit = open_page(page.as_uri(), width=390, scheme="dark", offline=True)
    assert (visit.overflow, visit.errors, visit.requests) == (0, [], [page.as_uri()])
    assert visit.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
